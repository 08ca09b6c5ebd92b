"""The tabs below the first screen. Each is built when it is first opened, and kept up to date only while it is seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nicegui import ui

from tutelage.server.page_act import BACK, Ask
from tutelage.server.page_bits import box
from tutelage.server.page_curves import Curves
from tutelage.server.page_data import Batches
from tutelage.server.page_log import Log
from tutelage.server.page_panel import Panel
from tutelage.server.page_runs import Runs
from tutelage.server.page_steer import Steer
from tutelage.server.page_talk import Talk
from tutelage.server.page_try import Try

if TYPE_CHECKING:
    from tutelage.server.page import Viewer

PANELS: tuple[type[Panel], ...] = (Curves, Steer, Try, Talk, Batches, Log, Runs)
KEYS = {
    "P": "pause or resume",
    "H": "lower the rate to half (shows what it does first)",
    "B": "go back to the last save (asks first)",
    **{str(i + 1): f"open {panel.title}" for i, panel in enumerate(PANELS)},
    "D": "light, dark, or as the system is",
    "?": "this list",
}


class Tabs:
    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.panels = [panel(viewer) for panel in PANELS]
        self.now = self.panels[0]

    def build(self) -> None:
        self.bar = ui.tabs(on_change=lambda e: self._switch(str(e.value))).classes("tabs")
        self.bar.props("align=left no-caps outside-arrows mobile-arrows")
        with self.bar:
            for panel in self.panels:
                ui.tab(panel.title, label=panel.title)
        with box("panels") as self.place:
            for panel in self.panels:
                panel.root = box("", "section", label=panel.title)
                panel.root.set_visibility(False)
        self.bar.set_value(self.panels[0].title)

    def open(self, index: int) -> None:
        if -1 <= index < len(self.panels):
            self.bar.set_value(self.panels[index].title)

    def _switch(self, title: str) -> None:
        for panel in self.panels:
            panel.root.set_visibility(panel.title == title)
            if panel.title == title:
                self.now = panel
                panel.show()

    def update(self) -> None:
        self.now.update()

    async def undo(self, id: str, *, weights: bool) -> None:
        do = [{"do": "undo", "id": id, "weights": weights}]
        title = "Back to the weights before it" if weights else "Undo from now on"
        await Ask(self.viewer, do, title=title, says=BACK["weights" if weights else "undo"]).open()

"""Trying on twins, branching from a save, and comparing what came of it."""

from __future__ import annotations

import asyncio
from typing import Any

from nicegui import ui

from tutelage.core.words import bits, finite, number
from tutelage.server.desk import COUNT
from tutelage.server.page_act import WRONG
from tutelage.server.page_bits import box, button, field, table, text
from tutelage.server.page_panel import Panel
from tutelage.server.page_trial import Trial


class Try(Panel):
    title = "Try"

    def build(self) -> None:
        with box("grid2"):
            with box("card pile span2", "section", label="twins"):
                Trial(self.viewer).build()
            with box("card pile", "section", label="branch"):
                self._branch()
            with box("card pile", "section", label="compare"):
                self._compare()
        self.task = asyncio.create_task(self._list())

    def _branch(self) -> None:
        text("Branch", tag="h3")
        text(
            "A run of its own that goes on from a save, with something changed. This stage goes on as it is.",
            "soft small",
            "p",
        )
        self.name = field("Name of the branch")
        self.sets = field("Changes, such as optim.lr=1e-4, until=500step")
        self.how = ui.radio(
            {"beside": "run it beside this stage", "after": "run it after", "no": "only write its recipe"},
            value="beside",
        )
        self.how.props("dense")
        with box("line wrap"):
            button("Branch from here", self._make, "main")
        self.made = text("", "small").props("role=status")

    async def _make(self) -> None:
        viewer = self.viewer
        changes = dict(part.strip().split("=", 1) for part in str(self.sets.value or "").split(",") if "=" in part)
        sets = {key.strip(): _value(value.strip()) for key, value in changes.items()}
        action = {"name": str(self.name.value or ""), "to": None, "sets": sets, "run": self.how.value}
        self.made.set_text("Asking for a save to branch from, and making its recipe …")
        try:
            found = await viewer.house.desk.branch(
                viewer.who, viewer.live.folder, action, why="", address=viewer.address
            )
        except WRONG as error:
            self.made.set_text(str(error))
            return
        if viewer.gone:
            return
        if found["state"] != "applied":
            self.made.set_text(f"{found['state']}: {found.get('error', 'no answer yet, see the log')}")
            return
        said = {"beside": "it runs now", "after": "it runs after this stage"}
        started = said.get(found["started"], f"run it with: {found['command']}")
        self.made.set_text(f"{found['run']} goes on from tick {found['tick']}; {started}")
        await self._list()

    def _compare(self) -> None:
        text("Compare", tag="h3")
        text("Held-out bits per byte at equal budgets; lay the curves over each other under Curves.", "soft small", "p")
        self.with_ = ui.select([], label="With", on_change=self._show).props("outlined dense")
        self.place = box()

    async def _list(self) -> None:
        found = await self.viewer.house.stages()
        if not self.viewer.gone:
            self.with_.set_options([info.name for info in found if info.name != self.viewer.live.name])

    async def _show(self, event: Any) -> None:
        """The paired difference at equal budgets, as `tutelage compare` has it."""
        if not event.value:
            return
        viewer, desk, other = self.viewer, self.viewer.house.desk, str(event.value)
        self._say("Comparing …", "soft")
        try:
            desk.gate.paced(desk.gate.heavy, viewer.who, viewer.address)
            places = {"a": str(viewer.live.folder), "b": str(await viewer.house.folder(other))}
            job = {"do": "compare", **places, "names": [viewer.live.name, other]}
            found = await desk.jobs.run(job, seconds=COUNT, kept=True)
        except WRONG as error:
            return self._say(str(error), "bad")
        if viewer.gone:
            return None
        rows = []
        for name, column in found["columns"].items():
            equal = column["equal_tokens"]
            gap = equal["difference"] or {}
            rows.append([name, bits(equal["a"]), bits(equal["b"]), bits(gap.get("mean"), sign=True).replace("-", "−")])
        self.place.clear()
        with self.place:
            if rows:
                table(["bits per byte", viewer.live.name, other, "difference"], rows, said="comparison")
            else:
                text("Nothing was measured on both yet.", "soft")
            text(f"At equal tokens. {found['said']}.", "soft small")

    def _say(self, said: str, look: str) -> None:
        self.place.clear()
        with self.place:
            text(said, look)


def _value(said: str) -> Any:
    """A number where it is one, else as it was typed: `1e-4`, `500step`."""
    found = number(said)
    return found if finite(found) else said

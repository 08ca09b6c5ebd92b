"""The page of `tutelage serve`: a stage's first screen, and behind it everything that can be seen and done.

It reads through tutelage.steering and what the feed keeps, and acts by requests alone; the training process never sees it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.gzip import GZipMiddleware
from nicegui import Client, ui

from tutelage import steering
from tutelage.base.errors import UserError
from tutelage.server.auth import Who, address_of
from tutelage.server.desk import Desk
from tutelage.server.page_bits import box, button, text
from tutelage.server.page_first import First
from tutelage.server.page_live import Live
from tutelage.server.page_tabs import KEYS, Tabs

HERE = Path(__file__).parent
FIRST = 0.4  # seconds that the first page of a stage waits for it to be read


@dataclass
class House:
    """What all open pages share: the desk, which stages are being looked at, and by whom."""

    desk: Desk
    lives: dict[Path, Live] = field(default_factory=dict)
    present: dict[str, tuple[str, str]] = field(default_factory=dict)  # by page: name, stage

    async def enter(self, name: str) -> Live:
        """A stage that somebody looks at; read once for all who do. Missing where there is none."""
        folder = await self.folder(name)
        live = self.lives.get(folder)
        if live is None:
            feed = await self.desk.feeds.ready(folder, seconds=FIRST)
            live = self.lives.setdefault(folder, Live(feed, name))
        live.viewers += 1
        live.feed.viewers += live.viewers == 1  # the feed stays as long as somebody looks
        await live.refresh(self.desk.feeds.look)
        return live

    def leave(self, live: Live) -> None:
        live.viewers -= 1
        if live.viewers <= 0 and self.lives.pop(live.folder, False):
            live.feed.viewers -= 1
            live.feed.used = time.monotonic()

    async def glance(self, name: str) -> Live:
        """A stage as it is now, for once."""
        live = await self.enter(name)
        self.leave(live)
        return live

    async def folder(self, name: str) -> Path:
        run, _, stage = name.partition("/")
        return (await self.desk.feeds.look(lambda: self.desk.folder(run, stage))).absolute()

    async def stages(self) -> list[steering.StageInfo]:
        return await self.desk.feeds.look(lambda: steering.stages(self.desk.runs))

    async def newest(self) -> str:
        """What to open first: a stage at work, else the one that began last; nothing where none has begun."""
        found = await self.stages()
        at_work = [info for info in found if info.live]
        return max(at_work or found, key=lambda i: (i.folder / "stage.json").stat().st_mtime).name if found else ""


def mount(app: FastAPI) -> House:
    """Put the page onto the server (`app.build`): all that its own routes do not answer is the page's."""
    house = House(app.state.desk)

    @ui.page("/", title="Tutelage")
    async def first(request: Request) -> None:
        name = await house.newest()
        return await shown(house, request, name) if name else nothing(house)

    @ui.page("/stage/{run}/{stage}", title="Tutelage")
    async def one(request: Request, run: str, stage: str) -> None:
        return await shown(house, request, f"{run}/{stage}")

    ui.run_with(
        app,
        title="Tutelage",
        dark=None,
        tailwind=False,
        favicon=FAVICON,
        show_welcome_message=False,
        reconnect_timeout=30.0,  # or a browser that was busy for some seconds loads the page anew, and what was typed is gone
        message_history_length=50,
        binding_refresh_interval=None,
        gzip_middleware_factory=lambda inner: GZipMiddleware(inner, compresslevel=3),  # of a megabyte each page once
    )
    return house


FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="8" fill="#1f6fb2"/>'
    '<path d="M7 9c6 0 6 14 18 14" fill="none" stroke="#fff" stroke-width="3.4" stroke-linecap="round"/></svg>'
)


def dress() -> None:
    """The look, and what charts need in the browser; both small, so they travel with the page."""
    ui.add_head_html(f"<style>{(HERE / 'look.css').read_text(encoding='utf-8')}</style>")
    ui.add_head_html(f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>")


def nothing(house: House, said: str = "") -> None:
    """What is shown where there is no stage to show."""
    dress()
    with box("t"), box(tag="main"), box("card pile"):
        text("Tutelage", tag="h2")
        text(said or f"No stage has begun in {house.desk.runs} yet. Start one with: tutelage run RECIPE", "soft", "p")
        if said:
            ui.link("To what is running", "/")


async def shown(house: House, request: Request, name: str) -> None:
    """The page of a stage, or why there is none."""
    try:
        return await open_page(house, request, name)
    except UserError as error:
        return nothing(house, str(error))


async def open_page(house: House, request: Request, name: str) -> None:
    """Build the page of a stage for one viewer, and take it down when they go."""
    live = await house.enter(name)
    dress()
    viewer = Viewer(house, live, ui.context.client, request)
    ui.page_title(f"{live.name} · Tutelage")
    viewer.build()


class Viewer:
    """One open page."""

    def __init__(self, house: House, live: Live, client: Client, request: Request) -> None:
        self.house, self.live, self.client = house, live, client
        self.who: Who = request.scope["state"]["who"]
        self.address = address_of(request.scope)
        self.home = str(request.scope.get("root_path", ""))
        house.present[client.id] = (self.who.name, live.name)
        client.on_delete(self.leave)
        self.others: dict[str, tuple[Live, float]] = {}  # laid over the charts: label to stage and shift in ticks
        self.frames: dict[str, int] = {}
        self.gone = False
        self.first, self.tabs = First(self), Tabs(self)
        self.status: Any = None
        self.present_seen: list[tuple[str, str]] = []

    def build(self) -> None:
        with box("t") as self.root:
            ui.link("Skip to the stage", "#stage").classes("skip")
            self._head()
            with box(tag="main").props("id=stage tabindex=-1"):
                self.first.build()
                self.tabs.build()
        ui.keyboard(on_key=self._key, repeating=False)
        ui_run(self.client, "tutelage.theme()")  # as this browser chose before
        self.show_series()
        self.timer = ui.timer(1.0, self.tick)

    def _head(self) -> None:
        with box("head", "header"), box("line"):
            ui.link("Tutelage", "/").classes("brand")
            with box("", "h1"):
                found = button(self.live.name, lambda: self.tabs.open(-1), "plain", label=f"{self.live.name}: all runs")
                found.said.classes("cut")  # type: ignore[attr-defined]
            self.state = text(self.live.state, f"pill {self.live.state}")
            box("grow")
            self.faces = box("who", label="who is connected")
            role = "" if self.steers else " (looks)"
            text(f"{self.who.name}{role}", "small cut hide-small").tooltip(
                f"You are {self.who.name}, {'a person' if self.who.actor == 'person' else 'an agent'}"
                f"{'' if self.steers else ', and may only look'}"
            )
            button("◐", self._theme, "plain tiny", label="light, dark or as the system", key_says="d").tooltip(
                "Light or dark (D)"
            )
            button("?", self._help, "plain tiny", label="shortcuts").tooltip("Shortcuts (?)")

    @property
    def steers(self) -> bool:
        """Whether this viewer may ask for anything: as the gate sees it now."""
        return self.who.may("steer") and self.house.desk.gate.still(self.who)

    # -- keeping up -------------------------------------------------------------------------------------------------

    async def tick(self) -> None:
        """Once a second: what is new, and nothing else; nothing for one whose session or token is good no longer."""
        if not self.gone and not self.house.desk.gate.still(self.who):
            self.timer.cancel()
            self.leave()
            return ui_run(self.client, "location.reload()")  # as whoever comes now, if anybody may
        for live in [self.live, *(live for live, _ in self.others.values())]:
            await live.refresh(self.house.desk.feeds.look)
        if self.gone:
            return
        self._send(self.live)
        for live, _ in self.others.values():
            self._send(live)
        state = self.live.state
        if self.state.text != state:
            self.state.set_text(state)
            self.state.classes(replace=f"pill {state}")
        self._faces()
        self.first.update()
        self.tabs.update()

    async def refresh(self) -> None:
        """Look again at once: something was just done."""
        self.live.stale()
        await self.tick()

    def _send(self, live: Live) -> None:
        """Points that this browser has not: the shared news where it has all before them, else everything."""
        has = self.frames.get(live.name, -1)
        if has == live.frame:
            return
        self.frames[live.name] = live.frame
        ui_run(self.client, f"tutelage.take({live.said if has == live.frame - 1 else live.whole()})")

    def show_series(self) -> None:
        """Say which stages the charts draw."""
        over = [{"stage": live.name, "label": label, "shift": shift} for label, (live, shift) in self.others.items()]
        ui_run(self.client, f"tutelage.show({json.dumps(self.live.name)}, {json.dumps(over)})")
        self.frames = {
            name: n for name, n in self.frames.items() if name in [self.live.name, *(o["stage"] for o in over)]
        }
        for live in [self.live, *(live for live, _ in self.others.values())]:
            self._send(live)

    def _faces(self) -> None:
        """Who looks at this stage now."""
        here = sorted(p for p in self.house.present.values() if p[1] == self.live.name)
        if here == self.present_seen:
            return
        self.present_seen = here
        self.faces.clear()
        names = list(dict.fromkeys(name for name, _ in here))
        with self.faces:
            for name in names[:5]:
                text(name[:2], "face me" if name == self.who.name else "face").tooltip(name)
            text(f"connected: {', '.join(names)}", "sr")

    # -- telling ----------------------------------------------------------------------------------------------------

    def say(self, said: str, look: str = "soft", *, undo: str = "") -> None:
        """What became of the last action, beside the three buttons."""
        if self.gone:
            return
        self.status.clear()
        with self.status:
            text(said, look)
            if undo:
                button("Undo from now on", lambda: self.tabs.undo(undo, weights=False), "tiny")

    async def _key(self, event: Any) -> None:
        if not event.action.keydown or event.modifiers.ctrl or event.modifiers.meta or event.modifiers.alt:
            return
        key = str(event.key.name).lower()
        if key.isdigit():
            self.tabs.open(int(key) - 1)
        act = {"p": self.first.on_pause, "h": self.first.on_lower, "b": self.first.on_back}.get(key)
        if act and self.live.live:
            await act()
        elif key == "d":
            self._theme()
        elif key == "?":
            self._help()

    def _theme(self) -> None:
        ui_run(self.client, "tutelage.theme(true)")

    def _help(self) -> None:
        with self.root, ui.dialog() as dialog, box("t-dialog pile"):
            dialog.on("hide", dialog.delete)
            text("Shortcuts", tag="h2")
            for key, said in KEYS.items():
                with box("line"):
                    text(key, tag="kbd")
                    text(said)
            text("Shift and the wheel zoom a chart; dragging moves it.", "soft small")
        dialog.open()

    def leave(self) -> None:
        """The browser is gone: nothing of this page stays."""
        if self.gone:
            return
        self.gone = True
        self.house.present.pop(self.client.id, None)
        for live in [self.live, *(live for live, _ in self.others.values())]:
            self.house.leave(live)
        self.others = {}


def ui_run(client: Client, code: str) -> None:
    with client:
        client.run_javascript(code)


__all__ = ["House", "mount"]

"""Runs and their stages as graphs: what came from what, how far each is; a click opens it."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

from tutelage import steering
from tutelage.core import diagram
from tutelage.server.page_bits import box, draw, text
from tutelage.server.page_live import Live
from tutelage.server.page_panel import Panel
from tutelage.watching import read


class Runs(Panel):
    title = "Runs"

    def build(self) -> None:
        self.place = box("pile wide")
        self.turn = 0

    def update(self) -> None:
        self.turn += 1
        if self.turn % 5 == 1:  # many files for one look
            self.task = asyncio.create_task(self._look())

    async def _look(self) -> None:
        found = await self.viewer.house.stages()
        if self.viewer.gone or not self.changed([(i.name, i.state, i.tick // 50) for i in found]):
            return
        self.place.clear()
        runs = list(dict.fromkeys(info.run for info in found))
        runs.sort(key=lambda run: not any(i.live for i in found if i.run == run))
        with self.place:
            for run in runs:
                graph = graph_of(run, found)
                with box("card pile", "section", label=f"run {run}"):
                    text(run, tag="h3")
                    with box("scroll").props("tabindex=0"):
                        draw(diagram.draw(graph, link=self._link, here=self.viewer.live.name))

    def _link(self, name: str) -> str:
        run, _, stage = name.partition("/")
        return f"{self.viewer.home}/stage/{quote(run, safe='')}/{quote(stage, safe='')}"


def graph_of(run: str, found: list[steering.StageInfo]) -> dict[str, dict[str, Any]]:
    """What `diagram.draw` takes: the stages of a run, and those of other runs that they come from, in order of descent."""
    known = {info.name: info for info in found}
    wanted = dict.fromkeys(n for i in found if i.run == run for n in [*i.lineage, i.name] if n in known)
    made = {}
    for name in sorted(wanted, key=lambda n: len(known[n].lineage)):
        info = known[name]
        parents = [name for name in starts(info) if name in known]
        made[name] = {
            "inputs": parents,
            "start": parents,
            "state": info.state,
            "tokens": 0,
            "until": f"tick {info.tick:,}",
            "product": "",
            "shown": info.stage if info.run == run else name,
        }
    return made


def starts(info: steering.StageInfo) -> list[str]:
    """RUN/STAGE of what a stage's weights come from directly."""
    given = (read(info.folder / "stage.json") or {}).get("stage", {}).get("start")
    names = [
        str(s.get("stage", "") if isinstance(s, dict) else s) for s in (given if isinstance(given, list) else [given])
    ]
    names = [name.partition("@")[0] for name in names]
    named = [name if "/" in name else f"{info.run}/{name}" for name in names]
    return [name for name in named if name in info.lineage] or info.lineage[-1:]


def shift_of(other: Live, here: Live) -> float:
    """Ticks by which another stage's curve is moved so that both lie over each other: a branch begins where it left."""
    start = other.description().get("start")
    start = start.get("stage") if isinstance(start, dict) else start
    if isinstance(start, str) and "@" in start and start.partition("@")[0] in (here.name, here.folder.parent.name):
        tick = start.partition("@")[2]
        if tick.isdigit():  # saves are named by their tick
            return float(tick)
    return 0.0

"""Live charts, branches laid over them, and the forgetting matrix as a heat map."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from nicegui import ui

from tutelage.core.ledger import BITS
from tutelage.core.words import bits, finite, number
from tutelage.server import charts
from tutelage.server.page_bits import box, text
from tutelage.server.page_live import Live
from tutelage.server.page_panel import Panel
from tutelage.server.page_runs import shift_of

if TYPE_CHECKING:
    from tutelage.server.page import House


class Curves(Panel):
    title = "Curves"

    def build(self) -> None:
        with box("line wrap").style("margin-bottom: .8rem"):
            self.over = ui.select([], multiple=True, label="Lay other stages over these", on_change=self._overlay)
            self.over.props("outlined dense use-chips").style("min-width: min(19rem, 100%)")
            text("▾ marks an action; point near it to see who and why", "soft small")
        self.cards: dict[str, Any] = {}
        with box("grid2"):
            for chart in charts.CHARTS:
                with box("card", "section", label=chart.title) as card:
                    with box("line ends"):
                        text(chart.title, tag="h3")
                        text(chart.unit, "soft small")
                    charts.place(chart)
                self.cards[chart.key] = card
                card.set_visibility(chart.always)
            with box("card", "section", label="forgetting matrix") as self.last:
                with box("line ends"):
                    text("Forgetting matrix", tag="h3")
                    text("bits per byte after each stage; the deeper, the further from its best", "soft small")
                self.heat = box("scroll", role="region", label="forgetting matrix").props("tabindex=0")
        self.task = asyncio.create_task(self._list())

    async def _list(self) -> None:
        """The stages that may be laid over: all others that have begun."""
        found = await self.viewer.house.stages()
        if not self.viewer.gone:
            self.over.set_options([info.name for info in found if info.name != self.viewer.live.name])

    async def _overlay(self, event: Any) -> None:
        viewer = self.viewer
        wanted = list(event.value or [])
        for label in [label for label in viewer.others if label not in wanted]:
            viewer.house.leave(viewer.others.pop(label)[0])
        for name in [name for name in wanted if name not in viewer.others]:
            live = await viewer.house.enter(name)
            if viewer.gone:
                return viewer.house.leave(live)
            viewer.others[name] = (live, shift_of(live, viewer.live))
        viewer.show_series()

    def update(self) -> None:
        live = self.viewer.live
        for chart in charts.CHARTS:
            if not chart.always:
                names = [n for n in live.series if n in chart.names or n.startswith(chart.prefixes)]
                self.cards[chart.key].set_visibility(bool(names))
        wide = sum(card.visible for card in self.cards.values()) % 2 == 0  # else the room beside the last chart is left
        self.last.classes(add="span2" if wide else "", remove="" if wide else "span2")
        if self.changed(len(live.evals), live.state):
            self.more = asyncio.create_task(self._matrix())

    async def _matrix(self) -> None:
        rows = await matrix(self.viewer.live, self.viewer.house)
        if self.viewer.gone:
            return
        self.heat.clear()
        with self.heat:
            heat_map(rows)


async def matrix(live: Live, house: House) -> dict[str, dict[str, float]]:
    """Bits per byte by stage and column: the ends of the stages before this one, its start, and now."""
    about = {info.name: info for info in await house.stages()}
    here = about.get(live.name)
    rows: dict[str, dict[str, float]] = {}
    for name in here.lineage if here else []:
        if name in about and (before := await house.glance(name)).evals:
            rows[name.partition("/")[2]] = values(before.evals[-1])
    if live.evals:
        rows[f"{live.folder.parent.name}, start"] = values(live.evals[0])
        if len(live.evals) > 1:
            rows[f"{live.folder.parent.name}, {'end' if live.state == 'finished' else 'now'}"] = values(live.evals[-1])
    return rows


def values(row: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix(BITS): number(v) for key, v in row["values"].items() if key.startswith(BITS)}


def heat_map(rows: dict[str, dict[str, float]]) -> None:
    """A table whose cells are the deeper the further they lie from their column's best."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not columns:
        text("Nothing was measured yet.", "soft")
        return
    ends = {}
    for name in columns:
        known = [row[name] for row in rows.values() if finite(row.get(name))]
        ends[name] = (min(known, default=0.0), max(known, default=0.0))
    with box("plain", "table"):
        with box(tag="thead"), box(tag="tr"):
            text("after", "words", "th").props("scope=col")
            for name in columns:
                text(name, "", "th").props("scope=col")
        with box(tag="tbody"):
            for stage, row in rows.items():
                with box(tag="tr"):
                    text(stage, "words", "th").props("scope=row")
                    for name in columns:
                        low, high = ends[name]
                        far = (row[name] - low) / (high - low) if finite(row.get(name)) and high > low else 0.0
                        cell = text(bits(row.get(name)), "", "td")
                        cell.style(f"background: rgba(var(--heat), {0.5 * far:.2f})")

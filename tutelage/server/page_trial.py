"""Trying a change on two short twins of the stage: what it costs, the paired difference, then adopt or discard."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from nicegui import ui

from tutelage import trying
from tutelage.core.words import amount, bits, duration, finite, number
from tutelage.server.page_act import WRONG, show_effects
from tutelage.server.page_bits import box, button, field, table, text
from tutelage.server.page_words import spell
from tutelage.trying import Try

if TYPE_CHECKING:
    from tutelage.server.page import Viewer

T = TypeVar("T")


class Trial:
    """The card of one stage's tries. A try that was measured is shown again to whoever comes back."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.busy = False  # a try was begun on this very page

    def build(self) -> None:
        text("Try", tag="h3")
        says = "Two short twins go on from the same save with the same batches, one with the change. Meanwhile the stage is paused."
        text(says, "soft small", "p")
        with box("line wrap"):
            paths = [target["path"] for target in self.viewer.live.controls["targets"]]
            self.path = ui.select(paths, value=paths[0] if paths else None, label="Value", new_value_mode="add-unique")
            self.path.props("outlined dense").style("flex: 2 1 11rem")
            self.by = field("times", "0.5").style("flex: 1 1 5rem")
            self.steps = field("steps each", "50").style("flex: 1 1 5rem")
        with box("line wrap"):
            button("See what it costs", self.cost, "main")
        self.place = box("pile", role="status", label="try")
        self.task = asyncio.create_task(self._before())

    async def _before(self) -> None:
        """A try that waits to be adopted or discarded, or is not over yet: whoever loads the page anew sees it too."""
        waited = False
        while not self.viewer.gone:
            found = await self.viewer.house.desk.feeds.look(lambda: trying.tries(self.viewer.live.folder))
            if self.busy or not found or self.viewer.gone:
                return
            if found[-1].state != "running":
                if found[-1].state == "measured":
                    self._measured(found[-1])
                elif waited:
                    self._say(f"The try is {found[-1].state}. {found[-1].error}", "bad" if found[-1].error else "soft")
                return
            waited = True
            self._say(f"A try from tick {found[-1].tick} is not over; the stage is paused for it.", "warn")
            await asyncio.sleep(2.0)

    def _say(self, said: str, look: str = "soft") -> None:
        if not self.viewer.gone:
            self.place.clear()
            with self.place:
                text(said, look)

    async def cost(self) -> None:
        viewer, by, steps = self.viewer, number(self.by.value), number(self.steps.value)
        if not self.path.value or not finite(by) or not 1 <= steps <= 100_000:
            return self._say("A value, a factor, and 1 to 100,000 steps", "bad")
        do = [{"do": "scale", "path": str(self.path.value), "by": by}]
        self.busy = True
        self._say("Asking the trainer …")
        try:
            self._may()
            who = viewer.who
            tried = await beside(
                lambda: trying.begin_try(viewer.live.folder, do, int(steps), by=who.name, actor=who.actor)
            )
        except WRONG as error:
            return self._say(str(error), "bad")
        if viewer.gone:
            return None
        self.place.clear()
        with self.place:
            seconds, memory = tried.estimate.get("seconds"), tried.estimate.get("memory")
            text(f"{spell(do)}: two twins of {tried.steps} steps from tick {tried.tick}", "strong")
            more = f", {amount(memory)}B of memory at least" if memory else ""
            text(f"It takes about {duration(seconds)}{more}; the stage is paused until you decide.", "warn small")
            show_effects({"state": "dry", "effects": tried.effects})
            with box("line wrap"):
                button("Try it", lambda: self.run(tried), "tiny main")
                button("Leave it", lambda: self._say(""), "tiny plain")
        return None

    def _may(self) -> None:
        """Twins are processes on the server's machine: for who may start some. Denied for others."""
        desk, viewer = self.viewer.house.desk, self.viewer
        desk.gate.need(viewer.who, "admin")
        desk.gate.paced(desk.gate.heavy, viewer.who, viewer.address)

    async def run(self, tried: Try) -> None:
        loop = asyncio.get_running_loop()

        def told(twin: str, done: int, of: int) -> None:
            loop.call_soon_threadsafe(
                self._say, f"{'with' if twin == 'changed' else 'without'} the change: step {done} of {of}"
            )

        self._say("Pausing at a save, and laying out the twins …")
        try:
            self._may()
            await beside(lambda: trying.run_try(tried, say=told))
        except WRONG as error:
            return self._say(str(error), "bad")
        return None if self.viewer.gone else self._measured(tried)

    def _measured(self, tried: Try) -> None:
        result = tried.result or {}
        rows = []
        for name, key in (("loss", "loss"), ("loss, second half", "late")):
            found = result.get(key)
            if found:
                spread = (
                    "–"
                    if found.get("low") is None
                    else f"{bits(found['low'], sign=True)} to {bits(found['high'], sign=True)}"
                )
                rows.append([name, bits(found["mean"], sign=True), spread])
        for name, found in result.get("measures", {}).items():
            if name.startswith("bits_per_byte/"):
                rows.append([f"{name.partition('/')[2]}, bits per byte", bits(found["difference"], sign=True), "–"])
        self.place.clear()
        with self.place:
            text(f"{spell(tried.do)}, {result.get('steps', 0)} steps from tick {tried.tick}", "strong")
            minus = [[cell.replace("-", "−") for cell in row] for row in rows]
            table(["changed minus plain", "difference", "95 % interval"], minus, said="paired difference")
            same = f"{result.get('same_batches', 0)} of {result.get('steps', 0)} steps saw the same batch; lower is better."
            text(same, "soft small")
            with box("line wrap"):
                button("Adopt", lambda: self.settle(tried, adopt=True), "tiny main")
                button("Discard", lambda: self.settle(tried, adopt=False), "tiny")

    async def settle(self, tried: Try, *, adopt: bool) -> None:
        viewer = self.viewer
        self._say("Telling the stage …")
        try:
            viewer.house.desk.gate.need(viewer.who, "steer")
            tried.by, tried.actor = viewer.who.name, viewer.who.actor  # signed by who decides
            told = await beside(lambda: trying.settle(tried, adopt=adopt))
        except WRONG as error:
            return self._say(str(error), "bad")
        where = f" at tick {told['tick']}" if told and "tick" in told else ""
        self._say(f"{'Adopted' if adopt else 'Discarded'}{where}; the stage goes on as it did before.", "good")
        return await viewer.refresh()


async def beside(what: Callable[[], T]) -> T:
    """Do what may take minutes in a thread that does not hold the server back when it ends."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def put(found: Any, error: BaseException | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(found)

    def work() -> None:
        try:
            found, error = what(), None
        except BaseException as caught:
            found, error = None, caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(put, found, error)

    threading.Thread(target=work, daemon=True, name="try").start()
    return await done

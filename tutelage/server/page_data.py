"""Which documents a step saw, named from the positions that every step logs."""

from __future__ import annotations

from tutelage.core.words import number
from tutelage.server.desk import COUNT
from tutelage.server.page_act import WRONG
from tutelage.server.page_bits import box, button, field, text
from tutelage.server.page_panel import Panel


class Batches(Panel):
    title = "Batches"

    def build(self) -> None:
        with box("card pile wide", "section", label="batch browser"):
            text("Which documents were in a step", tag="h3")
            with box("line wrap"):
                last = self.viewer.live.last.get("tick", 1)
                self.tick = field("Tick", str(last)).style("width: 9rem").on("keydown.enter", self.look)
                button("‹", lambda: self._move(-1), "tiny", label="the tick before")
                button("›", lambda: self._move(1), "tiny", label="the tick after")
                self.go = button("Show", self.look, "tiny main")
                self.note = text("", "soft small")
            self.place = box("pile")

    async def _move(self, by: int) -> None:
        self.tick.set_value(str(max(1, int(number(self.tick.value) if number(self.tick.value) > 0 else 1) + by)))
        await self.look()

    async def look(self) -> None:
        if not self.go.enabled:
            return
        wanted = number(self.tick.value)
        if not wanted >= 1:
            self.note.set_text("A tick is a number from 1.")
            return
        self.go.set_enabled(False)
        self.note.set_text("Repeating the draw of that step …")
        viewer, lines, wrong = self.viewer, [], ""
        job = {"do": "batch", "folder": str(viewer.live.folder), "tick": int(wanted)}
        try:
            viewer.house.desk.gate.paced(viewer.house.desk.gate.heavy, viewer.who, viewer.address)
            lines = (await viewer.house.desk.jobs.run(job, seconds=COUNT, kept=True))["rows"]
        except WRONG as error:
            wrong = str(error)
        if self.viewer.gone:
            return
        self.go.set_enabled(True)
        self.note.set_text("" if wrong else f"tick {int(wanted)}: {len(lines)} pieces of documents")
        self.place.clear()
        with self.place:
            if wrong:
                text(wrong, "bad")
            for line in lines:
                head, _, said = line.partition("text=")
                with box("entry pile tight"):
                    text(head.strip(), "mono soft")
                    if said:
                        text(said, "said mono")

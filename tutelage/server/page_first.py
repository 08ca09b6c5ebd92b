"""The first screen: loss, what is being forgotten, the rate in use, the time left, three buttons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tutelage.core.words import bits, duration, finite, number
from tutelage.server import charts
from tutelage.server.page_act import BACK, SKIP, Ask, act
from tutelage.server.page_bits import box, button, curve, draw, rename, text
from tutelage.server.page_live import Column
from tutelage.server.page_words import rate

if TYPE_CHECKING:
    from tutelage.server.page import Viewer


class First:
    """Built once, then only its texts change."""

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.kept_seen: list[Column] | None = None
        self.alerts_seen: list[tuple[str, bool]] = []

    def build(self) -> None:
        self.alerts = box("", role="alert")
        with box("first"):
            with box("card loss", "section", label="loss"):
                with box("line ends"):
                    text("Loss", "name", "h2")
                    self.trend = text("", "small soft")
                self.loss = text("–", "big")
                self.spark = charts.place(charts.SPARK)
            with box("card kept", "section", label="what is being forgotten"):
                with box("line ends"):
                    text("Kept and forgotten", "name", "h2")
                    text("bits per byte, held out", "small soft")
                self.columns = box("columns").props("tabindex=0")
            with box("pair"):
                with box("card", "section", label="rate in use"):
                    text("Rate in use", "name", "h2")
                    self.rate = text("–", "mid")
                    self.rate_note = text("", "small soft")
                with box("card", "section", label="time left"):
                    text("Time left", "name", "h2")
                    self.left = text("–", "mid")
                    with box("bar", role="progressbar", label="share done") as self.bar:
                        self.fill = box()
                    self.done = text("", "small soft")
            with box("acts", "section", label="steer"), box("line wrap"):
                self.pause = button("Pause", self.on_pause, key="P")
                self.lower = button("Lower the rate ÷ 2", self.on_lower, key="H")
                self.back = button("Go back", self.on_back, key="B")
                self.viewer.status = box("line wrap small grow done", role="status", label="last action")
        self.update()

    def update(self) -> None:
        live = self.viewer.live
        value = live.last.get("loss")
        self.loss.set_text(f"{number(value):.3f}" if finite(value) else "–" if value is None else "not a number")
        self.loss.classes(
            add="bad" if value is not None and not finite(value) else "",
            remove="" if value is not None and not finite(value) else "bad",
        )
        self.trend.set_text(live.trend())
        self.rate.set_text(rate(live.rate()))
        peak = live.target("optim.base").get("now")
        note = f"of {rate(peak)} at the schedule's peak" if finite(peak) else "schedule included"
        self.rate_note.set_text(note if live.live else "in the last step")
        share, words = live.progress()
        left = live.left()
        self.left.set_text("done" if live.state == "finished" else duration(left))
        self.done.set_text(words)
        percent = f"{100 * min(1.0, max(0.0, share)):.1f}" if finite(share) else "0"
        self.fill.style(f"width: {percent}%")
        self.bar.props(f"aria-valuenow={percent} aria-valuemin=0 aria-valuemax=100")
        self._buttons()
        self._columns()
        self._alerts()

    def _buttons(self) -> None:
        live, may = self.viewer.live, self.viewer.steers
        rename(self.pause, "Resume" if live.state == "paused" else "Pause")
        saves = live.controls["saves"]
        rename(self.back, f"Go back to tick {saves[-1]['tick']:,}" if saves else "Go back")
        for found, possible in ((self.pause, True), (self.lower, True), (self.back, bool(saves))):
            found.set_enabled(may and live.live and possible)

    def _columns(self) -> None:
        found = self.viewer.live.columns()
        if found == self.kept_seen:
            return
        self.kept_seen = found
        self.columns.clear()
        with self.columns:
            if not found:
                text("Nothing was measured yet.", "soft")
            for column in found:
                text(column.name, "cut" + (" strong" if column.known else "")).tooltip(column.name)
                look = "lost" if column.alarm else ""
                draw(curve(column.curve, said=f"{column.name} over this stage"), look)
                text(bits(column.now) if finite(column.now) else "–", "num strong")
                text(*self._verdict(column))

    @staticmethod
    def _verdict(column: Column) -> tuple[str, str]:
        """How it stands against its best, in words and not in color alone."""
        if not finite(column.now):
            return "not a number", "num bad strong small"
        change = bits(column.lost, sign=True).replace("-", "−")
        if column.alarm:
            return f"▲ {change} {'alarm' if column.named else 'lost'}", "num bad strong small"
        if len(column.curve) < 2:
            return "measured once", "num soft small"
        if column.own:
            return f"{change} learning", "num soft small"
        if not column.known:
            return f"{change} {'better' if column.lost < 0 else 'worse'}", "num soft small"
        return f"{change} {'kept' if column.lost > -0.0005 else 'better'}", "num good small"

    def _alerts(self) -> None:
        found = self.viewer.live.alerts()
        if found == self.alerts_seen:
            return
        self.alerts_seen = found
        self.alerts.clear()
        with self.alerts:
            for grave, look in ((True, "alert"), (False, "alert mild")):
                if said := [one for one, hurts in found if hurts == grave]:
                    with box(f"{look} pile tight"):
                        for one in said:
                            text(f"{'▲' if grave else '●'} {one}")

    # -- the three buttons ------------------------------------------------------------------------------------------

    async def on_pause(self) -> None:
        paused = self.viewer.live.state == "paused"
        await act(self.viewer, [{"do": "resume" if paused else "pause"}], title="Resume" if paused else "Pause")

    async def on_lower(self) -> None:
        do = [{"do": "scale", "path": "optim.lr", "by": 0.5}]
        await Ask(
            self.viewer, do, title="Lower the rate to half", says="From the next step on. It can be undone."
        ).open()

    async def on_back(self) -> None:
        saves = self.viewer.live.controls["saves"]
        if not saves:
            self.viewer.say("There is no save to go back to yet.", "warn")
            return
        tick = saves[-1]["tick"]
        do = [{"do": "rollback", "to": tick}]
        await Ask(
            self.viewer, do, title=f"Back to the weights of tick {tick:,}", says=BACK["rollback"], options=SKIP
        ).open()

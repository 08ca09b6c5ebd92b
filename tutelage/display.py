"""What a person sees on the terminal while stages run: one line a stage, and plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from tutelage.core.words import bits, number


class Display:
    """Progress of every stage at once. Without a terminal, a line now and then."""

    def __init__(self, console: Console, *, peak: float) -> None:
        self.console, self.peak = console, peak
        self.plain = not console.is_terminal
        self.bars: dict[str, TaskID] = {}
        self.seen: dict[str, dict[str, Any]] = {}
        self.printed: dict[str, float] = {}
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[what]}", markup=False),
            console=console,
        )

    def __enter__(self) -> Display:
        if not self.plain:
            self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.plain:
            self.progress.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to a question."""
        if not self.plain:
            self.progress.stop()
        try:
            yield
        finally:
            if not self.plain:
                self.progress.start()

    def tell(self, stage: str, said: dict[str, Any]) -> None:
        """Take in what a stage says of itself."""
        for key, color in (("warning", "yellow"), ("note", "cyan"), ("failed", "red")):
            if key in said:
                self.console.print(f"{stage}: {said[key]}", style=color, highlight=False, soft_wrap=True)
                return
        now = self.seen.setdefault(stage, {})
        now.update(said)
        if "reused" in said:
            self.console.print(f"{stage}: there already ({said['reused']})", highlight=False, soft_wrap=True)
            return
        if "unmade" in said:
            self.console.print(f"{stage}: {said['unmade']}", highlight=False, soft_wrap=True)
            return
        if "finished" in said:
            now["frac"] = 1.0
        what = self.line(now)
        if self.plain:
            due = time.monotonic() - self.printed.get(stage, -1e9) > 15
            if "finished" in said or "measured" in said or ("step" in said and due):
                self.printed[stage] = time.monotonic()
                self.console.print(f"{stage}: {what}", highlight=False, soft_wrap=True)
            return
        if stage not in self.bars:
            self.bars[stage] = self.progress.add_task(stage, total=1.0, what="")
        self.progress.update(self.bars[stage], completed=now.get("frac", 0.0), what=what)

    def line(self, now: dict[str, Any]) -> str:
        """Step, loss, bits per byte, tokens/s, share of measured peak, time left."""
        if "finished" in now:
            return f"done{self._bits(now)}"
        if "step" not in now or "loss" not in now:
            share = f" {now['done'] / now['of']:.0%}" if now.get("of") else ""
            return f"{now.get('doing', 'starting')}{share}{self._bits(now)}"
        share = f"  {now['flops_per_second'] / self.peak:.0%} of peak" if self.peak else ""
        return (
            f"step {now['step']}  loss {number(now['loss']):.3f}{self._bits(now)}  {now['tokens_per_second']:,.0f} tok/s"
            f"{share}  {spell(now['left'])} left"
        )

    def _bits(self, now: dict[str, Any]) -> str:
        found = {k.split("/", 1)[1]: v for k, v in now.get("measured", {}).items() if k.startswith("bits_per_byte/")}
        shown = "  ".join(f"{name} {bits(value)}" for name, value in found.items())
        return f"  bits/byte: {shown}" if shown else ""


def spell(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"

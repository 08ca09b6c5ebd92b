"""Measurement inside a stage: when, under which budget, and what it found."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tutelage.base.clock import Span
from tutelage.base.errors import UserError
from tutelage.base.method import Method
from tutelage.base.spec import EvalSpec
from tutelage.core.pace import UNKNOWN
from tutelage.core.view import View

if TYPE_CHECKING:
    from tutelage.core.stage import Run

MOST = 100_000  # measurements of a stage


def planned(spec: EvalSpec, total: dict[str, float]) -> list[int]:
    """Steps at which to measure before the end, where it is always done: the start, then log-spaced, then even.

    `total` is the clock's: what each unit reaches when the stage ends.
    """
    last = math.ceil(total.get("step", 0))
    if not last or last >= UNKNOWN:
        return [0]  # planned again once it is known how many steps there are
    steps = {0}
    if spec.every == "log":  # the first before enough steps were timed to know what fits the budget: few of them
        steps |= {round(last / 2**k) for k in range(1, 7)} | {round(last * i / 10) for i in range(1, 10)}
    elif spec.every != "none":
        span = Span.parse(spec.every)
        if span.unit != "%" and span.unit not in total:
            raise UserError(
                f"evals.every: the length of this stage in {span.unit} is not known; write steps, tokens or percent"
            )
        gap = last * span.share if span.unit == "%" else span.value * total["step"] / total[span.unit]
        gap = max(1, round(gap))
        if last > MOST * gap:
            raise UserError(
                f"evals.every: {spec.every} would be {last // gap:,} measurements, and {MOST:,} are the most"
            )
        steps |= set(range(0, last, gap))
    return sorted(step for step in steps if 0 <= step < last)


def thinned(steps: list[int], *, room: int) -> list[int]:
    """At most `room` of the steps, from amidst them: of equally many parts of the list the middle of each."""
    return [steps[int((i + 0.5) * len(steps) / room)] for i in range(room)] if len(steps) > room else steps


@dataclass
class Evals:
    """A stage's measurements. What to leave out is decided once, from measured times, and journaled."""

    spec: EvalSpec
    probes: list[Method]
    steps: list[int]
    seconds: float = 0.0  # spent so far
    last: float = 0.0  # of the last one
    thinned_from: int | None = None
    results: dict[str, float] = field(default_factory=dict)

    def replan(self, total: dict[str, float]) -> None:
        """The stage has a new length; what was thinned stays as thin."""
        kept, whole = len(self.steps), self.thinned_from
        self.steps = planned(self.spec, total)
        if whole:
            self.steps = thinned(self.steps, room=max(1, math.ceil(len(self.steps) * kept / whole)))

    def due(self, step: int) -> bool:
        return step in self.steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {name: getattr(self, name) for name in ("steps", "thinned_from", "seconds", "last")}

    def load(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def thin(self, *, now: int, step_seconds: float, total: float) -> dict[str, Any]:
        """A choice, to be journaled, that keeps measurement under its budget, given what it and a step cost here."""
        whole, share = len(self.steps), Span.parse(self.spec.budget).share
        ahead = [step for step in self.steps if step > now]
        affordable = int((share * step_seconds * total - self.seconds) / self.last) if self.last > 0 else len(ahead)
        kept = [step for step in self.steps if step <= now] + thinned(ahead, room=max(1, affordable))
        return {"do": "thin", "steps": kept, "planned": whole}

    def run(self, view: View, *, final: bool) -> dict[str, Any]:
        """Measure now: numbers, texts and the time it took. Nothing about the training changes."""
        began = time.perf_counter()
        numbers: dict[str, float] = {}
        texts: dict[str, str] = {}
        view.passages = self.spec.final if final else self.spec.passages
        view.few, view.found = self.spec.passages, numbers
        for probe in self.probes:
            view.reseed(f"measure|{probe.name()}")
            found = probe.measure(view.engine.model, view)
            numbers |= {name: value for name, value in found.items() if not isinstance(value, str)}
            texts |= {name: value for name, value in found.items() if isinstance(value, str)}
        view.signals.update({f"eval/{name}": value for name, value in numbers.items()})
        view.signals["eval/tick"] = view.clock.tick
        self.results = numbers
        took = time.perf_counter() - began
        self.seconds += took
        self.last = took if not final else self.last
        return {"values": numbers, "texts": texts, "seconds": took}


def measure(run: Run, *, final: bool = False) -> None:
    """Measure and write down. At the start of a stage from outside, as thoroughly as at the end."""
    clock = run.clock
    thorough = final or (clock.tick == 0 and not run.node.lineage())
    run.say({"doing": "measuring"})
    found = run.evals.run(run.view, final=thorough)
    row = {"kind": "eval", "tick": clock.tick, "step": clock.step, "tokens": clock.tokens, "final": final}
    run.metrics.add({**row, "flops": clock.flops, **found})
    run.say({"measured": found["values"], "step": clock.step})
    run.rules.measured(found["values"], final=final)

"""Time in a stage: what a step costs, what is left, when to save. None of it reaches a method."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

from tutelage.base.clock import Clock

if TYPE_CHECKING:
    from tutelage.core.stage import Run

TRIAL = 20  # steps timed before choices are made that depend on the machine
UNKNOWN = 10**9  # steps of a stage whose minutes nobody has counted yet


class Pace:
    """Wall time of training (measuring and saving apart), and the choices made from it, each journaled once."""

    def __init__(self, run: Run) -> None:
        self.last_step = self.last_save = time.perf_counter()
        self.training = 0.0  # seconds in steps since this process began
        self.recent: list[tuple[float, int]] = []  # seconds and tokens of the newest steps
        self.from_flops = run.clock.flops
        self.from_frac = run.clock.frac
        self.saved_at = run.clock.copy()
        self.said = 0.0
        self.owed = run.stream.owed()
        lines = [line for line in run.journal.lines if line["by"] == "engine"]
        chosen = [(line["tick"], act) for line in lines for act in line["do"] if act["do"] in ("until", "thin")]
        self.ahead = [(tick, act) for tick, act in chosen if tick > run.clock.tick]  # others are in the state
        self.decided = bool(chosen)

    def count(self, tokens: int) -> None:
        """A step is over."""
        now = time.perf_counter()
        took = now - self.last_step
        self.last_step = now
        self.training += took
        self.recent.append((took, tokens))
        del self.recent[:-50]

    def rest(self) -> None:
        """What happened since the last step was no training."""
        self.last_step = time.perf_counter()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What happens here is not training time."""
        try:
            yield
        finally:
            self.rest()

    @property
    def tokens_per_second(self) -> float:
        return sum(tokens for _, tokens in self.recent) / max(1e-9, sum(took for took, _ in self.recent))

    @property
    def step_seconds(self) -> float:
        return median(took for took, _ in self.recent[len(self.recent) > 1 :])

    def flops_per_second(self, clock: Clock) -> float:
        return (clock.flops - self.from_flops) / max(1e-9, self.training)

    def share_done(self, clock: Clock) -> float:
        return clock.count(clock.until) / max(1e-9, clock.total[clock.until])

    def seconds_left(self, clock: Clock) -> float:
        """By the pace of the newest steps: right at once after a resume."""
        per_step = clock.count(clock.until) / max(1, clock.step)
        steps = (clock.total[clock.until] - clock.count(clock.until)) / max(1e-9, per_step)
        return max(0.0, steps * self.step_seconds) if self.recent else 0.0

    def time_to_say(self) -> bool:
        now = time.perf_counter()
        if now - self.said < 0.2:
            return False
        self.said = now
        return True

    def decide(self, run: Run) -> None:
        """Once, after a few steps: how many steps a span in minutes has, and which measurements fit their budget.

        What was decided before a cut is taken over at its tick, so that the steps before it are retraced too.
        """
        clock, evals, world = run.clock, run.evals, run.engine.world
        if clock.until == "flop" and "step" not in clock.total:  # a step's operations are counted, not measured
            clock.total["step"] = clock.step * (clock.total["flop"] - self.from_flops) / (clock.flops - self.from_flops)
            evals.replan(clock.total)
        for _, act in (found for found in self.ahead if found[0] == clock.tick):
            take(run, act)
        if self.decided or len(self.recent) < min(TRIAL, max(2, math.ceil(clock.total["step"]) // 10)):
            return
        self.decided = True
        acts = []
        if clock.total["step"] >= UNKNOWN:
            assert run.node.stage.until is not None
            steps = world.agree(max(clock.step + 1, round(run.node.stage.until.value * 60 / self.step_seconds)))
            before = clock.total["step"]  # divided by last, so that the number of steps stays a whole one
            acts.append({"do": "until", "total": {unit: value * steps / before for unit, value in clock.total.items()}})
            take(run, acts[0])
        acts.append(world.agree(evals.thin(now=clock.step, step_seconds=self.step_seconds, total=clock.total["step"])))
        take(run, acts[-1])
        run.journal.append(tick=clock.tick, by="engine", do=acts, write=world.rank == 0)

    def save_due(self, run: Run) -> bool:
        """Whether the save interval has passed. By the clock on the wall where it is written in minutes."""
        every, clock = run.node.stage.save.every, run.clock
        if every.unit == "min":
            due = run.engine.world.agree(time.perf_counter() - self.last_save >= every.value * 60)
        elif every.unit == "%":
            due = clock.frac - self.saved_at.frac >= every.share
        else:
            due = clock.count(every.unit) - self.saved_at.count(every.unit) >= every.value
        if due:
            self.saved_at, self.last_save = clock.copy(), time.perf_counter()
        return due


def take(run: Run, act: dict[str, Any]) -> None:
    """Let a journaled choice hold."""
    if act["do"] == "until":
        run.clock.total = dict(act["total"])
        run.evals.replan(run.clock.total)
    else:
        run.evals.steps, run.evals.thinned_from = list(act["steps"]), act["planned"]

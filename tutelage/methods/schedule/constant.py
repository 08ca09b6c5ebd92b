"""Constant rate: the optimizer's rate from the first step to the last, after an optional warmup.

Paper:   none; the plain baseline. With a later decay it is the trunk of Hägele et al. 2024, arXiv:2405.18392
Use:     `level` 0.1 goes on at the rate where a decay to 10 % ended; branch from it at any step
Works:   any modality, any length, also stages whose end is not known
Costs:   nothing; ends a few percent above the loss that a decayed rate reaches
With:    merge/linear over its checkpoints replaces much of the decay
Differs: nothing to differ from
"""

from __future__ import annotations

from pydantic import Field

from tutelage.base.clock import Clock, Span
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.anneal import Part, curve, ramp


class Constant(Method):
    warm: Part = Field(Span(0, "step"), description="span of the even rise from 0")
    level: float = Field(1.0, ge=0, description="share of the optimizer's rate")

    no_off = "a stage always has a schedule"
    baseline = {"use": "schedule/linear"}
    steerable = frozenset({"level"})

    def factor(self, clock: Clock) -> float:
        return self.level * ramp(clock, self.warm)


def effect(run: Seen) -> dict[str, float]:
    return curve(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["last"] == on["half"] == 1.0 > off["last"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"schedule": {"use": "schedule/constant", "warm": "2%"}},
    baseline={"schedule": {"use": "schedule/cosine", "warm": "2%"}},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="33 M to 360 M parameters",
)

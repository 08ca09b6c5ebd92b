"""Infinite schedule: warm up, cool down to a constant rate, stay there for as long as it goes, anneal only to deliver.

Paper:   Ibrahim et al. 2024, arXiv:2403.08763 (section 7.4); Singh et al. 2025, arXiv:2503.02844
Use:     stay 0.5, warm and cool in steps or tokens; later stages `carry: [schedule]` and never warm again
Works:   any modality; stages of unknown number and length
Costs:   nothing; a delivered model costs an annealing branch of 10–20 %
With:    anneal in a stage of its own, and continue the trunk from before it
Differs: the annealing is told as the stage's last span; the papers give the step at which it begins
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from tutelage.base.clock import Clock, Span
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.anneal import Part, between, curve, fall, ramp, to_floor

ALPHA = 10.0  # timescale of the inverse square root


class Infinite(Method):
    warm: Part = Field(Span(1, "%"), description="span of the even rise from 0")
    cool: Part = Field(
        Span(20, "%"),
        description="where the cooldown ends, counted from the schedule's origin",
    )
    decay: Literal["cosine", "inverse_sqrt"] = Field("cosine", description="shape of the cooldown")
    stay: float = Field(0.5, gt=0, le=1, description="share of the peak rate in the constant phase")
    anneal: Part = Field(
        Span(0, "step"),
        description="the last span, in which the rate falls exponentially to `floor`",
    )
    floor: float = Field(0.1, gt=0, le=1, description="share of the peak rate after annealing")

    no_off = "a stage always has a schedule"
    baseline = {"use": "schedule/cosine"}
    on = {"cool": "40%", "anneal": "20%"}
    steerable = frozenset({"stay", "anneal", "floor"})
    last = "anneal"

    def factor(self, clock: Clock) -> float:
        done = between(clock, self.warm, self.cool)
        share = fall(done, "cosine") if self.decay == "cosine" else inverse_sqrt(done)
        annealed = 1.0 - min(1.0, clock.left(self.anneal))
        return ramp(clock, self.warm) * to_floor(share, self.stay) * math.pow(self.floor / self.stay, annealed)


def inverse_sqrt(done: float) -> float:
    """From 1 to 0, steep at first: the inverse square root of time, shifted and scaled to end at 0."""

    def below(x: float) -> float:
        return 1.0 / math.sqrt(1.0 + ALPHA * x) - 1.0

    return 1.0 - below(done) / below(1.0)


def effect(run: Seen) -> dict[str, float]:
    return curve(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Level between half and three quarters, where a cosine falls fastest, and falling again at the end."""
    return abs(on["half"] - on["three_quarters"]) < 1e-6 < off["half"] - off["three_quarters"] and (
        on["last"] < on["half"] < 1.0
    )


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"schedule": {"use": "schedule/infinite", "warm": "2%", "anneal": "20%"}},
    baseline={"schedule": {"use": "schedule/cosine", "warm": "2%"}},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="405 M parameters",
)

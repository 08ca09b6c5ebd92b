"""Warmup-stable-decay: hold the peak rate for most of the stage, then cool down in its last part.

Paper:   Hu et al. 2024 (MiniCPM), arXiv:2404.06395; shapes of the cooldown: Hägele et al. 2024, arXiv:2405.18392
Use:     cooldown 10–20 % with decay `sqrt` matches a cosine of the same length; peak about half of the cosine's best
Works:   any modality; the stable part can be branched from at any step
Costs:   nothing
With:    branch before the cooldown to go on, as schedule/infinite does
Differs: decays to 0 along 1 - sqrt by default, MiniCPM's own decay is exponential
"""

from __future__ import annotations

from pydantic import Field

from tutelage.base.clock import Clock, Span
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.anneal import Part, Shape, curve, fall, ramp, to_floor


class WSD(Method):
    warm: Part = Field(Span(1, "%"), description="span of the even rise from 0")
    cooldown: Part = Field(Span(20, "%"), description="the last span, in which the rate falls")
    decay: Shape = Field("sqrt", description="shape of the cooldown; `sqrt` is 1 - sqrt")
    floor: float = Field(0.0, ge=0, le=1, description="share of the peak rate at the end")

    no_off = "a stage always has a schedule"
    baseline = {"use": "schedule/cosine"}
    steerable = frozenset({"cooldown", "floor"})
    last = "cooldown"

    def factor(self, clock: Clock) -> float:
        done = 1.0 - min(1.0, clock.left(self.cooldown))
        return ramp(clock, self.warm) * to_floor(fall(done, self.decay), self.floor)


def effect(run: Seen) -> dict[str, float]:
    return curve(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["three_quarters"] == on["half"] == 1.0 > off["three_quarters"] and on["last"] < 0.5


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"schedule": {"use": "schedule/wsd", "warm": "2%"}},
    baseline={"schedule": {"use": "schedule/cosine", "warm": "2%"}},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="33 M to 360 M parameters",
)

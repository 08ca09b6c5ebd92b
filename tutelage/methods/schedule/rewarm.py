"""Re-warming: raise the rate again when a trained model meets new data, then decay it once more.

Paper:   Gupta et al. 2023, arXiv:2308.04014; Ibrahim et al. 2024, arXiv:2403.08763
Use:     warm 1 %; the higher the peak, the better on the new data and the more of the old is lost
Works:   any modality; a stage that starts from trained weights
Costs:   nothing; the loss on both domains rises before it falls
With:    continual/replay takes back most of what re-warming forgets
Differs: rises from `floor`, where the decay before it ended, not from 0; always counts from this stage's start
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from tutelage.base.clock import Clock, Span
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.anneal import END, Part, between, curve, fall, ramp, to_floor


class Rewarm(Method):
    warm: Part = Field(Span(1, "%"), description="span of the even rise from `floor`")
    decay: Literal["cosine", "linear", "none"] = Field("cosine", description="shape of the decay to `floor`")
    floor: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the peak rate at the start and at the end",
    )

    no_off = "a stage always has a schedule"
    baseline = {"use": "schedule/constant", "level": 0.1}
    on = {"warm": "20%"}
    steerable = frozenset({"floor"})

    def factor(self, clock: Clock) -> float:
        clock = replace(clock, origin={})  # a schedule that was carried along begins anew
        risen = ramp(clock, self.warm, start=self.floor)
        if self.decay == "none":
            return risen
        return risen * to_floor(fall(between(clock, self.warm, END), self.decay), self.floor)


def effect(run: Seen) -> dict[str, float]:
    return curve(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["first"] < on["quarter"] > on["last"] and off["first"] == off["quarter"] == off["last"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"schedule": {"use": "schedule/rewarm"}},
    baseline={"schedule": {"use": "schedule/constant", "level": 0.1}},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="410 M parameters, 297 B tokens",
)

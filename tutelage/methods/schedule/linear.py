"""Linear decay: warm up evenly, then fall along a straight line to a floor at the stage's end.

Paper:   Bergsma et al. 2025, arXiv:2502.15938 (straight to zero); the fine-tuning default since Devlin et al. 2019
Use:     warm 1–10 %, floor 0; its best peak rate is at least that of a cosine
Works:   any modality; stages whose length is known beforehand
Costs:   nothing
With:    a stage that goes on from its end wants schedule/rewarm
Differs: nothing; with floor 0.1 it is the paper's 10x linear baseline
"""

from __future__ import annotations

from pydantic import Field

from tutelage.base.clock import Clock, Span
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.anneal import END, Part, between, curve, fall, ramp, to_floor


class Linear(Method):
    warm: Part = Field(Span(1, "%"), description="span of the even rise from 0")
    floor: float = Field(0.0, ge=0, le=1, description="share of the peak rate at the end")

    no_off = "a stage always has a schedule"
    baseline = {"use": "schedule/constant"}
    steerable = frozenset({"floor"})

    def factor(self, clock: Clock) -> float:
        return ramp(clock, self.warm) * to_floor(fall(between(clock, self.warm, END), "linear"), self.floor)


def effect(run: Seen) -> dict[str, float]:
    return curve(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """From half to the end the rate falls, by as much before three quarters as after."""
    early, late = on["half"] - on["three_quarters"], on["three_quarters"] - on["last"]
    return on["last"] < 0.2 < off["last"] and abs(early - late) < 0.15


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"schedule": {"use": "schedule/linear", "warm": "2%"}},
    baseline={"schedule": {"use": "schedule/cosine", "warm": "2%"}},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="111 M to 1.7 B parameters",
)

"""Cosine decay: warm up evenly, then fall along half a cosine to a floor at the stage's end.

Paper:   Loshchilov & Hutter 2017, arXiv:1608.03983 (one cycle); the length rule is Hoffmann et al. 2022, arXiv:2203.15556
Use:     warm 1–2 %, floor 0.1; the stage must end where the cosine does, so set `until` first
Works:   any modality; stages whose length is known beforehand
Costs:   nothing
With:    a stage that goes on from its end wants schedule/rewarm
Differs: one cycle without restarts, ending at a floor of 10 % where the paper anneals to about 0
"""

from __future__ import annotations

from pydantic import Field

from tutelage.base.clock import Clock, Span
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.anneal import END, Part, between, curve, fall, ramp, to_floor


class Cosine(Method):
    warm: Part = Field(Span(1, "%"), description="span of the even rise from 0")
    floor: float = Field(0.1, ge=0, le=1, description="share of the peak rate at the end")

    no_off = "a stage always has a schedule"
    baseline = {"use": "schedule/constant"}
    steerable = frozenset({"floor"})

    def factor(self, clock: Clock) -> float:
        return ramp(clock, self.warm) * to_floor(fall(between(clock, self.warm, END), "cosine"), self.floor)


def effect(run: Seen) -> dict[str, float]:
    return curve(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """A cosine lies above the straight line before its middle and below it after."""
    straight = (1.0 + on["last"]) / 2
    return on["quarter"] > (1.0 + straight) / 2 and on["three_quarters"] < (straight + on["last"]) / 2 < off["last"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"schedule": {"use": "schedule/cosine", "warm": "2%"}},
    baseline={"schedule": {"use": "schedule/constant", "warm": "2%"}},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="70 M to 16 B parameters (2203.15556)",
)

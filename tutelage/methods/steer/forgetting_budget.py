"""Forgetting budget: when a kept measure gets worse by more than is allowed, replay more, or go back.

Paper:   a rule of this project's; the measure is that of Chaudhry et al. 2018, arXiv:1801.10112, and what replay does
    to it is in Ibrahim et al. 2024, arXiv:2403.08763
Use:     `allowed` 0.02–0.1 bits per byte; continual/replay beside it with a small rate, which `by` multiplies; name
    `rollback` under `steering.policy.approve`, and a person is asked before anything is undone
Works:   columns of ancestors and of `keep`; set `evals: {every: 50step, budget: 100%}`
Costs:   nothing beside the measurements; raised replay takes its share of the new data
With:    continual/replay, whose rate it raises; any method's steerable strength by `path` (continual/ewc.strength)
Differs: nothing is published to differ from; it only raises, never lowers, and `cap` bounds how often; forgetting is
    measured on the first rows held out, so that a change below their noise (0.01 bits or so) is none
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from tutelage.base.method import Bench, Seen
from tutelage.methods._kit.policy import Policy
from tutelage.methods._kit.signals import measures, news


class ForgettingBudget(Policy):
    watch: str = Field("forgetting", description="the measure; the worst of its columns counts")
    allowed: float = Field(0.05, description="how much of it is allowed, in its unit")
    then: Literal["raise", "rollback", "pause"] = Field(
        "raise", description="raise a strength, go back to the last measurement in budget, or wait for a person"
    )
    path: str = Field("continual/replay.rate", description="what `raise` raises")
    by: float = Field(2.0, gt=1, le=100, description="and by how much")
    patience: int = Field(1, ge=1, description="measurements in a row above what is allowed")
    cooldown: int = Field(1, ge=0, description="measurements after an action that are not judged")
    cap: int = Field(4, ge=0, description="actions in a stage")

    off = {"cap": 0}
    on = {"watch": "bits_per_byte", "allowed": 0.0, "then": "rollback", "cap": 1}
    steerable = frozenset({"allowed"})

    def act(self, view: Any) -> list[dict[str, Any]]:
        """One action, when the worst column has been above `allowed` for `patience` measurements."""
        if not self.cap or news(self.state, view, self.watch, every=1) is None:
            return []
        found = measures(view, self.watch)
        column = max(found, key=lambda name: found[name])
        if found[column] <= self.allowed:
            self.state["good"], self.state["over"] = int(view.clock.tick), 0
        else:
            self.state["over"] = self.state.get("over", 0) + 1
        if self.state.get("cooling", 0) > 0:
            self.state["cooling"] -= 1
            return []
        if self.state["over"] < self.patience or self.state.get("done", 0) >= self.cap:
            return []
        self.state["done"] = self.state.get("done", 0) + 1
        self.state["cooling"], self.state["over"] = self.cooldown, 0
        why = f"{column} is {found[column]:.4g}, and {self.allowed:.4g} is allowed"
        return self.ask(why, self._answer())

    def _answer(self) -> dict[str, Any]:
        if self.then == "raise":
            return {"do": "scale", "path": self.path, "by": self.by}
        if self.then == "rollback":
            return {"do": "rollback", "to": int(self.state.get("good", 0)), "skip": True}
        return {"do": "pause"}


def effect(run: Seen) -> dict[str, float]:
    rows = [row for row in run.rows if row["kind"] == "train"]
    return {"back": float(sum(b["step"] <= a["step"] for a, b in pairwise(rows)))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["back"] >= 1 and off["back"] == 0


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={
        "evals": {"every": "40step", "passages": 64, "final": 256, "budget": "100%"},
        "methods": [
            {"use": "continual/replay", "rate": 0.02},
            {"use": "steer/forgetting_budget", "allowed": 0.1, "by": 2.0},
        ],
    },
    baseline={"methods": [{"use": "continual/replay", "rate": 0.02}]},
    metric="forgetting/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [3e-4, 1e-3, 3e-3]},
    tune_baseline={"optim.lr": [3e-4, 1e-3, 3e-3]},
    tune_by="bits_per_byte",
    scale="no paper claims it",
)

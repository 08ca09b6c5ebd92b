"""Plateau: the rate is cut when a measure stops getting better.

Paper:   torch.optim.lr_scheduler.ReduceLROnPlateau; He et al. 2016 (ResNet), arXiv:1512.03385, section 3.4
Use:     schedule/constant under it, as a falling schedule goes on falling; `factor` 0.1–0.5; patience of 3 to 10
    measurements; with measures set `evals: {every: 50step, budget: 100%}`, as a thinned one counts less often
Works:   any model and objective
Costs:   nothing beside the measurements
With:    steer/early_stop ends what no cut helps; steer/rollback's cuts multiply with these
Differs: the rate is scaled for all groups alike; `loss` is a mean over `every` training steps; what an authority rule
    refuses counts as done, so that it is not asked for again before another `patience`
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tutelage.base.method import Bench, Seen
from tutelage.methods._kit.policy import Policy
from tutelage.methods._kit.signals import news


class Plateau(Policy):
    watch: str = Field("bits_per_byte", description="a measure (the mean over its columns), or `loss` of training")
    every: int = Field(50, ge=1, description="steps averaged into one number, of the training loss")
    better: Literal["lower", "higher"] = Field("lower", description="which way is better")
    factor: float = Field(0.3, gt=0, le=1, description="the rate afterwards, as a share of what it was")
    patience: int = Field(3, ge=0, description="numbers in a row that are no better, before one more cuts the rate")
    threshold: float = Field(1e-3, ge=0, lt=1, description="least change that is better")
    relative: bool = Field(True, description="the threshold is a share of the best so far")
    cooldown: int = Field(0, ge=0, description="numbers after a cut that are not judged")
    floor: float = Field(0.0, ge=0, description="the rate is never cut below this")

    off = {"factor": 1.0}
    on = {"watch": "loss", "every": 1, "patience": 0, "threshold": 0.9, "factor": 0.5, "cooldown": 2}
    steerable = frozenset({"factor", "patience", "cooldown"})

    def act(self, view: Any) -> list[dict[str, Any]]:
        """A cut of the rate when more than `patience` numbers in a row were no better than the best."""
        value = news(self.state, view, self.watch, every=self.every)
        if value is None:
            return []
        if self._is_better(value):
            self.state["best"], self.state["bad"] = value, 0
        else:
            self.state["bad"] = self.state.get("bad", 0) + 1
        if self.state.get("cooling", 0) > 0:
            self.state["cooling"] -= 1
            self.state["bad"] = 0
        if self.state["bad"] <= self.patience:
            return []
        self.state["bad"], self.state["cooling"] = 0, self.cooldown
        rate = float(view.signals.get("lr", 0.0))
        by = max(self.factor, self.floor / rate) if rate > 0 else 1.0
        if by >= 1:
            return []
        best = self.state["best"]
        why = f"{self.watch} is {value:.4g}, and was {best:.4g} more than {self.patience} measurements ago"
        return self.ask(why, {"do": "scale", "path": "optim.lr", "by": by})

    def _is_better(self, value: float) -> bool:
        best = self.state.get("best")
        if best is None:
            return True
        step = self.threshold * (abs(best) if self.relative else 1.0)
        return bool(value < best - step if self.better == "lower" else value > best + step)


def effect(run: Seen) -> dict[str, float]:
    """The last rate as a share of the first."""
    rates = [row["lr"] for row in run.rows if row["kind"] == "train"]
    return {"left": rates[-1] / rates[0]}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["left"] < 0.9 * off["left"]


BENCH = Bench(  # a run this short never stops getting better, so a plateau is where it gets better by less than the threshold
    base="recipes/bench/two-domains.yaml",
    stage="one",
    arm={
        "schedule": "schedule/constant",
        "evals": {"every": "40step", "passages": 64, "final": 256, "budget": "100%"},
        "methods": [{"use": "steer/plateau", "patience": 1, "factor": 0.3}],
    },
    baseline={"schedule": "schedule/constant"},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"methods.0.threshold": [0.02, 0.04], "optim.lr": [1e-3, 3e-3]},
    tune_baseline={"optim.lr": [5e-4, 1e-3, 2e-3, 3e-3]},
    scale="used on ImageNet, ResNets of 18 to 152 layers, 600k steps",
)

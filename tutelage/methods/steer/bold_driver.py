"""Bold driver: the rate rises a little while the loss falls, and is halved when it rises.

Paper:   Vogl et al. 1988, Biological Cybernetics 59:257–263; Battiti 1989, Complex Systems 3:331–342
Use:     schedule/constant under it; `every` 10–50, so that a mean over so many steps moves more by learning than by chance;
    a start rate not far off: from thirty times too high it did not come back in 300 steps (docs/agents.md)
Works:   any model and objective
Costs:   nothing
With:    instead of steer/plateau, which only cuts; beside a falling schedule the two fight
Differs: means over `every` minibatch losses stand for the error of the whole training set; the step that made it rise
    stays taken and momentum is not cleared (steer/rollback goes back); less than `rise` counts as a fall; never
    more than `most` times the rate it began with
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from pydantic import Field

from tutelage.base.method import Bench, Seen
from tutelage.methods._kit.policy import Policy
from tutelage.methods._kit.signals import news


class BoldDriver(Policy):
    every: int = Field(20, ge=1, description="steps averaged into one loss")
    up: float = Field(1.05, ge=1, le=2, description="factor on the rate after a fall of the loss")
    down: float = Field(0.5, gt=0, le=1, description="factor on the rate after a rise; Vogl 0.7, Battiti 0.5")
    rise: float = Field(0.01, ge=0, description="least rise that counts, as a share of the loss before")
    most: float = Field(10.0, ge=1, description="highest rate, as a multiple of the first")

    off = {"up": 1.0, "down": 1.0}
    on = {"every": 1, "up": 1.3, "rise": 0.0}
    steerable = frozenset({"up", "down", "rise"})

    def act(self, view: Any) -> list[dict[str, Any]]:
        """A rate a little higher, or much lower, whenever another `every` losses are in."""
        rate = float(view.signals.get("lr", 0.0))
        first = self.state.setdefault("first", rate)
        value = news(self.state, view, "loss", every=self.every)
        if value is None:
            return []
        before, self.state["before"] = self.state.get("before"), value
        if before is None:
            return []
        rose = value > before + self.rise * abs(before)
        by = self.down if rose else self.up
        if rate <= 0 or (not rose and rate * by > self.most * first):
            return []
        why = f"loss {'rose' if rose else 'fell'} from {before:.4g} to {value:.4g} in {self.every} steps"
        return self.ask(why, {"do": "scale", "path": "optim.lr", "by": by}) if by != 1 else []


def effect(run: Seen) -> dict[str, float]:
    """How often the rate rose and fell."""
    rates = [row["lr"] for row in run.rows if row["kind"] == "train"]
    steps = list(pairwise(rates))
    return {"rose": float(sum(b > a for a, b in steps)), "fell": float(sum(b < a for a, b in steps))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["rose"] > 0 and on["fell"] > 0 and off["rose"] == off["fell"] == 0


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    stage="one",
    arm={"schedule": "schedule/constant", "methods": [{"use": "steer/bold_driver"}]},
    baseline={"schedule": "schedule/constant"},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="claimed on small multilayer perceptrons, full batches",
)

"""Rollback: after a spike of the loss, back to a save from before it, past the data that were there, at a lower rate.

Paper:   Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 5.1; Zhang et al. 2022 (OPT), arXiv:2205.01068
Use:     `save: {every: 100step, keep: 4}`, so that a save lies `back` steps before a spike; `sigmas` 6–10; raise
    `patience` where single steps jump and come back; `factor: 1` is PaLM's rule, below 1 OPT's
Works:   any model and objective; a run that goes wrong once in a while, not one whose rate is wrong throughout
Costs:   two medians of a short window a step; what is rolled back is computed in vain, what is skipped is not learned
With:    needs saves; `steering.policy.approve: [rollback]` asks a person first; beside steer/plateau, cuts multiply
Differs: people watched those runs: the rule for what a spike is (median and median deviation of the last steps), the cap
    and the cool-down are ours; PaLM skipped 200 to 500 batches from about 100 steps before a spike, in their order, here
    each source goes past as many rows as it gave of late, at most a million, and of more than 48 sources and parts of
    sources the largest 48 do; saves may lie further apart than PaLM's 100 steps
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any, ClassVar, Literal
from urllib.parse import quote, unquote  # a replayed source is called `stage/name`, and a key of a state holds no `/`

import torch
from pydantic import Field

from tutelage.base.action import MOST, ROWS
from tutelage.base.method import Bench, Seen
from tutelage.core.types import Batch
from tutelage.methods._kit.policy import Policy
from tutelage.methods._kit.signals import pushed, usual


class Rollback(Policy):
    watch: Literal["loss", "grad_norm", "both"] = Field("loss", description="what is looked at in every step")
    window: int = Field(50, ge=4, description="steps that say what is usual")
    sigmas: float = Field(8.0, gt=0, description="deviations above the usual that are a spike")
    rise: float = Field(0.1, ge=0, description="least rise above the usual that is a spike, as a share of it")
    patience: int = Field(3, ge=1, description="steps in a row that make a spike; one is enough for what is no number")
    diverged: float = Field(0.3, gt=0, description="how far the usual may rise above its lowest, as a share of it")
    back: int = Field(20, ge=0, description="the save is so many steps older than the spike's first one")
    factor: float = Field(0.7, gt=0, le=1, description="the rate afterwards, as a share of what it was")
    skip: int = Field(
        200,
        ge=0,
        description="steps of data passed over, from `back` steps before the spike on; at least those seen since; "
        "0 sees them again",
    )
    cap: int = Field(5, ge=0, description="rollbacks in a stage; after that it is left to itself")
    cooldown: int = Field(50, ge=1, description="steps after one in which nothing is asked, and the usual is learned")

    off = {"cap": 0}
    on = {
        "watch": "both", "window": 4, "sigmas": 0.01, "rise": 0.0, "patience": 1, "back": 0, "cap": 1, "cooldown": 4
    }  # fmt: skip
    guards: ClassVar[bool] = True

    def act(self, view: Any) -> list[dict[str, Any]]:
        """Rollback and a lower rate, once the loss has been far from what is usual for `patience` steps."""
        tick = int(view.clock.tick)
        if not self.cap or "loss" not in view.signals:
            return []
        finite = bool(view.signals.get("finite", 1.0))
        good, why = self._wrong(view.signals, tick, finite=finite)
        quiet = finite and tick < self.state.get("quiet", 0)  # what is no number ends the stage unless one goes back
        if good is None or quiet or self.state.get("done", 0) >= self.cap:
            return []
        self.state["done"] = self.state.get("done", 0) + 1
        self.state["quiet"], self.state["streak"] = tick + self.cooldown, 0
        self.state.pop("lowest", None)
        to = max(0, good - self.back)
        acts = [{"do": "rollback", "to": to, "skip": self.skip > 0}, *self._past(self.skip - (tick - to))]
        if self.factor < 1:
            acts.append({"do": "scale", "path": "optim.lr", "by": self.factor})
        return self.ask(why, *acts)

    def observe(self, batch: Batch, loss: dict[str, float], view: Any) -> None:
        """How many rows of each source a step has had of late."""
        known, counts = self.state.get("rows", {}), Counter(quote(row.source, safe="") for row in batch.rows)
        seen = self.state["seen"] = min(self.window, self.state.get("seen", 0) + 1)
        means = {name: known.get(name, 0.0) for name in {**known, **counts}}
        self.state["rows"] = {name: mean + (counts[name] - mean) / seen for name, mean in means.items()}

    def _past(self, steps: int) -> list[dict[str, Any]]:
        """The sources' rows of so many steps more, as far as they find room in a request: the largest do."""
        rows = {unquote(name): min(round(steps * mean), ROWS) for name, mean in self.state.get("rows", {}).items()}
        kept = sorted(rows, key=lambda name: (-rows[name], name))[: MOST - 2]
        return [{"do": "skip_data", "source": name, "rows": rows[name]} for name in sorted(kept) if rows[name] > 0]

    def _wrong(self, signals: dict[str, float], tick: int, *, finite: bool) -> tuple[int | None, str]:
        """The last tick at which all was well, and what is wrong; None when nothing is."""
        names = ("loss", "grad_norm") if self.watch == "both" else (self.watch,)
        values = {name: float(signals.get(name, math.nan)) for name in names}
        if not finite or not all(map(math.isfinite, values.values())):
            return tick - 1 - self.state.get("streak", 0), "a loss or gradient was no number"
        high = [name for name in names if self._unusual(name, values[name])]
        learning = tick < self.state.get("quiet", 0)  # also at a new level, where what was asked was refused
        for name in names:
            if learning or not high:
                self.state[f"window_{name}"] = pushed(self.state.get(f"window_{name}"), values[name], size=self.window)
        self.state["streak"] = self.state.get("streak", 0) + 1 if high else 0
        if high and self.state["streak"] >= self.patience:
            return tick - self.state["streak"], f"{high[0]} was {values[high[0]]:.4g}, far above the steps before"
        if learning:
            self.state.pop("lowest", None)
            return None, ""
        return self._risen(names[0], tick)

    def _unusual(self, name: str, value: float) -> bool:
        window = self.state.get(f"window_{name}")
        if not isinstance(window, torch.Tensor) or len(window) < self.window:
            return False
        middle, spread = usual(window)
        return value > middle + max(self.sigmas * spread, self.rise * abs(middle))

    def _risen(self, name: str, tick: int) -> tuple[int | None, str]:
        """A rise too slow to be a spike: the usual against its lowest."""
        window = self.state.get(f"window_{name}")
        if window is None or len(window) < self.window:
            return None, ""
        middle, _ = usual(window)
        lowest = self.state.get("lowest")
        if lowest is None or middle <= lowest:
            self.state["lowest"], self.state["lowest_tick"] = middle, tick
        elif middle - lowest > self.diverged * abs(lowest):
            return int(self.state["lowest_tick"]), f"{name} rose from {lowest:.4g} to {middle:.4g}"
        return None, ""


def effect(run: Seen) -> dict[str, float]:
    """How often the step was set back."""
    rows = [row for row in run.rows if row["kind"] == "train"]
    return {"back": float(sum(b["step"] <= a["step"] for a, b in pairwise(rows)))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["back"] >= 1 and off["back"] == 0


BENCH = Bench(
    base="recipes/bench/spoiled.yaml",
    arm={  # PaLM's rule; it goes past somewhat more than what is spoiled, which they saw before they chose how much
        "methods": [{"use": "steer/rollback", "window": 20, "back": 10, "cooldown": 20, "skip": 50, "factor": 1}]
    },
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"methods.0.sigmas": [4, 6], "optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [5e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2]},
    scale="claimed at 540 B parameters (PaLM) and 175 B (OPT)",
)

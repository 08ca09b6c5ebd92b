"""Elastic Weight Consolidation: pull weights that mattered back to where the last stage left them.

Paper:   Kirkpatrick et al. 2017, arXiv:1612.00796
Use:     strength 10 to 1000; at 1 an old token would weigh as much as a new one were the Fisher whole, and being
    diagonal it needs more; raise it until the old loss stops rising
Works:   any modality; stages of one parameter shape, whole weights trained (not under a wrapper such as param/lora)
Costs:   2× parameter memory; `rows` extra backward passes of one row when the stage begins
With:    adds to other penalties; redundant with continual/si; replay of a few percent helps it
Differs: the Fisher is empirical (the data's own labels, not sampled ones), per token: squared gradients of a row's
    summed loss over the tokens counted, as if tokens were independent; one anchor, the start's, not one per task
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.heldout import moved
from tutelage.methods._kit.labels import counted


class EWC(Method):
    strength: float = Field(100.0, ge=0, description="weight of the quadratic pull")
    rows: int = Field(256, ge=1, description="rows of the old data that the Fisher is taken on, one by one")
    of: str = Field("previous", description="whose data the Fisher is taken on")

    off = {"strength": 0.0}
    on = {"strength": 1e3, "rows": 16}
    steerable = frozenset({"strength"})

    def begin(self, model: nn.Module, view: Any) -> None:
        """Remember the weights, and how sharply the old data hold each of them."""
        params: dict[str, Tensor] = view.engine.params
        fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
        tokens = 0.0
        for batch in view.data(self.of).batches(self.rows, rows=1):
            batch = view.prepared(batch)
            count = counted(batch)
            if count:
                tokens += count
                for name, gradient in view.grad(batch).items():  # of the row's mean loss; times count, of its sum
                    fisher[name].addcmul_(gradient.float(), gradient.float(), value=count**2)
        if not tokens:
            raise UserError(f"continual/ewc.of: the data of '{self.of}' have no position that counts in the loss")
        self.state["anchor"] = {name: p.detach().clone() for name, p in params.items()}
        self.state["fisher"] = {name: f.div_(tokens) for name, f in fisher.items()}

    def penalty(self, params: dict[str, Tensor], view: Any) -> Tensor:
        """strength / 2 · Σ F (θ − θ*)²."""
        anchor, fisher = self.state["anchor"], self.state["fisher"]
        terms = [(fisher[name] * (p - anchor[name]).square()).sum() for name, p in params.items() if name in anchor]
        if not terms and view.clock.step:  # all that it holds was frozen meanwhile
            return torch.zeros(())
        if not terms:
            raise UserError("continual/ewc holds weights that this stage does not train: leave the wrapper or it out")
        return self.strength / 2 * torch.stack(terms).sum()


def effect(run: Seen) -> dict[str, float]:
    return {"moved": moved(run, "a")}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """What was known stays as it was, better or worse."""
    return on["moved"] < 0.8 * off["moved"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"methods": [{"use": "continual/ewc"}]},
    metric="forgetting/prose",
    better="lower",
    margin=0.01,
    tune={"methods.0.strength": [10.0, 100.0, 1000.0]},
    tune_baseline={"optim.lr": [3e-4, 1e-3, 3e-3]},
    tune_by="bits_per_byte",
    scale="claimed on permuted MNIST and ten Atari games",
)

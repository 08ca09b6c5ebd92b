"""AdamW: Adam with weight decay apart from the gradient.

Paper:   Loshchilov & Hutter 2019, arXiv:1711.05101; Adam: Kingma & Ba 2015, arXiv:1412.6980
Use:     lr 1e-3 from scratch at 1 M parameters, 3e-4 at 100 M, 1e-5 to 5e-5 when fine-tuning
Works:   any modality
Costs:   2× parameter memory
With:    any schedule; `groups` sets rates and decay by pattern
Differs: beta2 is 0.95, as language models are trained today, where the paper has 0.999; norms and biases do not decay
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.optim import decayed, last_over_first


class AdamW(Method):
    lr: float = Field(1e-3, ge=0, description="learning rate at the schedule's peak")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the mean gradient and of its square")
    eps: float = Field(1e-8, gt=0, description="added to the root of the mean square")
    decay: float = Field(0.1, ge=0, description="weight decay of matrices, times the rate")
    decay_embeddings: bool = Field(True, description="whether embeddings decay too")

    no_off = "a stage always has an optimizer"
    baseline = {"use": "optim/adamw", "lr": 0.0}
    separable = True
    steerable = frozenset({"decay"})

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        settings = [{**group, "lr": self.lr * group["rate"], **self.settings(group)} for group in groups]
        return torch.optim.AdamW(settings, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)

    def settings(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"weight_decay": decayed(group, self.decay, embeddings=self.decay_embeddings)}


def effect(run: Seen) -> dict[str, float]:
    return last_over_first(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["moved"] > off["moved"] == 0.0 and on["loss"] < off["loss"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"optim": {"use": "optim/adamw"}},
    baseline={"optim": {"use": "optim/adamw", "decay": 0.0}},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="26-layer ResNets on CIFAR-10",
)

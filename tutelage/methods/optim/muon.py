"""Muon: momentum whose update is made orthogonal, for the matrices of hidden layers; AdamW for all the rest.

Paper:   Jordan et al. 2024, kellerjordan.github.io/posts/muon; `match_rms_adamw`: Liu et al. 2025, arXiv:2502.16982
Use:     with match_rms_adamw the rate and decay tuned for AdamW; with `original` lr 0.02 and `lr_rest` 3e-4 to 3e-3
Works:   any model with matrices; experts are orthogonalized one by one
Costs:   1× the matrices' memory, 2× the rest; about 15 products of the matrix with itself a step
With:    clipping hardly matters, for the update's size does not depend on the gradient's
Differs: fused matrices (GPT-2's query, key, value) are orthogonalized as one; float32 on a CPU, bfloat16 on a GPU.
         Weights decay by 0.1 as in Liu et al. with `original` too, where Jordan's default is 0; norms and biases never do,
         where the script of Liu et al. has them decay. Jordan's factor takes rows for outputs, as torch's linear layers
         have them: GPT-2's transposed matrices get that of the other side
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.optim import Joined, decayed, last_over_first, parted
from tutelage.methods._kit.spectra import change, orthogonal


class Muon(Method):
    lr: float = Field(1e-3, ge=0, description="learning rate at the schedule's peak")
    momentum: float = Field(0.95, ge=0, lt=1, description="decay of the mean gradient")
    nesterov: bool = Field(True, description="look one step of momentum ahead")
    steps: int = Field(5, ge=1, description="Newton–Schulz iterations")
    scale: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw", description="0.2·sqrt(larger side), so that an update is as large as AdamW's, or Jordan's"
    )
    decay: float = Field(0.1, ge=0, description="weight decay of matrices, times the rate")
    lr_rest: float | None = Field(
        None, ge=0, description="AdamW's rate for embeddings, head, norms and biases; else lr"
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's, for the rest")
    eps: float = Field(1e-8, gt=0, description="AdamW's, for the rest")

    no_off = "a stage always has an optimizer"
    baseline = {"use": "optim/adamw"}
    separable = True
    steerable = frozenset({"decay", "momentum"})

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        hidden, rest = (
            [{**group, "lr": lr * group["rate"], **self.settings(group)} for group in side]
            for side, lr in zip(parted(groups, is_hidden), (self.lr, self.rate_of_rest), strict=True)
        )
        parts: list[torch.optim.Optimizer] = []
        if hidden:
            parts.append(_Muon(hidden, self))
        if rest:
            parts.append(torch.optim.AdamW(rest, lr=self.rate_of_rest, betas=self.betas, eps=self.eps, fused=True))
        return Joined(parts)

    def settings(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"weight_decay": decayed(group, self.decay)}

    @property
    def rate_of_rest(self) -> float:
        return self.lr if self.lr_rest is None else self.lr_rest


def is_hidden(role: str, p: Tensor) -> bool:
    return (role == "matrix" and p.ndim == 2) or (role == "expert" and p.ndim == 3)


class _Muon(torch.optim.Optimizer):
    """As torch.optim.Muon, which refuses experts and computes in bfloat16 also where that is five times slower."""

    def __init__(self, groups: list[dict[str, Any]], settings: Muon) -> None:
        super().__init__(groups, {"lr": settings.lr, "weight_decay": settings.decay})
        self.settings = settings

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        s = self.settings
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - s.momentum)
                update = orthogonal(p.grad.lerp(mean, s.momentum) if s.nesterov else mean, steps=s.steps)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.to(p.dtype), alpha=-group["lr"] * factor(p.shape[-2], p.shape[-1], s.scale))


def factor(rows: int, columns: int, scale: str) -> float:
    """What the orthogonal update is multiplied with besides the rate."""
    return math.sqrt(max(1.0, rows / columns)) if scale == "original" else 0.2 * math.sqrt(max(rows, columns))


def effect(run: Seen) -> dict[str, float]:
    return {**last_over_first(run), **change(run)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Orthogonal updates move the weights in more directions."""
    return on["stable_rank"] > 1.2 * off["stable_rank"] and on["loss"] < 1.0


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"optim": {"use": "optim/muon"}},
    baseline={"optim": {"use": "optim/adamw"}},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="399 M to 16 B parameters (2502.16982)",
)

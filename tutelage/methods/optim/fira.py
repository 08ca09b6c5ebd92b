"""Fira: GaLore, and besides what its subspace leaves out, scaled as Adam scales what lies within.

Paper:   Chen et al. 2024, arXiv:2410.01623
Use:     rank, refresh and scale as `optim/galore`; no clipping (`engine: {clip: null}`), the limiter takes its place
Works:   where `optim/galore` does
Costs:   GaLore's memory and one number for each matrix
With:    `engine: {clip: null, fused_backward: true}`, as `optim/galore`
Differs: the residual is G − P Pᵀ G, the paper's; `residual: code` is the authors' code, which subtracts `scale` times the
         projection only. Their states and epsilon: see `optim/galore`
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from tutelage.base.method import Bench, Seen
from tutelage.methods._kit.lowrank import LowRank, back, from_right, seen


class Fira(LowRank):
    limit: float = Field(1.01, gt=1, description="factor by which the residual's norm may grow in a step")
    residual: Literal["paper", "code"] = Field(
        "paper", description="what the subspace leaves of a gradient, or with `code` what `scale` times it leaves"
    )

    on = {"rank": 4, "refresh": 6, "decay": 0.0}
    steerable = LowRank.steerable | {"limit"}

    def update(self, grad_MN: Tensor, low: Tensor, step: Tensor, state: dict[str, Any]) -> Tensor:
        basis, shape = state["basis"], grad_MN.shape
        dim = 1 if from_right(shape) else 0  # along the subspace: a factor for each line of the larger side
        factor = step.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + 1e-8)
        inside = back(low, basis, shape).mul_(1.0 if self.residual == "paper" else self.scale)
        rest_MN = (grad_MN - inside).mul_(factor)
        norm = rest_MN.norm()
        if "norm" in state:
            over = (norm / (state["norm"] + 1e-8)).clamp(min=self.limit) / self.limit
            rest_MN, norm = rest_MN.div_(over), norm / over
        state["norm"] = norm
        return rest_MN.add_(back(step, basis, shape).mul_(self.scale))


def effect(run: Seen) -> dict[str, float]:
    return seen(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """What is learned is of full rank, as no two subspaces hold it, with a fraction of the states."""
    return on["rank"] > 0.9 * off["rank"] > 2 * Fira.on["rank"] and on["kept"] < 0.25 * off["kept"]


BENCH = Bench(
    base="recipes/bench/from-scratch.yaml",
    arm={"optim": {"use": "optim/fira", "rank": 32, "refresh": 50}, "engine": {"clip": None}},
    baseline={"optim": {"use": "optim/galore", "rank": 32, "refresh": 50}, "engine": {"clip": None}},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.02,
    tune={"optim.lr": [3e-3, 1e-2, 3e-2]},
    tune_baseline={"optim.lr": [3e-3, 1e-2, 3e-2]},
    scale="60 M to 7 B parameters, 1.1 to 19.7 B tokens of C4",
)

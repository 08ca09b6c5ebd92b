"""Fira: GaLore, and besides what its subspace leaves out, scaled as Adam scales what lies within.

Paper:   Chen et al. 2024, arXiv:2410.01623
Use:     rank, refresh, scale and lr as `optim/galore`, lower ranks too (the paper goes down to 4 of 256); scale 0.0625 from
         1 B parameters on; no clipping (`engine: {clip: null}`), the limiter takes its place
Works:   where `optim/galore` does
Costs:   GaLore's memory and one number for each matrix
With:    `engine: {clip: null, fused_backward: true}`, as `optim/galore`
Differs: by default its algorithm 1: `scale` is on the residual G − P Pᵀ G too, which is limited after bias correction.
         `residual: code` is the authors' code, with which its scripts train: `scale` times the projection is subtracted,
         what is left goes in whole, limited before bias correction. Squares and the rest of the weights as `optim/galore`
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from tutelage.base.method import Bench, Seen
from tutelage.methods._kit.lowrank import LowRank, back, corrected, from_right, seen


class Fira(LowRank):
    limit: float = Field(1.01, gt=1, description="factor by which the residual's norm may grow in a step")
    residual: Literal["paper", "code"] = Field(
        "paper", description="what is left of a gradient, times `scale`; or as in the authors' code (see Differs)"
    )

    on = {"rank": 4, "refresh": 6, "decay": 0.0}
    steerable = LowRank.steerable | {"limit"}

    def update(self, grad_MN: Tensor, low: Tensor, step: Tensor, state: dict[str, Any]) -> Tensor:
        basis, shape, paper = state["basis"], grad_MN.shape, self.residual == "paper"
        dim = 1 if from_right(shape) else 0  # along the subspace: a factor for each line of the larger side
        factor = step.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + 1e-8)
        inside = back(low, basis, shape).mul_(1.0 if paper else self.scale)
        rest_MN = (grad_MN - inside).mul_(factor)
        norm = rest_MN.norm() * (corrected(1.0, int(state["step"]), self.betas) if paper else 1.0)
        if "norm" in state:
            over = (norm / (state["norm"] + 1e-8)).clamp(min=self.limit) / self.limit
            rest_MN, norm = rest_MN.div_(over), norm / over
        state["norm"] = norm
        update_MN = back(step, basis, shape)
        return update_MN.add_(rest_MN).mul_(self.scale) if paper else update_MN.mul_(self.scale).add_(rest_MN)


def effect(run: Seen) -> dict[str, float]:
    return seen(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """What is learned is almost of full rank, as no two subspaces hold it, with a fraction of the states."""
    return on["rank"] > 0.75 * off["rank"] > 2 * Fira.on["rank"] and on["kept"] < 0.25 * off["kept"]


BENCH = Bench(  # both residuals: the paper states one, and its tables come from the other
    base="recipes/bench/from-scratch.yaml",
    arm={"optim": {"use": "optim/fira", "rank": 32, "refresh": 50}, "engine": {"clip": None}},
    baseline={"optim": {"use": "optim/galore", "rank": 32, "refresh": 50}, "engine": {"clip": None}},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.02,
    tune={"optim.residual": ["paper", "code"], "optim.lr": [3e-3, 1e-2, 3e-2]},
    tune_baseline={"optim.lr": [2e-3, 3e-3, 6e-3, 1e-2, 2e-2, 3e-2]},
    scale="60 M to 7 B parameters, 1.1 to 19.7 B tokens of C4",
)

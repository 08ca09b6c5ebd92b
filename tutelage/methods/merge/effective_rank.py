"""Effective rank (Timber): keep the directions of a change within its effective rank, and weaken the rest towards the base.

Of each weight's change, the first ⌈eRank⌉ singular values stay and the rest are multiplied by `gamma`; eRank is the
exponential of the entropy of the normalized singular values (Roy and Vetterli 2007). The stage reports it, weight by weight.

Paper:   Wu et al. 2025 (Timber), arXiv:2509.23595
Use:     `start: [base, tuned]`; gamma 0.2, with which the authors evaluate Llama, or 0 as in their example; 1 gives the
         tuned model back
Works:   a model tuned from the base, of one shape
Costs:   one singular value decomposition in float64 of each matrix; no training, no data
With:    align/sft before it; merge/task_arithmetic with a scale below 1 reverts all directions alike
Differs: refines every matrix, embeddings too, as the authors' code does where the paper speaks of linear layers;
         in a stack of matrices (3-D expert weights) each one by itself, where the code lays them side by side
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.spectra import effective_rank
from tutelage.methods._kit.vectors import deltas


class EffectiveRank(Method):
    gamma: float = Field(0.2, ge=0, le=1, description="factor of the singular values beyond the effective rank")

    wants_base = True
    takes = 2
    no_off = "a merge is a stage of its own"
    baseline = {"use": "merge/effective_rank", "gamma": 1.0}
    on = {"gamma": 0.0}

    def tensor(self, name: str, tensors: list[Tensor], base: Tensor | None, view: Any) -> Tensor:
        base, vectors = deltas(tensors, base, method="merge/effective_rank")
        if base.ndim < 2 or not vectors[0].any():
            return tensors[0]
        stack = vectors[0] if base.ndim == 3 else vectors[0].flatten(1)
        refined, rank = attenuated(stack.double(), self.gamma)
        self.state[f"effective_rank/{name}"] = rank
        return base + refined.view_as(base).to(base.dtype)


def attenuated(change: Tensor, gamma: float) -> tuple[Tensor, float]:
    """A matrix, or a stack of them, with what lies beyond its effective rank times `gamma`; the (mean) effective rank."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    rank = effective_rank(values)
    place = torch.arange(1, values.shape[-1] + 1, device=values.device)
    values = torch.where(place <= rank.ceil()[..., None], values, gamma * values)
    return (left * values[..., None, :]) @ right, float(rank.mean())


def effect(run: Seen) -> dict[str, float]:
    """Of what was added to each matrix, on average: its directions, and how many it would have within its effective rank."""
    start, end = run.start(), run.weights()
    counted = [
        (float((values > 1e-4 * values[0]).sum()), math.ceil(effective_rank(values)))
        for name, before in start.items()
        if before.ndim == 2 and name in end
        for values in [torch.linalg.svdvals(end[name].double() - before.double())]
        if values[0] > 0
    ]
    directions, within = (sum(column) / len(counted) for column in zip(*counted, strict=True))
    return {"directions": directions, "within": within}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Without the rest, the directions that are left are those within the effective rank of the whole."""
    return abs(on["directions"] - off["within"]) < 0.1 and on["directions"] < 0.9 * off["directions"]


# How likely right answers are stands for pass@k, at which a model of this size has nothing to show. The rival reverts all
# directions alike, and both may choose how far; at 1 it leaves the tuned model as it is.
BENCH = Bench(
    base="recipes/bench/merge.yaml",
    arm={"start": ["one", "tuned"], "apply": {"use": "merge/effective_rank", "gamma": 0.2}},
    stage="merged",
    baseline={"start": ["one", "tuned"], "apply": {"use": "merge/task_arithmetic", "scale": 0.8}},
    metric="bits_per_byte/few",
    better="lower",
    margin=0.01,
    tune={"apply.gamma": [0.0, 0.2, 0.5, 0.8]},
    tune_baseline={"apply.scale": [0.6, 0.8, 0.9, 1.0]},
    scale="pass@k of Llama 3 and Qwen3, 0.6 B to 30 B parameters",
)

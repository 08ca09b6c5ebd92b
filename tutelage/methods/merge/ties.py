"""TIES: trim each task vector, elect a sign for every weight, and average only those that agree with it.

Paper:   Yadav et al. 2023, arXiv:2306.01708
Use:     `start: [base, one, two]`; density 0.2, scale 1 (the authors search 0.8 to 2.5 where they validate)
Works:   models trained from one base, of one shape
Costs:   one sort per tensor and model; no training, no data
With:    reduces to merge/task_arithmetic at density 1 where all signs agree, but for the average
Differs: trims each tensor by itself, as mergekit does, where the paper's code trims over the whole model; weights for single
         models beside the paper's one scale; entries that cancel count as positive, not as most others of the model
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.vectors import Share, agreed, deltas, moved, one_each


class TIES(Method):
    density: Share | list[Share] = Field(0.2, description="share of each task vector that is kept, largest first")
    weights: list[float] | None = Field(None, description="weight of each model after the base, in order; 1 each")
    scale: float = Field(1.0, description="λ, which multiplies the merged task vector")
    normalize: bool = Field(True, description="divide each entry by the weights that agree on it: the disjoint mean")

    wants_base = True
    no_off = "a merge is a stage of its own"
    baseline = {"use": "merge/task_arithmetic"}

    def tensor(self, name: str, tensors: list[Tensor], base: Tensor | None, view: Any) -> Tensor:
        base, vectors = deltas(tensors, base, method="merge/ties")
        weights = one_each(self.weights, tensors, place="merge/ties.weights")
        shares = one_each(self.density, tensors, place="merge/ties.density")
        trimmed = [trim(vector, share) for vector, share in zip(vectors, shares, strict=True)]
        return base + self.scale * agreed(trimmed, weights, normalize=self.normalize)


def trim(vector: Tensor, density: float) -> Tensor:
    """The share `density` of the entries with the largest magnitude (at least one), zero elsewhere."""
    if density >= 1:
        return vector
    kept = vector.abs().flatten().argsort(descending=True)[: max(1, int(density * vector.numel()))]
    mask = torch.zeros(vector.numel(), dtype=vector.dtype, device=vector.device).index_fill_(0, kept, 1.0)
    return vector * mask.view_as(vector)


def effect(run: Seen) -> dict[str, float]:
    return moved(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Most entries stay at the base, though the model moves."""
    return on["moved"] > 0.0 and on["still"] > off["still"] + 0.2


# λ of 0.7, 1 and 1.5, in the range that the authors search, were measured first and lost by more.
BENCH = Bench(
    base="recipes/bench/merge.yaml",
    arm={"apply": {"use": "merge/ties", "scale": 1.0}},
    stage="merged",
    baseline={"apply": {"use": "merge/task_arithmetic", "scale": 0.5}},
    metric="bits_per_byte",
    better="lower",
    margin=0.01,
    tune={"apply.density": [0.2, 0.5], "apply.scale": [0.2, 0.4, 0.7]},
    tune_baseline={"apply.scale": [0.2, 0.3, 0.4, 0.5, 0.7, 1.0]},
    scale="T5-large, ViT-L/14",
)

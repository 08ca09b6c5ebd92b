"""DARE: drop most of what each model learned beyond the base, at random, and scale up the rest; then merge.

Paper:   Yu et al. 2023 (Language Models are Super Mario), arXiv:2311.03099
Use:     `start: [base, one, two]`; drop 0.5 for models trained hard, 0.9 where fine-tuning changed weights by less
         than about 0.002, as the paper found; scale and weights as in merge/task_arithmetic
Works:   models trained from one base, of one shape
Costs:   one draw an entry and model; no training, no data
With:    `combine: ties` elects signs among what was not dropped; redundant beside merge/ties, whose trimming it replaces
Differs: every floating-point tensor is dropped from, where the authors leave out a task's own head; with `combine: ties`
         the drop takes the place of trimming, as in mergekit (the authors' code then trims too). mergekit 0.1.5 rescales
         to the L1 norm from before the drop, which is 1 / (1 - drop) but for the chance of the draw; here it is the paper's
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.vectors import agreed, deltas, moved, one_each, summed

Rate = Annotated[float, Field(ge=0, lt=1)]


class DARE(Method):
    drop: Rate | list[Rate] = Field(
        0.5, description="p, chance of each entry of a task vector to be dropped, or one for each model"
    )
    rescale: bool = Field(True, description="divide what is left by 1 - p, so that its expectation stays")
    combine: Literal["linear", "ties"] = Field("linear", description="weighted sum, or TIES' election of signs")
    weights: list[float] | None = Field(None, description="weight of each model after the base, in order; 1 each")
    scale: float = Field(1.0, description="λ, which multiplies the merged task vector")
    normalize: bool = Field(False, description="divide by the sum of the weights; of those that agree, with ties")

    wants_base = True
    no_off = "a merge is a stage of its own"
    baseline = {"use": "merge/task_arithmetic", "scale": 0.5}
    on = {"drop": 0.8, "scale": 0.5}

    def tensor(self, name: str, tensors: list[Tensor], base: Tensor | None, view: Any) -> Tensor:
        base, vectors = deltas(tensors, base, method="merge/dare")
        weights = one_each(self.weights, tensors, place="merge/dare.weights")
        rates = one_each(self.drop, tensors, place="merge/dare.drop")
        kept = [
            vector * kept_of(vector, rate, view.rng(f"drop|{i}|{name}")) / (1.0 - rate if self.rescale else 1.0)
            for i, (vector, rate) in enumerate(zip(vectors, rates, strict=True))
        ]
        combine = agreed if self.combine == "ties" else summed
        return base + self.scale * combine(kept, weights, normalize=self.normalize)


def kept_of(vector: Tensor, drop: float, rng: torch.Generator) -> Tensor:
    """Which entries are kept: each with chance 1 - `drop`, by itself."""
    return (torch.rand(vector.shape, generator=rng) >= drop).to(vector.device)


def effect(run: Seen) -> dict[str, float]:
    return moved(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Two models of which 0.8 is dropped leave 0.64 at the base, though what is left moves it farther."""
    return abs(on["still"] - off["still"] - 0.64) < 0.02 and on["moved"] > 1.2 * off["moved"]


BENCH = Bench(
    base="recipes/bench/merge.yaml",
    arm={"apply": {"use": "merge/dare", "drop": 0.5, "scale": 0.5}},
    stage="merged",
    baseline={"apply": {"use": "merge/task_arithmetic", "scale": 0.5}},
    metric="bits_per_byte",
    better="lower",
    margin=0.01,
    tune={"apply.drop": [0.2, 0.5], "apply.scale": [0.3, 0.5, 0.7]},
    tune_baseline={"apply.scale": [0.2, 0.3, 0.4, 0.5, 0.7, 1.0]},
    scale="LLaMA 7 B to 70 B, BERT and RoBERTa",
)

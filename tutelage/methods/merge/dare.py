"""DARE: drop most of what each model learned beyond the base, at random, and scale up the rest; then merge.

Paper:   Yu et al. 2023 (Language Models are Super Mario), arXiv:2311.03099
Use:     `start: [base, one, two]`; drop 0.9 where fine-tuning changed weights by about 0.002 at most (0.99 in 70 B
         parameters); where changes often pass 0.01 the paper's model breaks at 0.1. Their search in merges is 0.1 to 0.9.
         Scale and weights as in merge/task_arithmetic
Works:   models trained from one base, of one shape
Costs:   one draw an entry and model; no training, no data
With:    `combine: ties` elects signs among what was not dropped; redundant beside merge/ties, whose trimming it replaces
Differs: every floating-point tensor is dropped from, where the authors leave out an encoder's own head; with
         `combine: ties` the drop takes the place of trimming and what agrees is summed, as in mergekit (the authors' code
         then trims too, and averages: `normalize: true`). mergekit 0.1.5 rescales to the L1 norm from before the drop,
         which is 1 / (1 - drop) but for the chance of the draw; here it is the paper's. Weights beside the one scale
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


# Changes near what it asks for, none past 0.01. At 0.9 even `no effect` is a finding of its: nine tenths are not needed.
BENCH = Bench(
    base="recipes/bench/merge.yaml",
    arm={
        "start": ["one", "code_light", "asked_light", "records_light"],
        "apply": {"use": "merge/dare", "drop": 0.5, "scale": 1.0},
    },
    stage="merged",
    baseline={
        "start": ["one", "code_light", "asked_light", "records_light"],
        "apply": {"use": "merge/task_arithmetic", "scale": 1.0},
    },
    metric="bits_per_byte",
    better="lower",
    margin=0.01,
    tune={"apply.drop": [0.5, 0.9], "apply.scale": [0.7, 1.0, 1.5]},
    tune_baseline={"apply.scale": [0.5, 0.7, 0.85, 1.0, 1.25, 1.5]},
    scale="LLaMA 7 B to 70 B, BERT and RoBERTa",
)

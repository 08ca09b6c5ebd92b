"""Task arithmetic: add to a base what each model learned beyond it; a negative weight takes it away.

Paper:   Ilharco et al. 2022, arXiv:2212.04089
Use:     `start: [base, one, two]`; scale 1 for one model, 0.3 to 0.5 for several, chosen on held-out data
Works:   models trained from one base, of one shape
Costs:   one pass over the weights; no training, no data
With:    merge/ties where the models contradict each other
Differs: weights for single models beside the paper's one scale
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.vectors import deltas, moved, one_each, summed


class TaskArithmetic(Method):
    weights: list[float] | None = Field(None, description="weight of each model after the base, in order; 1 each")
    scale: float = Field(1.0, description="λ, which multiplies the sum of the task vectors")
    normalize: bool = Field(False, description="divide by the sum of the weights")

    wants_base = True
    no_off = "a merge is a stage of its own"
    baseline = {"use": "merge/task_arithmetic", "scale": 0.0}

    def tensor(self, name: str, tensors: list[Tensor], base: Tensor | None, view: Any) -> Tensor:
        base, vectors = deltas(tensors, base, method="merge/task_arithmetic")
        weights = one_each(self.weights, tensors, place="merge/task_arithmetic.weights")
        return base + self.scale * summed(vectors, weights, normalize=self.normalize)


def effect(run: Seen) -> dict[str, float]:
    return moved(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["moved"] > off["moved"] == 0.0


BENCH = Bench(
    base="recipes/bench/merge.yaml",
    arm={"apply": {"use": "merge/task_arithmetic", "scale": 0.5}},
    stage="merged",
    baseline={"start": ["code", "asked", "records"], "apply": {"use": "merge/linear"}},
    metric="bits_per_byte",
    better="lower",
    margin=0.01,
    tune={"apply.scale": [0.3, 0.5, 0.7, 1.0]},
    tune_baseline={"apply.weights": [[1, 1, 1], [2, 1, 1], [1, 2, 1], [1, 1, 2]]},
    scale="CLIP ViT-L/14, T5-base, GPT-2",
)

"""Linear merge: the weighted mean of several models, tensor by tensor.

Paper:   Wortsman et al. 2022 (model soups), arXiv:2203.05482
Use:     models that share a start; equal weights first, then by held-out loss
Works:   any models of one shape
Costs:   one pass over the weights; no training, no data
With:    checkpoints of schedule/constant, or arms of one stage
Differs: nothing in its uniform soup; its greedy soup is a sweep over which models take part, its learned one is not here
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.vectors import moved, one_each, summed


class Linear(Method):
    weights: list[float] | None = Field(None, description="weight of each start, in order; equal when left out")
    normalize: bool = Field(True, description="divide by the sum of the weights")

    no_off = "a merge is a stage of its own"
    baseline = {"use": "merge/linear", "weights": [1.0, 0.0]}
    on = {"weights": [0.5, 0.5]}

    def tensor(self, name: str, tensors: list[Tensor], base: Tensor | None, view: Any) -> Tensor:
        weights = one_each(self.weights, tensors, place="merge/linear.weights")
        if self.normalize and sum(weights) == 0:
            raise UserError("merge/linear.weights: they add up to 0; write normalize: false to take the bare sum")
        return summed(tensors, weights, normalize=self.normalize)


def effect(run: Seen) -> dict[str, float]:
    return moved(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["moved"] > off["moved"] == 0.0


BENCH = Bench(  # one task at three rates: is the soup better than the best of them?
    base="recipes/bench/merge.yaml",
    arm={"start": ["code", "code_fast", "code_faster"], "apply": {"use": "merge/linear"}},
    stage="merged",
    baseline={"start": ["code", "code_fast", "code_faster"], "apply": {"use": "merge/linear", "weights": [1, 0, 0]}},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"apply.weights": [[1, 1, 1], [0, 1, 1], [1, 0, 1]]},
    tune_baseline={"apply.weights": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]},
    scale="ViT-G/14 and BERT-base fine-tuned many times",
)

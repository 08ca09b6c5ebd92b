"""Slerp: go from one model to another along the sphere, so that the norm of each tensor does not shrink midway.

Paper:   Shoemake 1985 (doi:10.1145/325165.325242), for quaternions; on weights as in mergekit, arXiv:2403.13257
Use:     t 0.5; two models that share a start
Works:   any two models of one shape
Costs:   one pass over the weights; no training, no data
With:    chain merges to join more than two
Differs: each tensor is one vector; nearly colinear tensors (cosine over 0.9995) are interpolated in a straight line
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field
from torch import Tensor

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.vectors import moved

COLINEAR = 0.9995


class Slerp(Method):
    t: float = Field(0.5, ge=0, le=1, description="share of the way from the first start to the second")

    takes = 2
    no_off = "a merge is a stage of its own"
    baseline = {"use": "merge/slerp", "t": 0.0}

    def tensor(self, name: str, tensors: list[Tensor], base: Tensor | None, view: Any) -> Tensor:
        a, b = tensors
        cosine = cosine_of(a, b)
        if abs(cosine) > COLINEAR:
            return (1.0 - self.t) * a + self.t * b
        angle = math.acos(cosine)
        shares = [math.sin(part * angle) / math.sin(angle) for part in (1.0 - self.t, self.t)]  # at the ends 1 and 0
        return shares[0] * a + shares[1] * b


def cosine_of(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors; 0 where one of them is 0."""
    a, b = a.double().flatten(), b.double().flatten()
    norms = float(a.norm()), float(b.norm())
    return float(a @ b) / (norms[0] * norms[1]) if min(norms) > 1e-8 else 0.0


def effect(run: Seen) -> dict[str, float]:
    return moved(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["moved"] > off["moved"] == 0.0


BENCH = Bench(
    base="recipes/bench/merge.yaml",
    arm={"start": ["code", "asked"], "apply": {"use": "merge/slerp", "t": 0.5}},
    stage="merged",
    baseline={"start": ["code", "asked"], "apply": {"use": "merge/linear", "weights": [0.5, 0.5]}},
    metric="bits_per_byte",
    better="lower",
    margin=0.01,
    tune={"apply.t": [0.25, 0.4, 0.5, 0.6, 0.75]},
    tune_baseline={"apply.weights": [[0.75, 0.25], [0.6, 0.4], [0.5, 0.5], [0.4, 0.6], [0.25, 0.75]]},
    scale="7 B parameters (2403.13257)",
)

"""Task vectors: what training added to a base, how several become one, and what a merge did to its first start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]


def one_each(given: float | Sequence[float] | None, tensors: Sequence[Tensor], *, place: str) -> list[float]:
    """A number for each input: those given, one for all, or 1 where nothing is given. `place` is the setting's name."""
    if given is None or isinstance(given, (int, float)):
        return [1.0 if given is None else float(given)] * len(tensors)
    if len(given) != len(tensors):
        raise UserError(f"{place}: {len(given)} numbers for {len(tensors)} models to merge")
    return list(given)


def deltas(tensors: Sequence[Tensor], base: Tensor | None, *, method: str) -> tuple[Tensor, list[Tensor]]:
    """The base, and each tensor less the base."""
    assert base is not None, "core hands the first start as the base"
    if not tensors:
        raise UserError(f"{method}: `start` names the base first and then the models to merge; here is the base alone")
    return base, [tensor - base for tensor in tensors]


def summed(vectors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """The weighted sum, or the weighted mean: with all weight on one it is that one to the bit."""
    whole = sum(weights)
    divisor = whole if normalize and abs(whole) > 1e-8 else 1.0
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total.add_(vector, alpha=weight / divisor)
    return total


def agreed(vectors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool) -> Tensor:
    """TIES' election (Yadav et al. 2023): the sum of the weighted entries that have the sign of all of them together.

    `normalize` divides each entry by the weights that took part in it: the disjoint mean.
    """
    weighted = [vector * weight for vector, weight in zip(vectors, weights, strict=True)]
    elected = torch.where(torch.stack(weighted).sum(0) >= 0, 1.0, -1.0)
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector, weight in zip(weighted, weights, strict=True):
        agrees = vector.sign() == elected  # an entry that is 0 (trimmed, dropped) has sign 0 and agrees with none
        total += vector * agrees
        divisor += weight * agrees
    return total.div_(torch.where(divisor == 0, 1.0, divisor)) if normalize else total


def moved(run: Any) -> dict[str, float]:
    """How far a merge lies from its first start: the distance, and the share of entries left as they were."""
    start, end = run.start(), run.weights()
    names = [name for name in start if name in end and start[name].is_floating_point()]
    total = sum(start[name].numel() for name in names)
    still = sum(int((end[name] == start[name]).sum()) for name in names)
    square = sum(float((end[name].double() - start[name].double()).square().sum()) for name in names)
    return {"moved": square**0.5, "still": still / total}

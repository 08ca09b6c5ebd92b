"""What the optimizers share: which parameters decay, several optimizers as one, and what a finished run shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def decayed(group: dict[str, Any], decay: float, *, embeddings: bool = True) -> float:
    """A group's weight decay: its own if the recipe gave one; none for norms, biases and other vectors."""
    if group["decay"] is not None:
        return float(group["decay"])
    if group["role"] in ("norm", "bias") or all(p.ndim < 2 for p in group["params"]):
        return 0.0
    return 0.0 if group["role"] == "embedding" and not embeddings else decay


def parted(
    groups: list[dict[str, Any]], fits: Callable[[str, Tensor], bool]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups of the parameters that fit (by role and tensor) and groups of the others, in the groups' order."""
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in groups:
        mine = [fits(group["role"], p) for p in group["params"]]
        for wanted, side in zip((True, False), sides, strict=True):
            chosen = [i for i, fit in enumerate(mine) if fit is wanted]
            if chosen:
                side.append({**group, **{key: [group[key][i] for i in chosen] for key in ("names", "params")}})
    return sides


class Joined(torch.optim.Optimizer):
    """Several optimizers as one: their groups in a row, one state, one step each in turn."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        fused = any(part.defaults.get("fused") for part in parts)  # then step counts live on the parameters' device
        super().__init__([group for part in parts for group in part.param_groups], {"fused": fused})
        self.parts = list(parts)
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first:last], self.state
            first = last

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the engine computes gradients beforehand"
        for part in self.parts:
            part.step()


def last_over_first(run: Any) -> dict[str, float]:
    """Mean loss of the last quarter over the first step's, and how far the weights moved (a method's effect)."""
    losses = [row["loss"] for row in run.rows if row["kind"] == "train"]
    start, end = run.start(), run.weights()
    moved = sum(float((end[name].float() - start[name].float()).square().sum()) for name in start if name in end)
    tail = losses[-max(1, len(losses) // 4) :]
    return {"loss": sum(tail) / len(tail) / losses[0], "moved": moved**0.5}

"""What policies share: a number of the run as it comes in, a window of the newest ones, and what is usual in it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MEASURED = "eval/tick"  # the signal that says when the `eval/…` ones were measured
STEPWISE = ("loss", "grad_norm")  # signals that every step has


def news(state: dict[str, Any], view: Any, of: str, *, every: int) -> float | None:
    """The next number of a series, or None when this step brings none.

    `loss` and `grad_norm` come as means of `every` steps, without those that are no number; everything else is a
    measure, new when it was measured since the last one. What is remembered lies in `state`, under keys of its own.
    """
    if of not in STEPWISE:
        found = measures(view, of)
        when = float(view.signals.get(MEASURED, -1.0))
        if not found or when <= state.get("measured", -1.0):
            return None
        state["measured"] = when
        return sum(found.values()) / len(found)
    value = view.signals.get(of, math.nan)
    if math.isfinite(value):
        state["sum"], state["count"] = state.get("sum", 0.0) + value, state.get("count", 0) + 1
    if state.get("count", 0) < every:
        return None
    mean = state["sum"] / state["count"]
    state["sum"], state["count"] = 0.0, 0
    return float(mean)


def measures(view: Any, of: str) -> dict[str, float]:
    """What was measured under a name: itself, or its columns (`forgetting` gives `forgetting/prose`), finite ones."""
    prefix = f"eval/{of}"
    found = {
        key.removeprefix("eval/"): value
        for key, value in view.signals.items()
        if (key == prefix or key.startswith(f"{prefix}/")) and key != MEASURED
    }
    return {key: value for key, value in found.items() if math.isfinite(value)}


def pushed(window: Tensor | None, value: float, *, size: int) -> Tensor:
    """The newest `size` numbers, this one last, as float64 [n]."""
    new = torch.tensor([value], dtype=torch.float64)
    return new if window is None else torch.cat([window, new])[-size:]


def usual(window: Tensor) -> tuple[float, float]:
    """Median, and 1.4826 × the median distance from it: of a normal distribution, its standard deviation."""
    middle = window.median()
    return float(middle), 1.4826 * float((window - middle).abs().median())

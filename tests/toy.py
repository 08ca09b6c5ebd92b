"""Toy graphs for tests, and what is compared between their runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tutelage import modalities
from tutelage.base import load
from tutelage.core.graph import Graph
from tutelage.core.record import read_lines
from tutelage.modalities.text import toy

TIMES = frozenset({"seconds", "tokens_per_second", "memory", "memory_peak"})  # differ between runs, as they should


def graph(
    folder: Path, *, model: str = "llama", steps: int = 12, change: Callable[[dict[str, Any]], None] | None = None
) -> Graph:
    """The toy recipe, changed as a test likes, resolved; its runs are kept in `folder`/runs/toy."""
    recipe = toy.recipe(folder / "data", model=model, steps=steps)
    if change:
        change(recipe)
    return Graph.resolve(load.load(recipe), name="toy", modality=modalities.find("text"), runs=folder / "runs")


def numbers(stage: Path, *, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a stage's metrics without their times."""
    rows = [row for row in read_lines(stage / "metrics.jsonl") if kind in (None, row["kind"])]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]

"""Repeated random subsets (RS2): every round goes through a share of the data that is drawn anew, and nothing is scored.

Paper:   Okanovic et al. 2024, arXiv:2305.18424, and its public code
Use:     `fraction` 5–30 %, and `until` that share of the epochs that the whole data would get (200 epochs at 10 % are
    `until: 20epoch`), so that the schedule, being a share of the stage, is as short as the run; `draw: once` is a fixed
    random subset, which any pruning of data has to beat at equal rounds
Works:   text; any number of sources, of each of which the share is taken, and which hold many more chunks than `groups`
Costs:   nothing; a step's line in the metrics names `groups` positions a source
With:    takes the place of a curriculum; any mix, packing and objective
Differs: a subset is of whole groups of chunks, into which each source is divided at random (100 by default: a subset of
    10 % is 10 of them; another share is met to the nearest group), and a round is over when that share of the source (of
    the largest, where there are several) was drawn; a group that is drawn again goes on in its order; what is left of a
    pass without replacement is filled up from the next pass, not from the beginning of its own; classes of labels are not
    balanced, which the authors' code can do
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.portion import read


class RepeatedRandom(Method):
    fraction: Annotated[float, BeforeValidator(read)] = Field(
        0.1, gt=0, le=1, description="share of each source that a round goes through: `10%` or 0.1"
    )
    draw: Literal["with", "without", "once"] = Field(
        "with",
        description="a round's subset: of all data; of what no round had before all had been through; the first's",
    )
    groups: int = Field(
        100,
        ge=2,
        validate_default=True,
        description="groups that each source is divided into; a subset is some of them, and one at least",
    )

    no_off = "leave the slot out instead"
    baseline = {}
    on = {"fraction": 0.125, "groups": 8}

    @field_validator("groups")
    @classmethod
    def _fine(cls, value: int, found: ValidationInfo) -> int:
        fraction = found.data.get("fraction", 1.0)
        if fraction * value < 1 - 1e-9:
            raise ValueError(
                f"a fraction of {fraction:.2%} is less than one group; {math.ceil(1 / fraction)} are enough"
            )
        return value

    @property
    def size(self) -> int:
        """Groups of a subset."""
        return round(self.fraction * self.groups)

    def grade(self, chunks: Sequence[tuple[str, np.ndarray]]) -> Iterable[int]:
        """A group for each chunk, at random and of equal size; the same for the same number of chunks."""
        order = np.random.default_rng(len(chunks)).permutation(len(chunks))
        return (order % self.groups).tolist()

    def classes(self, view: Any) -> dict[int, float]:
        """The groups of this round's subset. `state` holds the round, its groups, and those still to come."""
        now = int(view.clock.epochs * self.groups / self.size + 1e-9)
        if "open" not in self.state or (now > self.state["round"] and self.draw != "once"):
            self.state["open"] = self.subset(view.rng("subset"))
        self.state["round"] = now
        return {int(group): 1.0 for group in self.state["open"].tolist()}

    def subset(self, rng: torch.Generator) -> torch.Tensor:
        """The next groups, [G]. Where those still to come are too few, the next pass over all of them begins."""
        size = self.size
        left = self.state.get("left", torch.zeros(0, dtype=torch.int64)).cpu()
        chosen, left = left[:size], left[size:]
        if self.draw == "with" or len(chosen) < size:
            kept = chosen if self.draw == "without" else chosen[:0]
            fresh = torch.randperm(self.groups, generator=rng)
            more = fresh[~torch.isin(fresh, kept)][: size - len(kept)]
            chosen, left = torch.cat([kept, more]), fresh[~torch.isin(fresh, more)]
        self.state["left"] = left
        return chosen


def effect(run: Seen) -> dict[str, float]:
    """Of how many groups a step draws at most, and of how many all steps together, by the parts whose cursors moved."""
    rows = [row for row in run.rows if row["kind"] == "train"]
    drawn = [
        {name for name, cursor in before["cursors"].items() if after["cursors"][name] != cursor and ":" in name}
        for before, after in pairwise(rows)
    ]
    return {"step": float(max(map(len, drawn))), "run": float(len(set().union(*drawn)))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """One group of eight at a time, and later another."""
    return on["step"] == 1 < on["run"] and off["run"] == 0


BENCH = Bench(
    base="recipes/bench/from-scratch.yaml",
    arm={"curriculum": {"use": "select/repeated_random", "fraction": 0.05}},
    baseline={"curriculum": {"use": "select/repeated_random", "fraction": 0.05, "draw": "once"}},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="ResNets on CIFAR-10 to ImageNet; up to 29 points over pruning by scores; here over a fixed random subset",
)

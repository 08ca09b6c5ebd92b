"""Length buckets: every row is a piece of one document, of a power of two; each step draws one length, short ones first.

Paper:   Pouransari et al. 2024 (Dataset Decomposition), arXiv:2405.13226, and its public code
Use:     `length` a power of two, the longest context; `shortest` the least context worth learning from (256 in the
    paper); `odds: grow_p2` with 8 `cycles`; more cycles where a long run begins to forget long contexts
Works:   text; documents of varied lengths, many of them shorter than `length`; any causal or masked objective; `until`
    in steps, tokens, epochs, minutes or FLOPs (there the cycles are reckoned from the first step's), not in rows
Costs:   nothing; short rows spend less on attention, so the same tokens take fewer operations, and no row is padded;
    `engine.compile` compiles once a length
With:    any mix: a source gives pieces of the drawn length in proportion to its share and to what it has of them, so
    that shares hold over a cycle, not in each step; `packing` means nothing to sources that are cut
Differs: pieces have 2^k positions and share an edge token with the next, where the code takes 2^k + 1 tokens and the
    next begins after them; a document longer than `length` gives the longest pieces first, where the code by default
    draws their lengths at random; a bucket's steps in a cycle need not be whole: what is over counts in the next
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from tutelage.base.method import Bench, Method, Seen

UNKNOWN = 10**9  # steps of a stage in minutes before the first are timed: as good as no number


class LengthBuckets(Method):
    shortest: int = Field(64, ge=1, description="positions of the shortest pieces, a power of two; less is left out")
    odds: Literal["uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100"] = Field(
        "grow_p2", description="how much likelier each length is than the longest, its share of the data apart"
    )
    cycles: int = Field(
        8, ge=1, le=10_000, description="times that the stage goes through all lengths, each time by these odds"
    )

    no_off = "leave the slot out instead"
    baseline = {}
    on = {"shortest": 8, "odds": "grow_p100", "cycles": 1}
    steerable = frozenset({"cycles"})

    @field_validator("shortest")
    @classmethod
    def _power(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"is {value}: a power of two is meant, 64 or 128 for instance")
        return value

    def cut(self, size: int) -> list[int]:
        """The binary digits of `size`, longest first, down to `shortest`."""
        digits = [1 << k for k in reversed(range(size.bit_length())) if size >> k & 1]
        return [digit for digit in digits if digit >= self.shortest]

    def shape(self, view: Any) -> tuple[int, int]:
        """This step's length, drawn among those that still have steps in this cycle; as many tokens as ever.

        `state["due"]` holds the steps that each length still has. A cycle gives each its share of the data; it is over
        when none has any left.
        """
        due: dict[str, float] = self.state.setdefault("due", {})
        steps = view.clock.total.get("step", UNKNOWN) / self.cycles
        known = steps < UNKNOWN / self.cycles  # not so before a stage in FLOPs or minutes has made its first steps
        while known and not any(due.get(str(length), 0.0) > 1e-9 for length in view.lengths):
            for length, share in view.lengths.items():
                due[str(length)] = due.get(str(length), 0.0) + share * steps
        open_ = [length for length in view.lengths if not known or due.get(str(length), 0.0) > 1e-9]
        weights = [view.lengths[length] * self.weight(length, max(view.lengths)) for length in open_]
        drawn = torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=view.rng("length"))
        length = open_[int(drawn)]
        due[str(length)] = due.get(str(length), 0.0) - 1.0
        return length, view.tokens

    def weight(self, length: int, longest: int) -> float:
        """How much likelier a piece of this length is drawn than one of the longest."""
        halvings = longest.bit_length() - length.bit_length()
        base = {"uniform": 1.0, "grow_p2": 2.0, "grow_p100": 100.0, "shrink_p100": 0.01}
        return halvings + 1.0 if self.odds == "grow_linear" else base[self.odds] ** halvings


def effect(run: Seen) -> dict[str, float]:
    """How many lengths there were, how padded the worst step was, and the later rows' length over the earlier ones'."""
    rows = [row for row in run.rows if row["kind"] == "train"]
    lengths = [row["length"] for row in rows]
    half = len(lengths) // 2
    return {
        "lengths": float(len(set(lengths))),
        "padding": max(row["padding"] for row in rows),
        "growth": sum(lengths[half:]) / max(1, sum(lengths[:half])),
        "positions": float(len({row["length"] * row["rows"] for row in rows})),
    }


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Rows of several lengths, the short ones first, none padded, and a step always the same tokens."""
    return on["lengths"] > 1 == off["lengths"] == on["positions"] and on["padding"] == 0 and on["growth"] > 1.2


BENCH = Bench(
    base="recipes/bench/lengths.yaml",
    arm={"curriculum": {"use": "curriculum/length_buckets", "shortest": 32}},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="160 M to 1 B parameters, 8k context, up to 1.1 T tokens",
)

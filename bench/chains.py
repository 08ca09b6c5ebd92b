"""Chains of values, a skill for each depth at which one is asked: LEGO (Zhang et al. 2022, arXiv:2206.04301) unrolled.

`1-+--:3=` begins with 1, and each sign says whether the next value is the same or the other one; the value at depth 3
is asked, and the answer is `0`. Each depth takes the one before it, so the skills have an order. Chance is one bit an
answer. LEGO's clauses name variables and stand in any order, of which a model of this size learned little in 750 steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator


class Chains:
    """`count` records of `prompt` and `answer` over chains of `links` values, asked at `depth` from 0."""

    def __init__(self, depth: int, links: int = 5, count: int = 20_000, seed: int = 0) -> None:
        assert 0 <= depth < links
        self.depth, self.links, self.count, self.seed = depth, links, count, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, str]]:
        rng = random.Random(f"{self.seed}|{self.depth}")
        for _ in range(self.count):
            first, signs = rng.randrange(2), [rng.choice("+-") for _ in range(self.links - 1)]
            answer = (first + signs[: self.depth].count("-")) % 2
            yield {"prompt": f"{first}{''.join(signs)}:{self.depth}=", "answer": str(answer)}

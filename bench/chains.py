"""Chains of values, a skill for each depth at which one is asked: LEGO (Zhang et al. 2022, arXiv:2206.04301) unrolled.

`7kbxs:2=` begins with an odd number, so with 1; a letter of the alphabet's first half keeps the value, one of its second
half turns it over. The value at depth 2 is asked: k and b keep it, and the answer is `1`. Each depth takes the one before
it and all its letters, so the skills have an order. There are 4.5 million chains of 5 values: what is held out was not
learned by heart. Chance is one bit an answer. LEGO's clauses name variables and stand in any order, of which a model of
this size learned little in 750 steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

LETTERS = "abcdefghijklmnopqrstuvwxyz"


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
            first, turns = rng.randrange(10), [rng.choice(LETTERS) for _ in range(self.links - 1)]
            answer = (first + sum(letter > "m" for letter in turns[: self.depth])) % 2
            yield {"prompt": f"{first}{''.join(turns)}:{self.depth}=", "answer": str(answer)}

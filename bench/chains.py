"""Chains of assignments after LEGO (Zhang et al. 2022, arXiv:2206.04301), a skill for each depth at which one is asked.

`c=-b,a=1,b=+a:c=` is answered with `0`: b is what a is, and c is not what b is. The value at depth d takes that at
depth d - 1, so the skills have an order. Chance is one bit an answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Chains:
    """`count` records of `prompt` and `answer` over chains of `links` variables, asked at `depth` from 0."""

    def __init__(self, depth: int, links: int = 3, letters: int = 26, count: int = 20_000, seed: int = 0) -> None:
        assert 0 <= depth < links <= letters <= len(LETTERS)
        self.depth, self.links, self.letters, self.count, self.seed = depth, links, letters, count, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, str]]:
        rng = random.Random(f"{self.seed}|{self.depth}")
        for _ in range(self.count):
            names = rng.sample(LETTERS[: self.letters], self.links)
            values = [rng.randrange(2) for _ in names]
            clauses = [f"{names[0]}={values[0]}"]
            for i in range(1, self.links):
                clauses.append(f"{names[i]}={'+' if values[i] == values[i - 1] else '-'}{names[i - 1]}")
            rng.shuffle(clauses)
            yield {"prompt": f"{','.join(clauses)}:{names[self.depth]}=", "answer": str(values[self.depth])}

"""Prose of which most is spoiled, for the benches of methods that tell good documents from poor ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from bench.duplicated import passages


class Noisy:
    """Passages of the standard library's prose, each in one of two parts: `trusted` (a fifth, as they are) or `pool`.

    Of the pool a share `poor` is spoiled, in equal parts: words in any order, words of other passages in the same
    places, names and numbers in lists. `passage` and `poor` stand in each record.
    The same for the same `seed`; the order is shuffled.
    """

    def __init__(self, part: str = "pool", *, poor: float = 0.7, seed: int = 0) -> None:
        self.part, self.poor, self.seed = part, poor, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(f"noise {self.seed}")
        every = list(passages())
        words = [word for passage in every for word in passage.split()]
        order = rng.sample(range(len(every)), len(every))
        fifth = len(every) // 5
        for number in order[:fifth] if self.part == "trusted" else order[fifth:]:
            poor = self.part != "trusted" and rng.random() < self.poor
            text = spoiled(every[number], words, rng) if poor else every[number]
            yield {"text": text, "passage": number, "poor": poor}


def spoiled(text: str, words: list[str], rng: random.Random) -> str:
    """A passage that teaches little, about as long as it was."""
    parts = text.split(" ")
    kind = rng.randrange(3)
    if kind == 0:
        return " ".join(rng.sample(parts, len(parts)))
    if kind == 1:
        return " ".join(rng.choice(words) for _ in parts)
    names = sorted({word.strip(".,:;()'\"`") for word in parts})
    return "\n".join(f"{rng.choice(names)} = {rng.randrange(10_000)}" for _ in range(len(text) // 12))

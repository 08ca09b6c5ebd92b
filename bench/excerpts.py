"""The standard library's prose in documents of very different lengths, for the benches of methods that mind lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from tutelage.modalities.text import stdlib


class Excerpts:
    """Whole paragraphs joined to documents of log-normal length, as web pages have; the same for the same `seed`.

    median, spread: of the lengths in bytes, and of their logarithms
    """

    def __init__(self, median: float = 300.0, spread: float = 1.0, seed: int = 0) -> None:
        self.median, self.spread, self.seed = median, spread, seed

    def __iter__(self) -> Iterator[dict[str, str]]:
        rng = random.Random(self.seed)
        for record in stdlib.records("stdlib:prose", "train"):
            taken: list[str] = []
            wanted = 0.0
            for paragraph in record["text"].split("\n\n"):
                wanted = wanted or rng.lognormvariate(math.log(self.median), self.spread)
                taken.append(paragraph)
                if sum(len(part.encode()) for part in taken) >= wanted:
                    yield {"text": "\n\n".join(taken)}
                    taken, wanted = [], 0.0
            if taken:
                yield {"text": "\n\n".join(taken)}

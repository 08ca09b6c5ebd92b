"""Code with a stretch of unreadable text at one place, for the bench of what goes back when training is thrown off."""

from __future__ import annotations

import random
from collections.abc import Iterator

from bench.undecoded import undecoded
from tutelage.modalities.text import stdlib

PASSAGE = 400  # characters of a document, at least; cut at a line: about a row of 128 tokens


class Spoiled:
    """Passages of the standard library's code in an order drawn once, so that nearby ones have nothing in common.

    After `at` characters come `size` characters of passages that somebody forgot to decode, in pieces as long as the
    others. To be read as stored. The same for the same `seed`.
    """

    def __init__(self, *, at: int, size: int, seed: int = 0) -> None:
        self.at, self.size, self.seed = at, size, seed

    def __iter__(self) -> Iterator[dict[str, str]]:
        found = list(passages())
        seen, spoiled = 0, False
        for text in random.Random(f"spoiled {self.seed}").sample(found, len(found)):
            if seen >= self.at and not spoiled:
                spoiled = True
                whole = "".join(record["text"] for record in undecoded(self.size // 500))[: self.size]
                yield from ({"text": whole[i : i + PASSAGE]} for i in range(0, len(whole), PASSAGE))
            seen += len(text)
            yield {"text": text}


def passages() -> Iterator[str]:
    """The code in pieces of whole lines."""
    for record in stdlib.records("stdlib:code", "train"):
        held = ""
        for line in record["text"].splitlines(keepends=True):
            held += line
            if len(held) >= PASSAGE:
                yield held
                held = ""

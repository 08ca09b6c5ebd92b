"""Sentences of many grammars that share their symbols, for the benches of methods that tell a model where a text is from.

After the artificial data of Higuchi et al. 2025 (arXiv:2504.17562): at each of `depth` levels one of two sets of rules is
in force, so `depth` bits say which of 2 ** depth grammars a sentence is of, and a reader has to guess them from the text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

LETTERS = "abcdefgh"
FAR = 1 << 40  # beyond any sentence

Rules = list[list[list[tuple[int, ...]]]]  # set, symbol, choices


class Sentences:
    """`count` records of `text` and `tag`: the bits of the sentence's grammar, `?` for those beyond `told`.

    The same `grammar` gives the same rules, the same `seed` the same sentences of them. `measured: [a, b]` masks all of
    a held-out text but its bytes a … b: what is predicted from a context of that length. `said` writes the tag and a
    space before the text; the same bytes are measured then.
    """

    def __init__(
        self,
        count: int = 1000,
        seed: int = 0,
        *,
        depth: int = 4,
        told: int | None = None,
        grammar: int = 0,
        measured: tuple[int, int] | None = None,
        said: bool = False,
    ) -> None:
        assert depth >= 1
        self.count, self.seed, self.depth, self.measured, self.said = count, seed, depth, measured, said
        self.told = depth if told is None else told
        rng = random.Random(f"rules {grammar}")
        self.levels = [rules(rng) for _ in range(depth)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(f"sentences {self.seed}")
        for _ in range(self.count):
            bits = [rng.randrange(2) for _ in range(self.depth)]
            symbols = [rng.randrange(len(LETTERS)) for _ in range(2)]
            for level, bit in zip(self.levels, bits, strict=True):
                symbols = [child for symbol in symbols for child in rng.choice(level[bit][symbol])]
            tag = "".join(map(str, bits[: self.told])).ljust(self.depth, "?")
            before = f"{tag} " if self.said else ""
            record: dict[str, Any] = {"text": before + "".join(LETTERS[symbol] for symbol in symbols), "tag": tag}
            if self.measured is not None:
                first, last = (len(before) + place for place in self.measured)
                record["mask"] = [[0, first], [last, FAR]]
            yield record


def rules(rng: random.Random) -> Rules:
    """Two sets of rules: for every symbol two choices of two or three symbols."""

    def children() -> tuple[int, ...]:
        return tuple(rng.randrange(len(LETTERS)) for _ in range(rng.choice((2, 3))))

    return [[[children(), children()] for _ in LETTERS] for _ in range(2)]

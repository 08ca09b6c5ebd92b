"""Small scenes of which some are told rudely, for the benches of methods that prefer some text to other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

from bench.instructions import COLORS, NAMES, PLACES, THINGS

RUDE = ("darn", "blasted", "stupid", "dumb", "rotten", "lousy")


class Manners:
    """`count` records of `text` and `reward` (minus the number of rude words), the same for the same `seed`.

    A share `poor` is told by somebody rude, who says a rude word in a sentence as often as not, and once at least.
    `only` keeps the records of one kind. `said` is written before the text and masked, so that the same bytes are
    measured with and without it.
    """

    def __init__(
        self,
        count: int = 1000,
        seed: int = 0,
        *,
        poor: float = 0.3,
        only: Literal["good", "bad"] | None = None,
        said: str = "",
    ) -> None:
        self.count, self.seed, self.poor, self.only, self.said = count, seed, poor, only, said

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(f"manners {self.seed}")
        made = 0
        while made < self.count:
            rude = rng.random() < self.poor
            size = rng.randrange(2, 5)
            always = rng.randrange(size)
            words = [rng.choice(RUDE) if rude and (i == always or rng.random() < 0.5) else "" for i in range(size)]
            text = " ".join(sentence(word, rng) for word in words)
            if self.only is not None and rude != (self.only == "bad"):
                continue
            made += 1
            record: dict[str, Any] = {"text": self.said + text, "reward": -sum(map(bool, words))}
            if self.said:
                record["mask"] = [[0, len(self.said.encode())]]
            yield record


def sentence(word: str, rng: random.Random) -> str:
    """A sentence about a thing, called `word` if it is called anything."""
    name, place, color = rng.choice(NAMES), rng.choice(PLACES), rng.choice(COLORS)
    thing = f"{word} {rng.choice(THINGS)}".strip()
    return rng.choice(
        [
            f"{name} put the {thing} in the {place}.",
            f"The {thing} in the {place} is {color}.",
            f"{name} has a {color} {place} and the {thing}.",
            f"Who took the {thing}? It was {name}.",
        ]
    )

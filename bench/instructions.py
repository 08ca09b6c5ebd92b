"""Templated instructions with one-sentence answers, for the benches of methods that watch instruction tuning."""

from __future__ import annotations

import random
from collections.abc import Iterator

THINGS = ("apple", "bell", "boat", "book", "bottle", "box", "bridge", "candle", "chair", "clock", "cup", "door", "drum",
          "fence", "flag", "garden", "hat", "house", "key", "lamp")  # fmt: skip
COLORS = ("black", "blue", "brown", "gray", "green", "orange", "pink", "red", "white", "yellow")
PLACES = (
    "attic",
    "barn",
    "cellar",
    "court",
    "field",
    "hall",
    "harbor",
    "kitchen",
    "market",
    "office",
    "park",
    "school",
)
NAMES = ("Ada", "Ben", "Cora", "Dan", "Eve", "Finn", "Gwen", "Hal", "Ida", "Jon", "Kay", "Leo", "Mia", "Ned", "Olga")


class Instructions:
    """`count` records of `prompt` and `answer`, the same for the same `seed`. Every answer follows from its prompt."""

    def __init__(self, count: int = 400, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def __iter__(self) -> Iterator[dict[str, str]]:
        rng = random.Random(self.seed)
        for _ in range(self.count):
            thing, other = rng.sample(THINGS, 2)
            color, place, name = rng.choice(COLORS), rng.choice(PLACES), rng.choice(NAMES)
            a, b = rng.randrange(20), rng.randrange(20)
            prompt, answer = rng.choice(
                [
                    (f"{name} put the {thing} in the {place}. Where is it?", f"The {thing} is in the {place}."),
                    (f"Say that the {thing} is {color}.", f"The {thing} is {color}."),
                    (f"Who has the {thing}, if {name} took it?", f"{name} has the {thing}."),
                    (f"What is {a} plus {b}?", f"It is {a + b}."),
                    (f"Write a sentence with {thing} and {other}.", f"The {thing} is beside the {other}."),
                    (f"Is the {thing} {color}, as {name} says?", f"Yes, {name} says that the {thing} is {color}."),
                ]
            )
            yield {"prompt": prompt, "answer": answer}

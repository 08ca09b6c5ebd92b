"""Small records as JSON, each followed by a line that reads two of its values, for the benches of merges."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from bench.instructions import COLORS, NAMES, PLACES, THINGS


class Records:
    """`count` records of `text`, the same for the same `seed`."""

    def __init__(self, count: int = 400, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def __iter__(self) -> Iterator[dict[str, str]]:
        rng = random.Random(self.seed)
        for number in range(self.count):
            lines = []
            for i in range(rng.randrange(2, 6)):
                owner, thing, color, place = (rng.choice(of) for of in (NAMES, THINGS, COLORS, PLACES))
                row = {"id": 10 * number + i, "owner": owner, "thing": thing, "color": color, "place": place}
                lines += [json.dumps(row), f"-> {owner}: {color} {thing}"]
            yield {"text": "\n".join(lines)}

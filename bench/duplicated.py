"""Prose with copies of some of it, a little changed each time, for the benches of methods that find copies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tutelage.modalities.text import stdlib

PASSAGE = 1500  # characters of a document, at least; cut at a paragraph


class Copied:
    """Passages of the standard library's prose that is learned from; some stand there many times.

    A share `copied` of the passages has further copies, 1 to `most` of them, drawn so that long runs are rare. In a copy
    `edits` of the words in a thousand are replaced by words of other passages, its ends are cut, and a line of its own
    is added. `passages` keeps the first ones (None: all of them). The same for the same `seed`; the order is shuffled.
    """

    def __init__(
        self, passages: int | None = None, *, copied: float = 0.15, most: int = 60, edits: int = 10, seed: int = 0
    ) -> None:
        self.passages, self.copied, self.most, self.edits, self.seed = passages, copied, most, edits, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = random.Random(f"copies {self.seed}")
        found = rng.sample(every := list(passages()), len(every))[: self.passages]
        words = [word for passage in found for word in passage.split()]
        records = []
        for number, text in enumerate(found):
            records.append({"text": text, "passage": number, "copy": 0})
            if rng.random() < self.copied:
                times = min(self.most, int(2 / (1 - rng.random()) ** 0.9))
                records += [
                    {"text": changed(text, words, self.edits, rng), "passage": number, "copy": i + 1}
                    for i in range(times)
                ]
        yield from rng.sample(records, len(records))


def passages() -> Iterator[str]:
    """The prose in paragraphs, joined until they are long enough."""
    for record in stdlib.records("stdlib:prose", "train"):
        held = ""
        for paragraph in record["text"].split("\n\n"):
            held += paragraph + "\n\n"
            if len(held) >= PASSAGE:
                yield held
                held = ""
        if len(held) >= PASSAGE // 4:
            yield held


def changed(text: str, words: list[str], edits: int, rng: random.Random) -> str:
    """A copy as the web has them: some other words, other ends, a line of the page that it stands on."""
    parts = text.split(" ")
    parts = [rng.choice(words) if part and rng.random() < edits / 1000 else part for part in parts]
    first, last = rng.randrange(1 + len(parts) // 50), rng.randrange(1 + len(parts) // 50)
    line = " ".join(rng.choice(words) for _ in range(rng.randrange(2, 6)))
    return f"{line}\n" + " ".join(parts[first : len(parts) - last])

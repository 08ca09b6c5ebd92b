"""Prose in ciphers: the same documents, each letter replaced by another, which a key decides.

What permuted MNIST is to images: tasks of the same difficulty in the same symbols, of which learning one undoes another.
Case, digits, marks and blanks stay, so lines look alike in all of them.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

from tutelage.modalities.text import stdlib


class Enciphered:
    """The standard library's prose that is learned from, in documents of whole paragraphs; `key` 0 leaves it plain.

    size: characters of a document, at least
    """

    def __init__(self, key: int, size: int = 400) -> None:
        self.key, self.size = key, size

    def __iter__(self) -> Iterator[dict[str, str]]:
        table = cipher(self.key)
        for record in stdlib.records("stdlib:prose", "train"):
            held = ""
            for paragraph in record["text"].split("\n\n"):
                held += paragraph + "\n\n"
                if len(held) >= self.size:
                    yield {"text": held.translate(table)}
                    held = ""


def cipher(key: int) -> dict[int, int]:
    """What becomes of each letter: the same permutation for both cases."""
    letters = list(string.ascii_lowercase)
    if key:
        random.Random(f"cipher {key}").shuffle(letters)
    others = "".join(letters)
    return str.maketrans(string.ascii_letters, others + others.upper())

"""A source whose rows begin with a text about their document: read by the model, never learned.

Positions are counted in a document as it is with its prefix. The text is cut into parts that leave room for the prefix
in a row, and every part begins with it, so that nothing is read without what it is conditioned on:

    position   0 … m   … R-1 | R … R+m … 2R-1 | …        m tokens of prefix, rows of R positions
    holds      prefix, text  | prefix, text   |          the text's own tokens and labels are the same as without
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from tutelage.base.errors import UserError
from tutelage.core.types import IGNORE, Piece
from tutelage.modalities.text.encode import Encoder
from tutelage.modalities.text.source import TextSource, cut

Write = Callable[[Iterator[dict[str, Any]]], Iterator[str]]  # records of documents in, what each begins with out
NONE = -1  # in `plain`: a position that is not there without the prefix


class Told(dict[str, Any]):
    """A document's record, which also has its `text`: read when it is asked for, as few methods do."""

    def __init__(self, record: dict[str, Any], read: Callable[[], str]) -> None:
        super().__init__(record)
        self._read = read

    def __missing__(self, key: str) -> str:
        if key != "text":
            raise KeyError(key)
        return self._read()


class Prefixed:
    """A text source with a prefix for each document. See core/stream.py for what a source is.

    Raises UserError for a prefix that would take more than half of a row.
    """

    def __init__(self, base: TextSource, write: Write, *, tokenizer: Any, length: int) -> None:
        encoder = Encoder(tokenizer)
        texts: dict[str, int] = {}
        records = (Told(record, partial(base.text, doc)) for doc, record in enumerate(base.records()))
        self._of = np.array([texts.setdefault(text, len(texts)) for text in write(records)], np.int32)  # [D]
        self._texts = list(texts)
        self._ids = [ids.astype(np.int64) for ids in encoder.ids(self._texts)]
        sizes = np.array([len(ids) for ids in self._ids], np.int64)
        if len(sizes) and 2 * sizes.max() > length:
            longest = self._texts[int(sizes.argmax())]
            raise UserError(
                f"data.{base.name}: what stands before a document takes {sizes.max()} of a row's {length} tokens "
                f"({longest[:60]!r}); shorten it, or raise `length`"
            )
        self.base, self.name, self.special, self.meta = base, base.name, base.special, base.meta
        self._front, self._length, self.stored = encoder.front, length, base.stored
        taken_D = sizes[self._of] if len(sizes) else np.zeros(0, np.int64)
        text, left_out = cut(base._side, length - taken_D)
        number = text[:, 1] // np.maximum(length - taken_D[text[:, 0]], 1)  # of the part within its document
        self.chunks = np.stack([text[:, 0], number * length, text[:, 2] + taken_D[text[:, 0]]], axis=1)
        whole = hashlib.blake2b(self._of.tobytes() + "\0".join(texts).encode(), digest_size=12)
        self.fingerprint = f"{base.fingerprint}-{length}-{whole.hexdigest()}"
        self.facts = {
            **base.facts,
            "chunks": float(len(self.chunks)),
            "chunks_left_out": float(left_out),
            "tokens": float(self.chunks[:, 2].sum()),
        }

    def read(self, piece: Piece) -> dict[str, np.ndarray]:
        """As of the source without prefixes, and `plain`: the token that a position holds there, `NONE` for none.

        A document's own first separator stays first. Labels of the prefix are IGNORE.
        """
        ids = self._ids[self._of[piece.doc]]
        text, lead = self._text(piece)
        found = self.base.read(text) if text.length else {}
        own = found.pop("tokens", np.zeros(0, np.int64))
        labels = found.pop("labels", np.zeros(0, np.int64))
        tokens = np.concatenate([np.zeros(lead, np.int64), own])
        begin = self.base.begin(piece.doc) if piece.start < self._length else None
        before = np.concatenate([[begin], ids]) if begin in self._front else ids
        offset = piece.start % self._length
        size = max(0, min(len(before) - offset, piece.length)) if len(ids) else 0
        tokens[:size] = before[offset : offset + size]
        return {
            "tokens": tokens,
            "labels": np.concatenate([np.full(lead, IGNORE), labels]),
            "plain": np.concatenate([np.full(lead, NONE), own]),
            **{name: np.concatenate([np.zeros(lead, value.dtype), value]) for name, value in found.items()},
        }

    def counted(self, piece: Piece) -> int:
        """Positions of a piece that have a label."""
        text, _ = self._text(piece)
        return self.base.counted(text) if text.length else 0

    def name_of(self, piece: Piece, *, processor: Any = None) -> dict[str, Any]:
        """Where a piece's text comes from, and its prefix."""
        text, _ = self._text(piece)
        named = self.base.name_of(text, processor=processor)
        return {**named, "prefix": self._texts[self._of[piece.doc]]}

    def _text(self, piece: Piece) -> tuple[Piece, int]:
        """The stretch of its document's own tokens that a piece holds, and how many of the prefix's come before."""
        taken = len(self._ids[self._of[piece.doc]])
        number, offset = divmod(piece.start, self._length)
        assert offset + piece.length <= self._length, "a piece lies within one part of its document"
        lead = max(0, min(taken - offset, piece.length))
        return Piece(piece.doc, number * (self._length - taken) + max(offset - taken, 0), piece.length - lead), lead

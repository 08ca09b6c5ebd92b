"""Text as a source of pieces: fixed chunks of documents, read with the labels that belong to them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tutelage.base.spec import SourceSpec
from tutelage.core.types import IGNORE, Piece
from tutelage.modalities.text import imports, read, store
from tutelage.modalities.text.encode import byte_table
from tutelage.modalities.text.fields import Content, content_of, shape_of
from tutelage.modalities.text.read import Record
from tutelage.modalities.text.store import Progress, Side, Store

content_id = imports.content_id
SEEN = 0.001  # share of text that the tokenizer does not know, from which it is told of


class TextSource:
    """One side of a store, cut into chunks of at most `chunk` positions. See core/stream.py for what a source is.

    A document of L tokens has L - 1 positions: its last token is a label only. Chunks in which nothing is learned
    (long prompts) are left out.
    """

    stored = False

    def __init__(self, name: str, held: Store, side: Side, *, chunk: int, tokenizer: Any) -> None:
        self.name = name
        self.fingerprint = f"{held.fingerprint}-{'val' if side is held.val else 'train'}"
        self.meta = held.meta
        self.special: dict[str, int] = {}  # ids that objectives need; set by the modality
        self._side, self._tokenizer = side, tokenizer
        self._tokens, self._loss, self._bytes = side.tokens, side.loss, side.bytes
        self._offsets = np.asarray(side.offsets)
        self._table: Any = None
        self.chunks, left_out = cut(side, chunk)
        counts = held.meta["val" if side is held.val else "train"]
        self.facts: dict[str, float] = {
            "documents": float(counts["documents"]),
            "chunks": float(len(self.chunks)),
            "chunks_left_out": float(left_out),
            "tokens": float(self.chunks[:, 2].sum()),
            "bytes": float(counts["bytes"]),
            "malformed": float(held.meta["malformed"]),
            "empty": float(held.meta["empty"]),
            "unknown": self._unknown(),
        }

    def part(self, name: str, chunks: np.ndarray) -> TextSource:
        """The same documents under another name with other chunks; those without anything to learn are left out."""
        found = copy.copy(self)
        found.name, found.chunks = name, chunks[_learned(self._side, chunks)]
        found.fingerprint = f"{self.fingerprint}-{hashlib.blake2b(found.chunks.tobytes(), digest_size=8).hexdigest()}"
        left_out = self.facts["chunks_left_out"] + len(chunks) - len(found.chunks)
        found.facts = {
            **self.facts,
            "chunks": float(len(found.chunks)),
            "chunks_left_out": float(left_out),
            "tokens": float(found.chunks[:, 2].sum()),
        }
        return found

    def report(self) -> list[str]:
        """What a person should know about how the source was read, a line each; empty when there is nothing."""
        meta = self.meta
        lines = [f"{self.name}: {note}" for note in meta["notes"]]
        if meta["malformed"]:
            some = "; ".join(meta["places"][:3])
            lines.append(f"{self.name}: {meta['malformed']} malformed records skipped ({some})")
        if meta["empty"]:
            lines.append(f"{self.name}: {meta['empty']} empty records skipped")
        if self.facts["chunks_left_out"]:
            lines.append(f"{self.name}: {self.facts['chunks_left_out']:.0f} chunks without anything to learn left out")
        if self.facts["unknown"]:
            lines.append(
                f"{self.name}: {self.facts['unknown']:.1%} of its tokens are ones that the tokenizer does not know; their "
                "bytes cost next to nothing to predict, so bits per byte are too low to compare with another tokenizer's"
            )
        return lines

    def _unknown(self) -> float:
        """Share of the first million tokens that stand for whatever the vocabulary has no tokens for; of their bytes,
        where these are known (held-out sources). 0 below `SEEN`.
        """
        made = self._tokenizer
        unknown, others = made.unk_token_id, (made.bos_token_id, made.eos_token_id, made.pad_token_id)
        if unknown is None or unknown in others or not len(self._tokens):  # GPT-2's is the end of a text
            return 0.0
        there = np.asarray(self._tokens[:1_000_000]) == unknown
        sizes = np.ones(len(there)) if self._bytes is None else self._bytes[: len(there)].astype(np.float64)
        share = float(sizes[there].sum() / max(1.0, sizes.sum()))
        return share if share >= SEEN else 0.0

    def read(self, piece: Piece) -> dict[str, np.ndarray]:
        """`tokens` and `labels` of a piece, [T] int64; for held-out sources also `bytes` of each label.

        The label of a position is the next token of its document, also beyond the piece, or IGNORE where there is
        none or it is not learned (measured). `bytes` is 0 there.
        """
        first, last = int(self._offsets[piece.doc]), int(self._offsets[piece.doc + 1])
        start = first + piece.start
        stop = start + piece.length
        assert first <= start < stop <= last
        tokens = self._tokens[start:stop].astype(np.int64)
        end = min(stop + 1, last)
        count = end - start - 1
        labels = self._tokens[start + 1 : end].astype(np.int64)
        if count < piece.length:  # the document ends here
            labels = np.append(labels, IGNORE)
        if self._loss is not None:
            labels[:count][self._loss[start + 1 : end] == 0] = IGNORE
        if self._bytes is None:
            return {"tokens": tokens, "labels": labels}
        sizes = np.zeros(piece.length, np.int64)
        sizes[:count] = self._bytes[start + 1 : end]
        sizes[labels == IGNORE] = 0
        return {"tokens": tokens, "labels": labels, "bytes": sizes}

    def counted(self, piece: Piece) -> int:
        """Positions of a piece that have a label."""
        start = int(self._offsets[piece.doc]) + piece.start
        stop = min(start + piece.length, int(self._offsets[piece.doc + 1]) - 1)
        return stop - start if self._loss is None else int(np.count_nonzero(self._loss[start + 1 : stop + 1]))

    def begin(self, doc: int) -> int:
        """The first token of a document."""
        return int(self._tokens[self._offsets[doc]])

    def text(self, doc: int) -> str:
        """All that a document says, read back from its tokens."""
        ids = self._tokens[self._offsets[doc] : self._offsets[doc + 1]].astype(np.int64)
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def records(self) -> Iterator[dict[str, Any]]:
        """Source, file, line, id, bytes and remaining metadata of every document, in order, a few at a time."""
        import pyarrow.parquet as pq

        if self._side.folder is None:
            return
        for batch in pq.ParquetFile(self._side.folder / "records.parquet").iter_batches(4096):
            for row in batch.to_pylist():
                yield {"source": self.name, **row, "meta": orjson.loads(row["meta"])}

    def documents(self, ids: Iterable[int]) -> list[dict[str, Any]]:
        """File, line, id, bytes and remaining metadata of documents."""
        if self._table is None:
            import pyarrow.parquet as pq

            assert self._side.folder is not None, "an empty source has no documents"
            self._table = pq.read_table(self._side.folder / "records.parquet", memory_map=True)
        rows = self._table.take(list(ids)).to_pylist()
        return [{**row, "meta": orjson.loads(row["meta"])} for row in rows]

    def name_of(self, piece: Piece, *, processor: Any = None) -> dict[str, Any]:
        """Where a piece comes from, for people: file, line, bytes [start, end) in the document's text, and the text."""
        tokenizer = processor or self._tokenizer
        row = self.documents([piece.doc])[0]
        first = int(self._offsets[piece.doc])
        ids = self._tokens[first : first + piece.start + piece.length].astype(np.int64)
        start = self._byte_length(ids[: piece.start], tokenizer, first)
        length = self._byte_length(ids[piece.start :], tokenizer, first + piece.start)
        return {
            "file": row["file"],
            "line": row["line"],
            "id": row["id"],
            "document": piece.doc,
            "bytes": [start, start + length],
            "text": tokenizer.decode(ids[piece.start :].tolist()),
        }

    def _byte_length(self, ids: np.ndarray, tokenizer: Any, at: int) -> int:
        if self._bytes is not None:
            return int(self._bytes[at : at + len(ids)].sum())
        table = byte_table(tokenizer)
        if table is None:
            return len(tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode())
        return int(table[ids[~np.isin(ids, tokenizer.all_special_ids)]].sum())


def cut(side: Side, chunk: int | np.ndarray) -> tuple[np.ndarray, int]:
    """[N, 3] int64 document, start, length; and how many chunks were left out for having nothing to learn.

    `chunk` is the longest a chunk may be, of all documents or of each [D].
    """
    offsets = np.asarray(side.offsets)
    positions = np.maximum(np.diff(offsets) - 1, 0)
    longest = np.broadcast_to(chunk, positions.shape)
    assert (longest > 0).all()
    counts = -(-positions // longest)
    doc = np.repeat(np.arange(len(positions)), counts)
    start = (np.arange(len(doc)) - np.repeat(np.cumsum(counts) - counts, counts)) * longest[doc]
    length = np.minimum(positions[doc] - start, longest[doc])
    chunks = np.stack([doc, start, length], axis=1).astype(np.int64)
    learned = _learned(side, chunks)
    return chunks[learned], int(len(chunks) - learned.sum())


def _learned(side: Side, chunks: np.ndarray) -> np.ndarray:
    """[N] bool: in which chunks anything is learned."""
    if side.loss is None or not len(chunks):
        return np.ones(len(chunks), bool)
    begin = np.asarray(side.offsets)[chunks[:, 0]] + chunks[:, 1] + 1  # of the labels
    edges = np.stack([begin, begin + chunks[:, 2]], axis=1).ravel()
    inside = edges < len(side.loss)  # only the very last edge may stand at the end
    return np.asarray(np.add.reduceat(side.loss, edges[inside], dtype=np.int64)[::2] > 0)


def build(
    name: str,
    spec: SourceSpec,
    tokenizer: Any,
    *,
    cache: Path,
    chunk: int,
    workers: int = 1,
    progress: Progress | None = None,
    rows: Path | Iterable[dict[str, Any]] | None = None,
) -> tuple[TextSource, TextSource]:
    """Training and held-out source of one spec; the latter is empty when nothing is held out. See `store.build`."""
    train, val = store.build(name, spec, tokenizer, cache=cache, workers=workers, progress=progress, rows=rows)
    drawn = TextSource(name, train, train.train, chunk=chunk, tokenizer=tokenizer)
    drawn.stored = spec.order == "stored"
    return drawn, TextSource(name, val, val.val, chunk=chunk, tokenizer=tokenizer)


def texts(spec: SourceSpec, *, rows: Path | None = None, cache: Path | None = None) -> Iterator[str]:
    """The texts a source is made of, for training a tokenizer, without the share of documents that is held out.

    (The one document that is held out where the share comes to none is among them.)
    """
    standard = isinstance(spec.path, str) and spec.path.startswith("stdlib:")  # has held-out documents of its own
    name = str(spec.path or spec.hub or spec.use or spec.stage)
    share = 0.0 if standard else store.held_out(name, spec)[0]
    found = None if rows is not None else imports.importer(spec)
    if found is not None:
        label, records = found
        every: Iterable[Any] = (Record(label, i, r) for i, r in enumerate(records(cache), 1) if isinstance(r, dict))
        every = list(every)
        sample = every[:100]
    else:
        files, _ = imports.files_of(spec, cache=Path(), rows=rows)
        sample = read.peek(files)
        every = (record for block in read.blocks(files) for record in read.records(block))
    shape = shape_of(name, spec, sample)
    for record in every:
        content = content_of(record, shape) if isinstance(record, Record) else record
        if isinstance(content, Content) and content.key() >= share * 2**64:
            yield said(content)


def said(content: Content) -> str:
    """All that a record says, in one text."""
    return content.text or "\n".join([m["content"] for m in content.messages] or [content.prompt, content.answer])

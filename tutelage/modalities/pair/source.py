"""Pairs of a picture and a text as pieces: one pair a piece, the picture's token repeated for every patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tutelage.base.spec import SourceSpec
from tutelage.core.types import IGNORE, Piece
from tutelage.modalities.pair.store import Store, Told, open_or_make
from tutelage.modalities.text import source as texts
from tutelage.modalities.text.store import held_out

WHOLE = 1 << 40  # positions of a chunk: documents are never cut in two, a picture would lose its text


class PairSource:
    """One side of a store. A piece is a whole pair, cut at its end where it is longer than `length`."""

    def __init__(self, text: texts.TextSource, held: Store, *, processor: Any, length: int) -> None:
        self.name, self.text, self.held, self.stored = text.name, text, held, text.stored
        self.fingerprint = f"{text.fingerprint}-{held.mark}-{patches(processor)}"
        self.special: dict[str, int] = {}  # ids that objectives need; set by the modality
        self.patches, self.token = patches(processor), processor.image_token_id
        settings = processor.image_processor
        self._mean, self._std = (np.float32(v).reshape(3, 1, 1) for v in (settings.image_mean, settings.image_std))
        documents = text.documents(range(int(text.facts["documents"]))) if len(text.chunks) else []
        self._picture = np.array([d["meta"].get("pixels", -1) for d in documents], np.int64)
        self._size = np.zeros(len(documents), np.int64)  # positions of a document before patches are put in
        self._size[text.chunks[:, 0]] = text.chunks[:, 2]
        self.chunks, cut = self._chunks(length)
        self.facts: dict[str, float] = {
            **text.facts,
            "chunks": float(len(self.chunks)),
            "chunks_left_out": float(len(text.chunks) - len(self.chunks)) + text.facts["chunks_left_out"],
            "tokens": float(self.chunks[:, 2].sum()),
            "malformed": float(held.meta["malformed"]) + text.facts["malformed"],
            "images": float(held.meta["images"]),
            "cut": float(cut),
        }

    def _chunks(self, length: int) -> tuple[np.ndarray, int]:
        """[N, 3]: whole documents of at most `length`; how many were cut. One that loses all its labels is left out."""
        chunks = np.array(self.text.chunks)
        chunks[:, 2] += np.where(self._picture[chunks[:, 0]] >= 0, self.patches - 1, 0)
        long = np.flatnonzero(chunks[:, 2] > length)
        chunks[long, 2] = length
        good = np.ones(len(chunks), bool)
        for i in long:
            good[i] = self.counted(Piece(*map(int, chunks[i]))) > 0
        return chunks[good], int(good[long].sum())

    def read(self, piece: Piece) -> dict[str, np.ndarray]:
        """`tokens` and `labels`, [T] int64, for held-out sources also `bytes`: as of text, with patches.

        A picture is not predicted; its last patch predicts the token that follows it.
        """
        assert piece.start == 0, "a pair is read from its beginning: packing `concat` would cut pictures"
        found = self.text.read(Piece(piece.doc, 0, int(self._size[piece.doc])))
        silent = found["labels"] == self.token
        found["labels"][silent] = IGNORE
        if "bytes" in found:
            found["bytes"][silent] = 0
        if self._picture[piece.doc] >= 0:
            at = int(np.flatnonzero(found["tokens"] == self.token)[0])
            fill = {"tokens": self.token, "labels": IGNORE, "bytes": 0}
            found = {k: np.insert(v, at, np.full(self.patches - 1, fill[k], v.dtype)) for k, v in found.items()}
        return {name: value[: piece.length] for name, value in found.items()}

    def counted(self, piece: Piece) -> int:
        """Positions of a piece that have a label; none for one that ends within its picture."""
        found = self.read(piece)
        whole = self._picture[piece.doc] < 0 or np.count_nonzero(found["tokens"] == self.token) == self.patches
        return int(np.count_nonzero(found["labels"] != IGNORE)) if whole else 0

    def image(self, doc: int) -> np.ndarray | None:
        """The picture as the model takes it, [3, S, S] float32; None for text alone."""
        number = int(self._picture[doc])
        if number < 0:
            return None
        found = self.held.images[number]
        if found.dtype != np.uint8:
            return np.array(found)
        normal: np.ndarray = (found.astype(np.float32) / 255 - self._mean) / self._std
        return normal

    def name_of(self, piece: Piece, *, processor: Any = None) -> dict[str, Any]:
        """Where a pair comes from, for people."""
        row = self.text.documents([piece.doc])[0]
        whole = Piece(piece.doc, 0, int(self._size[piece.doc]))
        about = self.text.name_of(whole, processor=getattr(processor, "tokenizer", processor))
        return {**about, **row["meta"].get("from", {}), "image": row["meta"].get("picture")}

    def report(self) -> list[str]:
        """What a person should know about how the source was read, a line each."""
        meta, lines = self.held.meta, [line for line in self.text.report() if "malformed" not in line]
        if meta["malformed"]:
            lines.append(
                f"{self.name}: {meta['malformed']} malformed records skipped ({'; '.join(meta['places'][:3])})"
            )
        if self.facts["cut"]:
            lines.append(
                f"{self.name}: {self.facts['cut']:.0f} texts are cut at `length`, pictures are {self.patches} tokens"
            )
        return lines


def patches(processor: Any) -> int:
    """Tokens that a picture takes."""
    crop = processor.image_processor.crop_size
    count = (crop["height"] // processor.patch_size) * (crop["width"] // processor.patch_size)
    less = processor.vision_feature_select_strategy == "default"
    return int(count + processor.num_additional_image_tokens - less)


def build(
    name: str,
    spec: SourceSpec,
    processor: Any,
    *,
    cache: Path,
    length: int,
    workers: int = 1,
    progress: Told | None = None,
    rows: Path | None = None,
) -> tuple[PairSource, PairSource]:
    """Training and held-out source of one spec. Raises `UserError` when nothing usable comes out."""
    share, apart = held_out(name, spec)
    train = open_or_make(name, spec, share, processor, cache=cache, progress=progress, rows=rows)
    val = train if apart is None else open_or_make(name, apart, 0.0, processor, cache=cache, progress=progress)
    val_file = val.folder / ("val.jsonl" if apart is None else "train.jsonl")
    kind = train.meta["kind"]
    inner = SourceSpec(
        path=str(train.folder / "train.jsonl"),
        field=None if kind == "pair" else train.meta["field"],
        template=spec.template,
        val=str(val_file) if val_file.stat().st_size else 0.0,
        bad=spec.bad,
        order=spec.order,
    )
    both = texts.build(name, inner, processor.tokenizer, cache=cache, chunk=WHOLE, workers=workers, progress=progress)
    return tuple(  # type: ignore[return-value]
        PairSource(text, held, processor=processor, length=length)
        for text, held in zip(both, (train, val), strict=True)
    )

"""A view on a tiny model and a text of one token per character, real but for the files: no run, no loop.

Tokens: 0 padding, 1 begins a document, 2 ends one, 306 the mask; the others are characters. `held` texts carry bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

from tests.core.tiny import AUTO, VOCAB, tiny
from tutelage.base import registry
from tutelage.base.clock import Clock
from tutelage.core.anatomy import anatomy
from tutelage.core.engine import Engine
from tutelage.core.surgery import transform
from tutelage.core.types import IGNORE, Batch, Piece, Row
from tutelage.core.view import Data, View

SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "mask": VOCAB - 1, "vocab": VOCAB}
OTHERS = "日本語の文章ですだがмиртудай😀ὦξεῖν᾽"  # the characters beside Latin-1 that texts here may have


def encode(text: str) -> list[int]:
    """A number for each character, the same whatever was read before it."""
    return [1, *(3 + ord(one) if ord(one) < 256 else 259 + OTHERS.index(one) for one in text)]


def decode(ids: list[int]) -> str:
    return "".join(chr(i - 3) if i < 259 else OTHERS[i - 259] for i in ids if 3 <= i < 259 + len(OTHERS))


class Texts:
    """A source in memory: a document per text. `prompt` is how many of each document's labels are not answers."""

    def __init__(self, name: str, texts: list[str], *, prompt: int = 0) -> None:
        self.name, self.stored, self.fingerprint, self.prompt = name, False, name, prompt
        self.texts, self.ids = texts, [encode(text) for text in texts]
        self.chunks = np.array([[i, 0, len(ids)] for i, ids in enumerate(self.ids)], dtype=np.int64).reshape(-1, 3)
        self.facts = {"tokens": float(sum(map(len, self.ids)))}

    def read(self, piece: Piece) -> dict[str, np.ndarray]:
        tokens = np.array(self.ids[piece.doc][piece.start : piece.start + piece.length])
        labels = np.append(tokens[1:], IGNORE)
        sizes = np.array([len(c.encode()) for c in self.texts[piece.doc]] + [0])[
            piece.start : piece.start + len(tokens)
        ]
        labels[: self.prompt] = IGNORE
        return {"tokens": tokens, "labels": labels, "bytes": sizes}


def collate(rows: list[Row], sources: dict[str, Texts], *, heldout: bool = True) -> Batch:
    width = max(sum(piece.length for piece in row.pieces) for row in rows)
    fills = {"tokens": 0, "labels": IGNORE, "positions": 0, "segments": 0, "bytes": 0}
    fields = {name: torch.full((len(rows), width), fill) for name, fill in fills.items()}
    for i, row in enumerate(rows):
        at = 0
        for number, piece in enumerate(row.pieces, start=1):
            read = sources[row.source].read(piece)
            read |= {"positions": np.arange(piece.length), "segments": np.full(piece.length, number)}
            for name, value in read.items():
                fields[name][i, at : at + piece.length] = torch.from_numpy(value)
            at += piece.length
    if not heldout:
        del fields["bytes"]
    return Batch(fields, rows, torch.ones(len(rows)), {"special": SPECIAL})


@dataclass
class Characters:
    """The part of a modality that the engine calls."""

    def inputs(self, batch: Batch, *, anatomy: Any, packing: str) -> dict[str, Any]:
        if anatomy.kind == "seq2seq":
            return {
                "input_ids": batch["source"],
                "attention_mask": batch["source_mask"],
                "decoder_input_ids": batch["tokens"],
            }
        return {"input_ids": batch["tokens"], "attention_mask": (batch["segments"] > 0).long()}


def batch_of(texts: list[str], *, prompt: int = 0, heldout: bool = True) -> Batch:
    """One text a row."""
    source = Texts("texts", texts, prompt=prompt)
    rows = [Row("texts", (Piece(i, 0, len(ids)),)) for i, ids in enumerate(source.ids)]
    return collate(rows, {"texts": source}, heldout=heldout)


def packed(texts: list[str], *, prompt: int = 0) -> Batch:
    """All texts in one row."""
    source = Texts("texts", texts, prompt=prompt)
    return collate([Row("texts", tuple(Piece(i, 0, len(ids)) for i, ids in enumerate(source.ids)))], {"texts": source})


def data_of(sources: list[Texts], *, length: int = 48, heldout: bool = True) -> Data:
    def rows_to_batch(rows: list[Row], sources: dict[str, Texts]) -> Batch:
        return collate(rows, sources, heldout=heldout)

    return Data({s.name: s for s in sources}, rows_to_batch, seed=0, length=length, packing="single")


def view_of(
    name: str = "gpt2", *, objective: Any, columns: dict[str, list[str]] | None = None, model: Any = None
) -> View:
    """A view on a fresh tiny model; `ref("start")` is another copy of the same weights."""
    model = tiny(name) if model is None else model
    engine = Engine(
        model=model, anatomy=anatomy(model), modality=Characters(), device=torch.device("cpu"), objective=objective
    )
    engine.params = dict(model.named_parameters())
    view = View(clock=Clock(), seed=0, stage="two", engine=engine)
    view.heldout = {c: data_of([Texts(c, texts)]) for c, texts in (columns or {}).items()}
    view.batch_of, view.decode = batch_of, decode
    start = tiny(name).requires_grad_(False).eval()
    view._open_ref = lambda ref: start
    return view


def transformed(starts: list[Path], out: Path, *, use: str, seed: int = 0, dtype: Any = None, **settings: Any) -> Any:
    """What a method makes of model folders, as transformers opens it, and the method.

    Nothing may be missing, left over or of another shape.
    """
    method = registry.make({"use": use, **settings})
    out.mkdir()
    transform(method, starts, out, place="stages.made", seed=seed)
    kind = json.loads((out / "config.json").read_text())["model_type"]
    auto = AUTO.get(kind, tf.AutoModelForCausalLM)
    model, told = auto.from_pretrained(out, output_loading_info=True, **({"dtype": dtype} if dtype else {}))
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval(), method

"""Text: documents, tokenizers, transformers' language models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch import nn

from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.core.anatomy import Anatomy
from tutelage.core.modality import Corpus, Progress
from tutelage.core.stream import Source
from tutelage.core.types import IGNORE, Batch, Piece, Row
from tutelage.modalities.text import answers, models, source, tokenizer
from tutelage.modalities.text import collate as rows_to_batch
from tutelage.modalities.text.documents import Documents
from tutelage.modalities.text.prefix import Prefixed, Write
from tutelage.modalities.text.source import TextSource
from tutelage.modalities.text.template import FALLBACK

OBJECTIVES = {"masked": "objective/masked_lm", "seq2seq": "objective/prefix_lm"}  # by kind of model


class Text:
    """The text modality, as the core asks for it (see core/modality.py)."""

    name = "text"
    numerics = 1
    probes = ("probe/bits_per_byte", "probe/forgetting", "probe/sample")
    sampler = "synth/self_samples"

    # -- models and tokenizers --------------------------------------------------------------------------------------

    def start_files(self, start: str) -> tuple[Path | None, dict[str, Any]]:
        return models.start_files(start)

    def size(self, folder: Path | None, config: dict[str, Any]) -> int:
        return models.size(folder, config)

    def processor(
        self,
        wanted: Any,
        *,
        folder: Path | None,
        texts: Callable[[], Iterable[tuple[SourceSpec, Path | None]]],
        cache: Path,
        config: dict[str, Any] | None = None,
    ) -> Any:
        """`bytes`, a folder or hub name, `{train: bpe, vocab: 2048}`, or the start's own when `wanted` is None.

        The first and the third have a mask token when the model is a masked one; the third has as many tokens for
        hidden spans as its `sentinels` says.
        """
        if wanted is None and folder is not None:
            return tokenizer.load(str(folder))
        if wanted is None:
            raise UserError(
                "fresh weights need a tokenizer: write `tokenizer: {train: bpe, vocab: 4096}`, `bytes` or a folder"
            )
        if wanted == "bytes":
            return tokenizer.bytes_tokenizer(**self.asks(config))
        if isinstance(wanted, str):
            return tokenizer.load(wanted)
        return self._trained(wanted, list(texts()), cache, self.asks(config))

    @staticmethod
    def asks(config: dict[str, Any] | None) -> dict[str, Any]:
        """What a config's model asks of a tokenizer that is made for it: `mask`, `family`."""
        if config is None or "model_type" not in config:
            return {"mask": False, "family": None}
        return {"mask": models.kind_of(config) == "masked", "family": config["model_type"]}

    def _trained(
        self, wanted: dict[str, Any], specs: list[tuple[SourceSpec, Path | None]], cache: Path, asks: dict[str, Any]
    ) -> Any:
        settings = tokenizer.settings(wanted)
        if not specs:
            raise UserError("tokenizer: a stage trains its tokenizer on its own data, and this one has none")
        ids = sorted(self.content_id(spec, rows=rows) for spec, rows in specs)
        texts = (text for spec, rows in specs for text in source.texts(spec, rows=rows))
        return tokenizer.train(texts, **settings, **asks, cache=cache, key=ids)

    def processor_id(self, processor: Any) -> str:
        return tokenizer.fingerprint(processor)

    def save_processor(self, processor: Any, folder: Path) -> None:
        tokenizer.save(processor, folder)

    def model(self, folder: Path | None, config: dict[str, Any], *, processor: Any, length: int) -> nn.Module:
        return models.build(folder, config, processor=processor, length=length)

    def save_model(self, model: nn.Module, folder: Path) -> None:
        models.save(model, folder)

    def objective(self, anatomy: Anatomy) -> str:
        """Causal models predict the next token, masked ones what is masked, encoder-decoders the rest of a passage."""
        return OBJECTIVES.get(anatomy.kind, "objective/causal_lm")

    def objective_of(self, config: dict[str, Any]) -> str:
        return OBJECTIVES.get(models.kind_of(config), "objective/causal_lm")

    generate = staticmethod(models.generate)
    asked = staticmethod(answers.asked)
    answers = staticmethod(answers.answers)

    # -- data -------------------------------------------------------------------------------------------------------

    def content_id(self, spec: SourceSpec, *, rows: Path | None) -> str:
        return source.content_id(spec, rows=rows)

    def corpus(
        self,
        name: str,
        spec: SourceSpec,
        *,
        processor: Any,
        length: int,
        cache: Path,
        rows: Path | None,
        progress: Progress | None,
        workers: int,
    ) -> Corpus:
        told = functools.partial(progress, f"tokenizing {name}") if progress else None
        train, heldout = source.build(
            name, spec, processor, cache=cache, chunk=length, workers=workers, progress=told, rows=rows
        )
        if train.meta["shape"]["chat"] and processor.chat_template is None:
            processor.chat_template = FALLBACK  # what the answers were rendered with goes out with the model
        special = special_tokens(processor)
        train.special = heldout.special = special
        return Corpus(train, heldout, train.report())

    def prefixed(self, source: Source, write: Write, *, processor: Any, length: int) -> Source:
        assert isinstance(source, TextSource)
        return Prefixed(source, write, tokenizer=processor, length=length)

    def documents(self, specs: dict[str, tuple[SourceSpec, Path | None]], *, cache: Path) -> Documents:
        return Documents(specs, cache=cache)

    def collate(self, rows: list[Row], sources: dict[str, Source], *, length: int) -> Batch:
        batch = rows_to_batch.collate(rows, sources, length)
        return replace(batch, meta={**batch.meta, "special": sources[rows[0].source].special})  # type: ignore[attr-defined]

    def batch_of(self, texts: list[str], *, processor: Any) -> Batch:
        """One text a row, as a document of its own: what a probe with its own material measures."""
        begin = next((t for t in (processor.bos_token_id, processor.eos_token_id) if t is not None), None)
        ids = [processor(text, add_special_tokens=False)["input_ids"] for text in texts]
        ids = [[begin, *row] if begin is not None else row for row in ids]
        held = Literal([np.asarray(row, dtype=np.int64) for row in ids], special_tokens(processor))
        rows = [Row("texts", (Piece(i, 0, len(row)),)) for i, row in enumerate(ids)]
        return self.collate(rows, {"texts": held}, length=max(map(len, ids)))

    # -- the forward pass -------------------------------------------------------------------------------------------

    def inputs(self, batch: Batch, *, anatomy: Anatomy, packing: str) -> dict[str, Any]:
        return models.inputs(batch, anatomy=anatomy, packing=packing, mask_of=rows_to_batch.block_mask)

    def packs(self, model: nn.Module, *, anatomy: Anatomy, device: torch.device) -> bool:
        rng = np.random.default_rng(0)
        ids = rng.integers(0, anatomy.vocab or 2, size=12)

        def batch_of(lengths: list[int], skip: int = 0) -> Batch:
            pieces = [Piece(i, skip + sum(lengths[:i]), n) for i, n in enumerate(lengths)]
            whole = Literal([ids] * len(pieces), {})
            return self.collate([Row("test", tuple(pieces))], {"test": whole}, length=16)

        return models.packs(
            model,
            anatomy=anatomy,
            device=device,
            batch_of=batch_of,
            inputs_of=functools.partial(self.inputs, anatomy=anatomy, packing="documents"),
        )

    # -- for people -------------------------------------------------------------------------------------------------

    def describe(self, row: Row, sources: dict[str, Source], *, processor: Any) -> list[dict[str, Any]]:
        return [
            {"source": row.source, **sources[row.source].name_of(piece, processor=processor)}  # type: ignore[attr-defined]
            for piece in row.pieces
        ]

    def write_rows(self, rows: Iterable[dict[str, Any]], folder: Path) -> dict[str, Any]:
        """One JSON object a line."""
        folder.mkdir(parents=True)
        count = size = 0
        with open(folder / "rows.jsonl", "wb") as handle:
            for row in rows:
                line = orjson.dumps(row)
                handle.write(line + b"\n")
                count += 1
                size += len(row["text"].encode()) if "text" in row else len(line)
        return {"rows": count, "bytes": size}


def special_tokens(processor: Any) -> dict[str, int]:
    """Ids that objectives need: mask, pad, bos, eos, cls, sep where there are any, and the size of the vocabulary."""
    names = ("mask", "pad", "bos", "eos", "cls", "sep")
    found = {name: getattr(processor, f"{name}_token_id", None) for name in names}
    return {**{name: number for name, number in found.items() if number is not None}, "vocab": len(processor)}


class Literal:
    """Documents held in memory."""

    def __init__(self, documents: list[np.ndarray], special: dict[str, int]) -> None:
        self.documents, self.special = documents, special
        self.name, self.rank, self.fingerprint = "literal", None, ""
        self.chunks = np.array([[i, 0, len(ids)] for i, ids in enumerate(documents)], dtype=np.int64)
        self.facts = {"tokens": float(sum(map(len, documents)))}

    def read(self, piece: Piece) -> dict[str, np.ndarray]:
        tokens = self.documents[piece.doc][piece.start : piece.start + piece.length]
        labels = np.full(len(tokens), IGNORE, dtype=np.int64)
        labels[:-1] = tokens[1:]
        return {"tokens": tokens, "labels": labels}


modality = Text()

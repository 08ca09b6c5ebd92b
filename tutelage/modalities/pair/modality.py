"""Pairs of a picture and a text: transformers' Llava (a vision tower, a projector, a language model)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.spec import SourceSpec
from tutelage.core.anatomy import Anatomy
from tutelage.core.modality import Corpus, Progress
from tutelage.core.stream import Source
from tutelage.core.types import Batch, Document, Row
from tutelage.modalities.pair import images, source, store
from tutelage.modalities.text import collate as rows_to_batch
from tutelage.modalities.text import models, tokenizer
from tutelage.modalities.text.modality import modality as text
from tutelage.modalities.text.modality import special_tokens

NO_TEXT = "a stage that rewrites data reads text; pairs cannot be rewritten yet"
FORM = "`tokenizer: {text: bytes, size: 224, patch: 14}` (text is any tokenizer, size and patch are in pixels)"


class Pair:
    """The pair modality, as the core asks for it (see core/modality.py). Text without a picture is a pair too."""

    name = "pair"
    numerics = 1
    probes = ("probe/bits_per_byte", "probe/forgetting", "probe/sample")
    sampler = "synth/self_samples"

    # -- models and processors --------------------------------------------------------------------------------------

    def start_files(self, start: str) -> tuple[Path | None, dict[str, Any]]:
        folder, config = models.start_files(start)
        _check(config)
        return folder, config

    def size(self, folder: Path | None, config: dict[str, Any]) -> int:
        if folder is not None:
            return models.size(folder, config)
        with torch.device("meta"):
            model = transformers.LlavaForConditionalGeneration(_config(config, {}, {}))
        return sum(p.numel() for p in model.parameters())

    def processor(
        self,
        wanted: Any,
        *,
        folder: Path | None,
        texts: Callable[[], Iterable[tuple[SourceSpec, Path | None]]],
        cache: Path,
        config: dict[str, Any] | None = None,
    ) -> Any:
        """A LlavaProcessor: from the start's folder or another, or made of a text tokenizer and a picture's size."""
        _need_pillow()
        if isinstance(wanted, dict):
            return _made(wanted, texts=texts, cache=cache)
        place = Path(wanted) if isinstance(wanted, str) else folder
        if place is None or not (place / "tokenizer_config.json").exists():
            where = f"{place} holds none" if place else "fresh weights have none"
            raise UserError(f"pairs need a processor, and {where}: write {FORM} or a folder")
        try:
            return transformers.LlavaProcessor.from_pretrained(place, local_files_only=True, backend="pil")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{place}: no Llava processor can be opened there ({error}); write {FORM}") from error

    def processor_id(self, processor: Any) -> str:
        return f"{tokenizer.fingerprint(processor.tokenizer)}-{source.patches(processor)}"

    def save_processor(self, processor: Any, folder: Path) -> None:
        processor.save_pretrained(folder)

    def model(self, folder: Path | None, config: dict[str, Any], *, processor: Any, length: int) -> nn.Module:
        _check(config)
        if folder is not None:
            cls = transformers.LlavaForConditionalGeneration
            model: Any = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        else:
            tokens = processor.tokenizer
            special = {f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
            sizes = {"image_size": processor.image_processor.crop_size["height"], "patch_size": processor.patch_size}
            made = _config(config, {"vocab_size": len(tokens), **special}, sizes)
            made.image_token_index = processor.image_token_id
            made.image_seq_length = source.patches(processor)
            model = transformers.LlavaForConditionalGeneration(made)
        _fits(model.config, processor)
        return model

    def save_model(self, model: nn.Module, folder: Path) -> None:
        models.save(model, folder)

    def objective(self, anatomy: Anatomy) -> str:
        return "objective/causal_lm"

    def objective_of(self, config: dict[str, Any]) -> str:
        return "objective/causal_lm"

    def generate(
        self,
        model: nn.Module,
        processor: Any,
        *,
        prompts: list[Any],
        tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        rows: int = 16,
        pack: Any = None,  # a row holds one prompt with its picture
    ) -> list[str]:
        """Continuations. A prompt is a text, or `{image: picture, text: …}` with a picture of any form a record has."""

        def write(some: list[Any]) -> list[str]:
            return _generate(model, processor, some, tokens, temperature, top_p)

        return models.in_batches(write, model, prompts, seed=seed, rows=rows)

    def asked(self, processor: Any, text: str, *, config: dict[str, Any]) -> list[int]:
        raise UserError(NO_TEXT)

    def answers(self, model: nn.Module, processor: Any, **how: Any) -> list[tuple[str, bool]]:
        raise UserError(NO_TEXT)

    # -- data -------------------------------------------------------------------------------------------------------

    def content_id(self, spec: SourceSpec, *, rows: Path | None) -> str:
        return store.content_id(spec, rows=rows)

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
        told = functools.partial(progress, f"reading {name}") if progress else None
        train, heldout = source.build(
            name, spec, processor, cache=cache, length=length, workers=workers, progress=told, rows=rows
        )
        train.special = heldout.special = special_tokens(processor.tokenizer)
        return Corpus(train, heldout, train.report())

    def prefixed(self, source: Source, write: Callable[..., Any], *, processor: Any, length: int) -> Source:
        raise UserError(f"data.{source.name}: pairs begin with their picture; nothing can be put before them yet")

    def documents(self, specs: dict[str, tuple[SourceSpec, Path | None]], *, cache: Path) -> Iterable[Document]:
        raise UserError(f"data.{next(iter(specs))}: {NO_TEXT}")

    def collate(self, rows: list[Row], sources: dict[str, Source], *, length: int) -> Batch:
        """As of text, one pair a row, with `pixel_values` [B, 3, S, S] where any row has a picture."""
        batch = rows_to_batch.collate(rows, sources, length)
        special = getattr(sources[rows[0].source], "special", {})
        batch = replace(batch, meta={**batch.meta, "special": special})
        found = [_image(row, sources) for row in rows]
        one = next((image for image in found if image is not None), None)
        if one is None:
            return batch
        filled = [np.zeros_like(one) if image is None else image for image in found]
        return batch.having(pixel_values=torch.from_numpy(np.stack(filled)))

    def batch_of(self, texts: list[str], *, processor: Any) -> Batch:
        return text.batch_of(texts, processor=processor.tokenizer)

    def extra_tokens(self, processor: Any) -> int:
        """Tokens that a record has beyond those of its text, for the plan."""
        return source.patches(processor)

    # -- the forward pass -------------------------------------------------------------------------------------------

    def inputs(self, batch: Batch, *, anatomy: Anatomy, packing: str) -> dict[str, Any]:
        given = models.inputs(batch, anatomy=anatomy, packing="single", mask_of=rows_to_batch.block_mask)
        if "pixel_values" in batch:
            config: Any = anatomy.root.config
            shown = batch["tokens"].eq(config.image_token_id).any(dim=1)
            if bool(shown.any()):
                given["pixel_values"] = batch["pixel_values"] if bool(shown.all()) else batch["pixel_values"][shown]
        return given

    def packs(self, model: nn.Module, *, anatomy: Anatomy, device: torch.device) -> bool:
        """One pair a row: which picture belongs to which place in a row is told by their order alone."""
        return False

    # -- for people -------------------------------------------------------------------------------------------------

    def describe(self, row: Row, sources: dict[str, Source], *, processor: Any) -> list[dict[str, Any]]:
        named = [sources[row.source].name_of(piece, processor=processor) for piece in row.pieces]  # type: ignore[attr-defined]
        return [{"source": row.source, **one} for one in named]

    def write_rows(self, rows: Iterable[dict[str, Any]], folder: Path) -> dict[str, Any]:
        return text.write_rows(rows, folder)


def _image(row: Row, sources: dict[str, Source]) -> np.ndarray | None:
    if len(row.pieces) > 1:
        raise UserError("pairs stand one in a row: leave `packing` out, or write `packing: single`")
    if row.extra is not None:
        found = row.extra.get("pixel_values")
        return None if found is None else np.asarray(found, np.float32)
    image = getattr(sources[row.source], "image", None)
    return None if image is None else image(row.pieces[0].doc)


def _need_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise UserError("pairs need the package Pillow: install pillow") from error


def _check(config: dict[str, Any]) -> None:
    if config.get("model_type") != "llava":
        raise UserError(
            f"start: pairs are learned by a model of type llava (vision_config, text_config), not "
            f"'{config.get('model_type')}'"
        )


def _config(config: dict[str, Any], words: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """A LlavaConfig; what the recipe leaves out of the text and vision parts follows the processor."""
    given = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
    known = set(transformers.LlavaConfig().to_dict())
    wrong = next((key for key in given if key not in known), None)
    if wrong:
        raise UserError(f"start: a llava config has no key '{wrong}'{did_you_mean(wrong, known)}")
    inner = {
        "text_config": {"model_type": "llama", **words, **(given.get("text_config") or {})},
        "vision_config": {"model_type": "clip_vision_model", **sizes, **(given.get("vision_config") or {})},
    }
    return transformers.LlavaConfig(**{**given, **inner})


def _fits(config: Any, processor: Any) -> None:
    """UserError where the model's idea of a picture is not the processor's."""
    vision, crop = config.vision_config, processor.image_processor.crop_size
    for what, ours, theirs in (
        ("size", crop["height"], vision.image_size),
        ("patch", processor.patch_size, vision.patch_size),
        ("image token", processor.image_token_id, config.image_token_id),
        ("choice of features", processor.vision_feature_select_strategy, config.vision_feature_select_strategy),
    ):
        if ours != theirs:
            raise UserError(f"the processor's {what} is {ours} and the model's {theirs}; they must be the same")
    rows = config.text_config.vocab_size
    if len(processor.tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(processor.tokenizer)} entries and the model {rows}; give it a larger vocab_size"
        )


def _made(wanted: dict[str, Any], *, texts: Any, cache: Path) -> Any:
    """A processor from its parts."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    unknown = set(wanted) - {"text", "size", "patch"}
    if unknown or not all(isinstance(wanted.get(key), int) for key in ("size", "patch")) or "text" not in wanted:
        raise UserError(f"tokenizer: {wanted} is not known; write {FORM}")
    side, patch = wanted["size"], wanted["patch"]
    if side % patch:
        raise UserError(f"tokenizer: pictures of {side} pixels are not made of patches of {patch}")
    words = wanted["text"]
    if isinstance(words, dict) and words.get("train") == "bpe" and isinstance(words.get("vocab"), int):
        specs = list(texts())
        key = ["pair", *sorted(store.content_id(spec, rows=rows) for spec, rows in specs)]
        every = (line for spec, rows in specs for line in store.texts_of(spec, rows=rows))
        tokens = tokenizer.train(every, vocab=words["vocab"] - 1, cache=cache, key=key)  # the last is the picture's
    else:
        tokens = text.processor(words, folder=None, texts=lambda: [], cache=cache)
    if store.TOKEN not in tokens.get_vocab():
        tokens.add_tokens([store.TOKEN], special_tokens=True)
    return transformers.LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokens,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the default choice of features drops
    )


@torch.no_grad()
def _generate(
    model: Any, processor: Any, prompts: list[Any], tokens: int, temperature: float, top_p: float
) -> list[str]:
    tok, side = processor.tokenizer, processor.image_processor.crop_size["height"]
    begin = next((t for t in (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) if t is not None), 0)
    ids, shown = [], []
    for prompt in prompts:
        asked = prompt if isinstance(prompt, dict) else {"text": prompt}
        words, picture = asked.get("text", ""), asked.get("image")
        if picture is not None:
            made = images.pixels(picture, folder=Path(), side=side, processor=processor.image_processor)
            same = made.dtype == np.float32
            settings = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
            shown.append(
                torch.from_numpy(made)[None] if same else processor.image_processor([made], **settings)["pixel_values"]
            )
            words = words if store.TOKEN in words else store.TOKEN + words
            words = words.replace(store.TOKEN, store.TOKEN * source.patches(processor), 1)
        ids.append([begin, *tok(words, add_special_tokens=False)["input_ids"]])
    width, device = max(map(len, ids)), next(model.parameters()).device
    fill = tok.pad_token_id if tok.pad_token_id is not None else begin
    left = torch.tensor([[fill] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    room = getattr(model.config.text_config, "max_position_embeddings", None)
    settings = {"max_new_tokens": max(1, min(tokens, room - width)) if room else tokens, "do_sample": temperature > 0}
    settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    settings |= {"pixel_values": torch.cat(shown).to(device)} if shown else {}
    out = model.generate(
        input_ids=left, attention_mask=mask, pad_token_id=fill, eos_token_id=tok.eos_token_id, **settings
    )
    return [tok.decode(row, skip_special_tokens=True) for row in out[:, width:].tolist()]


modality = Pair()

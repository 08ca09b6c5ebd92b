"""Transformers language models for the text modality: opened, made fresh, asked for text, saved."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tutelage.base import marked
from tutelage.base.errors import UserError, did_you_mean
from tutelage.core.anatomy import Anatomy
from tutelage.core.memory import is_oom
from tutelage.core.out import forward
from tutelage.core.randomness import reseed
from tutelage.modalities.text import prefill

transformers.utils.logging.disable_progress_bar()  # ours shows the stage

MASKED = (
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "albert",
    "modernbert",
    "deberta",
    "deberta-v2",
    "xlm-roberta",
    "camembert",
    "longformer",
)


def start_files(start: str) -> tuple[Path | None, dict[str, Any]]:
    """Folder of weights (None for a config alone) and the config, from a folder, a config file or a hub name."""
    path = Path(start)
    if path.suffix in (".yaml", ".yml", ".json") and not path.is_dir():
        if not path.exists():
            raise UserError(f"start: there is no config file {path}")
        config = _read_config(path)
        if not isinstance(config, dict) or "model_type" not in config:
            raise UserError(f"{path}: a model config needs `model_type` (llama, qwen2, gpt2, bert, t5, …)")
        return None, config
    folder = path if path.is_dir() else _from_hub(start)
    if not (folder / "config.json").exists():
        raise UserError(f"start: {folder} has no config.json, so it is no model folder")
    config = _read_config(folder / "config.json")
    if any(folder.glob("*.safetensors")):
        return folder, config
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UserError(
            f"start: {folder} holds pickled weights; convert them to safetensors first (nothing is unpickled)"
        )
    return None, config


def _read_config(path: Path) -> Any:
    """A config as it stands in a file, in YAML or JSON (where YAML would refuse tabs)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return marked.plain(marked.parse(text, file=str(path)))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error


def _from_hub(name: str) -> Path:
    """A hub model's folder; the network is used only when it is not in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except HFValidationError as error:
        raise UserError(f"start: '{name}' is neither a stage, a folder, a config file nor a hub name") from error
    except OSError:
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        where = "no such folder here" if "/" in name or os.sep in name else "no stage or folder of that name"
        raise UserError(f"start: '{name}': {where}, and the hub gave nothing ({type(error).__name__})") from error


def auto_class(config: dict[str, Any]) -> Any:
    """The class that a config's `architectures` names, else the language-model head for its kind."""
    for name in config.get("architectures") or []:
        cls = getattr(transformers, name, None)
        if cls is not None and hasattr(cls, "from_pretrained"):
            return cls
    if config.get("is_encoder_decoder") or config["model_type"] in ("t5", "mt5", "umt5", "bart", "mbart"):
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForMaskedLM if config["model_type"] in MASKED else transformers.AutoModelForCausalLM


def kind_of(config: dict[str, Any]) -> str:
    """`causal`, `masked` or `seq2seq`, from a config alone."""
    name = str(auto_class(config).__name__)
    marks = {"MaskedLM": "masked", "PreTraining": "masked", "Seq2SeqLM": "seq2seq", "ConditionalGeneration": "seq2seq"}
    return next((kind for mark, kind in marks.items() if name.endswith(mark)), "causal")


def config_of(config: dict[str, Any], *, processor: Any, length: int) -> Any:
    """A transformers config; vocabulary and special tokens follow the tokenizer where the config leaves them out."""
    given = {"vocab_size": len(processor), **config}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given.setdefault(name, getattr(processor, name))
    if config["model_type"] in ("t5", "mt5", "umt5"):
        given.setdefault("decoder_start_token_id", processor.pad_token_id or 0)
    return _checked(given)


def _checked(config: dict[str, Any]) -> Any:
    """The config as transformers takes it; UserError for a kind it has not, a key that is misspelled or a wrong value.

    Transformers keeps keys that it does not know, so a misspelled one would leave its default in force without a word.
    """
    kind = config["model_type"]
    given = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
    if kind not in transformers.CONFIG_MAPPING:
        hint = did_you_mean(kind, list(transformers.CONFIG_MAPPING.keys()))
        raise UserError(f"start: transformers has no model type '{kind}'{hint}")
    cls = transformers.CONFIG_MAPPING[kind]
    try:
        known = {*cls().to_dict(), *cls.attribute_map}
    except Exception:  # a config made of others has no defaults of its own to know its keys by
        known = set()
    for key in given.keys() - known:
        if near := difflib.get_close_matches(key, known - given.keys(), n=1, cutoff=0.85):
            raise UserError(f"start: a {kind} config has no '{key}'; did you mean '{near[0]}'?")
    try:
        return transformers.AutoConfig.for_model(kind, **given)
    except Exception as error:  # its validators' own kinds, and whatever a config's code raises
        raise UserError(f"start: transformers refuses this {kind} config: {_last_line(error)}") from error


def fresh(config: Any, cls: Any) -> nn.Module:
    """A model of new weights of a transformers config."""
    try:
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        if is_oom(error):
            raise
        if "Unrecognized configuration class" in str(error):
            raise UserError(f"start: transformers has no language model of type {config.model_type}") from error
        why = _last_line(error)
        raise UserError(f"start: transformers cannot build a {config.model_type} of this config: {why}") from error


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1].strip()


def build(folder: Path | None, config: dict[str, Any], *, processor: Any, length: int) -> nn.Module:
    """Weights in float32 from a folder, or fresh ones; refuses a tokenizer that the embeddings cannot hold."""
    if folder is not None:
        model = auto_class(config).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    else:
        model = _fresh(config, processor=processor, length=length)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(processor) > rows:
        raise UserError(
            f"the tokenizer has {len(processor)} entries and the model {rows}: take the model's own tokenizer, "
            "or a config with a larger vocab_size"
        )
    return model


def _fresh(config: dict[str, Any], *, processor: Any, length: int) -> nn.Module:
    return fresh(config_of(config, processor=processor, length=length), auto_class(config))


def size(folder: Path | None, config: dict[str, Any]) -> int:
    """Number of parameters: from the files' headers, or from the config on torch's meta device."""
    if folder is not None:
        return sum(_header_size(path) for path in folder.glob("*.safetensors"))
    with torch.device("meta"):
        model = fresh(_checked(config), auto_class(config))
    return sum(p.numel() for p in model.parameters())


def _header_size(path: Path) -> int:
    with open(path, "rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for side in entry["shape"]:
                count *= side
            total += count
    return total


def save(model: nn.Module, folder: Path) -> None:
    """Transformers' own folder, in safetensors."""
    model.save_pretrained(folder)


# -- text from a model ------------------------------------------------------------------------------------------------


def generate(
    model: nn.Module,
    processor: Any,
    *,
    prompts: list[str],
    tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    rows: int = 16,
    pack: prefill.Pack | None = None,
) -> list[str]:
    """Continuations, batched, with transformers' generation and its key-value cache. Temperature 0 is greedy.

    A masked model, which transformers lets generate nothing, fills in blanks. With `pack`, a stage's packing rule,
    prompts of unequal length are read in shared rows.
    """
    each = partial(_generate, pack=pack) if callable(getattr(model, "generate", None)) else _fill_in

    def write(some: list[str]) -> list[str]:
        return each(model, processor, some, tokens, temperature, top_p)

    return in_batches(write, model, prompts, seed=seed, rows=rows)


def in_batches(
    write: Callable[[list[Any]], list[str]], model: nn.Module, prompts: list[Any], *, seed: int, rows: int
) -> list[str]:
    """What is written to prompts, `rows` at a time, each batch by a seed of its own; the model is not training meanwhile."""
    training, texts = model.training, []
    model.eval()
    try:
        for i in range(0, len(prompts), rows):
            reseed(seed + i)
            texts += write(prompts[i : i + rows])
    finally:
        model.train(training)
    return texts


def _generate(
    model: nn.Module,
    processor: Any,
    prompts: list[str],
    tokens: int,
    temperature: float,
    top_p: float,
    *,
    pack: prefill.Pack | None = None,
) -> list[str]:
    ids = [processor(p, add_special_tokens=False)["input_ids"] if p else [] for p in prompts]
    encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    ids = [row if encoder and row else [begin_of(processor), *row] for row in ids]
    new = continued(model, processor, ids, tokens, temperature, top_p, pack=pack)
    return [processor.decode(row, skip_special_tokens=True) for row in new]


def begin_of(processor: Any) -> int:
    """The token that a text begins with."""
    special = (processor.bos_token_id, processor.eos_token_id, processor.pad_token_id)
    return next((t for t in special if t is not None), 0)


def continued(
    model: nn.Module,
    processor: Any,
    ids: list[list[int]],
    tokens: int,
    temperature: float,
    top_p: float,
    *,
    pack: prefill.Pack | None = None,
) -> list[list[int]]:
    """The tokens that a model writes after each row of tokens, at most `tokens`, its end token among them."""
    encoder = bool(getattr(model.config, "is_encoder_decoder", False))
    width = max(map(len, ids))
    fill = processor.pad_token_id if processor.pad_token_id is not None else begin_of(processor)
    device = next(model.parameters()).device
    left = torch.tensor([[fill] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    room = context(model)
    tokens = max(1, min(tokens, room - width)) if room else tokens
    settings: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": tokens, "pad_token_id": fill}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    if pack is not None and not encoder:
        settings["past_key_values"] = prefill.prefilled(model, ids, width=width, pack=pack)
    with torch.no_grad():
        out = model.generate(input_ids=left, attention_mask=mask, **settings)
    found: list[list[int]] = (out if encoder else out[:, width:]).tolist()
    return found


ROUNDS = 32  # in which a masked model's blanks are filled


@torch.no_grad()
def _fill_in(
    model: nn.Module, processor: Any, prompts: list[str], tokens: int, temperature: float, top_p: float
) -> list[str]:
    """What a masked model writes: blanks after the prompt, filled in an order drawn by chance (Wang & Cho 2019).

    Some are filled in each round, from what the model says of them given those before; all texts have one length.
    """
    mask = processor.mask_token_id
    if mask is None:
        raise UserError("this model cannot write text: it is a masked one, and its tokenizer has no mask token")
    begin = [t for t in (processor.cls_token_id, processor.bos_token_id) if t is not None][:1]
    end = [t for t in (processor.sep_token_id, processor.eos_token_id) if t is not None][:1]
    given = [[*begin, *(processor(p, add_special_tokens=False)["input_ids"] if p else [])] for p in prompts]
    room, device = context(model), next(model.parameters()).device
    tokens = max(1, min(tokens, room - max(map(len, given)) - len(end) - 2)) if room else tokens
    texts = [""] * len(prompts)
    for width in sorted({len(start) for start in given}):
        some = [i for i, start in enumerate(given) if len(start) == width]
        ids = torch.tensor([[*given[i], *[mask] * tokens, *end] for i in some], device=device)
        order_BN = torch.rand(len(some), tokens).argsort(dim=1).to(device) + width
        for places_BN in order_BN.tensor_split(min(ROUNDS, tokens), dim=1):
            logits = model(input_ids=ids).logits
            logits_NV = logits.take_along_dim(places_BN[..., None], dim=1).flatten(0, 1).float().cpu()
            logits_NV[:, processor.all_special_ids] = -torch.inf
            ids.scatter_(1, places_BN, _drawn(logits_NV, temperature, top_p).view(places_BN.shape).to(device))
        for i, row in zip(some, ids[:, width : width + tokens].tolist(), strict=True):
            texts[i] = processor.decode(row, skip_special_tokens=True)
    return texts


def _drawn(logits_NV: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token of each row: the likeliest at temperature 0, else by chance from the nucleus."""
    if temperature == 0:
        return logits_NV.argmax(dim=1)
    share_NV, which_NV = (logits_NV / temperature).softmax(dim=1).sort(dim=1, descending=True)
    share_NV = share_NV.where(share_NV.cumsum(dim=1) - share_NV < top_p, 0.0)
    return which_NV.gather(1, share_NV.multinomial(1))[:, 0]


def context(model: nn.Module) -> int | None:
    """Positions a model has room for, where its config says."""
    config = model.config
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None


# -- what the forward pass takes --------------------------------------------------------------------------------------


def inputs(batch: Any, *, anatomy: Anatomy, packing: str, mask_of: Any) -> dict[str, Any]:
    """Keyword arguments of a transformers forward. Positions and a block mask where documents share a row."""
    if anatomy.kind == "seq2seq":
        return {
            "input_ids": batch["source"],
            "attention_mask": batch["source_mask"],
            "decoder_input_ids": batch["tokens"],
        }
    tokens_BT = batch["tokens"]
    if packing in ("single", "concat"):
        return {"input_ids": tokens_BT, **_padding(batch, anatomy)}
    mask = mask_of(batch["segments"], causal=anatomy.kind != "masked")
    if mask is None:
        return {"input_ids": tokens_BT}
    return {"input_ids": tokens_BT, "attention_mask": mask, **_positions(batch, anatomy)}


def _padding(batch: Any, anatomy: Anatomy) -> dict[str, Tensor]:
    real = batch["segments"] > 0
    return {} if bool(real.all()) else {"attention_mask": real.long()}


def _positions(batch: Any, anatomy: Anatomy) -> dict[str, Tensor]:
    return {"position_ids": batch["positions"]}


@torch.no_grad()
def packs(model: nn.Module, *, anatomy: Anatomy, device: torch.device, batch_of: Any, inputs_of: Any) -> bool:
    """Two documents in one row against each alone: do the same hidden states come out?

    A model that takes no position ids, or has state of its own that runs along the row, fails.
    """
    if anatomy.kind in ("seq2seq", "other"):
        return False
    training = model.training
    model.eval()
    try:
        together, apart = batch_of([5, 7]), [batch_of([5]), batch_of([7], skip=5)]
        outs = []
        for batch in (together, *apart):
            outs.append(forward(model, inputs_of(batch.to(device)), anatomy=anatomy).hidden_BTD)
        split = torch.cat([outs[1][:, :5], outs[2][:, :7]], dim=1)
        return bool(torch.allclose(outs[0][:, :12], split, atol=1e-4, rtol=1e-3))
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(training)

"""A look at somebody's model and data before anything is trained: what they are, how long, how many, and what fits."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from tutelage.base.errors import UserError
from tutelage.base.links import WORDS
from tutelage.base.spec import SourceSpec
from tutelage.core import memory
from tutelage.core.anatomy import Anatomy, anatomy
from tutelage.modalities.text import imports, models, read, template, tokenizer
from tutelage.modalities.text.encode import Encoder
from tutelage.modalities.text.fields import Content, Empty, Shape, content_of, shape_of
from tutelage.modalities.text.read import Bad, Block, Record

READ = 256 << 20  # bytes on disk that are read; what follows is reckoned from these
SAMPLE = 2000  # documents whose tokens are counted
CHARACTERS = 8 << 20  # of these together, at most


@dataclass
class Model:
    """What a model folder or config holds."""

    start: str  # as the recipe names it
    folder: Path | None  # None when there are no weights yet
    config: dict[str, Any]
    parameters: int
    parts: Anatomy
    shape: nn.Module  # without contents
    tokenizer: Any  # None when one is still to be trained
    tokenizer_from: str | None  # what the recipe says under `tokenizer`

    @property
    def context(self) -> int | None:
        """Positions for text, where the model is bound to some; RoBERTa's kin keep two for themselves."""
        found = self.parts.context
        if found and self.config["model_type"] in ("roberta", "xlm-roberta", "camembert"):
            return found - 2
        return None if self.config["model_type"] in ("t5", "mt5", "umt5") else found

    def says(self) -> str:
        """The model in a line."""
        ties = "tied to the output" if self.parts.tied else "not tied to the output"
        blocks = sum(len(stack.blocks) for stack in self.parts.stacks)
        room = f"context {self.context:,}" if self.context else "no limit of length"
        fresh = "" if self.folder else ", fresh weights"
        return (
            f"{self.config['model_type']}, {self.parameters:,} parameters in {blocks} blocks{fresh}, "
            f"vocabulary {self.parts.vocab or 0:,} ({ties}), {room}"
        )


@dataclass
class Data:
    """What a body of data holds. `lengths` are tokens of sampled documents, separators included."""

    name: str
    path: str
    files: int
    shape: Shape
    records: int = 0
    malformed: int = 0
    empty: int = 0
    places: list[str] = field(default_factory=list)
    share: float = 1.0  # of the bytes that were read
    documents: bool = False  # whole files are the documents
    bytes: int = 0
    sample: list[Content] = field(default_factory=list)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0))
    chat: str = ""  # how conversations are rendered

    @property
    def usable(self) -> int:
        """Documents in all, reckoned where not everything was read."""
        return round((self.records - self.malformed - self.empty) / self.share)

    @property
    def tokens(self) -> int:
        return round(float(self.lengths.mean()) * self.usable)

    def percentile(self, share: float) -> int:
        return int(np.percentile(self.lengths, share))

    def says(self) -> str:
        """The data in a line."""
        about = "" if self.share == 1 else "about "
        what = {"text": "field", "chat": "messages in", "pair": "prompt and answer in"}[self.shape.kind]
        if self.documents:
            held = f"{about}{self.usable:,} document{'s' if self.usable != 1 else ''}"
        else:
            held = f"{about}{self.usable:,} records, {what} {', '.join(self.shape.fields)}"
        many = f"{self.tokens:,} tokens" if self.share == 1 and len(self.lengths) == self.usable else ""
        return (
            f"{held}; {many or 'about ' + short(self.tokens) + ' tokens'}, half shorter than {self.percentile(50):,}, "
            f"95 % shorter than {self.percentile(95):,}"
        )


def short(number: float) -> str:
    """12,345,678 as 12M."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.0f}"


# -- the model --------------------------------------------------------------------------------------------------------


def look_at_model(given: str) -> Model:
    """Open what describes the model, not its weights."""
    start = given if not Path(given).exists() or Path(given).is_absolute() else _here(given)
    folder, config = models.start_files(str(Path(given).expanduser()) if given.startswith("~") else given)
    if "model_type" not in config:
        raise UserError(f"{given}: config.json names no model_type, so transformers cannot open it")
    held, wanted = _tokenizer(given, folder)
    with torch.device("meta"):
        shape = _shape(folder, config, held)
    parts = anatomy(shape)
    count = sum(p.numel() for p in shape.parameters())
    return Model(start, folder, config, count, parts, shape, held, wanted)


def _here(given: str) -> str:
    """A path of this folder, spelled so that it is never taken for a stage or a hub name."""
    path = Path(given).as_posix()
    return path if path.startswith(("./", "../", "~")) else f"./{path}"


def _tokenizer(given: str, folder: Path | None) -> tuple[Any, str | None]:
    """The tokenizer that goes with it, and what the recipe must say of it."""
    if folder is not None:
        try:
            return tokenizer.load(str(folder)), None
        except UserError as error:
            raise UserError(f"{error}; trained weights need the tokenizer that they were trained with") from error
    if Path(given).is_dir():
        try:
            return tokenizer.load(given), _here(given)
        except UserError:
            pass
    return None, None


def _shape(folder: Path | None, config: dict[str, Any], held: Any) -> nn.Module:
    if folder is not None:
        made = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    else:
        made = models.config_of(config, processor=held or tokenizer.bytes_tokenizer(), length=512)
    return models.fresh(made, models.auto_class(config))


# -- the data ---------------------------------------------------------------------------------------------------------


def look_at_data(given: str) -> Data:
    """Read the data (or the first part of much) as training will, and keep some of it."""
    path = given if Path(given).is_absolute() or given.startswith(("~", "stdlib:")) else Path(given).as_posix()
    spec = SourceSpec(path=path)
    name = name_of(given)
    found = imports.importer(spec)
    if found is not None:
        label, records = found
        every = [Record(label, i, row, unit="record") for i, row in enumerate(records(None), 1)]
        data = Data(name, path, 1, shape_of(name, spec, every[:100]))
        _take(data, every)
    else:
        files, _ = read.find(path)
        data = Data(name, path, len(files), shape_of(name, spec, read.peek(files)))
        data.documents = all(file.kind == "document" for file in files)
        whole = sum(file.size for file in files)
        data.share = _read(data, read.blocks(files), whole)
    if not data.sample:
        raise UserError(f"{given}: {_why_nothing(data)}")
    return data


def name_of(given: str) -> str:
    """A source's name from its path: the file's, or the folder's for a glob."""
    stems = [part for part in re.split(r"[/\\:]", given) if part and not set(part) & set("*?[")] or ["mine"]
    stem = stems[-1].split(".")[0] if not Path(given).is_dir() else stems[-1]
    name = re.sub(r"[^\w-]+", "_", stem).strip("_-") or "mine"
    return f"my_{name}" if name in WORDS or not re.match(r"[^\W\d]", name) or _is_yaml_word(name) else name


def _is_yaml_word(name: str) -> bool:
    return name.lower() in ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


def _read(data: Data, blocks: Iterator[Block], whole: int) -> float:
    """Take blocks until enough was read; returns the share of all bytes that was."""
    rng, seen = random.Random(0), 0
    for block in blocks:
        _take(data, list(read.records(block)), rng=rng)
        seen += block.size
        if seen >= READ:
            return min(1.0, seen / max(whole, 1))
    return 1.0


def _take(data: Data, found: Sequence[Record | Bad], *, rng: random.Random | None = None) -> None:
    """Count records; keep an even sample of what they give."""
    rng = rng or random.Random(0)
    for record in found:
        content = record if isinstance(record, Bad) else content_of(record, data.shape)
        data.records += 1
        if isinstance(content, Content):
            data.bytes += len(text_of(content).encode())
            if len(data.sample) < SAMPLE:
                data.sample.append(content)
            elif (place := rng.randrange(data.records)) < SAMPLE:
                data.sample[place] = content
        elif isinstance(content, Empty):
            data.empty += 1
        else:
            data.malformed += 1
            data.places = [*data.places, str(content)][:3]


def _why_nothing(data: Data) -> str:
    if data.malformed:
        more = f" and {data.malformed - 1} more" if data.malformed > 1 else ""
        return f"nothing in it can be learned from ({data.places[0]}{more})"
    return "all its records are empty; give it some text" if data.empty else "it is empty; give it some text"


def text_of(content: Content) -> str:
    return content.text or "\n".join([m["content"] for m in content.messages] or [content.prompt, content.answer])


def measure(data: Data, held: Any) -> None:
    """Count the sample's tokens as training will."""
    encoder = Encoder(held)
    data.chat = "" if data.shape.kind == "text" else "own" if held.chat_template else "plain"
    texts, room = [], CHARACTERS
    if data.chat:
        template.check(data.name, held)
    for content in data.sample:
        text = text_of(content)
        if data.chat:
            try:
                text, _ = template.render(
                    content.messages or template.messages_of(content.prompt, content.answer), held
                )
            except ValueError:
                continue  # the run counts it as malformed
        texts.append(text)
        room -= len(text)
        if room < 0:
            break
    edges = 0 if data.chat else len(encoder.front) + len(encoder.back)
    data.lengths = np.array([len(ids) + edges for ids in encoder.ids(texts)], dtype=np.float64)
    if not len(data.lengths):
        raise UserError(f"{data.path}: the tokenizer's chat template refuses every conversation")


# -- what fits --------------------------------------------------------------------------------------------------------


@dataclass
class Room:
    """Bytes that training needs with one row at a time, and what is free."""

    full: int
    lora: int
    free: int
    device: str

    @property
    def fits(self) -> bool:
        return self.full <= 0.9 * self.free

    @property
    def lora_fits(self) -> bool:
        return self.lora <= 0.9 * self.free


def room(model: Model, length: int) -> Room:
    """Weights, gradients, AdamW's two states, activations of one row, and the frozen start that KL is measured from."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    need = memory.estimate(
        model.shape, batch_rows=1, length=length, autocast=torch.bfloat16 if native else None, device=device
    )
    frozen = need["weights"] if model.folder else 0
    light = need["activations"] + need["logits"] + frozen
    adapters = round(0.02 * 4 * need["weights"])  # factors of rank 16, their gradients and states
    return Room(need["total"] + frozen, need["weights"] + light + adapters, memory.available(device), device)

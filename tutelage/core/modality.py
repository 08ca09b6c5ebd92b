"""What the core asks of a modality: the only place that knows what the data are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tutelage.base.spec import SourceSpec
from tutelage.core.anatomy import Anatomy
from tutelage.core.stream import Source
from tutelage.core.types import Batch, Document, Row

Progress = Callable[[str, float, float], None]  # what is being done, done so far, of how much


@dataclass
class Corpus:
    """One source, built: what is trained on and what is held out for measurement."""

    train: Source
    heldout: Source
    notes: list[str] = field(default_factory=list)  # what a person should know about how it was read


class Modality(Protocol):
    """A folder under `modalities/` has a module-level object of this shape called `modality`."""

    name: str
    numerics: int  # raised by hand when the same recipe would give other numbers
    probes: Sequence[str]  # measured inside a stage when the recipe does not say
    sampler: str  # the method that writes what an outside model must not forget

    def start_files(self, start: str) -> tuple[Path | None, dict[str, Any]]:
        """Folder of weights (None for a config) and the config as a dict; UserError when it is neither."""
        ...

    def processor(
        self,
        wanted: Any,
        *,
        folder: Path | None,
        texts: Callable[[], Iterable[Any]],
        cache: Path,
        config: dict[str, Any] | None = None,
    ) -> Any:
        """The tokenizer or its like: `wanted` from the recipe, else the start folder's own; may be trained on texts.

        `config` is that of the model it is for, where it is known.
        """
        ...

    def processor_id(self, processor: Any) -> str:
        """Hash of everything in it that changes the data."""
        ...

    def save_processor(self, processor: Any, folder: Path) -> None: ...

    def model(self, folder: Path | None, config: dict[str, Any], *, processor: Any, length: int) -> nn.Module:
        """Weights in float32 from a folder, or fresh from a config (randomness is set by the caller)."""
        ...

    def size(self, folder: Path | None, config: dict[str, Any]) -> int:
        """Number of parameters, without opening the model."""
        ...

    def generate(
        self,
        model: nn.Module,
        processor: Any,
        *,
        prompts: list[str],
        tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        rows: int = 16,
        pack: Callable[[list[int], int], list[int]] | None = None,
    ) -> list[str]:
        """Continuations of prompts (an empty prompt begins a document), batched, with a key-value cache.

        By `pack`, a stage's packing rule, prompts may share rows while they are read.
        """
        ...

    def asked(self, processor: Any, text: str, *, config: dict[str, Any]) -> list[int]:
        """The tokens of a question to a model, in the form in which it was taught to be asked."""
        ...

    def answers(
        self,
        model: nn.Module,
        processor: Any,
        *,
        asked: list[list[int]],
        tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[tuple[str, bool]]:
        """What a model answers, in one batch, and whether it came to an end or was cut off at so many tokens."""
        ...

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """A folder that the modality's library loads by itself."""
        ...

    def objective(self, anatomy: Anatomy) -> str:
        """Name of the default objective for this kind of model."""
        ...

    def objective_of(self, config: dict[str, Any]) -> str:
        """The same from the config alone: whose code a stage's fingerprint covers before there is a model."""
        ...

    def content_id(self, spec: SourceSpec, *, rows: Path | None) -> str:
        """Hash of a source's content, without reading it more than once."""
        ...

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
        """Build (or open) a source. `rows` is the data folder of a stage when the source is one."""
        ...

    def prefixed(
        self,
        source: Source,
        write: Callable[[Iterator[dict[str, Any]]], Iterator[str]],
        *,
        processor: Any,
        length: int,
    ) -> Source:
        """The source with what `write` puts before each document, given their records: read, never learned.

        A record also has `text`, all that its document says, which is read when it is asked for.

        Every piece also brings `plain`: the token that a position holds without it, below 0 where there is none.
        """
        ...

    def documents(self, specs: dict[str, tuple[SourceSpec, Path | None]], *, cache: Path) -> Iterable[Document]:
        """What is learned from sources (specs, and the data folders of stages), source by source.

        It may be gone through more than once, in the same order each time, and never holds more than a few.
        """
        ...

    def collate(self, rows: list[Row], sources: dict[str, Source], *, length: int) -> Batch: ...

    def batch_of(self, texts: list[str], *, processor: Any) -> Batch:
        """One text a row, for probes that bring their own material."""
        ...

    def inputs(self, batch: Batch, *, anatomy: Anatomy, packing: str) -> dict[str, Any]:
        """What the model's forward takes for this batch."""
        ...

    def packs(self, model: nn.Module, *, anatomy: Anatomy, device: torch.device) -> bool:
        """Whether two documents in one row give the logits that each gives alone."""
        ...

    def describe(self, row: Row, sources: dict[str, Source], *, processor: Any) -> list[dict[str, Any]]:
        """Which documents a row holds, for people."""
        ...

    def write_rows(self, rows: Iterable[dict[str, Any]], folder: Path) -> dict[str, Any]:
        """Save the rows of a data stage with their provenance; returns counts."""
        ...

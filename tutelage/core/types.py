"""The values that pass between the loop, the methods and a modality.

Shape letters: B rows, T positions, D hidden width, V vocabulary, N counted positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

IGNORE = -100  # a label nobody learns from
T = TypeVar("T")


class Sum(NamedTuple):
    """An undivided loss and how much counted; the engine divides once, over micro-batches and ranks."""

    total: Tensor  # scalar, differentiable
    weight: Tensor | float  # scalar, same unit for every micro-batch of a step


class Piece(NamedTuple):
    """A stretch of one document: positions `start … start + length` of document `doc`."""

    doc: int
    start: int
    length: int


class Document(NamedTuple):
    """A record on its way through a stage that rewrites data."""

    text: str  # all that it says, for comparing and judging
    row: dict[str, Any]  # the record, to be written as it is or changed; `origin` says where it comes from


class Question(NamedTuple):
    """What a writer is asked. `purpose` names the question: chance depends on it, the seed and the stage alone."""

    purpose: str
    text: str


class Answer(NamedTuple):
    """What a writer answered: nothing where it refused or had no room. `ended` tells whether it came to its end."""

    text: str
    ended: bool


class Writer(Protocol):
    """A model that is asked: the start of the stage, or one behind an endpoint. What it has answered once is kept."""

    def size(self, text: str) -> int:
        """Tokens of a text; behind an endpoint about so many, a quarter of its bytes."""
        ...

    def answers(
        self, asked: Iterable[tuple[T, Question]], *, tokens: int, temperature: float, top_p: float, rows: int
    ) -> Iterator[tuple[T, Answer]]:
        """An answer of at most `tokens` to each question, in their order, with what came with it.

        Questions are drawn ahead: `rows` at once are answered by the start's model, and several by an endpoint.
        Temperature 0 always takes the likeliest token. Raises UserError where an endpoint fails for good.
        """
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batch: its source and the pieces joined in it, in order."""

    source: str
    pieces: tuple[Piece, ...]
    extra: Any = None  # a live source's row carries its content here


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows on their way to the model.

    `fields` maps a name to a tensor whose first dimension is the row. Text uses `tokens_BT`, `labels_BT`
    (already aligned with the logits; `IGNORE` where nothing is learned), `positions_BT`, `segments_BT`
    (document number within the row from 1, 0 is padding). `weight_B` multiplies each row's loss.
    """

    fields: dict[str, Tensor]
    rows: list[Row]
    weight_B: Tensor
    meta: dict[str, Any] = field(default_factory=dict)  # whatever a `batch` hook passes on to a loss

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Positions that hold data, padding aside."""
        return sum(piece.length for row in self.rows for piece in row.pieces)

    def having(self, **fields: Tensor) -> Batch:
        """A copy with some fields replaced or added."""
        return replace(self, fields={**self.fields, **fields})

    def weighted(self, weight_B: Tensor) -> Batch:
        """A copy with row weights multiplied in; rows of weight 0 leave before the training pass."""
        weight_B = self.weight_B * weight_B.to(self.weight_B)
        keep = weight_B.nonzero().flatten()
        if len(keep) == len(self.rows):
            return replace(self, weight_B=weight_B)
        return Batch(
            {name: value[keep] for name, value in self.fields.items()},
            [self.rows[i] for i in keep.tolist()],
            weight_B[keep],
            self.meta,
        )

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most `size` rows, in order."""
        for i in range(0, len(self.rows), size):
            cut = {name: value[i : i + size] for name, value in self.fields.items()}
            yield Batch(cut, self.rows[i : i + size], self.weight_B[i : i + size], self.meta)

    def to(self, device: torch.device) -> Batch:
        moved = {name: value.to(device, non_blocking=True) for name, value in self.fields.items()}
        return replace(self, fields=moved, weight_B=self.weight_B.to(device))


@dataclass(frozen=True, eq=False)
class Axis:
    """What the places along one axis of a weight belong to: place n is part `part_N[n]` of unit `unit_N[n]` of a space.

    The spaces are `hidden` (a unit is a channel of the residual stream), `mlp` (a neuron between two layers of a block)
    and `heads` (a key/value head with all query heads that share it), and the empty name where no width enters
    (vocabulary, positions, head size). The parts of a unit are numbered alike in a wider model of the same kind.
    """

    space: str
    unit_N: Tensor
    part_N: Tensor
    read: bool  # summed over when the layer is computed, as the inputs of a linear layer are


@dataclass(frozen=True, eq=False)
class Layout:
    """How a model of some configuration is laid out, weight by weight. Names are those that its files have."""

    axes: dict[str, tuple[Axis, ...]]
    sizes: dict[str, int]  # units of each space
    blocks: frozenset[str]  # dotted names of the lists of blocks
    norms: frozenset[str]  # weights of norms
    tied: bool  # the head's weight is the input embedding
    before_head: tuple[str, ...]  # weights of the module whose output the head reads

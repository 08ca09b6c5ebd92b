"""What a method may look at. Read-only: a method answers through the values that its hooks return."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tutelage.base.clock import Clock
from tutelage.base.errors import UserError, did_you_mean
from tutelage.core import randomness
from tutelage.core.engine import Engine
from tutelage.core.out import Out
from tutelage.core.stream import Cursor, Order, Source, Stream
from tutelage.core.types import Batch, Layout, Piece, Row

T = TypeVar("T")


@dataclass
class Data:
    """Sources of some stage (or of `keep`), read in an order of their own that nobody else's reading moves."""

    sources: dict[str, Source]
    collate: Callable[..., Batch]  # (rows, sources, length=…)
    seed: int
    length: int
    packing: Any

    def once(self, passages: int, *, rows: int = 8) -> Iterator[Batch]:
        """The first `passages` rows in order, each once: fewer when there are no more."""
        for name, source in self.sources.items():
            order, cursor, drawn = Order(source, seed=self.seed, packing=self.packing), Cursor(), []
            for _ in range(passages):
                if cursor.next >= len(source.chunks) and not cursor.pending:
                    break
                pieces, cursor = order.row(cursor, self.length)
                drawn.append(Row(name, pieces))
            for i in range(0, len(drawn), rows):
                yield self.collate(drawn[i : i + rows], self.sources)

    def alone(self, name: str, numbers: Sequence[int]) -> Batch:
        """These chunks of a source, each in a row of its own, which are as long as the longest of them."""
        chunks = self.sources[name].chunks
        pieces = [Piece(doc, start, min(size, self.length)) for doc, start, size in chunks[list(numbers)].tolist()]
        rows = [Row(name, (piece,)) for piece in pieces]
        return self.collate(rows, self.sources, length=max(piece.length for piece in pieces))

    def batches(self, count: int, *, rows: int = 8) -> Iterator[Batch]:
        """`count` batches of `rows` rows, the sources in equal shares; the same ones every time."""
        orders = {n: Order(s, seed=self.seed, packing=self.packing) for n, s in self.sources.items()}
        stream = Stream(orders)
        for _ in range(count):
            drawn = stream.draw(dict.fromkeys(self.sources, 1.0), self.length, rows)
            yield self.collate(drawn, self.sources)


@dataclass
class View:
    """The run as a method sees it. `clock` and `signals` are of this step; costly things are made when asked for."""

    clock: Clock
    seed: int
    stage: str  # without its arm
    engine: Engine
    signals: dict[str, float] = field(default_factory=dict)
    heldout: dict[str, Data] = field(default_factory=dict)  # what is measured, by column of the forgetting matrix
    sources: list[str] = field(default_factory=list)  # that the stage learns from, in the recipe's order
    kept: frozenset[str] = frozenset()  # the columns that `keep` names
    fresh: bool = False  # the stage starts from random weights
    same_tokens: bool = True  # whether the start's tokenizer is this stage's too
    passages: int = 64  # rows measured per column
    few: int = 64  # of these, the first ones that every measurement of the stage has
    length: int = 0  # of the stage's rows
    tokens: int = 0  # of a step of such rows
    lengths: dict[int, float] = field(default_factory=dict)  # of a curriculum's pieces: the share of the data in each
    found: dict[str, float] = field(default_factory=dict)  # by the probes before this one, in this measurement
    history: dict[str, dict[str, float]] = field(default_factory=dict)  # earlier stages' measures: stage, column
    trained: dict[str, float] = field(default_factory=dict)  # tokens of earlier stages with data, oldest first; or 0
    _data: Callable[[str], Data] | None = None
    _source: Callable[[str], Data] | None = None
    _try: Callable[[Iterable[Batch], Callable[[], Any]], Any] | None = None
    _open_ref: Callable[[str], nn.Module] | None = None
    _refs: dict[str, nn.Module] = field(default_factory=dict)
    _sample: Callable[[int], Batch] | None = None
    generate: Callable[..., list[str]] | None = None  # texts from the current weights, by the modality
    batch_of: Callable[[list[str]], Batch] | None = None  # texts, one a row
    decode: Callable[[list[int]], str] | None = None  # the text of tokens

    @property
    def rank(self) -> int:
        return self.engine.world.rank

    def seed_of(self, purpose: str) -> int:
        """A number that depends on seed, stage, tick and purpose only."""
        return randomness.seed_of(self.seed, self.stage, self.clock.tick, purpose)

    def rng(self, purpose: str) -> torch.Generator:
        """A CPU generator for this tick and purpose; the same on every rank."""
        return randomness.generator(self.seed_of(purpose))

    def reseed(self, purpose: str, *, apart: bool = False) -> None:
        """Set the global generators for this tick and purpose; `apart` gives every rank numbers of its own."""
        randomness.reseed(self.seed_of(f"{purpose}|{self.rank}" if apart and self.rank else purpose))

    def layout(self) -> Layout:
        """What each axis of the model's weights counts."""
        from tutelage.core.layout import layout

        root = self.engine.anatomy.root
        return layout({**root.config.to_dict(), "architectures": [type(root).__name__]})

    def model(self, batch: Batch, *, needs: frozenset[str] = frozenset()) -> Out:
        """The model as it is now, without gradients, in evaluation mode; `needs` as a method's own."""
        return self.without_gradients(self.engine.model, batch, needs=needs)

    def ref(self, name: str = "start") -> Callable[[Batch], Out]:
        """A frozen model: `start`, the weights that this stage began with."""
        if name not in self._refs:
            assert self._open_ref is not None
            self._refs[name] = self._open_ref(name)
        return lambda batch: self.without_gradients(self._refs[name], batch)

    def without_gradients(self, model: nn.Module, batch: Batch, *, needs: frozenset[str] = frozenset()) -> Out:
        """What some model of this shape answers, in evaluation mode."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.engine.precision():
                return self.engine.out_of(model, batch.to(self.engine.device), needs=needs)
        finally:
            model.train(training)

    def data(self, of: str) -> Data:
        """The training data of an ancestor: a stage's name, `previous`, `self`, or a name under `keep`."""
        assert self._data is not None
        return self._data(of)

    def source(self, name: str) -> Data:
        """The training data of one of this stage's own sources, as steps draw it."""
        assert self._source is not None
        return self._source(name)

    def measured(self, column: str) -> Data:
        """The held-out data of one column."""
        if column not in self.heldout:
            raise UserError(f"nothing is measured under '{column}'{did_you_mean(column, self.heldout)}")
        return self.heldout[column]

    def sample(self, rows: int) -> Batch:
        """Rows like the next ones (of the commonest length, of all classes, where a curriculum divides); no stream moves."""
        assert self._sample is not None
        return self._sample(rows)

    def prepared(self, batch: Batch) -> Batch:
        """A batch that did not come through the training loop, as the objective wants it, without chance.

        An objective that changes its batches (masks, splits) says in `measured` how; the training loop's batches,
        which its `batch` hook has marked in `meta["prepared"]`, stay as they are.
        """
        measured = getattr(self.engine.objective, "measured", None)
        return batch if measured is None or batch.meta.get("prepared") else measured(batch, self)

    def grad(self, batch: Batch) -> dict[str, Tensor]:
        """The objective's gradient on another batch, by parameter name."""
        return self.engine.gradient_of(self.prepared(batch), self)

    def tried(self, batches: Iterable[Batch], then: Callable[[], T]) -> T:
        """In `begin`: what `then` answers after a step on each of these batches. The weights are put back.

        The steps are the stage's own, at the optimizer's full rate, without a schedule and without other methods.
        """
        assert self._try is not None, "weights are tried in `begin` only"
        return self._try(batches, then)

    def counted(self, key: Hashable, fn: Callable[[], T]) -> T:
        """What `fn` answers; its operations count as choosing data. `key` names what sets them, shapes above all."""
        return self.engine.flops.count("select", key, fn)[0]

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks."""
        return self.engine.world.sum(value)

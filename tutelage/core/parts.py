"""What a step draws: shares of the sources, and with a curriculum that divides them, of their parts.

A mix divides a step among sources and knows nothing of parts. A curriculum with `cut` chooses a length, and every
source gives pieces of that length, in proportion to its share and to how much of it lies in them: over the steps of all
lengths each source comes to its share. One with `grade` puts the chunks of each source into classes and says at every
step how far each class is open: every source gives its share, from what is open of it. One with `pick` names the chunks
that are drawn from some step on, and may look at the model for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch

from tutelage.base.errors import UserError
from tutelage.core import artifact
from tutelage.core.stream import Order, Source, Stream
from tutelage.core.types import Piece

if TYPE_CHECKING:
    from tutelage.core.stage import Run

Cut = Callable[[int], list[int]]
"""Lengths of the pieces that a chunk of so many positions is cut into, in order; what is left of it is not drawn."""

Grade = Callable[[Sequence[tuple[str, np.ndarray]]], Iterable[int]]
"""The class of each chunk, from text and tokens of all of them in order, read when they are asked for."""

Decode = Callable[[list[int]], str]

CHUNKS = "chunks.safetensors"  # in `picked/<tick>` of a stage: numbers of the chunks drawn from that tick on


class Divisible(Source, Protocol):
    """A source whose documents are read anywhere: the same under another name with other chunks."""

    def part(self, name: str, chunks: np.ndarray) -> Divisible: ...


@dataclass
class Parts:
    """What became of the sources that are mixed. Where nothing divides them, every answer is the plain one."""

    cut: Cut | None = None
    grade: Grade | None = None
    decode: Decode | None = None  # the text of tokens, for `grade`
    names: dict[str, dict[int, str]] = field(default_factory=dict)  # of a source's parts, by length or class, in order
    shares: dict[str, dict[int, float]] = field(default_factory=dict)  # of a source's positions
    classes: dict[int, float] = field(default_factory=dict)  # how far each is open at this step; empty: all of them
    picked: dict[str, np.ndarray] = field(default_factory=dict)  # numbers of the chunks drawn, [N] int64, by source
    picked_at: int = 0  # the tick at which they were

    @staticmethod
    def of(curriculum: Any, *, decode: Decode | None = None) -> Parts:
        """None yet, to be divided as the curriculum says, if it does."""
        found = Parts(getattr(curriculum, "cut", None), getattr(curriculum, "grade", None), decode)
        assert not (found.cut and found.grade), "a curriculum cuts or grades"
        return found

    def divided(self, source: Source) -> tuple[Source, Mapping[int, Source]]:
        """The source holding only what is drawn, and its parts; none where nothing divides it."""
        if self.cut is not None:
            return divide(source, self.cut)
        return source, {} if self.grade is None else graded(source, self.grade, self.decode)

    def add(self, source: Source) -> dict[str, Source]:
        """The source by its name, holding only what is drawn, and its parts by theirs."""
        whole, parts = self.divided(source)
        if parts:
            self.names[source.name] = {key: part.name for key, part in parts.items()}
            sizes = {key: float(part.chunks[:, 2].sum()) for key, part in parts.items()}
            self.shares[source.name] = {key: size / sum(sizes.values()) for key, size in sizes.items()}
        return {whole.name: whole, **{part.name: part for part in parts.values()}}

    def orders(self, sources: Mapping[str, Source], *, seed: int, packing: Any) -> dict[str, Order]:
        """How each is drawn: a source that has parts by its parts, of one length a piece a row."""
        parts = {name for names in self.names.values() for name in names.values()} if self.cut else ()
        return {
            name: Order(source, seed=seed, packing="single" if name in parts else packing)
            for name, source in sources.items()
            if name not in self.names
        }

    def lengths(self, weights: Mapping[str, float]) -> dict[int, float]:
        """The share of each length in what these shares of sources draw on, shortest first; empty without pieces."""
        found: dict[int, float] = defaultdict(float)
        for name, shares in self.shares.items() if self.cut else ():
            for length, share in shares.items():
                found[length] += weights.get(name, 0.0) * share
        whole = sum(found.values())
        return {length: found[length] / whole for length in sorted(found) if found[length]}

    def weights(self, weights: Mapping[str, float], length: int) -> dict[str, float]:
        """Shares of what is drawn at a step of this length. Sources without parts (methods' own) keep theirs."""
        if not self.names:
            return dict(weights)
        if self.cut is None:
            return self._open(weights)
        own = {name: share for name, share in weights.items() if name in self.names}
        found = {self.names[n][length]: w * self.shares[n][length] for n, w in own.items() if length in self.names[n]}
        whole = sum(found.values())
        if own and not whole:
            there = ", ".join(map(str, self.lengths(weights)))
            raise UserError(f"curriculum: no source has pieces of {length} positions (there are: {there})")
        scale = sum(own.values()) / whole if whole else 0.0
        rest = {name: share for name, share in weights.items() if name not in self.names}
        return {name: weight * scale for name, weight in found.items()} | rest

    def _open(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Shares of the parts in classes: a source's own, by how much lies in each and how far it is open."""
        found = {name: share for name, share in weights.items() if name not in self.names}
        for name, share in weights.items():
            if name not in self.names:
                continue
            sizes = self.shares[name]
            there = {key: size * self.classes.get(key, 0.0) for key, size in sizes.items()} if self.classes else sizes
            if not sum(there.values()):  # a source of few chunks lacks classes: the nearest stands in
                wanted = max(self.classes, key=lambda key: self.classes[key])
                there = {min(sizes, key=lambda key: (abs(key - wanted), key)): 1.0}
            whole = sum(there.values())
            found |= {self.names[name][key]: share * size / whole for key, size in there.items() if size}
        return found

    def noted(self) -> dict[str, Any]:
        """What a step's row of metrics says of it, so that its batch can be named again."""
        classes = {"classes": {str(key): share for key, share in self.classes.items()}} if self.classes else {}
        return classes | ({"picked": self.picked_at} if self.picked else {})

    def recall(self, row: Mapping[str, Any]) -> None:
        """Stand as at the step of a row."""
        self.classes = {int(key): share for key, share in row.get("classes", {}).items()}

    def passes(self, name: str, drawn: Mapping[str, float]) -> float:
        """Passes over a source, from those over what it is drawn by."""
        if name not in self.names:
            return drawn[name]
        return sum(share * drawn[self.names[name][length]] for length, share in self.shares[name].items())


def divide(source: Source, cut: Cut) -> tuple[Divisible, dict[int, Divisible]]:
    """A source holding only the pieces that its chunks are cut into, and its parts by length, shortest first.

    Pieces in which nothing is learned are left out. Raises UserError for a source that cannot be cut or of which
    nothing is left.
    """
    source = _divisible(source)
    pieces = []
    for size in np.unique(source.chunks[:, 2]).tolist():
        lengths = cut(size)
        assert min(lengths, default=1) > 0 and sum(lengths) <= size, (size, lengths)
        chunks = source.chunks[source.chunks[:, 2] == size]
        for start, length in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False):
            pieces.append(np.stack([chunks[:, 0], chunks[:, 1] + start, np.full(len(chunks), length)], axis=1))
    found = np.concatenate(pieces) if pieces else source.chunks[:0]
    whole: Divisible = source.part(source.name, found[np.lexsort((found[:, 1], found[:, 0]))])
    sizes = whole.chunks[:, 2]
    if not len(sizes):
        raise UserError(
            f"source '{source.name}': the curriculum leaves nothing of it (its longest piece has "
            f"{int(source.chunks[:, 2].max(initial=0))} positions); let it cut shorter pieces"
        )
    parts = {
        size: whole.part(f"{source.name}:{size}", whole.chunks[sizes == size]) for size in np.unique(sizes).tolist()
    }
    return whole, parts


def graded(source: Source, grade: Grade, decode: Decode | None) -> dict[int, Divisible]:
    """The parts of a source by the class of its chunks, lowest first. Raises UserError for one that has no parts."""
    source = _divisible(source)
    assert decode is not None
    classes = np.fromiter(grade(_Texts(source, decode)), dtype=np.int64)
    assert classes.shape == source.chunks[:, 0].shape, "a class for each chunk"
    return {
        key: source.part(f"{source.name}:{key}", source.chunks[classes == key]) for key in np.unique(classes).tolist()
    }


@dataclass(frozen=True)
class _Texts(Sequence[tuple[str, np.ndarray]]):
    """Text and tokens of each chunk of a source, in order; read anew every time that they are asked for."""

    source: Source
    decode: Decode

    def __len__(self) -> int:
        return len(self.source.chunks)

    def __getitem__(self, i: Any) -> Any:
        tokens = self.source.read(Piece(*self.source.chunks[i].tolist()))["tokens"]
        return self.decode(tokens.tolist()), tokens


def _divisible(source: Source) -> Divisible:
    if not hasattr(source, "part"):
        raise UserError(f"source '{source.name}' cannot be divided: a curriculum that cuts or grades needs plain text")
    return cast("Divisible", source)


def narrow(stream: Stream, sources: Mapping[str, Source], chunks: Mapping[str, np.ndarray], **drawn: Any) -> None:
    """Let a stream draw only these chunks of its sources, by number; `drawn` is how (`seed`, `packing`).

    Raises UserError for a source that cannot be drawn in part, and where nothing of one would be left.
    """
    for name, numbers in chunks.items():
        whole = _divisible(sources[name])
        stream.narrow(name, order=Order(whole.part(name, whole.chunks[numbers]), **drawn))


def hold(run: Run, chunks: Mapping[str, np.ndarray], *, tick: int) -> None:
    """Draw these chunks from now on, each source from its beginning, and keep on disk which they were."""
    for name in run.parts.picked:
        run.stream.narrow(name, order=None)
    narrow(run.stream, run.sources, chunks, seed=run.node.seed, packing=run.packing)
    run.parts.picked, run.parts.picked_at = dict(chunks), tick
    if chunks and not run.engine.world.rank:
        found = {name: torch.from_numpy(numbers) for name, numbers in chunks.items()}
        artifact.publish(
            run.folder / "picked" / f"{tick:09d}", lambda beside: artifact.save_tensors(beside / CHUNKS, found)
        )


def picked_at(folder: Path, tick: int) -> dict[str, np.ndarray]:
    """What was picked at a tick of a stage, from its folder."""
    found = artifact.load_tensors(folder / "picked" / f"{tick:09d}" / CHUNKS)
    return {name: numbers.numpy() for name, numbers in found.items()}


def pick(run: Run) -> None:
    """Ask the curriculum whether other chunks are to be drawn; all ranks go by rank 0's answer."""
    found = run.methods.slots["curriculum"].pick(run.view)  # type: ignore[union-attr]
    told = None if found is None else {name: numbers.tolist() for name, numbers in found.items()}
    told = run.engine.world.agree(told)
    if told is not None:
        hold(run, {name: np.asarray(numbers, dtype=np.int64) for name, numbers in told.items()}, tick=run.clock.tick)


def mix_weights(run: Run) -> dict[str, float]:
    """Shares of this step: what methods' own sources take first, then what actions say or the mix divides."""
    sources, shares, steered, own = run.sources, run.shares, run.steered, run.own()
    mix = run.methods.slots["mix"]
    assert mix is not None
    if steered.mix:
        weights = {name: weight for name, weight in steered.mix.items() if name in own}
    else:
        weights = mix.weights({name: sources[name].facts for name in run.node.stage.data}, run.view)
        weights = {name: weight for name, weight in weights.items() if name in own}
        joined = {name: added["weight"] for name, added in steered.added.items() if name in own}
        rest = (1.0 - sum(joined.values())) / (sum(weights.values()) or 1.0)
        weights = ({name: weight * rest for name, weight in weights.items()} | joined) if joined else weights
    if not sum(weights.values()):  # what is left after a source was dropped has no share by itself
        weights = dict.fromkeys(weights, 1.0)
    whole, taken = sum(weights.values()), sum(shares.values())
    if not 0 <= taken < 1 and own:
        raise UserError(f"methods take {taken:.0%} of every batch for their own sources; nothing is left for the data")
    return {**{name: w / whole * (1 - taken) for name, w in weights.items()}, **shares}


def shape_of(run: Run, weights: Mapping[str, float]) -> tuple[int, int]:
    """Length and rows of this step: the stage's own, or what a curriculum says (length, tokens)."""
    curriculum = run.methods.slots["curriculum"]
    if curriculum is None:
        return run.node.stage.length, run.rows
    if hasattr(type(curriculum), "pick"):
        pick(run)
    if run.parts.grade is not None:
        run.parts.classes = curriculum.classes(run.view)
    if not hasattr(type(curriculum), "shape"):
        return run.node.stage.length, run.rows
    run.view.lengths = run.parts.lengths(weights)
    length, tokens = curriculum.shape(run.view)
    return length, max(run.engine.world.size, round(tokens / length))


def typical(run: Run, weights: Mapping[str, float]) -> int:
    """The length in which most positions lie: the stage's own where nothing is cut."""
    found = run.parts.lengths(weights)
    return max(found, key=lambda length: found[length]) if found else run.node.stage.length

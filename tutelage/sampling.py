"""What a text source holds, told without reading all of it: from its store if there is one, else from a sample."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.modalities.text import imports, read, store, tokenizer
from tutelage.modalities.text.fields import Content, Shape, content_of, shape_of
from tutelage.modalities.text.read import File, Record

ENOUGH = 1 << 20  # bytes of text in a sample
FILES = 8  # of a source of many files, these are looked into, evenly spread
ENDS = 2  # tokens that begin and end a document


@dataclass(frozen=True)
class Amount:
    """How much a source gives to train on. `known` is how that is known: `exact`, or what it was estimated from."""

    tokens: float | None
    bytes: float | None
    known: str
    stored: bool = False  # tokenized already
    records: float = 0.0
    lengths: dict[int, float] = field(default_factory=dict)  # shares of the tokens by length of piece, if it is cut


@dataclass(frozen=True)
class Sample:
    """Some of a source's texts, and its whole size in bytes of text as far as these tell."""

    texts: tuple[str, ...]
    bytes: float
    whole: bool

    @property
    def known(self) -> str:
        count = f"{len(self.texts):,} records"
        return count if self.whole else f"a sample of {count}"


def amount(
    name: str,
    spec: SourceSpec,
    *,
    processor: Any,
    cache: Path,
    rows: Path | None,
    length: int | None = None,
    cut: Callable[[int], list[int]] | None = None,
) -> Amount:
    """Tokens and bytes of the training side of a source. Nothing is written.

    With `cut` tokens are those of the pieces into which it cuts chunks of at most `length`.
    """
    found = _stored(name, spec, processor, cache, rows)
    if found is not None:
        train = orjson.loads((found / "meta.json").read_bytes())["train"]
        tokens = train["tokens"] - train["documents"]
        places = np.diff(np.load(found / "train" / "offsets.npy", mmap_mode="r")) - 1 if cut and tokens else None
        return _cut(Amount(tokens, train["bytes"], "exact", stored=True), places, length, cut)
    some = sample(name, spec, cache=cache, rows=rows)
    share = store.held_out(name, spec)[0]
    if isinstance(spec.path, str) and spec.path.startswith("stdlib:"):
        share = 0.0  # has held-out documents of its own
    if processor is None:
        return Amount(None, some.bytes * (1 - share), some.known)
    ids = processor(list(some.texts), add_special_tokens=False)["input_ids"]
    size = sum(len(text.encode()) for text in some.texts)
    tokens = (sum(map(len, ids)) + (ENDS - 1) * len(ids)) * some.bytes / max(1, size)
    records = len(ids) * some.bytes / max(1, size)
    whole = Amount(tokens * (1 - share), some.bytes * (1 - share), some.known, records=records * (1 - share))
    return _cut(whole, np.array([len(one) + ENDS - 1 for one in ids]), length, cut)


def _cut(
    whole: Amount, places: np.ndarray | None, length: int | None, cut: Callable[[int], list[int]] | None
) -> Amount:
    """What is left of a source whose documents have so many `places` [D], where a curriculum cuts their chunks."""
    if cut is None or length is None or places is None or not len(places):
        return whole
    sizes: Counter[int] = Counter({length: int((places // length).sum())})
    sizes.update((places % length).tolist())
    pieces: Counter[int] = Counter()
    for size, count in sizes.items():
        for piece in cut(size) if size else ():
            pieces[piece] += piece * count
    left = sum(pieces.values())
    lengths = {piece: pieces[piece] / left for piece in sorted(pieces)} if left else {}
    return replace(whole, tokens=(whole.tokens or 0.0) * left / max(1, int(places.sum())), lengths=lengths)


def _stored(name: str, spec: SourceSpec, processor: Any, cache: Path, rows: Path | None) -> Path | None:
    """The folder of the source's store (see text/store.py, which names it so), if it is there."""
    if processor is None or not cache.is_dir():
        return None
    share, apart = store.held_out(name, spec)
    if apart is not None or (isinstance(spec.path, str) and spec.path.startswith("stdlib:")):
        share = 0.0
    origin = imports.content_id(spec, rows=rows)
    keys = [store.NUMERICS, read.BLOCK, origin, spec.field, spec.template, share, "train"]
    folder = cache / imports.hash_of([*keys, tokenizer.fingerprint(processor)])
    return folder if (folder / "meta.json").exists() else None


def sample(name: str, spec: SourceSpec, *, cache: Path, rows: Path | None) -> Sample:
    """About a megabyte of a source's texts, from several of its files where it has many."""
    return _sample(name, spec.model_dump_json(exclude={"weight", "val"}), cache, rows)


@functools.lru_cache(maxsize=64)
def _sample(name: str, text: str, cache: Path, rows: Path | None) -> Sample:
    spec = SourceSpec.model_validate_json(text)
    found = None if rows is not None else imports.importer(spec)
    if found is not None:
        label, records = found
        there = list(cache.glob("stdlib-*.json")) if label.startswith("stdlib:") else []
        if not there:
            return _imported(name, spec, label, records(None))
        with tempfile.TemporaryDirectory() as beside:  # a copy: an importer may add to its cache
            for path in there:
                shutil.copy(path, beside)
            return _imported(name, spec, label, records(Path(beside)))
    files, _ = imports.files_of(spec, cache=Path(), rows=rows)
    chosen = [files[i * len(files) // FILES] for i in range(FILES)] if len(files) > FILES else files
    shape = shape_of(name, spec, read.peek(chosen))
    texts: list[str] = []
    taken = disk = 0
    for file in chosen:
        got, seen = _some(file, shape, ENOUGH // len(chosen))
        texts += got
        taken, disk = taken + sum(len(text.encode()) for text in got), disk + seen
    total = sum(file.size for file in files)
    return Sample(tuple(texts), taken * total / max(1, disk), disk >= total)


def _imported(name: str, spec: SourceSpec, label: str, records: Iterable[dict[str, Any]]) -> Sample:
    """The first records of an importer, and the length of all: those of the standard library are counted, the length of
    another's is asked for."""
    known = len(records) if isinstance(records, Sized) else None
    counted = label.startswith("stdlib:")
    held: list[Record] = []
    texts: list[str] = []
    size = everything = 0.0
    shape: Shape | None = None
    iterator = iter(records)
    for i, data in enumerate(iterator, 1):
        held.append(Record(label, i, data))
        if shape is None and len(held) < 100 and known != i:
            continue
        shape = shape or shape_of(name, spec, held)
        for text in _texts(held, shape):
            everything += len(text.encode())
            if size < ENOUGH:
                texts.append(text)
                size += len(text.encode())
        held = []
        if size >= ENOUGH and not counted:
            whole = everything * known / i if known else everything
            return Sample(tuple(texts), whole, False)
    rest = list(_texts(held, shape or shape_of(name, spec, held)))
    everything += sum(len(text.encode()) for text in rest)
    return Sample((*texts, *rest), everything, everything <= size + ENOUGH)


def _some(file: File, shape: Shape, most: int) -> tuple[list[str], int]:
    """Texts from the head of a file, and how many bytes on disk they take."""
    texts: list[str] = []
    disk = size = 0
    for block in read.blocks([file], size=min(read.BLOCK, max(1 << 16, most))):
        disk += block.size
        for text in _texts(read.records(block), shape):
            texts.append(text)
            size += len(text.encode())
        if size >= most:
            break
    return texts, disk


def _texts(records: Iterable[Any], shape: Shape) -> Iterator[str]:
    for record in records:
        content = content_of(record, shape) if isinstance(record, Record) else record
        if isinstance(content, Content):
            words = [message["content"] for message in content.messages] or [content.prompt, content.answer]
            yield content.text or "\n".join(words)


def tokenizer_for(
    wanted: dict[str, Any], specs: list[tuple[str, SourceSpec, Path | None]], *, asks: dict[str, Any], cache: Path
) -> tuple[Any, bool]:
    """A tokenizer that a stage trains: the one that is there already (True), or one trained on samples only."""
    settings = tokenizer.settings(wanted)
    if not specs:
        raise UserError("tokenizer: a stage trains its tokenizer on its own data, and this one has none")
    ids = sorted(imports.content_id(spec, rows=rows) for _, spec, rows in specs)
    place = tokenizer.place_of(cache, **settings, **asks, key=ids)
    if place.exists():
        return tokenizer.load(str(place)), True
    texts = (text for name, spec, rows in specs for text in sample(name, spec, cache=cache, rows=rows).texts)
    return tokenizer.train(texts, **settings, **asks), False

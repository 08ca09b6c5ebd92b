"""Documents tokenized once, in a folder named by what they are: whole or absent, memory-mapped, never unpickled.

    <cache>/<fingerprint>/meta.json, train/, val/      a side: tokens.bin, offsets.npy, records.parquet and, where they
                                                       say something, loss.bin (u1) and bytes.bin (u4) per token
    <cache>/.<fingerprint>.work/000012.safetensors     pieces, kept if the run is cut and gone when the store is whole
    <cache>/.<fingerprint>.lock                        held by the process that builds; another waits and opens

The fingerprint is made of the source's content, the keys of its spec that decide about tokens, the tokenizer and
`NUMERICS`. Names of files stay out; their order enters.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.core.record import disk_errors, sync
from tutelage.modalities.text import pieces, read, template
from tutelage.modalities.text.encode import Encoder
from tutelage.modalities.text.fields import shape_of
from tutelage.modalities.text.imports import content_id, files_of, hash_of
from tutelage.modalities.text.pieces import BY_KEY, PLACES, VAL, Job
from tutelage.modalities.text.tokenizer import fingerprint as tokenizer_id
from tutelage.modalities.text.work import made

NUMERICS = 1  # raised by hand when the same source and tokenizer would give another store
Progress = Callable[[float, float], None]  # bytes done, bytes in all


@dataclass
class Side:
    """The documents of one side of a store, memory-mapped. N tokens, D documents."""

    folder: Path | None = None
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint16))  # [N]
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # [D + 1]: where documents begin
    loss: np.ndarray | None = None  # [N] u1: 1 where a token is learned, or measured
    bytes: np.ndarray | None = None  # [N] u4: bytes of text that a token stands for

    @classmethod
    def open(cls, folder: Path, dtype: str) -> Side:
        if not (folder / "offsets.npy").exists():
            return cls()
        columns = {name: _mapped(folder / f"{name}.bin", kind) for name, kind in kinds(dtype).items()}
        tokens = columns["tokens"]
        assert tokens is not None
        return cls(folder, tokens, np.load(folder / "offsets.npy", mmap_mode="r"), columns["loss"], columns["bytes"])


@dataclass
class Store:
    """An opened store: two sides and what was said while it was made."""

    fingerprint: str
    train: Side
    val: Side
    meta: dict[str, Any]


def build(
    name: str,
    spec: SourceSpec,
    tokenizer: Any,
    *,
    cache: Path,
    workers: int = 1,
    progress: Progress | None = None,
    rows: Path | Iterable[dict[str, Any]] | None = None,
) -> tuple[Store, Store]:
    """The stores that hold a source's training and held-out documents: one and the same for a share of documents.

    Opens what is there and makes what is not, in `workers` processes; what comes out does not depend on their number.
    Raises `UserError` when nothing usable comes out, for malformed records if they are fatal, and for a full disk.
    """
    share, apart = held_out(name, spec)
    if rows is not None and not isinstance(rows, Path):
        rows = list(rows)
    options = _Options(name, tokenizer, Path(cache).absolute(), workers, progress)
    if isinstance(spec.path, str) and spec.path.startswith("stdlib:") and share and rows is None:
        apart = spec  # it has held-out documents of its own
    if apart is None:
        both = _open_or_make(options, spec, share, rows=rows)
        return both, both
    train = _open_or_make(options, spec, 0.0, rows=rows)
    return train, _open_or_make(options, apart, 1.0, split="val")


@dataclass(frozen=True)
class _Options:
    name: str
    tokenizer: Any
    cache: Path
    workers: int
    progress: Progress | None


def held_out(name: str, spec: SourceSpec) -> tuple[float, SourceSpec | None]:
    """The share of documents that is held out, or the spec of a source that is held out as a whole."""
    value = spec.val
    if isinstance(value, str):
        try:
            value = float(value[:-1]) / 100 if value.endswith("%") else float(value)
        except ValueError:
            keep = spec.model_dump(include={"field", "template", "bad"})
            return 0.0, SourceSpec(path=str(spec.val), **keep)
    if not 0 <= value < 1:
        raise UserError(f"data.{name}: val is {spec.val}; give a share below 100% (like 1%) or a path")
    return float(value), None


def _open_or_make(
    options: _Options, spec: SourceSpec, share: float, *, rows: Any = None, split: str = "train"
) -> Store:
    origin = content_id(spec, rows=rows) if rows is None or isinstance(rows, Path) else hash_of(rows)
    keys = [NUMERICS, read.BLOCK, origin, spec.field, spec.template, share, split, tokenizer_id(options.tokenizer)]
    ends = (options.tokenizer.bos_token_id, options.tokenizer.eos_token_id)
    if ends == (None, None) and options.tokenizer.cls_token_id is not None:
        keys.append("cls")  # stores made before such documents had separators are others
    mark = hash_of(keys)
    final = options.cache / mark
    if not (final / "meta.json").exists():
        with disk_errors(options.cache):
            options.cache.mkdir(parents=True, exist_ok=True)
            with _locked(options.cache / f".{mark}.lock"):
                if not (final / "meta.json").exists():
                    _make(options, spec, share, final, *files_of(spec, cache=options.cache, rows=rows, split=split))
    meta = orjson.loads((final / "meta.json").read_bytes())
    if spec.bad == "fatal" and meta["malformed"]:
        raise _fatal(options.name, meta["places"][0])
    train, val = (Side.open(final / side, meta["dtype"]) for side in ("train", "val"))
    return Store(mark, train, val, meta)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as handle:
        # Where a file system has no locks both build; the renames at the end decide who was first.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    path.unlink(missing_ok=True)  # only where the store was made: after a failure another may hold it already


def _fatal(name: str, place: str) -> UserError:
    return UserError(f"data.{name}: {place}; mend the record or write `bad: skip`")


def _make(
    options: _Options, spec: SourceSpec, share: float, final: Path, files: list[read.File], notes: list[str]
) -> None:
    """Tokenize all blocks into pieces and join them."""
    shape = shape_of(options.name, spec, read.peek(files))
    chat = shape.kind == "chat" or (shape.kind == "pair" and spec.template in (True, "chat"))
    if chat:
        template.check(options.name, options.tokenizer)
    # A single file that is a document is known beforehand to be cut at its tail; anything else shows when it is read.
    tail = 0 < share < 1 and len(files) == 1 and files[0].kind == "document"
    job = Job(Encoder(options.tokenizer), shape, share, chat=chat, tail=tail)
    work = final.with_name(f".{final.name}.work")
    count, sides, info = _pieces(options, spec, job, files, work)
    alone = 0 < share < 1 and len(set(sides.keys.tolist())) == 1
    if alone and shape.kind == "text" and not tail:
        shutil.rmtree(work, ignore_errors=True)
        job = Job(job.encoder, shape, share, chat=chat, tail=True)
        count, sides, info = _pieces(options, spec, job, files, work)
    elif alone and shape.kind != "text":
        notes = [*notes, "a single conversation cannot be cut; nothing is held out"]
        sides = _Sides(sides.keys, np.zeros(len(sides.keys), bool), sides.used)
    meta = {
        "numerics": NUMERICS,
        "dtype": job.encoder.dtype.name,
        "shape": {"kind": shape.kind, "fields": shape.fields, "chat": chat},
        "notes": [*notes, *([shape.note] if shape.note else [])],
        "files": [[file.label, file.size] for file in files[:1000]],
        **info,
    }
    _publish(final, work, count, sides, job, meta)


@dataclass
class _Sides:
    """Which documents are held out, over all pieces."""

    keys: np.ndarray  # [D] uint64
    held: np.ndarray  # [D] bool
    used: np.ndarray  # [D] bool


def _pieces(
    options: _Options, spec: SourceSpec, job: Job, files: list[read.File], work: Path
) -> tuple[int, _Sides, dict[str, Any]]:
    """Make what pieces are missing; how many there are, who is held out, and the counts."""
    info: dict[str, Any] = {"malformed": 0, "empty": 0, "places": []}
    keys, sides, done, total, count = [], [], 0.0, float(sum(file.size for file in files)), 0
    work.mkdir(parents=True, exist_ok=True)
    for path, size in made(read.blocks(files), job, work, workers=options.workers):
        arrays, found = pieces.load(path, ("key", "side"))
        count, done = count + 1, done + size
        keys.append(arrays["key"])
        sides.append(arrays["side"])
        for what in ("malformed", "empty"):
            info[what] += found[what]
        info["places"] = (info["places"] + found["places"])[:PLACES]
        if spec.bad == "fatal" and info["malformed"]:
            raise _fatal(options.name, info["places"][0])
        if options.progress:
            options.progress(done, total)
    every = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    if not len(every):
        raise _nothing(options.name, files, info)
    return count, _decide(every, np.concatenate(sides), job), info


def _decide(keys: np.ndarray, sides: np.ndarray, job: Job) -> _Sides:
    """Who is held out: by content, so that duplicates stay together; at least one document on each side."""
    held, used = sides == VAL, np.ones(len(keys), bool)
    if job.tail:  # copies of the one document: its tail is measured once
        used[np.flatnonzero(held)[1:]] = False
    elif job.share >= 1:
        held = sides == BY_KEY
    elif job.share > 0:
        held = keys < np.uint64(job.limit)
        if not held.any():
            held = keys == keys.min()
        elif held.all():
            held = keys != keys.max()
    return _Sides(keys, held, used)


def _nothing(name: str, files: list[read.File], info: dict[str, Any]) -> UserError:
    """Why no document came out of a source."""
    where = (
        files[0].label if len(files) == 1 else f"{files[0].label} and {len(files) - 1} more files" if files else name
    )
    if info["malformed"] == 1 and len(files) == 1:
        return UserError(f"data.{name}: {info['places'][0]}; nothing in it can be used")
    if info["malformed"]:
        more = f", {info['empty']} are empty" if info["empty"] else ""
        counted = f"{info['malformed']} records are malformed{more}; the first: {info['places'][0]}"
        return UserError(f"data.{name}: nothing in {where} can be used: {counted}")
    what = "all records are empty" if info["empty"] and any(f.kind != "document" for f in files) else "it is empty"
    return UserError(f"data.{name}: {where}: {what}; give it some text")


# -- joining pieces ----------------------------------------------------------------------------------------------------


def kinds(dtype: str) -> dict[str, str]:
    """Types of a side's raw files."""
    return {"tokens": dtype, "loss": "uint8", "bytes": "uint32"}


def _mapped(path: Path, kind: str) -> np.ndarray | None:
    if not path.exists():
        return None
    if not path.stat().st_size:
        return np.zeros(0, kind)
    return np.memmap(path, kind, mode="r").view(np.ndarray)  # a bare array slices several times faster than a memmap


def _publish(final: Path, work: Path, count: int, sides: _Sides, job: Job, meta: dict[str, Any]) -> None:
    """Write the store beside, sync it, rename it; pieces stay until it is there."""
    beside = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with contextlib.ExitStack() as stack:
            train = stack.enter_context(_Writer(beside / "train", job, held=False))
            val = stack.enter_context(_Writer(beside / "val", job, held=True))
            at = 0
            for number in range(count):
                arrays, _ = pieces.load(work / pieces.name_of(number))
                here = slice(at, at := at + len(arrays["key"]))
                for writer, chosen in ((train, ~sides.held[here]), (val, sides.held[here])):
                    writer.add(arrays, np.flatnonzero(chosen & sides.used[here]))
            meta |= {"train": train.counts(), "val": val.counts()}
        (beside / "meta.json").write_bytes(orjson.dumps(meta, option=orjson.OPT_INDENT_2))
        for path in sorted(beside.rglob("*")):
            sync(path)
        try:
            os.rename(beside, final)
        except OSError:
            if not (final / "meta.json").exists():  # otherwise another process was first, with the same store
                raise
        sync(final.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


class _Writer:
    """One side of a store, written piece by piece."""

    def __init__(self, folder: Path, job: Job, *, held: bool) -> None:
        import pyarrow as pa

        self.folder, self.held = folder, held
        self.lengths: list[np.ndarray] = []
        self.size = 0
        self.schema = pa.schema(
            {"file": pa.string(), "line": pa.int64(), "id": pa.string(), "bytes": pa.int64(), "meta": pa.string()}
        )
        wanted = ["tokens", *(["loss"] if held or job.masked else []), *(["bytes"] if held else [])]
        self.wanted = {name: f"val_{name}" if held and name != "tokens" else name for name in wanted}

    def __enter__(self) -> _Writer:
        import pyarrow.parquet as pq

        self.folder.mkdir(parents=True)
        self.streams = {name: open(self.folder / f"{name}.bin", "wb") for name in self.wanted}  # noqa: SIM115
        self.table = pq.ParquetWriter(self.folder / "records.parquet", self.schema, compression="zstd")
        return self

    def add(self, arrays: dict[str, np.ndarray], chosen: np.ndarray) -> None:
        """Append the chosen documents of a piece."""
        import pyarrow as pa

        if not len(chosen):
            return
        length = arrays["length"]
        stops = {"tokens": np.cumsum(length), "val": np.cumsum(length * (arrays["measured"] > 0))}
        for name, column in self.wanted.items():
            end = stops["val" if column.startswith("val_") else "tokens"]
            flat = arrays[column]
            if len(chosen) == len(length):
                self.streams[name].write(flat.data)
                continue
            assert not column.startswith("val_") or (arrays["measured"][chosen] > 0).all()
            for start, stop in zip(end[chosen] - length[chosen], end[chosen], strict=True):
                self.streams[name].write(flat[start:stop].data)
        self.lengths.append(length[chosen])
        self.size += int(arrays["size"][chosen].sum())
        rows = orjson.loads(arrays["records"].tobytes())
        picked = [rows[i] for i in chosen.tolist()]
        columns = {
            "file": [row[0] for row in picked],
            "line": [row[1] for row in picked],
            "id": [row[2] for row in picked],
            "bytes": arrays["size"][chosen],
            "meta": [orjson.dumps(row[3]).decode() for row in picked],
        }
        self.table.write_table(pa.table(columns, schema=self.schema))

    def counts(self) -> dict[str, int]:
        return {
            "documents": sum(map(len, self.lengths)),
            "tokens": int(sum(length.sum() for length in self.lengths)),
            "bytes": self.size,
        }

    def __exit__(self, *error: object) -> None:
        for stream in self.streams.values():
            stream.close()
        self.table.close()
        lengths = np.concatenate(self.lengths) if self.lengths else np.zeros(0, np.int64)
        np.save(self.folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

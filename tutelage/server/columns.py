"""The numbers of a metrics file as columns: appended to, cut back, and looked at through a window a few pixels wide.

Rows come in chunks. The newest grows in memory; a full one is written to the index (`runs/.index/`, which may be deleted)
and read from there again, so that memory holds of a long run only what an overview is made of: the least and the greatest
of every 128 rows, and what is not finite.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CHUNK = 32_768  # rows
BUCKET = 128  # rows of which an overview keeps the least and the greatest
AXES = ("tick", "step", "tokens")
FORMAT = "1"  # of the index
_ODD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


class Part(NamedTuple):
    """Some points of one series: rows (counted from the file's first line), values, and where training stood."""

    row: Ints
    value: Floats
    axes: Ints  # (3, n): tick, step, tokens


# -- choosing points --------------------------------------------------------------------------------------------------


def thin(row: Ints, value: Floats, *, width: int) -> Ints:
    """Which points to keep, as rising indices into the arrays, so that `width` buckets of rows show every spike.

    Of each bucket the least and the greatest; the first and the last point; every point that is not finite, of an
    unbroken row of the same (all NaN, say) its two ends. Where those alone are more than 4 · `width`: of each bucket the
    first of each kind.
    """
    if len(row) <= 2 * width:
        return np.arange(len(row))
    bucket = (row - row[0]) * width // (row[-1] - row[0] + 1)
    finite = np.isfinite(value)
    inside = np.flatnonzero(finite)
    kept = [np.array([0, len(row) - 1]), _odd(bucket, value, np.flatnonzero(~finite), limit=4 * width)]
    if len(inside):
        kept += [inside[_first_least(bucket[inside], sign * value[inside])] for sign in (1, -1)]
    return np.unique(np.concatenate(kept))


def _first_least(bucket: Ints, value: Floats) -> Ints:
    """Of each bucket (rising) the index of its least value."""
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    least = np.minimum.reduceat(value, starts)
    here = np.flatnonzero(value == np.repeat(least, np.diff(starts, append=len(bucket))))
    return here[np.unique(bucket[here], return_index=True)[1]]


def _odd(bucket: Ints, value: Floats, at: Ints, *, limit: int) -> Ints:
    if not len(at):
        return at
    kind = np.where(np.isnan(value[at]), 0, np.sign(value[at])).astype(np.int64)
    same = (np.diff(at) == 1) & (np.diff(kind) == 0)
    kept = at[~(np.append(False, same) & np.append(same, False))]
    if len(kept) <= limit:
        return kept
    return at[np.unique(bucket[at] * 3 + kind, return_index=True)[1]]


# -- chunks -----------------------------------------------------------------------------------------------------------


class Growing:
    """The newest rows, in memory. A column has the rows where it has a value."""

    def __init__(self) -> None:
        self.axes = {name: array("q") for name in AXES}
        self.crc = array("I")
        self.cols: dict[str, tuple[array[int], array[float]]] = {}

    def __len__(self) -> int:
        return len(self.crc)

    def extend(self, rows: Sequence[dict[str, Any]], crc: Iterable[int]) -> None:
        """Add rows; stretches of rows with the same keys are added column by column."""
        at, crcs = len(self.crc), list(crc)
        for _, group in itertools.groupby(rows, key=_shape):
            stretch = list(group)
            self._axes(stretch, at)
            for name, values in _columns(stretch):
                self._put(name, at, values)
            at += len(stretch)
        self.crc.extend(crcs)

    def _axes(self, rows: list[dict[str, Any]], at: int) -> None:
        for name, held in self.axes.items():
            try:
                held.extend([row[name] for row in rows])
            except (KeyError, TypeError, OverflowError):  # a broken line, or a row that does not say: as before it
                del held[at:]
                for row in rows:
                    value = row.get(name)
                    held.append(value if type(value) is int and abs(value) < 1 << 62 else held[-1] if held else 0)

    def _put(self, name: str, at: int, values: list[Any]) -> None:
        where, held = self.cols.setdefault(name, (array("I"), array("d")))
        try:
            held.extend(values)
            where.extend(range(at, at + len(values)))
        except (
            TypeError,
            OverflowError,
        ):  # somewhere a NaN, which is a string in the file, or something that is no number
            del held[len(where) :]
            for i, value in enumerate(map(_number, values), at):
                if value is not None:
                    where.append(i)
                    held.append(value)

    def column(self, name: str) -> tuple[Ints, Floats]:
        """Rows within the chunk, and values. Copies: an array that is looked at cannot grow."""
        where, held = self.cols.get(name, (array("I"), array("d")))
        return np.array(where, dtype=np.int64), np.array(held, dtype=np.float64)

    def all_axes(self) -> Ints:
        return np.array([self.axes[name] for name in AXES], dtype=np.int64).reshape(3, -1)


@dataclass
class Chunk:
    """Rows that are full: in the index, or in memory where that cannot be written.

    first: its first row; end: the offset in the metrics file behind its last line; check: a hash of the bytes before that.
    """

    first: int
    n: int
    end: int
    check: int
    ticks: tuple[int, int]
    file: Any  # of the index, open: it may be deleted and is still there for us
    held: dict[str, Any] = field(default_factory=dict)
    overview: dict[str, Part] = field(default_factory=dict)

    def arrays(self, names: Sequence[str]) -> list[Any]:
        """Arrays by name, of the index or from memory; None for those that it has not."""
        if self.file is None:
            return [self.held.get(name) for name in names]
        have = set(self.file.keys())
        return [self.file.get_tensor(name) if name in have else None for name in names]

    def column(self, name: str) -> tuple[Ints, Floats]:
        values, where = self.arrays([f"value/{name}", f"row/{name}"])
        if values is None:
            return np.empty(0, np.int64), np.empty(0)
        return (np.arange(self.n) if where is None else where.astype(np.int64)), values

    def all_axes(self) -> Ints:
        return np.asarray(self.arrays(["axes"])[0])

    def part(self, name: str) -> Part:
        """The overview of a column."""
        return self.overview.get(name) or Part(np.empty(0, np.int64), np.empty(0), np.empty((3, 0), np.int64))


def sealed(rows: Growing, *, first: int, end: int, check: int, place: Path | None) -> Chunk:
    """A full chunk: written to `place` in the index, if that can be written."""
    axes = rows.all_axes()
    held: dict[str, Any] = {"axes": axes, "crc": np.array(rows.crc, dtype=np.uint32)}
    for name in rows.cols:
        where, values = rows.column(name)
        kept = thin(where, values, width=max(1, len(rows) // BUCKET))
        held |= {f"value/{name}": values, f"few/{name}": where[kept].astype(np.uint32), f"least/{name}": values[kept]}
        if len(where) < len(rows):
            held[f"row/{name}"] = where.astype(np.uint32)
    about = {"format": FORMAT, "first": str(first), "n": str(len(rows)), "end": str(end), "check": str(check)}
    file = _written(place, held, about) if place else None
    chunk = Chunk(first, len(rows), end, check, (int(axes[0, 0]), int(axes[0, -1])), file, {} if file else held)
    _fill_overview(chunk, held)
    return chunk


def _written(place: Path, held: dict[str, Any], about: dict[str, str]) -> Any:
    beside = place.with_name(f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(held, beside, metadata=about)
        os.replace(beside, place)
        return safe_open(place, framework="np")
    except (OSError, SafetensorError):  # no space, no right to write: memory has to do
        with contextlib.suppress(OSError):
            beside.unlink()
        return None


def opened(place: Path, *, first: int) -> Chunk | None:
    """A chunk of the index whose first row is `first`; None where it is not there or is not whole."""
    try:
        file = safe_open(place, framework="np")
        about = file.metadata() or {}
        if about.get("format") != FORMAT or int(about["first"]) != first:
            return None
        few = [name for name in file.keys() if name.startswith(("few/", "least/"))]  # noqa: SIM118  no dict
        held = {name: file.get_tensor(name) for name in ["axes", *few]}
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    ticks = (int(held["axes"][0, 0]), int(held["axes"][0, -1]))
    chunk = Chunk(first, int(about["n"]), int(about["end"]), int(about["check"]), ticks, file)
    _fill_overview(chunk, held)
    return chunk


def _fill_overview(chunk: Chunk, held: dict[str, Any]) -> None:
    for key, where in held.items():
        kind, _, name = key.partition("/")
        if kind == "few":
            rows = where.astype(np.int64)
            chunk.overview[name] = Part(rows + chunk.first, held[f"least/{name}"], held["axes"][:, rows])


# -- rows of the file -------------------------------------------------------------------------------------------------


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    weights, values = row.get("weights"), row.get("values")
    inner = tuple(weights) if type(weights) is dict else (), tuple(values) if type(values) is dict else ()
    return row.get("kind"), tuple(row), inner


def _columns(rows: list[dict[str, Any]]) -> Iterable[tuple[str, list[Any]]]:
    """Columns of rows with the same keys: what is a number, the shares of sources, and what was measured."""
    first = rows[0]
    if first.get("kind") == "train":
        for key, value in first.items():
            if key in ("kind", "tick", "step") or isinstance(value, (dict, list)):
                continue
            values = list(map(itemgetter(key), rows))
            if _number(value) is not None or any(_number(value) is not None for value in values):
                yield key, values
        yield from _inner(rows, "weights", "weights/")
    elif first.get("kind") == "eval":
        yield "eval/seconds", [row.get("seconds") for row in rows]
        yield from _inner(rows, "values", "eval/")


def _inner(rows: list[dict[str, Any]], key: str, prefix: str) -> Iterable[tuple[str, list[Any]]]:
    for name in rows[0][key] if isinstance(rows[0].get(key), dict) else ():
        yield prefix + name, [row[key][name] for row in rows]


def _number(value: Any) -> float | None:
    """None for what is no number; the file's `nan`, `inf` and `-inf` are."""
    if isinstance(value, str):
        return _ODD.get(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

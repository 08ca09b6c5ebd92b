"""What a run looks like in few numbers: for readers that pay by the word, such as agents. Only reads, no torch.

Every answer is bounded, however long the run is. A curve is a list of means over equal stretches of the metrics file;
of a file too large to read, over a sample of lines at equally spaced places in it.
"""

from __future__ import annotations

import math
import mmap
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

from tutelage.base.errors import UserError, did_you_mean
from tutelage.core.record import opened

WHOLE = 8_000_000  # bytes: a metrics file up to this size is read whole
PIECE = 32_768  # bytes read at each place of a larger one
USUAL = ("loss", "grad_norm", "lr")
POINTS = 500  # at most, in one answer
_EVAL = b'{"kind":"eval"'
_HIDDEN = frozenset({"kind", "cursors", "owed", "weights", "seconds"})


def curve(folder: Path, names: list[str], *, since: int = 0, points: int = 50) -> list[dict[str, Any]]:
    """Numbers of training as at most `points` (≤ 500) means, oldest first, from tick `since` on.

    A point is {"tick", "step", "of": lines averaged, name: mean}: tick and step are those of its last line. A number that
    was not finite is left out of its mean and counted under "not_finite". Names are those of a `train` line (`loss`,
    `grad_norm`, `lr`, `tokens_per_second`, …) and `weights.<source>`; UserError for others.
    """
    if not 1 <= points <= POINTS:
        raise UserError(f"points: {points} is not between 1 and {POINTS}")
    pieces = _pieces(folder / "metrics.jsonl", points, since)
    known = sorted({name for piece in pieces[-1:] for row in piece[-1:] for name in _numbers(row)})
    for name in names:
        if known and name not in known and not any(name in _numbers(row) for piece in pieces for row in piece):
            raise UserError(
                f"nothing called '{name}' was recorded{did_you_mean(name, known)} (there are: {', '.join(known)})"
            )
    return [_point(piece, names) for piece in pieces]


def evals(folder: Path, *, last: int = 20) -> list[dict[str, Any]]:
    """The newest measurements, oldest first: {"tick", "step", "final", "values"}."""
    path = folder / "metrics.jsonl"
    if not path.exists() or not path.stat().st_size:
        return []
    found: list[dict[str, Any]] = []
    with opened(path) as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n") + 1  # a line cut by a crash is left out
        while len(found) < last and (at := text.rfind(_EVAL, 0, end)) >= 0:
            if at == 0 or text[at - 1] == 10:
                row = orjson.loads(text[at : text.find(b"\n", at)])
                found.append({key: row.get(key) for key in ("tick", "step", "final", "values")})
            end = at
    return found[::-1]


def latest(folder: Path) -> dict[str, Any]:
    """The newest line of training; {} where there is none yet."""
    lines = _lines(folder / "metrics.jsonl", -4 * PIECE, 4 * PIECE)
    return next((row for row in reversed(lines) if row.get("kind") == "train"), {})


def _pieces(path: Path, points: int, since: int) -> list[list[dict[str, Any]]]:
    """`train` lines in file order, in at most `points` pieces."""
    size = path.stat().st_size if path.exists() else 0
    if size <= WHOLE:
        rows = _train(_lines(path, 0, size), since)
        cuts = [round(i * len(rows) / points) for i in range(points + 1)]
        return [rows[a:b] for a, b in pairwise(cuts) if b > a]
    start = _place(path, since, size)
    places = [start + round(i * max(0, size - PIECE - start) / max(1, points - 1)) for i in range(points)]
    found = (_train(_lines(path, place, PIECE), since) for place in sorted(set(places)))
    return [piece for piece in found if piece]


def _place(path: Path, since: int, size: int) -> int:
    """About where the lines from tick `since` on begin: ticks only rise, so half of what is left is cut off each time."""
    low, high = 0, size
    while high - low > PIECE:
        middle = (low + high) // 2
        rows = _train(_lines(path, middle, PIECE), 0)
        if rows and rows[-1]["tick"] < since:
            low = middle
        else:
            high = middle
    return low


def _train(rows: list[dict[str, Any]], since: int) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("kind") == "train" and row["tick"] >= since]


def _lines(path: Path, at: int, count: int) -> list[dict[str, Any]]:
    """The whole lines within `count` bytes of a file from byte `at` (from its end, if negative)."""
    if not path.exists():
        return []
    with opened(path) as handle:
        size = handle.seek(0, os.SEEK_END)
        at = max(0, size + at) if at < 0 else at
        handle.seek(at)
        data = handle.read(count)
    first = 0 if at == 0 else data.find(b"\n") + 1
    return [orjson.loads(line) for line in data[first : data.rfind(b"\n") + 1].splitlines() if line.strip()]


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """What of a line can be drawn: numbers, also those that are not finite, which are kept as text."""
    found = {k: v for k, v in row.items() if k not in _HIDDEN and (isinstance(v, (int, float)) or _odd(v))}
    return found | {f"weights.{name}": share for name, share in (row.get("weights") or {}).items()}


def _odd(value: Any) -> bool:
    return value in ("nan", "inf", "-inf")


def _point(rows: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    point: dict[str, Any] = {"tick": rows[-1]["tick"], "step": rows[-1]["step"], "of": len(rows)}
    numbers = [_numbers(row) for row in rows]
    for name in names:
        values = [found[name] for found in numbers if name in found]
        finite = [float(v) for v in values if not _odd(v)]
        point[name] = float(f"{math.fsum(finite) / len(finite):.6g}") if finite else None
        if len(finite) < len(values):
            point["not_finite"] = point.get("not_finite", 0) + len(values) - len(finite)
    return point

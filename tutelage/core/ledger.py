"""What a stage's folder says: numbers, curves, texts, and what was done to it. Reads files alone, also of a live run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from tutelage.base.clock import Span
from tutelage.core.record import each_line, read_lines
from tutelage.core.tally import Tally
from tutelage.core.words import finite, number

BITS = "bits_per_byte/"
_FEW = re.compile(r"bits_per_byte@(\d+)/(.+)")  # of the first rows only: those that every measurement has
_OURS = ("engine", "recipe")  # who writes to a journal without steering the run


class Point(NamedTuple):
    """A measurement of one column: where the stage stood (training seconds, measuring apart) and bits per byte."""

    step: float
    tokens: float
    flops: float
    seconds: float
    bits: float


@dataclass
class Ledger:
    """One stage's folder, read. Absent files are empty: a stage that was never begun has nothing."""

    folder: Path | None
    train: Tally = field(default_factory=Tally)
    evals: list[dict[str, Any]] = field(default_factory=list)  # measurements, without their texts
    journal: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, dict[str, str]] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)  # of the newest measurement
    _times: dict[float, float] = field(default_factory=dict)  # tick of a measurement: training seconds

    def add(self, row: dict[str, Any]) -> None:
        """Take in a row of the metrics."""
        if row.get("kind") == "train":
            self.train.add(row)
            if self._times and number(row["tick"]) <= max(self._times):
                self._times.clear()  # out of order: looked up in the tally
        elif row.get("kind") == "eval":
            self._say(row)
            self.evals.append({key: value for key, value in row.items() if key != "texts"})
            if self.train.last and number(self.train.last["tick"]) <= number(row["tick"]):
                self._times[number(row["tick"])] = self.train.seconds

    def _say(self, row: dict[str, Any]) -> None:
        """Keep what the model wrote when the stage began and when it was last asked, and what probes last said."""
        when = "start" if row["step"] == 0 and not row.get("final") else "end"
        self.words = {}
        for key, text in row.get("texts", {}).items():
            if key.startswith("sample/"):
                self.samples.setdefault(key.removeprefix("sample/"), {})[when] = text
            else:
                self.words[key] = text

    @property
    def seed(self) -> int | None:
        found = self.about.get("parts", {}).get("seed", self.about.get("stage", {}).get("seed"))
        return None if found is None else int(found)

    @property
    def done(self) -> bool:
        return self.folder is not None and (self.folder / "artifact").exists()

    # -- bits per byte ----------------------------------------------------------------------------------------------

    @property
    def final(self) -> dict[str, float]:
        """Bits per byte by column at the stage's end; empty before it."""
        row = next((row for row in reversed(self.evals) if row.get("final")), None)
        return self.values(row, BITS) if row else {}

    @property
    def first(self) -> dict[str, float]:
        """Bits per byte by column before the first step."""
        row = self.evals[0] if self.evals else None
        return self.values(row, BITS) if row and row["step"] == 0 and not row.get("final") else {}

    def last(self, prefix: str) -> dict[str, float]:
        """The newest measurement's numbers under a prefix."""
        return self.values(self.evals[-1], prefix) if self.evals else {}

    @staticmethod
    def values(row: dict[str, Any], prefix: str) -> dict[str, float]:
        return {k.removeprefix(prefix): number(v) for k, v in row["values"].items() if k.startswith(prefix)}

    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.evals for name in self.values(row, BITS)))

    def curve(self, column: str) -> list[Point]:
        """A column over the stage. Of a thorough measurement only the rows that the others have too."""
        points = []
        for row in self.evals:
            few = [_FEW.fullmatch(key) for key in row["values"]]
            keys = sorted((int(m[1]), m[0]) for m in few if m and m[2] == column)
            key = keys[0][1] if keys else BITS + column
            if key in row["values"]:
                where = (number(row["step"]), number(row["tokens"]), number(row["flops"]))
                points.append(Point(*where, self.seconds_at(row["tick"]), number(row["values"][key])))
        return points

    # -- cost -------------------------------------------------------------------------------------------------------

    def seconds_at(self, tick: float) -> float:
        """Training seconds up to a tick; exact for that of a measurement."""
        return self._times[tick] if tick in self._times else self.train.at(tick)

    def cost(self) -> dict[str, Any]:
        """Counts of the whole stage; seconds of measuring apart from those of training."""
        last, training = self.train.last, self.train.seconds
        inside = sum(number(row["seconds"]) for row in self.evals if not row.get("final"))
        final = sum(number(row["seconds"]) for row in self.evals if row.get("final"))
        return {
            **{key: last.get(key, 0) for key in ("step", "tokens", "samples", "epochs")},
            "flops": last.get("flops", self.evals[-1]["flops"] if self.evals else 0),
            "seconds": training,
            "seconds_measuring": inside,
            "seconds_measuring_final": final,
            "tokens_per_second": self.train.grown / training if training else None,
            "padding": self.train.padded / self.train.slots if self.train.slots else None,
            "memory": self.train.memory,
        }

    def measuring(self) -> dict[str, Any]:
        """How often was measured, what was planned, and the share of training time it took (the last one apart)."""
        cost = self.cost()
        note = next((act for _, act in self._acts("engine") if act["do"] == "thin"), None)
        kept = len(note["steps"]) if note else len(self.evals)
        planned = note["planned"] if note else None
        spec = self.about.get("stage", {}).get("evals", {})
        return {
            "planned": planned,
            "kept": kept,
            "thinned": bool(planned and planned > kept),
            "share": cost["seconds_measuring"] / cost["seconds"] if cost["seconds"] else None,
            "budget": Span.parse(spec["budget"]).share if "budget" in spec else None,
        }

    # -- what was done and seen -------------------------------------------------------------------------------------

    def _acts(self, by: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [(line, act) for line in reversed(self.journal) if line["by"] == by for act in line["do"]]

    def steering(self) -> list[dict[str, Any]]:
        """What people, agents and policies did: tick, by whom, what, why."""
        return [
            {"tick": line["tick"], "by": line["by"], "do": line["do"], "why": line.get("why", "")}
            for line in self.journal
            if line["by"] not in _OURS
        ]

    def alarms(self) -> list[dict[str, Any]]:
        """Measurements at which a column was forgotten beyond what the recipe allows."""
        return [
            {
                "step": row["step"],
                "tokens": row["tokens"],
                "column": column,
                "forgetting": self.values(row, "forgetting/").get(column),
            }
            for row in self.evals
            for column, value in self.values(row, "alarm/").items()
            if finite(value) and value > 0
        ]


def read(folder: Path | None, *, until: int | None = None) -> Ledger:
    """Read a stage's folder (up to a step); the copies beside its artifact serve where the folder's own files are gone.

    Metrics are summed up row by row: a long stage takes no more memory than a short one.
    """
    if folder is None:
        return Ledger(None)

    def place(name: str) -> Path:
        own = folder / name
        return own if own.exists() else folder / "artifact" / name

    path = folder / "stage.json"
    about = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    book = Ledger(folder, train=Tally(until), journal=read_lines(place("journal.jsonl")), about=about)
    for row in each_line(place("metrics.jsonl")):
        book.add(row)
    return book


def parameters(folder: Path) -> int | None:
    """Number of parameters in a folder of safetensors, from the headers."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total or None


def rising(points: Sequence[Point], key: Callable[[Point], float]) -> list[Point]:
    """The points that count in the end, along an axis: what a rollback took back is left out, and what is no number."""
    kept: list[Point] = []
    for point in reversed([p for p in points if finite(p.bits) and finite(key(p))]):
        if not kept or key(point) < key(kept[-1]):
            kept.append(point)
    return kept[::-1]


def read_at(points: Sequence[Point], budget: float, *, key: Callable[[Point], float]) -> float | None:
    """Bits per byte at a budget, linear between measurements; None outside what was measured."""
    line = rising(points, key)
    if not line or not finite(budget) or budget > key(line[-1]) * (1 + 1e-6) or budget < key(line[0]):
        return None
    for before, after in pairwise(line):
        if budget <= key(after):
            share = (budget - key(before)) / (key(after) - key(before))
            return before.bits + share * (after.bits - before.bits)
    return line[-1].bits


def first_at(points: Sequence[Point], quality: float, *, key: Callable[[Point], float]) -> float | None:
    """The budget at which bits per byte first come down to `quality`, linear between measurements."""
    line = rising(points, key)
    if not line:
        return None
    if line[0].bits <= quality:
        return key(line[0])
    for before, after in pairwise(line):
        if after.bits <= quality:
            share = (before.bits - quality) / (before.bits - after.bits)
            return key(before) + share * (key(after) - key(before))
    return None

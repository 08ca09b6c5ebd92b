"""Two runs side by side at equal compute: differences paired by seed, and what each needs to get equally far."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tutelage.base.errors import UserError, did_you_mean
from tutelage.core import pages, words
from tutelage.core.ledger import Ledger, Point, first_at, parameters, read, read_at, rising
from tutelage.core.record import dumps, write_whole
from tutelage.core.stats import paired

AXES: dict[str, Callable[[Point], float]] = {
    "tokens": lambda p: p.tokens,
    "flops": lambda p: p.flops,
    "seconds": lambda p: p.seconds,
}
SAME = 0.01  # budgets within a percent count as equal


@dataclass
class Side:
    """One stage of one seed, with what was spent before it where that counts."""

    folder: Path
    book: Ledger
    before: dict[str, float]

    def curve(self, column: str) -> list[Point]:
        own = self.book.curve(column)
        add = self.before
        return [
            Point(p.step, p.tokens + add["tokens"], p.flops + add["flops"], p.seconds + add["seconds"], p.bits)
            for p in own
        ]

    def spent(self, axis: str) -> float:
        return words.number(self.book.cost()[axis]) + self.before[axis]


# -- finding ----------------------------------------------------------------------------------------------------------


def find(target: str | Path, *, runs: Path = Path("runs")) -> Path:
    """The stage's folder that a name means: a folder itself, `recipe/stage`, `recipe/stage/2`, or a recipe's last model.

    UserError lists what there is.
    """
    path = next((p for p in (Path(target), runs / target) if p.is_dir()), None)
    if path is None:
        known = sorted("/".join(p.parent.parts[-3:-1]) for p in runs.glob("*/*/*/stage.json"))
        raise UserError(f"no run '{target}' here or under {runs}{did_you_mean(str(target), known)}")
    if (path / "stage.json").exists():
        return path
    numbered = _numbered(path)
    if numbered:
        return numbered[-1]
    made = [found[-1] for home in sorted(path.iterdir()) if home.is_dir() and (found := _numbered(home))]
    models = [p for p in made if (p / "metrics.jsonl").exists()]
    used = {name for p in models for name, _ in _starts(p)}
    ends = [p for p in models if json.loads((p / "stage.json").read_text())["fingerprint"] not in used]
    if len(ends) != 1:
        names = ", ".join(f"{path.name}/{p.parent.name}" for p in ends) or "none"
        raise UserError(f"{path} has {len(ends)} last models; name one stage: {names}")
    return ends[0]


def _numbered(home: Path) -> list[Path]:
    found = [p for p in home.iterdir() if p.name.isdigit() and (p / "stage.json").exists()]
    return sorted(found, key=lambda p: int(p.name))


def _starts(folder: Path) -> list[tuple[str, int | None]]:
    """Fingerprint (and step, where one is named) of every stage that a stage started from."""
    parts = json.loads((folder / "stage.json").read_text(encoding="utf-8")).get("parts", {})
    found = [start for start in parts.get("start", []) if isinstance(start, list)]
    return [(str(start[0]), int(start[2]) if len(start) > 2 else None) for start in found]


def lineage(folder: Path) -> dict[str, float]:
    """What was spent on the stages that a stage's weights come from, each counted once. UserError if one is gone."""
    runs = folder.resolve().parents[2]
    places = {json.loads(p.read_text())["fingerprint"]: p.parent for p in sorted(runs.glob("*/*/*/stage.json"))}
    spent, seen, queue = dict.fromkeys(AXES, 0.0), set(), _starts(folder)
    while queue:
        name, step = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in places:
            raise UserError(f"{folder} starts from a stage that is not under {runs} any more, so its cost is unknown")
        train = read(places[name], until=step).train
        if train.last:
            spent["tokens"] += words.number(train.last["tokens"])
            spent["flops"] += words.number(train.last["flops"])
            spent["seconds"] += train.seconds
        queue += _starts(places[name])
    return spent


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(a: Sequence[Path], b: Sequence[Path], *, names: tuple[str, str] = ("A", "B")) -> dict[str, Any]:
    """Compare stages' folders, `a` and `b` paired by seed (one of each is a pair whatever its seed).

    Differences are B minus A in bits per byte, intervals paired-t at 95 %. Both are read at the smaller of the two
    budgets. Ratios are B's need over A's to reach the worse one's last quality: below 1, B is faster. Where the two
    do not start from the same weights, what was spent on the way there counts too.
    """
    couples, unpaired = _couples([read(p) for p in a], [read(p) for p in b], names)
    whole = any(
        one.about["parts"].get("start") != two.about["parts"].get("start") for one, two in (c[1:] for c in couples)
    )
    sides = [(seed, _side(one, whole), _side(two, whole)) for seed, one, two in couples]
    columns = [c for c in sides[0][1].book.columns() if all(c in s.book.columns() for _, *pair in sides for s in pair)]
    sizes = [size for _, *pair in sides for s in pair if (size := parameters(s.folder / "artifact" / "model"))]
    seeds = [seed for seed, *_ in sides]
    return {
        "a": {"name": names[0], "folders": [str(one.folder) for _, one, _ in sides]},
        "b": {"name": names[1], "folders": [str(two.folder) for _, _, two in sides]},
        "seeds": seeds,
        "unpaired": unpaired,
        "whole": whole,
        "parameters": sorted(set(sizes)),
        "unfinished": [str(s.folder) for _, *pair in sides for s in pair if not s.book.done],
        "budgets": {axis: _budget(sides, axis) for axis in AXES},
        "columns": {column: _column(sides, column) for column in columns},
        "curves": {
            column: {
                f"{name}{f', seed {seed}' if len(sides) > 1 else ''}": [[p.tokens, p.bits] for p in side.curve(column)]
                for seed, *pair in sides
                for name, side in zip(names, pair, strict=True)
            }
            for column in columns
        },
    }


def _couples(
    a: list[Ledger], b: list[Ledger], names: tuple[str, str]
) -> tuple[list[tuple[int | None, Ledger, Ledger]], list[str]]:
    if len(a) == len(b) == 1:
        return [(a[0].seed, a[0], b[0])], []
    found: list[dict[int | None, Ledger]] = []
    for name, books in zip(names, (a, b), strict=True):
        by_seed = {book.seed: book for book in books}
        if len(by_seed) < len(books):
            raise UserError(f"{name}: two runs have the same seed; give one run for each")
        found.append(by_seed)
    both = sorted((seed for seed in found[0] if seed in found[1]), key=str)
    if not both:
        raise UserError(f"{names[0]} and {names[1]} have no seed in common, so no two runs can be paired")
    alone = [str(book.folder) for side in found for seed, book in side.items() if seed not in both]
    return [(seed, found[0][seed], found[1][seed]) for seed in both], alone


def _side(book: Ledger, whole: bool) -> Side:
    assert book.folder is not None
    return Side(book.folder, book, lineage(book.folder) if whole else dict.fromkeys(AXES, 0.0))


def _budget(sides: list[tuple[Any, Side, Side]], axis: str) -> dict[str, Any]:
    a, b = ([side.spent(axis) for side in column] for column in list(zip(*sides, strict=True))[1:])
    differ = any(max(x, y) > min(x, y) * (1 + SAME) for x, y in zip(a, b, strict=True))
    return {"a": sum(a) / len(a), "b": sum(b) / len(b), "differ": differ}


def _column(sides: list[tuple[Any, Side, Side]], column: str) -> dict[str, Any]:
    ends = [(one.book.final.get(column), two.book.final.get(column)) for _, one, two in sides]
    curves = [(one.curve(column), two.curve(column)) for _, one, two in sides]
    found: dict[str, Any] = {"final": _difference(ends)}
    for axis in ("tokens", "flops"):
        key = AXES[axis]
        values = []
        for pair in curves:
            reach = [max((key(p) for p in rising(curve, key)), default=math.nan) for curve in pair]
            values.append(tuple(read_at(curve, min(reach), key=key) for curve in pair))
        found[f"equal_{axis}"] = _difference(values)
    found["to_quality"] = {axis: _ratio(curves, axis) for axis in AXES}
    return found


def _difference(values: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Means of both sides and the paired difference, over the seeds where both have a number."""
    both = [(float(x), float(y)) for x, y in values if words.finite(x) and words.finite(y)]
    if not both:
        return {"a": None, "b": None, "difference": None}
    a, b = (sum(side) / len(both) for side in zip(*both, strict=True))
    return {"a": a, "b": b, "difference": paired([y - x for x, y in both]).as_dict()}


def _ratio(curves: Sequence[tuple[list[Point], list[Point]]], axis: str) -> dict[str, Any] | None:
    """B's need over A's to come down to the worse one's last quality; over seeds the geometric mean and its interval."""
    key, logs = AXES[axis], []
    for pair in curves:
        last = [curve[-1].bits for curve in pair if curve and words.finite(curve[-1].bits)]
        needs = [first_at(curve, max(last), key=key) for curve in pair] if len(last) == 2 else []
        if len(needs) == 2 and needs[0] and needs[1]:
            logs.append(math.log(needs[1] / needs[0]))
    if not logs:
        return None
    found = paired(logs)
    low, high = (None if v is None else math.exp(v) for v in (found.low, found.high))
    return {"ratio": math.exp(found.mean), "low": low, "high": high, "n": found.n}


# -- showing ----------------------------------------------------------------------------------------------------------


def said(data: dict[str, Any]) -> str:
    """Seeds, size, what is counted: shown with every table."""
    seeds = data["seeds"]
    many = f"one seed ({seeds[0]}): a difference may be chance" if len(seeds) == 1 else f"{len(seeds)} paired seeds"
    size = " to ".join(words.amount(size) for size in data["parameters"]) or "unknown"
    counted = "the whole line of stages counts" if data["whole"] else "same start: this stage alone counts"
    return f"{many}; {size} parameters; {counted}"


def rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The table flat: a row for each column and budget, then the ratios."""
    flat: list[dict[str, Any]] = []
    for column, found in data["columns"].items():
        for at in ("final", "equal_tokens", "equal_flops"):
            paired_found = found[at]["difference"] or {}
            spread = {key: paired_found.get(key) for key in ("mean", "low", "high", "n")}
            flat.append({"source": column, "at": at, "a": found[at]["a"], "b": found[at]["b"], **spread})
        for axis, ratio in found["to_quality"].items():
            spread = {key: (ratio or {}).get(key) for key in ("low", "high", "n")}
            mean = (ratio or {}).get("ratio")
            flat.append({"source": column, "at": f"{axis}_to_quality", "a": None, "b": None, "mean": mean, **spread})
    return flat


def write(data: dict[str, Any], folder: Path) -> None:
    """Write compare.html, compare.json and compare.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    out = io.StringIO()
    table = csv.DictWriter(out, ["source", "at", "a", "b", "mean", "low", "high", "n"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows(data))
    write_whole(folder / "compare.csv", out.getvalue())
    write_whole(folder / "compare.json", dumps(data) + "\n")
    write_whole(folder / "compare.html", pages.comparison(data, said=said(data)))


def short(data: dict[str, Any]) -> Group:
    """For the terminal."""
    a, b = data["a"]["name"], data["b"]["name"]
    table = Table(title=f"{b} against {a}: bits per byte, lower is better", title_justify="left")
    for head in ("source", a, b, "difference", "95 % interval", "tokens to quality", "FLOPs", "time"):
        table.add_column(head, justify="left" if head == "source" else "right")
    for column, found in data["columns"].items():
        here = found["equal_flops"]
        gap = here["difference"] or {}
        ratios = [pages.ratio(found["to_quality"][axis]) for axis in AXES]
        spread = pages.interval(gap.get("low"), gap.get("high"))
        mean = words.bits(gap["mean"], sign=True) if gap else "–"
        table.add_row(column, words.bits(here["a"]), words.bits(here["b"]), mean, spread, *ratios)
    notes = [
        f"At equal FLOPs. {said(data)}.",
        f"Ratios: what {b} needs over what {a} needs to get as far as the worse.",
    ]
    if any(data["budgets"][axis]["differ"] for axis in ("tokens", "flops")):
        spent = [f"{axis} {words.amount(v['a'])} and {words.amount(v['b'])}" for axis, v in data["budgets"].items()]
        notes.append(f"Budgets differ ({', '.join(spent[:2])}); both are read at the smaller.")
    notes += [f"not finished: {folder}" for folder in data["unfinished"]]
    notes += [f"left out, its seed has no partner: {folder}" for folder in data["unpaired"]]
    return Group(table, *(Text(note) for note in notes))

"""The rows of papers.yaml: what each of the papers asks of the software, what it claims, and what covers it here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tutelage.base import registry
from tutelage.base.errors import UserError, did_you_mean

FILE = Path(__file__).with_name("papers.yaml")
Kind = Literal["method", "study", "model-report", "system", "dataset", "survey", "benchmark", "theory"]
AXES = (*registry.AXES, "modality", "application", "parallel")  # the last three are recipes, not methods
STATUSES = ("effect seen", "opposite", "no effect", "inconclusive", "stale", "not run", "runs", "open")


class Row(BaseModel):
    """One paper. `covered_by` names methods, `recipes/….yaml`, `bench/….py` and `tutelage COMMAND`s."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: int
    title: str
    arxiv: str | None = None
    kind: Kind
    axis: str
    modality: str
    mechanism: str  # what the software must do
    claim: str
    scale: str | None = None  # where it was claimed
    covered_by: tuple[str, ...] = ()

    @property
    def leader(self) -> str | None:
        """The method whose bench measures the claim: what covers the row first, if that is a method."""
        return next((name for name in self.covered_by[:1] if is_method(name)), None)


def is_method(name: str) -> bool:
    """Whether something that covers a row is written as a method: neither a recipe, a measurement nor a command."""
    return "/" in name and not name.startswith(("recipes/", "bench/"))


def read(path: Path = FILE) -> tuple[Row, ...]:
    """Every row of a catalog file, in its order. UserError names file, row and key."""
    # libyaml takes 0.07 s for the 516 rows, PyYAML's own parser 0.4 s
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = [_row(entry, path) for entry in yaml.load(path.read_text(encoding="utf-8"), Loader=loader)]
    ids = [row.id for row in found]
    for number in ids:
        if ids.count(number) > 1:
            raise UserError(f"{path.name}: there are two rows with id {number}")
    return tuple(found)


def _row(entry: dict[str, Any], path: Path) -> Row:
    try:
        return Row(**entry)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        says = f"no key '{key}'{did_you_mean(key, Row.model_fields)}"
        says = says if first["type"] == "extra_forbidden" else f"{key}: {first['msg']}"
        raise UserError(f"{path.name}, row {entry.get('id', '?')}: {says}") from error


@cache
def rows() -> tuple[Row, ...]:
    """The project's catalog."""
    return read()


def row(number: int) -> Row:
    """The row of that id."""
    found = next((row for row in rows() if row.id == number), None)
    if found is None:
        raise UserError(f"no paper {number}; they go from {rows()[0].id} to {rows()[-1].id}")
    return found


def covered_by(name: str) -> list[Row]:
    """The rows that name a method, a recipe, a measurement or a command."""
    return [row for row in rows() if name in row.covered_by]


def led_by(name: str) -> list[Row]:
    """The rows whose claim a method's bench measures."""
    return [row for row in rows() if row.leader == name]


def search(
    words: Sequence[str] = (), *, axis: str | None = None, kind: str | None = None, modality: str | None = None
) -> list[Row]:
    """Rows that hold all words, in any case, and have the given axis, kind and modality.

    UserError for a value that no row may have, with the nearest right spelling.
    """
    known("axis", axis, AXES)
    known("kind", kind, get_args(Kind))
    known("modality", modality, sorted({row.modality for row in rows()}))
    wanted = {"axis": axis, "kind": kind, "modality": modality}
    found = []
    for row in rows():
        text = " ".join((row.title, row.mechanism, row.claim, row.arxiv or "", *row.covered_by)).lower()
        if all(word.lower() in text for word in words):
            found.append(row)
    return [row for row in found if all(value in (None, getattr(row, key)) for key, value in wanted.items())]


def known(key: str, value: str | None, values: Iterable[str]) -> None:
    """UserError where `value` is none of `values`."""
    names = list(values)
    if value is not None and value not in names:
        hint = did_you_mean(value, names) or f"; there are: {', '.join(names)}"
        raise UserError(f"no {key} '{value}'{hint}")

"""Values that a stage is given once another has run: `{of: law, value: ratio}` where a number or a span stands.

A recipe is checked with them in place; `late_bound` puts the numbers in when the stage that wrote them is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from tutelage.base.clock import Span
from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.hooks import SLOTS
from tutelage.base.links import at
from tutelage.base.marked import Key, Map, dotted, plain
from tutelage.base.paths import schema_at
from tutelage.base.spec import Late, Recipe, Stage, is_late, kinds

GRAPH = "a value of another stage stands for a number or a span; what makes the graph is known before it runs"
_NAMES = ("use", "of", "stage", "best")  # keys that name something, wherever they stand
_ENTRIES = (*SLOTS, "apply", "make")


def walk(tree: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], dict[str, str]]]:
    """Every `{of: stage, value: name}` in a tree of dicts and lists, with its path."""
    if is_late(tree):
        yield path, tree
    elif isinstance(tree, (dict, list)):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from walk(item, (*path, key))


def check(tree: Map) -> None:
    """UserError, with the line, for a value where neither a number nor a span stands, or where the graph hangs on it."""
    for path, late in walk(tree):
        where = f"{at(tree, path)}{dotted(path)}"
        why = _misplaced(path)
        if why:
            raise UserError(f"{where}: {why}")
        schema = kinds(schema_at(path))
        if "unit" in late and not schema & {Any, Span, str}:
            raise UserError(f"{where}: a unit goes with a span, and a plain number belongs here")
        if "unit" in late:
            try:
                Span.parse(f"1{late['unit']}")
            except UserError as error:
                raise UserError(
                    f"{where}: '{late['unit']}' is no unit; one of step, tok, sample, epoch, min, flop, %"
                ) from error


def _misplaced(path: tuple[Key, ...]) -> str:
    """Why no value may stand at a path; empty where one may."""
    if path[0] != "stages":
        return GRAPH
    inside, last = path[2:], path[-1]
    if not inside or last in _NAMES or (inside[0] in ("start", "tokenizer") and not isinstance(inside[-1], str)):
        return GRAPH
    if inside in (("start",), ("tokenizer",)) or (inside[0] == "start" and last in ("by", "better")):
        return GRAPH
    if last == "seed":
        return "a seed is known before the graph runs; randomness hangs on nothing that is measured"
    if inside[0] in ("data", "keep") and inside[2:] != ("weight",):
        return (
            "only a source's `weight` may be a value of another stage; what a source holds is read in other stages too"
        )
    schema = schema_at(path)
    if schema is None:
        return ""  # a key that is not there: the schema says so
    return "" if kinds(schema) & {Any, int, float, Span} else GRAPH


def check_sources(recipe: Recipe, tree: Map) -> None:
    """UserError for a value of what is no stage, or of a stage that makes no table."""
    for path, late in walk(tree):
        name, where = late["of"], f"{at(tree, (*path, 'of'))}{dotted(path)}.of"
        if name not in recipe.stages:
            hint = did_you_mean(name, recipe.stages) or f"; there is {', '.join(recipe.stages)}"
            raise UserError(f"{where}: no stage '{name}'{hint}")
        made = recipe.stages[name].product
        if made != "table":
            raise UserError(
                f"{where}: stage '{name}' makes {'data' if made == 'data' else 'a model'}; only one with `measure` writes values"
            )


def late_names(stage: Any) -> list[tuple[str, str]]:
    """Every `{of: stage, value: name}` in a stage (or any part of one), as (stage, name), each once."""
    return list(dict.fromkeys((late["of"], late["value"]) for _, late in walk(plain(stage))))


def late_bound(stage: Stage, values: Mapping[str, Mapping[str, Any]], *, name: str = "") -> Stage:
    """The stage with every `{of: law, value: ratio}` replaced by `values["law"]["ratio"]`, to six digits.

    UserError names a value that its stage did not write, and one that does not fit where it stands.
    """
    tree = plain(stage)
    found = list(walk(tree))
    if not found:
        return stage
    for path, late in found:
        table = values.get(late["of"], {})
        if late["value"] not in table:
            written = ", ".join(table) or "nothing"
            raise UserError(f"stage '{late['of']}' wrote no value '{late['value']}'; it wrote {written}")
        given = table[late["value"]]
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
            raise UserError(f"{_place(name, path)}: {Late(late)} is {given}, which is no number to go on with")
        holder: Any = tree
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = _written(float(given), late, path)
    try:
        return Stage.model_validate(tree)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        late = next((late for path, late in found if path == fault["loc"][: len(path)]), {"value": "?", "of": "?"})
        what = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise UserError(
            f"{_place(name, fault['loc'])}: {Late(late)} is {fault['input']}; here it should be {what}"
        ) from error


def _place(name: str, path: tuple[Key, ...]) -> str:
    return f"stages.{name}.{dotted(path)}" if name else dotted(path)


def _written(number: float, late: Mapping[str, str], path: tuple[Key, ...]) -> Any:
    """A number of a table as the recipe would have it at a path of a stage: whole where it must be, a span with its unit."""
    number, wanted = rounded(number), kinds(schema_at(("stages", "", *path)))
    unit = late.get("unit") or (("sample" if path[-1] == "batch" else "step") if Span in wanted else "")
    if unit:
        return f"{number:.6g}{unit}"
    whole = number.is_integer() and abs(number) < 1e15
    return round(number) if whole or (int in wanted and float not in wanted) else number


def unbound(stage: Stage) -> Stage:
    """The stage with the methods' settings that are known: those that wait for a value of another stage are left out."""
    if not late_names(stage):
        return stage
    known: dict[str, Any] = {key: _known(getattr(stage, key), Stage.model_fields[key].default) for key in _ENTRIES}
    known["methods"] = [entry for entry in (_known(entry, None) for entry in stage.methods) if entry is not None]
    return stage.model_copy(update=known)


def _known(entry: Any, default: Any) -> Any:
    """A method's entry without the settings that are still to come; the default where it needs one of them."""
    if not isinstance(entry, dict) or not late_names(entry):
        return entry
    waits = [key for key, item in entry.items() if late_names(item)]
    return default if _needed(entry["use"]) & set(waits) else {k: v for k, v in entry.items() if k not in waits}


@cache
def _needed(use: str) -> frozenset[str]:
    """The settings that a method has no default for."""
    from tutelage.base import registry

    try:
        fields = registry.find(use).model_fields
    except UserError:  # said at its place, when the method is made
        return frozenset()
    return frozenset(name for name, field in fields.items() if field.is_required())


def rounded(value: float) -> float:
    """A number to six significant digits, so that one that differs in the last bits is the same value."""
    return float(f"{value:.6g}")

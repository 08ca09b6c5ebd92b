"""From a file, text or Python objects to a checked recipe, and back. What is wrong is said in one line.

A recipe is read with the place of every key (`marked`), changed by `--set` (`paths`), unrolled (`expand`), checked
against the schema, and its stages against one another (`links`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tutelage.base import rules, values
from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.expand import expand
from tutelage.base.links import WORDS, at, check, order, references
from tutelage.base.marked import Key, Map, dotted, has, mark, parse, place_of, plain, to_yaml
from tutelage.base.paths import assign, schema_at, unknown_key
from tutelage.base.spec import Recipe

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=%+-]*")
_EXAMPLE = "stages: {name: {start: …, data: …, until: 1epoch}}"


def load(recipe: str | Path | Mapping[str, Any] | Recipe, *, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe: a file, YAML text, a dict or a Recipe; `sets` are `path=value` overrides of what is written.

    Returns it with every default filled in, sweeps and repeats unrolled. UserError is one line that names file and
    line (where there is one), the dotted key, what is wrong and the nearest right spelling.
    """
    tree = _read(recipe)
    for text in sets:
        _set(tree, text)
    tree = expand(tree)
    _names(tree)
    values.check(tree)
    try:
        found = Recipe.model_validate(plain(tree))
    except ValidationError as error:
        raise UserError(explain(error, tree)) from error
    check(found, tree)
    values.check_sources(found, tree)
    rules.check(found, tree)
    return lengths(found)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads equal."""
    return to_yaml(recipe)


def lengths(recipe: Recipe) -> Recipe:
    """The recipe with the row length of every stage that does not train: that of what it starts from, or measures.

    A merge of models trained on rows of 256 tokens is not measured on rows of 512. The first start that is a stage
    of the recipe counts; a length that was written stays.
    """
    stages = dict(recipe.stages)
    for name in order(recipe):
        stage = stages[name]
        if stage.until is None and "length" not in stage.model_fields_set:
            before = references({"start": stage.start, "of": stage.of or []}, among=stages)
            if before:
                stages[name] = stage.model_copy(update={"length": stages[before[0]].length})
    return recipe.model_copy(update={"stages": stages})


def _read(recipe: str | Path | Mapping[str, Any] | Recipe) -> Map:
    if isinstance(recipe, Recipe):
        recipe = lengths(recipe)  # here, since what was left out is written down by `mark`
    if isinstance(recipe, Mapping) or not isinstance(recipe, (str, Path)):
        file, tree = "", mark(recipe)
    elif isinstance(recipe, str) and _is_text(recipe):
        file, tree = "recipe", parse(recipe)
    else:
        file, tree = str(recipe), parse(_text(Path(recipe)), file=str(recipe))
    where = f"{file}: " if file else ""
    if tree is None:
        raise UserError(f"{where}the recipe is empty; it begins with {_EXAMPLE}")
    if not isinstance(tree, Map):
        kind = "a list" if isinstance(tree, list) else "a plain value"
        raise UserError(f"{where}a recipe is a mapping, not {kind}; it begins with {_EXAMPLE}")
    tree.at = file
    return tree


def _is_text(recipe: str) -> bool:
    return "\n" in recipe or not recipe.strip() or (":" in recipe and not Path(recipe).exists() and " " in recipe)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such recipe{did_you_mean(path.name, beside)}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; a recipe is one YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _set(tree: Map, text: str) -> None:
    path, equals, value = text.partition("=")
    place = f"--set {text}"
    if not equals or not path.strip():
        raise UserError(f"{place}: write path=value, for example --set stages.code.until=1Mtok")
    assign(tree, path.strip(), parse(value, file=place), place=place)


def _names(tree: Map) -> None:
    """A stage's name is a folder's name too."""
    stages = tree.get("stages")
    for name in stages if isinstance(stages, Map) else ():
        where = at(tree, ("stages", name))
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}'{name}' cannot be a stage's name: letters, digits and - _ . only, no spaces")
        if name in WORDS:
            raise UserError(f"{where}'{name}' has a meaning of its own and cannot be a stage's name")


# -- what pydantic found, in one line ----------------------------------------------------------------------------------


def explain(error: ValidationError, tree: Map) -> str:
    """One line for the first fault: file and line, dotted key, what is wrong, what was probably meant."""
    faults: dict[tuple[Key, ...], list[ErrorDetails]] = {}
    for fault in error.errors(include_url=False):
        faults.setdefault(_path(fault, tree), []).append(fault)
    ranked = sorted(faults, key=lambda path: faults[path][0]["type"] != "extra_forbidden")
    path = ranked[0]
    more = f" (and {len(ranked) - 1} more)" if len(ranked) > 1 else ""
    return f"{at(tree, path)}{_say(path, faults[path], tree)}{more}"


def _path(fault: ErrorDetails, tree: Map) -> tuple[Key, ...]:
    """The fault's place in the recipe. What is no key of it (pydantic's names for a union's arms) drops out."""
    path: list[Key] = []
    node: Any = tree
    for i, part in enumerate(fault["loc"]):
        if has(node, part):
            path.append(part)
            node = node[part]
        elif i == len(fault["loc"]) - 1 and fault["type"] == "missing":
            path.append(part)
    return tuple(path)


def _say(path: tuple[Key, ...], faults: list[ErrorDetails], tree: Map) -> str:
    fault = faults[0]
    kind, given, where = fault["type"], fault["input"], dotted(path)
    if kind == "extra_forbidden":
        return unknown_key(path, schema_at(path[:-1]))
    if kind == "missing":
        if path == ("stages",):
            return f"the recipe has no stages; it begins with {_EXAMPLE}"
        return f"{dotted(path[:-1])} lacks '{path[-1]}'"
    if path == ("stages",) and not given:
        return f"stages is empty; a recipe begins with {_EXAMPLE}"
    if kind in ("model_type", "dict_type", "model_attributes_type") and len(faults) == 1:
        return f"{where}: a mapping of keys belongs here ({_got(given)})"
    if kind == "value_error":
        return f"{where}: {fault['msg'].removeprefix('Value error, ')}"
    if kind == "literal_error" and isinstance(given, str):
        known = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
        return f"{where}: '{given}' is not one of {', '.join(known)}{did_you_mean(given, known)}"
    wanted = dict.fromkeys(_wanted(fault) for fault in faults)
    return f"{where}: {' or '.join(wanted)} belongs here ({_got(given)})"


_KINDS = {
    "string": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list",
    "dict": "a mapping", "tuple": "a list", "model": "a mapping", "literal": "one of its words",
}  # fmt: skip


_BOUNDS = {
    "greater_than": "above", "greater_than_equal": "of at least", "less_than": "below", "less_than_equal": "of at most",
}  # fmt: skip


def _wanted(fault: ErrorDetails) -> str:
    family, _, rest = fault["type"].partition("_")
    if family in _KINDS and rest in ("type", "parsing", "from_float", "error", "attributes_type"):
        if family == "literal":
            return f"one of {fault['ctx']['expected']}"
        return _KINDS[family]
    if fault["type"] in _BOUNDS:
        return f"a number {_BOUNDS[fault['type']]} {next(iter(fault['ctx'].values()))}"
    return fault["msg"].removeprefix("Input should be ")


def _got(given: Any) -> str:
    if given is None:
        return "here: nothing"
    text = str(plain(given)) if isinstance(given, (dict, list)) else repr(given)
    return f"here: {text if len(text) <= 60 else text[:57] + '…'}"


__all__ = ["dump", "explain", "load", "place_of"]

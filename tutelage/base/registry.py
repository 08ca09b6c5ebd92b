"""Finds methods by their path: `methods/continual/ewc.py` is `continual/ewc`. Only the one asked for is imported."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.foreign import explain_foreign
from tutelage.base.method import Method

CODE = re.compile(
    r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
)  # code of anybody's, named as `package.module:name`: nothing else is imported
ROOT = Path(__file__).parent.parent / "methods"
AXES = (
    "mix", "select", "filter", "curriculum", "condition", "packing", "synth", "objective", "init", "grow", "arch", "param",
    "optim", "schedule", "continual", "merge", "distill", "selftrain", "align", "rl", "steer", "probe", "predict", "infer",
)  # fmt: skip


@cache
def names() -> tuple[str, ...]:
    """Every method of the house, sorted; a scan of file names, nothing is imported."""
    return tuple(
        sorted(
            f"{p.parent.name}/{p.stem}"
            for p in ROOT.glob("*/*.py")
            if not p.stem.startswith("_") and p.parent.name != "_kit"
        )
    )


def path_of(name: str) -> Path:
    """The file of a method of the house."""
    if name not in names():
        hint = did_you_mean(name, names()) or "; `tutelage methods` lists all"
        raise UserError(f"no method '{name}'{hint}")
    return ROOT / f"{name}.py"


def module_of(name: str) -> Any:
    """Import the module of `axis/name` or `package.module:Class`."""
    if ":" in name:
        if not CODE.fullmatch(name):
            raise UserError(f"'{name}' names no code: write package.module:Class")
        return _import(name.split(":")[0], name)
    path_of(name)
    return importlib.import_module(f"tutelage.methods.{name.replace('/', '.')}")


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise UserError(f"'{name}' cannot be imported: no module '{error.name}' on the Python path") from error
        raise


@cache
def find(name: str) -> type[Method]:
    """The method class of `axis/name` or `package.module:Class`."""
    module = module_of(name)
    if ":" in name:
        cls = getattr(module, name.split(":", 1)[1], None)
        if not (inspect.isclass(cls) and issubclass(cls, Method)):
            raise UserError(f"'{name}' is not a tutelage Method")
        return cls
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == module.__name__
    ]
    found = [c for c in found if not c.__name__.startswith("_")]
    assert len(found) == 1, f"{path_of(name)} must define exactly one public Method"
    return found[0]


def make(use: str | dict[str, Any], *, place: str = "") -> Method:
    """A method from its recipe entry, `continual/ewc` or `{use: continual/ewc, strength: 3}`.

    UserError names `place` (the key in the recipe), the wrong setting and the nearest right spelling.
    """
    entry = {"use": use} if isinstance(use, str) else dict(use)
    name = entry.pop("use", None)
    where = f"{place}: " if place else ""
    if not isinstance(name, str):
        raise UserError(f"{where}a method is written as {{use: axis/name, …}}; 'use' is missing")
    try:
        cls = find(name)
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    try:
        return cls(**entry)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = list(cls.model_fields)
            hint = did_you_mean(key, known) or explain_foreign(key)
            hint = hint or f"; it knows {', '.join(known) or 'no settings'}"
            raise UserError(f"{where}{name} has no setting '{key}'{hint}") from error
        raise UserError(f"{where}{name}.{key}: {first['msg']} (got {first.get('input')!r})") from error

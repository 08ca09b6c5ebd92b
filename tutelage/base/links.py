"""What the stages of a recipe say of one another: references, their order, and values that one stage gives another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

from tutelage.base.errors import UserError, nearest
from tutelage.base.marked import Key, Map, dotted, place_of, plain
from tutelage.base.spec import Recipe, Stage, is_late

WORDS = frozenset({"previous", "self", "none", "start"})  # what `of` may say beside a stage's name
_OPAQUE = ("start", "actions", "args")  # keys whose insides are not searched for `of`

Visit = Callable[[str, tuple[Key, ...]], "str | list[str]"]


def stage_of(reference: str) -> str:
    """The stage in a reference: `base@500` names a step of `base`."""
    return reference.split("@", 1)[0]


def outside(reference: str) -> bool:
    """Whether a reference is plainly a path, a hub name or a file rather than a stage."""
    name = reference.strip()
    return (
        "/" in name or name.startswith((".", "~")) or name.endswith((".yaml", ".yml", ".json")) or Path(name).exists()
    )


def visit(stage: Any, fn: Visit) -> None:
    """Call `fn(reference, path)` for every name of a stage in the raw stage and put what it returns in its place.

    References stand in `start` (also in a list and under `best`), in `stage` of a source, in `enter` of a rule, and in
    any `of`. Inside what
    is not ours (a model's config, a generator's arguments) only the `of` of a value counts. A list returned in the
    place of one item of a list is spliced in.
    """
    if not isinstance(stage, dict):
        return
    _each(stage, "start", fn, ("start",))
    for key in ("data", "keep"):
        for name, source in (stage.get(key) or {}).items() if isinstance(stage.get(key), dict) else ():
            if isinstance(source, dict):
                _each(source, "stage", fn, (key, name, "stage"))
    for i, rule in enumerate(stage.get("on") or []) if isinstance(stage.get("on"), list) else ():
        if isinstance(rule, dict):
            _each(rule, "enter", fn, ("on", i, "enter"))
    _ofs(stage, fn, ())


def _each(holder: Any, key: Key, fn: Visit, path: tuple[Key, ...]) -> None:
    value = holder.get(key)
    if isinstance(value, str):
        holder[key] = fn(value, path)
    elif isinstance(value, dict):
        _choice(value, fn, path)
    elif isinstance(value, list):
        out: list[Any] = []
        for i, item in enumerate(value):
            if isinstance(item, dict):
                _choice(item, fn, (*path, i))
            found = fn(item, (*path, i)) if isinstance(item, str) else item
            out += found if isinstance(item, str) and isinstance(found, list) else [found]
        if out != value:
            value[:] = out


def _choice(start: dict[str, Any], fn: Visit, path: tuple[Key, ...]) -> None:
    """`{best: [stages], by: metric}` and `{stage: name}`; another mapping is a model's config."""
    for key in ("best", "stage"):
        if key in start and "model_type" not in start:
            _each(start, key, fn, (*path, key))


def _ofs(tree: Any, fn: Visit, path: tuple[Key, ...]) -> None:
    if isinstance(tree, dict):
        if "of" in tree:
            _each(tree, "of", fn, (*path, "of"))
        for key, item in tree.items():
            (_lates if key in _OPAQUE else _ofs)(item, fn, (*path, key))
    elif isinstance(tree, list):
        for i, item in enumerate(tree):
            _ofs(item, fn, (*path, i))


def _lates(tree: Any, fn: Visit, path: tuple[Key, ...]) -> None:
    if is_late(tree):
        _each(tree, "of", fn, (*path, "of"))
    elif isinstance(tree, (dict, list)):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            _lates(item, fn, (*path, key))


def references(stage: Stage | dict[str, Any], *, among: Collection[str] | None = None) -> list[str]:
    """The stages that a stage depends on, in the order in which it names them, each once.

    Given `among`, only those; without it also bare words that may turn out to be hub names.
    """
    tree = plain(stage)
    kept = tree.get("keep")
    skip = WORDS | set(kept if isinstance(kept, dict) else ())
    found: dict[str, None] = {}

    def note(reference: str, path: tuple[Key, ...]) -> str:
        name = stage_of(reference)
        if path[-1] == "enter":  # that one waits for this stage
            return reference
        if name in among if among is not None else (name not in skip and not outside(name)):
            found[name] = None
        return reference

    visit(tree, note)
    return list(found)


def order(recipe: Recipe, *, tree: Map | None = None) -> list[str]:
    """Stage names so that each comes after all it depends on; as written where that leaves a choice.

    UserError for stages that wait for one another, with the line if `tree` (the recipe as it was read) is given.
    """
    done: dict[str, None] = {}
    trail: list[str] = []

    def add(name: str) -> None:
        if name in trail:
            ring = [*trail[trail.index(name) :], name]
            raise UserError(f"{at(tree, ('stages', name))}{_cycle(ring, recipe)}")
        if name not in done:
            trail.append(name)
            for need in references(recipe.stages[name], among=recipe.stages):
                add(need)
            trail.pop()
            done[name] = None

    for name in recipe.stages:
        add(name)
    return list(done)


_VERBS = {"start": "starts from", "data": "reads data of", "keep": "keeps data of", "of": "measures"}


def _cycle(names: list[str], recipe: Recipe) -> str:
    """`stage a starts from b which starts from a`."""
    text = f"stage {names[0]}"
    for i, (a, b) in enumerate(pairwise(names)):
        verbs: list[str] = []

        def note(reference: str, path: tuple[Key, ...], b: str = b, verbs: list[str] = verbs) -> str:
            if stage_of(reference) == b:
                verbs.append(_VERBS.get(str(path[0]), "refers to"))
            return reference

        visit(plain(recipe.stages[a]), note)
        text += f"{' which' if i else ''} {verbs[0]} {b}"
    return f"{text}: stages cannot wait for one another"


def resolve(stages: Map, arms: Mapping[str, list[str]]) -> None:
    """Put the names that wildcards match in their place, and refuse a swept stage's own name, which is no stage."""
    for name, stage in stages.items():

        def put(reference: str, path: tuple[Key, ...], name: str = name) -> str | list[str]:
            where = f"{at(stages, (name, *path))}stages.{name}.{dotted(path)}"
            base = stage_of(reference)
            if (twin := f"{base}--{name.partition('--')[2]}") in arms.get(base, ()):
                return twin + reference[len(base) :]  # an arm goes on from the arm of the same name
            if base in arms and base not in stages:
                listed = ", ".join(arms[base])
                raise UserError(
                    f"{where}: '{base}' is swept into {listed}; name one of them, or {{best: [{base}--*], by: metric}}"
                )
            if not any(mark in base for mark in "*?") or outside(base):
                return reference
            found = [other for other in stages if other != name and fnmatchcase(other, base)]
            if not found:
                raise UserError(f"{where}: no stage matches '{base}'; there is {', '.join(s for s in stages)}")
            if path[-1] in ("stage", "enter"):
                one = "a source is" if path[-1] == "stage" else "a rule enters"
                raise UserError(f"{where}: {one} one stage; '{base}' matches {', '.join(found)}")
            return [other + reference[len(base) :] for other in found]

        visit(stage, put)


def at(tree: Any, path: tuple[Key, ...]) -> str:
    """`recipe.yaml:4: `, or nothing for what never stood in a file."""
    place = place_of(tree, path)
    return f"{place}: " if place else ""


def check(recipe: Recipe, tree: Map) -> None:
    """UserError for a name that is no stage, a stage used for what it does not make, and stages that wait in a ring."""
    kept = {key for stage in recipe.stages.values() if isinstance(stage.keep, dict) for key in stage.keep}
    for name, stage in recipe.stages.items():

        def look(reference: str, path: tuple[Key, ...], name: str = name) -> str:
            base = stage_of(reference)
            where = f"{at(tree, ('stages', name, *path))}stages.{name}.{dotted(path)}"
            if base in recipe.stages:
                _product(base, recipe, path, where)
                return reference
            others = [other for other in recipe.stages if other != name]
            near = nearest(base, others)
            hint = f"; did you mean '{near}'?" if near else f"; there is {', '.join(others) or 'no other'}"
            if path[0] == "start" and "best" not in path:
                # a bare word may be a hub name, so only what is spelled almost like a stage is taken for one.
                here = not outside(base)  # else a path, or a stage of another run (demo/base@500)
                if ("@" in reference and here) or "stage" in path or (near and here and _edits(base, near) <= 2):
                    raise UserError(f"{where}: no stage '{base}'{hint}")
            elif _must_be_stage(path) or not (base in WORDS | kept or outside(base)):
                raise UserError(f"{where}: no stage '{base}'{hint}")
            return reference

        visit(plain(stage), look)
        _best(stage.start, name, tree)
    order(recipe, tree=tree)


def _must_be_stage(path: tuple[Key, ...]) -> bool:
    """What `measure` is `of`, a source's `stage`, what a rule enters and a choice; the `of` of a method may name kept data too."""
    return path[-1] in ("stage", "enter") or path[0] == "of" or "best" in path


def _edits(a: str, b: str) -> int:
    """Letters to insert, drop or change to make one word of the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def _product(base: str, recipe: Recipe, path: tuple[Key, ...], where: str) -> None:
    made = recipe.stages[base].product
    if path[-1] == "stage" and made != "data":
        raise UserError(f"{where}: stage '{base}' makes a {made}, not data; only a stage with `make` is a source")
    if path[0] == "start" and path[-1] != "of" and "best" not in path and made == "table":
        raise UserError(f"{where}: stage '{base}' makes a table, and training does not start from one")


def _best(start: Any, name: str, tree: Map) -> None:
    for i, item in enumerate(start if isinstance(start, list) else [start]):
        if not (isinstance(item, dict) and "best" in item):
            continue
        path = ("start", i) if isinstance(start, list) else ("start",)
        where = f"{at(tree, ('stages', name, *path))}stages.{name}.{dotted(path)}"
        wrong = next((key for key in item if key not in ("best", "by", "better")), None)
        if wrong or not isinstance(item["best"], list) or item.get("better") not in (None, "lower", "higher"):
            what = f"has no key '{wrong}'; " if wrong else ""
            raise UserError(f"{where}: {what}a choice is written {{best: [stages], by: metric, better: lower}}")

"""Unrolls `repeat` and `sweep`, so that the graph is finite and known before it runs.

`repeat: n` makes rounds (`rounds.1.a`, `rounds.2.a`), in which `previous` is the last stage of the round before;
`sweep:` makes arms (`code--low`, `code--rate=0.05`). Both work on the recipe as it was written, before any check.
"""

from __future__ import annotations

import re
from copy import deepcopy
from itertools import product
from typing import Any

from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.links import at, order, references, resolve, stage_of, visit
from tutelage.base.marked import Map, Seq, mark
from tutelage.base.paths import assign, widened
from tutelage.base.spec import Stage, is_late
from tutelage.base.values import GRAPH

__all__ = ["expand", "merge", "order", "references", "root_name"]


def root_name(stage: str) -> str:
    """A stage's name without its arm, from which its randomness is made: `code--replay=0.05` is `code`."""
    return stage.split("--", 1)[0]


def expand(tree: Map) -> Map:
    """The recipe without `repeat`, `sweep` and wildcards. What is no mapping of stages is left to the checks."""
    tree = deepcopy(tree)
    stages = tree.get("stages")
    if not isinstance(stages, Map):
        return tree
    stages = _unroll(stages)
    stages, arms = _sweep(stages)
    resolve(stages, arms)
    tree["stages"] = stages
    return tree


# -- repeat -----------------------------------------------------------------------------------------------------------


def _unroll(stages: Map) -> Map:
    """Every `repeat` as its rounds; the name of a repeated stage then means the last stage of its last round."""
    out, last = Map(at=stages.at), dict[str, str]()
    for name, stage in stages.items():
        place = stages.places.get(name, "")
        if not isinstance(stage, Map) or "repeat" not in stage:
            if isinstance(stage, Map) and "stages" in stage:
                raise UserError(f"{_at(place)}stages.{name}: a block of stages says how often: repeat: 2")
            out.put(name, stage, place)
            continue
        previous: Any = None
        for k, a_round in enumerate(_rounds(name, stage), 1):
            for inner, written in a_round.items():
                out.put(inner, written, a_round.places[inner])
                previous = inner
            last[f"{name}.{k}"] = last[name] = previous
    for stage in out.values():
        for form in _forms(stage):
            _rename(form, {old: new for old, new in last.items() if old not in out})
    return out


def _forms(stage: Any) -> list[Any]:
    """A stage, and what its arms make otherwise."""
    sweep = stage.get("sweep") if isinstance(stage, Map) else None
    if not isinstance(sweep, Map):
        return [stage]
    starts = [Map({"start": sweep["start"]})] if isinstance(sweep.get("start"), list) else []
    return [stage, *(arm for arm in sweep.values() if isinstance(arm, Map)), *starts]


def _rounds(name: str, stage: Map) -> list[Map]:
    times, place = stage["repeat"], at(stage, ("repeat",))
    if is_late(times):
        raise UserError(f"{place}stages.{name}.repeat: {GRAPH}")
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise UserError(f"{place}stages.{name}.repeat: how many rounds, 1 or more, not {times!r}")
    block = "stages" in stage
    if not block:
        body = Map({key: value for key, value in stage.items() if key != "repeat"}, at=stage.at)
        body.places = dict(stage.places)
        inner, previous = Map({"": body}), body.get("start")
    else:
        wrong = next((key for key in stage if key not in ("repeat", "start", "stages")), None)
        if wrong:
            hint = did_you_mean(wrong, ("repeat", "start", "stages")) or "; write it in its stages"
            raise UserError(f"{at(stage, (wrong,))}stages.{name}: a repeated block has no key '{wrong}'{hint}")
        if not isinstance(stage["stages"], Map) or not stage["stages"]:
            raise UserError(f"{at(stage, ('stages',))}stages.{name}.stages: a repeated block has one stage or more")
        inner, previous = _unroll(stage["stages"]), stage.get("start")
    rounds = []
    for k in range(1, times + 1):
        names = {old: f"{name}.{k}.{old}" if old else f"{name}.{k}" for old in inner}
        a_round = Map(at=stage.at)
        for old, written in inner.items():
            written = deepcopy(written)
            if isinstance(written, Map) and not block and k > 1:
                written["start"] = "previous"
            for form in _forms(written):
                _rename(form, {old: new for old, new in names.items() if old})
                if isinstance(form, Map):
                    _put_previous(form, previous, f"{at(form, ('start',))}stages.{names[old]}.start")
            a_round.put(names[old], written, inner.places.get(old) or stage.at)
        previous = list(a_round)[-1]
        rounds.append(a_round)
    return rounds


def _rename(stage: Any, names: dict[str, str]) -> None:
    def put(reference: str, path: Any) -> str:
        base = stage_of(reference)
        return names.get(base, base) + reference[len(base) :]

    visit(stage, put)


def _put_previous(stage: Map, previous: Any, where: str) -> None:
    """`previous` in `start` becomes the last stage of the round before; in `of` it keeps its own meaning, the start."""

    def put(value: Any) -> Any:
        if isinstance(value, str) and stage_of(value) == "previous":
            if previous is None:
                raise UserError(f"{where}: nothing is `previous` in the first round; give the block a start")
            return previous + value[len("previous") :] if isinstance(previous, str) else deepcopy(previous)
        if isinstance(value, Map) and "best" in value:
            value["best"] = put(value["best"])
        if not isinstance(value, list):
            return value
        out = Seq(at=getattr(value, "at", ""))
        for item in value:
            found = put(item)
            out.extend(found if isinstance(found, list) else [found])
        return out

    if "start" in stage:
        stage["start"] = put(stage["start"])


# -- sweep ------------------------------------------------------------------------------------------------------------


def _sweep(stages: Map) -> tuple[Map, dict[str, list[str]]]:
    """Every swept stage as its arms, and the names of the arms by stage."""
    out, arms = Map(at=stages.at), dict[str, list[str]]()
    for name, stage in stages.items():
        place = stages.places.get(name, "")
        if not isinstance(stage, Map) or "sweep" not in stage:
            out.put(name, stage, place)
            continue
        arms[name] = []
        for label, arm in _arms(name, stage):
            full = f"{name}--{label}"
            if full in arms[name]:
                raise UserError(f"{at(stage, ('sweep',))}stages.{name}.sweep: two arms are called {full}")
            out.put(full, arm, place)
            arms[name].append(full)
    return out, arms


def _arms(name: str, stage: Map) -> list[tuple[str, Map]]:
    """(label, stage) of every arm: each named change with each combination of the listed values."""
    sweep = stage["sweep"]
    where = f"{at(stage, ('sweep',))}stages.{name}.sweep"
    if not isinstance(sweep, Map) or not sweep:
        raise UserError(f"{where}: write named arms (low: {{…}}) or lists of values (optim.lr: [1e-3, 1e-4])")
    named: list[tuple[str, Map]] = []
    listed: list[tuple[str, list[Any], list[str]]] = []
    for key, value in sweep.items():
        if is_late(value):
            raise UserError(f"{at(sweep, (key,))}stages.{name}.sweep.{key}: {GRAPH}")
        if isinstance(value, Map) or value is None:
            named.append((key, value or Map()))
        elif isinstance(value, list) and value:
            listed.append((key, value, _labels(key, value)))
        else:
            here = f"{at(sweep, (key,))}stages.{name}.sweep.{key}"
            raise UserError(f"{here}: a list of values, or a mapping of changes for an arm of that name")
    found = []
    for label, changes in named or [("", Map())]:
        for chosen in product(*(range(len(values)) for _, values, _ in listed)):
            arm = Map({key: deepcopy(value) for key, value in stage.items() if key != "sweep"}, at=stage.at)
            arm.places = dict(stage.places)
            merge(arm, changes)
            parts = [label] if label else []
            for (key, values, labels), i in zip(listed, chosen, strict=True):
                place = sweep.places.get(key, "")
                assign(arm, key, deepcopy(values[i]), schema=Stage, place=place, inside=("stages", name))
                parts.append(labels[i])
            found.append((",".join(parts), arm))
    return found


def _labels(key: str, values: list[Any]) -> list[str]:
    """`rate=0.05` for each value: its own text if that is short, plain and unlike the others', else its number."""
    words = [_word(value) for value in values]
    if any(not word for word in words) or len(set(words)) < len(words):
        words = [str(i) for i in range(1, len(values) + 1)]
    tail = next((part for part in reversed(key.split(".")) if not part.isdigit()), key)
    return [f"{tail}={word}" for word in words]


def _word(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("use"), str):
        value = value["use"]
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return re.sub(r"e([+-])0", r"e\1", f"{value:.12g}")
    if not isinstance(value, (int, str)):
        return ""
    word = re.sub(r"[^A-Za-z0-9._%+-]+", "_", str(value).rstrip("/").rsplit("/", 1)[-1])
    return word if len(word) <= 40 else ""


def merge(stage: Any, changes: Any) -> Any:
    """Merge an arm's changes into a stage, in place: mappings deeply, `methods` appended, all else replaced.

    Takes dicts of any kind. A change of settings alone (`optim: {lr: 1e-3}`) widens the shorthand that it meets.
    """
    changes = changes if isinstance(changes, Map) else mark(changes)
    for key, value in changes.items():
        old = stage.get(key)
        if isinstance(value, dict) and "use" not in value and not isinstance(old, dict):
            old = widened(key, old)
        if key == "methods" and isinstance(value, list) and isinstance(old, list):
            both = Seq(old, at=getattr(old, "at", ""))
            both.places = dict(getattr(old, "places", {}))
            for i, item in enumerate(value):
                both.add(deepcopy(item), getattr(value, "places", {}).get(i, ""))
            new: Any = both
        elif isinstance(value, dict) and isinstance(old, dict) and not _replaces(old, value):
            new = merge(old, value)
        else:
            new = deepcopy(value)
        stage[key] = new
        if isinstance(stage, Map) and changes.places.get(key) and not (isinstance(new, Map) and new is old):
            stage.places[key] = changes.places[key]
    return stage


def _replaces(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a method's entry names another method: then nothing of the old one's settings is kept."""
    return "use" in new and new["use"] != old.get("use")


def _at(place: str) -> str:
    return f"{place}: " if place else ""

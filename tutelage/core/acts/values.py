"""Setting and scaling: the values that can be reached, each with its bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import nn

from tutelage.base.clock import Span
from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.method import Method
from tutelage.core.acts.trial import Trial

if TYPE_CHECKING:
    from tutelage.core.stage import Run


OWN = {"optim.lr": "learning rate in use", "optim.base": "learning rate at the schedule's peak",
       "engine.clip": "largest norm of the whole gradient", "model.dropout": "dropout of the whole model"}  # fmt: skip


def steerable(run: Run) -> list[str]:
    """Every value that may be set: the rate, clipping, dropout where there is some, and what methods declare."""
    drop = ["model.dropout"] if dropouts(run.engine.model) else []
    own = ["optim.lr", "optim.base", *(["engine.clip"] if run.engine.clip is not None else []), *drop]
    return own + [f"{m.name()}.{field}" for m in run.methods.all() for field in sorted(m.steerable)]


def value(run: Run, path: str) -> Any:
    """What a steerable value is now."""
    if path in run.steered.values:
        return run.steered.values[path]
    if path in OWN:
        now: dict[str, Callable[[], Any]] = {
            "optim.lr": lambda: base_rate(run.engine.optimizer) * factor(run),
            "optim.base": lambda: base_rate(run.engine.optimizer),
            "engine.clip": lambda: run.engine.clip,
            "model.dropout": lambda: run.dropouts[0],
        }
        return now[path]()
    name, _, key = path.rpartition(".")
    return getattr(next(m for m in run.methods.all() if m.name() == name), key)


def base_rate(optimizer: Any) -> float:
    """The rate before the schedule of a parameter whose group has no `rate` of its own."""
    group = next((g for g in optimizer.param_groups if g["ratio"]), None)
    return float(group["base_lr"] / group["ratio"]) if group else 0.0


def factor(run: Run) -> float:
    """The schedule's share of the base rate in the coming step."""
    return float(run.methods.slots["schedule"].factor(run.clock))


def dropouts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every dropout of a model, as a module and the attribute that holds its rate."""
    every = list(model.modules())
    found = [(m, "p") for m in every if isinstance(m, nn.Dropout)]
    return found + [(m, "attention_dropout") for m in every if isinstance(vars(m).get("attention_dropout"), float)]


def _valued(run: Run, trial: Trial, action: Any, place: str) -> None:
    """Check `set` and `scale`: the path is declared, the value within its bounds."""
    targets = steerable(run)
    if action.path not in targets:
        raise UserError(f"{place}: nothing here can be steered as '{action.path}'{did_you_mean(action.path, targets)}")
    if action.path not in OWN:
        _try(run, trial, action, place)
        return
    now = trial.values.get(action.path, value(run, action.path))
    new = action.to if action.do == "set" else now * action.by
    if new is None and action.path == "model.dropout":
        trial.values[action.path] = max(run.dropouts)
        return
    if not isinstance(new, (int, float)):
        raise UserError(f"{place}: {action.path} is a number (got {new!r})")
    low, high = {"engine.clip": (1e-12, 1e12), "model.dropout": (0.0, 1 - 1e-9)}.get(action.path, (0.0, 1e6))
    if not low <= new <= high:
        raise UserError(f"{place}: {action.path}: {new:g} is not between {low:g} and {high:g}")
    if action.do == "set" and action.path == "optim.lr" and not trial.factor(run):
        raise UserError(f"{place}: optim.lr: the schedule makes the rate 0 just now, whatever it is set to")
    trial.values[action.path] = float(new)


def _try(run: Run, trial: Trial, action: Any, place: str) -> None:
    name, _, key = action.path.rpartition(".")
    try:
        put(trial.methods[name], key, action)
        if getattr(trial.methods[name], key) == math.inf:
            raise UserError(f"{place}: {action.path}: no number is so large")
    except ValidationError as error:
        raise UserError(f"{place}: {action.path}: {error.errors()[0]['msg']}") from error
    except TypeError as error:
        raise UserError(f"{place}: {action.path} is no number: it can be set, not scaled") from error
    taken = sum(
        share for m in trial.methods.values() if "source" in m.hooks() for _, share in m.source(run.view).values()
    )
    if not taken < 1:
        raise UserError(f"{place}: {action.path}: methods would take {taken:.0%} of every batch, and nothing is left")
    trial.told(run, place)


def put(method: Method, key: str, action: Any) -> None:
    """Set or scale a method's field; its own bounds hold."""
    setattr(method, key, action.to if action.do == "set" else getattr(method, key) * action.by)


def _value_effect(run: Run, action: Any) -> dict[str, Any]:
    now = plain(value(run, action.path))
    said = {"path": action.path, "undo": [{"do": "set", "path": action.path, "to": now}]}
    if action.path in ("optim.lr", "optim.base"):
        share, base = factor(run), base_rate(run.engine.optimizer)
        changes = []
        for group in run.engine.optimizer.param_groups:
            new = _rate(run, group, action)
            ratio = group["ratio"]
            label = group["role"] if ratio in (0.0, 1.0) else f"{group['role']} ×{ratio:g}"
            changes.append(
                {"what": "optim.lr", "group": label, "was": group["base_lr"], "now": new, "used": new * share}
            )
        changes.sort(key=lambda c: (not c["was"], "×" in c["group"]))  # a plain group that moves speaks for all
        return {**said, "changes": changes, "undo": [{"do": "set", "path": "optim.base", "to": base}]}
    if action.path in OWN:
        new = action.to if action.do == "set" else now * action.by
        shown = "as the recipe has it" if new is None else new
        if action.path == "model.dropout" and action.path not in run.steered.values:  # modules may differ in it
            said["undo"] = [{"do": "set", "path": action.path, "to": None}]
        return {**said, "changes": [{"what": action.path, "was": now, "now": shown, "used": shown}]}
    name, _, key = action.path.rpartition(".")
    copy = next(m for m in run.methods.all() if m.name() == name).model_copy()
    put(copy, key, action)
    new = plain(getattr(copy, key))
    change = {"what": action.path, "was": now, "now": new, "used": new}
    if "factor" in copy.hooks():
        before, after = factor(run), copy.factor(run.clock)
        change |= {"base": base_rate(run.engine.optimizer), "rate": times(before, after)}
    return {**said, "changes": [change]}


def times(before: float, after: float) -> float:
    """The factor between two numbers."""
    return after / before if before else 1.0 if after == before else math.inf


def in_use(run: Run, effects: list[dict[str, Any]]) -> None:
    """Say of rates what the next step uses, once all of a request is done: what followed may have moved the schedule."""
    for change in (change for effect in effects for change in effect.get("changes", [])):
        if change["what"] == "optim.lr":
            change["used"] = change["now"] * factor(run)


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, Span) else value


def _rate(run: Run, group: dict[str, Any], action: Any) -> float:
    """A group's new base rate: groups keep their ratios."""
    if action.do == "scale":
        return float(group["base_lr"] * action.by)
    share = 1.0 if action.path == "optim.base" else factor(run)
    return float(action.to / share * group["ratio"])


def _assign(run: Run, action: Any) -> None:
    put_in(run, action)
    if action.path in OWN:
        settle(run)


def put_in(run: Run, action: Any) -> None:
    """Give a value its new one where it is kept; `settle` then carries the engine's and the model's to where they act."""
    if action.path in ("optim.lr", "optim.base"):
        new = [_rate(run, group, action) for group in run.engine.optimizer.param_groups]
        for group, rate in zip(run.engine.optimizer.param_groups, new, strict=True):
            group["base_lr"] = rate
        return
    if action.path in OWN:
        new_value = action.to if action.do == "set" else value(run, action.path) * action.by
        run.steered.values.pop(action.path, None)
        run.steered.values |= {} if new_value is None else {action.path: float(new_value)}
        return
    name, _, key = action.path.rpartition(".")
    method = next(m for m in run.methods.all() if m.name() == name)
    put(method, key, action)
    if "settings" in method.hooks():
        for group in run.engine.optimizer.param_groups:
            group.update(method.settings(group))
    if "source" in method.hooks():
        run.shares.update({name: share for name, (_, share) in method.source(run.view).items()})


def settle(run: Run) -> None:
    """Let values that an action has set, and no method holds, be so: after the action and after a resume."""
    values = run.steered.values
    if "engine.clip" in values:
        run.engine.clip = values["engine.clip"]
    for (module, attribute), own in zip(dropouts(run.engine.model), run.dropouts, strict=True):
        setattr(module, attribute, values.get("model.dropout", own))


ACTS = {"set": (_valued, _value_effect, _assign), "scale": (_valued, _value_effect, _assign)}

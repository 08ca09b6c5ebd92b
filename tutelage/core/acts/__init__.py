"""What each action does to a running stage: whether it can be done, what it would change, and the doing of it.

`check` finds out whether an action can be done and resolves what it names; `effect` says what it would change, touching
nothing; `apply` does it. All three are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tutelage.base.action import Action, parse
from tutelage.base.errors import UserError, did_you_mean
from tutelage.core.acts import course, data, foreseen, modules, values
from tutelage.core.acts.trial import Trial
from tutelage.core.acts.values import OWN, base_rate, dropouts, factor, in_use, plain, settle, steerable, value
from tutelage.core.measure import measure

if TYPE_CHECKING:
    from tutelage.core.stage import Run

__all__ = [
    "OWN", "Trial", "apply", "base_rate", "check", "dropouts", "effect", "effects", "factor", "in_use", "plain", "settle",
    "steerable", "unfolded", "value",
]  # fmt: skip


def _eval(run: Run, action: Any) -> dict[str, Any]:
    if run.view.signals.get("eval/tick") != run.clock.tick:
        measure(run)
    found = {k.removeprefix("eval/"): v for k, v in run.view.signals.items() if k.startswith("eval/")}
    return {"values": found}


def _sampled(run: Run, trial: Trial, action: Any, place: str) -> None:
    if run.view.generate is None:
        raise UserError(f"{place}: this kind of data has no text to sample")


def _sample(run: Run, action: Any) -> dict[str, Any]:
    if run.engine.world.rank:
        return {}
    assert run.view.generate is not None
    model = run.engine.model
    training = model.training
    model.eval()
    try:
        with run.engine.precision():
            (text,) = run.view.generate(
                prompts=[action.prompt],
                tokens=action.tokens,
                seed=run.view.seed_of(f"sample|{action.prompt}"),
                temperature=action.temperature,
            )
    except Exception as error:  # a prompt too long, weights that are no numbers: looking must not end the run
        return {"text": "", "failed": f"{type(error).__name__}: {error}"[:500], "step": run.clock.step}
    finally:
        model.train(training)
    return {"text": text, "step": run.clock.step}


def _undone(run: Run, trial: Trial, action: Any, place: str) -> None:
    """Find what to do instead, unless it is said already (in a journal or a replay)."""
    if action.acts is None:
        done = run.standing.done.get(action.id)
        if done is None or done["do"] != "applied":
            known = [name for name, entry in run.standing.done.items() if entry["do"] == "applied"]
            raise UserError(f"{place}: no request '{action.id}' was done here{did_you_mean(action.id, known)}")
        action.acts = list(reversed(done["undo"]))
        if action.weights:
            if done.get("saved") is None:
                raise UserError(f"{place}: no save was made before '{action.id}'; `rollback` goes to the nearest one")
            if course.saved_at(run, done["saved"], place) != done["saved"]:
                raise UserError(
                    f"{place}: the save made before '{action.id}', of tick {done['saved']}, is gone; "
                    "`rollback` goes to the nearest one"
                )
            action.acts.insert(0, {"do": "rollback", "to": done["saved"], "skip": False})
        elif not action.acts:
            raise UserError(
                f"{place}: '{action.id}' cannot be put back from now on; `undo` with `weights` goes back to before it"
            )
    action.acts = [check(run, parse(act, place=place), trial, place).model_dump(mode="json") for act in action.acts]


def _undo_effect(run: Run, action: Any) -> dict[str, Any]:
    inner = [effect(run, parse(act, place="undo")) for act in action.acts]
    return {"changes": [change for one in inner for change in one.get("changes", [])], "acts": action.acts}


def _undo(run: Run, action: Any) -> None:
    for act in action.acts:
        apply(run, parse(act, place="undo"))


Check = Callable[["Run", Trial, Any, str], None]


def _nothing(run: Run, action: Any) -> None:
    """Told by the journal alone: pauses, locks, approvals, notes."""


def _anything(run: Run, trial: Trial, action: Any, place: str) -> None:
    """Always possible."""


def _answering(run: Run, trial: Trial, action: Any, place: str) -> None:
    waiting = [name for name in run.standing.waiting if name not in trial.answered]
    if action.id not in waiting:
        raise UserError(f"{place}: nothing waits under '{action.id}'{did_you_mean(action.id, waiting)}")
    trial.answered.add(action.id)


def _silent(run: Run, action: Any) -> dict[str, Any]:
    return {}


ACTS: dict[str, tuple[Check, Callable[[Run, Any], dict[str, Any]], Callable[[Run, Any], dict[str, Any] | None]]] = {
    **values.ACTS,
    **data.ACTS,
    **modules.ACTS,
    **course.ACTS,
    "eval": (_anything, _silent, _eval),
    "sample": (_sampled, _silent, _sample),
    "undo": (_undone, _undo_effect, _undo),
    "approve": (_answering, _silent, _nothing),
    "refuse": (_answering, _silent, _nothing),
    **{name: (_anything, _silent, _nothing) for name in ("pause", "resume", "step", "lock", "unlock", "note")},
}


def check(run: Run, action: Action, trial: Trial, place: str) -> Action:
    """The action with what it names resolved (`last` is a tick); UserError for what cannot be done here and now."""
    action = action.model_copy(deep=True)
    ACTS[action.do][0](run, trial, action, place)
    return action


def unfolded(actions: list[Action]) -> list[Action]:
    """Checked actions, with what an `undo` does in its place: what may be done is judged by what is done."""
    found: list[Action] = []
    for action in actions:
        inner = [parse(act, place="undo") for act in action.acts or []] if action.do == "undo" else []
        found += unfolded(inner) if action.do == "undo" else [action]
    return found


def effect(run: Run, action: Action) -> dict[str, Any]:
    """What a checked action would change, and under `undo` the actions that put it back."""
    return {"do": action.do, **ACTS[action.do][1](run, action)}


def effects(run: Run, actions: list[Action]) -> list[dict[str, Any]]:
    """What checked actions would change together: each as those before it would have left the stage."""
    made, found = foreseen.sketch(run), []
    for action in actions:
        found.append(effect(made, action))
        foreseen.do(made, action)
    in_use(made, found)
    return found


def apply(run: Run, action: Action) -> dict[str, Any]:
    """Do it. Returns what only the doing shows: measures, text."""
    return ACTS[action.do][2](run, action) or {}

"""What is drawn from: shares, sources that join or go, rows passed over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tutelage.base.errors import UserError, did_you_mean
from tutelage.core.acts.trial import Trial
from tutelage.core.stream import Cursor

if TYPE_CHECKING:
    from tutelage.core.stage import Run


def _mixed(run: Run, trial: Trial, action: Any, place: str) -> None:
    own = trial.own(run)
    if other := sorted(set(action.weights) - set(own)):
        there = f"{did_you_mean(other[0], own)} (there are: {', '.join(own)})"
        raise UserError(f"{place}: there is no source '{other[0]}' to mix{there}")
    if action.weights and not 0 < sum(action.weights.values()) < math.inf:
        raise UserError(f"{place}: `mix` weighs {', '.join(own)} with numbers, 0 or more, not all zero, none endless")
    trial.mix = dict(action.weights) or None


def _mix_effect(run: Run, action: Any) -> dict[str, Any]:
    was = run.steered.mix
    whole = sum(action.weights.values())
    now = {name: weight / whole for name, weight in action.weights.items()} if whole else None
    return {"changes": [{"what": "mix", "was": was, "now": now}], "undo": [{"do": "mix", "weights": was or {}}]}


def _mix(run: Run, action: Any) -> None:
    run.steered.mix = dict(action.weights) or None


def _added(run: Run, trial: Trial, action: Any, place: str) -> None:
    if action.source is None:
        if action.name not in trial.dropped:
            raise UserError(f"{place}: say what '{action.name}' is (`source:`); no source of that name was dropped")
        trial.dropped.discard(action.name)
        return
    if action.name in run.sources or action.name in trial.added:
        raise UserError(f"{place}: there is already a source '{action.name}'; name this one otherwise")
    if action.source.use:  # or whoever may send a request could have any class of any module called
        raise UserError(f"{place}: `add_source` takes files and data sets, not code; a generator stands in the recipe")
    if action.source.stage:
        raise UserError(
            f"{place}: `add_source` takes a path, hub or generator; a stage's rows are {{path: …/rows.jsonl}}"
        )
    if sum(trial.added.values()) + action.weight >= 1:  # one that was dropped may come back
        raise UserError(f"{place}: the sources that were added would take the whole mixture")
    trial.opened |= run.opened(action.name, action.source)[2]  # divided and put in order: what is wrong is told now
    trial.mix = _joined(trial.mix, trial.own(run), action)
    trial.added[action.name] = action.weight


def _joined(mix: dict[str, float] | None, own: list[str], action: Any) -> dict[str, float] | None:
    """The mix that an action set, if any, with a source that takes its share of it; the others keep their ratios."""
    if not mix:
        return mix
    others = sum(weight for name, weight in mix.items() if name in own)
    return {**mix, action.name: action.weight / (1 - action.weight) * others}


def _added_effect(run: Run, action: Any) -> dict[str, Any]:
    mix, back = run.steered.mix, action.source is None
    now = action.weight if not back else "back" if not mix or mix.get(action.name) else "back; the mix gives it nothing"
    changes = [{"what": f"source {action.name}", "was": None, "now": now}]
    return {"changes": changes, "undo": [{"do": "drop_source", "name": action.name}]}


def joins(run: Run, action: Any) -> None:
    """What is drawn from then on, as far as it is remembered; the source itself is not opened."""
    steered = run.steered
    if action.source is None:
        steered.dropped.remove(action.name)
        return
    steered.mix = _joined(steered.mix, run.own(), action)
    steered.added[action.name] = {"source": action.source.model_dump(mode="json"), "weight": action.weight}


def _add(run: Run, action: Any) -> None:
    joins(run, action)
    if action.source is not None:
        run.open_source(action.name)


def _dropped(run: Run, trial: Trial, action: Any, place: str) -> None:
    own = trial.own(run)
    if action.name not in own:
        raise UserError(f"{place}: there is no source '{action.name}' to drop{did_you_mean(action.name, own)}")
    if len(own) == 1:
        raise UserError(f"{place}: '{action.name}' is the only source; nothing would be left")
    trial.dropped.add(action.name)
    mix = trial.mix
    if mix and not any(weight for name, weight in mix.items() if name in trial.own(run)):
        raise UserError(f"{place}: without '{action.name}' every share of the present mix is zero")


def _dropped_effect(run: Run, action: Any) -> dict[str, Any]:
    changes = [{"what": f"source {action.name}", "was": "drawn", "now": "dropped"}]
    return {"changes": changes, "undo": [{"do": "add_source", "name": action.name}]}


def _drop(run: Run, action: Any) -> None:
    run.steered.dropped.append(action.name)


def _skipped(run: Run, trial: Trial, action: Any, place: str) -> None:
    drawn = [*run.stream.cursors(), *sorted(trial.opened)]
    if action.source not in drawn:
        there = f"{did_you_mean(action.source, drawn)} (there are: {', '.join(drawn)})"
        raise UserError(f"{place}: nothing is drawn from a source '{action.source}'{there}")


def _skip_effect(run: Run, action: Any) -> dict[str, Any]:
    before = run.stream.cursors().get(action.source, Cursor()).next
    return {"changes": [{"what": f"position in {action.source}", "was": before, "now": f"{action.rows} rows on"}]}


def _skip(run: Run, action: Any) -> None:
    run.stream.skip(action.source, rows=action.rows, length=run.node.stage.length)


ACTS = {
    "mix": (_mixed, _mix_effect, _mix),
    "add_source": (_added, _added_effect, _add),
    "drop_source": (_dropped, _dropped_effect, _drop),
    "skip_data": (_skipped, _skip_effect, _skip),
}

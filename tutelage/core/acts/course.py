"""Where the stage goes: its end, its saves, and back to one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tutelage.base.clock import Span
from tutelage.base.errors import UserError
from tutelage.core import artifact, checkpoint
from tutelage.core.acts.trial import Trial
from tutelage.core.acts.values import base_rate, factor, plain, times, value
from tutelage.core.pace import UNKNOWN

if TYPE_CHECKING:
    from tutelage.core.stage import Run


def _extended(run: Run, trial: Trial, action: Any, place: str) -> None:
    if action.until.unit == "min":
        raise UserError(f"{place}: `extend` in minutes would not replay; write steps, tokens or percent")
    if action.until.unit == "flop" and "flop" not in run.clock.total:
        raise UserError(f"{place}: how many steps {action.until} are is not known here; write steps, tokens or percent")
    new = run.totals(action.until)
    unit = next(iter(new))
    if new[unit] <= run.clock.count(unit):
        raise UserError(f"{place}: {action.until} is over already; `end_stage` ends the stage now")
    _ends(run, trial, new, place)


def _ends(run: Run, trial: Trial, total: dict[str, float], place: str) -> None:
    """UserError for an end with which something could not be told."""
    if total.get("step", 0) >= UNKNOWN:
        raise UserError(f"{place}: a stage has fewer than {UNKNOWN:,} steps")
    trial.clock.total = total
    trial.told(run, place)


def _total_effect(run: Run, new: dict[str, float]) -> dict[str, Any]:
    unit = run.clock.until
    was = run.clock.total[unit]
    back = [{"do": "extend", "until": f"{was!r}{unit}"}]
    return {
        "changes": [{"what": f"end, in {unit}", "was": was, "now": new.get(unit, next(iter(new.values())))}],
        "undo": back,
    }


def _extend_effect(run: Run, action: Any) -> dict[str, Any]:
    new = run.totals(action.until)
    said = _total_effect(run, new)
    change, before = said["changes"][0], factor(run)
    clock = run.clock.copy()
    clock.total = new
    after = float(run.methods.slots["schedule"].factor(clock))
    if change["now"] > change["was"] and after != before:  # a later end moves the rate that is in use
        change |= {"base": base_rate(run.engine.optimizer), "rate": times(before, after)}
    return said


def _extend(run: Run, action: Any) -> None:
    run.clock.total = run.totals(action.until)
    run.evals.replan(run.clock.total)


def _ended(run: Run, trial: Trial, action: Any, place: str) -> None:
    unit = action.after.unit
    if unit == "min" or (unit != "%" and unit not in run.clock.total):
        raise UserError(f"{place}: `after` is told in steps, tokens or percent of the stage")
    if action.decay and run.methods.slots["schedule"].last is None:
        schedule = run.methods.slots["schedule"].name()
        raise UserError(
            f"{place}: {schedule} has no last fall that could begin now (schedule/wsd and schedule/infinite have)"
        )
    if action.decay and not action.after.value:
        raise UserError(f"{place}: say how long the fall takes: `after: 10%`")
    _ends(run, trial, _ending(run, action), place)


def _after(run: Run, action: Any) -> Span:
    """How long the stage still goes, in its own unit or that of `after`."""
    clock, after = run.clock, action.after
    return Span(clock.total[clock.until] * after.share, clock.until) if after.unit == "%" else after


def _ending(run: Run, action: Any) -> dict[str, float]:
    """The clock's totals when the stage ends so far from now."""
    clock, after = run.clock, _after(run, action)
    if not after.value:
        return {unit: clock.count(unit) for unit in clock.total}
    return run.totals(Span(clock.count(after.unit) + after.value, after.unit))


def _end_effect(run: Run, action: Any) -> dict[str, Any]:
    said = _total_effect(run, _ending(run, action))
    if action.decay:
        schedule = run.methods.slots["schedule"]
        path = f"{schedule.name()}.{schedule.last}"
        was = plain(value(run, path))
        said["changes"].append({"what": path, "was": was, "now": str(_after(run, action))})
        said["undo"].append({"do": "set", "path": path, "to": was})
    return said


def _end(run: Run, action: Any) -> None:
    after = _after(run, action)
    run.clock.total = _ending(run, action)
    if action.decay:
        schedule = run.methods.slots["schedule"]
        setattr(schedule, str(schedule.last), after)
    if after.value:
        run.evals.replan(run.clock.total)


def saved_at(run: Run, to: Any, place: str) -> int:
    """The tick of the newest save at or before `to` that can be read; rank 0's disk decides."""
    saves = artifact.states(run.folder / "state") if not run.engine.world.rank else []
    found = [int(path.name) for path in saves if artifact.whole(path)]
    ticks = list(run.engine.world.agree(found))
    before = [tick for tick in ticks if to == "last" or tick <= to]
    if not before:
        have = ", ".join(map(str, ticks)) or "none yet"
        raise UserError(f"{place}: there is no save at or before tick {to} (saves: {have})")
    return before[-1]


def _rolled(run: Run, trial: Trial, action: Any, place: str) -> None:
    made = [tick for tick in trial.saves if action.to == "last" or tick <= action.to]
    action.to = max(made) if made else saved_at(run, action.to, place)
    counts = trial.saves[action.to] if made else checkpoint.counts_at(run, action.to)
    for key, count in counts.items():
        setattr(trial.clock, key, count)
    trial.clock.tick += 1


def _rollback_effect(run: Run, action: Any) -> dict[str, Any]:
    clock = run.clock
    return {
        "tick": action.to,
        "changes": [{"what": "weights", "was": f"of tick {clock.tick}", "now": f"of tick {action.to}"}],
    }


def _rollback(run: Run, action: Any) -> None:
    if run.engine.world.rank == 0:
        artifact.mark_state(
            run.folder / "state", tick=action.to, mark="kept"
        )  # a resumed stage goes back to it once more
    checkpoint.roll_back(run, tick=action.to, skip=action.skip)
    run.unsound = False
    run.next_tick()


def _branched(run: Run, trial: Trial, action: Any, place: str) -> None:
    if action.to is not None:
        made = [tick for tick in trial.saves if tick <= action.to]
        action.to = max(made) if made else saved_at(run, action.to, place)
    else:
        _sound(run, trial, action, place)


def _branch_effect(run: Run, action: Any) -> dict[str, Any]:
    return {"tick": run.clock.tick if action.to is None else action.to, "name": action.name}


def _branch(run: Run, action: Any) -> None:
    if action.to is None:
        checkpoint.save_now(run, mark="kept")
    elif run.engine.world.rank == 0:
        artifact.mark_state(run.folder / "state", tick=action.to, mark="kept")


def _sound(run: Run, trial: Trial, action: Any, place: str) -> None:
    if run.unsound:
        raise UserError(f"{place}: the last loss was no number, and such weights are not saved")
    trial.save()


def _save_effect(run: Run, action: Any) -> dict[str, Any]:
    return {"tick": run.clock.tick}


def _save(run: Run, action: Any) -> None:
    checkpoint.save_now(run, mark="kept")


ACTS = {
    "extend": (_extended, _extend_effect, _extend),
    "end_stage": (_ended, _end_effect, _end),
    "rollback": (_rolled, _rollback_effect, _rollback),
    "branch": (_branched, _branch_effect, _branch),
    "save": (_sound, _save_effect, _save),
}

"""What a request's actions would change, one after the other, though none of them is done."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from tutelage.base.action import Action, parse
from tutelage.core import checkpoint
from tutelage.core.acts import course, data, modules, values

if TYPE_CHECKING:
    from tutelage.core.stage import Run

DONE = {"set": values.put_in, "scale": values.put_in, "mix": data.ACTS["mix"][2],
        "add_source": data.joins, "drop_source": data.ACTS["drop_source"][2], "extend": course.ACTS["extend"][2],
        "end_stage": course.ACTS["end_stage"][2], "skip_data": data.ACTS["skip_data"][2]}  # fmt: skip


def sketch(run: Run) -> Run:
    """A stand-in that says what `run` says of its values, rates, shares, end, data and what is trained, to be changed in these."""
    made, methods = copy.copy(run), run.methods
    slots = {slot: method and method.model_copy() for slot, method in methods.slots.items()}
    made.methods = replace(methods, slots=slots, listed=[method.model_copy() for method in methods.listed])
    made.engine = copy.copy(run.engine)
    made.engine.optimizer = cast(
        Any, SimpleNamespace(param_groups=[dict(group) for group in run.engine.optimizer.param_groups])
    )
    made.view = replace(run.view, clock=run.clock.copy(), engine=made.engine)
    made.steered, made.shares = copy.deepcopy(run.steered), dict(run.shares)
    made.evals, made.stream = replace(run.evals), run.stream.copy()
    return made


def do(made: Run, action: Action) -> None:
    """Do to a sketch what the actions after this one may read."""
    if action.do == "undo":
        for act in action.acts or []:
            do(made, parse(act, place="undo"))
    elif action.do == "rollback":
        tick, world = int(action.to), made.engine.world
        place = made.folder / "state" / f"{tick:09d}" / "state.json"
        if world.largest(int(not world.rank and place.exists())):  # else this request makes it, as things are now
            facts = checkpoint.facts_at(made, tick)
            for key in checkpoint.COUNTS:
                setattr(made.clock, key, facts["clock"][key])
            if not action.skip:
                made.stream.load(facts["stream"])
        made.clock.tick += 1
    elif action.do == "reset":
        made.clock.tick += 1
    elif action.do in ("freeze", "unfreeze"):
        names = modules.matched(made, action.modules, action.do)
        kept = {*made.engine.params} - names if action.do == "freeze" else {*made.engine.params} | names
        made.engine.params = {name: made.engine.model.get_parameter(name) for name in sorted(kept)}
    elif action.do == "skip_data" and action.source not in made.stream.cursors():
        return  # of a source that joins with this request
    elif action.do in DONE:
        DONE[action.do](made, action)

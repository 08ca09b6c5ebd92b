"""What a request's actions would change, one after the other, though none of them is done."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from tutelage.base.action import Action, parse
from tutelage.core import checkpoint
from tutelage.core.acts import course, data, values

if TYPE_CHECKING:
    from tutelage.core.stage import Run

DONE = {"set": values.put_in, "scale": values.put_in, "mix": data.ACTS["mix"][2], "extend": course.ACTS["extend"][2],
        "end_stage": course.ACTS["end_stage"][2]}  # fmt: skip


def sketch(run: Run) -> Run:
    """A stand-in that says what `run` says of its values, rates, shares and end, and can be changed in these alone."""
    made, methods = copy.copy(run), run.methods
    slots = {slot: method and method.model_copy() for slot, method in methods.slots.items()}
    made.methods = replace(methods, slots=slots, listed=[method.model_copy() for method in methods.listed])
    made.engine = copy.copy(run.engine)
    made.engine.optimizer = cast(
        Any, SimpleNamespace(param_groups=[dict(group) for group in run.engine.optimizer.param_groups])
    )
    made.view = replace(run.view, clock=run.clock.copy(), engine=made.engine)
    made.steered, made.shares = copy.deepcopy(run.steered), dict(run.shares)
    made.evals = replace(run.evals)
    return made


def do(made: Run, action: Action) -> None:
    """Do to a sketch what the actions after this one may read."""
    if action.do == "undo":
        for act in action.acts or []:
            do(made, parse(act, place="undo"))
    elif action.do == "rollback":
        tick, world = int(action.to), made.engine.world
        there = (
            not world.rank and (made.folder / "state" / f"{tick:09d}" / "state.json").exists()
        )  # rank 0's disk decides
        if world.largest(int(there)):  # else this request makes it, as things are now
            for key, count in checkpoint.counts_at(made, tick).items():
                setattr(made.clock, key, count)
    elif action.do in DONE:
        DONE[action.do](made, action)

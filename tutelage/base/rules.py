"""`on:` rules of a recipe: where a stage may go on to, and whether that can be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tutelage.base.errors import UserError
from tutelage.base.links import at, order, references
from tutelage.base.marked import Map
from tutelage.base.spec import Recipe, Stage


def entered_by(stages: Mapping[str, Stage]) -> dict[str, list[str]]:
    """For every stage that is made only if a rule enters it: the stages that have such a rule."""
    found: dict[str, list[str]] = {}
    for name, stage in stages.items():
        for rule in stage.on:
            if name not in found.setdefault(rule.enter, []):
                found[rule.enter].append(name)
    return found


def check(recipe: Recipe, tree: Map) -> None:
    """UserError, with the line, for a rule that cannot be taken as it is written."""
    behind = _behind(recipe)
    for name, stage in recipe.stages.items():
        where = f"stages.{name}.on"
        if stage.on and stage.until is None:
            raise UserError(f"{at(tree, ('stages', name, 'on'))}{where}: only a stage that trains `until` has ways out")
        last = [i for i, rule in enumerate(stage.on) if rule.otherwise]
        if len(last) > 1:
            raise UserError(
                f"{at(tree, ('stages', name, 'on', last[1]))}{where}.{last[1]}: a second `otherwise` is never taken"
            )
        for i, rule in enumerate(stage.on):
            if name not in behind[rule.enter]:
                start: Any = recipe.stages[rule.enter].start
                raise UserError(
                    f"{at(tree, ('stages', name, 'on', i, 'enter'))}{where}.{i}.enter: stage '{rule.enter}' does not go on "
                    f"from '{name}' (its start is {start}); write start: {name}, or a stage that starts from it"
                )


def _behind(recipe: Recipe) -> dict[str, set[str]]:
    """By stage, all that its weights may come from."""
    found: dict[str, set[str]] = {}
    for name in order(recipe):
        starts = references({"start": recipe.stages[name].start}, among=recipe.stages)
        found[name] = {*starts, *(older for start in starts for older in found[start])}
    return found

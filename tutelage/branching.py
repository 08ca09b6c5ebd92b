"""`tutelage branch`: a recipe that goes on from a saved step of a stage, and what of the stage it takes along."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from tutelage.base import load
from tutelage.base.clock import Clock, Span
from tutelage.base.errors import UserError
from tutelage.base.marked import plain
from tutelage.base.spec import Recipe, SourceSpec
from tutelage.core import artifact
from tutelage.core.elsewhere import at_step, saved_steps
from tutelage.core.graph import Node, methods_of
from tutelage.core.identity import difference
from tutelage.look import folder_of, node_of

console = Console(highlight=False, markup=False)
_TOP = ("stages", "modality", "seed", "report_to")


def branch_stage(stage: str, recipe: Path, *, step: int | None, sets: list[str], runs: Path) -> None:
    """Write the recipe of a branch. `sets` change it: `stages.code.until=1Mtok`, or `until=1Mtok` for its one stage."""
    if recipe.exists():
        raise UserError(f"{recipe} is there already; name another file")
    folder = folder_of(stage, runs=runs)
    node = node_of(folder)
    if node.stage.until is None:
        raise UserError(f"{folder} did not train; only a stage that trains `until` has steps to branch from")
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"{folder} has no checkpoint to branch from")
    step = steps[-1] if step is None else step
    name = node.root
    sets = [text if text.partition("=")[0].split(".")[0] in _TOP else f"stages.{name}.{text}" for text in sets]
    source = at_step(node, step)  # now: a later save must not take the step away
    tree, notes = _tree(node, step, stage_name=f"{folder.parent.parent.name}/{folder.parent.name}", sets=sets)
    before = load.load(tree)
    made = load.load(tree, sets=sets)
    changed = difference(
        before.model_dump(mode="json")["stages"][name], made.model_dump(mode="json")["stages"][name], limit=20
    )
    head = [
        f"# written by: tutelage branch {stage} {recipe} --step {step}",
        f"# goes on from step {step} of {folder}",
        *(f"# {what}: {said}" for what, said in notes),
        *([f"# changed: {changed}"] if changed else []),
    ]
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text("\n".join(head) + "\n" + _yaml(made), encoding="utf-8")
    console.print(f"Wrote {recipe}: stage {name} from step {step} of {folder} ({source})", soft_wrap=True)
    for what, said in [*notes, *([("changed", changed)] if changed else [])]:
        console.print(f"  {what}: {said}", soft_wrap=True, markup=False)
    where = "" if runs == Path("runs") else f" --runs {runs}"
    console.print(f"To run it: tutelage run {recipe}{where}", soft_wrap=True)


def _yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(plain(recipe, bare=True), sort_keys=False, allow_unicode=True, width=110)


def _tree(node: Node, step: int, *, stage_name: str, sets: list[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The branch's recipe as a tree, with a note on everything that is taken along, changed or impossible."""
    assert node.folder is not None
    facts = artifact.load_state(node.folder / "state" / f"{step:09d}")[1]
    stage = plain(node.stage, bare=True)
    notes = [("kept", "weights, tokenizer")]
    stage.pop("tokenizer", None)  # the start's own now
    wrapped = [method.name() for method in methods_of(node.name, node.stage).having("wrap")]
    carry = ["schedule", "data"] if wrapped else ["optimizer", "schedule", "data"]
    notes.append(("kept", ", ".join({"data": "position in the data"}.get(word, word) for word in carry)))
    if wrapped:
        what = f"the optimizer's state: {', '.join(wrapped)} is folded into the weights and begins anew"
        notes.append(("impossible", what))
    begun = [
        m.name() for m in methods_of(node.name, node.stage).all() if m.refs or {"begin", "penalty"} <= {*m.hooks()}
    ]
    if begun:
        notes.append(
            (
                "changed",
                f"{', '.join(begun)}: measured from the weights of step {step}, no longer from the stage's start",
            )
        )
    kept = _kept(node)
    stage |= {"start": f"{stage_name}@{step}", "carry": carry, "until": _until(node, facts, step, sets)}
    stage["data"] = {name: _spec(node, spec) for name, spec in node.stage.data.items()}
    stage.pop("keep", None)
    if stage.pop("on", None):
        notes.append(
            ("changed", "the rules under `on` are left out: the branch has none of the stages that they enter")
        )
    if kept:
        stage["keep"] = {name: _spec(node, spec) for name, (_, spec) in kept.items()}
        notes.append(("kept", f"what must not be lost, under `keep`: {', '.join(kept)}"))
    else:
        stage["keep"] = "none"
    if "methods" in stage:
        stage["methods"] = [{"use": entry} if isinstance(entry, str) else entry for entry in stage["methods"]]
    for entry in stage.get("methods", []):
        notes += _renamed(node, entry, kept)
    recipe: dict[str, Any] = {"seed": node.seed, "stages": {node.root: stage}}
    if node.graph.recipe.modality != "text":
        recipe["modality"] = node.graph.recipe.modality
    return recipe, notes


def _spec(node: Node, spec: SourceSpec) -> dict[str, Any]:
    """A source as a recipe of its own can name it: rows that a stage made are read from where they lie."""
    tree: dict[str, Any] = plain(spec, bare=True)
    rows = node.rows_of(spec)
    if rows is not None:
        tree.pop("stage")
        tree["path"] = str(rows / "rows.jsonl")
    return tree


def _kept(node: Node) -> dict[str, tuple[str, SourceSpec]]:
    """What the branch must not lose: ancestors' data and what was kept, with the stage that each belongs to.

    What the stage itself learns from is left out, unless a method reads it by an ancestor's name.
    """
    found: dict[str, tuple[str, SourceSpec]] = {}
    others = [(name, node.graph.nodes[name].stage.data) for name in reversed(node.lineage())]
    entries = [entry if isinstance(entry, dict) else {"use": entry} for entry in plain(node.stage).get("methods", [])]
    read = [spec for of in map(partial(_of, node), entries) if of for spec in node.find_data(of).values()]
    for owner, specs in [*others, ("keep", node.kept())]:
        for name, spec in specs.items():
            known = [other for _, other in found.values()]
            if node.stage.data.get(name) == spec and (spec in known or spec not in read):
                continue
            free = name not in found and name not in node.stage.data
            found[name if free else f"{owner}.{name}"] = (owner, spec)
    return found


def _of(node: Node, entry: dict[str, Any]) -> str | None:
    """The stage or the name under `keep` whose data a method reads, if it reads any."""
    default = next((m.of for m in _listed(node) if m.name() == entry["use"] and hasattr(m, "of")), None)
    of = entry.get("of", default)
    return of if isinstance(of, str) else None


def _renamed(node: Node, entry: dict[str, Any], kept: dict[str, tuple[str, SourceSpec]]) -> list[tuple[str, str]]:
    """Put a name under `keep` in the place of a stage, which the branch's recipe does not hold."""
    of = _of(node, entry)
    if of is None or (of in kept and kept[of][1] == node.kept().get(of)):
        return []
    wanted = list(node.find_data(of).values())
    names = [name for name, (_, spec) in kept.items() if spec in wanted]
    new = names[0] if len(names) == 1 else "previous"
    entry["of"] = new
    if len(names) == len(wanted) and (len(names) == 1 or len(names) == len(kept)):
        return [("kept", f"{entry['use']}: `of: {new}` is what `of: {of}` was")]
    return [("changed", f"{entry['use']} reads all that is kept ({', '.join(kept)}), where it read that of {of}")]


def _listed(node: Node) -> list[Any]:
    return methods_of(node.name, node.stage).listed


def _until(node: Node, facts: dict[str, Any], step: int, sets: list[str]) -> str:
    """What was left of the stage, in the unit that it counts."""
    clock = Clock(**facts["clock"])
    unit = clock.until
    left = clock.total[unit] - clock.count(unit)
    if left > 1e-9:
        return str(Span(left, unit))
    if any(text.startswith(f"stages.{node.root}.until=") for text in sets):
        return "1step"  # replaced by what is set
    assert node.folder is not None
    have = ", ".join(map(str, saved_steps(node.folder)))
    raise UserError(
        f"step {step} is the end of {node.folder}: say how much further with --set until=…, "
        f"or branch from an earlier step (it has: {have})"
    )

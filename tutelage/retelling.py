"""`tutelage new recipe --from RUN`: a steered run as a recipe, with what was done to it under `actions:`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from tutelage.base import load
from tutelage.base.errors import UserError
from tutelage.base.marked import plain
from tutelage.base.spec import Recipe
from tutelage.core.graph import methods_of
from tutelage.core.pace import UNKNOWN
from tutelage.core.record import read_lines
from tutelage.replaying import IDLE, Line, saves, with_saves
from tutelage.watching import find, newest

# What only sets who may act, or looks: in a recipe there is nobody to ask.
_SILENT = IDLE | {"approve", "refuse", "lock", "unlock", "eval"}


def retell(reference: str, *, out: Path, runs: Path, console: Console) -> None:
    """Write the recipe of RUN with the journals of its stages as actions; the names and reasons stand in comments."""
    if out.exists():
        raise UserError(f"{out} is there already; name another file with --out")
    home = find(reference, runs=runs).parent.parent
    if not (home / "recipe.yaml").exists():
        raise UserError(f"{home / 'recipe.yaml'} is missing: it is what the actions are added to")
    recipe = load.load(home / "recipe.yaml")
    tree = plain(recipe, bare=True)
    for name, stage in recipe.stages.items():
        if stage.until is None:  # a length that is not written would be that of what the stage starts from
            tree["stages"][name]["length"] = stage.length
    stages = tree.pop("stages")
    text = [f"# written by: tutelage new recipe --from {reference}", *_dump(tree), "stages:"]
    count = 0
    for name, stage in stages.items():
        folder = newest(home / name, runs)
        lines = read_lines(folder / "journal.jsonl") if folder else []
        notes = _settle(stage, recipe, name, lines)
        acts = actions(lines)
        ahead = [act for act in stage.pop("actions", []) if act["tick"] > max(_ticks(lines), default=-1)]
        acts += [({**act}, "") for act in ahead if f"recipe-{act['tick']}" not in _refused(lines)]
        count += len(acts)
        text += [f"  {name}:", *(f"    # {note}" for note in notes)]
        text += [f"    {line}" for line in _dump(stage)] + (
            [f"    actions: {'' if acts else '[]'}".rstrip()] if acts else []
        )
        for act, said in acts:
            text += [f"      # {line}" for line in textwrap.wrap(said, 110)] + [f"      - {_flow(act)}"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(text) + "\n", encoding="utf-8")
    load.load(out)
    console.print(f"Wrote {out}: the run {home.name} with {count} actions", soft_wrap=True)
    console.print(f"To run it: tutelage run {out}", soft_wrap=True)


def actions(lines: list[Line]) -> list[tuple[dict[str, Any], str]]:
    """A recipe's actions, each with who did it and why, of a journal's lines."""
    found = []
    for line in with_saves(lines):
        if line["by"] == "engine":
            ends = [act for act in line["do"] if act["do"] == "until"]
            for act in ends:
                end = {"tick": line["tick"], "do": "extend", "until": f"{round(act['total']['step'])}step"}
                found.append((end, "so many steps the stage's minutes were"))
            continue
        why = str(line.get("why") or "")
        who = "to go back to" if line["by"] == "replay" else f"{line['by']} ({line.get('actor', 'person')})"
        for act in line["do"]:
            for one in act["acts"] if act["do"] == "undo" else [act]:
                if one["do"] not in _SILENT and not (one["do"] == "branch" and not saves(one)):
                    said = {key: value for key, value in one.items() if value is not None}
                    said = {"do": "save"} if one["do"] == "branch" else said
                    note = f"{who}, undoing {act['id']}" if act["do"] == "undo" else who
                    entry = {"tick": line["tick"], **said} | ({"why": why} if why else {})
                    found.append((entry, f"{note}: {why}" if why else note))
    return found


def _settle(stage: dict[str, Any], recipe: Recipe, name: str, lines: list[Line]) -> list[str]:
    """Write into a stage what its run chose by measuring the machine; returns remarks on it."""
    notes = []
    chosen = [act for line in lines if line["by"] == "engine" for act in line["do"]]
    micro = [act["rows"] for act in chosen if act["do"] == "micro"]
    if micro and recipe.stages[name].engine.micro is None:
        stage["engine"] = {**stage.get("engine", {}), "micro": micro[0]}
        notes.append(f"rows of a micro-batch: found by trial, {micro[0]}")
    if len(set(micro)) > 1:
        notes.append(f"memory forced fewer rows later ({micro[-1]}): the last bits may differ from the run's")
    if any(act["do"] == "until" for act in chosen):
        stage["until"] = f"{UNKNOWN}step"
        notes.append("its length was told in minutes; an action below says how many steps they were")
    if recipe.stages[name].until is not None and methods_of(name, recipe.stages[name]).having("act"):
        stage["steering"] = {**stage.get("steering", {}), "replay": True}
        notes.append("replay: its policies only follow; what they did stands under actions")
    return notes


def _ticks(lines: list[Line]) -> list[int]:
    return [line["tick"] for line in lines if line["by"] != "engine"]


def _refused(lines: list[Line]) -> set[str]:
    return {act["id"] for line in lines if line["by"] == "engine" for act in line["do"] if act["do"] == "refused"}


def _dump(tree: dict[str, Any]) -> list[str]:
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110) if tree else ""
    return text.splitlines()


def _flow(act: dict[str, Any]) -> str:
    """An action on one line."""
    return yaml.safe_dump(act, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6).strip()

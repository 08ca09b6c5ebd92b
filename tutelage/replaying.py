"""`tutelage replay`: a steered stage again, from its recipe and its journal, in a run of its own; and are the bits equal?

The replay's folder holds the journal before the first step, so the trainer does what it does after a crash before any
save: it applies what is written down, each at its tick, and asks policies only so that they remember.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tutelage import modalities
from tutelage.base import load
from tutelage.base.action import CHANGES
from tutelage.base.errors import UserError
from tutelage.core import artifact
from tutelage.core.graph import Drift, Graph
from tutelage.core.record import dumps, read_lines, write_whole
from tutelage.core.run import Tell, run_graph
from tutelage.look import digest_of
from tutelage.steering import name_of
from tutelage.watching import find, newest, read

Line = dict[str, Any]
IDLE = frozenset({"pause", "resume", "step", "note", "sample"})  # change no number, now or later
OTHER = "--replay"
console = Console(highlight=False, markup=False)


@dataclass(frozen=True)
class Replayed:
    """A stage and its replay: the digests of their weights at `tick`, of the finished stage where `tick` is None."""

    stage: str
    tick: int | None
    digest: str
    again: str

    @property
    def equal(self) -> bool:
        return self.digest == self.again


def replay(reference: str, *, runs: Path, tell: Tell = lambda stage, said: None) -> list[Replayed]:
    """Run RUN/STAGE (or every stage of RUN that trained) once more, as it was steered, in the run `RUN--replay`.

    An unfinished stage is replayed up to its newest save. UserError where something else would be run now: the
    recipe, the data or a method's code changed since.
    """
    run, _, stage = reference.partition("/")
    folder = find(reference if stage else run, runs=runs)
    home = folder.parent.parent
    other = home.with_name(home.name + OTHER)
    if other.exists():
        raise UserError(f"{other} is there already; remove it (rm -r {other}) to replay once more")
    graph = _graph(home, name=other.name, runs=runs)
    names = [stage] if stage else list(graph.nodes)
    places = {name: newest(home / name, runs) for name in names}
    again = [name for name in names if places[name] and graph.nodes[name].stage.until is not None]
    if not again:
        raise UserError(f"{reference} has no stage that trained; there is nothing to replay")
    before = {name: _digest(Path(str(places[name]))) for name in again}  # now: a running stage's saves come and go
    try:
        for name in again:
            seed(Path(str(places[name])), other / name / "1", tick=before[name][0])
        for name in set(graph.nodes) - set(again):
            if (home / name).is_dir():
                os.symlink(Path("..") / home.name / name, other / name)
        shutil.copyfile(home / "recipe.yaml", other / "recipe.yaml")
        for name in again:
            result = run_graph(graph, only=name, jobs=1, drift="refuse", tell=tell)
            if result.failed or result.stopped:
                said = "; ".join(result.failed.values()) or "it was stopped"
                raise UserError(f"the replay of {home.name}/{name} ended early: {said}")
    except Drift as drift:
        shutil.rmtree(other)
        raise UserError(f"{drift.what}: what is here now is not what was run, so it cannot be replayed") from drift
    return [
        Replayed(f"{home.name}/{name}", tick, digest, _digest(other / name / "1", tick=tick)[1])
        for name, (tick, digest) in before.items()
    ]


def replay_command(reference: str, *, runs: Path, as_json: bool) -> int:
    """Replay and print both digests; 1 when they differ."""
    from tutelage.display import Display

    with Display(Console(quiet=as_json, markup=False), peak=0.0) as display:
        found = replay(reference, runs=runs, tell=display.tell)
    if as_json:
        print(dumps([{**one.__dict__, "equal": one.equal} for one in found]))
    for one in found if not as_json else []:
        where = "" if one.tick is None else f" at tick {one.tick:,}"
        console.print(f"{one.stage}{where}: {'equal' if one.equal else 'NOT EQUAL'}", soft_wrap=True)
        console.print(f"  run     {one.digest}\n  replay  {one.again}", soft_wrap=True)
    return 0 if all(one.equal for one in found) else 1


def _graph(home: Path, *, name: str, runs: Path) -> Graph:
    if not (home / "recipe.yaml").exists():
        raise UserError(f"{home / 'recipe.yaml'} is missing: a run is replayed from its recipe")
    recipe = load.load(home / "recipe.yaml")
    recipe.report_to = []
    return Graph.resolve(recipe, name=name, modality=modalities.find(recipe.modality), runs=runs)


def _digest(folder: Path, *, tick: int | None = None) -> tuple[int | None, str]:
    """The tick (None: finished) and the digest of a stage's weights."""
    if tick is None and (folder / "artifact").exists():
        return None, digest_of(folder)
    saves = artifact.states(folder / "state")
    if not saves:
        raise UserError(f"{name_of(folder)} has no save yet; there is nothing to compare a replay with")
    place = saves[-1] if tick is None else folder / "state" / f"{tick:09d}"
    return int(place.name), artifact.digest(artifact.load_state(place)[0]["model"].items())


# -- the journal of a replay ------------------------------------------------------------------------------------------


def seed(of: Path, folder: Path, *, tick: int | None) -> None:
    """A stage's folder before its first step, with all that will be done to it already written down."""
    lines = read_lines(of / "journal.jsonl")
    whole = told(lines)
    if tick is not None:
        facts = read(of / "state" / f"{tick:09d}" / "state.json") or {}
        whole = told(lines[: facts.get("lines", 0)], known=lines)
        whole += _pair({"id": "replay-end", "tick": tick, "do": [{"do": "end_stage"}]}, None)
    folder.mkdir(parents=True)
    about = json.loads((of / "stage.json").read_text(encoding="utf-8"))
    write_whole(folder / "stage.json", dumps(about))
    write_whole(folder / "journal.jsonl", "".join(dumps(line) + "\n" for line in whole))


def told(lines: list[Line], *, known: list[Line] | None = None) -> list[Line]:
    """Journal lines for a replay: what changes no number left out, a save put in where somebody goes back to one.

    After every action stands what became of it (found in `known`), or the trainer would write it down at the end.
    """
    became = {entry["id"]: line for line in known or lines if line["by"] == "engine"
              for entry in line["do"] if entry["do"] == "applied"}  # fmt: skip
    found: list[Line] = []
    failed = {
        entry["id"] for line in lines if line["by"] == "engine" for entry in line["do"] if entry["do"] == "failed"
    }
    for line in with_saves([line for line in lines if line.get("id") not in failed]):
        if line["by"] == "engine":
            rest = [entry for entry in line["do"] if entry["do"] not in ("applied", "failed")]
            found += [{**line, "do": rest}] if rest else []
            continue
        do = [act for act in line["do"] if act["do"] not in IDLE]
        asked = line.get("actor") in ("policy", "recipe")  # it asks again, and is not heard twice
        found += _pair({**line, "do": do}, became.get(line["id"])) if do or asked else []
    return found


def _pair(line: Line, became: Line | None) -> list[Line]:
    """An action's line, and the engine's that says it was done."""
    line = {"by": "replay", "actor": "recipe", **line}
    done = {"do": "applied", "id": line["id"], "actor": line["actor"], "effects": [], "undo": [], "saved": None}
    return [line, became or {"id": f"{line['id']}-done", "tick": line["tick"], "by": "engine", "do": [done]}]


def with_saves(lines: list[Line]) -> list[Line]:
    """Lines, with a save where a later one goes back to it: saves made by the clock, or before a change, come not again."""
    found = list(lines)
    for tick in sorted({to for line in lines if line["by"] != "engine" for act in line["do"] for to in back(act)}):
        if not any(saves(act) for line in found if _asked_at(line, tick) for act in line["do"]):
            place = _place(found, tick)
            found.insert(place, {"id": f"replay-save-{tick}", "tick": tick, "by": "replay", "actor": "recipe",
                                 "do": [{"do": "save"}]})  # fmt: skip
    return found


def back(act: dict[str, Any]) -> list[int]:
    """Ticks of the saves that an action goes back to."""
    if act["do"] == "undo":
        return [to for inner in act.get("acts") or [] for to in back(inner)]
    return [int(act["to"])] if act["do"] == "rollback" and act["to"] != "last" else []


def saves(act: dict[str, Any]) -> bool:
    return bool(act["do"] == "save" or (act["do"] == "branch" and act.get("to") is None))


def _asked_at(line: Line, tick: int) -> bool:
    return bool(line["by"] != "engine" and line["tick"] == tick)


def _place(lines: list[Line], tick: int) -> int:
    """Where the newest save of a tick was made: before a person's or agent's last change there, else at its beginning."""
    changed = [
        i
        for i, line in enumerate(lines)
        if _asked_at(line, tick)
        and line.get("actor") in ("person", "agent")
        and any(act["do"] in CHANGES for act in line["do"])
    ]
    first = next((i for i, line in enumerate(lines) if line["by"] != "engine" and line["tick"] >= tick), len(lines))
    return changed[-1] if changed else first

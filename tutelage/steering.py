"""Steering from outside: what any client (command, page, server, agent) does in a stage's folder. No torch, no process.

The words and files are those of docs/steering.md. A client writes requests, and reads what the trainer wrote.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tutelage.base.action import MOST, parse
from tutelage.base.errors import UserError
from tutelage.base.registry import CODE
from tutelage.core.record import dumps, plain, read_lines, sync
from tutelage.watching import NAME, StageInfo, controls, find, live, name_of, read, stages

ACTORS = ("person", "agent")
OURS = ("engine", "recipe", "policy", "replay")  # names that nobody outside the trainer signs with
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TUTELAGE = (sys.executable, "-m", "tutelage")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_POLL = 0.05  # seconds between two looks for an answer

# -- asking and being answered ----------------------------------------------------------------------------------------


def send(
    folder: Path,
    do: list[dict[str, Any]],
    *,
    by: str,
    actor: str = "person",
    why: str = "",
    dry: bool = False,
    id: str | None = None,
) -> str:
    """Put a request into a stage's folder; returns its id. The same request under the same id is sent once only.

    UserError for an action that is none, a name that nobody may sign with, and an id that another request has (the same
    actions asked for dry are another request).
    """
    if not (folder / "stage.json").is_file():
        raise UserError(f"{folder} is not a stage's folder")
    if not isinstance(do, list) or not do:
        raise UserError("a request is a list of actions, one at least: [{do: note, text: …}]")
    if len(do) > MOST:
        raise UserError(f"a request has at most {MOST} actions")
    for act in do:
        parse(act, place="request")
    if not isinstance(by, str) or not by.strip() or by in OURS:
        raise UserError(f"by: '{by}' is not a person's or an agent's name")
    if actor not in ACTORS:
        raise UserError(f"actor: '{actor}' is neither of {', '.join(ACTORS)}")
    if id is not None and not _ID.fullmatch(id):
        raise UserError(f"id: '{id}': letters, digits, - and _, at most 64")
    request = {"by": by, "actor": actor, "do": do, "why": why, "dry": dry}
    try:
        dumps(request).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise UserError("a request is text and numbers that a file can hold, in few levels") from error
    id = id or new_id()
    place = _own(folder, "requests")
    place.mkdir(exist_ok=True)
    known = answer(folder, id) or read(place / f"{id}.json") or _written_down(folder, id)
    if known is None:
        beside = place / f".{id}.{os.getpid()}.{secrets.token_hex(4)}"
        beside.write_text(dumps(request), encoding="utf-8")
        sync(beside)
        try:
            os.link(beside, place / f"{id}.json")  # unlike a rename, it never takes the place of what is there
            return id
        except FileExistsError:
            known = read(place / f"{id}.json") or answer(folder, id) or {}
        finally:
            beside.unlink()
    if known.get("by") != by or known.get("dry", False) != dry or not _same(known.get("do"), do):
        raise UserError(f"id: '{id}' is taken by another request of {name_of(folder)}")
    return id


def new_id() -> str:
    """An id that sorts by time: milliseconds in base 36, and two letters by chance."""
    number, text = time.time_ns() // 1_000_000, ""
    while number:
        number, digit = divmod(number, 36)
        text = _DIGITS[digit] + text
    return text + "".join(secrets.choice(_DIGITS) for _ in range(2))


def answer(folder: Path, id: str) -> dict[str, Any] | None:
    """What became of a request; None as long as nobody has said."""
    if not _ID.fullmatch(id):
        raise UserError(f"id: '{id}': letters, digits, - and _, at most 64")
    return read(_own(folder, "answers") / f"{id}.json")


def wait(folder: Path, id: str, *, seconds: float) -> dict[str, Any]:
    """The answer to a request, once it is there; UserError that says what to look at when none comes."""
    until = time.monotonic() + seconds
    while (found := answer(folder, id)) is None:
        if time.monotonic() >= until:
            raise UserError(_unanswered(folder, id, seconds))
        time.sleep(_POLL)
    return found


def _unanswered(folder: Path, id: str, seconds: float) -> str:
    now, name = controls(folder), name_of(folder)
    asked = (folder / "requests" / f"{id}.json").exists()
    if not asked and _written_down(folder, id) is None:
        return f"{name} has no request '{id}'"
    head = f"no answer to {id} within {seconds:g} s"
    if now["live"]:
        where = f"process {now['process']}" if now["process"] else "its process"
        return f"{head}: {name} is running ({where}), but has not come to its next step; look again: --wait longer"
    if now["state"] == "finished":
        return f"{head}: {name} is finished; a branch can go on from it"
    return f"{head}: {name} is not running (tick {now['tick']}); the request waits there until it is run again"


def _same(one: Any, other: list[dict[str, Any]]) -> bool:
    """Whether two lists of actions say the same, defaults left out or not."""
    try:
        return [parse(act, place="") for act in one or []] == [parse(act, place="") for act in other]
    except (UserError, TypeError):
        return bool(plain(one) == plain(other))


def _written_down(folder: Path, id: str) -> dict[str, Any] | None:
    return next((line for line in read_lines(folder / "journal.jsonl") if line["id"] == id), None)


def log(folder: Path) -> list[dict[str, Any]]:
    """What was asked of a stage and what became of it, oldest first: an entry a request, policy's or recipe's action.

    An entry is the journal's line with `state` (applied, waiting, refused, or written before a cut), `effects`, `undo`
    and, where it was not done, `error`.
    """
    entries: dict[str, dict[str, Any]] = {}
    for line in read_lines(folder / "journal.jsonl"):
        if line["by"] != "engine":
            entries[line["id"]] = {"actor": "person", "why": "", "effects": [], **line, "state": "written"}
            continue
        for act in line["do"]:
            _join(entries, act, line["tick"])
    for told in _answers(folder):
        if told.get("state") == "refused" and told["id"] not in entries:
            acts = told.get("do")
            readable = [act for act in acts if isinstance(act, dict)] if isinstance(acts, list) else []
            tick = told["tick"] if isinstance(told.get("tick"), int) else 0
            entries[told["id"]] = {**told, "do": readable, "tick": tick, "effects": []}  # nothing was done
    return sorted(entries.values(), key=lambda entry: entry.get("tick", 0))


def _join(entries: dict[str, dict[str, Any]], act: dict[str, Any], tick: int) -> None:
    """Put what the engine says of a request to it."""
    if act["do"] == "applied" and act["id"] in entries:
        entries[act["id"]] |= {"state": "applied", "effects": act.get("effects", []), "undo": act.get("undo", [])}
    elif act["do"] in ("refused", "waiting"):
        asked = entries.get(act["id"]) or {"effects": [], "tick": tick, **(act.get("request") or {}), "id": act["id"]}
        entries[act["id"]] = {**asked, "state": act["do"], "error": act.get("why", "")}


def _answers(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(_own(folder, "answers").glob("*.json")):
        with contextlib.suppress(UserError):  # what nobody can read hides nothing of the rest
            if found := read(path):
                yield {"id": path.stem, **found}


def _own(folder: Path, name: str) -> Path:
    """A folder within a stage's folder; UserError for a link, which may lead anywhere, and for what is none."""
    place = folder / name
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        what = "a link, which is not followed" if place.is_symlink() else "no folder"
        raise UserError(f"{place} is {what}; a running stage puts it aside within a second, else remove it")
    return folder / name


# -- branching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BranchInfo:
    """A branch that was made: its run, its recipe, and the process that makes it, if one was started."""

    run: str
    recipe: Path
    tick: int
    started: str  # beside, after, no
    process: int | None
    log: Path | None
    command: str  # that makes it, or goes on with it

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "recipe": str(self.recipe), "log": str(self.log) if self.log else None}


def branch(folder: Path, action: dict[str, Any], *, runs: Path) -> BranchInfo:
    """Make the recipe of an answered `branch` action (with the `tick` of its effects) as run `name`, and start it.

    UserError for a name that is taken or leaves `runs`, and for a change that brings in code from outside.
    """
    name, how = str(action.get("name", "")), action.get("run", "no")
    if not NAME.fullmatch(name) or (runs / name).resolve().parent != runs.resolve():
        raise UserError(f"branch: '{name}' is not the name of a run in {runs}")
    if not folder.resolve().is_relative_to(runs.resolve()):
        raise UserError(f"{folder} is not a stage of {runs}")
    parse({k: v for k, v in action.items() if k in ("do", "name", "to", "sets", "run")}, place="branch")
    tick = action.get("tick", action.get("to"))
    if tick is None:
        raise UserError("branch: which save? give the `tick` that the action's effects name")
    recipe, home = runs / name / f"{name}.yaml", runs / name
    try:
        home.mkdir()
    except FileExistsError as error:
        raise UserError(f"branch: there is a run '{name}' in {runs} already; take another name") from error
    try:
        sets = [part for key, value in action.get("sets", {}).items() for part in ("--set", f"{key}={dumps(value)}")]
        asked = ["branch", name_of(folder), str(recipe), "--step", str(tick), *sets, "--runs", str(runs)]
        done = subprocess.run([*_TUTELAGE, *asked], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
            raise UserError(said[-1].removeprefix("error: "))
        _only_known_code(recipe, folder)
    except UserError:
        shutil.rmtree(home)
        raise
    command = ["run", str(recipe), "--runs", str(runs), *(["--after", name_of(folder)] if how == "after" else [])]
    process, written = None, None
    if how in ("beside", "after"):
        written = home / "run.log"
        process = detached(command, log=written)
    return BranchInfo(name, recipe, int(tick), how, process, written, shlex.join(["tutelage", *command]))


def detached(command: list[str], *, log: Path) -> int:
    """Start a `tutelage` command that outlives this process; returns its number."""
    with open(log, "ab") as handle:
        child = subprocess.Popen(
            [*_TUTELAGE, *command], stdin=subprocess.DEVNULL, stdout=handle, stderr=handle, start_new_session=True
        )
    threading.Thread(target=child.wait, daemon=True).start()  # so that a server leaves no dead children
    return child.pid


def _only_known_code(recipe: Path, folder: Path) -> None:
    """A change asked for from outside may choose among the house's methods; a class of anybody's it may not name."""
    before = _classes(read(folder / "stage.json")) | _classes(_tree(folder.parent.parent / "recipe.yaml"))
    new = sorted(_classes(_tree(recipe)) - before)
    if new:
        raise UserError(f"branch: sets name {new[0]}, code that the stage did not use; write such a recipe by hand")


def _tree(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None


def _classes(tree: Any) -> set[str]:
    """Every `package.module:Class` in a tree."""
    if isinstance(tree, dict):
        return {name for value in tree.values() for name in _classes(value)}
    if isinstance(tree, list):
        return {name for value in tree for name in _classes(value)}
    return {tree} if isinstance(tree, str) and CODE.fullmatch(tree) and not tree.startswith("stdlib:") else set()


__all__ = [
    "ACTORS", "BranchInfo", "StageInfo", "answer", "branch", "controls", "detached", "find", "live", "log", "name_of",
    "new_id", "send", "stages", "wait",
]  # fmt: skip

"""Looking at stages from outside: which there are, whether they are at work, what can be steered. Only reads.

No torch, and nothing here waits for the trainer: everything is in files (docs/steering.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tutelage.base.errors import UserError, did_you_mean
from tutelage.core.record import no_link

SILENT = 120.0  # seconds without a word after which a stage at work is said to be silent
FAILED = 3  # questions in a row without an answer to use, after which an agent is said to be of no help
NAME = re.compile(r"[^/\\\0.][^/\\\0]*")  # of a run or a stage
# What a page may rely on before the trainer has written its own.
_EMPTY: dict[str, Any] = {
    "process": None,
    "host": "",
    "tick": 0,
    "step": 0,
    "total": None,
    "frac": 0.0,
    "targets": [],
    "mix": {},
    "sources": [],
    "drawn": [],
    "dropped": [],
    "modules": [],
    "saves": [],
    "waiting": [],
    "locked": [],
    "rules": {},
    "alerts": [],
    "written": 0.0,
}


@dataclass(frozen=True)
class StageInfo:
    """The newest version of a stage that has begun. `state` is running, paused, finished, stopped or unreadable."""

    run: str
    stage: str
    folder: Path
    state: str
    tick: int
    lineage: list[str] = field(default_factory=list)  # RUN/STAGE of what its weights come from, oldest first
    fingerprint: str = ""

    @property
    def name(self) -> str:
        return f"{self.run}/{self.stage}"

    @property
    def live(self) -> bool:
        return self.state in ("running", "paused")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder), "name": self.name, "live": self.live}


def stages(runs: Path) -> list[StageInfo]:
    """Every stage under `runs` that has begun; runs by name, stages in order of their beginning."""
    found = []
    for run in _folders(runs):
        made = [place for home in _folders(run) if (place := newest(home, runs))]
        made.sort(key=lambda place: (_begun(place), place))
        found += [_info(place, runs) for place in made]
    return found


def _begun(folder: Path) -> float:
    """When a stage began; 0 for one that was deleted just now."""
    try:
        return (folder / "stage.json").stat().st_mtime
    except OSError:
        return 0.0


def find(reference: str, *, runs: Path) -> Path:
    """The folder that RUN or RUN/STAGE names: of a stage the newest version, of a run the live stage, else its last.

    UserError for a name that is not there, that leaves `runs`, or that several live stages answer to.
    """
    names = reference.split("/")
    if len(names) not in (1, 2) or not all(NAME.fullmatch(name) for name in names):
        raise UserError(f"'{reference}' is not RUN or RUN/STAGE, a name of something in {runs}")
    run = names[0]
    known = [path.name for path in _folders(runs)]
    if run not in known:
        raise UserError(f"no run '{run}' in {runs}{did_you_mean(run, known)} (there are: {', '.join(known) or 'none'})")
    made = {home.name: place for home in _folders(runs / run) if (place := newest(home, runs))}
    if len(names) == 2:
        if names[1] not in made:
            have = ", ".join(made) or "none"
            raise UserError(f"run {run} has no stage '{names[1]}'{did_you_mean(names[1], made)} (there are: {have})")
        return made[names[1]]
    if not made:
        raise UserError(f"no stage of run {run} has begun")
    at_work = [name for name, place in made.items() if live(place)]
    if len(at_work) > 1:
        raise UserError(
            f"run {run} has several stages at work: {', '.join(at_work)}; say which, {run}/{at_work[0]} say"
        )
    return made[at_work[0]] if at_work else max(made.values(), key=lambda p: ((p / "stage.json").stat().st_mtime, p))


def name_of(folder: Path) -> str:
    """RUN/STAGE of a stage's folder."""
    return f"{folder.parent.parent.name}/{folder.parent.name}"


def live(folder: Path) -> bool:
    """Whether a process holds the stage."""
    return held(folder / "lock")


def held(path: Path) -> bool:
    """Whether a process has locked a file: the lock is tried, and let go at once."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def until_free(folder: Path) -> None:
    """Wait until nobody holds the stage."""
    with contextlib.suppress(FileNotFoundError), open(folder / "lock", "rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)


def _folders(path: Path) -> list[Path]:
    made = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")] if path.is_dir() else []
    return sorted(made)


def newest(home: Path, runs: Path) -> Path | None:
    """The last version of a stage; None for one that lies, by a link, outside of `runs`."""
    made = [p for p in home.glob("[0-9]*") if p.name.isdigit() and (p / "stage.json").is_file()]
    made = [p for p in made if p.resolve().is_relative_to(runs.resolve())]
    return max(made, key=lambda p: int(p.name), default=None)


def _info(folder: Path, runs: Path) -> StageInfo:
    run = folder.parent.parent.name
    try:
        about, now = read(folder / "stage.json") or {}, controls(folder)
    except UserError:  # one stage that cannot be read hides no other
        return StageInfo(run=run, stage=folder.parent.name, folder=folder, state="unreadable", tick=0)
    return StageInfo(
        run=run,
        stage=folder.parent.name,
        folder=folder,
        state=now["state"],
        tick=now["tick"],
        lineage=_lineage(about, run, runs),
        fingerprint=str(about.get("fingerprint", "")),
    )


def _lineage(about: dict[str, Any], run: str, runs: Path) -> list[str]:
    """RUN/STAGE of the ancestors, as the stages' own files name them."""
    starts = about.get("stage", {}).get("start")
    found: list[str] = []
    for start in starts if isinstance(starts, list) else [starts]:
        parent = _parent(start, run, runs)
        if parent is None:
            continue
        before = _lineage(read(parent / "stage.json") or {}, parent.parent.parent.name, runs)
        found += [name for name in [*before, name_of(parent)] if name not in found]
    return found


def _parent(start: Any, run: str, runs: Path) -> Path | None:
    """The stage folder that a `start` stands for: STAGE, STAGE@5, RUN/STAGE@5, or a model folder within `runs`."""
    if isinstance(start, dict):
        start = start.get("stage")
    if not isinstance(start, str) or not start:
        return None
    given = Path(start)
    if given.is_dir() and given.resolve().is_relative_to(runs.resolve()):
        return next((p for p in given.parents if (p / "stage.json").is_file()), None)
    names = start.partition("@")[0].split("/")
    if len(names) > 2 or not all(NAME.fullmatch(name) for name in names):
        return None
    return newest(runs.joinpath(*([run, *names] if len(names) == 1 else names)), runs)


def controls(folder: Path) -> dict[str, Any]:
    """What can be steered now, as the trainer wrote it last, and `live`; `state` is right for a dead process too."""
    found = read(folder / "controls.json") or {}
    alive = live(folder)
    state = found.get("state")
    if alive:
        state = state if state in ("running", "paused") else "running"
    else:
        state = "finished" if (folder / "artifact").exists() else "stopped"
    if not found:
        found = {"tick": max((int(p.name) for p in folder.glob("state/[0-9]*") if p.name.isdigit()), default=0)}
    now = {**_EMPTY, "stage": folder.parent.name, **found, "state": state, "live": alive}
    return {**now, "alerts": [*outside(folder, now, wrote=str(found.get("state", ""))), *now["alerts"]]}


def outside(folder: Path, now: dict[str, Any], *, wrote: str) -> list[dict[str, Any]]:
    """Alerts that a trainer cannot give: it failed, ended or is silent. `wrote` is the state that it wrote last."""
    found = []

    def add(kind: str, text: str, *, grave: bool = True) -> None:
        found.append({"kind": kind, "tick": now["tick"], "text": text, "grave": grave})

    why = last_line(folder / "error.txt") if now["state"] == "stopped" else None
    silent = time.time() - float(now["written"])
    if why is not None:
        add("failed", why or "it failed and left no word")
    elif now["state"] == "stopped" and wrote in ("running", "paused", "finished"):
        add(
            "ended",
            f"the trainer ended at about tick {now['tick']:,} without a word; the same command goes on from the last save",
        )
    elif now["live"] and now["written"] and silent > SILENT:
        minutes = int(silent / 60)
        add(
            "silent",
            f"the trainer has said nothing for {minutes} min; measuring and long steps are silent",
            grave=False,
        )
    for path in sorted((folder / "agents").glob("*.json")) if now["live"] else []:
        agent = read_or_none(path) or {}
        if not held(path) and path.exists():
            add("agent", f"agent {agent.get('name', '?')} is gone: its process ended without a word")
        elif int(agent.get("failed") or 0) >= FAILED:
            add(
                "agent",
                f"agent {agent['name']} got no answer to use, {agent['failed']} times in a row: {agent.get('why')}",
            )
    return found


def read_or_none(path: Path) -> dict[str, Any] | None:
    """What is written in place may be seen half written."""
    try:
        return read(path)
    except UserError:
        return None


def last_line(path: Path) -> str | None:
    """The last line of what a failed stage left, cut short; None where it left nothing."""
    try:
        with open(path, encoding="utf-8", errors="replace", opener=no_link) as handle:
            lines = handle.read().strip().splitlines()
    except OSError:
        return None
    return lines[-1][:500] if lines else ""


def read(path: Path) -> dict[str, Any] | None:
    """A JSON file, no link to one; None where there is none (it may go while we look)."""
    try:
        with open(path, encoding="utf-8", opener=no_link) as handle:
            found = json.load(handle)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return found if isinstance(found, dict) else None

"""`tutelage try`: two short twins of a stage go on from one save with the same batches, one of them with an action.

A try lives in `RUN/STAGE/tries/<id>/`: `try.json`, and for each twin its metrics and journal. No torch here: the twins
are processes of their own (tutelage/twins.py), one after the other, while the stage itself is paused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tutelage import steering
from tutelage.base.action import parse
from tutelage.base.errors import UserError
from tutelage.core.record import dumps, opened, read_lines, write_whole
from tutelage.core.words import number
from tutelage.watching import read

TWINS = ("plain", "changed")
BLOCKS = 10  # of steps, whose means are nearly independent where single steps are not
ANSWER = 120.0  # seconds in which a running stage comes to its next step and saves
_SAME = ("cursors", "owed", "weights", "length", "rows")  # of a step's line: where these are equal, so is the batch
COURSE = ("pause", "resume", "step")  # actions that say whether a stage runs
Say = Callable[[str, int, int], None]  # twin, steps done, of


@dataclass
class Try:
    """A try, as its folder holds it. `state`: estimated, running, measured, failed, adopted or discarded."""

    id: str
    folder: Path  # the stage's
    do: list[dict[str, Any]]
    steps: int
    by: str
    actor: str = "person"
    state: str = "estimated"
    tick: int = 0  # where the twins begin
    live: bool = False  # the stage was running when the twins began
    resumes: bool = False  # it runs again when the try is over
    held: str = ""  # the request that paused it
    until: int | None = None  # the tick at which a `step` was to pause it
    estimate: dict[str, Any] = field(default_factory=dict)  # seconds, bytes of memory at least
    effects: list[dict[str, Any]] = field(default_factory=list)  # what the action would do, of a running stage
    result: dict[str, Any] | None = None
    error: str = ""

    @property
    def place(self) -> Path:
        return self.folder.parent / "tries" / self.id

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    def write(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        write_whole(self.place / "try.json", dumps({**self.as_dict(), "folder": self.folder.name}))


def tries(folder: Path) -> list[Try]:
    """A stage's tries, oldest first."""
    found = [told for place in sorted(folder.parent.glob("tries/*")) if (told := read(place / "try.json"))]
    return [Try(**{**told, "folder": folder.parent / told["folder"]}) for told in found]


def load_try(folder: Path, id: str) -> Try:
    """A try by its id."""
    known = {tried.id: tried for tried in tries(folder)}
    if id not in known:
        raise UserError(f"{steering.name_of(folder)} has no try '{id}' (there are: {', '.join(known) or 'none'})")
    return known[id]


# -- before -----------------------------------------------------------------------------------------------------------


def begin_try(
    folder: Path, do: list[dict[str, Any]], steps: int, *, by: str, actor: str = "person", seconds: float = ANSWER
) -> Try:
    """Say what a try would cost; nothing is paused yet. A running stage is asked whether it could do it.

    UserError for what cannot be done there, and for a stage that has no steps left to try on.
    """
    if steps < 1:
        raise UserError(f"a try takes one step at least (got {steps})")
    for act in do:
        parse(act, place="try")
    now = steering.controls(folder)
    tried = Try(steering.new_id(), folder, do, steps, by, actor, tick=now["tick"], live=now["live"])
    if now["live"]:
        asked = steering.send(folder, do, by=by, actor=actor, dry=True)
        told = answered(folder, asked, seconds=seconds)
        if told["state"] == "refused":
            raise UserError(f"{steering.name_of(folder)} refuses it: {told['error']}")
        tried.effects = told.get("effects", [])
    else:
        tried.tick = _newest_save(folder)
    tried.estimate = estimate(folder, steps=steps)
    tried.write()
    return tried


def estimate(folder: Path, *, steps: int) -> dict[str, Any]:
    """What both twins take: seconds of computing, and bytes of memory at least (None where nothing is known yet).

    Memory is what a twin holds for certain: weights, gradients and the optimizer's state; activations come on top.
    """
    rows = [row for row in tail(folder / "metrics.jsonl") if row["kind"] == "train"]
    took = [b["seconds"] - a["seconds"] for a, b in pairwise(rows) if b["seconds"] > a["seconds"]]
    step = median(took) if took else None
    save = max(folder.glob("state/[0-9]*/state.json"), default=None)
    known = read(save) if save else None
    evals = (read(folder / "stage.json") or {}).get("stage", {}).get("evals", {})
    thorough = evals.get("final", 1) / max(1, evals.get("passages", 1))
    measuring = known["evals"]["last"] * thorough if known else 0.0
    bytes_of = {path.stem: path.stat().st_size for path in save.parent.glob("*.safetensors")} if save else {}
    return {
        "steps": steps,
        "step_seconds": step,
        "seconds": None if step is None else 2 * (steps * step + measuring),
        "memory": sum(bytes_of.values()) + bytes_of.get("model", 0) if bytes_of else None,
    }


def tail(path: Path, *, size: int = 1 << 18) -> list[dict[str, Any]]:
    """The last lines of a JSONL file that may be long."""
    if not path.exists():
        return []
    with opened(path) as handle:
        handle.seek(0, os.SEEK_END)
        start = max(0, handle.tell() - size)
        handle.seek(start)
        lines = handle.read().split(b"\n")
    return [json.loads(line) for line in lines[1 if start else 0 : -1] if line.strip()]


def _newest_save(folder: Path) -> int:
    """The tick of the newest save that has steps before it ends."""
    saves = sorted(folder.glob("state/[0-9]*/state.json"))
    open_ended = [path for path in saves if not (read(path) or {}).get("measured", True)]
    if not open_ended:
        what = "has no save yet" if not saves else "is over, and has no save from before its end"
        raise UserError(f"{steering.name_of(folder)} {what}; there is nothing to try on")
    return int(open_ended[-1].parent.name)


# -- the twins --------------------------------------------------------------------------------------------------------


def run_try(tried: Try, *, say: Say = lambda twin, done, of: None, seconds: float = ANSWER) -> Try:
    """Pause the stage at a save, run both twins, compare them. The stage stays paused until `settle`.

    Whatever goes wrong, it is resumed; UserError then says what it was.
    """
    if tried.state != "estimated":
        raise UserError(f"try {tried.id} is {tried.state} already")
    try:
        tried.state = "running"
        fork(tried, seconds=seconds)
        tried.write()
        for twin in reversed(TWINS):  # an action that cannot be done is told before the other is run
            lay(tried, twin)
            run_twin(tried, twin, say=say)
        tried.result = compare(tried)
        tried.state = "measured"
        if not tried.live:
            tried.resumes = False
    except BaseException as error:
        tried.state, tried.error = "failed", str(error) or type(error).__name__
        release(tried)
        raise
    finally:
        tried.write()
        for twin in TWINS:
            clear(tried.place / twin)
    return tried


def fork(tried: Try, *, seconds: float) -> None:
    """Save and pause a running stage; of another, take the newest save."""
    folder, now = tried.folder, steering.controls(tried.folder)
    tried.live = now["live"]
    if not tried.live:
        tried.tick = _newest_save(folder)
        return
    tried.resumes, tried.until = now["state"] != "paused", now.get("step_to")
    do = [*([{"do": "pause"}] if tried.resumes else []), {"do": "save"}]
    what = " + ".join(str(act["do"]) for act in tried.do)
    asked = steering.send(folder, do, by=tried.by, actor=tried.actor, why=f"try {tried.id}: {what}")
    tried.held = asked
    told = answered(folder, asked, seconds=seconds)
    if told["state"] != "applied":
        tried.resumes = False
        raise UserError(f"{steering.name_of(folder)} cannot be paused and saved: {told.get('error')}")
    tried.tick = next(effect["tick"] for effect in told["effects"] if effect["do"] == "save")


def answered(folder: Path, id: str, *, seconds: float) -> dict[str, Any]:
    """The answer; a request that nobody has taken up is taken back."""
    try:
        return steering.wait(folder, id, seconds=seconds)
    except BaseException:
        (folder / "requests" / f"{id}.json").unlink(missing_ok=True)
        raise


def lay(tried: Try, twin: str) -> None:
    """A twin's folder: the stage as a crash just after the save would have left it, and a request to change it."""
    of, folder, tick = tried.folder, tried.place / twin, tried.tick
    facts = read(of / "state" / f"{tick:09d}" / "state.json")
    if facts is None:
        raise UserError(f"the save of tick {tick} in {of} is gone")
    shutil.rmtree(folder, ignore_errors=True)
    for save in sorted(of.glob("state/[0-9]*")):
        if int(save.name) <= tick:  # earlier ones too: somebody may want to go back
            shutil.copytree(save, folder / "state" / save.name, copy_function=_link)
    about = read(of / "stage.json") or {}
    ends = [{"tick": tick + tried.steps + more, "do": "end_stage"} for more in (0, 1)]  # a way back may skip a tick
    about["stage"]["actions"] = [*about["stage"].get("actions", []), *ends]
    about["twin"] = {"of": str(of), "tick": tick}
    write_whole(folder / "stage.json", dumps(about))
    if about["stage"].get("on"):  # its rules count how often they held
        with open(of / "metrics.jsonl", "rb") as handle:
            (folder / "metrics.jsonl").write_bytes(handle.read(facts["metrics_bytes"]))
    lines = read_lines(of / "journal.jsonl")[: facts["lines"]]
    write_whole(folder / "journal.jsonl", "".join(dumps(line) + "\n" for line in lines))
    steering.send(folder, [{"do": "resume"}], by="try", id="resume")
    if twin == "changed":
        steering.send(folder, tried.do, by=tried.by, actor=tried.actor, id=tried.id)


def _link(source: str, target: str) -> None:
    """A hard link: saves are never written again, only replaced."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def run_twin(tried: Try, twin: str, *, say: Say) -> None:
    """Run a twin to its end. UserError when it fails, or does not do what is tried."""
    folder = tried.place / twin
    with open(folder / "run.log", "wb") as written:
        child = subprocess.Popen(
            [sys.executable, "-m", "tutelage.twins", str(folder), str(tried.folder)], stdout=written, stderr=written
        )
    try:
        while child.poll() is None:
            time.sleep(0.05)
            _check(tried, twin)
            now = steering.controls(folder)
            say(twin, min(max(0, now["tick"] - tried.tick), tried.steps), tried.steps)
            if now["state"] == "paused" and not any((folder / "requests").glob("*.json")):
                steering.send(
                    folder, [{"do": "resume"}], by="try"
                )  # nobody else will: what was tried, or a policy, pauses
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
    _check(tried, twin)
    if child.returncode:
        said = (folder / "run.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError(f"the twin {twin} failed: {said[-1] if said else f'code {child.returncode}'}")


def _check(tried: Try, twin: str) -> None:
    """What is tried must not have been refused, nor wait for somebody."""
    for id in ("resume", tried.id):
        told = steering.answer(tried.place / twin, id)
        if told and told["state"] != "applied":
            raise UserError(f"the twin {twin} did not do it ({told['state']}): {told.get('error')}")


def clear(folder: Path) -> None:
    """Keep a twin's numbers, not its weights."""
    shutil.rmtree(folder / "state", ignore_errors=True)
    shutil.rmtree(folder / "artifact", ignore_errors=True)


# -- what came of it --------------------------------------------------------------------------------------------------


def compare(tried: Try) -> dict[str, Any]:
    """Differences, changed minus plain: of the loss step by step on the same batches, of each measure at the end.

    `loss` and `late` (its second half) have the mean, its interval from means of blocks of steps, and their number.
    """
    from tutelage.core.stats import blocked

    lines = {twin: read_lines(tried.place / twin / "metrics.jsonl") for twin in TWINS}
    steps = {
        twin: {row["tick"]: row for row in rows if row["kind"] == "train" and row["tick"] > tried.tick}
        for twin, rows in lines.items()
    }
    plain, changed = (steps[twin] for twin in TWINS)
    both = sorted(plain.keys() & changed.keys())
    same = [tick for tick in both if all(plain[tick][key] == changed[tick][key] for key in _SAME)]
    pairs = [(tick, number(plain[tick]["loss"]), number(changed[tick]["loss"])) for tick in both]
    differences = [number(changed[tick]["loss"]) - number(plain[tick]["loss"]) for tick in same]
    sound = bool(differences) and all(map(math.isfinite, differences))
    late = differences[len(differences) // 2 :]
    last = [next((row["values"] for row in reversed(lines[t]) if row["kind"] == "eval"), {}) for t in TWINS]
    measures = {
        name: {"plain": a, "changed": last[1][name], "difference": number(last[1][name]) - number(a)}
        for name, a in last[0].items()
        if name in last[1] and math.isfinite(number(a))
    }
    return {
        "tick": tried.tick,
        "steps": len(both),
        "same_batches": len(same),
        "pairs": pairs,
        "loss": blocked(differences, blocks=BLOCKS).as_dict() if sound else None,
        "late": blocked(late, blocks=BLOCKS).as_dict() if sound else None,
        "block": max(1, len(differences) // BLOCKS),
        "measures": measures,
    }


# -- after ------------------------------------------------------------------------------------------------------------


def settle(tried: Try, *, adopt: bool, seconds: float = ANSWER) -> dict[str, Any] | None:
    """Do to the stage what was tried, or not; either way it goes on if it ran before. The answer, where there is one."""
    if tried.state != "measured":
        raise UserError(f"try {tried.id} is {tried.state}; there is nothing to adopt or discard")
    folder, now = tried.folder, steering.controls(tried.folder)
    if adopt and now["state"] == "finished":
        raise UserError(
            f"{steering.name_of(folder)} is finished; branch from tick {tried.tick} to go on with it changed"
        )
    do = list(tried.do) if adopt else []
    if not any(act["do"] in COURSE for act in do):
        do += going_on(tried)
    told = None
    if do:
        why = f"try {tried.id}: {shown_loss(tried)}" if adopt else f"try {tried.id} is over"
        asked = steering.send(folder, do, by=tried.by, actor=tried.actor, why=why)
        told = steering.wait(folder, asked, seconds=seconds) if now["live"] else None
        if told and told["state"] != "applied":
            release(tried)
            raise UserError(f"{steering.name_of(folder)} did not do it ({told['state']}): {told.get('error')}")
    tried.state, tried.resumes = ("adopted" if adopt else "discarded"), False
    tried.write()
    return told


def release(tried: Try) -> None:
    """Let a stage go on that was paused for the try."""
    do = going_on(tried) if steering.live(tried.folder) else []
    if do:
        steering.send(tried.folder, do, by=tried.by, actor=tried.actor, why=f"try {tried.id} is over")
    tried.resumes = False


def going_on(tried: Try) -> list[dict[str, Any]]:
    """What lets the stage go on as before the try; nothing where somebody else has stopped it, or let it go on, since."""
    lines = read_lines(tried.folder / "journal.jsonl") if tried.resumes else []
    last = next((line for line in reversed(lines) if any(act["do"] in COURSE for act in line["do"])), None)
    if last is None or last.get("id") != tried.held:
        return []
    if tried.until is None:
        return [{"do": "resume"}]
    left = tried.until - tried.tick
    return [{"do": "step", "n": left}] if left > 0 else []


def shown_loss(tried: Try) -> str:
    """`loss −0.012 [−0.020, −0.004]`, in one line."""
    found = (tried.result or {}).get("loss")
    if not found:
        return "no paired loss"
    interval = f" [{found['low']:+.4f}, {found['high']:+.4f}]" if found["low"] is not None else ""
    return f"loss {found['mean']:+.4f}{interval}"

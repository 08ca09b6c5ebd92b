"""The body of `tutelage steer`: send what was typed, wait for the answer, show what came of it. No torch."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from tutelage import steering, wording
from tutelage.base.errors import UserError
from tutelage.core.record import dumps

console = Console(highlight=False, markup=False)
REFUSED = 1  # exit code


def login() -> str:
    """The name of whoever is logged in."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "somebody"


def steer(
    run: str, words: list[str], *, why: str, by: str | None, dry: bool, seconds: float, as_json: bool, runs: Path
) -> int:
    """Do what the words say to a stage; returns the exit code."""
    folder = steering.find(run, runs=runs)
    if words in ([], ["status"]):
        tell(status(folder), as_json=as_json, data=steering.controls(folder))
        return 0
    if words == ["log"]:
        entries = steering.log(folder)
        tell([line for entry in entries for line in logged(entry)], as_json=as_json, data=entries)
        return 0
    do = wording.actions(words)
    now = steering.controls(folder)
    name = steering.name_of(folder)
    if now["state"] == "finished":
        raise UserError(f"{name} is finished, nothing there is steered any more; `tutelage branch` goes on from it")
    id = steering.send(folder, do, by=by or login(), why=why, dry=dry)
    if not now["live"] and steering.answer(folder, id) is None:
        text = f"{id}: {name} is not running (tick {now['tick']}); this waits there until it is run again"
        tell([text], as_json=as_json, data={"id": id, "state": "unanswered"})
        return 0
    told = steering.wait(folder, id, seconds=seconds)
    begun = branches(folder, do, told, runs=runs)
    lines = [*answered(told), *(line for branch in begun for line in branched(branch))]
    tell(lines, as_json=as_json, data=told | ({"branches": [branch.as_dict() for branch in begun]} if begun else {}))
    return REFUSED if told["state"] == "refused" else 0


def branches(folder: Path, do: list[dict[str, Any]], told: dict[str, Any], *, runs: Path) -> list[steering.BranchInfo]:
    """Make what `branch` actions that were done ask for."""
    found = []
    for effect in told.get("effects", []) if told["state"] == "applied" else []:
        if effect["do"] == "branch":
            asked = next(act for act in do if act["do"] == "branch" and act["name"] == effect["name"])
            found.append(steering.branch(folder, {**asked, "tick": effect["tick"]}, runs=runs))
    return found


def tell(lines: list[str], *, as_json: bool, data: Any) -> None:
    if as_json:
        print(dumps(data))
        return
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


# -- in words ---------------------------------------------------------------------------------------------------------


def answered(told: dict[str, Any]) -> list[str]:
    """What became of a request."""
    state, id = told["state"], told.get("id", "")
    head = {"dry": "would do this", "waiting": "waits for a person"}.get(state, state)
    lines = [f"{id}  {head} at tick {told.get('tick', 0):,}"]
    if told.get("error"):
        lines.append(f"  {told['error']}")
    if state == "waiting":
        lines.append(f"  tutelage steer RUN approve {id}, or refuse {id}")
    return lines + effects(told)


def effects(entry: dict[str, Any]) -> list[str]:
    """One line for each value that changed, as asked → as it is in effect."""
    lines = []
    for effect in entry.get("effects") or []:
        for change in effect.get("changes", []):
            group = f"  {change['group']}" if change.get("group") else ""
            used = (
                f"   in use {short(change['used'])}" if change.get("used", change.get("now")) != change["now"] else ""
            )
            lines.append(f"  {change['what']}{group}  {short(change['was'])} → {short(change['now'])}{used}")
        if "failed" in effect:
            lines.append(f"  no text: {effect['failed']}")
        elif "text" in effect:
            lines.append(f"  {effect['text']!r}")
        lines += [f"  {name}  {short(value)}" for name, value in (effect.get("values") or {}).items()]
        if effect["do"] in ("save", "branch", "rollback"):
            lines.append(f"  {effect['do']}: the save of tick {effect['tick']:,}")
    return lines


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return " ".join(f"{name}={short(share)}" for name, share in value.items()) or "nothing"
    return "–" if value is None else str(value)


def said(act: dict[str, Any]) -> str:
    """An action on one line: `set optim.lr 0.0003`. It may be one that was refused, and lack anything."""
    do = str(act.get("do"))
    rest = {key: value for key, value in act.items() if key not in ("do", "acts") and value is not None}
    if do in ("set", "scale"):
        return f"{do} {act.get('path')} {short(act.get('to', act.get('by')))}"
    if do == "mix":
        return f"mix {short(act.get('weights'))}"
    return " ".join([do, *(f"{key}={short(value)}" for key, value in rest.items() if value not in (False, {}, []))])


def logged(entry: dict[str, Any]) -> list[str]:
    """An entry of the log: who did what, why, and what came of it."""
    what = " + ".join(said(act) for act in entry.get("do") or [])
    why = f"  “{entry['why']}”" if entry.get("why") else ""
    state = "" if entry["state"] == "applied" else f"  [{entry['state']}]"
    who = f"{entry.get('by', '?')} ({entry.get('actor', '?')})"
    head = f"tick {entry.get('tick', 0):,}  {entry['id']}  {who}: {what}{why}{state}"
    return [head, *([f"  {entry['error']}"] if entry.get("error") else []), *effects(entry)]


def status(folder: Path) -> list[str]:
    """Where a stage stands and what can be set in it."""
    now = steering.controls(folder)
    total = now["total"]
    end = f": {now['frac']:.1%} of {total['value']:,.0f} {total['unit']}" if total else ""
    who = f", process {now['process']} on {now['host']}" if now["live"] and now["process"] else ""
    lines = [f"{steering.name_of(folder)}  {now['state']}{who}", f"tick {now['tick']:,}, step {now['step']:,}{end}"]
    for target in now["targets"]:
        bounds = f"  [{short(target['low'])}, {short(target['high'])}]"
        used = target.get("used")
        lines.append(
            f"  {target['path']}  {short(target['now'])}"
            + (f" (in use {short(used)})" if used not in (None, target["now"]) else "")
            + (bounds if (target["low"], target["high"]) != (None, None) else "")
            + (f"  {target['says']}" if target.get("says") else "")
        )
    lines += [f"  mix  {short(now['mix'])}"] if now["mix"] else []
    frozen = [module["name"] for module in now["modules"] if module["frozen"]]
    lines += [f"  frozen  {' '.join(frozen)}"] if frozen else []
    lines += [f"  saves  {' '.join(str(save['tick']) for save in now['saves'])}"] if now["saves"] else []
    lines += [f"  locked out  {' '.join(now['locked'])}"] if now["locked"] else []
    for waiting in now["waiting"]:
        acts = " + ".join(said(act) for act in waiting.get("do", []))
        lines.append(f"  waits: {waiting.get('id')}  {waiting.get('by')}: {acts}")
    return lines + [alerted(one) for one in now["alerts"]]


def alerted(alert: dict[str, Any]) -> str:
    return f"  {'alert' if alert['grave'] else 'note'}: {alert['text']}"


def branched(begun: steering.BranchInfo) -> list[str]:
    lines = [f"  branch {begun.run} from tick {begun.tick:,}: {begun.recipe}"]
    if begun.process:
        when = "begins when this stage is over" if begun.started == "after" else "runs"
        return [*lines, f"  {when} as process {begun.process}; its words: {begun.log}"]
    return [*lines, f"  To run it: {begun.command}"]


# -- completion -------------------------------------------------------------------------------------------------------


def runs_like(incomplete: str, *, runs: Path) -> list[str]:
    """Names of stages at work first, then of the others."""
    known = sorted(steering.stages(runs), key=lambda info: not info.live)
    return [name for info in known for name in (info.name,) if name.startswith(incomplete)]


def words_like(run: str, before: list[str], incomplete: str, *, runs: Path) -> list[str]:
    """What may come next on the line: a verb, or what is steerable in the named run."""
    before = before[len(before) - before[::-1].index("+") :] if "+" in before else before
    if not before:
        return [verb for verb in (*wording.VERBS, *wording.LOOKS) if verb.startswith(incomplete)]
    try:
        now = steering.controls(steering.find(run, runs=runs))
    except (UserError, json.JSONDecodeError):
        return []
    verb, first = before[0], len(before) == 1
    choices: list[str] = []
    if verb in ("set", "scale") and first:
        choices = [target["path"] for target in now["targets"]]
    elif verb == "mix":
        choices = [f"{name}=" for name in now["sources"]]
    elif verb == "drop-source" and first:
        choices = now["sources"]
    elif verb == "add-source" and first:
        choices = now["dropped"]
    elif verb == "skip-data" and first:
        choices = now["drawn"]
    elif verb in ("freeze", "unfreeze", "reset"):
        choices = [module["name"] for module in now["modules"]]
    elif verb == "rollback":
        choices = ["last", *(str(save["tick"]) for save in now["saves"])]
    elif verb in ("approve", "refuse"):
        choices = [str(waiting.get("id")) for waiting in now["waiting"]]
    elif verb in ("lock", "unlock"):
        choices = ["agent", "policy"]
    elif verb == "undo":
        done = steering.log(steering.find(run, runs=runs))
        choices = [entry["id"] for entry in reversed(done) if entry["state"] == "applied"]
    return [choice for choice in choices if choice.startswith(incomplete) and choice not in before]

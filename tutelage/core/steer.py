"""Actions in a running stage: gathered between steps, judged, written down, then applied. Every rank does the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.base.action import CHANGES, MOST, RANK, Action, parse
from tutelage.base.errors import UserError, did_you_mean
from tutelage.core import acts, artifact, checkpoint, controls
from tutelage.core.acts import Trial
from tutelage.core.inbox import ID, Inbox, Request, read
from tutelage.core.record import dumps, ours, plain, write_whole
from tutelage.core.standing import Waits

if TYPE_CHECKING:
    from tutelage.core.stage import Run

LONGEST = 4000  # characters of a refusal
POLL = 0.05  # seconds between two looks at the requests while paused


# -- between two steps ------------------------------------------------------------------------------------------------


def turn(run: Run, stop: Callable[[], int] = lambda: 0) -> int:
    """All that is to be done before the coming step, pauses included. Returns the signal that asks the stage to stop, or 0.

    Policies are asked first, so that they see the same after a resume and in a replay as when they were heard: the step
    before anything was done about it. Then comes what the journal says was done at this tick and the state does not
    hold yet, then the recipe's actions, then policies' and clients' requests.
    """
    asked = run.engine.world.largest(stop())
    if asked:
        return asked
    before = len(run.journal.lines)
    wanted = policies(run)
    retrace(run)
    while planned(run):
        pass
    if run.lines == len(run.journal.lines):
        for name in list(run.standing.released):  # the cut came between a person's answer and what it was to set free
            _settle(run, name)
    paused = False
    while True:
        ahead = run.lines < len(run.journal.lines)  # new lines would come before them and hide them: requests wait
        requests = wanted + ([] if ahead or run.unsound else collect(run))  # such a moment is the policies' alone
        wanted = []
        for request in sorted(requests, key=lambda r: RANK[r["actor"]]):
            decide(run, request)
        while planned(run):  # a way back may have moved the tick
            pass
        stopped = run.standing.stopped_at(run.clock.tick)
        if stopped and not paused:
            run.say({"note": "paused: `tutelage steer` … resume goes on"})
        show(run, "paused" if stopped else "running", now=len(run.journal.lines) != before or stopped != paused)
        before, paused = len(run.journal.lines), stopped
        if not stopped or run.unsound:
            return 0
        asked = run.engine.world.largest(stop())
        if asked:
            return asked
        time.sleep(POLL)


def retrace(run: Run) -> None:
    """Apply journaled actions that the state does not hold yet."""
    while run.lines < len(run.journal.lines) and run.journal.lines[run.lines]["tick"] <= run.clock.tick:
        line = run.journal.lines[run.lines]
        run.lines += 1
        if line["by"] == "engine":
            smaller = [act["rows"] for act in line["do"] if act["do"] == "micro"]  # as memory forced it before a cut
            run.engine.micro = min([*smaller, run.engine.micro or smaller[0]]) if smaller else run.engine.micro
            run.standing.fold(line)
            continue
        ends = [e["do"] for ahead in run.journal.lines[run.lines :] if ahead["by"] == "engine" for e in ahead["do"]
                if e.get("id") == line["id"]]  # fmt: skip
        if "failed" in ends:
            run.standing.journaled.add(line["id"])
            continue
        place, trial, known = f"{run.journal.path}:{run.lines}", Trial.of(run), "applied" in ends
        actions = [acts.check(run, parse(act, place=place), trial, place) for act in line["do"]]
        carry_out(run, line, actions, write=not known, saved=_tick_of_save(run))


def _asked_for(line: dict[str, Any]) -> bool:
    """Whether a line came of somebody's request; what the engine chose by itself silences no policy."""
    return line["by"] != "engine" or any(e["do"] in ("applied", "refused", "waiting") for e in line["do"])


def planned(run: Run) -> bool:
    """The recipe's actions of this tick, once. Whether there were any: they may have moved the tick.

    What cannot be done is an error of the recipe's, unless somebody has steered the stage: then it is refused, in writing.
    """
    tick = run.clock.tick
    for due in sorted({act["tick"] for act in run.node.stage.actions if run.planned < act["tick"] <= tick}):
        _plan(run, due)  # also of a tick that was passed over: ways back and resets of one request move it on
    run.planned = max(run.planned, tick)
    return run.clock.tick != tick


def _plan(run: Run, due: int) -> None:
    """What the recipe says of a tick, unless the journal holds it."""
    mine, name = [act for act in run.node.stage.actions if act["tick"] == due], f"recipe-{due}"
    place = f"stages.{run.node.name}.actions"
    if name in run.standing.done or any(line["id"] == name for line in run.journal.lines):
        return
    why = "; ".join(str(act["why"]) for act in mine if act.get("why"))
    do = [{k: v for k, v in act.items() if k not in ("tick", "why")} for act in mine]
    request = {"id": name, "by": "recipe", "actor": "recipe", "do": do, "why": why}
    try:
        actions = checked(run, request, place)
    except UserError as error:
        if not {"person", "agent", "policy"} & set(run.standing.counts):
            raise
        engine_line(run, {"do": "refused", "id": request["id"], "request": request, "why": str(error)})
        run.say({"warning": f"{error}; the stage was steered, and goes on without it"})
        return
    carry_out(run, written(run, request, actions), actions)


def policies(run: Run) -> list[Request]:
    """What policies ask for after the last step, once a tick. Before the journal's last tick, and in a replay, they only
    follow: what they did stands there, and nothing of it is done twice."""
    tick = run.clock.tick
    if run.asked >= tick:
        return []
    run.asked = tick
    later = [line for line in run.journal.lines[run.lines :] if line["tick"] > tick or line["by"] == "replay"]
    heard = not run.node.stage.steering.replay and not any(map(_asked_for, later))  # now: a cut may have come first
    found = []
    for method in run.acting:
        do = method.act(run.view)
        if do and heard:
            found.append({"id": f"{tick}-{method.name()}".replace("/", "-"), "by": method.name(), "actor": "policy",
                          "do": do, "why": str(getattr(method, "why", ""))})  # fmt: skip
    return list(run.engine.world.agree(found)) if run.acting else []


# -- one request ------------------------------------------------------------------------------------------------------


def decide(run: Run, request: Request) -> None:
    """Check, judge, write down, apply, answer. Whatever is wrong with a request is its answer, never the run's end."""
    standing = run.standing
    if request["id"] in standing.journaled or request["id"] in standing.done:
        return answer(run, request, **_again(run, request["id"]))
    if request["id"] in standing.waiting:  # as it was first sent: what a person will have seen
        kept = {"id": request["id"], **standing.waiting[request["id"]]}
        return answer(run, kept, state="waiting", tick=run.clock.tick, error="it waits for a person")
    place = f"request {request['id']}"
    try:
        standing.admit(_parsed(request, place), actor=request["actor"], approved=bool(request.get("approved")))
        actions = checked(run, request, place)
        if request.get("dry"):
            return answer(run, request, state="dry", tick=run.clock.tick, effects=_foreseen(run, actions, place))
        plain_acts = acts.unfolded(actions)
        effects = [acts.effect(run, action) for action in plain_acts]
        run.standing.judge(
            plain_acts, effects, actor=request["actor"], tick=run.clock.tick, approved=bool(request.get("approved"))
        )
    except Waits as wait:
        if request.get("dry"):  # it asks for nothing that could wait
            return answer(run, request, state="refused", tick=run.clock.tick, error=str(wait))
        kept = {key: request[key] for key in ("by", "actor", "do", "why")}
        engine_line(run, {"do": "waiting", "id": request["id"], "request": kept, "why": str(wait)})
        return answer(run, request, state="waiting", tick=run.clock.tick, error=str(wait))
    except UserError as error:
        text = str(error).removeprefix(f"{place}: ")[:LONGEST]  # it quotes what was asked
        if not request.get("dry") and request["actor"] in ("agent", "policy"):
            engine_line(run, {"do": "refused", "id": request["id"], "request": request, "why": text})
        run.say({"warning": f"{place} refused: {text}"})
        back = [act for act in request["do"] if act.get("do") == "rollback"]
        if run.unsound and request["actor"] == "policy" and 0 < len(back) < len(request["do"]):
            return decide(run, {**request, "id": f"{request['id']}-alone", "do": back})  # or the run would end
        return answer(run, request, state="refused", tick=run.clock.tick, error=text)
    saved = None
    if request["actor"] in ("person", "agent") and any(action.do in CHANGES for action in actions):
        _hold_back(run, actions)
        checkpoint.save_now(run, mark="undo")
        saved = run.clock.tick
    tick = run.clock.tick
    line = written(run, request, actions)
    effects = carry_out(run, line, actions, saved=saved)
    for action in actions:  # before the answer: whoever has that finds what it set free dealt with
        if action.do in ("approve", "refuse"):
            _settle(run, action.id)
    return answer(run, request, state="applied", tick=tick, effects=effects, saved=saved)


def _parsed(request: Request, place: str) -> list[Action]:
    """The request's actions as they are written; UserError for what no request may bring."""
    if not (isinstance(request.get("do"), list) and request["do"]):
        raise UserError(f"{place}: a request is {{by: name, actor: person, do: [actions], why: text}}")
    if request["actor"] != "recipe" and len(request["do"]) > MOST:
        raise UserError(f"{place}: a request has at most {MOST} actions")
    found = [parse(act, place=place) for act in request["do"]]
    if request["actor"] != "recipe" and any(act.do == "undo" and act.acts is not None for act in found):
        raise UserError(f"{place}: undo: `acts` is found by itself; ask for the `id` alone")
    return found


def _hold_back(run: Run, actions: list[Action]) -> None:
    """The save that is about to be made must not push out one that the request goes back to."""
    for act in acts.unfolded(actions) if not run.engine.world.rank else []:
        if act.do == "rollback" and (run.folder / "state" / f"{int(act.to):09d}").exists():  # or it makes it itself
            artifact.mark_state(run.folder / "state", tick=int(act.to), mark="kept")


def checked(run: Run, request: Request, place: str) -> list[Action]:
    """The request's actions, resolved; UserError when one of them cannot be done, on this rank or another."""
    trial, found = Trial.of(run), []
    for parsed in _parsed(request, place):
        wrong = None
        try:
            found.append(acts.check(run, parsed, trial, place))
            acts.effect(run, found[-1])  # so that it cannot fail when it is done
        except UserError as error:
            wrong = error
        except Exception as error:  # whatever a client asks for must not end the run
            wrong = UserError(f"{place}: {type(error).__name__}: {error}")
        if run.engine.world.largest(int(wrong is not None)):  # before the next one, about which ranks speak, too
            raise wrong or UserError(f"{place}: another rank cannot do it")
    return found


def _foreseen(run: Run, actions: list[Action], place: str) -> list[dict[str, Any]]:
    """What the actions would do; whatever goes wrong in looking ahead is a refusal, never the run's end."""
    try:
        return acts.effects(run, actions)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place}: {type(error).__name__}: {error}") from error


def written(run: Run, request: Request, actions: list[Action]) -> dict[str, Any]:
    """The journal's line, on disk before anything is applied."""
    line = run.journal.append(
        tick=run.clock.tick,
        by=request["by"],
        actor=request["actor"],
        do=[action.model_dump(mode="json") for action in actions],
        why=request.get("why", ""),
        id=request["id"],
        write=run.engine.world.rank == 0,
    )
    run.lines = len(run.journal.lines)
    return line


def carry_out(
    run: Run, line: dict[str, Any], actions: list[Action], *, write: bool = True, saved: int | None = None
) -> list[dict[str, Any]]:
    """Apply a line that is on disk, then write down what it did and how to put it back."""
    tick, effects, undo = run.clock.tick, [], []
    run.standing.fold(line)
    try:
        for action in actions:
            told = acts.effect(run, action)
            undo += told.pop("undo", [])
            effects.append({**told, **acts.apply(run, action)})
        acts.in_use(run, effects)
    except Exception as error:  # a fault of ours: this process ends, but the next one must not meet it again
        if write:
            engine_line(run, {"do": "failed", "id": line["id"], "why": f"{type(error).__name__}: {error}"}, tick=tick)
        raise
    if write:
        done = {
            "do": "applied",
            "id": line["id"],
            "actor": line.get("actor", "person"),
            "effects": plain(effects),
            "undo": plain(undo),
        }
        engine_line(run, {**done, "saved": saved}, tick=tick)
    return effects


def engine_line(run: Run, entry: dict[str, Any], *, tick: int | None = None) -> None:
    """A line of the engine's, folded at once."""
    where = run.clock.tick if tick is None else tick
    line = run.journal.append(tick=where, by="engine", do=[entry], write=run.engine.world.rank == 0)
    run.lines = len(run.journal.lines)
    run.standing.fold(line)


def _settle(run: Run, name: str) -> None:
    """Do, or refuse, what has waited for a person."""
    request = {**run.standing.released.pop(name), "id": name}
    if request["approved"]:
        return decide(run, request)
    text = f"{request.pop('refused_by')} refused it"
    engine_line(run, {"do": "refused", "id": name, "request": request, "why": text})
    return answer(run, request, state="refused", tick=run.clock.tick, error=text)


def _again(run: Run, name: str) -> dict[str, Any]:
    """The answer to a request that was dealt with before."""
    done = run.standing.done.get(name)
    if done and done["do"] == "applied":
        return {"state": "applied", "tick": done["tick"], "effects": done["effects"], "saved": done.get("saved")}
    return {"state": "refused", "tick": run.clock.tick, "error": (done or {}).get("why", "it was dealt with before")}


def _tick_of_save(run: Run) -> int | None:
    """For an action that is applied again after a crash: the save made before it, if it is there."""
    place = run.folder / "state" / f"{run.clock.tick:09d}"
    return run.clock.tick if (place / "undo").exists() else None


# -- requests and answers ---------------------------------------------------------------------------------------------


def collect(run: Run) -> list[Request]:
    """Requests that lie in the folder, oldest first: read by rank 0, agreed by all."""
    world, found = run.engine.world, []
    if world.rank == 0:
        for path in run.inbox.files():
            request = _read(run, path)
            if request is not None:
                found.append(request)
    if world.size > 1 and world.largest(len(found)):
        found = world.agree(found)
    return found


def _read(run: Run, path: Path) -> Request | None:
    """A request's contents; one that is none is answered here."""
    try:
        return read(path)
    except FileNotFoundError:
        return None  # taken back
    except (UserError, ValueError, OSError, RecursionError) as error:
        run.say({"warning": f"request {path.stem!r} refused: {error}"})
        answer(run, {"id": path.stem}, state="refused", tick=run.clock.tick, error=str(error))
        return None


def answer(run: Run, request: Request, *, state: str, **more: Any) -> None:
    """Write what became of a request, whole, and take the request away. Policies read the journal instead."""
    if run.engine.world.rank or request.get("actor") in ("policy", "recipe"):
        return
    name = request["id"]
    if state in ("applied", "waiting"):  # whoever reads the answer finds what can be steered as it is after it
        controls.write(run, state="paused" if run.standing.stopped_at(run.clock.tick) else "running", sync=True)
    text = dumps({**request, "state": state, **more})
    if ID.fullmatch(name):
        folder = ours(run.folder / "answers", folder=True)
        write_whole(ours(folder / f"{name}.json", folder=False), text)
    (run.folder / "requests" / f"{name}.json").unlink(missing_ok=True)


def close(run: Run) -> None:
    """The stage is over: whatever still lies there gets its answer."""
    for request in collect(run):
        text = f"the stage is over (step {run.clock.step}); branch from it to go on"
        answer(run, request, state="refused", tick=run.clock.tick, error=text)
    show(run, "finished", now=True)


def check_planned(run: Run) -> None:
    """UserError now, not at its tick, for an action of the recipe that is misspelled or has no tick, and for a limit on
    what nobody can set."""
    known = {*acts.OWN, *acts.steerable(run)} - {"optim.base"}
    for actor in ("agent", "policy"):
        for path in set(getattr(run.node.stage.steering, actor).limits) - known:
            place = f"stages.{run.node.name}.steering.{actor}.limits"
            raise UserError(f"{place}: nothing here can be steered as '{path}'{did_you_mean(path, known)}")
    for i, act in enumerate(run.node.stage.actions):
        place = f"stages.{run.node.name}.actions.{i}"
        if not isinstance(act.get("tick"), int) or act["tick"] < 0:
            raise UserError(
                f"{place}: an action of a recipe says at which `tick` it is taken (here: {act.get('tick')!r})"
            )
        action: Any = parse(act, place=place)
        if action.do in ("set", "scale") and action.path not in ("optim.lr", "optim.base"):  # no optimizer yet
            acts.check(run, action, Trial.of(run), place)
        elif action.do == "set" and not isinstance(action.to, (int, float)):
            raise UserError(f"{place}: set.to: {action.path} is a number (got {action.to!r})")


def prepare(run: Run) -> None:
    """What must be known before the first turn: the standing that the journal amounts to, up to where the state is."""
    for line in run.journal.lines[: run.lines]:
        run.standing.fold(line)
    run.acting, run.inbox = run.methods.having("act"), Inbox(run.folder / "requests")
    if not run.engine.world.rank:
        ours(run.inbox.folder, folder=True)


def show(run: Run, state: str, *, now: bool = False) -> None:
    """Tell those who only see the folder how things stand: at once, or when the last time is a while ago."""
    if run.engine.world.rank == 0 and (now or time.monotonic() - run.shown >= controls.EVERY):
        run.shown = time.monotonic()
        controls.write(run, state=state)

"""Runs a graph: stages whose inputs are there, side by side in processes forked from this warm one, until all is made."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tutelage.base.errors import UserError, did_you_mean
from tutelage.core import artifact, execute, hashes, rules
from tutelage.core.graph import Graph, Node, acts_of_people
from tutelage.core.loop import Stopped, train
from tutelage.core.memory import in_use
from tutelage.core.record import dumps, sole_writer, write_whole
from tutelage.core.settle import Choose, settle
from tutelage.core.shard import World
from tutelage.core.stage import Say, build

SMALL = 30_000_000  # parameters below which a model is fastest on one thread
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # that ask to stop
TRACE = "error.txt"  # in a stage's folder: why it failed
TOLD = 4000  # characters of a text that a stage tells
STOPPED = 75  # exit code of a stage that was asked to stop and has saved (EX_TEMPFAIL: try again later)
Tell = Callable[[str, dict[str, Any]], None]  # stage, where it stands


@dataclass
class Child:
    """A stage at work in its own process."""

    node: Node
    pid: int
    ear: socket.socket
    error: str = ""
    status: int | None = None  # as wait() gave it, once it has ended
    told: bool = False  # that it should stop


@dataclass
class Result:
    """How a graph ended: stages by what became of them."""

    done: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    unmade: list[str] = field(default_factory=list)  # that no rule entered
    failed: dict[str, str] = field(default_factory=dict)


def run_graph(
    graph: Graph,
    *,
    only: str | None,
    jobs: int | None,
    drift: str | Choose,
    tell: Tell,
    result: Result | None = None,
) -> Result:
    """Make every stage (or `only` one and what it needs). Stages that are there already are not made again.

    A stage that fails in a process of its own is told of in the result. One that fails in this process (`jobs` 0, CUDA,
    several ranks) raises, and so does a stage whose place is not clear; `result` is filled all the same.
    """
    world = World.join()
    wanted = _needed(graph, only) if only else set(graph.nodes)
    waiting = [node for name, node in graph.nodes.items() if name in wanted]
    children: dict[int, Child] = {}
    result = Result() if result is None else result
    here = world.size > 1 or jobs == 0 or torch.cuda.is_available()
    finished: set[str] = set()
    wishes: list[int] = []
    looked: tuple[int, int] | None = None  # stages waiting and at work when it was last asked what can begin
    unclear: UserError | None = None
    with _heard(lambda number, frame: wishes.append(number)):
        while waiting or children:
            if wishes:
                _hand_on(wishes[0], children, waiting, result)
            ready = _ready(waiting, finished, result, tell) if (len(waiting), len(children)) != looked else []
            for node in ready:
                if not here and children and len(children) >= _room(jobs, [*(c.node for c in children.values()), node]):
                    break
                waiting.remove(node)
                try:
                    settle(graph, node, drift=drift)
                except UserError as error:  # stages at work go on to their ends; no other is begun
                    unclear = error
                    waiting.clear()
                    break
                if not world.rank:
                    hashes.flush(graph.runs / ".data")
                world.wait()  # nobody begins a stage before everyone has seen whether it is there
                _say_steered(node, tell)
                if node.state in ("done", "reused"):
                    tell(node.name, {"reused": str(node.folder)})
                    result.reused.append(node.name)
                    finished.add(node.name)
                elif here:
                    _run_here(node, world, result, tell)
                    finished.update(result.done[-1:])
                    if result.failed or result.stopped:
                        return result
                else:
                    child = _fork(node)
                    children[child.ear.fileno()] = child
            looked = (len(waiting), len(children)) if children else None
            if children:
                for child in _listen(children, tell):
                    _took(child, result, tell)
                finished.update(result.done)
                if result.failed or result.stopped:
                    waiting.clear()
            elif not ready:
                break
    if unclear is not None:
        raise unclear
    return result


def _ready(waiting: list[Node], finished: set[str], result: Result, tell: Tell) -> list[Node]:
    """The stages that can be made now. Those that no rule entered are taken out, and what needs them."""
    ready = []
    for node in list(waiting):
        stands = rules.standing(node, done=finished, unmade=result.unmade)
        if stands == "ready":
            ready.append(node)
        elif stands == "unmade":
            waiting.remove(node)
            node.state = rules.UNMADE
            result.unmade.append(node.name)
            tell(node.name, {"unmade": rules.UNMADE})
    return ready


def _took(child: Child, result: Result, tell: Tell) -> None:
    """What became of a stage whose process has ended."""
    assert child.status is not None
    name, code = child.node.name, os.waitstatus_to_exitcode(child.status)
    if code == 0:
        result.done.append(name)
        tell(name, {"finished": True})
    elif code == STOPPED:
        result.stopped.append(name)
    else:
        result.failed[name] = child.error or f"ended with code {code}"
        tell(name, {"failed": result.failed[name]})


def _needed(graph: Graph, only: str) -> set[str]:
    if only not in graph.nodes:
        raise UserError(f"no stage '{only}' in this recipe{did_you_mean(only, graph.nodes)}")
    return {only, *graph.nodes[only].needs()}


def _say_steered(node: Node, tell: Tell) -> None:
    """A stage that people steered is no stage of the bare recipe, and whoever goes on from it should know."""
    steered = acts_of_people(node.folder) if node.folder and node.state != "new" else []
    if steered:
        who = ", ".join(sorted({by for by, _, _ in steered}))
        tell(node.name, {"note": f"steered {len(steered)} times by {who}; going on from it, as no other recipe will"})


# -- one stage ---------------------------------------------------------------------------------------------------------


def run_stage(node: Node, *, world: World, say: Say) -> None:
    """Run one stage to its artifact. The folder is ours alone meanwhile."""
    assert node.folder is not None
    node.folder.mkdir(parents=True, exist_ok=True)
    if world.rank:
        _work(node, world, say)
        return
    with sole_writer(node.folder), _told(node.folder / TRACE):
        artifact.sweep(node.folder)
        if not (node.folder / "stage.json").exists():
            about = {"fingerprint": node.fingerprint, "parts": node.parts, "stage": node.stage.model_dump(mode="json")}
            write_whole(node.folder / "stage.json", dumps(about))
        if not node.artifact.exists():
            _work(node, world, say)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Leave why a stage ended beside it, for whoever sees only its folder; the next try takes that away."""
    path.unlink(missing_ok=True)
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        with contextlib.suppress(OSError):
            path.write_text(f"{error}\n" if isinstance(error, UserError) else traceback.format_exc(), encoding="utf-8")
        raise


def _work(node: Node, world: World, say: Say) -> None:
    stage = node.stage
    if stage.make is not None:
        execute.make(node, world=world, say=say)
    elif stage.measure is not None:
        execute.measure(node, world=world, say=say)
    elif stage.apply is not None:
        execute.apply(node, world=world, say=say)
    else:
        with execute.trackers(node, world, say):
            run = build(node, world=world, say=say)
            try:
                train(run)
            finally:
                run.metrics.close()
                if world.rank == 0 and node.folder is not None:
                    run.methods.profile.keep(node.folder)
        adapter = execute.fold(run)
        if world.rank == 0:
            helpers = frozenset[str]().union(*(method.helpers for method in run.methods.all()))
            parts = {label: module for label, module in run.extra.items() if label not in helpers}
            extra = {f"{label}.{n}": t for label, m in parts.items() for n, t in artifact.tensors_of(m).items()}
            execute.publish_model(node, run.engine.model, run.processor, extra=extra, adapter=adapter)
    world.wait()


# -- processes --------------------------------------------------------------------------------------------------------


def _room(jobs: int | None, nodes: list[Node]) -> int:
    """How many stages may run side by side: a core each for small models, one at a time for a large one."""
    if jobs is not None:
        return max(1, jobs)
    return 1 if any(not small(node) for node in nodes) else len(os.sched_getaffinity(0))


def small(node: Node) -> bool:
    """Whether a stage's largest start is small enough that a second thread does not pay."""
    modality, graph = node.graph.modality, node.graph
    for start in node.starts():
        name = graph.stage_name(start)
        folder, config = (
            modality.start_files(str(graph.nodes[name].artifact / "model"))
            if name
            else modality.start_files(start)
            if isinstance(start, str)
            else (None, start if isinstance(start, dict) else {})
        )
        if modality.size(folder, config) > SMALL:
            return False
    return True


def threads(node: Node) -> int:
    return node.stage.engine.threads or (1 if small(node) else len(os.sched_getaffinity(0)))


def _run_here(node: Node, world: World, result: Result, tell: Tell) -> None:
    gc.collect()  # the stage before lies in cycles, and would share the device's memory with this one
    torch.set_num_threads(threads(node))
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        with _heard(_leave):
            run_stage(node, world=world, say=lambda said: tell(node.name, said))
        if torch.cuda.is_initialized():
            tell(node.name, {"memory": float(torch.cuda.max_memory_allocated())})
        result.done.append(node.name)
        tell(node.name, {"finished": True})
    except Stopped:
        result.stopped.append(node.name)
    except Exception as error:
        result.failed[node.name] = _why(node, error)
        tell(node.name, {"failed": result.failed[node.name]})
        raise


def _why(node: Node, error: BaseException) -> str:
    """Why a stage failed, in one line; of what is our fault, where the trace lies."""
    return (
        str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error} (see {node.folder}/{TRACE})"
    )


def _leave(number: int, frame: Any) -> None:
    """A wish to stop that comes while a stage is built: the loop takes over once it runs; before, nothing is to be saved."""
    raise Stopped(signal.Signals(number).name)


@contextlib.contextmanager
def _heard(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Wishes to stop go to a handler; what they did before comes back at the end. Only a main thread hears any."""
    numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def _hand_on(number: int, children: dict[int, Child], waiting: list[Node], result: Result) -> None:
    """A wish to stop reaches every stage once, which finishes its step and saves; none that waits is begun.

    Ctrl-C goes to the whole group by itself; it is passed on as SIGTERM, which asking twice does not sharpen.
    """
    for child in children.values():
        if not child.told:
            os.kill(child.pid, signal.SIGTERM if number == signal.SIGINT else number)
            child.told = True
    if not children:
        result.stopped += [node.name for node in waiting]
    waiting.clear()


def _fork(node: Node) -> Child:
    """Start a stage in a process that dies with this one."""
    ear, mouth = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    count = threads(node)  # here, since sizing a model imports its class, and every child to come would do it again
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a wish that comes now waits until either side can hear it
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        mouth.close()
        return Child(node, pid, ear)
    ear.close()
    os._exit(_child(node, mouth, parent, count))


def _child(node: Node, mouth: socket.socket, parent: int, count: int) -> int:
    mouth.setblocking(False)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: an orphan would hold the stage's lock
    if os.getppid() != parent:
        return 1

    def say(said: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens just now: training goes on
            mouth.send(dumps({key: _brief(value) for key, value in said.items()}).encode())

    def last_words(text: str) -> None:
        mouth.setblocking(True)
        mouth.settimeout(5)
        say({"error": text})

    try:
        for number in SIGNALS:
            signal.signal(number, _leave)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        torch.set_num_threads(count)
        _, before = in_use("cpu")
        run_stage(node, world=World(), say=say)
        say({"memory": float(in_use("cpu")[1] - before)})
        return 0
    except Stopped:
        return STOPPED
    except BaseException as error:
        last_words(_why(node, error))
        return 2 if isinstance(error, UserError) else 1


def _brief(value: Any) -> Any:
    """A text that fits on a screen: what a client asked for may be quoted in it, however long that was."""
    return f"{value[:TOLD]} …" if isinstance(value, str) and len(value) > TOLD else value


def _listen(children: dict[int, Child], tell: Tell) -> list[Child]:
    """Pass on what children say for a moment; those that have ended are taken out."""
    readable, _, _ = select.select(list(children), [], [], 0.2)
    for number in readable:
        _hear(children[number], tell)
    ended = []
    for number, child in list(children.items()):
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid:
            child.status = status
            _hear(child, tell)
            child.ear.close()
            ended.append(children.pop(number))
    return ended


def _hear(child: Child, tell: Tell) -> None:
    child.ear.setblocking(False)
    while True:
        try:
            data = child.ear.recv(1 << 20)  # more than a datagram of such a socket holds
        except (BlockingIOError, ConnectionResetError):
            return
        if not data:
            return
        said = json.loads(data)
        if "error" in said:
            child.error = said["error"]
        else:
            tell(child.node.name, said)

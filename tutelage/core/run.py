"""Runs a graph: stages whose inputs are there, side by side in processes forked from this warm one, until all is made."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.values import late_bound
from tutelage.core import hashes, rules
from tutelage.core.execute import run_stage
from tutelage.core.graph import Drift, Graph, Node, acts_of_people
from tutelage.core.loop import Stopped
from tutelage.core.record import dumps, read_lines
from tutelage.core.shard import World

SMALL = 30_000_000  # parameters below which a model is fastest on one thread
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # that ask to stop
STOPPED = 75  # exit code of a stage that was asked to stop and has saved (EX_TEMPFAIL: try again later)
Tell = Callable[[str, dict[str, Any]], None]  # stage, where it stands
Choose = Callable[[Drift], str]  # `reuse` or `retrain`, or raises


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


def run_graph(graph: Graph, *, only: str | None, jobs: int | None, drift: str | Choose, tell: Tell) -> Result:
    """Make every stage (or `only` one and what it needs). Stages that are there already are not made again."""
    world = World.join()
    wanted = _needed(graph, only) if only else set(graph.nodes)
    waiting = [node for name, node in graph.nodes.items() if name in wanted]
    result, children = Result(), {}
    here = world.size > 1 or jobs == 0 or torch.cuda.is_available()
    finished: set[str] = set()
    with _wishes(heard=not here) as wishes:
        while waiting or children:
            if wishes:
                _hand_on(wishes[0], children, waiting, result)
            ready = _ready(waiting, finished, result, tell)
            for node in ready:
                if not here and children and len(children) >= _room(jobs, [*(c.node for c in children.values()), node]):
                    break
                waiting.remove(node)
                settle(graph, node, drift=drift)
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
            if children:
                for child in _listen(children, tell):
                    _took(child, result, tell)
                finished.update(result.done)
                if result.failed or result.stopped:
                    waiting.clear()
            elif not ready:
                break
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


def settle(graph: Graph, node: Node, *, drift: str | Choose) -> None:
    """Put late-bound values and chosen starts in, then find the node's place. Its inputs are there.

    `drift` as in Graph.place, or a function that is asked.
    """
    node.stage = late_bound(node.stage, tables(graph, node), name=node.name)
    starts = [best(graph, start) if isinstance(start, dict) and "best" in start else start for start in node.starts()]
    if starts != node.starts():
        node.stage = node.stage.model_copy(
            update={"start": starts if isinstance(node.stage.start, list) else starts[0]}
        )
    graph.fingerprint(node)
    try:
        graph.place(node, drift=drift if isinstance(drift, str) else "refuse")
    except Drift as found:
        if isinstance(drift, str):
            raise
        graph.place(node, drift=drift(found))


def _say_steered(node: Node, tell: Tell) -> None:
    """A stage that people steered is no stage of the bare recipe, and whoever goes on from it should know."""
    steered = acts_of_people(node.folder) if node.folder and node.state != "new" else []
    if steered:
        who = ", ".join(sorted({by for by, _, _ in steered}))
        tell(node.name, {"note": f"steered {len(steered)} times by {who}; going on from it, as no other recipe will"})


def tables(graph: Graph, node: Node) -> dict[str, dict[str, float]]:
    """Values that finished table stages hold, by stage: `name` (of the last model that has it) and `model/name`."""
    found: dict[str, dict[str, float]] = {}
    for name in node.inputs:
        path = graph.nodes[name].folder
        table = path / "artifact" / "table" / "table.json" if path else None
        if table and table.exists():
            rows: dict[str, dict[str, float]] = json.loads(table.read_text())
            found[name] = {key: value for row in rows.values() for key, value in row.items()}
            found[name] |= {f"{model}/{key}": value for model, row in rows.items() for key, value in row.items()}
    return found


def best(graph: Graph, choice: dict[str, Any]) -> str:
    """The made stage with the best last measure, of `{best: [stages], by: metric, better: lower}`; `by: mean` is the mean
    of bits per byte over all columns."""
    by, sign = choice.get("by", "mean"), -1.0 if choice.get("better") == "higher" else 1.0
    scores: dict[str, float] = {}
    for name in choice["best"]:
        if graph.nodes[name].state == rules.UNMADE:
            continue
        rows = [r for r in read_lines(graph.nodes[name].artifact / "metrics.jsonl") if r["kind"] == "eval"]
        values = rows[-1]["values"] if rows else {}
        if by == "mean":
            bits = [v for k, v in values.items() if k.startswith("bits_per_byte/")]
            values = {"mean": sum(bits) / len(bits)} if bits else {}
        if by not in values:
            raise UserError(
                f"`best` by '{by}': stage {name} has no such measure (it has: {', '.join(values) or 'none'})"
            )
        scores[name] = sign * float(values[by])
    return min(scores, key=lambda name: (scores[name], name))


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
    torch.set_num_threads(threads(node))
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        run_stage(node, world=world, say=lambda said: tell(node.name, said))
        if torch.cuda.is_initialized():
            tell(node.name, {"memory": float(torch.cuda.max_memory_allocated())})
        result.done.append(node.name)
        tell(node.name, {"finished": True})
    except Stopped:
        result.stopped.append(node.name)


@contextlib.contextmanager
def _wishes(*, heard: bool) -> Iterator[list[int]]:
    """Signals that ask to stop, as they come; what they did before comes back at the end. Not heard: left alone."""
    asked: list[int] = []
    numbers = SIGNALS if heard else ()
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    def leave(number: int, frame: Any) -> None:  # the loop takes over once it runs; before, nothing is to be saved
        raise Stopped(signal.Signals(number).name)

    mouth.setblocking(False)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: an orphan would hold the stage's lock
    if os.getppid() != parent:
        return 1

    def say(said: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # nobody listens just now: training goes on
            mouth.send(dumps(said).encode())

    def last_words(text: str) -> None:
        mouth.setblocking(True)
        mouth.settimeout(5)
        say({"error": text})

    try:
        for number in SIGNALS:
            signal.signal(number, leave)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        torch.set_num_threads(count)
        before = _peak()
        run_stage(node, world=World(), say=say)
        say({"memory": _peak() - before})
        return 0
    except Stopped:
        return STOPPED
    except UserError as error:
        last_words(str(error))
        return 2
    except BaseException as error:
        trace = traceback.format_exc()
        if node.folder and node.folder.is_dir():
            (node.folder / "error.txt").write_text(trace, encoding="utf-8")
        last_words(f"{type(error).__name__}: {error} (see {node.folder}/error.txt)")
        return 1


def _peak() -> float:
    """The most bytes that this process has held at once."""
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
            data = child.ear.recv(1 << 16)
        except (BlockingIOError, ConnectionResetError):
            return
        if not data:
            return
        said = json.loads(data)
        if "error" in said:
            child.error = said["error"]
        else:
            tell(child.node.name, said)

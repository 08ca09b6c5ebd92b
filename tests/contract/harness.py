"""Puts any method into the toy recipe, runs it in many ways, and says what came of it.

A stage that methods leave alone is trained once and reused by its fingerprint; every run has a folder of its own beside
that, named by what it is made of, so that a run is never mistaken for another and workers share what they made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.toy import numbers
from tutelage import modalities
from tutelage.base import load, registry
from tutelage.base.hooks import HOOKS
from tutelage.base.method import Method
from tutelage.core import artifact, checkpoint, loop, record
from tutelage.core.graph import Graph
from tutelage.core.record import read_lines
from tutelage.core.run import run_graph
from tutelage.modalities.text import toy

CUT = 7  # an odd step, between the saves after 4 and 8
BLIND = frozenset({"weights", "source", "act", "factor", "batch", "measured", "rewrite", "retell"})
Entry = dict[str, Any]


class Cut(Exception):
    """The run ends here, as if it had been killed."""


# -- the recipe -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One run: a method's entry ({} for the stage without it) on a toy model, and what else is changed."""

    name: str
    model: str
    entry: Entry
    stage: Entry = field(default_factory=dict)  # keys of the tested stage that are changed
    cut: bool = False  # end it midway, then go on
    ranks: int = 1
    forced: bool = False  # run the method although its settings are the neutral ones

    @property
    def cls(self) -> type[Method]:
        return registry.find(self.name)

    @property
    def kind(self) -> str:
        return kind_of(self.cls)

    @property
    def tested(self) -> str:
        """The stage whose outcome counts."""
        return {"apply": "applied", "make": "made"}.get(self.kind, "two")

    @property
    def last(self) -> str:
        """The stage whose weights count: of data, the one that learns from them."""
        return "two" if self.kind == "make" else self.tested

    @property
    def key(self) -> str:
        """Names the folder of its run; it tells `effect` nothing."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def recipe(self, data: Path) -> dict[str, Any]:
        recipe = toy.recipe(data, model=self.model)
        stages = recipe["stages"]
        if self.kind == "apply":
            apply(self, stages)
        else:
            place(self, stages)
        stages[self.last].update(self.stage)
        return recipe


def toys_of(cls: type[Method]) -> tuple[str, ...]:
    """The models that a method is tried on: one is enough for a method that never sees its model."""
    return cls.toys if set(cls.hooks()) - BLIND else cls.toys[:1]


def kind_of(cls: type[Method]) -> str:
    """How a method comes into a recipe: a slot, `methods`, `apply`, `make`, or `evals`."""
    kinds = {HOOKS[hook].kind for hook in cls.hooks()}
    if "apply" in kinds or "make" in kinds:
        return "apply" if "apply" in kinds else "make"
    return cls.slot() or ("evals" if kinds == {"measure"} else "methods")


def place(case: Case, stages: dict[str, Any]) -> None:
    """The method comes into stage `two`, and only there."""
    two, kind, entry = stages["two"], case.kind, case.entry
    if kind == "mix":
        two["data"] = {**stages["one"]["data"], **two["data"]}
    if kind == "make":
        stages["made"] = {"start": "one", "make": entry, "length": two["length"], "engine": two["engine"]}
        if {"rewrite", "retell"} & set(case.cls.hooks()):
            stages["made"]["data"] = {**stages["one"]["data"], **two["data"]}
        two["data"] = {**two["data"], "made": {"stage": "made"}}
    elif kind == "evals":
        # a budget no machine reaches, so that none leaves a measurement out that another makes
        run = [e for e in two["evals"]["run"] if e != case.name] + ([entry] if entry else [])
        two["evals"] = {**two["evals"], "run": run, "every": "5step", "budget": "1000000%"}
    elif entry and kind == "methods":
        two["methods"] = [entry]
    elif entry:
        two[kind] = entry


def apply(case: Case, stages: dict[str, Any]) -> None:
    """The method makes a stage of its own from those before it: one to grow, several to merge."""
    two = stages["two"]
    start = ["one", "two"] if "tensor" in case.cls.hooks() else ["one"]
    if case.cls.unrelated:
        name = "foreign" if case.cls.tokenizer_of else "stranger"
        tokenizer = {"train": "bpe", "vocab": 300} if case.cls.tokenizer_of else stages["one"]["tokenizer"]
        stages[name] = {**two, "start": stages["one"]["start"], "tokenizer": tokenizer}
        start = ["one", name]
    if case.cls.wants_base:
        stages["other"] = {**two, "seed": 1}
        start.append("other")
        start = start[: case.cls.takes]
    if "two" not in start:
        del stages["two"]
    stages["applied"] = {
        "start": start if len(start) > 1 else "one",
        "apply": case.entry,
        **{key: two[key] for key in ("data", "length", "precision", "evals", "engine")},
    }


def on(name: str, *, model: str | None = None, **more: Any) -> Case:
    """The run in which the method acts."""
    cls = registry.find(name)
    return Case(name, model or cls.toys[0], {"use": name, **cls.on}, **more)


def without(name: str, *, model: str | None = None, **more: Any) -> Case:
    """The run that it is compared with: the stage without it, or the baseline that stands in its place."""
    cls = registry.find(name)
    return Case(name, model or cls.toys[0], {} if cls.off is not None else dict(cls.baseline or {}), **more)


def off(name: str, **more: Any) -> Case:
    """The run in which the method stands in the recipe at its neutral settings."""
    cls = registry.find(name)
    return Case(name, cls.toys[0], {"use": name, **cls.on, **(cls.off or {})}, **more)


# -- what came of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A finished run as `effect` sees it (`base.method.Seen`), and as the checks do."""

    folder: Path  # of the tested stage
    last: Path  # of the stage whose weights count
    first: Path  # the model that the tested stage began with
    seen: dict[str, Any]  # hooks called, states kept

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")

    def numbers(self) -> list[dict[str, Any]]:
        """Everything measured that does not depend on the machine's pace."""
        return numbers(self.last)

    def weights(self) -> dict[str, Tensor]:
        return tensors(self.last / "artifact" / "model")

    def start(self) -> dict[str, Tensor]:
        return tensors(self.first)

    def digest(self) -> str:
        """Of all weights that the stage left: the model's, an adapter's, parts beside it, and rows of data."""
        found = [(f"{path.parent.name}/{name}", t) for path in files(self.last) for name, t in load_file(path).items()]
        rows = b"".join(path.read_bytes() for path in sorted((self.folder / "artifact").glob("data/*")))
        return artifact.digest(found) + hashlib.sha256(rows).hexdigest()


def files(stage: Path) -> list[Path]:
    return sorted((stage / "artifact").rglob("*.safetensors"))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


# -- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Shelf:
    """All runs of a session in one folder. `together` runs a job in two processes that train as one."""

    root: Path
    together: Callable[[Case], None] | None = None

    def outcome(self, case: Case) -> Outcome:
        """Run it, unless this was done already, here or by another worker."""
        home = self.root / case.key
        home.mkdir(parents=True, exist_ok=True)
        with locked(self.root / f"{case.key}.lock"):
            if not (home / "seen.json").exists():
                self._prefix(case)
                if case.ranks > 1:
                    assert self.together is not None
                    self.together(case)
                    seen: dict[str, Any] = {}
                else:
                    seen = self.run(case)
                (home / "seen.json").write_text(json.dumps(seen), encoding="utf-8")
        graph = self._graph(case)
        place = graph.runs / graph.name
        first = graph.stage_name(graph.nodes[case.tested].starts()[0])
        start = next(self.root.glob(f"prefix-{case.model}/toy/{first}/*/artifact/model"))
        seen = json.loads((home / "seen.json").read_text(encoding="utf-8"))
        return Outcome(place / case.tested / "1", place / case.last / "1", start, seen)

    def _prefix(self, case: Case) -> None:
        """Train what comes before the tested stage, once for each model, and lay it where it will be found."""
        home = self.root / f"prefix-{case.model}"
        recipe = self._recipe(case)
        wanted = {name: s for name, s in recipe["stages"].items() if name not in (case.tested, case.last)}
        with locked(home.with_suffix(".lock")), quiet():
            graph = Graph.resolve(
                load.load({"stages": wanted}), name="toy", modality=modalities.find("text"), runs=home
            )
            finish(graph)
        runs = self.root / case.key / "runs"
        shutil.rmtree(runs, ignore_errors=True)  # of a run that raised
        runs.mkdir()
        for name in wanted:
            (runs / "before").mkdir(exist_ok=True)
            (runs / "before" / name).symlink_to(home / "toy" / name)
        (runs / ".data").symlink_to(home / ".data")

    def _recipe(self, case: Case) -> dict[str, Any]:
        with locked(self.root / "data.lock"):
            return case.recipe(self.root / "data")

    def _graph(self, case: Case) -> Graph:
        runs = self.root / case.key / "runs"
        return Graph.resolve(load.load(self._recipe(case)), name="toy", modality=modalities.find("text"), runs=runs)

    def run(self, case: Case) -> dict[str, Any]:
        """Run it in this process; what was seen on the way."""
        with quiet(), witnessed(case) as seen, forced(case):
            if case.cut:
                with contextlib.suppress(Cut), cut_short(case):
                    finish(self._graph(case))
                    raise AssertionError("the run was not cut")
                seen["cut"] = True
            done = finish(self._graph(case))
        assert case.last in done, f"{case.last} was found, not made"
        return seen


def finish(graph: Graph) -> list[str]:
    result = run_graph(graph, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed and not result.stopped, result
    return result.done


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One worker at a time; the lock dies with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute set for a while; what was inherited is inherited again."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """One thread, no waiting for disks (tests/faults has those), and signals as they were."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    torch.set_num_threads(1)
    with replaced(record, "sync", lambda path: None), replaced(artifact, "sync", lambda path: None):
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def witnessed(case: Case) -> Iterator[dict[str, Any]]:
    """Counts the calls of every hook, and keeps what each checkpoint finds in the method's state."""
    seen: dict[str, Any] = {"hooks": dict.fromkeys(case.cls.hooks(), 0), "states": 0, "odd": []}
    save = checkpoint.save

    def saved(run: Any, **kwargs: Any) -> None:
        for method in run.methods.all():
            if method.name() == case.name and run.node.name == case.last:
                seen["states"] += 1
                seen["odd"] += strange(method.state)
        save(run, **kwargs)

    def counted(hook: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen["hooks"][hook] += 1
            return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(checkpoint, "save", saved))
        for hook in case.cls.hooks():
            stack.enter_context(replaced(case.cls, hook, counted(hook, getattr(case.cls, hook))))
        yield seen


def strange(state: dict[str, Any]) -> list[str]:
    """What a checkpoint would not give back as it was."""
    try:
        held, plain = artifact.flatten(state)
    except (TypeError, AssertionError) as error:
        return [str(error)]
    back = artifact.unflatten({**held, **json.loads(json.dumps(plain))})
    return [] if same(back, state) else [f"comes back otherwise: {sorted(state)}"]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b
    return type(a) is type(b) and a == b


@contextlib.contextmanager
def forced(case: Case) -> Iterator[None]:
    """Keep a method that the engine would drop."""
    if not case.forced:
        yield
        return
    with replaced(case.cls, "is_off", lambda self: False):
        yield


@contextlib.contextmanager
def cut_short(case: Case) -> Iterator[None]:
    """Raise between two steps of the tested stage, or while it is published if it takes no steps."""
    step, publish = loop.record, artifact.publish

    def recorded(run: Any, *args: Any, **kwargs: Any) -> None:
        step(run, *args, **kwargs)
        if run.node.name == case.last and run.clock.step == CUT:
            raise Cut

    def published(folder: Path, write: Callable[[Path], None]) -> None:
        def half(beside: Path) -> None:
            write(beside)
            raise Cut

        publish(folder, half if folder.name == "artifact" and folder.parent.parent.name == case.tested else write)

    if case.kind == "apply":
        with replaced(artifact, "publish", published):
            yield
    else:
        with replaced(loop, "record", recorded):
            yield

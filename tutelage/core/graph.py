"""The graph of stages: what each needs, what it will be called, and whether it is already there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutelage.base import registry
from tutelage.base.action import CHANGES
from tutelage.base.errors import UserError
from tutelage.base.expand import root_name
from tutelage.base.hooks import HOOKS, SLOTS
from tutelage.base.links import order, references
from tutelage.base.method import Method
from tutelage.base.spec import Recipe, SourceSpec, Stage, is_late
from tutelage.base.values import unbound
from tutelage.core import fused, hashes, quantized, surgery
from tutelage.core.identity import code_id, difference, file_id, weights_id
from tutelage.core.modality import Modality
from tutelage.core.profile import TIMED, Profile
from tutelage.core.record import read_lines

NUMERICS = 1  # raised by hand when the core would give other numbers for the same recipe

# What changes no number that the stage makes: measurement, saving, the machine.
_APART = ("evals", "save", "keep", "start", "data", "of", "steering", "on")
_ENGINE_APART = ("micro", "device", "threads", "fused_backward")
_TRAINING = ("optim", "schedule", "mix", "curriculum", "step")  # slots that a stage which writes data never uses
PASSAGE = 256  # tokens that an outside model writes at a time for `keep: self`, where rows have room for them
STEPS = "steps"  # beside a stage's checkpoints: those that somebody starts from or exports, as model folders
BUILTIN_PACKING = ("documents", "concat", "single")


class Drift(UserError):
    """A stage is there that was made from something else than the recipe says now."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}; say --retrain to make it anew beside the old one, or --reuse to go on with what is there"
        )
        self.what = what


@dataclass
class Methods:
    """A stage's methods, off ones dropped: slots by name, and the list that adds up."""

    slots: dict[str, Method | None]
    listed: list[Method]
    profile: Profile = field(default_factory=Profile)  # what they take of the time

    def all(self) -> list[Method]:
        return [m for m in self.slots.values() if m is not None] + self.listed

    def having(self, hook: str) -> list[Method]:
        """Those that define a hook, in order."""
        found = [m for m in self.all() if callable(getattr(type(m), hook, None))]  # asked in every step
        return [self.profile.of(method) for method in found] if hook in TIMED else found


def methods_of(name: str, stage: Stage) -> Methods:
    """Instantiate what a stage names; UserError for one in the wrong place or two owners of one hook."""
    slots: dict[str, Method | None] = {}
    for slot in SLOTS:
        entry = getattr(stage, slot)
        if entry is None or (slot == "packing" and entry in BUILTIN_PACKING):
            slots[slot] = None
            continue
        method = registry.make(entry, place=f"stages.{name}.{slot}")
        if not any(HOOKS[hook].slot == slot for hook in method.hooks()):
            home = method.slot() or "methods"
            raise UserError(f"stages.{name}.{slot}: {method.name()} does not belong here; write it under `{home}`")
        slots[slot] = method
    listed = []
    for i, entry in enumerate(stage.methods):
        method = registry.make(entry, place=f"stages.{name}.methods.{i}")
        owned = method.slot()
        if owned:
            other = slots.get(owned)
            taken = f", which {other.name()} holds" if other else ""
            raise UserError(f"stages.{name}.methods.{i}: {method.name()} goes in the slot `{owned}`{taken}")
        listed.append(method)
    return Methods(slots, [m for m in listed if not m.is_off()])


@dataclass
class Node:
    """One stage in its place in the graph."""

    name: str
    stage: Stage
    graph: Graph
    folder: Path | None = None  # runs/<recipe>/<stage>/<n>
    fingerprint: str = ""
    parts: dict[str, Any] = field(default_factory=dict)  # what the fingerprint is made of
    state: str = "new"  # new, partial, done, reused

    @property
    def root(self) -> str:
        return root_name(self.name)

    @property
    def seed(self) -> int:
        return self.graph.recipe.seed if self.stage.seed is None else self.stage.seed

    @property
    def inputs(self) -> list[str]:
        return references(self.stage, among=self.graph.nodes)

    @property
    def artifact(self) -> Path:
        assert self.folder is not None, f"{self.name} has no place yet"
        return self.folder / "artifact"

    def starts(self) -> list[Any]:
        start = self.stage.start
        return [] if start is None else list(start) if isinstance(start, list) else [start]

    def lineage(self) -> list[str]:
        """The stages that this one's weights come from, oldest first, each once."""
        found: list[str] = []
        for start in self.starts():
            name = self.graph.stage_name(start)
            if name:
                parent = self.graph.nodes[name]
                found += [n for n in [*parent.lineage(), name] if n not in found]
        return found

    def needs(self) -> set[str]:
        """Every stage that must be there before this one can begin."""
        found, queue = set[str](), list(self.inputs)
        while queue:
            name = queue.pop()
            if name not in found:
                found.add(name)
                queue += self.graph.nodes[name].inputs
        return found

    def outside(self) -> str | None:
        """The folder or hub name that the first weights came from, if they came from outside."""
        for start in self.starts():
            name = self.graph.stage_name(start)
            if name:
                return self.graph.nodes[name].outside()
            if isinstance(start, str):
                return start
        return None

    def kept(self) -> dict[str, SourceSpec]:
        """What must not be lost: its own `keep`, else that of the stage it starts from."""
        if isinstance(self.stage.keep, dict):
            return self.stage.keep
        if self.stage.keep is None:
            for start in self.starts():
                name = self.graph.stage_name(start)
                if name:
                    return self.graph.nodes[name].kept()
        return {}

    def rows_of(self, spec: SourceSpec) -> Path | None:
        """The data folder of the stage that a source names."""
        return self.graph.nodes[spec.stage].artifact / "data" if spec.stage else None

    def find_data(self, of: str) -> dict[str, SourceSpec]:
        """The sources that `of:` names: a stage, `previous`, `self` or a name under `keep`."""
        kept = self.kept()
        if of == "previous":
            name = next((n for n in map(self.graph.stage_name, self.starts()) if n), None)
            name = self._with_data(name)
            if name:
                return self.graph.nodes[name].stage.data
            if kept:
                return kept
            raise UserError(f"stages.{self.name}: `of: previous` finds no data: name what to keep under `keep:`")
        if of in kept:
            return {of: kept[of]}
        if of in self.graph.nodes:
            if self.graph.nodes[of].stage.data:
                return self.graph.nodes[of].stage.data
            if self.graph.nodes[of].stage.product == "data":
                return {of: SourceSpec(stage=of)}
        raise UserError(
            f"stages.{self.name}: no data to be had of '{of}'; there are: previous, "
            + ", ".join([*kept, *(n for n, node in self.graph.nodes.items() if node.stage.data)])
        )

    def _with_data(self, name: str | None) -> str | None:
        """The nearest stage back from `name` that trained on data (a merge has none of its own)."""
        while name and not self.graph.nodes[name].stage.data:
            name = next((n for n in map(self.graph.stage_name, self.graph.nodes[name].starts()) if n), None)
        return name


@dataclass
class Graph:
    """The resolved recipe: every stage a node, in an order in which they can run."""

    name: str
    recipe: Recipe
    modality: Modality
    runs: Path
    nodes: dict[str, Node] = field(default_factory=dict)

    @staticmethod
    def resolve(recipe: Recipe, *, name: str, modality: Modality, runs: Path) -> Graph:
        """Fill in what the recipe leaves to us (samples of an outside model to keep) and order the stages."""
        recipe = recipe.model_copy(deep=True)
        graph = Graph(name, recipe, modality, runs)
        hashes.remember(runs / ".data")
        graph._of_other_runs()
        for stage_name in list(recipe.stages):
            graph._keep_self(stage_name)
        for stage_name in order(recipe):
            graph.nodes[stage_name] = Node(stage_name, recipe.stages[stage_name], graph)
        for node in graph.nodes.values():
            methods = methods_of(node.name, unbound(node.stage))
            for mode in (quantized, fused, surgery):  # refuse early
                mode.check(node.name, node.stage, methods)
        return graph

    def stage_name(self, start: Any) -> str | None:
        """The stage that a `start` entry names, or None when it is from outside."""
        if isinstance(start, dict) and "stage" in start:
            start = start["stage"]
        if not isinstance(start, str):
            return None
        base = start.split("@")[0]
        return base if base in self.recipe.stages else None

    def _of_other_runs(self) -> None:
        """Put the folders of stages of other runs (`demo/base`, `demo/base@500`) in the place of their names."""
        from tutelage.core.elsewhere import folder_for  # it resolves graphs itself

        def put(start: Any) -> Any:
            own = self.stage_name(start)
            return start if own else folder_for(start, runs=self.runs, modality=self.modality) or start

        for name, stage in self.recipe.stages.items():
            start = [put(s) for s in stage.start] if isinstance(stage.start, list) else put(stage.start)
            if start != stage.start:
                self.recipe.stages[name] = stage.model_copy(update={"start": start})

    def _keep_self(self, name: str) -> None:
        """For weights from outside, add the stage that writes down what the start model knows."""
        stage = self.recipe.stages[name]
        starts = stage.start if isinstance(stage.start, list) else [stage.start]
        outside = [s for s in starts if isinstance(s, str) and self.stage_name(s) is None]
        weights = [s for s in outside if self.modality.start_files(s)[0] is not None]
        asked = stage.keep == "self" or (stage.keep is None and stage.until is not None and weights)
        if stage.product != "model" or stage.keep == "none" or not asked:
            if stage.keep == "none":
                self.recipe.stages[name] = stage.model_copy(update={"keep": {}})
            return
        if not weights:
            raise UserError(
                f"stages.{name}.keep: `self` needs a start from outside; here its ancestors' data are measured"
            )
        writer = f"{name}.self"
        length = PASSAGE if is_late(stage.length) else stage.length
        self.recipe.stages[writer] = Stage(
            start=weights[0],
            make={"use": self.modality.sampler, "length": min(PASSAGE, length)},
            length=length,
            seed=stage.seed,
            engine=stage.engine.model_copy(update={"quantize": None, "fused_backward": False}),
        )
        kept = {"self": SourceSpec(stage=writer, val="20%")}
        self.recipe.stages[name] = stage.model_copy(update={"keep": kept})

    # -- fingerprints -----------------------------------------------------------------------------------------------

    def fingerprint(self, node: Node) -> None:
        """Give a node its plan fingerprint; its inputs must have theirs."""
        parts = self._literals(node)
        parts["start"] = [self._start_id(node, start) for start in node.starts()]
        for label, specs in (("data", node.stage.data), ("of", self._read_by_methods(node))):
            parts[label] = {name: self._source_id(node, spec) for name, spec in specs.items()}
        if node.stage.of:
            parts["measured"] = {n: [self.nodes[n].fingerprint, steering_id(self.nodes[n])] for n in node.inputs}
        parts["code"] = {name: code_id(name) for name in sorted({m.name() for m in self._methods(node)})}
        parts["files"] = {str(path): file_id(path) for method in self._methods(node) for path in method.files()}
        parts["numerics"] = [NUMERICS, self.modality.numerics]
        node.parts = parts
        node.fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _literals(self, node: Node) -> dict[str, Any]:
        literals = node.stage.model_dump(mode="json", exclude=set(_APART))
        literals |= self._watched(node) if node.stage.on else {}
        literals["engine"] = {k: v for k, v in literals["engine"].items() if k not in _ENGINE_APART}
        if literals["engine"]["quantize"] is None:  # as it was before there was such a key
            del literals["engine"]["quantize"]
        methods = methods_of(node.name, node.stage)
        for slot in _TRAINING if node.stage.make is not None else ():
            methods.slots[slot] = None
            del literals[slot]
        for slot, method in methods.slots.items():
            if method is not None:
                literals[slot] = {"use": method.name(), **method.model_dump(mode="json")}
        literals["methods"] = [{"use": m.name(), **m.model_dump(mode="json")} for m in methods.listed]
        for key in ("apply", "make"):
            if literals[key] is not None:
                method = registry.make(getattr(node.stage, key), place=f"stages.{node.name}.{key}")
                literals[key] = {"use": method.name(), **method.model_dump(mode="json")}
        if node.stage.measure is not None:
            literals["rows"] = node.stage.evals.final
        if any("act" in method.hooks() for method in methods.all()):  # what they may do is part of what they are
            literals["steering"] = node.stage.steering.model_dump(mode="json")
        literals["seed"] = node.seed
        literals["root"] = node.root
        return literals

    def _watched(self, node: Node) -> dict[str, Any]:
        """What a stage's rules hang on: how and on what is measured, which changes nothing where there are no rules."""
        spec = node.stage.evals
        probes = [registry.make(entry, place=f"stages.{node.name}.evals.run") for entry in self._probes(node)]
        return {
            "on": [rule.model_dump(mode="json") for rule in node.stage.on],
            "evals": spec.model_dump(mode="json", exclude={"run"}),
            "probes": [{"use": m.name(), **m.model_dump(mode="json")} for m in probes],
            "kept": {name: self._source_id(node, spec) for name, spec in node.kept().items()},
        }

    def _probes(self, node: Node) -> list[Any]:
        return list(self.modality.probes if node.stage.evals.run is None else node.stage.evals.run)

    def _methods(self, node: Node) -> list[Method]:
        entries = [e for e in (node.stage.apply, node.stage.make, *(node.stage.measure or [])) if e is not None]
        entries += self._probes(node) if node.stage.on else []
        own = [registry.make(entry, place=f"stages.{node.name}") for entry in entries]
        learns = node.stage.until is not None or any("fit" in method.hooks() for method in own)
        if learns and node.stage.objective is None and (config := self._config(node)):
            own.append(registry.make(self.modality.objective_of(config), place=f"stages.{node.name}"))
        methods = methods_of(node.name, node.stage)
        if node.stage.make is not None:
            methods.slots |= dict.fromkeys(_TRAINING)
        return methods.all() + own

    def _config(self, node: Node) -> dict[str, Any]:
        """The config of the model that a stage's weights come from in the end."""
        start = node.starts()[0] if node.starts() else {}
        name = self.stage_name(start)
        if name:
            return self._config(self.nodes[name])
        return start if isinstance(start, dict) else self.modality.start_files(start)[1]

    def _read_by_methods(self, node: Node) -> dict[str, SourceSpec]:
        found: dict[str, SourceSpec] = {}
        for method in methods_of(node.name, node.stage).all():
            of = getattr(method, "of", None)
            if isinstance(of, str):
                found |= {f"{of}/{name}": spec for name, spec in node.find_data(of).items()}
        return found

    def _start_id(self, node: Node, start: Any) -> Any:
        name = self.stage_name(start)
        if name:
            step = start.split("@")[1:] if isinstance(start, str) else []
            return [self.nodes[name].fingerprint, steering_id(self.nodes[name]), *step]
        if isinstance(start, str) and (other := stage_behind(Path(start))):
            made = json.loads((other[0] / "stage.json").read_text(encoding="utf-8"))["fingerprint"]
            return [made, steering_id_of(other[0]), *other[1:]]
        folder, config = self.modality.start_files(start) if isinstance(start, str) else (None, start)
        return {"config": config, "weights": weights_id(folder) if folder else None}

    def _source_id(self, node: Node, spec: SourceSpec) -> Any:
        rest = spec.model_dump(mode="json", include={"field", "template", "val", "bad"})
        rest |= {} if spec.weight is None else {"weight": spec.weight}
        rest |= {} if spec.order == "shuffled" else {"order": spec.order}
        if isinstance(rest["val"], str) and not rest["val"].endswith("%"):
            rest["val"] = self.modality.content_id(spec.model_copy(update={"path": rest["val"]}), rows=None)
        if spec.stage:
            return [self.nodes[spec.stage].fingerprint, rest]
        return [self.modality.content_id(spec, rows=None), rest]

    def step_wanted(self, name: str, step: int) -> bool:
        """Whether another stage starts from this step of a stage (`base@100`)."""
        starts = [start for node in self.nodes.values() for start in node.starts()]
        return f"{name}@{step}" in starts

    # -- places -----------------------------------------------------------------------------------------------------

    def place(self, node: Node, *, drift: str = "refuse") -> None:
        """Find or choose the folder of a node. `drift` says what to do when the folder holds another version:

        `refuse` (UserError with the difference), `reuse` the artifact that is there, or `retrain` beside it. A version
        that failed before anything was measured or saved holds nothing to ask about.
        """
        home = self.runs / self.name / node.name
        found = sorted((p for p in home.glob("[0-9]*") if (p / "stage.json").exists()), key=lambda p: int(p.name))
        for folder in reversed(found):
            if json.loads((folder / "stage.json").read_text())["fingerprint"] == node.fingerprint:
                node.folder, node.state = folder, "done" if (folder / "artifact").exists() else "partial"
                return
        for path in sorted(self.runs.glob("*/*/*/stage.json")):
            other = path.parent
            same = (other / "artifact").exists() and json.loads(path.read_text())["fingerprint"] == node.fingerprint
            if same and steering_id_of(other) is None:
                node.folder, node.state = other, "reused"
                return
        if found and drift == "reuse" and (found[-1] / "artifact").exists():
            old = json.loads((found[-1] / "stage.json").read_text())
            node.folder, node.state = found[-1], "done"
            node.fingerprint, node.parts = old["fingerprint"], old["parts"]  # what follows is made from what is there
            return
        if found and drift == "refuse" and begun(found[-1]):
            old = json.loads((found[-1] / "stage.json").read_text())["parts"]
            raise Drift(
                f"stage '{node.name}' in {found[-1]} was made from something else: {difference(old, node.parts)}"
            )
        node.folder, node.state = home / str(int(found[-1].name) + 1 if found else 1), "new"


def begun(folder: Path) -> bool:
    """Whether a stage's folder holds anything to keep: an artifact, a checkpoint, a measurement, what is to be done to it."""
    metrics = folder / "metrics.jsonl"
    made = any((folder / name).exists() for name in ("artifact", "journal.jsonl")) or any((folder / "state").glob("*"))
    return made or (metrics.exists() and metrics.stat().st_size > 0)


def stage_behind(model: Path) -> tuple[Path] | tuple[Path, str] | None:
    """The trained stage (and the step) whose model a folder is; None for one from outside, adopted or not."""
    by_step, finished = model.parent.name == STEPS, model.parts[-2:] == ("artifact", "model")
    folder = model.parent.parent
    if not (by_step or finished) or not (folder / "state").is_dir() or not (folder / "stage.json").exists():
        return None
    return (folder, str(int(model.name))) if by_step else (folder,)


def steering_id_of(folder: Path) -> str | None:
    """Digest of what people and agents did to a stage's weights or data while it ran; None when nothing was done."""
    acts = [[tick, act] for _, tick, act in acts_of_people(folder)]
    return hashlib.sha256(json.dumps(acts, sort_keys=True).encode()).hexdigest()[:16] if acts else None


def acts_of_people(folder: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """(who, tick, action) of what people and agents did to a stage's weights or data while it ran."""
    lines = [line for line in read_lines(folder / "journal.jsonl") if line.get("actor") in ("person", "agent")]
    return [(line["by"], line["tick"], act) for line in lines for act in line["do"] if act["do"] in CHANGES]


def steering_id(node: Node) -> str | None:
    return steering_id_of(node.folder) if node.folder else None

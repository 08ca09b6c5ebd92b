"""Builds a training stage, always in this order: model, begin, wrap, modules, freeze and group, optimizer, resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.base import registry
from tutelage.base.clock import Clock, Span
from tutelage.base.errors import UserError
from tutelage.base.links import stage_of
from tutelage.base.method import Method
from tutelage.base.spec import SourceSpec
from tutelage.core import acts, artifact, checkpoint, micro, parts, randomness, shape, standing, steer
from tutelage.core.alerts import Watch
from tutelage.core.anatomy import Anatomy, anatomy
from tutelage.core.device import autocast_of, device_of
from tutelage.core.engine import Engine
from tutelage.core.graph import BUILTIN_PACKING, Methods, Node, methods_of
from tutelage.core.inbox import Inbox
from tutelage.core.measure import Evals, planned
from tutelage.core.modality import Corpus, Modality
from tutelage.core.pace import UNKNOWN
from tutelage.core.prefix import prefixed
from tutelage.core.record import Journal, Metrics, newest_line, read_lines
from tutelage.core.rules import Rules
from tutelage.core.shard import World
from tutelage.core.stream import Order, Source, Stream
from tutelage.core.types import Batch
from tutelage.core.view import Data, View

Say = Callable[[dict[str, Any]], None]  # told where a stage stands; never blocks


@dataclass
class Steered:
    """What actions have set and no method holds. A checkpoint holds it as it is."""

    mix: dict[str, float] | None = None  # shares instead of the mix method's
    added: dict[str, dict[str, Any]] = field(default_factory=dict)  # sources that joined: spec and weight
    dropped: list[str] = field(default_factory=list)  # sources that nothing is drawn from
    active: list[str] | None = None  # what is trained, once something was frozen or freed
    values: dict[str, float] = field(default_factory=dict)  # of the engine and the model, by path


@dataclass
class Run:
    """A training stage, built: everything the loop touches."""

    node: Node
    modality: Modality
    processor: Any
    engine: Engine
    view: View
    methods: Methods
    stream: Stream
    sources: dict[str, Source]  # by name, and their parts by theirs
    parts: parts.Parts
    shares: dict[str, float]  # what a method's source takes first, of the whole
    rows: int  # of a step, before a curriculum
    packing: Any
    journal: Journal
    say: Say
    corpora: Corpora
    standing: standing.Standing
    evals: Evals = field(init=False)  # once the length of the stage is known
    rules: Rules = field(init=False)  # once it is known what of them was counted
    metrics: Metrics = field(init=False)  # once it is known whether rows go on from a checkpoint
    inbox: Inbox = field(init=False)  # where requests come in
    acting: list[Method] = field(init=False)  # policies
    extra: dict[str, nn.Module] = field(default_factory=dict)  # parts that methods own
    wrapped: dict[str, tuple[nn.Module, Method, nn.Module]] = field(default_factory=dict)  # wrapper, owner, layer
    steered: Steered = field(default_factory=Steered)
    dropouts: list[float] = field(default_factory=list)  # as the recipe has them, of each module that has some
    parked: dict[str, dict[str, Any]] = field(default_factory=dict)  # optimizer states of what is frozen, by name
    watch: Watch = field(default_factory=Watch)  # what of the steps stands out, for people
    shown: float = -1e9  # when the controls were last written
    unsound: bool = False  # the last loss was no number, and nobody has gone back yet
    asked: int = 0  # the tick at which policies were asked last
    planned: int = -1  # the tick up to which the recipe's actions were looked at
    saved: tuple[int, int] | None = None  # tick and journal lines of the newest checkpoint
    fresh: bool = True  # not resumed from a checkpoint
    measured: bool = False  # the last measurement is done
    lines: int = 0  # journal lines whose actions are already in the state

    @property
    def clock(self) -> Clock:
        return self.view.clock

    def totals(self, until: Span) -> dict[str, float]:
        return totals(self, until, known=self.clock.total)

    def next_tick(self) -> None:
        """No two sets of weights share a tick. Between two steps policies are asked once."""
        self.clock.tick += 1
        self.asked = self.clock.tick

    def own(self) -> list[str]:
        """The sources that are mixed; the others belong to methods."""
        names = [*self.node.stage.data, *self.steered.added]
        return [name for name in names if name not in self.steered.dropped]

    def opened(self, name: str, spec: SourceSpec) -> tuple[Source, Source, set[str]]:
        """What is drawn of a source that joins, its held-out part, the names of its rows. UserError where there are none."""
        corpus = self.corpora.of(name, spec)
        source = prefixed(name, corpus.train, node=self.node, methods=self.methods, processor=self.processor)
        whole, parts = self.parts.divided(source)
        return source, corpus.heldout, {Order(p, seed=self.node.seed).source.name for p in parts.values() or [whole]}

    def open_source(self, name: str) -> None:
        """Draw from a source that an action added, and measure its held-out part."""
        source, heldout, _ = self.opened(name, SourceSpec.model_validate(self.steered.added[name]["source"]))
        view = self.view
        if name not in self.sources:
            found = self.parts.add(source)
            self.sources |= found
            for drawn, order in self.parts.orders(found, seed=self.node.seed, packing=self.packing).items():
                self.stream.add(drawn, order=order)
        if name not in view.heldout:
            collate = partial(self.modality.collate, length=self.node.stage.length)
            length = self.node.stage.length
            view.heldout[name] = Data({name: heldout}, collate, seed=0, length=length, packing=self.packing)

    def epochs(self) -> float:
        """Passes over the largest source that has been drawn from."""
        drawn = self.stream.epochs()
        passes = {name: self.parts.passes(name, drawn) for name in self.own()}
        return max(((self.sources[n].facts["tokens"], p) for n, p in passes.items() if p), default=(0, 0.0))[1]

    @property
    def folder(self) -> Path:
        assert self.node.folder is not None
        return self.node.folder


@dataclass
class Corpora:
    """Builds sources on demand, each once: own data, an ancestor's, or what is kept."""

    node: Node
    processor: Any
    say: Say
    built: dict[str, Corpus] = field(default_factory=dict)

    def of(self, name: str, spec: SourceSpec) -> Corpus:
        key = f"{name}|{spec.model_dump_json(exclude={'weight'})}"
        if key not in self.built:
            graph = self.node.graph
            self.built[key] = graph.modality.corpus(
                name,
                spec,
                processor=self.processor,
                length=self.node.stage.length,
                cache=graph.runs / ".data",
                rows=self.node.rows_of(spec),
                progress=lambda what, done, of: self.say({"doing": what, "done": done, "of": of}),
                workers=torch.get_num_threads(),
            )
            for note in self.built[key].notes:
                self.say({"note": note})
        return self.built[key]


def columns(node: Node) -> dict[str, SourceSpec]:
    """What is measured: own sources, every ancestor's and descendant's, what `keep` names: the forgetting matrix's columns.

    A table has those of the stages that it measures.

    A name that two stages use for different data is written `stage.name` for the other stage's.
    """
    found = dict(node.stage.data)
    nodes = node.graph.nodes
    later = [name for name, other in nodes.items() if node.name in other.lineage()]
    before = node.lineage()
    for name in map(stage_of, node.stage.of or []):
        before += [n for n in [*nodes[name].lineage(), name] if n not in before]
    there = node.needs()  # a later stage's data may still have to be made
    ahead = [(n, {k: s for k, s in nodes[n].stage.data.items() if not s.stage or s.stage in there}) for n in later]
    others = [*((name, nodes[name].stage.data) for name in reversed(before)), *ahead]
    for owner, specs in [*others, ("keep", node.kept())]:
        for name, spec in specs.items():
            if name not in found:
                found[name] = spec
            elif found[name].model_dump(exclude={"weight", "order"}) != spec.model_dump(exclude={"weight", "order"}):
                found[f"{owner}.{name}"] = spec
    return found


@dataclass
class Opened:
    """A model on its device with its data at hand: what every kind of stage begins with."""

    processor: Any
    engine: Engine
    view: View
    corpora: Corpora
    methods: Methods
    packing: Any


def opened(node: Node, *, world: World, say: Say, start: Any = None) -> Opened:
    """Open the start's model (or another `start`) with its tokenizer, on the device that the stage asks for."""
    stage, modality = node.stage, node.graph.modality
    device = device_of(node)
    folder, config = start_of(node, start)
    processor = processor_of(node, folder, config, say=say)
    randomness.reseed(randomness.seed_of(node.seed, node.root, 0, "init"))
    say({"doing": "opening the model"})
    model = modality.model(folder, config, processor=processor, length=stage.length)
    model.to(device)
    parts = anatomy(model)
    methods = methods_of(node.name, stage)
    objective = methods.slots["objective"]
    if objective is None:
        objective = registry.make(modality.objective(parts), place=f"stages.{node.name}.objective")
        methods.slots["objective"] = objective
    packing = packing_of(node, model, parts, methods, device=device, say=say)
    engine = Engine(
        model=model,
        anatomy=parts,
        modality=modality,
        device=device,
        world=world,
        autocast=autocast_of(stage.precision, device),
        packing=packing if isinstance(packing, str) else "documents",
        micro=stage.engine.micro,
        clip=stage.engine.clip,
        objective=methods.profile.of(objective),
        auxiliaries=methods.having("auxiliary"),
        penalties=methods.having("penalty"),
        grad_hooks=methods.having("grads"),
    )
    view = View(clock=Clock(), seed=node.seed, stage=node.root, engine=engine, fresh=folder is None)
    if stage.tokenizer is not None and folder is not None:
        own = modality.processor(None, folder=folder, texts=list, cache=node.graph.runs / ".data")
        view.same_tokens = modality.processor_id(own) == modality.processor_id(processor)
    view.generate = partial(modality.generate, model, processor, pack=packing if callable(packing) else None)
    view.batch_of = partial(modality.batch_of, processor=processor)
    view.decode = partial(processor.decode, skip_special_tokens=True)
    corpora = Corpora(node, processor, say)
    view_of_data(view, node, corpora, packing)
    return Opened(processor, engine, view, corpora, methods, packing)


def build(node: Node, *, world: World, say: Say) -> Run:
    """Everything up to the first step (or the step after the last checkpoint)."""
    stage, modality = node.stage, node.graph.modality
    base = opened(node, world=world, say=say)
    engine, view, methods = base.engine, base.view, base.methods
    assert node.folder is not None and stage.until is not None and view._source is not None
    if stage.engine.checkpointing:
        engine.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sources = {name: base.corpora.of(name, spec).train for name, spec in stage.data.items()}
    for name, spec in stage.data.items():
        if isinstance(spec.weight, (int, float)):
            sources[name].facts["weight"] = float(spec.weight)
    wrap = partial(prefixed, node=node, methods=methods, processor=base.processor)
    sources = {name: wrap(name, source) for name, source in sources.items()}
    whole, bare = dict(sources), view._source
    view._source = lambda name: replace(bare(name), sources={name: whole[name]})  # with what stands before documents
    cut = parts.Parts.of(methods.slots["curriculum"], decode=view.decode)
    for source in list(sources.values()):
        sources |= cut.add(source)
    shares: dict[str, float] = {}
    for method in methods.having("source"):
        for name, (source, share) in method.source(view).items():
            sources[name], shares[name] = wrap(name, source), share
    stream = Stream(cut.orders(sources, seed=node.seed, packing=base.packing))

    def sample(count: int) -> Batch:
        here = stream.state()
        weights = parts.mix_weights(run)
        length = parts.typical(run, weights)
        drawn = stream.draw(cut.weights(weights, length), length, count)
        stream.load(here)
        return modality.collate(drawn, sources, length=length)

    view._sample = sample
    rows = max(1, round(stage.batch.value / stage.length)) if stage.batch.unit == "tok" else int(stage.batch.value)
    saved = artifact.newest_state(node.folder / "state", warn=lambda text: say({"warning": text}))
    run = Run(
        node=node,
        modality=modality,
        processor=base.processor,
        engine=engine,
        view=view,
        methods=methods,
        stream=stream,
        sources=sources,
        parts=cut,
        shares=shares,
        rows=max(rows, world.size),
        packing=base.packing,
        journal=journal_of(node.folder / "journal.jsonl", world),
        say=say,
        corpora=base.corpora,
        standing=standing.Standing(stage.steering),
    )
    if saved:
        run.steered = Steered(**saved[1]["steered"])
        for name in run.steered.added:
            run.open_source(name)
    view.clock.total = totals(run, stage.until)
    evaluation(run)
    steer.check_planned(run)
    if base.packing != stage.packing and base.packing == "single" and not run.journal.engine("packing"):
        note = [{"do": "packing", "rule": "single"}]
        run.journal.append(tick=0, by="engine", do=note, write=world.rank == 0)
    view.length, view.tokens = stage.length, run.rows * stage.length
    if methods.slots["curriculum"]:
        engine.length = stage.length
    shape.begin(run, saved)
    shape.wrap(run)
    shape.optimizer(run)
    micro.begin(run)
    run.dropouts = [getattr(module, name) for module, name in acts.dropouts(engine.model)]
    checkpoint.restore(run, saved)
    steer.prepare(run)
    run.rules = Rules(run)
    return run


def journal_of(path: Path, world: World) -> Journal:
    """The stage's journal, as rank 0 finds it, on every rank."""
    return Journal(path, lines=world.agree(read_lines(path, mend=True) if not world.rank else []))


def start_of(node: Node, start: Any = None) -> tuple[Path | None, dict[str, Any]]:
    """The folder of weights (None for fresh ones) and the config that a stage starts from."""
    starts = [start] if start is not None else node.starts()
    if len(starts) != 1:
        raise UserError(f"stages.{node.name}.start: a stage like this starts from one model (here {len(starts)})")
    name = node.graph.stage_name(starts[0])
    if name:
        parent, step = node.graph.nodes[name], str(starts[0]).partition("@")[2]
        if step:
            from tutelage.core.elsewhere import at_step  # it opens stages itself

            return node.graph.modality.start_files(str(at_step(parent, int(step))))
        return node.graph.modality.start_files(str(parent.artifact / "model"))
    if isinstance(starts[0], dict) and "folder" in starts[0]:
        return node.graph.modality.start_files(starts[0]["folder"])
    if isinstance(starts[0], dict):
        return None, starts[0]
    return node.graph.modality.start_files(starts[0])


def processor_of(node: Node, folder: Path | None, config: dict[str, Any], *, say: Say) -> Any:
    """The tokenizer: the recipe's own, else that of the start; trained once, in the stage that asks for it."""
    stage, modality, graph = node.stage, node.graph.modality, node.graph
    cache = graph.runs / ".data"

    def texts() -> Any:
        say({"doing": "training the tokenizer"})
        return [(spec, node.rows_of(spec)) for spec in stage.data.values()]

    return modality.processor(stage.tokenizer, folder=folder, config=config, texts=texts, cache=cache)


def packing_of(
    node: Node, model: nn.Module, parts: Anatomy, methods: Methods, *, device: torch.device, say: Say
) -> Any:
    """The packing rule; one document a row for a model whose documents see each other in a shared one."""
    method = methods.slots["packing"]
    packing: Any = method.pack if method else node.stage.packing
    assert callable(packing) or packing in BUILTIN_PACKING
    if packing in ("concat", "single"):
        return packing
    if node.graph.modality.packs(model, anatomy=parts, device=device):
        return packing
    say({"warning": "documents sharing a row see each other in this model, so each row holds one document"})
    return "single"


def view_of_data(view: View, node: Node, corpora: Corpora, packing: Any) -> None:
    """Give the view its data: what is measured now, what ancestors learned from when it is asked for."""
    stage, modality = node.stage, node.graph.modality
    collate = partial(modality.collate, length=stage.length)
    how: Any = {"seed": node.seed, "length": stage.length, "packing": packing}

    def data(of: str) -> Data:
        return Data({n: corpora.of(n, spec).train for n, spec in node.find_data(of).items()}, collate, **how)

    def ref(name: str) -> nn.Module:
        if name != "start":
            raise UserError(f"there is no frozen model '{name}' here; there is: start")
        folder, config = start_of(node)
        if folder is None:
            raise UserError(f"stages.{node.name} starts from fresh weights, so there is no start model to hold on to")
        model = modality.model(folder, config, processor=corpora.processor, length=stage.length)
        return model.to(view.engine.device).requires_grad_(False).eval()

    def own(name: str) -> Data:
        return Data({name: corpora.of(name, stage.data[name]).train}, collate, **how)

    view._data, view._open_ref, view._source, view.sources = data, ref, own, list(stage.data)
    for column, spec in columns(node).items():
        source = corpora.of(column, spec).heldout
        view.heldout[column] = Data({column: source}, collate, seed=0, length=stage.length, packing=packing)
    view.kept = frozenset(name for name, spec in columns(node).items() if spec in node.kept().values())
    for name in node.lineage():
        earlier = node.graph.nodes[name]
        view.history[name] = last_line(earlier, kind="eval").get("values", {})
        if earlier.stage.until is not None and earlier.stage.data:
            view.trained[name] = float(last_line(earlier, kind="train").get("tokens", 0.0))


def last_line(node: Node, *, kind: str) -> dict[str, Any]:
    """A finished stage's last numbers of a kind; nothing where there are none."""
    return newest_line(node.artifact / "metrics.jsonl", kind=kind)


def totals(run: Run, until: Span, *, known: dict[str, float] | None = None) -> dict[str, float]:
    """How far the stage goes, in its own unit first, then what is known of the others (`known`: of a running stage).

    Minutes are counted in steps once a few steps have been timed; a percent span is one of the largest source.
    """
    tokens_step = float(run.rows * run.node.stage.length)
    epoch = max(
        (float(source.facts["tokens"]) for name, source in run.sources.items() if name not in run.shares), default=0
    )
    per_step = {"step": 1.0, "tok": tokens_step, "sample": float(run.rows)}
    if epoch:
        per_step["epoch"] = tokens_step / epoch
    if known and "flop" in known and known.get("step"):  # once it was counted what a step takes
        per_step["flop"] = known["flop"] / known["step"]
    unit, value = until.unit, until.value
    if unit == "%":
        unit, value = "epoch", until.share
    if unit == "min":
        steps = float(UNKNOWN)  # until the engine has timed a step and says how many
        return {"step": steps, **{u: steps * per_step[u] for u in per_step if u != "step"}}
    if unit == "flop" and "flop" not in per_step:
        return {"flop": value}
    steps = value / per_step[unit]
    return {unit: value, **{u: steps * per_step[u] for u in per_step if u != unit}}


def evaluation(run: Run) -> None:
    """Plan the measurements of the stage."""
    spec = run.node.stage.evals
    entries = run.modality.probes if spec.run is None else spec.run
    probes = [registry.make(entry, place=f"stages.{run.node.name}.evals.run") for entry in entries]
    run.evals = Evals(spec, probes, planned(spec, run.clock.total))

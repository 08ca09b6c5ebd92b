"""What a stage leaves behind: a model, data or a table, published whole, each with how it came to be."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.base.method import Method
from tutelage.core import artifact, fitting, forward, quantized, surgery, writing
from tutelage.core.graph import Node
from tutelage.core.record import dumps, newest_line, read_lines, write_whole
from tutelage.core.shard import World
from tutelage.core.stage import Opened, Say, opened, start_of
from tutelage.core.types import Document


def trackers(node: Node, world: World, say: Say) -> contextlib.AbstractContextManager[Any]:
    """Hand metrics on to what `report_to` names, from a thread of its own that training never waits for."""
    names = node.graph.recipe.report_to
    if world.rank or not names:
        return contextlib.nullcontext()
    assert node.folder is not None
    config = node.stage.model_dump(mode="json", exclude_none=True)
    return forward.forwarding(
        node.folder,
        names,
        project=node.graph.name,
        name=node.name,
        config=config,
        warn=lambda text: say({"warning": text}),
    )


def fold(run: Any) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Put plain layers back, with what their wrappers learned; returns the wrappers in PEFT's format.

    Weights in four bits become what these stand for (see core/quantized.py).
    """
    adapters = []
    quantized.restore(run.engine.model)
    for method in run.methods.having("wrap"):
        mine = {name: wrapper for name, (wrapper, owner, _) in run.wrapped.items() if owner is method}
        if "adapter" in method.hooks():
            adapters.append(method.adapter(mine))
        for name, wrapper in mine.items():
            layer = run.wrapped[name][2]
            layer.weight.data = method.fold(wrapper).to(layer.weight)
            parent, _, last = name.rpartition(".")
            setattr(run.engine.model.get_submodule(parent), last, layer)
    return adapters


def publish_model(
    node: Node,
    model: nn.Module,
    processor: Any,
    *,
    extra: dict[str, Tensor] | None = None,
    adapter: list[tuple[dict[str, Any], dict[str, Tensor]]] | None = None,
) -> None:
    """The artifact of a stage that makes a model."""

    def write(folder: Path) -> None:
        node.graph.modality.save_model(model, folder / "model")
        node.graph.modality.save_processor(processor, folder / "model")
        if extra:
            artifact.save_tensors(folder / "extra.safetensors", extra)
        for config, tensors in adapter or []:
            (folder / "adapter").mkdir()
            artifact.save_tensors(folder / "adapter" / "adapter_model.safetensors", tensors)
            (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        about(node, folder)

    artifact.publish(node.artifact, write)


def about(node: Node, folder: Path) -> None:
    """The resolved stage, copies of its numbers, and a card."""
    assert node.folder is not None
    resolved = node.stage.model_dump(mode="json", exclude_none=True)
    (folder / "stage.yaml").write_text(
        yaml.safe_dump({node.name: resolved}, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    for name in ("metrics.jsonl", "journal.jsonl"):
        if (node.folder / name).exists():
            shutil.copyfile(node.folder / name, folder / name)
    (folder / "README.md").write_text(card(node), encoding="utf-8")


def card(node: Node, *, rows: list[dict[str, Any]] | None = None, step: int | None = None) -> str:
    """A model card in Hugging Face's form, generated. `rows` are measurements up to `step`, for a saved step."""
    assert node.folder is not None
    outside = node.outside()
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["tutelage", f"fingerprint:{node.fingerprint}"]}
    if outside:
        head["base_model"] = outside
    last = newest_line(node.folder / "metrics.jsonl", kind="eval") if rows is None else next(iter(rows[-1:]), {})
    found = [f"| {k} | {v:.4f} |" for k, v in sorted(last.get("values", {}).items()) if isinstance(v, float)]
    lineage = " → ".join([*node.lineage(), node.name])
    place = "" if step is None else f", as it was at step {step}"
    table = ["| measure | value |", "|---|---|", *found] if found else ["Nothing was measured in this stage."]
    steered = [line for line in read_lines(node.folder / "journal.jsonl") if line["by"] not in ("engine", "recipe")]
    note = f"\nSteered by hand {len(steered)} times; `journal.jsonl` beside this file says how.\n" if steered else ""
    kind = node.stage.engine.quantize
    note += "" if kind is None else f"\nTrained over {kind} weights: `model/` holds what these stand for.\n"
    return "\n".join(
        [
            *("---", yaml.safe_dump(head, sort_keys=False).strip(), "---", f"# {node.graph.name} / {node.name}", ""),
            f"Made by Tutelage as stage `{lineage}`{place}; its resolved recipe is `stage.yaml`.",
            *(note, *table, ""),
        ]
    )


# -- stages that do not train -----------------------------------------------------------------------------------------


def apply(node: Node, *, world: World, say: Say) -> None:
    """Transform the starts' tensors into one model, and measure it."""
    if world.rank == 0:
        say({"doing": "transforming"})
        assert node.stage.apply is not None and node.folder is not None
        method = registry.make(node.stage.apply, place=f"stages.{node.name}.apply")
        starts = [start_of(node, start) for start in node.starts()]
        folders = [folder for folder, _ in starts if folder is not None]
        if len(folders) != len(starts) or not folders:
            raise UserError(f"stages.{node.name}.start: {method.name()} transforms weights; a config has none")
        made, place = node.folder / "made", f"stages.{node.name}"
        site: dict[str, Any] = {"place": place, "seed": node.seed, "stage": node.root}
        fitted = None
        if "fit" in method.hooks():
            fitted = fitting.fit(node, method, surgery.alike(method, folders, place=place), say=say)
            say({"doing": "transforming"})
        artifact.publish(made, lambda folder: surgery.transform(method, folders, folder, **site))
        base = opened(node, world=world, say=say, start={"folder": str(made)})
        Evaluated(node, base, say).run(beside=numbers_of(method.state), after=fitted)
        publish_model(node, base.engine.model, base.processor)
        shutil.rmtree(made)
        fitting.forget(node.folder)


def numbers_of(state: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers that a transformation left, those within dicts by their path; tensors stay behind."""
    found: dict[str, float] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= numbers_of(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{key}"] = value
    return found


class Evaluated:
    """Measures an opened model once and writes the numbers as its metrics, with those that its making left."""

    def __init__(self, node: Node, base: Opened, say: Say) -> None:
        self.node, self.base, self.say = node, base, say

    def run(self, *, beside: dict[str, float], after: fitting.Fitted | None = None) -> dict[str, Any]:
        from tutelage.core.measure import Evals

        spec, modality = self.node.stage.evals, self.node.graph.modality
        entries = modality.probes if spec.run is None else spec.run
        probes = [registry.make(entry, place=f"stages.{self.node.name}.evals.run") for entry in entries]
        self.say({"doing": "measuring"})
        found = Evals(spec, probes, []).run(self.base.view, final=True)
        found["values"] |= beside
        assert self.node.folder is not None
        path = self.node.folder / "metrics.jsonl"
        counts = after.counts if after else {"tick": 0, "step": 0, "tokens": 0, "flops": 0.0}
        before = path.read_bytes()[: after.bytes].decode() if after else ""
        write_whole(path, before + dumps({"kind": "eval", **counts, "final": True, **found}) + "\n")
        return found


def make(node: Node, *, world: World, say: Say) -> None:
    """Write rows of data with their provenance."""
    if world.rank:
        return
    assert node.stage.make is not None
    method = registry.make(node.stage.make, place=f"stages.{node.name}.make")
    if "retell" in method.hooks():
        _retold(node, method, say)
        return
    rows = _rewritten(node, method) if "rewrite" in method.hooks() else _made(node, method, world, say)
    _publish_rows(node, method, rows, say)


def _publish_rows(node: Node, method: Method, rows: Iterator[dict[str, Any]], say: Say) -> None:
    say({"doing": f"{method.name()} writes"})

    def write(folder: Path) -> None:
        counts = node.graph.modality.write_rows(rows, folder / "data")
        if not counts["rows"]:
            raise UserError(f"stages.{node.name}.make: {method.name()} wrote nothing")
        (folder / "counts.json").write_text(dumps({**counts, **method.state}), encoding="utf-8")
        about(node, folder)

    artifact.publish(node.artifact, write)


def _made(node: Node, method: Method, world: World, say: Say) -> Iterator[dict[str, Any]]:
    """Rows that a method writes with the start's model."""
    base = opened(node, world=world, say=say)
    sources = {name: base.corpora.of(name, spec).train for name, spec in node.stage.data.items()}
    return method.make(sources, base.view)


def _rewritten(node: Node, method: Method) -> Iterator[dict[str, Any]]:
    """Rows that a method makes of the stage's own, without their held-out part; no model is opened."""
    return method.rewrite(_documents(node, method))


def _retold(node: Node, method: Method, say: Say) -> None:
    """Publish rows that a method makes of the stage's own by asking a writer, whose answers outlive a cut."""
    assert node.folder is not None
    documents, ledger = _documents(node, method), writing.Ledger(node.folder / writing.LEDGER)
    try:
        spec = getattr(method, "endpoint", None)
        writer = writing.writer_of(node, spec, ledger, name=method.name(), say=say)
        with contextlib.closing(method.retell(documents, writer)) as rows:
            _publish_rows(node, method, rows, say)
    finally:
        ledger.close(done=node.artifact.exists())


def _documents(node: Node, method: Method) -> Iterable[Document]:
    if not node.stage.data:
        raise UserError(f"stages.{node.name}.make: {method.name()} rewrites rows; name them under `data`")
    if node.stage.engine.threads:
        torch.set_num_threads(node.stage.engine.threads)
    specs = {name: (spec, node.rows_of(spec)) for name, spec in node.stage.data.items()}
    return node.graph.modality.documents(specs, cache=node.graph.runs / ".data")


def measure(node: Node, *, world: World, say: Say) -> None:
    """Measure one or many finished models with the same probes and data; a table of numbers."""
    if world.rank:
        return
    names = node.stage.of or node.starts()
    table: dict[str, dict[str, float]] = {}
    for name in names:
        base = opened(node, world=world, say=say, start=name)
        probes = [registry.make(e, place=f"stages.{node.name}.measure") for e in node.stage.measure or []]
        base.view.passages = node.stage.evals.final
        table[str(name)] = {}
        for probe in probes:
            say({"doing": f"{probe.name()} on {name}"})
            base.view.reseed(f"measure|{probe.name()}")
            table[str(name)] |= probe.measure(base.engine.model, base.view)

    def write(folder: Path) -> None:
        (folder / "table").mkdir()
        (folder / "table" / "table.json").write_text(dumps(table), encoding="utf-8")
        keys = sorted({key for row in table.values() for key in row})
        lines = [",".join(["model", *keys])]
        lines += [",".join([name, *(str(row.get(key, "")) for key in keys)]) for name, row in table.items()]
        (folder / "table" / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        about(node, folder)

    artifact.publish(node.artifact, write)

"""`tutelage plan`: what `run` would do, told from shapes, samples and what is there. It writes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tutelage import sampling, sizing
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.base.rules import entered_by
from tutelage.base.spec import SourceSpec, Stage
from tutelage.base.values import late_names
from tutelage.core import artifact, rules
from tutelage.core.graph import Graph, Node, begun, methods_of
from tutelage.core.identity import difference
from tutelage.core.record import newest_line
from tutelage.core.settle import settle
from tutelage.core.stage import totals
from tutelage.sampling import Amount
from tutelage.sizing import Model


class Later(Exception):
    """Something that is only known once these stages are done."""

    def __init__(self, stages: list[str]) -> None:
        super().__init__(f"known when {' and '.join(stages)} {'is' if len(stages) == 1 else 'are'} done")
        self.stages = stages


def plan(graph: Graph) -> list[dict[str, Any]]:
    """What each stage makes, from what, and what that will take, in the order in which they run.

    Sizes are bytes, times seconds. A value that is not known is left out and `notes` says why.
    """
    seen: dict[str, Any] = {}
    pending: dict[str, list[str]] = {}
    done: set[str] = set()
    unmade: list[str] = []
    rows = []
    for node in graph.nodes.values():
        row: dict[str, Any] = {"stage": node.name, "product": node.stage.product, "does": _does(node), "notes": []}
        row["start"] = [_start_name(start) for start in node.starts()]
        doors = entered_by({name: other.stage for name, other in graph.nodes.items()}).get(node.name, [])
        row["on"] = [f"{rule}: enter {rule.enter}" for rule in node.stage.on]
        stands = rules.standing(node, done=done, unmade=unmade)
        if stands == "unmade":
            node.state = row["state"] = rules.UNMADE
            unmade.append(node.name)
            rows.append(row)
            continue
        row |= _standing(node, pending)
        if row["state"] in ("done", "reused"):
            done.add(node.name)
            taken = rules.entered(node.folder)
            row["entered"] = f"{taken['stage']} ({taken['why']})" if taken else ""
        row["only_if"] = [name for name in doors if name not in done]
        if row["state"] not in ("done", "reused"):
            try:
                _forecast(node, row, seen)
            except Later as later:
                row["notes"].append(f"sizes are {later}")
        rows.append(row)
    return rows


def _does(node: Node) -> str:
    stage = node.stage
    names = [entry if isinstance(entry, str) else entry["use"] for entry in stage.measure or []]
    for verb, entry in (("applies", stage.apply), ("writes with", stage.make)):
        if entry is not None:
            return f"{verb} {entry if isinstance(entry, str) else entry['use']}"
    return f"measures {', '.join(names)} of {', '.join(stage.of or [])}" if names else "trains a model"


def _start_name(start: Any) -> str:
    if isinstance(start, dict) and "best" in start:
        return f"the best of {', '.join(start['best'])} by {start.get('by', 'mean')}"
    if isinstance(start, dict):
        return start.get("stage") or start.get("folder") or f"a fresh {start.get('model_type', 'model')}"
    return str(start)


def _standing(node: Node, pending: dict[str, list[str]]) -> dict[str, Any]:
    """Whether a stage is there, begun, changed or new; `pending` collects those whose identity is not known yet."""
    graph, chosen = node.graph, [n for s in node.starts() if isinstance(s, dict) for n in s.get("best", [])]
    chosen = [name for name in chosen if graph.nodes[name].state != rules.UNMADE]
    late = [name for name, _ in late_names(node.stage)]
    unmade = [n for n in [*chosen, *late] if graph.nodes[n].state not in ("done", "reused")]
    waits = list(dict.fromkeys([*unmade, *(n for name in node.inputs for n in pending.get(name, []))]))
    if waits:
        pending[node.name] = waits
        node.state = "new"
        return {"state": "unknown", "waits": waits}
    settle(graph, node, drift="retrain")
    found: dict[str, Any] = {"state": node.state, "folder": str(node.folder), "fingerprint": node.fingerprint}
    assert node.folder is not None
    older = node.folder.parent / str(int(node.folder.name) - 1) / "stage.json"
    if node.state == "new" and older.exists() and begun(older.parent):
        old = json.loads(older.read_text(encoding="utf-8"))["parts"]
        found |= {"state": "changed", "difference": difference(old, node.parts)}
    if node.state == "partial":
        states = artifact.states(node.folder / "state")
        facts = (
            json.loads((states[-1] / "state.json").read_text(encoding="utf-8")) if states else {"clock": {"step": 0}}
        )
        found["done_steps"] = facts["clock"]["step"]
    if node.state in ("done", "reused"):
        found["values"] = newest_line(node.artifact / "metrics.jsonl", kind="eval").get("values", {})
    return found


# -- what it will take ------------------------------------------------------------------------------------------------


def _forecast(node: Node, row: dict[str, Any], seen: dict[str, Any]) -> None:
    """Add data, steps, operations, memory, disk and time to a row."""
    stage, cache = node.stage, node.graph.runs / ".data"
    if stage.product == "table" or _opens_none(node):  # no model is sized
        return
    _known(stage)
    processor, vocab = _processor(node, row["notes"], seen)
    amounts = {name: _amount(node, name, spec, processor, cache, row) for name, spec in stage.data.items()}
    row["data"] = {
        name: dataclasses.asdict(found) | {"from": _origin(stage.data[name])} for name, found in amounts.items()
    }
    model, methods = _model(node, processor, seen), methods_of(node.name, stage)
    row |= {"params": model.params, "trained": model.trained, "vocab": vocab, "length": stage.length}
    row["notes"] += [note for note in model.notes if stage.until is not None]
    if len(model.parts.stacks) > 1 and model.parts.kind != "seq2seq" and stage.until is not None:
        row["notes"].append("operations are those on tokens; blocks beside them (a vision tower) come on top")
    if stage.until is None:
        row["disk"] = {"artifact": 4.0 * model.params} if stage.product == "model" else {}
        row["disk"]["total"] = sum(row["disk"].values())
        aside = sizing.aside(node, model)
        if aside:
            rate, row["seconds_from"] = _rate(node, None, sizing.threads_of(node, model.params))
            _besides(row, aside, rate)
        row["notes"] += [f"while it fits, {size(one['held'])} of weights are held" for one in aside if "held" in one]
        return
    count = stage.batch.value / stage.length if stage.batch.unit == "tok" else stage.batch.value
    row["rows"] = max(1, round(count))
    key = f"memory|{_shape(node, model)}|{row['rows']}|{stage.save.model_dump_json()}|{stage.engine.model_dump_json()}"
    if key not in seen:
        seen[key] = (
            sizing.memory_of(node, model, methods, rows=row["rows"]),
            sizing.work_of(model, stage.length),
        )
    row["memory"], work = seen[key]
    each = work.mean(_lengths(stage, amounts)) * stage.length
    new = 0.0
    for name, found in amounts.items():  # what several stages read is tokenized once
        mark = f"data|{stage.data[name].model_dump_json(exclude={'weight'})}|{id(processor)}"
        new += 0.0 if found.stored or mark in seen else found.tokens or 0.0
        seen[mark] = True
    row["disk"] = sizing.disk_of(node, model, row["memory"], tokens=new, vocab=vocab)
    rate, row["seconds_from"] = _rate(node, each / stage.length, sizing.threads_of(node, model.params))
    _spans(node, row, amounts, each, rate)
    shape = {"length": stage.length, "rows": row["rows"], "steps": row.get("steps", 0), "sources": len(stage.data)}
    if row["state"] != "partial":
        _besides(row, sizing.besides(methods, model, **shape, each=each), rate)


def _lengths(stage: Stage, amounts: dict[str, Amount]) -> dict[int, float]:
    """Shares of what is trained on by length of row: the stage's own, or those that a curriculum cuts sources into."""
    found: dict[int, float] = {}
    for name, amount in amounts.items():
        weight = stage.data[name].weight
        for length, share in amount.lengths.items():
            found[length] = found.get(length, 0.0) + share * (1.0 if weight is None else weight)
    whole = sum(found.values())
    return {length: share / whole for length, share in found.items()} if whole else {stage.length: 1.0}


def _opens_none(node: Node) -> bool:
    """Whether a stage makes data without a model of its own: none is asked, or one behind an endpoint."""
    make = node.stage.make
    hooks = [] if make is None else registry.make(make, place=f"stages.{node.name}.make").hooks()
    return "rewrite" in hooks or ("retell" in hooks and not node.starts())


def _besides(row: dict[str, Any], found: list[dict[str, Any]], rate: float) -> None:
    """Lines of their own for work beside the steps; its time is told at the speed of training."""
    row["besides"] = [{**one, "seconds": one["flops"] / rate} for one in found if one["flops"]]


def _rate(node: Node, each: float | None, threads: int) -> tuple[float, str]:
    """Operations a second that a stage makes, and where that is from; `each` is what a position takes in training."""
    known = sizing.speed(node, each) if each is not None else None
    if known:
        return known[0], f"the speed of {known[1]}"
    peak = sizing.peak(sizing.device_of(node.stage).type, threads)
    return sizing.PEAK_SHARE * peak, f"a guess: {sizing.PEAK_SHARE:.0%} of the {number(peak)}FLOP/s measured here"


def _known(tree: Any) -> None:
    """Later, if anything in it is a value that another stage has yet to write."""
    waits = list(dict.fromkeys(name for name, _ in late_names(tree)))
    if waits:
        raise Later(waits)


def _shape(node: Node, model: Model) -> str:
    stage = node.stage
    entries = [repr(method) for method in methods_of(node.name, stage).all()]
    return f"{model.module.config}|{stage.length}|{stage.train}|{stage.precision}|{model.trained}|{entries}"


def _spans(node: Node, row: dict[str, Any], amounts: dict[str, Amount], each: float, rate: float) -> None:
    """Steps, tokens, epochs, operations and seconds: from the end of the stage in whatever unit it is written."""
    stage = node.stage
    assert stage.until is not None
    per_step = each * row["rows"]
    unknown = [name for name, found in amounts.items() if found.tokens is None]
    sources = {name: SimpleNamespace(facts={"tokens": found.tokens or 0.0}) for name, found in amounts.items()}
    run: Any = SimpleNamespace(rows=row["rows"], node=node, sources=sources, shares={})
    unit = stage.until.unit
    if unit in ("epoch", "%") and unknown:
        row["notes"].append(f"steps: known when the length of {' and '.join(unknown)} is")
        return
    total = {} if unit in ("min", "flop") else totals(run, stage.until)
    steps = {"min": stage.until.value * 60 * rate / per_step, "flop": stage.until.value / per_step}.get(unit)
    row["steps"] = math.ceil((total["step"] if steps is None else steps) - 1e-9)
    row["tokens"] = row["steps"] * row["rows"] * stage.length
    if any(found.tokens for found in amounts.values()) and not unknown:
        row["epochs"] = row["tokens"] / max(found.tokens or 0 for found in amounts.values())
    row["flops"] = row["steps"] * per_step
    row["seconds"] = (row["steps"] - row.get("done_steps", 0)) * per_step / rate


def _origin(spec: SourceSpec) -> str:
    path = spec.path if isinstance(spec.path, str) or spec.path is None else ", ".join(spec.path)
    return path or spec.hub or spec.use or f"stage {spec.stage}"


def _awaited(node: Node, specs: Iterable[SourceSpec]) -> list[str]:
    """The stages that have yet to make rows of these sources."""
    parents = [node.graph.nodes[spec.stage] for spec in specs if spec.stage]
    return [parent.name for parent in parents if parent.state not in ("done", "reused")]


def _amount(node: Node, name: str, spec: SourceSpec, processor: Any, cache: Path, row: dict[str, Any]) -> Amount:
    """What a source holds, as far as it can be told without reading all of it."""
    if late := _awaited(node, [spec]):
        return Amount(None, None, str(Later(late)))
    more = getattr(node.graph.modality, "extra_tokens", lambda processor: 0)(processor)  # a picture's patches, say
    words = getattr(processor, "tokenizer", processor)
    how: dict[str, Any] = {"processor": words, "cache": cache, "rows": node.rows_of(spec), "length": node.stage.length}
    curriculum = methods_of(node.name, node.stage).slots["curriculum"]
    if curriculum is not None and "cut" in curriculum.hooks() and node.stage.until is not None:
        how["cut"] = curriculum.cut
    try:
        found = sampling.amount(name, spec, **how)
        known = found.tokens is not None and more
        return dataclasses.replace(found, tokens=(found.tokens or 0) + more * found.records) if known else found
    except (UserError, OSError, KeyError, ValueError, TypeError) as error:
        row["notes"].append(f"data.{name}: {error}")
        return Amount(None, None, "not known before it is read")


def _config(node: Node) -> dict[str, Any]:
    """The config that a stage's model will have; training and merging leave it as it is."""
    graph, start = node.graph, node.starts()[0] if node.starts() else None
    if start is None:
        raise Later([node.name])
    _known(start)
    if isinstance(start, dict) and "best" in start:
        start = start["best"][0]  # arms of one stage, of one shape
    name = graph.stage_name(start)
    if name:
        parent = graph.nodes[name]
        if parent.state in ("done", "reused"):
            return graph.modality.start_files(str(parent.artifact / "model"))[1]
        if parent.stage.apply is not None and "tensor" not in _applied(parent):
            raise Later([name])
        return _config(parent)
    if isinstance(start, dict) and "folder" not in start:
        return start
    return graph.modality.start_files(start["folder"] if isinstance(start, dict) else start)[1]


def _fresh(node: Node) -> bool:
    """Whether a stage starts from random weights."""
    (start, *_), graph = node.starts(), node.graph
    if graph.stage_name(start) or isinstance(start, dict):
        return isinstance(start, dict) and not {"stage", "folder", "best"} & set(start)
    return graph.modality.start_files(start)[0] is None


def _applied(node: Node) -> list[str]:
    return registry.make(node.stage.apply or "", place=f"stages.{node.name}.apply").hooks()


def _processor(node: Node, notes: list[str], seen: dict[str, Any]) -> tuple[Any, int]:
    """The tokenizer that a stage will have and the size of its vocabulary; the first ancestor's that says one."""
    graph, cache = node.graph, node.graph.runs / ".data"
    start = node.starts()[0] if node.starts() else None
    if isinstance(start, dict) and "best" in start:
        start = start["best"][0]
    name, folder = graph.stage_name(start), None
    if node.stage.tokenizer is None and name:
        parent = graph.nodes[name]
        if parent.state not in ("done", "reused"):
            return _processor(parent, [], seen)
        folder = parent.artifact / "model"
    elif node.stage.tokenizer is None and isinstance(start, str):
        folder = graph.modality.start_files(start)[0]
    wanted = node.stage.tokenizer
    _known(wanted)
    if isinstance(wanted, dict) and "train" in wanted and (late := _awaited(node, node.stage.data.values())):
        raise Later(late)
    key = f"processor|{folder}|{json.dumps(wanted, default=str)}|{node.name if wanted else ''}"
    if key not in seen:
        if graph.modality.name == "text" and isinstance(wanted, dict) and wanted.get("train") == "bpe":
            specs = [(n, spec, node.rows_of(spec)) for n, spec in node.stage.data.items()]
            asks = graph.modality.asks(_config(node))  # type: ignore[attr-defined]
            found, there = sampling.tokenizer_for(wanted, specs, asks=asks, cache=cache)
            note = "" if there else "tokens are counted with a tokenizer trained on the sample alone"
        else:
            with tempfile.TemporaryDirectory() as beside:
                texts = [(spec, node.rows_of(spec)) for spec in node.stage.data.values()]
                config = _config(node) if wanted is not None else None
                found = graph.modality.processor(
                    wanted, folder=folder, config=config, texts=lambda: texts, cache=Path(beside)
                )
            note = ""
        seen[key] = found, note
    found, note = seen[key]
    notes += [note] if note else []
    return found, len(getattr(found, "tokenizer", found))


def _model(node: Node, processor: Any, seen: dict[str, Any]) -> Model:
    config, stage, fresh = _config(node), node.stage, _fresh(node)
    listed = [repr(method) for method in methods_of(node.name, stage).all()]
    key = f"model|{json.dumps(config, default=str)}|{fresh}|{stage.length}|{stage.train}|{listed}"
    if key not in seen:
        methods = methods_of(node.name, stage)
        seen[key] = sizing.model_of(node, config, processor=processor, methods=methods, fresh=fresh)
    found: Model = seen[key]
    return found


def size(value: float) -> str:
    """`1.2 GB`."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def number(value: float) -> str:
    """`1.05 M`, ready for a unit to follow."""
    for scale, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {letter}" + ("" if letter in "PTG" else " ")
    return f"{value:.0f} "

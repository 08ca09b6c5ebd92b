"""`tutelage show`: what a stage is, its digest, and which documents any of its steps saw."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tutelage import modalities, watching
from tutelage.asking import alerted
from tutelage.base import load
from tutelage.base.errors import UserError, did_you_mean
from tutelage.core import artifact, elsewhere
from tutelage.core.graph import Node, methods_of
from tutelage.core.parts import Parts, narrow, picked_at
from tutelage.core.prefix import prefixed
from tutelage.core.record import Journal, each_line, newest_line, read_lines
from tutelage.core.stage import Corpora, processor_of, start_of
from tutelage.core.stream import Stream
from tutelage.core.words import amount


def folder_of(target: str, *, runs: Path) -> Path:
    """The newest folder of `RUN/STAGE` (or a stage's folder itself)."""
    given = Path(target)
    if (given / "stage.json").exists():
        return given
    run, _, stage = target.partition("/")
    known = sorted(p.name for p in runs.iterdir() if p.is_dir() and not p.name.startswith(".")) if runs.is_dir() else []
    if run not in known:
        raise UserError(f"no run '{run}' in {runs}{did_you_mean(run, known)} (there are: {', '.join(known) or 'none'})")
    stages = sorted(p.name for p in (runs / run).iterdir() if p.is_dir())
    if stage not in stages:
        raise UserError(
            f"run {run} has no stage '{stage}'{did_you_mean(stage, stages)} (there are: {', '.join(stages)})"
        )
    made = sorted(
        (p for p in (runs / run / stage).glob("[0-9]*") if (p / "stage.json").exists()), key=lambda p: int(p.name)
    )
    if not made:
        raise UserError(f"stage {target} has not begun")
    return made[-1]


def node_of(folder: Path) -> Node:
    """The node of a stage's folder, from the recipe saved beside the run."""
    recipe = folder.parent.parent / "recipe.yaml"
    modality = load.load(recipe).modality if recipe.exists() else "text"
    return elsewhere.node_of(folder, modality=modalities.find(modality))


def show(target: str, *, runs: Path, digest: bool, tick: int | None, console: Console) -> None:
    """Print what was asked of a stage."""
    folder = folder_of(target, runs=runs)
    if digest:
        console.print(digest_of(folder), soft_wrap=True)
    elif tick is not None:
        for line in batch_of(folder, tick):
            console.print(line, soft_wrap=True, markup=False)
    else:
        overview(folder, console)


def digest_of(folder: Path) -> str:
    """SHA-256 of the weights of the artifact, or of the newest checkpoint of an unfinished stage."""
    model = folder / "artifact" / "model"
    if model.is_dir():
        return artifact.digest_folder(model)
    states = artifact.states(folder / "state")
    if not states:
        raise UserError(f"{folder} holds no weights yet")
    return artifact.digest(artifact.load_state(states[-1])[0]["model"].items())


def overview(folder: Path, console: Console) -> None:
    about: dict[str, Any] = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    last, measured = (newest_line(folder / "metrics.jsonl", kind=kind) for kind in ("train", "eval"))
    console.print(f"{folder}  {'done' if (folder / 'artifact').exists() else 'unfinished'}  {about['fingerprint']}")
    if last:
        console.print(
            f"step {last['step']}  {last['tokens']:,} tokens  {last['flops']:.3g} FLOPs  loss {last['loss']:.4f}"
        )
        if "memory_peak" in last:
            console.print(f"memory: {amount(last['memory'])}B in use, {amount(last['memory_peak'])}B at most")
    for one in watching.controls(folder)["alerts"]:
        console.print(alerted(one).strip(), soft_wrap=True, markup=False)
    for name, value in measured.get("values", {}).items():
        console.print(f"  {name}  {value:.4f}" if isinstance(value, float) else f"  {name}  {value}")
    for line in read_lines(folder / "journal.jsonl"):
        console.print(
            f"tick {line['tick']}  {line['by']}: {json.dumps(line['do'])} {line.get('why', '')}",
            soft_wrap=True,
            markup=False,
        )


def batch_of(folder: Path, tick: int) -> list[str]:
    """The rows that the step ending at `tick` saw, named: its draw is repeated from the cursors that it logged."""
    place = folder / "metrics.jsonl"
    row = next((row for row in each_line(place, kind="train") if row["tick"] == tick), None)
    if row is None:
        raise UserError(f"{folder} has no tick {tick} (it has 1 to {newest_line(place, kind='train').get('tick', 0)})")
    if "cursors" not in row:
        raise UserError(f"{folder} draws nothing: each step of its fit reads the first rows of its sources, in turn")
    node = node_of(folder)
    start, config = start_of(node)
    processor = processor_of(node, start, config, say=lambda said: None)
    methods, sources = methods_of(node.name, node.stage), {}
    corpora = Corpora(node, processor, lambda said: None)
    wrap = partial(prefixed, node=node, methods=methods, processor=processor)
    for name in row["cursors"]:
        of, _, inner = name.rpartition("/")
        specs = node.find_data(of) if of else node.stage.data
        if inner in specs:
            sources[name] = wrap(name, corpora.of(inner, specs[inner]).train)
    cut = Parts.of(methods.slots["curriculum"], decode=partial(processor.decode, skip_special_tokens=True))
    for name in [name for name in node.stage.data if name not in row["cursors"]]:
        sources |= cut.add(wrap(name, corpora.of(name, node.stage.data[name]).train))
    method = methods.slots["packing"]
    note = Journal(folder / "journal.jsonl").engine("packing")
    packing: Any = method.pack if method else note["rule"] if note else node.stage.packing
    stream = Stream(cut.orders(sources, seed=node.seed, packing=packing))
    if "picked" in row:
        narrow(stream, sources, picked_at(folder, row["picked"]), seed=node.seed, packing=packing)
    state = stream.state()
    for name, cursor in row["cursors"].items():
        state["sources"][name] |= {"cursor": cursor, "owed": row["owed"][name]}
    stream.load(state)
    cut.recall(row)
    lines = []
    for i, drawn in enumerate(stream.draw(cut.weights(row["weights"], row["length"]), row["length"], row["rows"])):
        for piece in node.graph.modality.describe(drawn, sources, processor=processor):
            lines.append(
                f"row {i}: "
                + "  ".join(f"{k}={v!r}" if k in ("text", "prefix") else f"{k}={v}" for k, v in piece.items())
            )
    return lines

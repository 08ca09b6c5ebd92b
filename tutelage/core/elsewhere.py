"""Stages of other runs, and saved steps, as folders to start from: `demo/base`, `demo/base@500`, `base@500`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tutelage.base import load
from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.spec import Stage
from tutelage.core import artifact, checkpoint, execute, shape
from tutelage.core.graph import STEPS, Graph, Node, methods_of, stage_behind
from tutelage.core.modality import Modality
from tutelage.core.shard import World
from tutelage.core.stage import opened, processor_of, start_of

_REFERENCE = re.compile(r"([^/@]+)/([^/@]+)(?:@([0-9]+))?")


def newest(home: Path) -> Path | None:
    """The last version of a stage, of `runs/<run>/<stage>/<n>`."""
    made = sorted((p for p in home.glob("[0-9]*") if (p / "stage.json").exists()), key=lambda p: int(p.name))
    return made[-1] if made else None


def folder_for(start: Any, *, runs: Path, modality: Modality) -> str | None:
    """The model folder that `RUN/STAGE` or `RUN/STAGE@STEP` stands for; None when it is no such name.

    A folder of that name here comes first; a name that no run has may be the hub's.
    """
    found = _REFERENCE.fullmatch(start) if isinstance(start, str) else None
    if not found or Path(start).exists():
        return None
    run, stage, step = found.groups()
    folder = newest(runs / run / stage)
    if folder is None:
        if step is not None:
            known = sorted("/".join(p.parent.parts[-3:-1]) for p in runs.glob("*/*/*/stage.json"))
            raise UserError(f"start: {runs} has no stage {run}/{stage}{did_you_mean(f'{run}/{stage}', known)}")
        return None
    if step is not None:
        return str(at_step(node_of(folder, modality=modality), int(step)))
    if not (folder / "artifact" / "model").is_dir():
        raise UserError(f"start: stage {run}/{stage} has made no model yet; finish it, or name one of its saved steps")
    return str(folder / "artifact" / "model")


def node_of(folder: Path, *, modality: Modality) -> Node:
    """The node of a stage's folder, from the recipe saved beside the run."""
    run = folder.parent.parent
    recipe = run / "recipe.yaml"
    if not recipe.exists():
        raise UserError(f"{recipe} is missing: the run's recipe is needed to rebuild its stages")
    graph = Graph.resolve(load.load(recipe), name=run.name, modality=modality, runs=run.parent)
    if folder.parent.name not in graph.nodes:
        raise UserError(f"{recipe} has no stage '{folder.parent.name}'; it was changed since")
    for node in graph.nodes.values():
        home = run / node.name
        node.folder = folder if folder.parent == home else newest(home)
        made = json.loads((node.folder / "stage.json").read_text(encoding="utf-8")) if node.folder else {}
        if made.get("stage"):  # as it was run: values of other stages and chosen starts are in it
            node.stage = Stage.model_validate(made["stage"])
    return graph.nodes[folder.parent.name]


def saved_steps(folder: Path) -> list[int]:
    """The ticks of a stage's checkpoints, oldest first."""
    return [int(path.name) for path in artifact.states(folder / "state")]


def at_step(node: Node, step: int) -> Path:
    """A saved step as a model folder, tokenizer included; made when first asked for, and kept with its checkpoint."""
    assert node.folder is not None
    place, state = node.folder / STEPS / f"{step:09d}", node.folder / "state" / f"{step:09d}"
    if (place / "config.json").exists():
        return place
    if not (state / "state.json").exists():
        have = ", ".join(map(str, saved_steps(node.folder))) or "none"
        raise UserError(f"stage {node.name} in {node.folder} has no checkpoint of step {step} (it has: {have})")
    (state / "kept").touch()
    model, processor, adapters = _restored(node, state)

    def write(folder: Path) -> None:
        node.graph.modality.save_model(model, folder)
        node.graph.modality.save_processor(processor, folder)
        for config, tensors in adapters:
            (folder / "adapter").mkdir()
            artifact.save_tensors(folder / "adapter" / "adapter_model.safetensors", tensors)
            (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    artifact.publish(place, write)
    return place


def model_at(node: Node, step: int | None) -> tuple[Any, Any]:
    """Model and processor of a finished stage (None) or of a saved step, in memory: nothing is written."""
    assert node.folder is not None
    place = node.artifact / "model" if step is None else node.folder / STEPS / f"{step:09d}"
    if (place / "config.json").exists():
        folder, config = node.graph.modality.start_files(str(place))
        processor = processor_of(node, folder, config, say=lambda said: None)
        return node.graph.modality.model(folder, config, processor=processor, length=node.stage.length), processor
    state = node.folder / "state" / f"{step or 0:09d}"
    if step is None or not (state / "state.json").exists():
        have = ", ".join(map(str, saved_steps(node.folder))) or "none"
        what = "is not finished" if step is None else f"has no checkpoint of step {step}"
        raise UserError(f"stage {node.name} in {node.folder} {what} (it has: {have})")
    return _restored(node, state)[:2]


def _restored(node: Node, state: Path) -> tuple[Any, Any, list[Any]]:
    saved = artifact.load_state(state)
    shaped = methods_of(node.name, node.stage).having("wrap") or node.stage.engine.quantize
    return _rebuilt(node, saved) if shaped else _plain(node, saved)


def _plain(node: Node, saved: Any) -> tuple[Any, Any, list[Any]]:
    """The start's model with the checkpoint's weights."""
    modality, stage = node.graph.modality, node.stage
    done = node.artifact / "model"
    folder, config = modality.start_files(str(done)) if done.is_dir() else start_of(node)
    processor = processor_of(node, folder, config, say=lambda said: None)
    model = modality.model(folder, config, processor=processor, length=stage.length)
    own, tensors = artifact.tensors_of(model), saved[0]["model"]
    odd = sorted(set(own) ^ set(tensors))
    if odd:
        raise UserError(f"the checkpoint in {node.folder} does not fit its model: {odd[0]}")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return model, processor, []


def _rebuilt(node: Node, saved: Any) -> tuple[Any, Any, list[Any]]:
    """The model as its stage wrapped (and quantized) it, with the checkpoint's weights, and then folded."""
    base = opened(node, world=World(), say=lambda said: None)
    run: Any = SimpleNamespace(
        node=node, engine=base.engine, view=base.view, methods=base.methods, folder=node.folder, wrapped={}, extra={}
    )
    shape.begin(run, saved)
    shape.wrap(run)
    checkpoint.load_weights(run, saved[0]["model"], saved[0].get("extra", {}))
    adapters = execute.fold(run)
    return base.engine.model, base.processor, adapters


def state_behind(node: Node) -> Path | None:
    """The checkpoint that goes with a stage's start: of the step that it names, else the newest; None without one."""
    start = node.starts()[0]
    name = node.graph.stage_name(start)
    if name:
        parent, step = node.graph.nodes[name].folder, str(start).partition("@")[2]
    else:
        other = stage_behind(Path(start)) if isinstance(start, str) else None
        parent, step = (other[0], "".join(other[1:])) if other else (None, "")
    if parent is None:
        return None
    if step:
        place = parent / "state" / f"{int(step):09d}"
        return place if (place / "state.json").exists() else None
    states = artifact.states(parent / "state")
    return states[-1] if states else None

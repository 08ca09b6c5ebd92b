"""What a training stage will take: operations, memory by part, disk and time, from shapes and earlier runs."""

from __future__ import annotations

import functools
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tutelage.base import registry
from tutelage.base.spec import Stage
from tutelage.core import flops, memory, micro, quantized, shape
from tutelage.core.anatomy import Anatomy, anatomy
from tutelage.core.device import autocast_of
from tutelage.core.graph import Methods, Node
from tutelage.core.out import CHUNK
from tutelage.core.record import each_line
from tutelage.core.run import SMALL

PEAK_SHARE = 0.3  # of the measured peak, what training gets where nothing better is known
ALIKE = 0.1  # operations a position may differ by between stages of one shape


@dataclass
class Model:
    """A model without contents, as a stage trains it."""

    module: nn.Module
    parts: Anatomy
    params: int
    trained: int
    notes: list[str] = field(default_factory=list)


def device_of(stage: Stage) -> torch.device:
    """The device a stage will run on; unlike at its start nothing is set."""
    return torch.device(stage.engine.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def model_of(node: Node, config: dict[str, Any], *, processor: Any, methods: Methods, fresh: bool = False) -> Model:
    """The start's model on the meta device, wrapped and frozen as the stage says; `fresh` if its weights are random."""
    with torch.device("meta"):
        model = node.graph.modality.model(None, config, processor=processor, length=node.stage.length)
    notes = [f"{where}'s own state is not counted" for where in _with_state(methods)]
    params = sum(p.numel() for p in model.parameters())
    patterns = node.stage.train
    for method in methods.having("wrap"):
        try:
            wrap(model, method, fresh=fresh)
        except Exception as error:  # a wrap may look at more of a run than there is here
            notes.append(f"{method.name()} is not counted: it wraps only real weights ({type(error).__name__})")
    parts = anatomy(model)
    if patterns is not None:
        chosen = set(parts.match(patterns))
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen)
    for method in methods.having("freeze"):
        shape.frozen(model, method, stand_in(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Model(model, parts, params, trained, notes)


def _with_state(methods: Methods) -> list[str]:
    """Methods that hold tensors of the model's size or run more passes, as far as their hooks tell."""
    telling = ("begin", "penalty", "auxiliary", "grads", "modules", "weigh")
    return [m.name() for m in methods.all() if any(hook in telling for hook in m.hooks()) and not m.refs]


def stand_in(model: nn.Module, *, fresh: bool = False) -> Any:
    """The part of a view that hooks need which say what is trained."""
    engine = SimpleNamespace(anatomy=anatomy(model), model=model)
    return SimpleNamespace(engine=engine, rng=lambda purpose: torch.Generator(), fresh=fresh)


def wrap(model: nn.Module, method: Any, *, fresh: bool) -> None:
    """Wrap layers as at a stage's start."""
    view = stand_in(model, fresh=fresh)
    wrappers = {}
    for name in view.engine.anatomy.linears:
        wrapper = method.wrap(model.get_submodule(name), name, view)
        if wrapper is not None:
            wrappers[name] = wrapper
    for name, wrapper in wrappers.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, wrapper)
    shape.trained_of(model, [(wrapper, method) for wrapper in wrappers.values()])


# -- operations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Operations of training rows: so many a position, and so many a pair of positions of one row."""

    position: float
    pair: float

    def row(self, length: int) -> float:
        return self.position * length + self.pair * length**2

    def mean(self, lengths: Mapping[int, float]) -> float:
        """Operations a position where rows have these lengths, in these shares of all positions."""
        return sum(share * self.row(length) / length for length, share in lengths.items())


def work_of(model: Model, length: int) -> Work:
    """Forward traced on tensors without contents, on rows of about this length; backward by what is trained.

    A product's backward is two of its size, one for inputs and one for weights; attention's computes its scores again.
    """
    whole, half = _forward(model, length), _forward(model, length // 2)
    square = max(0.0, (whole - 2 * half) / (length**2 - 2 * (length // 2) ** 2))
    linear = whole / length - square * length
    parts, module = model.parts, model.module
    body = [module.get_submodule(name).weight for name in parts.linears] + [
        module.get_parameter(name) for name in parts.experts
    ]
    learned = [p for p in body if p.requires_grad]
    share = sum(p.numel() for p in learned) / max(1, sum(p.numel() for p in body))
    head = parts.head_module
    matrix = getattr(head, "weight", None)
    through = any(p.requires_grad and p is not matrix for p in module.parameters())
    position = linear * (1 + through + share)
    if matrix is not None:
        position += 2 * matrix.numel() * (1 + through + matrix.requires_grad)
    return Work(position, square * (1 + 2.5 * through))


def pass_per_row(model: Model, length: int) -> float:
    """Operations of one row without gradients, the output matrix included: what a frozen model's answer takes."""
    matrix = getattr(model.parts.head_module, "weight", None)
    return _forward(model, length) + (2 * matrix.numel() * length if matrix is not None else 0)


def besides(
    methods: Methods, model: Model, *, length: int, rows: int, steps: int, sources: int, each: float
) -> list[dict[str, Any]]:
    """What methods compute beside the steps' own passes: `what` and `flops`, as far as settings and hooks tell.

    A method with `begin` and a setting `rows` takes the gradient of so many rows; one that wraps layers, with `begin` and a
    setting `passages`, sends so many through the model, once at least; one that reads a frozen model has its answer for
    every row of every step; one with a setting `pilot` makes so many steps on every source, unless it has a `graph`
    already.
    """
    found = []
    for method in methods.all():
        count = getattr(method, "rows", None)
        if "begin" in method.hooks() and isinstance(count, int):
            found.append({"what": f"{method.name()} begins with {count:,} rows", "flops": count * each})
        looked = getattr(method, "passages", None)
        if {"begin", "wrap"} <= set(method.hooks()) and isinstance(looked, int):
            what = f"{method.name()} begins with {looked:,} rows without gradients, again until it is content"
            found.append({"what": what, "flops": looked * pass_per_row(model, length)})
        pilot = getattr(method, "pilot", None)
        if isinstance(pilot, int) and getattr(method, "graph", None) is None:
            what = f"{method.name()} tries {pilot:,} steps on each of {sources} sources"
            found.append({"what": what, "flops": pilot * sources * rows * each})
        if method.refs:
            flops = len(method.refs) * steps * rows * pass_per_row(model, length)
            found.append({"what": f"{method.name()} asks a frozen model at every step", "flops": flops})
    return found


def aside(node: Node, model: Model) -> list[dict[str, Any]]:
    """What a stage without steps of training computes: `what` and `flops`; of a fit `held`, bytes of weights, too."""
    stage, place = node.stage, f"stages.{node.name}"
    if stage.make is not None:
        return written(registry.make(stage.make, place=f"{place}.make"), model)
    if stage.apply is None:
        return []
    method, count = registry.make(stage.apply, place=f"{place}.apply"), len(node.starts())
    return fitted(method, model, length=stage.length, starts=count, sources=len(stage.data))


def written(method: Any, model: Model) -> list[dict[str, Any]]:
    """What writing passages takes: each token once through the model, at the length that it has by then."""
    passages, length = getattr(method, "passages", None), getattr(method, "length", None)
    if not (isinstance(passages, int) and isinstance(length, int)):
        return []
    what = f"{method.name()} writes {passages:,} passages of {length} tokens, one token after another"
    return [{"what": what, "flops": passages * pass_per_row(model, length)}]


def fitted(method: Any, model: Model, *, length: int, starts: int, sources: int) -> list[dict[str, Any]]:
    """What a merge's fit takes: each of its `steps` learns from `rows` rows of every source that it reads (`inputs`, else
    all), and where it reads the answers of the starts, one of these answers each row too."""
    steps, rows = getattr(method, "steps", None), getattr(method, "rows", None)
    if "fit" not in method.hooks() or not (isinstance(steps, int) and isinstance(rows, int)):
        return []
    count = steps * rows * len(getattr(method, "inputs", None) or range(sources))
    each = work_of(model, length).row(length) + ("starts" in method.refs) * pass_per_row(model, length)
    held = 4 * model.params * (starts + 1) + 4 * model.params * ("starts" in method.refs)
    what = f"{method.name()} fits in {steps:,} steps, {count:,} rows in all"
    return [{"what": what, "flops": count * each, "held": held}]


def _forward(model: Model, length: int) -> float:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), torch.no_grad():
        twin = memory._twin(model.module, torch.float32, torch.device("cpu"))
        parts = anatomy(twin)
        tokens = torch.zeros(1, length, dtype=torch.long)
        inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if parts.kind == "seq2seq" else {})
        body = parts.root if parts.kind == "seq2seq" else parts.backbone
        cache = {"use_cache": False} if getattr(parts.root.config, "use_cache", None) is not None else {}
        with FlopCounterMode(display=False, custom_mapping=flops._missed()) as counter:
            body(**inputs, **cache)
        return float(counter.get_total_flops())


# -- memory -----------------------------------------------------------------------------------------------------------


def states_per_param(methods: Methods, model: Model) -> float:
    """Numbers that the optimizer keeps for each trained one, seen by a step on parameters of every role and shape."""
    method = methods.slots["optim"]
    counts: Counter[tuple[str, torch.Size]] = Counter()
    for name, p in model.module.named_parameters():
        if p.requires_grad:
            counts[model.parts.role(name) if name in model.parts.roles else "matrix", p.shape] += 1
    try:
        held = {(role, shape): _states(method, role, shape) for role, shape in counts}
    except Exception:  # it looks at contents, and there are none: Adam's two numbers stand in
        return 2.0
    whole = sum(shape.numel() * count for (_, shape), count in counts.items())
    return sum(held[key] * count for key, count in counts.items()) / max(1, whole)


def _states(method: Any, role: str, shape: torch.Size) -> int:
    """Numbers kept for one parameter, from a step on tensors without contents."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        p = nn.Parameter(torch.zeros(shape))
        group = {"role": role, "rate": 1.0, "decay": None, "names": ["p"], "params": [p]}
        optimizer = method.build([group])
        p.grad = torch.ones(shape)
        optimizer.step()
        held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        return sum(v.numel() for v in held if v.ndim)


def weights_of(node: Node, model: Model) -> int:
    """Bytes of the weights while the stage trains, its checkpoints' too."""
    quantize = node.stage.engine.quantize is not None
    held = sum(p.numel() for p in model.module.parameters())  # with what wrappers add, without what they let go of
    return 4 * held - (quantized.saved(model.module, model.parts, item=4) if quantize else 0)


def memory_of(node: Node, model: Model, methods: Methods, *, rows: int) -> dict[str, Any]:
    """Bytes by part for the micro-batch that will be found, what there is, and what to lower if it is too little."""
    stage, device = node.stage, device_of(node.stage)
    free = memory.available(device) if device.type == "cpu" or torch.cuda.is_available() else None
    states = states_per_param(methods, model)
    frozen = sum(len(m.refs) for m in methods.all()) * model.params * 4
    autocast = autocast_of(stage.precision, device)
    fused = stage.engine.fused_backward
    gradients = max((p.numel() for p in model.module.parameters() if p.requires_grad), default=0)
    fixed = (
        weights_of(node, model) + frozen,
        int(4 * ((gradients if fused else model.trained) + model.trained * states)),
    )  # there before micro-batches are, and after

    def total(count: int, length: int, checkpointing: bool) -> dict[str, int]:
        found = memory.estimate(
            model.module,
            batch_rows=count,
            length=length,
            optimizer_states_per_param=states,
            autocast=autocast,
            checkpointing=checkpointing,
            chunk=CHUNK["cpu" if device.type == "cpu" else "cuda"],
            quantize=stage.engine.quantize is not None,
            fused=fused,
        )
        return {**found, "frozen": frozen, "total": found["total"] + frozen}

    count = min(stage.engine.micro or rows, rows)
    if stage.engine.micro is None and free is not None and not fused:
        room = (micro.SHARE if device.type == "cpu" else 1.0) * (free - sum(fixed))
        options: dict[str, Any] = {"autocast": autocast, "checkpointing": stage.engine.checkpointing}
        count = micro.fit(model.module, rows=rows, length=stage.length, room=room, parts=model.parts, **options)
    now = (count, stage.length, stage.engine.checkpointing)
    about = {"micro": count, "available": free, "device": device.type, "quantize": stage.engine.quantize}
    result: dict[str, Any] = {**total(*now), **about, "lower": {}}
    if free is not None and result["total"] > free:
        smaller: dict[str, tuple[str, int]] = {}
        if count > 1:
            less = total(count // 2, *now[1:])["total"]
            smaller |= {"batch": (f"{count // 2}sample", less)} if count == rows else {}
            smaller |= {} if fused else {"engine.micro": (str(count // 2), less)}
        if stage.length >= 16:
            smaller["length"] = (str(stage.length // 2), total(count, stage.length // 2, now[2])["total"])
        if not stage.engine.checkpointing:
            smaller["engine.checkpointing"] = ("true", total(*now[:2], True)["total"])
        if not methods.having("wrap") and model.trained > model.params // 10:
            smaller["methods"] = ("[param/lora]", int(1.02 * (result["total"] - fixed[1])))
        if methods.having("wrap") and stage.engine.quantize is None:
            smaller["engine.quantize"] = ("nf4", result["total"] - quantized.saved(model.module, model.parts, item=4))
        result["lower"] = {key: found for key, found in smaller.items() if found[1] < 0.97 * result["total"]}
    return result


# -- disk -------------------------------------------------------------------------------------------------------------


def disk_of(node: Node, model: Model, memory: dict[str, Any], *, tokens: float, vocab: int) -> dict[str, float]:
    """Bytes that will stay: checkpoints as many as are kept, the artifact, and data tokenized for it."""
    state = weights_of(node, model) + memory["optimizer"]  # frozen weights are in a checkpoint too
    found = {
        "checkpoints": node.stage.save.keep * state,
        "artifact": 4.0 * model.params,
        "data": tokens * (2 if vocab < 1 << 16 else 4),
    }
    return found | {"total": sum(found.values()), "free": float(shutil.disk_usage(_existing(node.graph.runs)).free)}


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


# -- time -------------------------------------------------------------------------------------------------------------


def threads_of(node: Node, params: int) -> int:
    """As `core/run.py` will give it."""
    return node.stage.engine.threads or (1 if params <= SMALL else len(os.sched_getaffinity(0)))


@functools.cache
def peak(device: str, threads: int) -> float:
    """FLOP/s of this machine, measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return flops.measured_peak(device, torch.bfloat16 if device == "cuda" else torch.float32)
    finally:
        torch.set_num_threads(before)


def speed(node: Node, each: float) -> tuple[float, Path] | None:
    """Operations a second that an earlier stage of this shape made, and where: same row length, precision, device and
    threads, and operations a position (`each`) within a tenth."""
    for folder in _earlier(node):
        rows = each_line(folder / "metrics.jsonl", kind="train")
        row = first = next(rows, {})
        places, rates = 0, array("d")
        for row in rows:
            places += row["rows"] * row["length"]
            rates.append(row["tokens_per_second"] / max(1e-9, 1 - row["padding"]))
        if len(rates) < 2 or not places:
            continue
        if abs((row["flops"] - first["flops"]) / places - each) < ALIKE * each:
            return median(rates) * each, folder
    return None


def _earlier(node: Node) -> Iterator[Path]:
    """Folders of stages that ran with the same settings of what makes a step fast, the newest first."""
    wanted = _setting(node.stage.model_dump(mode="json"))
    found = sorted(node.graph.runs.glob("*/*/*/metrics.jsonl"), key=lambda path: -path.stat().st_mtime)
    for path in found:
        try:
            about = json.loads((path.parent / "stage.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if _setting(about["stage"]) == wanted:
            yield path.parent


def _setting(stage: dict[str, Any]) -> list[Any]:
    engine = stage["engine"]
    return [
        stage["length"],
        stage["precision"],
        *(engine[k] for k in ("device", "threads", "compile", "checkpointing")),
    ]

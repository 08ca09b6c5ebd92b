"""A stage's checkpoints: what is saved between steps, and how a cut stage finds its place again, to the bit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.core import acts, artifact, micro, parts, shape
from tutelage.core.record import Metrics

if TYPE_CHECKING:
    from tutelage.core.stage import Run

COUNTS = ("step", "tokens", "samples", "epochs")  # of the clock: what a way back sets back


def save(run: Run, *, mark: str | None = None) -> None:
    """One checkpoint of everything that the next step depends on. Rank 0 writes."""
    engine, optimizer = run.engine, run.engine.optimizer
    assert optimizer is not None
    run.saved = (run.clock.tick, run.lines)
    if run.engine.world.rank:
        run.engine.world.wait()
        return
    names = {id(p): name for name, p in engine.params.items()}
    states: dict[str, Tensor] = {}
    for p, slots in optimizer.state.items():
        for slot, value in slots.items():
            states[f"{names[id(p)]}|{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    states |= {f"{name}|{slot}": torch.as_tensor(v) for name, slots in run.parked.items() for slot, v in slots.items()}
    tensors, scalars = {}, {}
    for method in run.methods.all():
        inner, plain = artifact.flatten(method.state)
        tensors |= {f"{method.name()}|{k}": v for k, v in inner.items()}
        scalars |= {f"{method.name()}|{k}": v for k, v in plain.items()}
    extra = {f"{label}.{n}": t for label, m in run.extra.items() for n, t in artifact.tensors_of(m).items()}
    facts = {
        "clock": run.clock.state(),
        "stream": run.stream.state(),
        "methods": scalars,
        "groups": [{k: v for k, v in g.items() if k not in ("params", "names")} for g in optimizer.param_groups],
        "settings": {
            m.name(): m.model_dump(mode="json", include=set(m.steerable)) for m in run.methods.all() if m.steerable
        },
        "signals": run.view.signals,
        "flops": engine.flops.state(),
        "steered": asdict(run.steered),
        "asked": run.asked,
        "micro": engine.micro,
        "lines": run.lines,
        "measured": run.measured,
        "evals": run.evals.state(),
        "metrics_bytes": run.metrics.flush(),
    }
    groups = {"model": artifact.tensors_of(engine.model), "optimizer": states, "methods": tensors, "extra": extra}
    if run.parts.picked:
        groups["picked"] = {name: torch.from_numpy(numbers) for name, numbers in run.parts.picked.items()}
        facts["picked"] = run.parts.picked_at
    artifact.save_state(
        run.folder / "state",
        tick=run.clock.tick,
        tensors=groups,
        facts=facts,
        keep=run.node.stage.save.keep,
        mark=mark,
    )
    run.engine.world.wait()


def save_now(run: Run, *, mark: str) -> None:
    """A marked checkpoint of this very moment; one that is there already is only marked."""
    if run.saved != (run.clock.tick, run.lines):
        save(run, mark=mark)
    elif not run.engine.world.rank:
        artifact.mark_state(run.folder / "state", tick=run.clock.tick, mark=mark)


def roll_back(run: Run, *, tick: int, skip: bool) -> None:
    """Weights, optimizer states, methods' states and position of a save; settings, tick and work done stay as they are."""
    place = run.folder / "state" / f"{tick:09d}"
    tensors, facts = artifact.load_state(place)
    load_weights(run, tensors["model"], tensors.get("extra", {}))
    run.engine.optimizer.state.clear()
    run.parked.clear()
    load_optimizer(run, tensors["optimizer"], None)
    keep = {method.name(): dict(method.state) for method in run.methods.having("act")}
    shape.begin(run, (tensors, facts))
    for method in run.methods.having("act"):  # or it would forget that it has been here before
        method.state.clear()
        method.state.update(keep[method.name()])
    if not skip:
        load_stream(run, tensors, facts)
    for key in COUNTS:
        setattr(run.clock, key, facts["clock"][key])
    run.view.signals.update({k: float(v) for k, v in facts["signals"].items()} | {"finite": 1.0})


def counts_at(run: Run, tick: int) -> dict[str, float]:
    """What the clock counted at a save; rank 0's disk tells."""
    clock = facts_at(run, tick)["clock"]
    return {key: clock[key] for key in COUNTS}


def facts_at(run: Run, tick: int) -> dict[str, Any]:
    """A save's clock and its place in the data; rank 0's disk tells."""
    place, found = run.folder / "state" / f"{tick:09d}" / "state.json", {}
    if not run.engine.world.rank:
        facts = json.loads(place.read_text(encoding="utf-8"))
        found = {key: facts[key] for key in ("clock", "stream")}
    return dict(run.engine.world.agree(found))


def restore(run: Run, saved: Any) -> None:
    """Put a checkpoint's contents where they were; cut metrics that are about to be written again."""
    path = run.folder / "metrics.jsonl"
    if not saved:
        run.metrics = Metrics(path, keep_bytes=0, write=not run.engine.world.rank)
        carry(run)
        return
    tensors, facts = saved
    load_weights(run, tensors["model"], tensors.get("extra", {}))
    if run.steered.active is not None:
        shape.retrain(run, set(run.steered.active))
    load_optimizer(run, tensors["optimizer"], facts["groups"])
    for key, value in facts["clock"].items():
        setattr(run.clock, key, value)
    run.engine.flops.load(facts["flops"])
    load_stream(run, tensors, facts)
    run.view.signals.update({k: float(v) for k, v in facts["signals"].items()})
    run.lines, run.asked = facts["lines"], facts["asked"]
    run.saved = (run.clock.tick, run.lines)
    acts.settle(run)
    run.engine.micro = micro.resumed(run.engine.micro, facts["micro"])
    for method in run.methods.all():
        for field, value in facts["settings"].get(method.name(), {}).items():
            setattr(method, field, value)
    run.fresh, run.measured = False, facts["measured"]
    run.evals.load(facts["evals"])
    run.metrics = Metrics(path, keep_bytes=facts["metrics_bytes"], write=not run.engine.world.rank)


def load_stream(run: Run, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    """The place in the data, with what of it is drawn."""
    chunks = {name: numbers.numpy() for name, numbers in tensors.get("picked", {}).items()}
    if chunks or run.parts.picked:
        parts.hold(run, chunks, tick=facts.get("picked", 0))
    run.stream.load(facts["stream"])


def load_weights(run: Run, tensors: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
    own = artifact.tensors_of(run.engine.model)
    missing = sorted(set(own) ^ set(tensors))
    if missing:
        raise UserError(f"the checkpoint in {run.folder / 'state'} does not fit this recipe: {', '.join(missing[:3])}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        for label, module in run.extra.items():
            for name, tensor in artifact.tensors_of(module).items():
                tensor.copy_(extra[f"{label}.{name}"])


def load_optimizer(run: Run, tensors: dict[str, Tensor], groups: list[dict[str, Any]] | None) -> None:
    """Optimizer states by parameter name, those of frozen ones put aside; group settings by position, if given."""
    optimizer = run.engine.optimizer
    assert optimizer is not None
    for group, scalars in zip(optimizer.param_groups, groups or [{} for _ in optimizer.param_groups], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in scalars.items()})
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("|")
        if name not in run.engine.params:
            run.parked.setdefault(name, {})[slot] = tensor
            continue
        p = run.engine.params[name]
        on_cpu = tensor.ndim == 0 and not optimizer.defaults.get("fused")
        optimizer.state[p][slot] = tensor if on_cpu else tensor.to(p.device)


def carry(run: Run) -> None:
    """Take along from the starting stage what the recipe says, and tell what was kept and what could not be."""
    wanted = run.node.stage.carry
    if not wanted:
        return
    from tutelage.core.elsewhere import state_behind  # it opens stages itself

    place = state_behind(run.node)
    if place is None:
        raise UserError(f"stages.{run.node.name}.carry: the start has no checkpoint to take {', '.join(wanted)} from")
    tensors, facts = artifact.load_state(place)
    if "optimizer" in wanted:
        states = {key: t for key, t in tensors["optimizer"].items() if key.rpartition("|")[0] in run.engine.params}
        before = {name: t.shape for name, t in {**tensors["model"], **tensors.get("extra", {})}.items()}
        fits = {
            k: t for k, t in states.items() if before.get(name := k.rpartition("|")[0]) == run.engine.params[name].shape
        }
        load_optimizer(run, fits, None)
        run.say({"note": f"optimizer state: {len(fits)} kept, {len(tensors['optimizer']) - len(fits)} impossible"})
    if "schedule" in wanted:
        clock = facts["clock"]
        run.clock.origin = {
            "step": clock["step"] + clock["origin"].get("step", 0),
            "tok": clock["tokens"] + clock["origin"].get("tok", 0),
            "sample": clock["samples"] + clock["origin"].get("sample", 0),
            "epoch": clock["epochs"] + clock["origin"].get("epoch", 0),
            "flop": clock["flops"] + clock["origin"].get("flop", 0),
        }
        run.say({"note": f"schedule: goes on from step {run.clock.origin['step']}"})
    if "data" in wanted:
        known = {n: s for n, s in facts["stream"]["sources"].items() if n in run.sources}
        known = {n: s for n, s in known.items() if n not in tensors.get("picked", {})}  # a place among some chunks
        known = {n: s for n, s in known.items() if s["fingerprint"] == run.sources[n].fingerprint}
        known = {n: {**s, "rows": 0, "tokens": 0} for n, s in known.items()}  # epochs are counted in this stage
        run.stream.load({"unit": facts["stream"]["unit"], "sources": known})
        run.say({"note": f"data position: kept for {', '.join(known) or 'no source'}"})

"""A stage's checkpoints: what is saved between steps, and how a cut stage finds its place again, to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.core import artifact, micro
from tutelage.core.record import Metrics

if TYPE_CHECKING:
    from tutelage.core.stage import Run


def save(run: Run, *, kept: bool = False) -> None:
    """One checkpoint of everything that the next step depends on. Rank 0 writes."""
    engine, optimizer = run.engine, run.engine.optimizer
    assert optimizer is not None
    if run.engine.world.rank:
        run.engine.world.wait()
        return
    names = {id(p): name for name, p in engine.params.items()}
    states: dict[str, Tensor] = {}
    for p, slots in optimizer.state.items():
        for slot, value in slots.items():
            states[f"{names[id(p)]}|{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
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
        "mix": run.mix,
        "micro": engine.micro,
        "lines": run.lines,
        "measured": run.measured,
        "evals": run.evals.state(),
        "metrics_bytes": run.metrics.flush(),
    }
    groups = {"model": artifact.tensors_of(engine.model), "optimizer": states, "methods": tensors, "extra": extra}
    artifact.save_state(
        run.folder / "state",
        tick=run.clock.tick,
        tensors=groups,
        facts=facts,
        keep=run.node.stage.save.keep,
        kept=kept,
    )
    run.engine.world.wait()


def restore(run: Run, saved: Any) -> None:
    """Put a checkpoint's contents where they were; cut metrics that are about to be written again."""
    path = run.folder / "metrics.jsonl"
    if not saved:
        run.metrics = Metrics(path, keep_bytes=0, write=not run.engine.world.rank)
        carry(run)
        return
    tensors, facts = saved
    load_weights(run, tensors["model"], tensors.get("extra", {}))
    load_optimizer(run, tensors["optimizer"], facts["groups"])
    for key, value in facts["clock"].items():
        setattr(run.clock, key, value)
    run.engine.flops.load(facts["flops"])
    run.stream.load(facts["stream"])
    run.view.signals.update({k: float(v) for k, v in facts["signals"].items()})
    run.mix, run.lines = facts["mix"], facts["lines"]
    run.engine.micro = micro.resumed(run.engine.micro, facts["micro"])
    for method in run.methods.all():
        for field, value in facts["settings"].get(method.name(), {}).items():
            setattr(method, field, value)
    run.fresh, run.measured = False, facts["measured"]
    run.evals.load(facts["evals"])
    run.metrics = Metrics(path, keep_bytes=facts["metrics_bytes"], write=not run.engine.world.rank)


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


def load_optimizer(run: Run, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """Optimizer states by parameter name, group settings by position."""
    optimizer = run.engine.optimizer
    assert optimizer is not None
    for group, scalars in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in scalars.items()})
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("|")
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
        fits = {
            k: t for k, t in states.items() if t.ndim == 0 or t.shape == run.engine.params[k.rpartition("|")[0]].shape
        }
        load_optimizer(run, fits, [{} for _ in run.engine.optimizer.param_groups])
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
        known = {n: s for n, s in known.items() if s["fingerprint"] == run.sources[n].fingerprint}
        known = {n: {**s, "rows": 0, "tokens": 0} for n, s in known.items()}  # epochs are counted in this stage
        run.stream.load({"unit": facts["stream"]["unit"], "sources": known})
        run.say({"note": f"data position: kept for {', '.join(known) or 'no source'}"})

"""The model's final shape in a stage: begin, wrappers, methods' own parts, what is frozen, and the optimizer's groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.core import artifact, quantized
from tutelage.core.anatomy import anatomy, match
from tutelage.core.fused import Fused
from tutelage.core.types import Batch

if TYPE_CHECKING:
    from tutelage.core.stage import Run


def begin(run: Run, saved: Any) -> None:
    """On a fresh stage `begin`; on a cut one the state it left, in the same place, so that a wrap comes out the same."""
    if saved:
        tensors, facts = saved
        for method in run.methods.all():
            prefix = method.name() + "|"
            flat: dict[str, Any] = {
                k.removeprefix(prefix): v for k, v in tensors["methods"].items() if k.startswith(prefix)
            }
            flat = {k: v.to(run.engine.device) for k, v in flat.items()}
            flat |= {k.removeprefix(prefix): v for k, v in facts["methods"].items() if k.startswith(prefix)}
            method.state.clear()
            method.state.update(artifact.unflatten(flat))
        return
    engine = run.engine
    trainable(run)
    run.view._try = partial(tried, run)
    for method in run.methods.having("begin"):
        run.say({"doing": f"{method.name()} prepares"})
        run.view.reseed(f"begin|{method.name()}")
        engine.flops.count("begin", (method.name(),), partial(method.begin, engine.model, run.view))
    run.view._try = None


def tried(run: Run, batches: Iterable[Batch], then: Callable[[], Any]) -> Any:
    """What `then` answers after steps on these batches by a fresh optimizer; weights and buffers are put back."""
    engine, training = run.engine, run.engine.model.training
    held = {name: tensor.detach().clone() for name, tensor in artifact.tensors_of(engine.model).items()}
    others = {name: getattr(engine, name) for name in ("auxiliaries", "penalties", "grad_hooks")}
    engine.__dict__.update(dict.fromkeys(others, ()))
    try:
        engine.model.train()
        optimizer(run)
        for batch in batches:
            engine.step(run.view.prepared(batch), run.view)
        return then()
    finally:
        engine.__dict__.update(others)
        engine.optimizer = None
        engine.model.train(training)
        with torch.no_grad():
            for name, tensor in artifact.tensors_of(engine.model).items():
                tensor.copy_(held[name])


def trainable(run: Run) -> None:
    """Freeze what `train` does not name, and what methods do; the engine's parameters are the rest, by name."""
    model, patterns = run.engine.model, run.node.stage.train
    own = {id(p) for module in run.extra.values() for p in module.parameters()}
    wrapped = bool(run.wrapped)
    if patterns is not None:
        chosen = set(run.engine.anatomy.match(patterns))
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen or id(p) in own)
    elif not wrapped:
        model.requires_grad_(True)
    for method in run.methods.having("freeze"):
        frozen(model, method, run.view, wrapped=run.wrapped)
    run.engine.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for label, module in run.extra.items():
        run.engine.params |= {f"{label}.{n}": p for n, p in module.named_parameters() if p.requires_grad}
    if not run.engine.params:
        raise UserError(f"stages.{run.node.name}: nothing is trained; `train` matches no parameter")


def frozen(model: nn.Module, method: Any, view: Any, *, wrapped: Iterable[str] = ()) -> None:
    """Freeze what a method names of the parameters trained so far, those of wrapped layers left out: they are others'."""
    within = tuple(f"{layer}." for layer in wrapped)
    names = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(within)]
    for name in method.freeze(names, view):
        model.get_parameter(name).requires_grad_(False)


def wrap(run: Run) -> None:
    """Wrap layers, add methods' own modules, freeze; what is frozen goes into four bits where the stage says so."""
    engine, model = run.engine, run.engine.model
    for method in run.methods.having("wrap"):
        run.view.reseed(f"wrap|{method.name()}")
        before = run.wrapped.copy()
        layers = [(name, model.get_submodule(name)) for name in engine.anatomy.linears]
        for name, layer in layers:
            wrapper = method.wrap(layer, name, run.view)
            if wrapper is None:
                continue
            if name in before:
                other = before[name][1].name()
                raise UserError(f"stages.{run.node.name}: both {other} and {method.name()} wrap {name}")
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, wrapper)
            run.wrapped[name] = (wrapper, method, layer)
        if len(run.wrapped) == len(before):
            raise UserError(f"stages.{run.node.name}: {method.name()} found no layer to wrap")
    if run.wrapped:
        trained_of(model, [(wrapper, method) for wrapper, method, _ in run.wrapped.values()])
        engine.anatomy = anatomy(model)
    for method in run.methods.having("modules"):
        run.view.reseed(f"modules|{method.name()}")
        run.extra |= {label: part.to(engine.device) for label, part in method.modules(model).items()}
    trainable(run)
    quantized.quantize(run)
    for spec in run.node.stage.groups:
        if spec.dropout is not None:
            set_dropout(model, spec.match, spec.dropout)
    if run.node.stage.engine.compile:
        engine.anatomy.backbone.compile()
    model.train()


def trained_of(model: nn.Module, wrappers: list[tuple[nn.Module, Any]]) -> None:
    """Train of wrappers what their methods say, and the rest of the model where none of them freezes it."""
    model.requires_grad_(not any(method.freezes for _, method in wrappers))
    for wrapper, method in wrappers:
        for name, p in wrapper.named_parameters():
            p.requires_grad_(method.trains(name))


def set_dropout(model: nn.Module, patterns: str | list[str], rate: float) -> None:
    drops = {name: m for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    for name in match(patterns, names=list(drops)):
        drops[name].p = rate


def optimizer(run: Run) -> None:
    """Parameters in groups of one role and one set of settings, handed to the optimizer's method."""
    engine, parts = run.engine, run.engine.anatomy
    grouped: dict[tuple[Any, ...], dict[str, Any]] = {}
    matches = [
        (spec, set(parts.match(spec.match)))
        for spec in run.node.stage.groups
        if spec.rate is not None or spec.decay is not None
    ]
    for name, p in engine.params.items():
        known = name in parts.roles
        role = parts.role(name) if known else ("matrix" if p.ndim >= 2 else "bias")
        spec = next((spec for spec, names in matches if name in names), None)
        rate = 1.0 if spec is None or spec.rate is None else spec.rate
        decay = None if spec is None else spec.decay
        group = grouped.setdefault(
            (role, rate, decay), {"role": role, "rate": rate, "decay": decay, "names": [], "params": []}
        )
        group["names"].append(name)
        group["params"].append(p)
    method = run.methods.slots["optim"]
    assert method is not None
    engine.optimizer = method.build(list(grouped.values()))
    for group in engine.optimizer.param_groups:
        group["base_lr"] = float(group["lr"])
        group["ratio"] = group["base_lr"] / method.lr if getattr(method, "lr", 0.0) else group.get("rate", 1.0)
    if engine.fused is not None:
        engine.fused.release()
    engine.fused = Fused(engine) if run.node.stage.engine.fused_backward else None


def retrain(run: Run, active: set[str]) -> None:
    """Train these parameters from now on. Rates stay as they are; states of what is frozen are put aside, not lost."""
    engine, model = run.engine, run.engine.model
    assert engine.optimizer is not None
    states = {name: engine.optimizer.state.pop(p) for name, p in engine.params.items() if p in engine.optimizer.state}
    base = next((g["base_lr"] / g["ratio"] for g in engine.optimizer.param_groups if g["ratio"]), None)
    every = {name: p for name, p in model.named_parameters()}
    for label, module in run.extra.items():
        every |= {f"{label}.{name}": p for name, p in module.named_parameters()}
    for name, p in every.items():
        p.requires_grad_(name in active)
    engine.params = {name: p for name, p in every.items() if name in active}
    run.steered.active = sorted(active)
    run.parked |= states
    optimizer(run)
    for group in engine.optimizer.param_groups:
        group["base_lr"] = group["base_lr"] if base is None else base * group["ratio"]
    for name in sorted(set(run.parked) & active):
        engine.optimizer.state[engine.params[name]] = run.parked.pop(name)


def overwrite(run: Run, tensors: dict[str, Tensor]) -> None:
    """New weights by name, without optimizer state."""
    assert run.engine.optimizer is not None
    with torch.no_grad():
        for name, tensor in tensors.items():
            p = run.engine.model.get_parameter(name)
            p.copy_(tensor)
            run.engine.optimizer.state.pop(p, None)
            run.parked.pop(name, None)

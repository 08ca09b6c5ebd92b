"""`engine: {fused_backward: true}`: each parameter takes its optimizer step inside the backward pass, as soon as its
gradient is whole, and the gradient is freed before the next one is there (LOMO: Lv et al. 2023, arXiv:2306.09782; the
per-layer updates of GaLore: Zhao et al. 2024, arXiv:2403.03507). The numbers are those of a step after backward, to the
bit; what is spared is the memory of all gradients but the largest.

Nothing that needs all gradients together goes with it; `check` refuses it by name. A step cannot be tried again with
fewer rows when memory runs out, for some of the weights have moved by then, so the micro-batch is always the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.spec import Stage
from tutelage.core.flops import uncounted
from tutelage.core.memory import is_oom
from tutelage.core.types import Batch

if TYPE_CHECKING:
    from tutelage.core.engine import Engine
    from tutelage.core.graph import Methods


def check(name: str, stage: Stage, methods: Methods) -> None:
    """UserError for a stage in which something needs all gradients together."""
    if not stage.engine.fused_backward:
        return
    place = f"stages.{name}.engine.fused_backward"
    if stage.until is None:
        raise UserError(f"{place}: only a stage that trains (`until`) has a backward pass")
    if stage.engine.clip is not None:
        raise UserError(f"{place}: clipping needs the norm of all gradients together; write `engine.clip: null`")
    if stage.engine.micro is not None:
        raise UserError(f"{place}: gradients are not added up over micro-batches; leave `engine.micro` out")
    whole = {"grads": "changes all gradients together", "penalty": "adds a second backward pass"}
    for hook, does in whole.items():
        for method in methods.having(hook):
            raise UserError(f"{place}: {method.name()} {does}; leave one out")
    step, optim = methods.slots["step"], methods.slots["optim"]
    if step is not None:
        raise UserError(f"{place}: {step.name()} makes the whole step itself; leave one out")
    assert optim is not None
    if not optim.separable:
        raise UserError(f"{place}: {optim.name()} does not step parameters one by one; optim/adamw does")


class Fused:
    """The engine's parameters and optimizer, bound to the backward pass of `step` and to no other."""

    def __init__(self, engine: Engine) -> None:
        assert engine.optimizer is not None
        if engine.world.size > 1:
            raise UserError(
                "engine.fused_backward: several processes sum whole gradients before the step; leave it out, or run one"
            )
        self.engine, self.optimizer = engine, engine.optimizer
        self.on = False
        self.norms: dict[int, Tensor] = {}
        self.home = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        self.handles = [p.register_post_accumulate_grad_hook(self._take) for p in engine.params.values()]

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()

    def step(self, batch: Batch, view: Any) -> dict[str, float]:
        """As `Engine.step`; the weights have moved when its backward pass is done."""
        self.on, self.norms = True, {}
        try:
            numbers = self.engine.learn(batch, view)
        except (RuntimeError, MemoryError) as error:
            if not is_oom(error):
                raise
            raise UserError(
                f"out of memory with {len(batch)} rows at once, and with engine.fused_backward a step cannot be tried "
                "again with fewer; lower `batch` or `length`, or set engine.checkpointing"
            ) from error
        finally:
            self.on = False
        norms = [self.norms[id(p)] for p in self.engine.params.values() if id(p) in self.norms]
        return {**numbers, "grad_norm": float(torch.linalg.vector_norm(torch.stack(norms)))}

    def _take(self, p: Tensor) -> None:
        """Step this parameter alone and free its gradient. Left as it is where the gradient is another's to use."""
        if not self.on or self.engine.fused is not self:
            return
        groups = self.optimizer.param_groups
        held = [group["params"] for group in groups]
        with uncounted():
            self.norms[id(p)] = torch.linalg.vector_norm(p.grad)
            try:
                for group in groups:
                    group["params"] = [p] if group is self.home[id(p)] else []
                self.optimizer.step()
            finally:
                for group, params in zip(groups, held, strict=True):
                    group["params"] = params
        p.grad = None

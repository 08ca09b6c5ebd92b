"""One step's arithmetic: micro-batches, autocast, losses divided once, gradients, clipping, the optimizer's turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.base.method import Method
from tutelage.core.anatomy import Anatomy, anatomy
from tutelage.core.flops import FlopMeter
from tutelage.core.fused import Fused
from tutelage.core.memory import is_oom
from tutelage.core.modality import Modality
from tutelage.core.out import Out, forward
from tutelage.core.shard import World
from tutelage.core.types import Batch, Sum


@dataclass
class Asked:
    """What a loss gets as `model`: calls the engine, and remembers its first answer for the auxiliaries."""

    engine: Engine
    needs: frozenset[str]
    first: Out | None = None

    def __call__(self, batch: Batch) -> Out:
        out = self.engine.out(batch, needs=self.needs)
        self.first = self.first or out
        return out


@dataclass
class Engine:
    """A model on its device with everything a step needs. `micro` is rows of a micro-batch (None: all at once)."""

    model: nn.Module
    anatomy: Anatomy
    modality: Modality
    device: torch.device
    world: World = field(default_factory=World)
    autocast: torch.dtype | None = None
    packing: str = "documents"
    micro: int | None = None
    length: int | None = None  # where a curriculum changes the rows: how long those are that `micro` counts
    uneven: bool = False  # the parts of the loss count different things
    clip: float | None = 1.0
    objective: Method | None = None
    auxiliaries: Sequence[Method] = ()
    penalties: Sequence[Method] = ()
    grad_hooks: Sequence[Method] = ()
    optimizer: torch.optim.Optimizer | None = None
    params: dict[str, nn.Parameter] = field(default_factory=dict)  # what is trained, by name
    fused: Fused | None = None  # steps parameters within backward
    flops: FlopMeter = field(default_factory=FlopMeter)
    others: dict[int, Anatomy] = field(default_factory=dict)  # of frozen reference models
    on_micro: Callable[[int], None] = lambda rows: None  # told when memory forces a smaller micro-batch

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def out(self, batch: Batch, *, needs: frozenset[str] = frozenset()) -> Out:
        """The model's answer to a batch: hidden states now, logits piece by piece."""
        return self.out_of(self.model, batch, needs=needs)

    def out_of(self, model: nn.Module, batch: Batch, *, needs: frozenset[str] = frozenset()) -> Out:
        """The same, of another model of this shape (a frozen reference)."""
        inputs = self.modality.inputs(batch, anatomy=self.anatomy, packing=self.packing)
        if model is self.model:
            return forward(model, inputs, anatomy=self.anatomy, needs=needs)
        if id(model) not in self.others:
            self.others[id(model)] = anatomy(model)
        return forward(model, inputs, anatomy=self.others[id(model)], needs=needs)

    # -- a training step --------------------------------------------------------------------------------------------

    def step(self, batch: Batch, view: Any) -> dict[str, float]:
        """Gradients of the loss over the whole batch, then the optimizer. Returns the step's numbers."""
        assert self.optimizer is not None
        if self.fused is not None:
            return self.fused.step(batch, view)
        numbers = self.learn(batch, view)
        for method in self.grad_hooks:
            method.grads(self.gradients(), view)
        numbers["grad_norm"] = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return numbers

    def learn(self, batch: Batch, view: Any) -> dict[str, float]:
        """Fill `.grad` for a batch drawn on every rank alike; smaller micro-batches when memory runs out."""
        mine = self.world.share(batch)
        while True:
            try:
                numbers = self._accumulate(mine, view)
                break
            except (RuntimeError, MemoryError) as error:
                rows = min(self._rows(mine), len(mine))
                if not is_oom(error) or rows <= 1 or self.world.size > 1 or self.fused is not None:
                    raise
            self._forget_gradients()
            each = self._rows(mine) / (self.micro or self._rows(mine))  # rows of this batch for one that `micro` counts
            self.micro = max(1, int(rows / each) // 2)
            self.on_micro(self.micro)
        for method in self.penalties:
            with self.precision():
                penalty = method.penalty(self.params, view)
            self.backward(penalty)
            numbers[f"penalty/{method.name()}"] = float(penalty.detach())
        return numbers

    def backward(self, value: Tensor) -> None:
        """Add a term's gradient. A term that asks nothing of the weights adds nothing."""
        if value.requires_grad:
            value.backward()

    def _accumulate(self, mine: Batch, view: Any) -> dict[str, float]:
        """Backward over the micro-batches with undivided sums, then one division by all that counted.

        Parts that count different things cannot share the division: their weights are then learned first, in a pass
        without gradients (only where there is something to divide over: several micro-batches or ranks).
        """
        micros = [micro.to(self.device) for micro in mine.split(self._rows(mine))]
        alone = len(micros) == 1 and self.world.size == 1
        scales = self._scales(micros, view) if self.uneven and not alone else [1.0] * (1 + len(self.auxiliaries))
        view.reseed("dropout", apart=True)  # so that a retry, or a pass more, draws the same masks
        totals = torch.zeros(len(scales), dtype=torch.float64)
        weights = torch.zeros(len(scales), dtype=torch.float64)
        uneven = False
        for micro in micros:
            key = tuple(tuple(value.shape) for value in micro.fields.values())
            found, _ = self.flops.count("train", key, partial(self._descend, micro, view, None if alone else scales))
            totals += found[0]
            weights += found[1]
            uneven |= bool((found[1] != found[1][0]).any())
        if self.auxiliaries and not alone and not self.uneven:
            self.uneven = bool(self.world.sum(torch.tensor(float(uneven), device=self.device)) > 0)
            if self.uneven:
                self._forget_gradients()
                return self._accumulate(mine, view)
        return self._divide(totals, weights, alone=alone)

    def _rows(self, batch: Batch) -> int:
        """Rows of a micro-batch: of shorter rows than those that `micro` counts, as many more as there is room for."""
        if self.fused is not None:  # steps within backward take the whole batch
            return max(1, len(batch))
        if self.micro is None or self.length is None:
            return self.micro or max(1, len(batch))
        width = max((value.shape[1] for value in batch.fields.values() if value.ndim == 2), default=self.length)
        return max(1, self.micro * self.length // max(1, width))

    def _descend(self, micro: Batch, view: Any, scales: list[float] | None) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch; each part's total and weight. No scales: divide here and now."""
        sums = self._sums(micro, view)
        weights = [float(part.weight) for part in sums]
        factors = scales or [1.0 / weight if weight else 0.0 for weight in weights]
        self.backward(sum((part.total * f for part, f in zip(sums, factors, strict=True)), torch.zeros(())))
        totals = [float(part.total.detach()) for part in sums]
        return torch.tensor(totals, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)

    def _sums(self, micro: Batch, view: Any) -> list[Sum]:
        assert self.objective is not None
        with self.precision():
            model = Asked(self, self.objective.needs.union(*(m.needs for m in self.auxiliaries)))
            sums = [self.objective.loss(model, micro, view)]
            sums += [method.auxiliary(model.first, micro, view) for method in self.auxiliaries]
        return sums

    def _scales(self, micros: list[Batch], view: Any) -> list[float]:
        """Each part's factor relative to the objective's weight, from a pass without gradients."""
        view.reseed("dropout", apart=True)
        weights = torch.zeros(1 + len(self.auxiliaries), dtype=torch.float64)
        with torch.no_grad():
            for micro in micros:
                sums = self._sums(micro, view)
                weights += torch.tensor([float(part.weight) for part in sums], dtype=torch.float64)
        weights = self.world.sum(weights.to(self.device)).cpu()
        return [float(weights[0] / weight) if weight else 0.0 for weight in weights]

    def _divide(self, totals: Tensor, weights: Tensor, *, alone: bool) -> dict[str, float]:
        gradients = [p.grad for p in self.params.values() if p.grad is not None]
        if self.world.size > 1:
            for p in self.params.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            gradients = [p.grad for p in self.params.values()]
            self.world.sum_(gradients)
            both = self.world.sum(torch.stack([totals, weights]).to(self.device)).cpu()
            totals, weights = both[0], both[1]
        if not weights[0] > 0:
            raise UserError(
                "a batch has nothing to learn: no position counts in the loss "
                "(are all answers longer than `length`, or all labels masked?)"
            )
        if not alone:
            torch._foreach_mul_(gradients, 1.0 / float(weights[0]))
        means = [float(total / weight) if weight else 0.0 for total, weight in zip(totals, weights, strict=True)]
        named = {f"aux/{m.name()}": mean for m, mean in zip(self.auxiliaries, means[1:], strict=True)}
        return {"loss": means[0], "counted": float(weights[0]), **named}

    # -- gradients --------------------------------------------------------------------------------------------------

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.params.items() if p.grad is not None}

    def _forget_gradients(self) -> None:
        for p in self.params.values():
            p.grad = None

    def _clip(self) -> float:
        gradients = [p.grad for p in self.params.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.params.values(), self.clip, norm)
        return float(norm)

    def gradient_of(self, batch: Batch, view: Any) -> dict[str, Tensor]:
        """The objective's gradient on another batch, divided; the gradients in place are left as they were."""
        held = {name: p.grad for name, p in self.params.items()}
        auxiliaries, self.auxiliaries = self.auxiliaries, ()
        fused, self.fused = self.fused, None
        try:
            self._forget_gradients()
            self._accumulate(self.world.share(batch), view)
            return self.gradients()
        finally:
            self.auxiliaries, self.fused = auxiliaries, fused
            for name, p in self.params.items():
                p.grad = held[name]

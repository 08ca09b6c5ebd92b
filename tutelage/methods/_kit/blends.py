"""Multiples of task vectors, learned: a model that is its base plus such multiples, and a loss's gradient for these.

    theta = theta_0 + sum_i lambda[i, group of the tensor] tau_i,   dL/dlambda[i, g] = sum over group g of <dL/dtheta, tau_i>

The blended weights are the model's own parameters, written anew before each step, and each parameter's gradient is multiplied
with the task vectors as soon as backward has it and let go. So autograd keeps no product of coefficients and weights, chunked
losses find the leaves that they need, and no gradient of the model's size is ever whole.

Shape letters: N task vectors, G groups of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.core.types import Batch, Sum
from tutelage.methods._kit.vectors import summed

TASKS: dict[
    str, Any
] = {  # what the three models of recipes/bench/merge.yaml learned, for the benches of what is fitted on it
    "code": {"path": "stdlib:code"},
    "asked": {"use": "bench.instructions:Instructions", "args": {"count": 2000}, "template": True, "val": "10%"},
    "records": {"use": "bench.records:Records", "args": {"count": 2000}, "val": "10%"},
}


def blended(base: Tensor, vectors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The base plus a multiple of each task vector."""
    return base + summed(vectors, coefficients, normalize=False)


class Blend:
    """The run's model as a blend of its starts. `groups` names a group for each name that a file gives to a parameter.

    Parameters without a group stay the base's. `coefficients_NG` is what an optimizer steps, on the CPU.
    """

    def __init__(self, starts: Any, groups: Mapping[str, str], view: Any, *, initial: float) -> None:
        self.starts, self.view = starts, view
        self.names = list(dict.fromkeys(groups.values()))
        self.columns = {name: self.names.index(groups[f]) for name, f in starts.files.items() if f in groups}
        self.coefficients_NG = torch.nn.Parameter(torch.full((len(starts) - 1, len(self.names)), initial))
        self._found_NG = torch.zeros_like(self.coefficients_NG, dtype=torch.float64)
        for name, p in view.engine.params.items():
            p.requires_grad_(name in self.columns)
            if name in self.columns:
                p.register_post_accumulate_grad_hook(partial(self._take, name))

    def _vectors(self, name: str) -> Iterator[Tensor]:
        base = self.starts.read(0, name)
        for i in range(1, len(self.starts)):
            yield self.starts.read(i, name) - base

    @torch.no_grad()
    def lay(self) -> None:
        """Write the blended weights into the model."""
        for name, column in self.columns.items():
            base, multiples = self.starts.read(0, name), self.coefficients_NG[:, column].tolist()
            self.view.engine.params[name].copy_(blended(base, list(self._vectors(name)), multiples))

    @torch.no_grad()
    def _take(self, name: str, p: Tensor) -> None:
        """Turn a parameter's gradient into its share of the coefficients', and let go of it."""
        assert p.grad is not None
        found = [(p.grad * vector).sum(dtype=torch.float64) for vector in self._vectors(name)]
        self._found_NG[:, self.columns[name]] += torch.stack(found).cpu()
        p.grad = None

    def descend(self, loss: Callable[[Batch], Sum], batch: Batch, *, key: str, share: float) -> float:
        """Mean loss of the model as it was laid, over what counts in a batch; `share` times its gradient is added up.

        `key` tells apart the kinds of work that the run counts.
        """
        self._found_NG.zero_()
        total = weight = 0.0
        for micro in batch.split(self.view.engine.micro or len(batch)):
            shapes = (key, *(tuple(value.shape) for value in micro.fields.values()))
            found = self.view.counted(shapes, partial(self._pass, loss, micro.to(self.view.engine.device)))
            total, weight = total + found[0], weight + found[1]
        if not weight:
            return 0.0
        gradient_NG = (self._found_NG * (share / weight)).to(self.coefficients_NG.dtype)
        held = self.coefficients_NG.grad
        self.coefficients_NG.grad = gradient_NG if held is None else held + gradient_NG
        return total / weight

    def _pass(self, loss: Callable[[Batch], Sum], micro: Batch) -> tuple[float, float]:
        with self.view.engine.precision():
            found = loss(micro)
        if found.total.requires_grad:
            found.total.backward()
        return float(found.total.detach()), float(found.weight)

    def found(self, labels: Sequence[str]) -> dict[str, dict[str, float]]:
        """The coefficients by task vector and group, for people and for the merge."""
        rows = self.coefficients_NG.tolist()
        return {label: dict(zip(self.names, row, strict=True)) for label, row in zip(labels, rows, strict=True)}


def learned(
    blend: Blend,
    state: dict[str, Any],
    read: Sequence[Sequence[Batch]],
    loss: Callable[[int, Batch], Sum],
    *,
    optimizer: torch.optim.Optimizer,
    steps: int,
    names: Sequence[str],
    key: str,
    rate: Callable[[int], float] | None = None,
    clip: float | None = None,
) -> Iterator[tuple[dict[str, float], list[Batch]]]:
    """Steps of a fit, as the hook yields them: in each one batch of every source in `read`, whose mean losses are averaged.

    loss: of the `i`-th source's batch; names: what each of these losses is called in the metrics
    rate: of a step, counted from 0, where it is not the optimizer's own all along; clip: the largest norm of the gradient
    Goes on from where `state` says, and leaves there what the next step needs and `coefficient`, the multiples by label and group.
    """
    coefficients_NG, labels = blend.coefficients_NG, blend.starts.labels[1:]
    done = _go_on(state, blend, optimizer)
    state["coefficient"] = blend.found(labels)
    for step in range(done, steps):
        blend.lay()
        batches = [batches[step % len(batches)] for batches in read]
        found = [
            blend.descend(partial(loss, i), blend.view.prepared(batch), key=key, share=1 / len(read))
            for i, batch in enumerate(batches)
        ]
        if coefficients_NG.grad is None:
            raise UserError("a step of the fit has nothing to learn: no position of its passages counts in the loss")
        group = optimizer.param_groups[0]
        group["lr"] = rate(step) if rate else group["lr"]
        norm = torch.nn.utils.clip_grad_norm_([coefficients_NG], float("inf") if clip is None else clip)
        optimizer.step()
        optimizer.zero_grad()
        slots = {slot: value.clone() for slot, value in optimizer.state[coefficients_NG].items()}
        now = coefficients_NG.detach().clone()
        state["fit"] = {"coefficients": now, "optimizer": slots, "step": torch.tensor(step + 1)}  # tensors: no measures
        state["coefficient"] = blend.found(labels)
        each = dict(zip(names, found, strict=True))
        yield {"loss": sum(found) / len(found), **each, "grad_norm": float(norm), "lr": group["lr"]}, batches


def _go_on(state: dict[str, Any], blend: Blend, optimizer: torch.optim.Optimizer) -> int:
    """Put back what the last step left, if there was one; returns the number of steps done."""
    saved = state.get("fit")
    if saved is None:
        return 0
    with torch.no_grad():
        blend.coefficients_NG.copy_(saved["coefficients"])
    optimizer.state[blend.coefficients_NG] = {slot: value.clone() for slot, value in saved["optimizer"].items()}
    return int(saved["step"])


def fell(run: Any) -> dict[str, float]:
    """By which share the loss of a fit fell from its first step to its last, how far the multiples of each task vector lie
    apart at least, and what was measured of the merge in the end."""
    losses = [row["loss"] for row in run.rows if row["kind"] == "train"]
    values = next(row["values"] for row in reversed(run.rows) if row["kind"] == "eval")
    bits = [value for key, value in values.items() if key.startswith("bits_per_byte/b")]
    found: dict[str, list[float]] = {}
    for key, value in values.items():
        if key.startswith("coefficient/"):
            found.setdefault(key.split("/")[1], []).append(value)
    apart = min((max(of) - min(of) for of in found.values()), default=0.0)
    return {"fell": 1 - losses[-1] / losses[0] if losses else 0.0, "apart": apart, "bits": sum(bits)}

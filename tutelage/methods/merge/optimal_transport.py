"""Optimal transport fusion: units of the other models are first matched with those of the first one, then averaged.

Networks that were trained apart may have learned the same units in another order. Layer by layer, the units of each model
are matched with the first model's so that the incoming weights of the pairs are nearest in all.

Paper:   Singh and Jaggi 2020, arXiv:1910.05653; for transformers: Imfeld et al. 2024, arXiv:2310.05719
Use:     models of one shape that did not part lately: other seeds, other data from the start; fine-tune what comes of it,
         as the papers do. `residual: true` where they share no weights at all
Works:   transformers models with torch's attention: Llama, GPT-2, GPT-NeoX, BERT and their like, with tied heads and
         grouped queries; one tokenizer
Costs:   for each block one matching of its neurons and one of its heads, at the cube of their number; no training, no data
With:    any stage that trains on; beside merge/linear, which is what it does where nothing moves
Differs: exact transport between equally many units of equal mass, which is a permutation; not Sinkhorn's soft one, nor
         unequal widths. Costs from weights, not activations. Heads are matched whole, a key/value head with its query
         heads. The residual stream is one for all blocks and is matched by the embeddings alone, where the second paper
         weighs what each sublayer would have
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.types import Axis, Layout
from tutelage.methods._kit.blocks import BLOCK
from tutelage.methods._kit.vectors import moved, one_each, summed
from tutelage.methods._kit.widen import places

Group = tuple[str, str]  # block, space; no block for the residual stream


class OptimalTransport(Method):
    weights: list[float] | None = Field(None, description="weight of each start, in order; equal when left out")
    residual: bool = Field(False, description="match the channels of the residual stream, too, by the embeddings")

    unrelated = True
    no_off = "a merge is a stage of its own"
    baseline = {"use": "merge/linear"}
    on = {"residual": True}
    toys = ("llama", "gpt2")

    _layout: Layout | None = PrivateAttr(None)
    _found: dict[tuple[int, Group], Tensor] = PrivateAttr(default_factory=dict)

    def tensor(self, name: str, tensors: list[Tensor], base: Tensor | None, view: Any) -> Tensor:
        weights = one_each(self.weights, tensors, place="merge/optimal_transport.weights")
        if not sum(weights):
            raise UserError("merge/optimal_transport.weights: they add up to 0")
        if self._layout is None:
            self._layout = view.layout(view.configs[0])
        axes = self._layout.axes.get(name)
        if axes is None:
            raise UserError(
                f"merge/optimal_transport: {name} is no weight of the model that the configuration describes"
            )
        matched = [self._matched(i, name, tensor, axes, view) for i, tensor in enumerate(tensors)]
        return summed(matched, weights, normalize=True)

    def _matched(self, i: int, name: str, tensor: Tensor, axes: tuple[Axis, ...], view: Any) -> Tensor:
        """A tensor of model `i` with its units in the order of the first model's."""
        if not i:
            return tensor
        for dim, axis in enumerate(axes):
            if axis.space:
                source_N = self._order(i, group_of(name, axis), view)
                tensor = tensor.index_select(dim, places(axis, axis, source_N))
        return tensor

    def _order(self, i: int, group: Group, view: Any) -> Tensor:
        """[N] for each unit of the first model the one of model `i` that is nearest in all; found once."""
        if (i, group) not in self._found:
            self._found[i, group] = self._match(i, group, view)
        return self._found[i, group]

    def _match(self, i: int, group: Group, view: Any) -> Tensor:
        assert self._layout is not None
        size = self._layout.sizes[group[1]]
        if group[1] == "hidden" and not self.residual:
            return torch.arange(size)
        cost_NN = torch.zeros(size, size, dtype=torch.float64)
        for name in sorted({*self._layout.axes} & {*view.names}):
            dim = incoming(name, self._layout.axes[name], group)
            if dim is None:
                continue
            first, other = (self._features(j, name, dim, view) for j in (0, i))
            cost_NN += torch.cdist(first, other).square()
        _, source = linear_sum_assignment(cost_NN.numpy())
        self.state[f"moved/{group[0]}/{group[1]}/{i}"] = float((source != np.arange(size)).mean())
        return torch.from_numpy(source)

    def _features(self, i: int, name: str, dim: int, view: Any) -> Tensor:
        """[N, features] float64: what comes into each unit, read in the order of the first model's channels."""
        assert self._layout is not None
        axes, tensor = self._layout.axes[name], view.read(i, name).double()
        for other, axis in enumerate(axes):
            if i and other != dim and axis.space:
                tensor = tensor.index_select(other, places(axis, axis, self._order(i, group_of(name, axis), view)))
        axis = axes[dim]
        order_N = torch.argsort(axis.unit_N * (int(axis.part_N.max()) + 1) + axis.part_N)
        return tensor.index_select(dim, order_N).movedim(dim, 0).reshape(int(axis.unit_N.max()) + 1, -1)


def group_of(name: str, axis: Axis) -> Group:
    """What is matched together: the residual stream, or the neurons or heads of one block."""
    match = BLOCK.fullmatch(name)
    return ("" if axis.space == "hidden" or match is None else f"{match[1]}.{match[2]}", axis.space)


def incoming(name: str, axes: tuple[Axis, ...], group: Group) -> int | None:
    """The axis along which a weight makes the units of a group out of something else; of channels only embeddings do."""
    for dim, axis in enumerate(axes):
        if axis.space == group[1] and not axis.read and group_of(name, axis) == group:
            others = [other for i, other in enumerate(axes) if i != dim]
            if group[1] != "hidden" or (others and not any(other.space for other in others)):
                return dim
    return None


def effect(run: Seen) -> dict[str, float]:
    return moved(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """What is averaged with the first model lies nearer to it than what the plain mean takes."""
    return 0 < on["moved"] < 0.95 * off["moved"]


BENCH = Bench(
    base="recipes/bench/apart.yaml",
    arm={"apply": {"use": "merge/optimal_transport", "residual": True}},
    stage="fused",
    baseline={"apply": {"use": "merge/linear"}},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.05,
    scale="MLPs on MNIST, VGG11 and ResNet18 on CIFAR-10; vision transformers and BERT in the second paper",
)

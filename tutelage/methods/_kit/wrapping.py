"""Methods that put a module of their own in the place of linear layers: which layers, and which way round weights lie."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor, nn

from tutelage.base.method import Method


class Wrapping(Method):
    targets: list[str] | None = Field(
        None, description="patterns of layers to wrap, or their last names (q_proj); the blocks' linears when left out"
    )

    def chosen(self, anatomy: Any) -> set[str]:
        """Names of the layers to wrap."""
        if self.targets is None:
            return {name for name in anatomy.linears if anatomy.block_index(name) is not None}
        patterns = [each if set(each) & set("*?[.:") else f"*.{each}" for each in self.targets]
        return set(anatomy.match(patterns, names=anatomy.linears))


def turned(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as [inputs, outputs] (GPT-2's Conv1D)."""
    return not isinstance(layer, nn.Linear)


def outputs_first(layer: Any) -> Tensor:
    """A linear layer's weight as [outputs, inputs], whichever way it keeps it; the same memory."""
    weight: Tensor = layer.weight
    return weight.T if turned(layer) else weight

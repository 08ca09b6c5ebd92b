"""Multi-level training: a model is made smaller by averaging units and blocks, trained cheaply, and made large again.

Paper:   Zou et al. 2024 (coalescing, de-coalescing), arXiv:2404.07999
Use:     a V: train the large model a little, `to: smaller`, train that for half of the steps, `to: larger`, join it to the
         large one where it was left (`merge/linear`, weights [0.75, 0.25] for GPT and 0.5 each for BERT in the paper),
         go on. Without the join, units that are copies of each other stay so
Works:   transformers models with a rotary, learned or no position embedding and torch's attention: Llama, GPT-2,
         GPT-NeoX, BERT and their like, with tied heads and grouped queries; depth: blocks in a numbered list, all alike
Costs:   one pass over the weights, each time
With:    merge/linear for the interpolation; schedule/rewarm in the stages that follow
Differs: a tied head is dealt with in the norm before it, as this house's other growing does, so that a wider model answers
         as before; the authors scale the embedding, after which a GPT does not. Units far apart are paired as in their
         scripts (unit i with i + half, whole heads), blocks next to each other as in their default
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.types import Axis, Layout
from tutelage.methods._kit.blocks import BLOCK, deeper, stacks_of
from tutelage.methods._kit.widen import Copies, along, check, copies, expand, places, quieter, wider

Made = tuple[dict[str, Any], dict[str, Tensor]]


class Multilevel(Method):
    to: Literal["smaller", "larger"] = Field("smaller", description="which way: `smaller` averages, `larger` copies")
    width: int = Field(2, ge=1, le=16, description="how many channels, heads and neurons become one, or come of one")
    depth: int = Field(2, ge=1, le=16, description="how many blocks in a row become one, or come of one")

    no_off = "another size is a stage of its own"
    baseline = {"use": "grow/multilevel", "width": 1, "depth": 1}
    toys = ("llama", "gpt2")

    def keeps_function(self) -> bool:
        return self.to == "larger" and self.depth == 1 and self.width > 1

    def grow(self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any) -> Made:
        if self.width > 1:
            config, tensors = (self._narrow if self.to == "smaller" else self._widen)(config, tensors, view)
        if self.depth > 1:
            config, tensors = (self._average if self.to == "smaller" else self._repeat)(config, tensors)
        return config, tensors

    # -- width --------------------------------------------------------------------------------------------------------

    def _narrow(self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any) -> Made:
        narrow = wider(config, 1 / self.width, by=self.name())
        small, large, copied = self._sides(narrow, config, tensors, view)
        made = {name: contract(t, small.axes[name], large.axes[name], copied) for name, t in tensors.items()}
        for name in (
            large.before_head if large.tied else ()
        ):  # the head reads an embedding that was averaged, not summed
            made[name] = made[name] * self.width
        return narrow, made

    def _widen(self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any) -> Made:
        wide = wider(config, self.width, by=self.name())
        small, large, copied = self._sides(config, wide, tensors, view)
        made = {name: expand(t, small.axes[name], large.axes[name], copied) for name, t in tensors.items()}
        quieter(made, small, large, copied, by=self.name())
        return wide, made

    def _sides(
        self, narrow: dict[str, Any], wide: dict[str, Any], tensors: dict[str, Tensor], view: Any
    ) -> tuple[Layout, Layout, Copies]:
        small, large = view.layout(narrow), view.layout(wide)
        for name in tensors:
            check(name, small, large, by=self.name())
        return small, large, copies(small, large, view.rng("copies"))  # whole numbers of copies: nothing is drawn

    # -- depth --------------------------------------------------------------------------------------------------------

    def _average(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> Made:
        stacks, mean, order = stacks_of(config, tensors, by=self.name()), dict(tensors), {}
        for prefix, blocks in stacks.items():
            if len(blocks) % self.depth:
                raise UserError(f"{self.name()}: {len(blocks)} blocks in groups of {self.depth} leave some over")
            order[prefix] = [*range(0, len(blocks), self.depth)]
            for first in order[prefix]:
                for name in blocks[first]:
                    group = [f"{prefix}.{first + i}.{name}" for i in range(self.depth)]
                    if all(each in tensors for each in group):
                        mean[group[0]] = (
                            torch.stack([tensors[each].float() for each in group])
                            .mean(dim=0)
                            .to(tensors[group[0]].dtype)
                        )
        return deeper(config, mean, order, by=self.name())

    def _repeat(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> Made:
        stacks = stacks_of(config, tensors, by=self.name())
        order = {
            prefix: [i for i in range(len(blocks)) for _ in range(self.depth)] for prefix, blocks in stacks.items()
        }
        return deeper(config, tensors, order, by=self.name())


def contract(weight: Tensor, small: tuple[Axis, ...], large: tuple[Axis, ...], copied: Copies) -> Tensor:
    """One weight of the narrow model: the mean over units that become one, the sum where they are read."""
    made = weight.double() if weight.dtype == torch.float64 else weight.float()
    for dim, (a, b) in enumerate(zip(small, large, strict=True)):
        if not a.space:
            continue
        from_N = places(a, b, copied.source[a.space])
        shape = [*made.shape]
        shape[dim] = len(a.unit_N)
        made = made.new_zeros(shape).index_add_(dim, from_N, made)
        if not a.read:
            made = made / along(torch.bincount(from_N, minlength=shape[dim]).to(made), dim, made.ndim)
    return made.to(weight.dtype)


def effect(run: Seen) -> dict[str, float]:
    """How many times as many numbers there are, and how far any token's mean over channels has moved."""
    start, end = run.start(), run.weights()
    numbers = sum(t.numel() for t in end.values()) / sum(t.numel() for t in start.values())
    name = next(name for name in start if name.endswith(("embed_tokens.weight", "wte.weight")))
    moved = (end[name].mean(dim=1) - start[name].mean(dim=1)).abs().max() / start[name].abs().mean()
    blocks = {match[2] for match in map(BLOCK.fullmatch, end) if match}
    return {"numbers": numbers, "moved": float(moved), "blocks": float(len(blocks))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """A quarter of the numbers or fewer in half of the blocks, and no token's mean elsewhere: averaged, not cut off."""
    return on["numbers"] < 0.5 * off["numbers"] and on["blocks"] < off["blocks"] and on["moved"] < 1e-5


BENCH = Bench(
    base="recipes/bench/multilevel.yaml",
    arm={"start": "joined"},
    stage="large",
    baseline={
        "start": "recipes/models/llama-1m.yaml",
        "tokenizer": {"train": "bpe", "vocab": 2048},
        "until": "800step",
    },
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="110 M (BERT and GPT base, 19 % of the operations saved) and 340 M parameters (BERT large, 52 %)",
)

"""Growth operators in depth and width: copies stacked upon each other, new weights at zero, or new weights at random.

Paper:   Du et al. 2024 (G_direct with G_stack, G_zero, G_random), arXiv:2405.15319; first Gong et al. 2019 (StackBERT)
Use:     times 2 to 4 and copies (G_stack), the best of the paper's eight: at 1.1 B parameters 49 % faster than from
         scratch, zero in depth 47 %, random in depth 26 % slower, all four in width slower. Grow after about 10 B of
         300 B tokens, from more than one block (one grew worse than scratch), and warm the rate up anew
Works:   copies in depth: any transformers model whose blocks are a numbered list, both stacks of an encoder-decoder one;
         the rest: decoders with torch's attention (zero in width: with RMSNorm, like Llama)
Costs:   one pass over the weights; stacked copies and random weights make the loss jump, zero and copied width do not
With:    schedule/rewarm in the stage that follows; grow/ramp for the paper's mask over random weights
Differs: stacks the model as it is when its stage ends; when to grow, which the paper fits a law to, is the recipe's.
         G_learn (LiGO) is not here. In width, zero follows the paper's equations (old scales of norms shrink by the
         root of the growth), not its code, which leaves new channels a scale of zero; they start at one here, and eps
         shrinks too, so that the function stays. Copies are drawn evenly, the authors' at random, so that norms see
         what they saw and keep their scales, which the paper shrinks; how unequally copies are read is LEMON's measure
         in the authors' script. Random weights are not masked by width
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
from tutelage.methods._kit.widen import Copies, along, check, copies, expand, quieter, wider, writers_of

EPS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")
STD = 0.02  # of new weights where the configuration gives no initializer_range
Grown = tuple[dict[str, Any], dict[str, Tensor]]


class Stack(Method):
    times: int = Field(4, ge=1, description="how many times as many blocks; 1 keeps the depth")
    width: int = Field(1, ge=1, le=16, description="how many times as many channels, heads and neurons; 1 keeps them")
    new: Literal["copies", "zero", "random"] = Field(
        "copies",
        description="what is new: `copies` of the old (G_direct, stacked in depth), `zero` so that the function stays "
        "(G_zero), or `random` weights (G_random)",
    )

    no_off = "growing is a stage of its own"
    baseline = {"use": "grow/stack", "times": 1}
    on = {"times": 2}

    def keeps_function(self) -> bool:
        return (self.new == "zero" and self.times > 1) or (self.new != "random" and self.times == 1 and self.width > 1)

    def grow(self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any) -> Grown:
        if self.width > 1:
            config, tensors = self._widen(config, tensors, view)
        return self._deepen(config, tensors, view) if self.times > 1 else (config, tensors)

    def _deepen(self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any) -> Grown:
        stacks = stacks_of(config, tensors, by=self.name())
        each = {prefix: range(len(blocks)) for prefix, blocks in stacks.items()}
        if self.new == "copies":
            return deeper(config, tensors, {p: [*r] * self.times for p, r in each.items()}, by=self.name())
        if self.new == "random":
            config, grown = deeper(config, tensors, {p: [*r] * self.times for p, r in each.items()}, by=self.name())
            rng, std = view.rng("new blocks"), config.get("initializer_range", STD)
            norms = view.layout(config).norms
            for name in sorted(set(grown) - set(tensors)):
                grown[name] = fresh(grown[name], norm=name in norms, std=std, rng=rng)
            return config, grown
        # each block with its own copies right above it, as the authors' script for zero has them
        order = {p: [i for i in r for _ in range(self.times)] for p, r in each.items()}
        config, grown = deeper(config, tensors, order, by=self.name())
        writers = writers_of(view.layout(config))
        for name in writers:
            match = BLOCK.fullmatch(name)
            if match is not None and match[1] in order and int(match[2]) % self.times:
                grown[name] = torch.zeros_like(grown[name])
        return config, grown

    def _widen(self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any) -> Grown:
        wide = wider(config, self.width, by=self.name())
        small, large = view.layout(config), view.layout(wide)
        for name in tensors:
            check(name, small, large, by=self.name())
        copied = copies(small, large, view.rng("copies"))
        if self.new == "copies":
            blocks = max(map(len, stacks_of(config, tensors, by=self.name()).values())) * self.times
            rng, grown = view.rng("shares"), {}
            for name in sorted(tensors):
                axes = large.axes[name]
                noise = unequally(axes, times=self.width, blocks=blocks)
                grown[name] = expand(tensors[name], small.axes[name], axes, copied, noise=noise, rng=rng)
            quieter(grown, small, large, copied, by=self.name())
            return wide, grown
        shrink = 1.0
        if self.new == "zero":
            if any(name.endswith(".bias") for name in small.norms):
                raise UserError(
                    f"{self.name()}: norms of this model subtract a mean, which channels at zero would change; "
                    "`new: zero` widens models with RMSNorm, `new: copies` these too"
                )
            eps = next((key for key in EPS if key in wide), None)
            if eps is None:
                raise UserError(f"{self.name()}: the configuration gives none of {', '.join(EPS)}")
            wide, shrink = {**wide, eps: wide[eps] / self.width}, self.width**-0.5
        rng, std = view.rng("new units"), config.get("initializer_range", STD)
        return wide, {
            name: self._beside(name, tensors[name], small, large, copied, shrink=shrink, std=std, rng=rng)
            for name in sorted(tensors)
        }

    def _beside(
        self,
        name: str,
        weight: Tensor,
        small: Layout,
        large: Layout,
        copied: Copies,
        *,
        shrink: float,
        std: float,
        rng: torch.Generator,
    ) -> Tensor:
        """The old weight with new rows and columns beside it: random, or such that new units are zero."""
        axes = large.axes[name]
        whole = {space: torch.ones_like(count) for space, count in copied.count.items()}
        wide = expand(weight, small.axes[name], axes, Copies(copied.source, whole))
        written = torch.zeros(wide.shape, dtype=torch.bool)  # numbers of new outputs
        read = torch.zeros(wide.shape, dtype=torch.bool)  # numbers that new inputs are read with
        for dim, axis in enumerate(axes):
            if axis.space:
                added = along(axis.unit_N >= small.sizes[axis.space], dim, wide.ndim)
                read, written = (read | added, written) if axis.read else (read, written | added)
        new = fresh(wide, norm=name in small.norms, std=std, rng=rng)
        if name in small.norms:
            if axes[0].space != "hidden":
                return wide
            return torch.where(written, new, wide) * shrink
        if self.new == "zero":
            new = torch.where(written & ~read, 0.0, new).to(wide.dtype)
        return torch.where(written | read, new, wide)


def unequally(axes: tuple[Axis, ...], *, times: int, blocks: int) -> float:
    """The `noise` of `expand` at which a copy's share scatters by LEMON's measure, 1 / (√inputs · blocks).

    It is enough to part copies in training; equal ones without dropout would stay equal.
    """
    inputs = max((len(axis.unit_N) for axis in axes if axis.space and axis.read), default=0)
    return float(times / (1 - 1 / times) ** 0.5 / (inputs**0.5 * blocks)) if inputs else 0.0


def fresh(like: Tensor, *, norm: bool, std: float, rng: torch.Generator) -> Tensor:
    """Weights as of a new model: normal numbers, scales of norms at one, biases at zero."""
    if like.ndim == 1:
        return torch.ones_like(like) if norm else torch.zeros_like(like)
    return (torch.randn(like.shape, generator=rng) * std).to(like.dtype)


def effect(run: Seen) -> dict[str, float]:
    """How many times as many tensors there are, and the share of the added ones that equal one of another block."""
    start, end = run.start(), run.weights()
    added = [match for name in end if name not in start and (match := BLOCK.fullmatch(name))]
    like: dict[tuple[str, str], list[Tensor]] = {}
    for match in filter(None, map(BLOCK.fullmatch, start)):
        like.setdefault((match[1], match[3]), []).append(start[match[0]])
    copies = sum(any(end[m[0]].equal(t) for t in like.get((m[1], m[3]), [])) for m in added)
    return {"grown": len(end) / len(start), "copied": copies / len(added) if added else 0.0}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["grown"] > off["grown"] and on["copied"] == 1.0


BENCH = Bench(
    base="recipes/bench/grow.yaml",
    arm={"start": "grown"},
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
    scale="410 M to 7 B parameters, up to 750 B tokens",
)

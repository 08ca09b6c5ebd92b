"""bert2BERT: a wider model whose units are copies of a trained one's, made so that it answers as that one did.

Paper:   Chen et al. 2021 (bert2BERT), arXiv:2110.07143; the copies of Net2Net (Chen et al. 2015, arXiv:1511.05641)
Use:     width 1.5 to 2 at once; `fpi` keeps the function, `aki` breaks its symmetry and learned faster in the paper
         (38 % of the operations saved, against 30 %, before its two-stage training). Equal copies stay equal in
         training without dropout: with `fpi` set `noise` (0.1 to 0.5)
Works:   transformers models with a rotary, learned or no position embedding and torch's attention: Llama, Qwen2,
         GPT-2, GPT-NeoX, BERT and their like, with tied heads and grouped queries; no experts, no encoder-decoder
Costs:   one pass over the weights; to check a kept function, both models answer 8 tokens
With:    schedule/rewarm in the stage that follows; grow/stack for depth alone
Differs: channels are copied equally often, the paper draws copies with replacement, after which norms see other
         statistics; a width at which they must is refused unless `uneven`. A key/value head is copied with its query
         heads. A tied head reads what is divided in the norm before it, as the embedding itself is copied. The two-stage
         training (bottom blocks as sub-models first, drawn anew at each step) is not here: a stage trains one model.
         `noise` is not the paper's: it is Net2Net's, moved to where copies are read so that the function stays. `aki`
         takes the paper's equation for every layer of a block, so the channels that a block adds to the stream come
         from the next block's too, as its heads and neurons do; the last block, which has no next, is copied
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.types import Layout
from tutelage.methods._kit.blocks import BLOCK, deeper, stacks_of
from tutelage.methods._kit.widen import check, copies, expand, quieter, wider


class Bert2Bert(Method):
    width: float = Field(2.0, ge=1, le=16, description="times as many channels, heads and neurons; 1 keeps the width")
    depth: float = Field(
        1.0, ge=1, le=64, description="times as many blocks, stacked whole, then the last ones once more; 1 keeps them"
    )
    new: Literal["fpi", "aki"] = Field(
        "fpi", description="what added outputs take: this layer's (`fpi`, keeps the function), the next one's (`aki`)"
    )
    uneven: bool = Field(False, description="allow a width that copies some channels more often than others")
    noise: float = Field(0.0, ge=0, le=1, description="how unequally copies of a unit are read; 0 equally, sums stay")

    no_off = "growing is a stage of its own"
    baseline = {"use": "grow/bert2bert", "width": 1}
    on = {"width": 2}

    def keeps_function(self) -> bool:
        return self.new == "fpi" and self.depth == 1 and self.width > 1 and not self.uneven

    def grow(
        self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self.width > 1:
            config, tensors = self._widen(config, tensors, view)
        if self.depth > 1:
            config, tensors = self._deepen(config, tensors)
        return config, tensors

    def _widen(
        self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        wide = wider(config, self.width, by=self.name())
        small, large = view.layout(config), view.layout(wide)
        copied = copies(small, large, view.rng("copies"))
        if not copied.even("hidden") and not self.uneven:
            raise UserError(
                f"{self.name()}: width {self.width:g} copies some channels more often than others, so norms would see "
                "other statistics and the function would change; take a whole number, or set `uneven: true`"
            )
        rng = view.rng("noise")
        grown = {}
        for name, weight in tensors.items():
            check(name, small, large, by=self.name())
            axes = small.axes[name], large.axes[name]
            grown[name] = expand(weight, *axes, copied, noise=self.noise, rng=rng)
            if self.new == "aki" and (above := self._above(name, tensors, small)) is not None:
                grown[name] = advanced(grown[name], expand(above, *axes, copied), small, large, name)
        quieter(grown, small, large, copied, by=self.name())
        return wide, grown

    @staticmethod
    def _above(name: str, tensors: dict[str, Tensor], layout: Layout) -> Tensor | None:
        """The same weight of the next block; none for norms, for the last block and outside of blocks."""
        match = BLOCK.fullmatch(name)
        if match is None or match[1] not in layout.blocks or name in layout.norms:
            return None
        above = tensors.get(f"{match[1]}.{int(match[2]) + 1}.{match[3]}")
        return above if above is not None and above.shape == tensors[name].shape else None

    def _deepen(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        order = {}
        for prefix, blocks in stacks_of(config, tensors, by=self.name()).items():
            count = len(blocks) * self.depth
            if abs(count - round(count)) > 1e-6:
                raise UserError(
                    f"{self.name()}: depth {self.depth:g} of {len(blocks)} blocks is {count:g}, no whole number"
                )
            whole, rest = divmod(round(count), len(blocks))
            order[prefix] = [*range(len(blocks))] * whole + [*range(len(blocks))][len(blocks) - rest :]
        return deeper(config, tensors, order, by=self.name())


def advanced(own: Tensor, above: Tensor, small: Layout, large: Layout, name: str) -> Tensor:
    """Advanced knowledge: a wide weight whose added outputs are those of the wide weight of the next block.

    Both have their inputs expanded already; the outputs of the small model's own units stay.
    """
    for dim, axis in enumerate(large.axes[name]):
        if axis.space and not axis.read:
            added_N = axis.unit_N >= small.sizes[axis.space]
            own = torch.where(added_N.view([-1 if i == dim else 1 for i in range(own.ndim)]), above, own)
    return own


def effect(run: Seen) -> dict[str, float]:
    """How many times as many numbers there are, and bits per byte as they were measured when the model was made."""
    start, end = run.start(), run.weights()
    numbers = sum(t.numel() for t in end.values()) / sum(t.numel() for t in start.values())
    measured = [row["values"] for row in run.rows if row["kind"] == "eval"][-1]
    bits = [value for key, value in measured.items() if key.startswith("bits_per_byte/")]
    return {"numbers": numbers, "bits": sum(bits) / len(bits)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Much larger, and the same function."""
    return on["numbers"] > 1.5 * off["numbers"] and abs(on["bits"] - off["bits"]) < 1e-4


BENCH = Bench(
    base="recipes/bench/widen.yaml",
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
    scale="110 M parameters (BERT and GPT base) from models of two thirds their width, whose own training is not counted",
)

"""SVFit: of each linear layer's weight only the first singular values are trained; all singular vectors stay.

Paper:   Sun et al. 2024, arXiv:2409.05926
Use:     r null (every singular value: 768 numbers for a matrix 768 wide, where LoRA of rank 8 has 12,288) or the first of them;
         a higher rate than LoRA's, as few numbers move, each a whole direction
Works:   any model with linear layers (GPT-2's Conv1D too); experts in one 3-D tensor stay frozen
Costs:   r trained numbers a layer, with gradients and optimizer states for these alone; but both sides' first r singular
         vectors are held beside the weight, which is more than the weight at full r, and one decomposition a layer at the start
With:    PEFT has no format for it: `model/` is exported with the values folded in
Differs: the paper's W = W_r + W_e, of which W_e stays and only the values of W_r are trained, is written otherwise: singular
         vectors and values are kept beside the whole weight, and values act by how far they moved, so that the model answers
         at the start as it did, to the bit. `rest: dropped` leaves W_r alone, as its abstract can be read. The two are one at
         full r, with which its figure of 16 times fewer parameters is met. All linear layers of the blocks are wrapped by
         default. The decomposition is in float32
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tutelage.base.method import Bench, Seen
from tutelage.methods._kit.blocks import BLOCK
from tutelage.methods._kit.wrapping import Wrapping, outputs_first, turned


class SVFit(Wrapping):
    r: int | None = Field(None, ge=1, description="singular values that are trained, the largest; all when left out")
    rest: Literal["kept", "dropped"] = Field("kept", description="what becomes of the weight beyond its first r")

    no_off = "without it the weights themselves are trained"
    baseline = {}
    on = {"r": 24}

    def wrap(self, layer: nn.Module, name: str, view: Any) -> nn.Module | None:
        if name not in self.chosen(view.engine.anatomy):
            return None
        return SingularValues(layer, r=self.r, keep=self.rest == "kept")

    def trains(self, name: str) -> bool:
        return name == "values"

    @torch.no_grad()
    def fold(self, module: Any) -> Tensor:
        """The layer's weight with its singular values as they are now, in the layer's own layout."""
        weight = outputs_first(module.base_layer) + module.change()
        return weight.T if turned(module.base_layer) else weight


class SingularValues(nn.Module):
    """x → W x + U (σ - σ₀) Vᵀ x, of which σ is trained. Shapes: M outputs, N inputs, R singular values."""

    first_R: Tensor
    left_MR: Tensor
    right_RN: Tensor

    def __init__(self, layer: nn.Module, *, r: int | None, keep: bool) -> None:
        super().__init__()
        weight_MN = outputs_first(layer)
        left_MS, values_S, right_SN = torch.linalg.svd(weight_MN.detach().float(), full_matrices=False)
        kind = {"dtype": weight_MN.dtype, "device": weight_MN.device}
        self.base_layer = layer
        self.values = nn.Parameter(values_S[:r].to(**kind).clone())
        self.register_buffer("first_R", self.values.detach().clone())
        self.register_buffer("left_MR", left_MS[:, :r].to(**kind).contiguous())
        self.register_buffer("right_RN", right_SN[:r].to(**kind).contiguous())
        if not keep:
            with torch.no_grad():
                weight_MN.copy_((self.left_MR * self.first_R) @ self.right_RN)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.linear(x, self.right_RN) * (self.values - self.first_R)
        moved: Tensor = self.base_layer(x) + nn.functional.linear(inner, self.left_MR)
        return moved

    def change(self) -> Tensor:
        """What is added to the weight, [M, N]."""
        added: Tensor = (self.left_MR * (self.values - self.first_R)) @ self.right_RN
        return added


def effect(run: Seen) -> dict[str, float]:
    """Of each matrix in blocks that moved: the directions it moved along, and how much of the change is between directions.

    Directions are pairs of singular vectors of the weight that it began with; `between` is of the change's norm.
    """
    start, end = run.start(), run.weights()
    counts, between = [0.0], []
    for name, before in start.items():
        change = end[name].double() - before.double()
        if before.ndim != 2 or not change.any() or not BLOCK.fullmatch(name):
            continue
        left, _, right = torch.linalg.svd(before.float(), full_matrices=False)
        along = left.double().T @ change @ right.double().T
        own = along.diagonal()
        counts.append(float((own.abs() > 1e-5 * own.abs().max()).sum()))
        between.append(float((change.square().sum() - own.square().sum()).clamp(min=0).sqrt() / change.norm()))
    return {"directions": max(counts), "between": max(between, default=1.0)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Singular values moved, r of them at most, and no singular vector turned."""
    return 0 < on["directions"] <= SVFit.on["r"] < off["directions"] and on["between"] < 0.01 < 0.5 < off["between"]


# The paper's claim at its own numbers: LoRA of rank 8 trains 16 times as much of a square matrix as this does at full r.
BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"methods": [{"use": "param/svfit"}]},
    baseline={"methods": [{"use": "param/lora", "r": 8, "alpha": 16}]},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-1, 3e-1, 1.0]},
    tune_baseline={"optim.lr": [3e-3, 1e-2, 3e-2]},
    scale="language understanding, image classification and text-to-image generation",
)

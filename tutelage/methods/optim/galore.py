"""GaLore: each matrix's gradient in the subspace of its first singular vectors, and Adam's states only there.

Paper:   Zhao et al. 2024, arXiv:2403.03507
Use:     rank a quarter to a half of the width; refresh 50 to 1,000 steps; scale 0.25, so that lr 1e-2 moves the
         matrices a quarter as fast as the rest, which AdamW trains
Works:   any model with matrices in blocks (GPT-2's transposed ones too); experts in one 3-D tensor go to AdamW
Costs:   r·min + 2·r·max numbers for a matrix where AdamW keeps 2·min·max; a singular value decomposition every `refresh`
         steps, on a CPU as long as a few steps
With:    `engine: {clip: null, fused_backward: true}` is the paper's per-layer update: no gradients in memory
Differs: states are not held in 8 bits; epsilon is 1e-6 and comes before bias correction, and a square matrix is projected
         from its right, as in the authors' code (the paper: 1e-8, after it, from the left). AdamW of the rest is torch's,
         whose weights decay before the update and whose epsilon comes after bias correction
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tutelage.base.method import Bench, Seen
from tutelage.methods._kit.lowrank import LowRank, back, seen


class GaLore(LowRank):
    on = {"rank": 4, "refresh": 6, "decay": 0.0}  # two subspaces in the toy's twelve steps

    def update(self, grad_MN: Tensor, low: Tensor, step: Tensor, state: dict[str, Any]) -> Tensor:
        return back(step, state["basis"], grad_MN.shape).mul_(self.scale)


def effect(run: Seen) -> dict[str, float]:
    return seen(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """More is learned than one subspace holds, no more than two do, with a fraction of the states."""
    rank = GaLore.on["rank"]
    return rank < on["rank"] <= 2 * rank < off["rank"] and on["kept"] < 0.25 * off["kept"]


# Its table 2: from scratch, at equal rank, beside LoRA, whose embeddings and norms are trained as its are.
BENCH = Bench(
    base="recipes/bench/from-scratch.yaml",
    arm={"optim": {"use": "optim/galore", "rank": 32, "refresh": 50}},
    baseline={
        "methods": [{"use": "param/lora", "r": 32, "alpha": 32}],
        "train": ["re:lora_[AB]|embed|norm"],
        "optim": {"use": "optim/adamw", "decay": 0.0, "betas": [0.9, 0.999]},
    },
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.02,
    tune={"optim.lr": [3e-3, 1e-2, 3e-2]},
    tune_baseline={"optim.lr": [3e-3, 1e-2, 3e-2]},
    scale="60 M to 7 B parameters, 1.1 to 19.7 B tokens of C4",
)

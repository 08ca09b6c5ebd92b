"""SLTrain: each linear weight is a low-rank product plus a sparse matrix at random fixed places, from scratch.

The weight itself is never held between steps: it is put together for a product and once more for its gradients.

Paper:   Han et al. 2024, arXiv:2406.02214
Use:     r a quarter to a third of the width, density 0.03 (0.05 in 7 B parameters), alpha / r from 1/4 down as models grow; AdamW
         without decay, lr 3e-3; with what is not a block's linear layer (embeddings, norms, head) trained as ever
Works:   any model with linear layers (GPT-2's Conv1D too); experts in one 3-D tensor stay as they are
Costs:   (m + n)·r + d·m·n numbers trained for m·n, where d is the density, and 4 bytes for each place; a step takes
         4·m·n·r multiplications more for a micro-batch: to put the weight together, once more in backward, and for the
         gradients of both factors
With:    `engine: {clip: null, fused_backward: true}` is the paper's per-layer update; optimizer states are not in 8 bits here.
         The stage after it has whole weights
Differs: on a start from trained weights these are held frozen, and product and sparse matrix are added to them, from 0; from
         fresh ones they are put in their place, as in the paper. Places are held in 32 bits where the paper takes 64. With
         density 0 (nothing but a low-rank product, its baseline) B begins as A does, for nothing would move from B = 0. A
         bias stays as the model has it, where their code draws it anew. What is put together again in backward is PyTorch's
         checkpointing, not a kernel of its own
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tutelage.base.method import Bench, Seen
from tutelage.methods._kit.blocks import BLOCK
from tutelage.methods._kit.wrapping import Wrapping, outputs_first, turned


class SparsePlusLowRank(Wrapping):
    r: int = Field(128, ge=1, description="rank of the product, at most a matrix's smaller side")
    alpha: float = Field(32.0, description="the product is multiplied by alpha / r")
    density: float = Field(0.03, ge=0, lt=1, description="share of a matrix's entries that the sparse part has")

    no_off = "without it the weights themselves are trained"
    baseline = {}
    on = {"r": 2, "alpha": 2.0, "density": 0.1}
    freezes = False

    def wrap(self, layer: nn.Module, name: str, view: Any) -> nn.Module | None:
        if name not in self.chosen(view.engine.anatomy):
            return None
        return Factors(layer, self, view.rng(f"sltrain|{name}"), fresh=view.fresh)

    def trains(self, name: str) -> bool:
        return name != "held"

    @torch.no_grad()
    def fold(self, module: Any) -> Tensor:
        """The weight that the factors stand for, in the layer's own layout."""
        weight: Tensor = module.whole()
        return weight.T if module.turned else weight


class Factors(nn.Module):
    """x → (W₀ + α/r B A + S) x + bias, S being `values` at `places`. Shapes: M outputs, N inputs, K places.

    `held` is W₀, the frozen weight that a stage began with, in the layer's own layout; there is none from fresh weights.
    """

    places: Tensor

    def __init__(self, layer: Any, settings: SparsePlusLowRank, rng: torch.Generator, *, fresh: bool) -> None:
        super().__init__()
        weight_MN = outputs_first(layer)
        m, n = weight_MN.shape
        r = min(settings.r, m, n)
        kind: dict[str, Any] = {"dtype": weight_MN.dtype, "device": weight_MN.device}
        count = int(settings.density * m * n)
        self.shape, self.scale, self.turned = (m, n), settings.alpha / r, turned(layer)
        self.factor_A = nn.Linear(n, r, bias=False, **kind)
        self.factor_B = nn.Linear(r, m, bias=False, **kind)
        self.bias: nn.Parameter | None = layer.bias
        self.held: nn.Parameter | None = None if fresh else layer.weight
        self.values = nn.Parameter(torch.empty(count, **kind))
        whole = torch.int32 if m * n < 2**31 else torch.int64
        self.register_buffer("places", torch.empty(count, dtype=whole, device=kind["device"]))
        if not weight_MN.is_meta:
            self.begin(rng)
        if fresh:
            layer.weight = nn.Parameter(torch.empty(0, **kind))  # let go of until the stage ends

    @torch.no_grad()
    def begin(self, rng: torch.Generator) -> None:
        """Draw the places, and fill the factors and values as the authors do; beside a held weight what adds nothing."""
        (m, n), count = self.shape, len(self.values)
        self.places.copy_(torch.randperm(m * n, generator=rng)[:count].sort()[0])
        uniform(self.factor_A.weight, 1 / math.sqrt(n), rng)
        uniform(self.values, 1 / math.sqrt(n) if self.held is None else 0.0, rng)
        self.factor_B.weight.zero_()
        if self.held is None and not count:
            uniform(self.factor_B.weight, 1 / math.sqrt(self.factor_A.out_features), rng)

    def whole(self) -> Tensor:
        """The weight, [M, N], in the parameters' own type."""
        with torch.autocast(self.values.device.type, enabled=False):
            product_MN = self.scale * (self.factor_B.weight @ self.factor_A.weight)
            if self.held is not None:
                product_MN = product_MN + (self.held.T if self.turned else self.held)
            return product_MN.flatten().scatter_add(0, self.places.long(), self.values).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        def product(x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.whole(), self.bias)

        if not torch.is_grad_enabled():
            return product(x)
        made: Tensor = checkpoint(product, x, use_reentrant=False, preserve_rng_state=False)
        return made


def uniform(tensor: Tensor, bound: float, rng: torch.Generator) -> None:
    """Fill with numbers between -bound and bound: with 1/√inputs what `kaiming_uniform_(a=√5)` draws."""
    tensor.copy_((torch.rand(tensor.shape, generator=rng) * 2 - 1) * bound)


def effect(run: Seen) -> dict[str, float]:
    """Of blocks' matrices: the mean rank of what was added, the share of entries it reached, and Adam's numbers a weight."""
    start, end = run.start(), run.weights()
    names = [name for name, t in start.items() if t.ndim == 2 and BLOCK.fullmatch(name)]
    ranks = [float(torch.linalg.matrix_rank(end[name].double() - start[name].double(), rtol=1e-5)) for name in names]
    reached = [float((end[name] != start[name]).double().mean()) for name in names]
    owners = {name.removesuffix(".weight") for name in names}
    newest = max((run.folder / "state").glob("*/optimizer.safetensors"))
    kept = 0
    with safe_open(str(newest), framework="pt") as read:
        for key in read.keys():  # noqa: SIM118 - no mapping
            if any(key.startswith(f"{owner}.") for owner in owners) and ".bias|" not in key:
                kept += math.prod(read.get_slice(key).get_shape())
    weights = sum(start[name].numel() for name in names)
    return {"rank": sum(ranks) / len(ranks), "reached": min(reached), "kept": kept / weights}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """More is learned than any product of that rank holds, and anywhere in a matrix, with a fraction of the states."""
    both = on["rank"] > 3 * SparsePlusLowRank.on["r"] and on["reached"] > 0.9
    return both and on["kept"] < 0.6 * off["kept"]


# What the sparse part brings at one rank, the paper's first finding; that it comes near full rank is told by the report.
BENCH = Bench(
    base="recipes/bench/from-scratch.yaml",
    arm={
        "methods": [{"use": "param/sparse_plus_lowrank", "r": 32, "alpha": 8, "density": 0.03}],
        "optim": {"use": "optim/adamw", "decay": 0.0},
    },
    baseline={
        "methods": [{"use": "param/sparse_plus_lowrank", "r": 32, "alpha": 32, "density": 0.0}],
        "optim": {"use": "optim/adamw", "decay": 0.0},
    },
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.02,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="60 M to 7 B parameters, 1.1 to 13.1 B tokens of C4",
)

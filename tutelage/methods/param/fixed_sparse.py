"""Fixed sparsity: most entries of each matrix are 0 from the start and stay so, until a later stage without it trains them all.

Sparse pre-training and dense fine-tuning: the recipe has it in the first stage and not in the next, where the zeros learn.

Paper:   Thangarasa et al. 2023 (SPDF), arXiv:2303.10464
Use:     in a stage from fresh weights; sparsity 0.5 to 0.75, the larger the model and the easier what follows, the more;
         the rate of dense training
Works:   any model with blocks; whole weights, not under a wrapper such as param/lora
Costs:   here as much as dense training, and a mask of a byte a weight: products with zeros are computed as any others.
         Hardware that skips them would do a share of 1 - sparsity of the blocks' products; probe/sparse_flops tells both
With:    probe/sparse_flops; on a trained start it is pruning at random
Differs: nothing in what is trained: matrices of the blocks alone, equally sparse, at random places drawn once; weights that
         are left begin as in a dense model. Only the saving of operations is not had: it is the paper's hardware's
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.blocks import BLOCK

SPARSE = frozenset({"matrix", "expert"})


class FixedSparse(Method):
    sparsity: float = Field(0.75, ge=0, lt=1, description="share of each matrix's entries that are 0 and stay so")

    off = {"sparsity": 0.0}
    on = {"sparsity": 0.75}

    def begin(self, model: nn.Module, view: Any) -> None:
        """Draw the places, and empty them."""
        parts, params = view.engine.anatomy, view.engine.params
        names = [name for name in params if parts.block_index(name) is not None and parts.role(name) in SPARSE]
        if not names:
            raise UserError(
                f"{self.name()}: this stage trains no whole matrix of a block; leave the wrapper (param/lora) or it out"
            )
        self.state["zero"] = {
            name: places(params[name].shape, self.sparsity, view.rng(f"zero|{name}")).to(params[name].device)
            for name in names
        }
        self.after(params, view)

    def grads(self, grads: dict[str, Tensor], view: Any) -> None:
        """So that neither the norm that clipping sees nor an optimizer's means know of them."""
        self._empty(grads)

    @torch.no_grad()
    def after(self, params: dict[str, Tensor], view: Any) -> None:
        self._empty(params)

    def _empty(self, tensors: dict[str, Tensor]) -> None:
        for name, zero in self.state["zero"].items():
            if name in tensors:
                tensors[name].masked_fill_(zero, 0.0)


def places(shape: torch.Size, sparsity: float, rng: torch.Generator) -> Tensor:
    """Which entries are 0: exactly `sparsity` of them, rounded, every set of so many as likely as any other."""
    zero = torch.zeros(shape, dtype=torch.bool)
    count = round(sparsity * zero.numel())
    zero.view(-1)[torch.randperm(zero.numel(), generator=rng)[:count]] = True
    return zero


def effect(run: Seen) -> dict[str, float]:
    """Of blocks' matrices, the share of entries that are 0 at the end, least and most; of all else, the most."""
    inside, beside = [], [0.0]
    for name, tensor in run.weights().items():
        share = float((tensor == 0).float().mean())
        if BLOCK.fullmatch(name) and tensor.ndim >= 2:
            inside.append(share)
        elif tensor.ndim >= 2:
            beside.append(share)
    return {"least": min(inside), "most": max(inside), "beside": max(beside)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Every matrix is as sparse as was asked, trained or not, and nothing else is."""
    asked = FixedSparse.on["sparsity"]
    return abs(on["least"] - asked) < 0.01 and abs(on["most"] - asked) < 0.01 and max(on["beside"], off["most"]) < 0.01


# The paper finds dense fine-tuning as good after either pretraining: `no effect` is what it claims, `opposite` is a loss.
BENCH = Bench(
    base="recipes/bench/sparse.yaml",
    arm={"start": "sparse"},
    baseline={"start": "one"},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.02,
    tune={"optim.lr": [1e-3, 3e-3]},
    tune_baseline={"optim.lr": [1e-3, 3e-3]},
    scale="GPT-2 and GPT-3 XL, 125 M and 1.3 B parameters",
)

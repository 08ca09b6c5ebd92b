"""Adam in the subspace of a gradient's first singular vectors: what GaLore and those that build on it share.

A matrix's gradient is projected from its smaller side, so that what is kept is r·min + 2·r·max numbers. Shapes: m rows,
n columns of a weight, r its rank; s is the smaller and l the larger of m and n.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from tutelage.base.method import Method
from tutelage.methods._kit.optim import Joined, decayed, parted

BLOCK = re.compile(r"\.\d+\.")  # in the name of a parameter that lies in a block


class LowRank(Method):
    """An optimizer of blocks' matrices in low rank, and of all the rest by AdamW. A method adds its `update`."""

    lr: float = Field(1e-2, ge=0, description="learning rate at the schedule's peak; of the rest too")
    rank: int = Field(128, ge=1, description="dimensions of the subspace, at most a matrix's smaller side")
    refresh: int = Field(200, ge=1, description="steps between two singular value decompositions of a gradient")
    scale: float = Field(0.25, gt=0, description="factor on the update when it is projected back")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the mean gradient and of its square")
    eps: float = Field(1e-6, gt=0, description="added to the root of the mean square")
    decay: float = Field(0.0, ge=0, description="weight decay of matrices and embeddings, times the rate")

    no_off = "a stage always has an optimizer"
    baseline = {"use": "optim/adamw"}
    separable = True
    steerable = frozenset({"decay", "scale"})

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        parts: list[torch.optim.Optimizer] = []
        low, rest = ([self._set(group) for group in side] for side in parted(groups, is_projected))
        if low:
            parts.append(_Projected(low, self))
        if rest:
            parts.append(torch.optim.AdamW(rest, lr=self.lr, betas=self.betas, eps=self.eps, fused=True))
        return Joined(parts)

    def _set(self, group: dict[str, Any]) -> dict[str, Any]:
        return {**group, "lr": self.lr * group["rate"], **self.settings(group)}

    def settings(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"weight_decay": decayed(group, self.decay)}

    def update(self, grad_MN: Tensor, low: Tensor, step: Tensor, state: dict[str, Any]) -> Tensor:
        """What the rate is multiplied with, [m, n]: from the gradient, the projected one and Adam's step for that."""
        raise NotImplementedError


def is_projected(role: str, p: Tensor) -> bool:
    return role == "matrix" and p.ndim == 2


class _Projected(torch.optim.Optimizer):
    """Adam on projected gradients. A parameter's state: `step`, `basis`, `low_avg`, `low_avg_sq` and what `update` adds.

    As in the authors' code a new basis comes after every `refresh` steps, the first at once; the means stay as they are
    when it does (so the signs that the decomposition gives its vectors matter); epsilon is added before bias
    correction; weights decay after the update.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: LowRank) -> None:
        super().__init__(groups, {"lr": settings.lr, "weight_decay": settings.decay})
        self.settings = settings

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        s, state, grad_MN = self.settings, self.state[p], p.grad
        assert grad_MN is not None
        rank = min(s.rank, *p.shape)
        if "basis" not in state or rank not in state["basis"].shape:  # none yet, or another optimizer's
            state.clear()
        done = int(state.get("step", 0))
        if done % s.refresh == 0:
            state["basis"] = basis_of(grad_MN, rank)
        low = project(grad_MN, state["basis"])
        if not done:
            state["low_avg"], state["low_avg_sq"] = torch.zeros_like(low), torch.zeros_like(low)
        state["step"] = torch.tensor(float(done + 1))
        first, second = s.betas
        mean = state["low_avg"].mul_(first).add_(low, alpha=1 - first)
        square = state["low_avg_sq"].mul_(second).addcmul_(low, low, value=1 - second)
        update_MN = s.update(grad_MN, low, mean / square.sqrt().add_(s.eps), state)
        p.add_(update_MN.to(p.dtype), alpha=-corrected(group["lr"], done + 1, s.betas))
        if group["weight_decay"]:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def corrected(rate: float, steps: int, betas: tuple[float, float]) -> float:
    """A rate times what Adam's step needs because both of its means began at 0."""
    first, second = betas
    return rate * math.sqrt(1 - second**steps) / (1 - first**steps)


def from_right(shape: torch.Size) -> bool:
    """Whether a matrix is projected from its right side, the smaller one (also a square's)."""
    return shape[0] >= shape[1]


def basis_of(grad_MN: Tensor, rank: int) -> Tensor:
    """The gradient's first singular vectors of its smaller side: [r, n] from the right, [m, r] from the left.

    No numbers where the gradient holds some that are none, so that the loop finds the step unsound, as with Adam.
    """
    right = from_right(grad_MN.shape)
    try:
        left_MS, _, right_SN = torch.linalg.svd(grad_MN.float(), full_matrices=False)
    except torch.linalg.LinAlgError:
        shape = (rank, grad_MN.shape[1]) if right else (grad_MN.shape[0], rank)
        return torch.full(shape, math.nan, device=grad_MN.device, dtype=grad_MN.dtype)
    found = right_SN[:rank] if right else left_MS[:, :rank]
    return found.to(grad_MN.dtype).clone(memory_format=torch.contiguous_format)  # a view would hold all the vectors


def project(grad_MN: Tensor, basis: Tensor) -> Tensor:
    """[m, r] from the right, [r, n] from the left."""
    return grad_MN @ basis.T if from_right(grad_MN.shape) else basis.T @ grad_MN


def back(low: Tensor, basis: Tensor, shape: torch.Size) -> Tensor:
    """From the subspace to [m, n]."""
    return low @ basis if from_right(shape) else basis @ low


def seen(run: Any) -> dict[str, float]:
    """Of blocks' matrices in a finished run: the mean rank of what was added, and numbers kept for each weight."""
    start, end = run.start(), run.weights()
    names = [name for name, t in start.items() if t.ndim == 2 and BLOCK.search(name) and name in end]
    ranks = [float(torch.linalg.matrix_rank(end[name].double() - start[name].double(), rtol=1e-5)) for name in names]
    newest = max((run.folder / "state").glob("*/optimizer.safetensors"))
    with safe_open(str(newest), framework="pt") as read:
        keys = [key for key in read.keys() if key.rpartition("|")[0] in names]  # noqa: SIM118 - no mapping
        kept = sum(math.prod(read.get_slice(key).get_shape()) for key in keys)
    return {"rank": sum(ranks) / len(ranks), "kept": kept / sum(start[name].numel() for name in names)}

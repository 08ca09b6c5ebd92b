"""Matrices and their singular values: orthogonalizing one, and in how many directions training moved the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The quintic whose slope at zero is steepest (Jordan et al. 2024): it takes singular values to about 0.7 … 1.2.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonal(x: Tensor, *, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """The nearest (semi-)orthogonal matrix, roughly: U Vᵀ of x's singular value decomposition, by Newton–Schulz.

    x is one matrix or a stack of them along the first dimension. bfloat16 on a GPU, where it is fast; else float32.
    """
    y: Tensor = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    tall = y.shape[-2] > y.shape[-1]
    if tall:
        y = y.mT
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = A * y + (B * gram + C * gram @ gram) @ y
    return y.mT if tall else y


def effective_rank(values: Tensor) -> Tensor:
    """Roy and Vetterli 2007: exp of the entropy of the singular values as shares of their sum, along the last dimension.

    Between 1 and their number; 0 of a matrix of zeros.
    """
    whole = values.sum(-1, keepdim=True)
    shares = values / whole.clamp(min=torch.finfo(values.dtype).tiny)
    entropy = -torch.xlogy(shares, shares).sum(-1)
    return torch.where(whole[..., 0] > 0, entropy.exp(), 0.0)


def change(run: Any) -> dict[str, float]:
    """The mean stable rank of what a finished run added to each matrix, as a share of full (a method's effect)."""
    start, end = run.start(), run.weights()
    shares = []
    for name, before in start.items():
        if before.ndim == 2 and min(before.shape) > 1 and name in end:
            moved = end[name].float() - before.float()
            largest = torch.linalg.matrix_norm(moved, ord=2).square()
            if largest > 0:
                shares.append(float(moved.square().sum() / largest) / min(before.shape))
    return {"stable_rank": sum(shares) / len(shares) if shares else 0.0}

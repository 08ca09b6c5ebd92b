"""Blocks whose weights lie on a line over depth: block l of L has θ_B + (l / L) · θ_A (Xia et al. 2023, arXiv:2312.05614)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def kinds(names: Iterable[str], stacks: Mapping[str, int]) -> dict[str, list[str]]:
    """For each weight that every block of a list has (`prefix.rest`), its names from the first block to the last.

    `stacks` gives the lists of blocks: their dotted names and lengths.
    """
    there, found = set(names), {}
    for prefix, count in stacks.items():
        first = f"{prefix}.0."
        for name in sorted(n for n in there if n.startswith(first)):
            line = [f"{prefix}.{i}.{name.removeprefix(first)}" for i in range(count)]
            if there.issuperset(line):
                found[f"{prefix}.{name.removeprefix(first)}"] = line
    return found


def slope(first: Tensor, last: Tensor, count: int) -> Tensor:
    """θ_A of the line through the first and the last of `count` blocks; θ_B is the first one."""
    return (last - first) * (count / (count - 1))


def point(base: Tensor, slope: Tensor, block: int, count: int) -> Tensor:
    """θ_B + (l / L) · θ_A."""
    return base + (block / count) * slope


def apart(line: Sequence[Tensor]) -> float:
    """How far blocks lie from the line through the first and the last, beside the largest number among them."""
    exact = [tensor.double() for tensor in line]
    rise, size = slope(exact[0], exact[-1], len(exact)), max(float(t.abs().max()) for t in exact)
    off = [float((t - point(exact[0], rise, i, len(exact))).abs().max()) for i, t in enumerate(exact)]
    return max(off) / size if size else 0.0


def exact_to(dtype: torch.dtype) -> float:
    """How far from a line numbers of a type may lie because of their rounding."""
    return 2 * torch.finfo(dtype).eps

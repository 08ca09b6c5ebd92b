"""Wider models: which unit of the small model each unit of the wide one comes from, weight by weight.

Spaces and axes are those of `core.types.Layout`. A copied unit's outputs are copies; whatever reads units divides by how
often each was copied, so that its sums stay. Heads keep their size, and a key/value head is copied with its query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.core.types import Axis, Layout

HIDDEN = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
SHARED = ("num_key_value_heads",)
INNER = ("intermediate_size", "n_inner", "d_ff", "ffn_dim")
SIZE = "head_dim"


def wider(config: dict[str, Any], factor: float, *, by: str) -> dict[str, Any]:
    """The configuration with `factor` times as many channels, heads and neurons; heads keep their size.

    Raises `UserError` where a product is no whole number, or the configuration names no width.
    """

    def first(keys: tuple[str, ...]) -> str:
        found = next((key for key in keys if isinstance(config.get(key), int)), None)
        if found is None:
            raise UserError(f"{by}: the configuration gives none of {', '.join(keys)}")
        return found

    hidden, heads = first(HIDDEN), first(HEADS)
    keys = [hidden, heads, *(key for key in (*SHARED, *INNER) if isinstance(config.get(key), int))]
    size = {SIZE: config.get(SIZE) or config[hidden] // config[heads]} if SIZE in config else {}
    grown = {}
    for key in keys:
        product = config[key] * factor
        if abs(product - round(product)) > 1e-6:
            raise UserError(f"{by}: width {factor:g} of {key} {config[key]} is {product:g}, which is no whole number")
        grown[key] = round(product)
    return {**config, **grown, **size}


@dataclass(frozen=True)
class Copies:
    """For each space, the unit that every unit of the wide model is a copy of, and how often each was copied."""

    source: dict[str, Tensor]
    count: dict[str, Tensor]

    def even(self, space: str) -> bool:
        """Whether all units were copied equally often."""
        return bool((self.count[space] == self.count[space][0]).all())


def copies(small: Layout, large: Layout, rng: torch.Generator) -> Copies:
    """Each unit once in its place, then again in order as often as all fit, then chance picks which come once more."""
    source, count = {}, {}
    for space, n in small.sizes.items():
        whole, rest = divmod(large.sizes[space], n)
        more = torch.randperm(n, generator=rng)[:rest].sort().values
        source[space] = torch.cat([torch.arange(n).repeat(whole), more])
        count[space] = torch.bincount(source[space], minlength=n)
    return Copies(source, count)


def check(name: str, small: Layout, large: Layout, *, by: str) -> None:
    """Refuse a weight that grows in a way nobody knows."""
    if name not in small.axes or name not in large.axes:
        raise UserError(f"{by}: {name} is no weight of the model that the configuration describes")
    for i, (a, b) in enumerate(zip(small.axes[name], large.axes[name], strict=True)):
        if not a.space and len(a.unit_N) != len(b.unit_N):
            raise UserError(
                f"{by}: axis {i} of {name} grows from {len(a.unit_N)} to {len(b.unit_N)} with the width, and what it "
                "counts is not known"
            )


def places(small: Axis, large: Axis, source_N: Tensor) -> Tensor:
    """For every place of the wide axis the place of the small one that it is a copy of."""
    parts = int(small.part_N.max()) + 1
    where = torch.full((len(source_N) * parts,), -1)
    where[small.unit_N * parts + small.part_N] = torch.arange(len(small.unit_N))
    found = where[source_N[large.unit_N] * parts + large.part_N]
    assert int(found.min()) >= 0, "the wide model's axis has parts that the small one's has not"
    return found


def expand(
    weight: Tensor,
    small: tuple[Axis, ...],
    large: tuple[Axis, ...],
    copied: Copies,
    *,
    noise: float = 0.0,
    rng: torch.Generator | None = None,
) -> Tensor:
    """One weight of the wide model. Sums over copied inputs are as before: each copy has its share of the weight.

    noise: how unequal the shares of one input's copies are, as a standard deviation relative to an equal share
    """
    wide = weight.double() if weight.dtype == torch.float64 else weight.float()
    for dim, (a, b) in enumerate(zip(small, large, strict=True)):
        if a.space:
            wide = wide.index_select(dim, places(a, b, copied.source[a.space]))
    for dim, (a, b) in enumerate(zip(small, large, strict=True)):
        if not (a.space and a.read):
            continue
        from_N = places(a, b, copied.source[a.space])
        count_N = copied.count[a.space][a.unit_N][from_N].to(wide)
        if noise:
            assert rng is not None
            wide = wide * uneven(wide.shape, dim, from_N, count_N, noise=noise, rng=rng)
        wide = wide / along(count_N, dim, wide.ndim)
    return wide.to(weight.dtype)


def uneven(
    shape: torch.Size, dim: int, from_N: Tensor, count_N: Tensor, *, noise: float, rng: torch.Generator
) -> Tensor:
    """Factors around 1 whose mean over the copies of each input is 1."""
    drawn = torch.randn(shape, generator=rng).to(count_N)
    total = torch.zeros_like(drawn).index_add_(dim, from_N, drawn)
    mean = total.index_select(dim, from_N) / along(count_N, dim, drawn.ndim)
    return 1 + noise * (drawn - mean)


def along(values_N: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector shaped to be broadcast along one axis."""
    return values_N.view([-1 if i == dim else 1 for i in range(ndim)])


def quieter(grown: dict[str, Tensor], small: Layout, large: Layout, copied: Copies, *, by: str) -> None:
    """For a head tied to the copied embedding: what it reads is divided, as the embedding itself must not be.

    In place, on the weights of the module whose output the head reads (a norm, nearly always).
    """
    if not large.tied:
        return
    if not large.before_head:
        raise UserError(f"{by}: the head is tied to the embedding, and nothing stands before it that could be divided")
    for name in large.before_head:
        dim = next((i for i, axis in enumerate(large.axes[name]) if axis.space == "hidden" and not axis.read), None)
        if dim is None:
            raise UserError(f"{by}: {name} gives the tied head no channels of the model's width")
        from_N = places(small.axes[name][dim], large.axes[name][dim], copied.source["hidden"])
        grown[name] = (grown[name] / along(copied.count["hidden"][from_N], dim, grown[name].ndim)).to(grown[name].dtype)


def writers_of(layout: Layout) -> set[str]:
    """Weights that write to the residual stream what attention or neurons made of it, biases included."""
    matrices = [
        name.removesuffix(".weight")
        for name, axes in layout.axes.items()
        if any(a.read and a.space in ("heads", "mlp") for a in axes)
        and any(not a.read and a.space == "hidden" for a in axes)
    ]
    return {f"{name}.{key}" for name in matrices for key in ("weight", "bias")} & set(layout.axes)

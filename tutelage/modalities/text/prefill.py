"""Prompts of unequal length, read in shared rows: no position is spent on padding that a stage's packing rule can fill.

Zhao et al. 2024 (prepacking), arXiv:2404.09529: prompts are packed into rows as long as the longest of them, read once under
a block mask with positions of their own, and the keys and values of each are put where generation looks for them.

Shape letters: N prompts, R rows, T positions, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from tutelage.modalities.text.collate import block_mask

Pack = Callable[[list[int], int], list[int]]  # as core/stream.py has it


def shared_rows(lengths: Sequence[int], width: int, pack: Pack) -> list[list[int]]:
    """Numbers of the prompts in each row of at most `width` positions, as the rule chooses row by row."""
    left, rows = list(range(len(lengths))), []
    while left:
        chosen = [left[i] for i in pack([lengths[i] for i in left], width)]
        assert chosen and sum(lengths[i] for i in chosen) <= width, (chosen, width)
        rows.append(chosen)
        left = [i for i in left if i not in set(chosen)]
    return rows


def keeps_all(model: nn.Module) -> bool:
    """Whether a model's cache is keys and values of every position: no window, no state that runs along the row."""
    layers = transformers.DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@torch.no_grad()
def prefilled(model: nn.Module, ids: Sequence[Sequence[int]], *, width: int, pack: Pack) -> Any:
    """A cache of all but the last token of each prompt, right-aligned in `width` - 1 positions as left padding has them.

    None where nothing is to gain (no two prompts share a row) and for a model that the cache of its prompts says too
    little of. The model must tell documents in one row apart (`models.packs`).
    """
    device = next(model.parameters()).device
    sizes = {n: len(row) - 1 for n, row in enumerate(ids) if len(row) > 1}
    if not sizes or not keeps_all(model):
        return None
    numbers, longest = list(sizes), max(sizes.values())
    rows = [[numbers[i] for i in row] for row in shared_rows(list(sizes.values()), longest, pack)]
    if len(rows) == len(ids):
        return None
    places = {n: (r, sum(sizes[m] for m in row[:i])) for r, row in enumerate(rows) for i, n in enumerate(row)}
    fields = torch.zeros(3, len(rows), longest, dtype=torch.int64)  # tokens, positions, segments
    for r, row in enumerate(rows):
        for segment, n in enumerate(row, start=1):
            at, stop = places[n][1], places[n][1] + sizes[n]
            fields[0, r, at:stop] = torch.tensor(ids[n][:-1])
            fields[1, r, at:stop] = torch.arange(sizes[n])
            fields[2, r, at:stop] = segment
    tokens_RT, positions_RT, segments_RT = fields.to(device)
    mask = block_mask(segments_RT)
    read = model.base_model(
        input_ids=tokens_RT,
        position_ids=positions_RT,
        use_cache=True,
        past_key_values=transformers.DynamicCache(),
        **({} if mask is None else {"attention_mask": mask}),
    ).past_key_values
    cache = transformers.DynamicCache()
    for number, layer in enumerate(read.layers):
        split = [_apart(states, places, sizes, len(ids), width - 1) for states in (layer.keys, layer.values)]
        cache.update(*split, number)
    return cache


def _apart(
    states_RHTD: Tensor, places: dict[int, tuple[int, int]], sizes: dict[int, int], count: int, width: int
) -> Tensor:
    """Each prompt's own part of shared rows, at the right of a row of its own, [N, H, width, D]; zero before it."""
    apart = states_RHTD.new_zeros(count, states_RHTD.shape[1], width, states_RHTD.shape[3])
    for n, (row, at) in places.items():
        apart[n, :, width - sizes[n] :] = states_RHTD[row, :, at : at + sizes[n]]
    return apart

"""Lists of blocks among a model's tensors, and what a deeper model is made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tutelage.base.errors import UserError

DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_encoder_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"),
)
BLOCK = re.compile(r"(.+?)\.(\d+)\.(.+)")  # the first number in a name counts blocks; later ones count within a block
Blocks = dict[int, set[str]]  # number of a block -> names within it


def stacks_of(config: dict[str, Any], tensors: dict[str, Tensor], *, by: str) -> dict[str, Blocks]:
    """The lists of blocks by their prefix: those whose numbers run from 0 to one of the configuration's depths."""
    depths = [key for key in DEPTHS if isinstance(config.get(key), int)]
    lists: dict[str, Blocks] = {}
    for match in filter(None, map(BLOCK.fullmatch, tensors)):
        lists.setdefault(match[1], {}).setdefault(int(match[2]), set()).add(match[3])
    known = {config[key] for key in depths}
    stacks = {prefix: b for prefix, b in lists.items() if len(b) in known and set(b) == set(range(len(b)))}
    if not stacks:
        raise UserError(
            f"{by}: the weights hold no numbered list as long as the configuration says "
            f"(it says so under one of {', '.join(DEPTHS)})"
        )
    if len(stacks) > len(depths):
        raise UserError(f"{by}: both {', '.join(stacks)} could be the blocks; the configuration has one depth")
    return stacks


def first_alone(blocks: Blocks) -> set[str]:
    """What the first block holds for all of them (T5's position biases), which its copies must not have."""
    common = set.intersection(*blocks.values())
    rest_alike = len(blocks) > 1 and all(names == common for i, names in blocks.items() if i > 0)
    return blocks[0] - common if rest_alike else set()


def deeper(
    config: dict[str, Any], tensors: dict[str, Tensor], order: Mapping[str, Sequence[int]], *, by: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A model whose lists of blocks hold, at each place, a copy of the block that `order` names there.

    The configuration's depths and what it lists block by block follow. Every order has one length for one depth.
    """
    stacks = stacks_of(config, tensors, by=by)
    depths = [key for key in DEPTHS if isinstance(config.get(key), int)]
    lengths = {len(stacks[prefix]): list(places) for prefix, places in order.items()}
    listed = [key for key, v in config.items() if "layer" in key and isinstance(v, list) and len(v) in lengths]
    grown = {name: t for name, t in tensors.items() if not _within(name, stacks)}
    for prefix, blocks in stacks.items():
        kinds = {frozenset(names - first_alone(blocks)) for names in blocks.values()}
        if len(kinds) > 1 and not listed:
            raise UserError(f"{by}: the blocks of {prefix} differ, and the configuration does not list their kinds")
        only_first = first_alone(blocks)
        for place, i in enumerate(order[prefix]):
            for name in blocks[i] - (only_first if place else set()):
                grown[f"{prefix}.{place}.{name}"] = tensors[f"{prefix}.{i}.{name}"]
    changed: dict[str, Any] = {key: len(lengths.get(config[key], range(config[key]))) for key in depths}
    for key in listed:
        changed[key] = [config[key][i] for i in lengths[len(config[key])]]
    if "attention_types" in config:  # GPT-Neo's list of (kinds, repeats)
        times = max(len(places) // length for length, places in lengths.items())
        changed["attention_types"] = config["attention_types"] * times
    return {**config, **changed}, grown


def _within(name: str, stacks: dict[str, Blocks]) -> bool:
    match = BLOCK.fullmatch(name)
    return match is not None and match[1] in stacks

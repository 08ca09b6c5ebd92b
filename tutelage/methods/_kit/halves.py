"""A share of each kind of matrix in a model's blocks, drawn at random: what half fine-tuning trains, and what it puts back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tutelage.methods._kit.blocks import BLOCK

NORM = re.compile(r"norm|\bln(_|\b)", re.IGNORECASE)
ATTENTION = re.compile(r".*?att[^.]*", re.IGNORECASE)  # up to the first part of a name that speaks of attention
Kind = dict[int, dict[str, list[str]]]  # number of a block -> matrix -> names of its parameters


def kinds_of(names: Iterable[str]) -> dict[str, Kind]:
    """Parameters in blocks: those of one module are a unit, and a unit is of the norms, of an attention, or of the rest.

    The rest of a block is its feed-forward layer (a router and experts with it). What lies in no block is left out.
    """
    kinds: dict[str, Kind] = {}
    for name in sorted(names):
        found = BLOCK.fullmatch(name)
        if found is None:
            continue
        stack, block, rest = found[1], int(found[2]), found[3]
        owner, _, last = rest.rpartition(".")
        unit = owner if last in ("weight", "bias") and owner else rest
        attention = ATTENTION.match(unit)
        kind = "norm" if NORM.search(unit) else attention[0] if attention else "feed-forward"
        kinds.setdefault(f"{stack}|{kind}", {}).setdefault(block, {}).setdefault(unit, []).append(name)
    return kinds


def drawn(kinds: dict[str, Kind], share: float, rng: Callable[[str], torch.Generator]) -> set[str]:
    """Names of the parameters of `share` of the units of each kind, as evenly over the blocks as whole units allow.

    Of two units in a block half is one in each; of three it is two in a random half of the blocks and one in the others.
    """
    chosen: set[str] = set()
    for kind, blocks in kinds.items():
        chance = rng(f"half|{kind}")
        wanted = 0.0
        taken = 0
        places = sorted(blocks)
        for i in torch.randperm(len(places), generator=chance).tolist():
            units = sorted(blocks[places[i]])
            wanted += share * len(units)
            count = math.floor(wanted + 0.5) - taken
            taken += count
            for j in torch.randperm(len(units), generator=chance)[:count].tolist():
                chosen.update(blocks[places[i]][units[j]])
    return chosen


def moved_of_each(run: Any) -> dict[str, float]:
    """Of each kind of unit, the share whose parameters are not what the stage began with; `beside` is what lies in no block."""
    start, end = run.start(), run.weights()
    moved = {name: not end[name].equal(before) for name, before in start.items()}
    kinds = kinds_of(start)
    shares = {}
    for kind, blocks in kinds.items():
        units = [any(moved[name] for name in own) for block in blocks.values() for own in block.values()]
        shares[kind.rpartition("|")[2]] = sum(units) / len(units)
    within = {name for blocks in kinds.values() for block in blocks.values() for own in block.values() for name in own}
    rest = [moved[name] for name in start if name not in within]
    return {**shares, "beside": sum(rest) / len(rest)}

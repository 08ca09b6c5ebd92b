"""What objectives share that hide single tokens of a text from a model that sees both sides. Shape letters: B rows, T positions."""

from __future__ import annotations

import torch
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.core.types import IGNORE, Batch
from tutelage.methods._kit.labels import content_rng


def lasting(batch: Batch, numbers: int) -> Tensor:
    """So many numbers a position, [numbers, B, T], which a row has for good, whatever its neighbors and however wide the batch."""
    chance_NBT = torch.ones(numbers, *batch["tokens"].shape)
    for i, (tokens_T, segments_T) in enumerate(zip(batch["tokens"], batch["segments"], strict=True)):
        real = int((segments_T > 0).sum())
        chance_NBT[:, i, :real] = torch.rand(numbers, real, generator=content_rng(tokens_T[:real]))
    return chance_NBT


def masked(
    batch: Batch, chance_3BT: Tensor, *, rate: float, mask: float, random: float, method: str
) -> dict[str, Tensor]:
    """`tokens` with some hidden and the `labels` that these are, at least one a row; separators are never hidden.

    The three numbers of a position say whether (of `rate`), how (behind the mask token of `mask`, a random one of
    `random`, else its own), and behind which random token. UserError where the tokenizer has no mask token.
    """
    special, tokens_BT = batch.meta["special"], batch["tokens"]
    if special.get("mask") is None:
        raise UserError(f"{method} needs a tokenizer with a mask token; this one has none")
    apart = torch.tensor(sorted({v for k, v in special.items() if k != "vocab" and v is not None}))
    real_BT = (batch["segments"] > 0) & ~torch.isin(tokens_BT, apart.to(tokens_BT.device))
    whether, how, which = chance_3BT.to(tokens_BT.device)
    lowest_B1 = whether.where(real_BT, 1.0).amin(dim=1, keepdim=True)
    chosen_BT = real_BT & (whether <= lowest_B1.clamp(min=rate))
    shown_BT = torch.where(how < mask, special["mask"], tokens_BT)
    by_chance_BT = (how >= mask) & (how < mask + random)
    shown_BT = torch.where(by_chance_BT, (which * special["vocab"]).long(), shown_BT)
    return {
        "tokens": torch.where(chosen_BT, shown_BT, tokens_BT),
        "labels": torch.where(chosen_BT, tokens_BT, IGNORE),
    }

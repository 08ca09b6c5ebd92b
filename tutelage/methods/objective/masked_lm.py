"""Masked language modeling: some tokens are hidden and predicted from both sides.

Paper:   Devlin et al. 2018 (BERT), arXiv:1810.04805
Use:     the default for encoders; rate 0.15, or up to 0.4 for large models (Wettig et al. 2022, arXiv:2202.08005)
Works:   models that see both sides (BERT and its like); the tokenizer needs a mask token
Costs:   nothing beside the forward pass, but only `rate` of the positions teach anything
With:    adds to every auxiliary and penalty; bits per byte is then measured on masked tokens
Differs: every position is chosen by itself, as in RoBERTa, not a fixed number a row (at least one, though), and anew in
    every epoch; no next-sentence task; measured rows keep one mask each, made from their content
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.method import Method, Seen
from tutelage.core.out import Out, cross_entropy
from tutelage.core.types import Batch, Sum
from tutelage.methods._kit.labels import before, row_weights
from tutelage.methods._kit.masking import lasting, masked


class MaskedLM(Method):
    rate: float = Field(0.15, gt=0, le=1, description="share of the positions to predict")
    mask: float = Field(0.8, ge=0, le=1, description="share of these that show the mask token")
    random: float = Field(
        0.1, ge=0, le=1, description="share of these that show a random token; the rest show their own"
    )

    no_off = "a stage always has an objective"
    baseline = {"use": "objective/causal_lm"}
    toys = ("bert",)

    def batch(self, batch: Batch, view: Any) -> Batch:
        """Masks drawn for this tick."""
        return self._masked(batch, torch.rand(3, *batch["tokens"].shape, generator=view.rng("mask")))

    def measured(self, batch: Batch, view: Any) -> Batch:
        """Masks that each row has for good, whatever its neighbors and however wide the batch."""
        return self._masked(batch, lasting(batch, 3))

    def loss(self, model: Callable[[Batch], Out], batch: Batch, view: Any) -> Sum:
        """Cross-entropy of the hidden tokens, each times its row's weight."""
        return cross_entropy(model(batch), batch["labels"], row_weights(batch))

    def _masked(self, batch: Batch, chance_3BT: Tensor) -> Batch:
        """Hide tokens. The three numbers of a position say whether, how, and behind which random token."""
        shares = {"rate": self.rate, "mask": self.mask, "random": self.random}
        fields = masked(batch, chance_3BT, **shares, method=self.name())
        if "bytes" in batch:
            fields["bytes"] = before(batch["bytes"], batch["segments"])
        return replace(batch.having(**fields), meta={**batch.meta, "prepared": True})


def effect(run: Seen) -> dict[str, float]:
    counted = [row["counted"] / row["trained"] for row in run.rows if row["kind"] == "train"]
    return {"counted": sum(counted) / len(counted)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Only the hidden positions are learned from."""
    return 0 < on["counted"] < 0.4 * off["counted"]


BENCH = None  # its claim is about tasks after fine-tuning; its bits per byte compare with no other objective's

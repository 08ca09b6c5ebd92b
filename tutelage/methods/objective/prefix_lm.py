"""Prefix language modeling: the first part of each document is given, the rest is predicted.

Paper:   Raffel et al. 2020 (T5), arXiv:1910.10683; Wang et al. 2022, arXiv:2204.05832
Use:     the default for encoder-decoder models; leave `split` out to cut each document at a place of its own; where a
    source marks its answers (`template`), the cut is before the first one, and later prompts are read only
Works:   encoder-decoder models, one document a row; causal ones, packed or not
Costs:   the given part teaches nothing: half of the positions on average
With:    adds to every auxiliary and penalty; bits per byte is then measured on the predicted part
Differs: a causal model reads the prefix with its own causal mask, where the paper lets it see both ways; nothing is
    appended at the cut; measured rows keep one cut each, made from their content
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Method, Seen
from tutelage.core.out import Out, cross_entropy
from tutelage.core.types import IGNORE, Batch, Sum
from tutelage.methods._kit.denoising import Example, for_decoder
from tutelage.methods._kit.labels import before, content_rng, row_weights


class PrefixLM(Method):
    split: float | None = Field(
        None, gt=0, lt=1, description="share of a document that is given; by chance if left out"
    )

    no_off = "a stage always has an objective"
    baseline = {"use": "objective/causal_lm"}
    toys = ("llama", "t5")

    def batch(self, batch: Batch, view: Any) -> Batch:
        """Cuts drawn for this tick."""
        documents = int(batch["segments"].max())
        return self._cut(batch, torch.rand(len(batch["tokens"]), documents, generator=view.rng("prefix")), view)

    def measured(self, batch: Batch, view: Any) -> Batch:
        """Cuts that each row has for good, whatever its neighbors."""
        chance_BS = torch.zeros(len(batch["tokens"]), int(batch["segments"].max()))
        for i, (tokens_T, segments_T) in enumerate(zip(batch["tokens"], batch["segments"], strict=True)):
            own = int(segments_T.max())
            chance_BS[i, :own] = torch.rand(own, generator=content_rng(tokens_T[segments_T > 0]))
        return self._cut(batch, chance_BS, view)

    def loss(self, model: Callable[[Batch], Out], batch: Batch, view: Any) -> Sum:
        """Cross-entropy of what follows the cut, each times its row's weight."""
        return cross_entropy(model(batch), batch["labels"], row_weights(batch))

    def _cut(self, batch: Batch, chance_BS: Tensor, view: Any) -> Batch:
        """Split every document of at least two tokens; both parts hold one at least."""
        segments_BT = batch["segments"]
        lengths_BS = F.one_hot(segments_BT, chance_BS.shape[1] + 1).sum(dim=1)[:, 1:]
        share_BS = chance_BS.to(segments_BT.device) if self.split is None else self.split
        given_BS = 1 + (share_BS * (lengths_BS - 1)).long().clamp(max=lengths_BS - 2).clamp(min=0)
        first_BS = _first_learned(batch, lengths_BS)
        given_BS = torch.where((first_BS > 0) & (first_BS < lengths_BS), first_BS + 1, given_BS)
        if view.engine.anatomy.kind == "seq2seq":
            made = for_decoder(batch, self._two_sided(batch, lengths_BS, given_BS), view)
        else:
            made = self._one_sided(batch, lengths_BS, given_BS)
        return replace(made, meta={**batch.meta, "prepared": True})

    @staticmethod
    def _one_sided(batch: Batch, lengths_BS: Tensor, given_BS: Tensor) -> Batch:
        """The labels of the given part are taken away: position i predicts token i + 1 of its document."""
        row_BT, within_BT = _places(batch["segments"], lengths_BS)
        return batch.having(labels=torch.where(within_BT + 1 < given_BS.gather(1, row_BT), IGNORE, batch["labels"]))

    @staticmethod
    def _two_sided(batch: Batch, lengths_BS: Tensor, given_BS: Tensor) -> list[Example]:
        """The given part is the input, the rest the target."""
        if lengths_BS.shape[1] > 1:
            raise UserError(
                "objective/prefix_lm: an encoder-decoder model takes one document a row (`packing: single`)"
            )
        bytes_BT = before(batch["bytes"], batch["segments"]) if "bytes" in batch else None
        made = []
        for i, (whole, given) in enumerate(zip(lengths_BS[:, 0].tolist(), given_BS[:, 0].tolist(), strict=True)):
            rest = batch["tokens"][i, given:whole]
            learned = batch["labels"][i, given - 1 : whole - 1] != IGNORE  # of the position before each token
            sizes = None if bytes_BT is None else bytes_BT[i, given:whole]
            made.append(Example(batch["tokens"][i, :given], rest, torch.where(learned, rest, IGNORE), sizes))
        return made


def _places(segments_BT: Tensor, lengths_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Each position's document, from 0, and its place in it, [B, T] both."""
    row_BT = (segments_BT - 1).clamp(min=0)
    begin_BS = lengths_BS.cumsum(dim=1) - lengths_BS
    return row_BT, torch.arange(row_BT.shape[1], device=row_BT.device) - begin_BS.gather(1, row_BT)


def _first_learned(batch: Batch, lengths_BS: Tensor) -> Tensor:
    """Each document's first position with a label, [B, S]: 0 where all is learned, its length where nothing is."""
    row_BT, within_BT = _places(batch["segments"], lengths_BS)
    learned_BT = (batch["labels"] != IGNORE) & (batch["segments"] > 0)
    never_BT = lengths_BS.gather(1, row_BT)
    return lengths_BS.scatter_reduce(1, row_BT, torch.where(learned_BT, within_BT, never_BT), "amin")


def effect(run: Seen) -> dict[str, float]:
    counted = [row["counted"] / row["trained"] for row in run.rows if row["kind"] == "train"]
    return {"counted": sum(counted) / len(counted)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """The given parts are not learned from."""
    return 0 < on["counted"] < 0.9 * off["counted"]


BENCH = None  # its claim is about tasks after fine-tuning; its bits per byte compare with no other objective's

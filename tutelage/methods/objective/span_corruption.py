"""Span corruption: spans of text are hidden, each behind a token of its own, and written out in order.

Paper:   Raffel et al. 2020 (T5), arXiv:1910.10683
Use:     `rate` 0.15 and `mean` 3; up to 0.5 and long spans in a mixture (objective/ul2). The tokenizer needs tokens for
    hidden spans: T5's have `<extra_id_0>` to `<extra_id_99>`, one that is trained here has those that
    `tokenizer: {train: bpe, vocab: 2048, sentinels: 100}` asks for, others may have some by another name (`sentinel`)
Works:   encoder-decoder models, one document a row; causal ones, packed or not, which read input and target in one row
Costs:   about `rate` · (1 + 1 / `mean`) of the positions teach, sentinels among them. A causal model's row holds every
    sentinel twice: text that then has no room in `length` is left out (a tenth at the defaults), always at the end; an
    encoder-decoder model leaves nothing out
With:    adds to every auxiliary and penalty; bits per byte is then measured on the hidden text (sentinels are free), both
    sides given, so it compares with no other objective's
Differs: rows are cut documents, where T5 joins documents before it cuts, and `length` counts the text before spans are
    hidden, T5's what is left of it. The input gets no end token, and where a tokenizer has no token to begin with, its
    separator stands in front (T5's `</s>`). The target ends as a document does; no sentinel closes it, as in T5's code,
    where in the paper one does. Text that is not learned (a prompt, a prefix) may be hidden but is not learned; measured
    rows keep their spans, made from their content. As in T5's code, a single span lies at the end
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pydantic import Field, PrivateAttr

from tutelage.base.method import Method, Seen
from tutelage.core.out import Out, cross_entropy
from tutelage.core.types import Batch, Sum
from tutelage.methods._kit.denoising import SENTINEL, Pattern, Tokens, denoised, hide_spans, tokens_read
from tutelage.methods._kit.labels import row_weights


class SpanCorruption(Method):
    rate: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are hidden")
    mean: float = Field(3.0, ge=1, description="tokens of a hidden span, in the mean")
    sentinel: Pattern = Field(
        SENTINEL, description="the tokens that stand for hidden spans; {} is their number, from 0"
    )

    no_off = "a stage always has an objective"
    baseline = {"use": "objective/causal_lm"}
    on = {"mean": 1.5}  # more than one span in rows of 32
    toys = ("qwen2-spans", "t5-spans")

    _tokens: Tokens = PrivateAttr(default_factory=Tokens)

    def batch(self, batch: Batch, view: Any) -> Batch:
        """Spans drawn for this tick."""
        return self._hidden(batch, view, view.rng("spans"))

    def measured(self, batch: Batch, view: Any) -> Batch:
        """Spans that each row has for good, whatever its neighbors."""
        return self._hidden(batch, view, None)

    def loss(self, model: Callable[[Batch], Out], batch: Batch, view: Any) -> Sum:
        """Cross-entropy of sentinels and hidden text, each times its row's weight."""
        return cross_entropy(model(batch), batch["labels"], row_weights(batch))

    def _hidden(self, batch: Batch, view: Any, rng: torch.Generator | None) -> Batch:
        sentinels = self._tokens.sentinels(view, batch, self.sentinel, [(self.mean, self.rate)], method=self.name())
        hide = partial(hide_spans, rate=self.rate, mean=self.mean, sentinels=sentinels)
        return denoised(batch, hide, view, rng=rng)


def effect(run: Seen) -> dict[str, float]:
    """The share of a row that is learned, and how many sentinels were read."""
    counted = [row["counted"] / row["trained"] for row in run.rows if row["kind"] == "train"]
    sentinels = sum(token.startswith("<extra_id_") for token in tokens_read(run))
    return {"counted": sum(counted) / len(counted), "sentinels": float(sentinels)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Only what is hidden is learned, and sentinels stand for it."""
    return 0 < on["counted"] < 0.5 * off["counted"] and on["sentinels"] >= 2


BENCH = None  # the baseline of objective/ul2; its own claim is about tasks after fine-tuning

"""UL2: a mixture of denoisers, each told by a mode token in front: short spans, long or many spans, the rest of a text.

Paper:   Tay et al. 2022 (UL2), arXiv:2205.05131; denoisers on causal models also in Tay et al. 2022 (U-PaLM),
    arXiv:2210.11399
Use:     pretraining as it stands; `shares` of S of about a fifth (the paper's ablation). A causal model that is trained
    already goes on as U-PaLM did with `shares: {r: 1, s: 2, x: 1}`, `regular: [[3, 0.15]]`, `extreme: [[32, 0.15], [3,
    0.5]]` and `suffix: 0.5`. At fine-tuning set `mode` to what the task is like (`s` to write on, `r` to understand, `x`
    for long answers): every row is then of that mode, and where a source marks its answers (`template`) they follow its
    token. Prompts at use begin with the token too. The tokenizer needs tokens for hidden spans, as
    objective/span_corruption says
Works:   encoder-decoder models, one document a row; causal ones, packed or not, which read input and target in one row
Costs:   a third of the positions teach, at the defaults. A causal model's row holds every sentinel twice: text that then
    has no room in `length` is left out (a quarter at [3, 0.5]), an encoder-decoder model leaves nothing out
With:    adds to every auxiliary and penalty. Held-out text is measured as the S denoiser with its token (`mode` or `heldout`
    say otherwise), cut where objective/prefix_lm cuts it and on the same bytes, so these two compare
Differs: a mode token is a text, and as many tokens as it takes in the tokenizer (`[NLU]` is five bytes); name one that it
    has (`tokens: {r: <extra_id_97>}`) to spend one. Span lengths are T5's random divisions, as in the authors' code, not
    normally distributed, as in their text. S predicts a quarter in the mean, as in their text, where their code cuts
    anywhere; a suffix that is cut off has no end token. A mode token is left out where a row has no room for it. Six span
    denoisers are drawn alike and S at a fifth, where the paper has all seven about alike. Answers always follow the
    prompt, in any mode. A causal model reads its input with its own causal mask, where the paper lets it see both ways.
    Else as objective/span_corruption
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr, field_validator

from tutelage.base.method import Bench, Method, Seen
from tutelage.core.out import Out, cross_entropy
from tutelage.core.types import Batch, Sum
from tutelage.methods._kit.denoising import (
    SENTINEL,
    Document,
    Example,
    Pattern,
    Tokens,
    before_answer,
    cut,
    denoised,
    hide_spans,
    tokens_read,
    whole,
)
from tutelage.methods._kit.labels import row_weights

Mode = Literal["r", "s", "x"]
SHARES: dict[Mode, float] = {"r": 4, "s": 3, "x": 8}
TOKENS: dict[Mode, str] = {"r": "[NLU]", "s": "[S2S]", "x": "[NLG]"}
Spans = list[tuple[float, float]]


class UL2(Method):
    regular: Spans = Field([(3, 0.15), (8, 0.15)], min_length=1, description="R: tokens of a span in the mean, rate")
    extreme: Spans = Field(
        [(3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)], min_length=1, description="X: tokens of a span in the mean, rate"
    )
    suffix: float = Field(
        0.25, gt=0, le=0.5, description="S: share of a document that is predicted, in the mean; 0.5 cuts anywhere"
    )
    shares: dict[Mode, float] = Field(SHARES, description="how often each mode is drawn, against the others")
    tokens: dict[Mode, str] = Field(TOKENS, description="the mode token of each mode; nothing where it is empty")
    mode: Mode | None = Field(None, description="the one mode of all rows, as at fine-tuning")
    heldout: Mode | None = Field(None, description="the mode in which held-out text is measured: `mode`, else s")
    sentinel: Pattern = Field(
        SENTINEL, description="the tokens that stand for hidden spans; {} is their number, from 0"
    )

    no_off = "a stage always has an objective"
    baseline = {"use": "objective/causal_lm"}
    on = {"tokens": {"r": "<extra_id_17>", "s": "<extra_id_18>", "x": "<extra_id_19>"}}
    toys = ("qwen2-spans", "t5-spans")

    _tokens: Tokens = PrivateAttr(default_factory=Tokens)

    @field_validator("regular", "extreme")
    @classmethod
    def _are_spans(cls, value: Spans) -> Spans:
        if any(mean < 1 or not 0 < rate < 1 for mean, rate in value):
            raise ValueError("write [tokens of a span, rate] with at least one token and a rate between 0 and 1")
        return value

    @field_validator("shares")
    @classmethod
    def _are_shares(cls, value: dict[Mode, float]) -> dict[Mode, float]:
        if any(share < 0 for share in value.values()) or not sum(value.values()) > 0:
            raise ValueError("shares are not negative, and one at least is above 0")
        return value

    @field_validator("tokens")
    @classmethod
    def _are_all_there(cls, value: dict[Mode, str]) -> dict[Mode, str]:
        return {**TOKENS, **value}

    def batch(self, batch: Batch, view: Any) -> Batch:
        """Denoisers and what they hide drawn for this tick, for each document its own."""
        return self._mixed(batch, view, view.rng("denoisers"), mode=self.mode, suffix=self.suffix)

    def measured(self, batch: Batch, view: Any) -> Batch:
        """One mode for all, and what is hidden as each row has it for good, whatever its neighbors."""
        return self._mixed(batch, view, None, mode=self.heldout or self.mode or "s", suffix=0.5)

    def loss(self, model: Callable[[Batch], Out], batch: Batch, view: Any) -> Sum:
        """Cross-entropy of the targets, each times its row's weight."""
        return cross_entropy(model(batch), batch["labels"], row_weights(batch))

    def _mixed(
        self, batch: Batch, view: Any, rng: torch.Generator | None, *, mode: Mode | None, suffix: float
    ) -> Batch:
        ids = self._tokens.of(view, list(self.tokens.values()))
        modes = dict(zip(self.tokens, ids, strict=True))
        spans: dict[Mode, Spans] = {"r": self.regular, "x": self.extreme}
        asked = [
            one for key in spans for one in spans[key] if (self.shares.get(key, 0) if mode is None else key == mode)
        ]
        sentinels = torch.zeros(0, dtype=torch.long)
        if asked:
            sentinels = self._tokens.sentinels(view, batch, self.sentinel, asked, method=self.name(), modes=ids)

        def make(found: Document, own: torch.Generator) -> Example:
            given = before_answer(found)
            if given is not None:
                return cut(found, given=given, mode=modes[mode or "s"])
            drawn = mode or self._drawn(own)
            if drawn == "s":
                return self._suffix(found, own, suffix, mode=modes["s"])
            mean, rate = spans[drawn][int(torch.randint(len(spans[drawn]), (), generator=own))]
            return hide_spans(found, own, rate=rate, mean=mean, sentinels=sentinels, mode=modes[drawn])

        return denoised(batch, make, view, rng=rng)

    def _drawn(self, rng: torch.Generator) -> Mode:
        """A mode by the shares."""
        share = torch.tensor(list(self.shares.values()), dtype=torch.float64)
        return list(self.shares)[int(share.multinomial(1, generator=rng))]

    @staticmethod
    def _suffix(found: Document, rng: torch.Generator, share: float, *, mode: list[int]) -> Example:
        """The document's end is the target: of 1 to 2 · share · length tokens, every number equally likely."""
        if found.size < 2:
            return whole(found)
        most = max(1, round(2 * share * (found.size - 1)))
        given = found.size - most + int((torch.rand(1, generator=rng) * most).long().clamp(max=most - 1))
        return cut(found, given=given, mode=mode)


def effect(run: Seen) -> dict[str, float]:
    """The share of a row that is learned, and how many mode tokens and sentinels were read."""
    counted = [row["counted"] / row["trained"] for row in run.rows if row["kind"] == "train"]
    read = {token for token in tokens_read(run) if token.startswith("<extra_id_")}
    modes = read & set(UL2.on["tokens"].values())
    return {"counted": sum(counted) / len(counted), "modes": float(len(modes)), "sentinels": float(len(read - modes))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """All three modes are drawn and told, and sentinels stand for what is hidden."""
    return on["modes"] == 3 and on["sentinels"] >= 3 and 0 < on["counted"] < 0.8 * off["counted"]


BENCH = Bench(
    base="recipes/bench/denoisers.yaml",
    arm={
        "start": "mixed_mid",
        "objective": {
            "use": "objective/ul2",
            "mode": "s",
            "tokens": {"r": "<extra_id_29>", "s": "<extra_id_30>", "x": "<extra_id_31>"},
        },
    },
    baseline={"start": "spans_mid", "objective": "objective/prefix_lm"},  # cut before the answers, too
    metric="bits_per_byte/asked",
    better="lower",
    margin=0.02,
    tune={"start": ["mixed_low", "mixed_mid", "mixed_high"]},  # the rate of pretraining
    tune_baseline={"start": ["spans_low", "spans_mid", "spans_high"]},
    scale="167 M to 20 B parameters, 32 B to 1 T tokens: nine tasks fine-tuned and at one shot; here one task, fine-tuned",
)

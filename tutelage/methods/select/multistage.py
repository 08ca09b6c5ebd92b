"""Multistage filtering: rows whose loss is low are not learned from, and later, rows foretold to be so are not even read.

Paper:   Ouyang et al. 2023, arXiv:2207.14386, and its public code
Use:     fine-tuning on many examples that say the same; `warm` 10 %; `threshold` 1 for classes, as in the paper, 0.2–0.5
    where losses go on falling through the stage, or little but the hardest row of a step is left in the end; `sure` is
    the predictor's loss at which it is trusted (ln 2 = 0.69 is a coin's), and from `latest` on it is trusted anyway
Works:   any objective whose rows have labels of tokens; short rows of one example (`packing: single`): a row of many
    documents has a mean loss that says little
Costs:   until the predictor is trusted a forward pass over every row, then over those it picks; counted for the stage. A
    stage in steps gets shorter steps; one whose `until` is in FLOPs gets more of them
With:    any mix, curriculum and objective; steps see fewer rows, so that a smaller rate may be needed
Differs: what is left of a batch makes the step, where their code saves rows up to a full batch, and later steps on single
    rows; where nothing is left, the row of the largest loss (or the likeliest one) is kept; every row whose loss is asked
    is read once more for it; a row's loss is the mean over its labels, not a class's, and the predictor sees the whole
    row, its labels too; the predictor's loss is taken before it learns from a step's rows, where their code takes it
    afterwards; their run gives up where the first epoch ends and the predictor is not trusted, here `latest` trusts it
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.clock import Span, SpanField
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.out import token_nll
from tutelage.core.types import IGNORE, Batch
from tutelage.methods._kit.signals import pushed


class Multistage(Method):
    threshold: float = Field(
        1.0, ge=0, description="rows are learned from above so many times the mean loss of the warm-up's end; 0: all"
    )
    warm: SpanField = Field(Span(10.0, "%"), description="how long everything is learned from at first")
    window: int = Field(128, ge=1, description="newest rows of the warm-up whose mean loss is the threshold")
    sure: float = Field(0.5, ge=0, description="the predictor's mean loss in nats from which on it is trusted")
    steps: int = Field(8, ge=1, description="newest steps that this mean is taken over")
    latest: SpanField = Field(Span(50.0, "%"), description="when the predictor is trusted whatever its loss")

    off = {"threshold": 0.0}
    on = {"warm": "3step", "window": 16, "sure": 0.0, "latest": "7step"}

    def weigh(self, batch: Batch, view: Any) -> Tensor:
        """1 for rows that are learned from, 0 for the others; at least one is. Rows are read only where they must be."""
        stage = self.stage(view)
        if stage == 0:
            losses_B = row_losses(batch, view, torch.ones(len(batch), dtype=torch.bool))
            for loss in losses_B.tolist():
                known = self.state.get("window")
                self.state["window"] = pushed(None if known is None else known.cpu(), loss, size=self.window)
            return torch.ones(len(batch))
        words_BV = present(batch, view.engine.anatomy.vocab)
        chance_B = self.chance(words_BV)
        read_B = torch.ones(len(batch), dtype=torch.bool) if stage == 1 else chance_B > 0.5
        if not read_B.any():
            read_B = torch.arange(len(batch)) == chance_B.argmax()
        losses_B = row_losses(batch, view, read_B)
        hard_B = losses_B > self.bound()
        if stage == 1:
            self.doubt(chance_B, hard_B)
        self.learn(words_BV[read_B], hard_B[read_B])
        kept_B = hard_B & read_B
        return (kept_B if kept_B.any() else torch.arange(len(batch)) == losses_B.argmax()).float()

    def stage(self, view: Any) -> int:
        """0: everything is learned from; 1: what is above the threshold; 2: only what the predictor picks is read.

        Whoever lists the method without any warm-up begins with one step of it: there is no threshold before.
        """
        if view.clock.passed(self.warm) < 1.0 - 1e-9 or "window" not in self.state:
            return 0
        if not self.state.get("trusted") and self.state.get("taught"):
            doubts = self.state.get("doubts")
            certain = doubts is not None and len(doubts) >= self.steps and float(doubts.mean()) <= self.sure
            self.state["trusted"] = certain or view.clock.passed(self.latest) >= 1.0 - 1e-9
        return 2 if self.state.get("trusted") else 1

    def bound(self) -> float:
        """The loss above which a row is learned from."""
        return self.threshold * float(self.state["window"].mean())

    def learn(self, words_RV: Tensor, hard_R: Tensor) -> None:
        """Count in which of two classes tokens stand: all that a Bernoulli naive Bayes model is."""
        rows_C, words_CV = self.counts(words_RV.shape[1])
        for c in (0, 1):
            mine = hard_R == bool(c)
            rows_C[c] += mine.sum()
            words_CV[c] += words_RV[mine].sum(dim=0)
        self.state["rows"], self.state["words"], self.state["taught"] = rows_C, words_CV, True

    def counts(self, vocab: int) -> tuple[Tensor, Tensor]:
        """Rows of each class, [C], and of these, those with each token, [C, V]."""
        if "rows" not in self.state:
            return torch.zeros(2, dtype=torch.float64), torch.zeros(2, vocab, dtype=torch.float64)
        return self.state["rows"].cpu(), self.state["words"].cpu()

    def chance(self, words_BV: Tensor) -> Tensor:
        """The predictor's probability that a row is above the threshold, [B] float64; 1/2 before it has seen any."""
        rows_C, words_CV = self.counts(words_BV.shape[1])
        if not rows_C.sum():
            return torch.full((len(words_BV),), 0.5, dtype=torch.float64)
        return bayes(words_BV, rows_C, words_CV)

    def doubt(self, chance_B: Tensor, hard_B: Tensor) -> None:
        """Remember the predictor's mean loss on the rows of a step, before it learns from them."""
        nats_B = -torch.where(hard_B, chance_B, 1.0 - chance_B).clamp(min=1e-12).log()
        known = self.state.get("doubts")
        self.state["doubts"] = pushed(None if known is None else known.cpu(), float(nats_B.mean()), size=self.steps)


def row_losses(batch: Batch, view: Any, read_B: Tensor) -> Tensor:
    """Mean nats a label of each row that is read, 0 for the others, [B] float64; the work shared by the ranks, counted."""
    mine_B = torch.zeros(len(batch), dtype=torch.bool)
    mine_B[read_B.nonzero().flatten()[view.rank :: view.engine.world.size]] = True
    losses_B = torch.zeros(len(batch), dtype=torch.float64, device=view.engine.device)
    if mine_B.any():
        found = []
        for part in batch.weighted(mine_B.float()).split(view.engine.micro or len(batch)):
            key = ("select", *(tuple(value.shape) for value in part.fields.values()))
            found.append(view.counted(key, partial(_mean_nll, view, part)))
        losses_B[mine_B.to(losses_B.device)] = torch.cat(found)
    return view.sum(losses_B).cpu()


def _mean_nll(view: Any, batch: Batch) -> Tensor:
    labels_BT = batch["labels"].to(view.engine.device)
    counted_B = (labels_BT != IGNORE).sum(dim=1).clamp(min=1)
    return token_nll(view.model(batch), labels_BT).double().sum(dim=1) / counted_B


def present(batch: Batch, vocab: int) -> Tensor:
    """Which tokens a row holds, [B, V] float64 of 0 and 1; padding aside."""
    tokens_BT, there_BT = batch["tokens"].cpu(), batch["segments"].cpu() > 0
    words_BV = torch.zeros(len(batch), vocab, dtype=torch.float64)
    rows = torch.arange(len(batch))[:, None].expand_as(tokens_BT)
    words_BV[rows[there_BT], tokens_BT[there_BT]] = 1.0
    return words_BV


def bayes(words_BV: Tensor, rows_C: Tensor, words_CV: Tensor) -> Tensor:
    """P(class 1 | tokens) of a Bernoulli naive Bayes model, [B]: one row more with each token and one without, a class.

    log P(c) + Σ_v log(p_cv where v is there, else 1 - p_cv), p_cv = (rows of c with v + 1) / (rows of c + 2).
    """
    p_CV = (words_CV + 1.0) / (rows_C[:, None] + 2.0)
    scores_BC = words_BV @ (p_CV.log() - (1.0 - p_CV).log()).T + (1.0 - p_CV).log().sum(dim=1)
    return torch.softmax(scores_BC + (rows_C / rows_C.sum()).log(), dim=1)[:, 1]


def effect(run: Seen) -> dict[str, float]:
    """The share of rows learned from in the first steps and in the last third, and a step's operations there."""
    rows = [row for row in run.rows if row["kind"] == "train"]
    kept = [row["trained"] / row["rows"] for row in rows]
    third = len(rows) // 3
    work = (rows[-1]["flops"] - rows[-1 - third]["flops"]) / third
    return {"first": min(kept[:3]), "last": sum(kept[-third:]) / third, "work": work}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """All rows at first, few later, and then a step takes less, although losses are asked: not of all rows.

    To read a row takes a third of what learning from it does: with all rows read, so much of a step were choosing.
    """
    choosing = on["work"] / off["work"] - on["last"]
    return on["first"] == off["last"] == 1.0 and on["last"] < 0.7 and 0 < choosing < 0.2


BENCH = Bench(
    base="recipes/bench/merge.yaml",
    stage="asked",
    arm={"methods": [{"use": "select/multistage"}], "packing": "single", "until": "1e12flop"},
    baseline={"packing": "single", "until": "1e12flop"},
    metric="bits_per_byte/asked",
    better="lower",
    margin=0.01,
    tune={"methods.0.threshold": [0.2, 0.4, 0.8], "optim.lr": [1e-3, 2e-3]},
    tune_baseline={"optim.lr": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3]},
    scale="DistilBERT on GLUE, Amazon and AG news: up to 5.3× fewer examples and 6.8× less time at a minor loss",
)

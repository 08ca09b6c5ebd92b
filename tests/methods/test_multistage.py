"""Multistage filtering: what is read and learned from in each stage, and the predictor beside its formula."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.small import batch_of, view_of
from tutelage.base.clock import Clock
from tutelage.methods.objective.causal_lm import CausalLM
from tutelage.methods.select import multistage
from tutelage.methods.select.multistage import Multistage, bayes, present, row_losses


def test_the_predictor_is_bernoulli_naive_bayes() -> None:
    rows, words = torch.tensor([3.0, 1.0]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    found = bayes(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), rows, words)
    p = [[(2 + 1) / (3 + 2), (0 + 1) / (3 + 2)], [(1 + 1) / (1 + 2), (1 + 1) / (1 + 2)]]
    zero, one = 3 / 4 * p[0][0] * (1 - p[0][1]), 1 / 4 * p[1][0] * (1 - p[1][1])
    assert float(found[0]) == pytest.approx(one / (zero + one))
    zero, one = 3 / 4 * (1 - p[0][0]) * p[0][1], 1 / 4 * (1 - p[1][0]) * p[1][1]
    assert float(found[1]) == pytest.approx(one / (zero + one))


def test_tokens_count_once_a_row_and_padding_not_at_all() -> None:
    batch = batch_of(["aa", "aab"])
    words = present(batch, 307)
    assert words.sum(dim=1).tolist() == [2, 3] and set(words.unique().tolist()) == {0, 1}  # the first token is one, too
    assert not words[:, 0].any()


def test_a_row_s_loss_is_the_mean_over_its_labels_and_only_rows_asked_for_are_read() -> None:
    view = view_of(objective=CausalLM())
    batch = batch_of(["abc", "abcdef", "ba"], prompt=1)
    counted = view.engine.flops.total
    found = row_losses(batch, view, torch.tensor([True, False, True]))
    assert view.engine.flops.totals["select"] == view.engine.flops.total - counted > 0
    logits = torch.cat([piece.reshape(3, -1, piece.shape[-1]) for piece, *_ in view.model(batch).chunks()], dim=1)
    for i, asked in enumerate((True, False, True)):
        wanted = torch.nn.functional.cross_entropy(logits[i].float(), batch["labels"][i], ignore_index=-100)
        assert float(found[i]) == pytest.approx(float(wanted.detach()) if asked else 0.0, rel=1e-4)


class Steps:
    """Batches of rows `easy` and `hard`, told apart by their tokens, with losses made up."""

    def __init__(self, method: Multistage, monkeypatch: Any, *, total: int = 100) -> None:
        self.method, self.total, self.read = method, total, Tensor()
        monkeypatch.setattr(multistage, "row_losses", self.losses)
        monkeypatch.setattr(multistage, "present", lambda batch, vocab: batch.words)

    def losses(self, batch: Any, view: Any, read: Tensor) -> Tensor:
        self.read = read
        return torch.where(read, batch.losses, torch.zeros(1, dtype=torch.float64))

    def __call__(self, step: int, losses: list[float]) -> list[float]:
        class Made(SimpleNamespace):
            def __len__(self) -> int:
                return len(losses)

        hard = torch.tensor(losses, dtype=torch.float64) > 1.0
        words = torch.stack([~hard, hard, torch.ones_like(hard)], dim=1).double()
        batch: Any = Made(losses=torch.tensor(losses, dtype=torch.float64), words=words)
        view: Any = SimpleNamespace(
            clock=Clock(step=step, total={"step": float(self.total)}),
            engine=SimpleNamespace(anatomy=SimpleNamespace(vocab=3)),
        )
        found: list[float] = self.method.weigh(batch, view).tolist()
        return found


def test_the_threshold_is_the_mean_of_the_warm_up_s_newest_rows_and_stays(monkeypatch: Any) -> None:
    step = Steps(method := Multistage(warm="2step", window=3, threshold=0.5, latest="100%"), monkeypatch)  # type: ignore[arg-type]
    assert step(0, [9, 9]) == step(1, [4, 2]) == [1, 1]
    assert method.bound() == pytest.approx(0.5 * (9 + 4 + 2) / 3)
    assert step(2, [2.4, 2.6]) == [0, 1] and step(3, [2.5, 0.1]) == [1, 0]  # where none is above, the hardest is kept
    assert method.bound() == 2.5


class Elsewhere:
    """A tensor on another device, where a resumed stage finds its state."""

    def __init__(self, there: Tensor) -> None:
        self.there = there

    def cpu(self) -> Tensor:
        return self.there


def test_a_warm_up_goes_on_with_a_window_that_was_read_back_onto_another_device(monkeypatch: Any) -> None:
    step = Steps(method := Multistage(warm="2step", window=3, latest="100%"), monkeypatch)  # type: ignore[arg-type]
    step(0, [9, 4])
    method.state["window"] = Elsewhere(method.state["window"])
    step(1, [2, 1])
    assert method.state["window"].tolist() == [4, 2, 1]


def test_it_holds_only_where_the_predictor_spares_reading_too() -> None:
    off = {"first": 1.0, "last": 1.0, "work": 300.0}
    assert multistage.holds(
        {"first": 1.0, "last": 0.25, "work": 75.0 + 25.0}, off
    )  # a quarter is read, all of it learned
    assert not multistage.holds({"first": 1.0, "last": 0.25, "work": 75.0 + 100.0}, off)  # all is read
    assert not multistage.holds({"first": 1.0, "last": 0.25, "work": 75.0}, off)  # none is: losses were not asked


def test_a_sure_predictor_spares_the_reading_of_what_it_foretells_to_be_easy(monkeypatch: Any) -> None:
    step = Steps(method := Multistage(warm="1step", steps=2, sure=0.5, latest="100%"), monkeypatch)  # type: ignore[arg-type]
    step(0, [1.0, 1.0])
    for i in range(1, 5):
        assert step(i, [2.0, 0.5, 2.0]) == [1, 0, 1]
        assert step.read.all() == (i < 3)  # the first doubt is ln 2; with the second the mean of two is below 0.5
    assert step.read.tolist() == [True, False, True]
    assert step(5, [0.5, 0.5]) == [1, 0] or step(5, [0.5, 0.5]) == [0, 1]
    assert step.read.sum() == 1  # nothing is foretold to be hard: the likeliest is read and learned from
    doubts = method.state["doubts"]
    assert len(doubts) == 2 and float(doubts.mean()) <= 0.5


def test_from_latest_on_the_predictor_is_trusted_anyway(monkeypatch: Any) -> None:
    step = Steps(Multistage(warm="1step", sure=0.0, latest="50%"), monkeypatch)  # type: ignore[arg-type]
    step(0, [1.0, 1.0])
    step(1, [2.0, 0.5])
    assert step.read.all()
    step(50, [2.0, 0.5])
    assert step.read.tolist() == [True, False]


def test_doubts_are_the_predictor_s_loss_before_it_learns(monkeypatch: Any) -> None:
    step = Steps(method := Multistage(warm="1step", latest="100%", sure=0.0), monkeypatch)  # type: ignore[arg-type]
    step(0, [1.0, 1.0])
    step(1, [2.0, 0.5])
    chance = float(method.chance(torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)))
    step(2, [2.0, 2.0])
    assert method.state["doubts"].tolist() == pytest.approx([math.log(2), -math.log(chance)])

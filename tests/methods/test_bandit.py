"""Bandit mixing: the authors' bounds and softmax, windows and counts, and the three kinds of signals."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.methods.small import view_of
from tutelage.base.clock import Clock
from tutelage.base.errors import UserError
from tutelage.methods._kit.heldout import nats_per_label
from tutelage.methods.mix.bandit import Bandit, gradient_norm, ucb
from tutelage.methods.objective.causal_lm import CausalLM

NAMES: dict[str, dict[str, float]] = {"one": {}, "two": {}, "three": {}}


def a_view(tick: int = 0, **more: Any) -> Any:
    clock = Clock(tick=tick, step=tick, total={"step": 100.0})
    return SimpleNamespace(clock=clock, sources=list(NAMES), **more)


def drew(method: Bandit, rows: dict[str, int], *, numbers: dict[str, float] | None = None) -> None:
    batch: Any = SimpleNamespace(
        rows=[SimpleNamespace(source=name) for name, count in rows.items() for _ in range(count)]
    )
    method.observe(batch, numbers or {}, a_view())


def shares(means: list[float], drawn: list[int], *, temperature: float, explore: float) -> list[float]:
    """The authors' controller, written out for numbers."""
    total = sum(drawn)
    scores = [
        mean + explore * math.sqrt(2 * math.log(total + 1) / (count + 1))
        for mean, count in zip(means, drawn, strict=True)
    ]
    powers = [math.exp((score - max(scores)) / temperature) for score in scores]
    return [power / sum(powers) for power in powers]


def test_the_bound_is_the_mean_and_a_bonus_for_what_is_seldom_drawn() -> None:
    found = ucb(torch.tensor([0.5, 0.2]), torch.tensor([300.0, 20.0]), explore=1.0).tolist()
    assert found == pytest.approx([0.5 + math.sqrt(2 * math.log(321) / 301), 0.2 + math.sqrt(2 * math.log(321) / 21)])


def test_a_given_signal_counts_by_size_within_its_window_for_the_sources_that_were_drawn() -> None:
    method = Bandit(signal="advantage", window=2, temperature=0.5)
    assert list(method.weights(NAMES, a_view()).values()) == pytest.approx([1 / 3] * 3)
    drew(method, {"one": 6, "two": 2}, numbers={"advantage/one": 9.0, "advantage/two": 0.4, "advantage/three": 7.0})
    drew(method, {"one": 6, "two": 2}, numbers={"advantage/one": -0.6, "advantage/two": 0.2})
    drew(method, {"one": 8}, numbers={"advantage/one": 0.2, "advantage/two": 5.0})
    found = method.weights(NAMES, a_view(tick=3))
    assert list(found.values()) == pytest.approx(shares([0.4, 0.3, 0.0], [20, 4, 0], temperature=0.5, explore=1.0))


def test_a_signal_that_no_step_gives_is_named() -> None:
    method = Bandit(signal="advantage")
    drew(method, {"one": 8}, numbers={"loss": 1.0})
    with pytest.raises(
        UserError, match="no step of this stage gives 'advantage/one'; supervised stages have: progress"
    ):
        method.weights(NAMES, a_view(tick=1))


def test_rows_of_others_do_not_count_and_pieces_of_a_source_do() -> None:
    method = Bandit()
    drew(method, {"one": 3, "two:64": 2, "replayed/one": 4})
    assert method.state["drawn"].tolist() == [3, 2, 0]


def test_progress_is_the_change_of_loss_over_a_round_either_way(monkeypatch: Any) -> None:
    method = Bandit(every="10step", window=2, explore=0.0, temperature=1.0)  # type: ignore[arg-type]
    losses = {"one": 2.0, "two": 3.0, "three": 1.0}
    asked = []

    def nats(view: Any, name: str, *, rows: int) -> float:
        asked.append(name)
        return losses[name]

    monkeypatch.setattr("tutelage.methods.mix.bandit.nats_per_label", nats)
    for tick, now in [
        (0, [9, 9, 9]),
        (1, [2, 3, 1]),
        (5, [9, 9, 9]),
        (10, [1.6, 3.1, 1]),
        (19, [9, 9, 9]),
        (20, [1.4, 3, 1]),
    ]:
        losses.update(zip(NAMES, now, strict=True))
        found = list(method.weights(NAMES, a_view(tick=tick)).values())
    assert len(asked) == 3 * 3  # after the first step, and at 10 and 20
    means = [(0.4 + 0.2) / 2, (0.1 + 0.1) / 2, 0.0]
    assert found == pytest.approx(shares(means, [0, 0, 0], temperature=1.0, explore=0.0))


def test_norms_count_in_shares_of_the_largest(monkeypatch: Any) -> None:
    norms = {"one": 4.0, "two": 1.0, "three": 0.0}
    monkeypatch.setattr("tutelage.methods.mix.bandit.gradient_norm", lambda view, name, rows: norms[name])
    method = Bandit(signal="grad_norm", explore=0.0, temperature=0.5)
    found = list(method.weights(NAMES, a_view(tick=1)).values())
    assert found == pytest.approx(shares([1.0, 0.25, 0.0], [0, 0, 0], temperature=0.5, explore=0.0))


def test_the_gradient_s_norm_is_that_of_the_held_out_loss() -> None:
    view = view_of(objective=CausalLM(), columns={"ab": ["abab", "bababa"], "none": []})
    found = gradient_norm(view, "ab", rows=2)
    model = view.engine.model
    model.zero_grad()
    batch = next(view.measured("ab").once(2))
    logits = model(**view.engine.modality.inputs(batch, anatomy=view.engine.anatomy, packing="documents")).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100).backward()
    wanted = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert nats_per_label(view, "ab", rows=2) > 0
    with pytest.raises(UserError, match="no gradient can be taken on 'none': nothing of it is held out"):
        gradient_norm(view, "none", rows=2)

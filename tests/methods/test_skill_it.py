"""Skill-it: the paper's update on made-up losses, the graph from pilot runs, and what a pilot leaves behind."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.methods.small import Texts, data_of, view_of
from tests.toy import graph, numbers
from tutelage.base.clock import Clock
from tutelage.base.errors import UserError
from tutelage.core import shape
from tutelage.core.run import run_graph
from tutelage.methods._kit.heldout import nats_per_label
from tutelage.methods.mix.skill_it import SkillIt
from tutelage.methods.objective.causal_lm import CausalLM
from tutelage.methods.optim.adamw import AdamW

NAMES: dict[str, dict[str, float]] = {"one": {}, "two": {}, "three": {}}
CHAIN = {"one": {"two": 0.5, "three": 0.5}, "two": {"three": 0.5}}
MATRIX = [[1.0, 0.5, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]]


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def asked(method: SkillIt, losses: dict[float, list[float]], *, names: Any = NAMES) -> dict[float, list[float]]:
    """The shares at each share of the stage; `losses` are what every target costs then."""
    found = {}
    for frac, values in losses.items():
        view = SimpleNamespace(clock=Clock(step=round(1000 * frac), total={"step": 1000.0}))
        object.__setattr__(method, "losses", lambda targets, view, now=values: torch.tensor(now, dtype=torch.float64))
        found[frac] = list(method.weights(names, view).values())
    return found


def test_shares_follow_the_paper_s_formula_round_by_round() -> None:
    method = SkillIt(graph=CHAIN, eta=0.5, window=2)
    found = asked(method, {0.0: [9, 9, 9], 0.05: [9, 9, 9], 0.1: [1, 2, 3], 0.2: [0.5, 2, 3], 0.3: [0.1, 1, 3]})

    def after(*rounds: list[float]) -> list[float]:
        total = [sum(one[j] for one in rounds) for j in range(3)]
        return softmax([0.5 * sum(a * loss for a, loss in zip(row, total, strict=True)) for row in MATRIX])

    assert found[0.0] == pytest.approx(softmax([0.5 * sum(row) for row in MATRIX]))  # losses count as 1 at first
    assert found[0.05] == found[0.0]
    assert found[0.1] == pytest.approx(after([1, 2, 3]))
    assert found[0.2] == pytest.approx(after([1, 2, 3], [0.5, 2, 3]))
    assert found[0.3] == pytest.approx(after([0.5, 2, 3], [0.1, 1, 3]))  # the first round is out of the window


def test_without_graph_and_pilots_each_source_helps_itself_and_eta_zero_is_even() -> None:
    alone = asked(SkillIt(pilot=0, eta=1.0), {0.0: [1, 1, 1], 0.1: [1, 2, 3]})
    assert alone[0.0] == pytest.approx([1 / 3] * 3) and alone[0.1] == pytest.approx(softmax([1, 2, 3]))
    assert asked(SkillIt(graph=CHAIN, eta=0.0), {0.0: [1, 1, 1], 0.1: [1, 2, 3]})[0.1] == pytest.approx([1 / 3] * 3)


def test_targets_that_are_no_sources_count_through_the_graph_alone() -> None:
    method = SkillIt(graph={"one": {"goal": 0.8}}, targets=["goal"], eta=1.0)
    assert asked(method, {0.0: [1], 0.1: [2]})[0.1] == pytest.approx(softmax([1.6, 0, 0]))


def test_before_the_pilots_all_are_drawn_alike_and_nothing_is_remembered() -> None:
    method = SkillIt()
    assert asked(method, {0.0: [1, 1, 1]})[0.0] == pytest.approx([1 / 3] * 3) and not method.state
    assert SkillIt().weights({}, None) == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"oen": {"two": 1.0}}, "mix.graph: nothing is called 'oen' here; did you mean 'one'"),
        ({"one": {"zzz": 1.0}}, "mix.graph: nothing is called 'zzz' here; there are: one, two, three"),
    ],
)
def test_a_graph_of_other_names_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SkillIt(graph=wrong).weights(NAMES, SimpleNamespace(clock=Clock(total={"step": 1.0})))


# -- pilots ------------------------------------------------------------------------------------------------------------

TEXTS = {"ab": ["ababababab", "babababa"], "xy": ["xyxyxyxy", "yxyxyxyxyx"]}


def piloted() -> tuple[Any, SkillIt]:
    view = view_of(objective=CausalLM(), columns=TEXTS)
    view.sources, view.length, view.tokens = list(TEXTS), 16, 64
    view._source = lambda name: data_of([Texts(name, TEXTS[name])], length=16)
    run: Any = SimpleNamespace(
        engine=view.engine,
        view=view,
        node=SimpleNamespace(stage=SimpleNamespace(groups=[], engine=SimpleNamespace(fused_backward=False))),
        methods=SimpleNamespace(slots={"optim": AdamW(lr=1e-2)}),
    )
    view._try = partial(shape.tried, run)
    return view, SkillIt(pilot=8, passages=4)


def test_the_graph_is_the_relative_fall_of_each_loss_and_the_weights_come_back() -> None:
    view, method = piloted()
    start = {name: p.detach().clone() for name, p in view.engine.model.named_parameters()}
    before = method.losses(list(TEXTS), view)
    method.begin(view.engine.model, view)
    for name, p in view.engine.model.named_parameters():
        assert torch.equal(p, start[name])
    assert view.engine.optimizer is None
    found = method.state["graph"]
    assert found.shape == (2, 2) and bool((found >= 0).all())
    assert found[0, 0] > found[0, 1] and found[1, 1] > found[1, 0]  # each helps itself most
    batches = view.source("ab").batches(8, rows=4)
    again = view.tried(batches, lambda: method.losses(list(TEXTS), view))
    assert torch.allclose(found[0], ((before - again) / before).clamp(min=0))


def test_a_loss_is_nats_per_label_and_its_operations_are_counted() -> None:
    view, _ = piloted()
    batch = next(view.measured("ab").once(2))
    logits = view.model(batch)
    wanted = torch.nn.functional.cross_entropy(
        torch.cat([part[0].reshape(-1, part[0].shape[-1]) for part in logits.chunks()]).float(),
        batch["labels"].flatten(),
        ignore_index=-100,
    )
    counted = view.engine.flops.total
    assert nats_per_label(view, "ab", rows=2) == pytest.approx(float(wanted), rel=1e-5)
    assert view.engine.flops.totals["select"] == view.engine.flops.total - counted > 0


def test_a_target_of_which_nothing_is_held_out_is_named() -> None:
    view, _ = piloted()
    view.heldout["empty"] = data_of([Texts("empty", [])])
    with pytest.raises(UserError, match="no loss can be taken on 'empty': nothing of it is held out"):
        nats_per_label(view, "empty", rows=2)


def test_what_pilots_and_rounds_compute_counts_for_the_stage(tmp_path: Path) -> None:
    def stage(**mix: Any) -> Any:
        def change(recipe: dict[str, Any]) -> None:
            two = recipe["stages"].pop("two")
            recipe["stages"]["one"]["data"] |= two["data"]
            recipe["stages"]["one"] |= {"mix": {"use": "mix/skill_it", "passages": 8, **mix}}

        made = graph(tmp_path / str(len(list(tmp_path.iterdir()))), change=change)
        result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
        assert not result.failed, result.failed
        return numbers(made.nodes["one"].folder, kind="train")  # type: ignore[arg-type]

    plain, tried = stage(pilot=0, every="1000step"), stage(pilot=3, every="1000step")
    rounds = stage(pilot=0, every="4step", window=1)
    each = plain[1]["flops"] - plain[0]["flops"]
    begun = tried[0]["flops"] - plain[0]["flops"]
    assert begun > 2 * 3 * 0.5 * each  # two sources, three steps; the toy's rows differ in how full they are
    assert rounds[-1]["flops"] > plain[-1]["flops"] and rounds[3]["flops"] == plain[3]["flops"]

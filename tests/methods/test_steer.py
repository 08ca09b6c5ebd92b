"""Policies: synthetic signals in, exact actions out; and whole tiny runs that go wrong and are brought back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy import stats

from tests.methods.small import Texts, data_of, decode
from tests.steering.live import ask, put
from tests.toy import graph, numbers
from tutelage.base.action import MOST, ROWS, parse
from tutelage.base.clock import Clock
from tutelage.base.errors import UserError
from tutelage.base.registry import make
from tutelage.core import engine, loop, steer
from tutelage.core.artifact import flatten, unflatten
from tutelage.core.record import read_lines
from tutelage.core.run import run_graph
from tutelage.look import digest_of
from tutelage.methods._kit.signals import measures, news, usual
from tutelage.methods.steer.early_stop import EarlyStop, forecast
from tutelage.methods.steer.forgetting_budget import ForgettingBudget
from tutelage.methods.steer.format_then_drift import SENTENCE, FormatThenDrift, well_formed
from tutelage.methods.steer.objective_gate import ObjectiveGate, entropy, patches, whole_patches
from tutelage.methods.steer.plateau import Plateau
from tutelage.methods.steer.rollback import Rollback

Acts = list[dict[str, Any]]


def view(tick: int, *, total: float = 1000.0, step: int | None = None, **signals: float) -> Any:
    """What a policy sees after a step; `eval_x__y` stands for `eval/x/y`."""
    named = {name.replace("eval_", "eval/", 1).replace("__", "/"): value for name, value in signals.items()}
    clock = Clock(tick=tick, step=tick if step is None else step, total={"step": total})
    return SimpleNamespace(clock=clock, signals={"finite": 1.0, "lr": 1e-3, **named}, seed=0)


def asked(policy: Any, values: list[float], *, name: str = "loss", since: int = 1) -> dict[int, Acts]:
    """The actions asked for by tick, of a series of numbers, one a step."""
    found = {}
    for tick, value in enumerate(values, start=since):
        finite = float(math.isfinite(value))
        acts = policy.act(view(tick, **{name: value, "finite": finite}))
        if acts:
            found[tick] = acts
    return found


def measured(
    policy: Any, values: list[float], *, name: str = "eval_bits_per_byte__a", gap: int = 10
) -> dict[int, Acts]:
    """The same of a measure, taken every `gap` steps and seen in every step until the next."""
    found = {}
    for tick in range(1, gap * len(values) + 1):
        last = (tick - 1) // gap
        acts = policy.act(view(tick, loss=1.0, eval_tick=last * gap, **{name: values[last]}))
        if acts:
            found[tick] = acts
    return found


# -- what comes in ----------------------------------------------------------------------------------------------------


def test_a_measure_is_new_once_even_where_it_has_not_changed():
    state: dict[str, Any] = {}
    seen = [news(state, view(t, eval_tick=t // 4 * 4, eval_x=2.0), "x", every=1) for t in range(9)]
    assert [i for i, value in enumerate(seen) if value is not None] == [0, 4, 8]


def test_a_measurement_that_a_rollback_brings_back_is_not_new():
    state: dict[str, Any] = {}
    assert news(state, view(8, eval_tick=8, eval_x=2.0), "x", every=1) == 2.0
    assert news(state, view(9, eval_tick=4, eval_x=3.0), "x", every=1) is None


def test_the_training_loss_comes_as_means_that_leave_out_what_is_no_number():
    state: dict[str, Any] = {}
    seen = [news(state, view(1, loss=x), "loss", every=2) for x in (1.0, math.nan, 3.0, 5.0, 7.0)]
    assert seen == [None, None, 2.0, None, 6.0]


def test_a_name_stands_for_its_columns_and_for_no_other_name():
    found = measures(view(1, eval_tick=1, eval_kl__a=1.0, eval_kl__b=3.0, eval_klx=9.0, eval_kl__c=math.nan), "kl")
    assert found == {"kl/a": 1.0, "kl/b": 3.0}


def test_the_usual_of_a_normal_sample_is_its_mean_and_deviation():
    sample = torch.randn(4001, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 5
    middle, spread = usual(sample)
    assert middle == pytest.approx(5, abs=0.1) and spread == pytest.approx(2, abs=0.1)


# -- rollback ---------------------------------------------------------------------------------------------------------

CALM = [3.0, 3.02, 2.98, 3.01, 2.99] * 4


def watch(**settings: Any) -> Rollback:
    return Rollback(**{"window": 10, "back": 5, "patience": 2, "cooldown": 6, "skip": 1, **settings})


def test_a_spike_goes_back_to_before_its_first_step_and_lowers_the_rate():
    policy = watch(factor=0.5)
    assert asked(policy, [*CALM, 9.0, 9.5]) == {
        22: [{"do": "rollback", "to": 15, "skip": True}, {"do": "scale", "path": "optim.lr", "by": 0.5}]
    }
    assert policy.why == "loss was 9.5, far above the steps before"


def test_what_is_passed_over_reaches_on_in_each_source_as_it_was_drawn_of_late():
    """Seven steps came since the save of tick 15: five more, each of three rows of one source and one of the other."""
    policy = watch(factor=1, skip=12)
    for names in ["cccc"] * 40 + [["a", "one/b", "a", "a"]] * 40:
        policy.observe(cast(Any, SimpleNamespace(rows=[SimpleNamespace(source=name) for name in names])), {}, None)
    far = [{"do": "skip_data", "source": "a", "rows": 15}, {"do": "skip_data", "source": "one/b", "rows": 5}]
    tensors, plain = flatten(policy.state)
    policy.state.update(unflatten({**tensors, **plain}))  # as after a cut
    assert asked(policy, [*CALM, 9.0, 9.5]) == {22: [{"do": "rollback", "to": 15, "skip": True}, *far]}


def test_more_than_a_request_holds_is_passed_over_as_far_as_it_does() -> None:
    """Sixty sources, each of a row a step but the first, which has two."""
    policy = watch(factor=0.5, skip=900_000)
    names = ["s00", *(f"s{i:02}" for i in range(60))]
    for _ in range(10):
        policy.observe(cast(Any, SimpleNamespace(rows=[SimpleNamespace(source=name) for name in names])), {}, None)
    (acts,) = asked(policy, [*CALM, 9.0, 9.5]).values()
    rows = {act["source"]: act["rows"] for act in acts if act["do"] == "skip_data"}
    assert [act["do"] for act in acts] == ["rollback", *["skip_data"] * 48, "scale"] and len(acts) == MOST
    assert rows == {"s00": ROWS, **{f"s{i:02}": 900_000 - 7 for i in range(1, 48)}}
    assert all(parse(act, place="here") for act in acts)


def test_one_high_step_is_no_spike_and_neither_is_a_rise_below_the_share():
    assert asked(watch(), [*CALM, 9.0, 3.0, 9.0, 3.0]) == {}
    assert asked(watch(rise=0.1), [*CALM, 3.29, 3.29, 3.29]) == {}
    assert list(asked(watch(rise=0.05), [*CALM, 3.29, 3.29, 3.29])) == [22]


def test_what_is_no_number_goes_back_at_once_even_before_anything_is_usual():
    assert asked(watch(factor=1), [3.0, math.nan]) == {2: [{"do": "rollback", "to": 0, "skip": True}]}
    assert asked(watch(factor=1, back=0), [3.0, 3.0, 3.0, math.inf])[4][0]["to"] == 3


def test_a_spike_that_ends_in_no_number_goes_back_to_before_the_spike():
    assert asked(watch(back=0, patience=9), [*CALM, 9.0, 50.0, math.nan])[23][0]["to"] == 20


def test_after_a_rollback_comes_a_rest_and_after_the_cap_nothing():
    high = [9.0] * 40
    assert list(asked(watch(cap=2, cooldown=12), [*CALM, *high])) == [22]  # at rest it learns the new level
    waves = [*CALM, 9.0, 9.0, *CALM, 9.0, 9.0, *CALM, 9.0, 9.0]
    assert list(asked(watch(cap=2), waves)) == [22, 44]
    assert list(asked(watch(cap=5), waves)) == [22, 44, 66]


def test_what_was_refused_is_not_asked_for_in_every_step():
    acts = asked(watch(cap=3, cooldown=12), [*CALM, *[9.0] * 200])
    assert list(acts) == [22]


def test_a_slow_rise_goes_back_to_where_the_usual_was_lowest():
    slow = [3.0 + 0.02 * i for i in range(100)]
    acts = asked(watch(diverged=0.3, back=0, rise=0.2), [*CALM, *slow])
    first = min(acts)
    assert 40 < first < 80 and 10 <= acts[first][0]["to"] <= 26
    assert asked(watch(diverged=0.3), [5.0 - 0.01 * i for i in range(300)]) == {}


def test_the_gradient_norm_is_watched_where_that_is_asked():
    assert asked(watch(), [*CALM, 3.0, 3.0], name="grad_norm") == {}
    policy = watch(watch="both")
    for tick, norm in enumerate([*[1.0, 1.1, 0.9] * 7, 40.0, 40.0], start=1):
        acts = policy.act(view(tick, loss=3.0 + 0.01 * (tick % 3), grad_norm=norm))
    assert acts and policy.why.startswith("grad_norm was 40")


def test_with_no_cap_left_from_the_start_it_is_off():
    assert Rollback(cap=0).is_off() and asked(Rollback(cap=0), [math.nan] * 3) == {}


# -- plateau ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {}, {"patience": 0}, {"patience": 2, "cooldown": 2}, {"better": "higher"}, {"relative": False, "threshold": 0.1},
    {"floor": 4e-4, "patience": 1},
])  # fmt: skip
@pytest.mark.parametrize("seed", range(4))
def test_the_rate_is_that_of_torchs_scheduler(settings: dict[str, Any], seed: int):
    rng = np.random.default_rng(seed)
    values = [float(v) for v in 3 / np.arange(1, 41) ** 0.3 + 0.2 * rng.normal(size=40)]
    policy = Plateau(watch="x", factor=0.5, **{"patience": 3, **settings})
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="min" if policy.better == "lower" else "max",
        factor=0.5,
        patience=policy.patience,
        threshold=policy.threshold,
        threshold_mode="rel" if policy.relative else "abs",
        cooldown=policy.cooldown,
        min_lr=policy.floor,
        eps=0.0,
    )
    rate = 1e-3
    for tick, value in enumerate(values):
        for act in policy.act(view(tick, loss=1.0, lr=rate, eval_tick=tick, eval_x=value)):
            assert act["do"] == "scale" and act["path"] == "optim.lr"
            rate *= act["by"]
        theirs.step(value)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
    assert rate < 1e-3


def test_a_refused_cut_is_asked_for_again_only_after_another_patience():
    assert list(measured(Plateau(patience=2), [1.0] * 9)) == [31, 61]


# -- early stop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", [(1.0, 4.0, 0.5), (0.3, 2.0, 1.2), (0.0, 6.0, 0.2)])
def test_a_power_law_is_continued(curve: tuple[float, float, float]):
    a, b, c = curve
    x = np.arange(50, 501, 50.0)
    ahead = forecast(x, a + b * x**-c, at=2000)
    assert ahead.mean == pytest.approx(a + b * 2000**-c, abs=2e-3)


def test_the_interval_holds_as_often_as_it_says():
    rng = np.random.default_rng(0)
    x, hits = np.arange(50, 501, 50.0), []
    for _ in range(300):
        a, b, c = rng.uniform(0, 2), rng.uniform(1, 6), rng.uniform(0.2, 1.5)
        found = forecast(x, a + b * x**-c + 0.02 * rng.normal(size=10), at=2000)
        true = a + b * 2000**-c + 0.02 * rng.normal()
        hits.append(0.05 <= found.below(true) <= 0.95)
    assert 0.84 <= np.mean(hits) <= 0.96


def test_with_one_exponent_the_forecast_is_that_of_a_straight_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tutelage.methods.steer.early_stop.EXPONENTS", np.array([1.0]))
    x = np.array([1.0, 2.0, 3.0, 5.0, 8.0])
    y = np.array([3.1, 2.2, 1.6, 1.5, 1.1])
    found, line = forecast(x, y, at=20.0), stats.linregress(1 / x, y)
    mean = line.intercept + line.slope / 20
    rss = ((y - line.intercept - line.slope / x) ** 2).sum()
    z = 1 / 20 - (1 / x).mean()
    scale = math.sqrt(rss / 3 * (1 + 1 / 5 + z**2 / ((1 / x - (1 / x).mean()) ** 2).sum()))
    assert found.mean == pytest.approx(mean) and found.scales[0] == pytest.approx(scale)
    assert found.below(1.0) == pytest.approx(stats.t.cdf((1.0 - mean) / scale, 3))
    low, high = found.interval(0.5)
    assert (low, high) == pytest.approx(tuple(stats.t.ppf([0.25, 0.75], 3, mean, scale)), abs=1e-2)


def curve(steps: int, *, end: float, noise: float = 0.003, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    at = np.arange(steps) * 10 + 1.0
    return [float(v) for v in end + 2 * at**-0.7 + noise * rng.normal(size=steps)]


def test_a_stage_that_will_not_reach_its_goal_ends_and_one_that_will_goes_on():
    poor = measured(EarlyStop(goal=1.5), curve(60, end=2.0))
    assert list(poor.values()) == [[{"do": "end_stage"}]] and min(poor) < 200
    assert measured(EarlyStop(goal=2.1), curve(60, end=2.0)) == {}


def test_without_a_goal_the_stage_ends_when_the_rest_brings_too_little():
    acts = measured(EarlyStop(gain=0.05), curve(100, end=2.0))
    assert len(acts) == 1
    x = min(acts)
    assert 2 * (x**-0.7 - 1000**-0.7) < 0.1  # what was really left there
    assert measured(EarlyStop(gain=0.0005, chance=0.01), curve(30, end=2.0), gap=10) == {}


def test_higher_is_better_where_that_is_said():
    rising = [-value for value in curve(60, end=2.0)]
    assert len(measured(EarlyStop(goal=-1.5, better="higher"), rising)) == 1
    assert measured(EarlyStop(goal=-2.1, better="higher"), rising) == {}


def test_the_rate_may_fall_before_the_end():
    acts = measured(EarlyStop(goal=1.0, decay="50step"), curve(60, end=2.0))
    assert list(acts.values()) == [[{"do": "end_stage", "after": "50step", "decay": True}]]


def test_what_was_rolled_back_is_no_part_of_the_curve():
    policy = EarlyStop(goal=0.0, skip=0, points=4, patience=99)
    for tick, step in enumerate([10, 20, 30, 40, 20, 30], start=1):
        policy.act(view(tick, step=step, eval_tick=tick, eval_bits_per_byte=3.0 / step))
    assert policy.state["x"].tolist() == [10, 20, 30] and len(policy.state["y"]) == 3


# -- forgetting budget ------------------------------------------------------------------------------------------------


def test_replay_is_raised_when_the_worst_column_leaves_the_budget():
    policy = ForgettingBudget(allowed=0.05, by=3.0, cooldown=1, cap=2)
    acts = measured(policy, [0.0, 0.04, 0.06, 0.07, 0.08, 0.02, 0.09, 0.09], name="eval_forgetting__prose")
    assert acts == {tick: [{"do": "scale", "path": "continual/replay.rate", "by": 3.0}] for tick in (21, 41)}
    assert policy.why == "forgetting/prose is 0.08, and 0.05 is allowed"
    policy = ForgettingBudget(allowed=0.05)
    assert policy.act(view(1, eval_tick=1, eval_forgetting__a=0.0, eval_forgetting__b=0.2))


def test_it_goes_back_to_the_last_measurement_in_budget_or_pauses():
    acts = measured(ForgettingBudget(then="rollback"), [0.0, 0.04, 0.06], name="eval_forgetting__prose")
    assert acts == {21: [{"do": "rollback", "to": 11, "skip": True}]}
    acts = measured(ForgettingBudget(then="pause", patience=2), [0.06, 0.0, 0.06, 0.06], name="eval_forgetting__prose")
    assert acts == {31: [{"do": "pause"}]}


# -- format, then drift -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "whole"), [
    ("The cat sat.", True), ("It did!", True), ("42)", True), (" Yes, it is. ", True), ("and then it went on.", False),
    ("The cat", False), (", which is why.", False), ("", False), ("Yes.\nWhat is it?", False),
])  # fmt: skip
def test_a_sentence_is_an_answer_and_a_continuation_is_none(text: str, whole: bool):
    assert well_formed([text], SENTENCE) == whole


def answering(policy: FormatThenDrift, shares: list[float], *, drift: list[float] | None = None) -> dict[int, Acts]:
    """Actions by check, when the model's answers are well formed so often."""
    found = {}
    for i, share in enumerate(shares, start=1):
        now = view(20 * i, **({"eval_forgetting__a": drift[i - 1]} if drift else {}))
        good = round(share * 10)
        now.generate = lambda prompts, good=good, **_: ["Good."] * good + ["bad"] * (10 - good)
        if acts := policy.act(now):
            found[i] = acts
    return found


def test_the_stage_ends_when_the_share_of_answers_stands_still_high_enough():
    policy = FormatThenDrift(prompts=["x"], patience=2, least=0.5)
    assert answering(policy, [0.0, 0.0, 0.0, 0.3, 0.3, 0.3, 0.7, 0.9, 0.9, 0.9, 0.9]) == {10: [{"do": "end_stage"}]}
    assert policy.why == "90% of answers are well formed, as 2 checks ago"


def test_drift_alone_ends_it_where_a_bound_is_given():
    drift = [0.0, 0.05, 0.2, 0.3]
    policy = FormatThenDrift(prompts=["x"], allowed=0.1, decay="10%")
    assert answering(policy, [0.0] * 4, drift=drift) == {3: [{"do": "end_stage", "after": "10%", "decay": True}]}
    assert answering(FormatThenDrift(prompts=["x"]), [0.0] * 4, drift=drift) == {}


def test_prompts_are_what_stands_before_an_answer_without_the_token_that_begins_a_text():
    source = Texts("b", ["what? yes.", "who? me."], prompt=5)
    now = view(20)
    now.heldout, now.kept = {"b": data_of([source]), "old": None}, frozenset({"old"})
    now.measured = lambda column: now.heldout[column]
    now.decode = lambda ids, skip_special_tokens: decode(ids)
    given: list[str] = []
    now.generate = lambda prompts, **_: given.extend(prompts) or ["Good."] * len(prompts)
    FormatThenDrift(count=2).act(now)
    assert sorted(given) == ["what?", "who? "]
    source.prompt = 0
    with pytest.raises(UserError, match="needs `prompts`"):
        FormatThenDrift(count=2).act(now)


def test_a_form_that_is_no_expression_is_refused():
    with pytest.raises(UserError, match="form.*not a regular expression"):
        make({"use": "steer/format_then_drift", "form": "("})


# -- objective gate ---------------------------------------------------------------------------------------------------


def test_entropy_is_that_of_the_eigenvalues():
    z = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    p = torch.linalg.eigvalsh((z @ z.mT).double())
    p = p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(entropy(z).double(), -p.square().sum(-1).log(), atol=1e-5, rtol=1e-5)
    assert entropy(torch.ones(1, 1, 8, 16)) == pytest.approx(0, abs=1e-6)
    assert entropy(7 * torch.eye(8, 16)[None, None]) == pytest.approx(math.log(8))


def test_patches_lie_within_one_document():
    segments = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 0, 0, 0, 0]])
    assert whole_patches(segments, 2).tolist() == [
        [True, True, False, True, False],
        [True, True, True, False, False],
    ]
    assert patches(torch.zeros(2, 10, 3), 4).shape == (2, 2, 4, 3)


def test_the_gate_compresses_when_the_loss_stands_and_learns_when_the_entropy_does():
    policy = ObjectiveGate(plain=3, compressing=2, delta=0.05, strength=0.5)
    series = [
        (3.0, 0),
        (2.5, 0),
        (2.48, 0),
        (2.49, 0),
        (2.47, 0),
        (2.5, 2.0),
        (2.5, 1.9),
        (2.5, 1.88),
        (2.5, 1.87),
        (2.4, 0),
    ]
    switched = {}
    for tick, (loss, found) in enumerate(series, start=1):
        acts = policy.act(view(tick, loss=loss, **{"aux/steer/objective_gate": 0.5 * found}))
        for act in acts:
            switched[tick] = act
            policy.phase = act["to"]
    assert switched == {
        5: {"do": "set", "path": "steer/objective_gate.phase", "to": 1.0},
        9: {"do": "set", "path": "steer/objective_gate.phase", "to": 0.0},
    }


def test_a_rise_of_the_loss_ends_compression_at_once():
    policy = ObjectiveGate(phase=1.0, spike=0.1)
    found = [bool(policy.act(view(t, loss=loss))) for t, loss in enumerate([2.0, 1.9, 2.05, 2.1], start=1)]
    assert found == [False, False, False, True]


def test_a_rise_is_one_above_the_first_loss_of_the_compression_too():
    policy = ObjectiveGate(phase=1.0, spike=0.1)
    assert asked(policy, [2.0, 2.3]).keys() == {2}  # the first loss is that of weights not yet compressed
    moved_by_a_person = ObjectiveGate(plain=9, spike=0.1)
    assert asked(moved_by_a_person, [1.0, 2.0]) == {}
    moved_by_a_person.phase = 1.0
    assert asked(moved_by_a_person, [2.0, 2.1, 2.3], since=3).keys() == {5}


def test_after_a_rise_plain_learning_begins_with_no_least_loss():
    policy = ObjectiveGate(phase=1.0, spike=0.1, plain=2, delta=0.05)
    assert asked(policy, [2.0, 2.3]).keys() == {2}
    policy.phase = 0.0
    won_back = [2.3, 2.2, 2.1, 2.04]  # each of them above the least loss of the compression, and each progress
    assert asked(policy, [*won_back, 2.04, 2.04], since=3).keys() == {8}


def test_a_refused_switch_is_asked_for_again_only_after_another_patience():
    assert list(asked(ObjectiveGate(plain=4), [2.0] * 20)) == [5, 10, 15, 20]


def test_smoothing_hides_what_one_batch_does():
    noisy = [2.0 + 0.5 * (-1) ** i for i in range(30)]
    policy = ObjectiveGate(phase=1.0, compressing=99)
    assert asked(policy, noisy)
    assert asked(ObjectiveGate(phase=1.0, compressing=99, smooth=0.95), noisy) == {}


# -- every one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [
    watch(cap=3), Plateau(watch="loss", every=2, patience=1), EarlyStop(watch="loss", every=2, goal=2.0),
    ForgettingBudget(watch="x"), ObjectiveGate(plain=3, smooth=0.5, delta=0.1),
])  # fmt: skip
def test_one_that_goes_on_from_a_save_asks_for_the_same(policy: Any):
    rng = np.random.default_rng(1)
    values = [float(v) for v in 3 + 0.3 * rng.normal(size=60)]
    values[40:43] = [30.0, 40.0, 50.0]
    whole = type(policy)(**policy.model_dump())
    once = asked(whole, values)
    assert once or isinstance(policy, ForgettingBudget)
    first, second = (type(policy)(**policy.model_dump()) for _ in range(2))
    found = asked(first, values[:31])
    tensors, plain = flatten(first.state)
    second.state.update(unflatten({**tensors, **json.loads(json.dumps(plain))}))
    assert found | asked(second, values[31:], since=32) == once


# -- whole runs -------------------------------------------------------------------------------------------------------

ONE = "runs/toy/one/1"
ROLLBACK = {
    "use": "steer/rollback", "window": 4, "patience": 1, "back": 0, "rise": 0.3, "factor": 0.5, "cooldown": 4, "skip": 1
}  # fmt: skip


def run(folder: Path, *policies: dict[str, Any], steps: int = 14, **stage: Any) -> Path:
    """Stage `one` of the toy with these policies; its folder."""

    def change(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"] |= {"methods": list(policies), "save": {"every": "2step", "keep": 9}, **stage}

    result = run_graph(
        graph(folder, steps=steps, change=change), only="one", jobs=0, drift="refuse", tell=lambda *_: None
    )
    assert not result.failed and not result.stopped
    return folder / ONE


def broken(monkeypatch: pytest.MonkeyPatch, *, at: int, how: Callable[[float], float]) -> None:
    """The loss of one batch, and so the gradient of that step, comes out otherwise; once, by its tick."""
    descend = engine.Engine._descend

    def once(self: Any, micro: Any, view: Any, scales: Any) -> Any:
        if view.clock.tick != at:
            return descend(self, micro, view, scales)
        totals, weights = descend(self, micro, view, scales)
        for p in self.params.values():
            if p.grad is not None:
                p.grad.mul_(how(1.0))
        return totals * how(1.0), weights

    monkeypatch.setattr(engine.Engine, "_descend", once)


def losses(home: Path) -> list[tuple[int, int, float]]:
    return [(row["tick"], row["step"], row["loss"]) for row in numbers(home, kind="train")]


def done(home: Path) -> list[tuple[int, Acts]]:
    """What policies did, by tick."""
    return [
        (line["tick"], line["do"]) for line in read_lines(home / "journal.jsonl") if line["by"].startswith("steer/")
    ]


def test_a_run_whose_loss_is_no_number_dies_without_and_recovers_with_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken(monkeypatch, at=8, how=lambda x: x * math.nan)
    with pytest.raises(UserError, match="not a number at step 9"):
        run(tmp_path / "without")
    home = run(tmp_path / "with", ROLLBACK)
    assert done(home) == [
        (9, [{"do": "rollback", "to": 8, "skip": True}, {"do": "scale", "path": "optim.lr", "by": 0.5}])
    ]
    found = losses(home)
    assert [tick for tick, _, _ in found] == [*range(1, 10), *range(11, 17)]
    assert [step for _, step, _ in found] == [*range(1, 10), *range(9, 15)]
    assert found[-1][2] < found[0][2] and [str(loss).lower() for *_, loss in found].count("nan") == 1
    rates = [row["lr"] for row in numbers(home, kind="train")]
    assert rates[:9] == [0.01] * 9 and rates[9:] == [0.005] * 6


def test_a_rate_that_a_person_holds_does_not_end_a_run_that_could_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Lowering it is refused, and the way back alone is taken."""
    broken(monkeypatch, at=8, how=lambda x: x * math.nan)
    collect, asked = steer.collect, []

    def once(stage: Any) -> Any:
        if stage.clock.tick == 4 and not asked:
            asked.append(put(stage.folder, "mine", ask({"do": "set", "path": "optim.lr", "to": 0.008})))
        return collect(stage)

    monkeypatch.setattr(steer, "collect", once)
    home = run(tmp_path, ROLLBACK)
    assert done(home) == [(9, [{"do": "rollback", "to": 8, "skip": True}])]
    assert [row["lr"] for row in numbers(home, kind="train")][-1] == 0.008 and losses(home)[-1][1] == 14
    told = [act for line in read_lines(home / "journal.jsonl") if line["by"] == "engine" for act in line["do"]]
    assert any(act["do"] == "refused" and "it is theirs" in act["why"] for act in told)


def test_a_spike_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken(monkeypatch, at=8, how=lambda x: x * 50)
    home = run(tmp_path, ROLLBACK)
    assert [(tick, acts[0]) for tick, acts in done(home)] == [(9, {"do": "rollback", "to": 8, "skip": True})]


def test_what_the_rules_do_not_allow_is_refused_and_the_run_ends_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken(monkeypatch, at=8, how=lambda x: x * math.nan)
    with pytest.raises(UserError, match="not a number at step 9"):
        run(tmp_path, ROLLBACK, steering={"policy": {"budget": 0}})
    refused = [e for line in read_lines(tmp_path / ONE / "journal.jsonl") for e in line["do"] if e["do"] == "refused"]
    assert refused and all("budget of 0" in entry["why"] for entry in refused)


def replayed(home: Path) -> list[dict[str, Any]]:
    """The journal as a recipe's actions."""
    lines = [line for line in read_lines(home / "journal.jsonl") if line["by"] != "engine"]
    return [{**act, "tick": line["tick"]} for line in lines for act in line["do"]]


POLICIES = {
    "rollback": ROLLBACK,
    "plateau": {"use": "steer/plateau", "watch": "loss", "every": 2, "patience": 0, "threshold": 0.5, "factor": 0.5},
    "early_stop": {"use": "steer/early_stop", "watch": "loss", "every": 1, "goal": 0.0, "skip": 0, "points": 9, "patience": 1},
    "objective_gate": {"use": "steer/objective_gate", "plain": 2, "compressing": 3, "delta": 10.0, "spike": 5.0},
    "format_then_drift": {
        "use": "steer/format_then_drift", "prompts": ["the"], "form": "(?s).*", "every": 1, "patience": 8, "tokens": 2
    },
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_a_replay_of_what_a_policy_did_has_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if name == "rollback":
        broken(monkeypatch, at=8, how=lambda x: x * 50)
    home = run(tmp_path / "first", POLICIES[name])
    assert done(home)
    actions = replayed(home)
    again = run(tmp_path / "again", POLICIES[name], actions=actions, steering={"replay": True})
    assert losses(again) == losses(home) and digest_of(again) == digest_of(home)
    assert replayed(again) == actions


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("cut", [7, 9, 12])
def test_cut_around_an_action_and_gone_on_with_it_retraces(
    name: str, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if name == "rollback":
        broken(monkeypatch, at=8, how=lambda x: x * 50)
    whole = run(tmp_path / "whole", POLICIES[name])
    record = loop.record

    class Cut(Exception):
        pass

    def ended(stage: Any, *args: Any, **more: Any) -> None:
        record(stage, *args, **more)
        if stage.clock.tick == cut:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(loop, "record", ended)
        if losses(whole)[-1][0] > cut:
            with pytest.raises(Cut):
                run(tmp_path / "cut", POLICIES[name])
    home = run(tmp_path / "cut", POLICIES[name])
    assert losses(home) == losses(whole) and done(home) == done(whole)
    assert digest_of(home) == digest_of(whole)


def test_what_the_engine_chooses_by_itself_silences_no_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decide = loop.Pace.decide

    def chosen(self: Any, stage: Any) -> None:
        decide(self, stage)
        stage.journal.append(tick=stage.clock.tick, by="engine", do=[{"do": "micro", "rows": 4}], write=True)

    monkeypatch.setattr(loop.Pace, "decide", chosen)
    policy = {
        "use": "steer/plateau",
        "watch": "loss",
        "every": 1,
        "patience": 0,
        "threshold": 0.9,
        "cooldown": 3,
        "factor": 0.5,
    }
    assert [tick for tick, _ in done(run(tmp_path, policy, steps=6))] == [2, 6]

"""When a stage is measured."""

from __future__ import annotations

from tutelage.base.spec import EvalSpec
from tutelage.core.measure import Evals, planned, thinned


def test_it_is_measured_early_then_evenly_and_never_right_before_the_end_where_it_always_is() -> None:
    steps = planned(EvalSpec(), {"step": 640.0})
    assert steps == [0, 10, 20, 40, 64, 80, 128, 160, 192, 256, 320, 384, 448, 512, 576]
    assert planned(EvalSpec(every="200step"), {"step": 600.0}) == [0, 200, 400]


def test_what_fits_the_budget_is_spread_over_what_is_left() -> None:
    assert [thinned(list(range(10)), room=room) for room in (1, 2, 5)] == [[5], [2, 7], [1, 3, 5, 7, 9]]
    assert thinned([1, 2], room=3) == [1, 2]
    evals = Evals(EvalSpec(budget="10%"), [], planned(EvalSpec(), {"step": 640.0}))
    evals.seconds, evals.last = 2.0, 1.0
    assert evals.thin(now=20, step_seconds=0.1, total=640.0)["steps"] == [0, 10, 20, 64, 160, 320, 512]
    evals.seconds = 100.0  # too much already: once more all the same, half way
    assert evals.thin(now=20, step_seconds=0.1, total=640.0)["steps"] == [0, 10, 20, 256]

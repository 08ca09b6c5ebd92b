"""Length buckets: digits of a length, odds as the paper names them, and cycles that use the data up."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tutelage.base.clock import Clock
from tutelage.base.errors import UserError
from tutelage.base.registry import make
from tutelage.methods.curriculum.length_buckets import LengthBuckets


def drawn(method: LengthBuckets, lengths: dict[int, float], *, steps: int, total: dict[str, float]) -> list[int]:
    clock = Clock(total=total)
    found = []
    for tick in range(steps):
        clock.tick = tick
        view: Any = SimpleNamespace(
            lengths=lengths, tokens=1024, clock=clock, rng=lambda what, t=tick: torch.Generator().manual_seed(t)
        )
        length, tokens = method.shape(view)
        assert tokens == 1024
        found.append(length)
    return found


def test_a_length_is_cut_into_its_binary_digits() -> None:
    method = LengthBuckets(shortest=4)
    assert method.cut(32) == [32] and method.cut(31) == [16, 8, 4]
    assert method.cut(22) == [16, 4] and method.cut(3) == []  # of 22, 2 are left out
    assert sum(LengthBuckets(shortest=1).cut(1023)) == 1023


@pytest.mark.parametrize(
    ("odds", "wanted"),
    [
        ("uniform", [1, 1, 1, 1]),
        ("grow_linear", [4, 3, 2, 1]),
        ("grow_p2", [8, 4, 2, 1]),
        ("grow_p100", [1e6, 1e4, 100, 1]),
        ("shrink_p100", [1e-6, 1e-4, 0.01, 1]),
    ],
)
def test_the_odds_are_the_paper_s(odds: Any, wanted: list[float]) -> None:
    method = LengthBuckets(odds=odds)
    assert [method.weight(length, 512) for length in (64, 128, 256, 512)] == pytest.approx(wanted)


def test_every_cycle_uses_each_length_as_much_as_there_is_of_it() -> None:
    shares = {8: 0.5, 16: 0.3, 32: 0.2}
    found = drawn(LengthBuckets(cycles=4), shares, steps=80, total={"step": 80.0})
    for cycle in range(4):
        assert Counter(found[20 * cycle : 20 * cycle + 20]) == {8: 10, 16: 6, 32: 4}


def test_a_length_that_is_rarer_than_a_step_a_cycle_still_gets_its_share() -> None:
    shares = {8: 0.77, 16: 0.18, 32: 0.05}
    found = Counter(drawn(LengthBuckets(cycles=40), shares, steps=400, total={"step": 400.0}))
    assert found[32] == pytest.approx(20, abs=2) and found[16] == pytest.approx(72, abs=2)


def test_growing_odds_begin_a_cycle_with_short_rows_and_shrinking_ones_end_it_with_them() -> None:
    shares = {8: 0.5, 16: 0.3, 32: 0.2}
    mean = {}
    for odds in ("grow_p100", "shrink_p100"):
        found = drawn(LengthBuckets(cycles=2, odds=odds), shares, steps=80, total={"step": 80.0})
        mean[odds] = [sum(found[40 * c : 40 * c + 20]) / 20 for c in range(2)]  # the first halves of the cycles
    assert max(mean["grow_p100"]) < 10 and min(mean["shrink_p100"]) > 18


@pytest.mark.parametrize("total", [{"flop": 1e12}, {"step": 1e9, "tok": 1e12}])
def test_before_the_steps_of_a_stage_are_known_the_odds_alone_decide_and_nothing_is_lost(
    total: dict[str, float],
) -> None:
    method = LengthBuckets(cycles=1, odds="uniform")
    shares = {8: 0.5, 16: 0.5}
    first = drawn(method, shares, steps=10, total=total)
    assert set(first) == {8, 16}
    rest = drawn(method, shares, steps=10, total={"step": 20.0})
    assert Counter(first + rest) == {8: 10, 16: 10}


def test_a_length_that_joins_later_is_drawn_from_the_next_cycle_on() -> None:
    method = LengthBuckets(cycles=4, odds="uniform")
    drawn(method, {8: 1.0}, steps=5, total={"step": 40.0})
    assert set(drawn(method, {8: 0.5, 64: 0.5}, steps=20, total={"step": 40.0})) == {8, 64}


def test_a_shortest_length_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(UserError, match="stages.two.curriculum.*48: a power of two"):
        make({"use": "curriculum/length_buckets", "shortest": 48}, place="stages.two.curriculum")

"""Repeated random subsets: how large they are, what comes again and when, and that a round is a share of a pass."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.base import registry
from tutelage.base.clock import Clock
from tutelage.base.errors import UserError
from tutelage.methods.select.repeated_random import RepeatedRandom


def rounds(method: RepeatedRandom, count: int, *, steps: int = 4) -> list[set[int]]:
    """The groups of each round, asked at several steps of it, which must agree."""
    found = []
    for number in range(count):
        asked = []
        for step in range(steps):
            tick = number * steps + step
            clock = Clock(tick=tick, epochs=method.fraction * (number + step / steps))
            view: Any = SimpleNamespace(clock=clock, rng=lambda what, t=tick: torch.Generator().manual_seed(t))
            asked.append(method.classes(view))
        assert all(one == asked[0] for one in asked) and set(asked[0].values()) == {1.0}
        found.append(set(asked[0]))
    return found


def test_groups_are_of_equal_size_and_the_same_again() -> None:
    method = RepeatedRandom(groups=10)
    found = list(method.grade([("", np.zeros(0))] * 103))
    assert sorted(Counter(found).values()) == [10] * 7 + [11] * 3 and set(found) == set(range(10))
    assert found == list(RepeatedRandom(groups=10).grade([("", np.zeros(0))] * 103)) != sorted(found)


def test_with_replacement_every_round_chooses_among_all() -> None:
    found = rounds(RepeatedRandom(fraction=0.2, groups=10), 200)
    assert {len(one) for one in found} == {2}
    seen = Counter(group for one in found for group in one)
    assert len(seen) == 10 and max(seen.values()) < 2 * min(seen.values())
    repeats = sum(bool(a & b) for a, b in pairwise(found)) / 199
    assert repeats == pytest.approx(1 - (8 * 7) / (10 * 9), abs=0.12)  # as two draws of 2 of 10 meet


def test_without_replacement_nothing_comes_again_before_all_have_been_through() -> None:
    found = rounds(RepeatedRandom(fraction=0.2, groups=10, draw="without"), 15)
    passes = [set.union(*found[i : i + 5]) for i in (0, 5, 10)]
    assert all(one == set(range(10)) for one in passes)
    assert found[:5] != found[5:10]  # each pass is shuffled anew


def test_a_share_that_divides_nothing_evenly_wraps_into_the_next_pass() -> None:
    found = rounds(RepeatedRandom(fraction=0.3, groups=10, draw="without"), 20)
    assert {len(one) for one in found} == {3}
    seen = Counter(group for one in found for group in one)
    assert len(set.union(*found[:4])) == 10 and max(seen.values()) - min(seen.values()) <= 1


def test_a_round_lasts_as_long_as_its_subset_where_the_share_is_no_whole_number_of_groups() -> None:
    method = RepeatedRandom(fraction=0.27, groups=10)
    opened = []
    for epochs in (0.0, 0.28, 0.299, 0.301, 0.599, 0.601):
        view: Any = SimpleNamespace(
            clock=Clock(epochs=epochs), rng=lambda what: torch.Generator().manual_seed(len(opened))
        )
        opened.append(set(method.classes(view)))
    assert method.size == 3 and {len(one) for one in opened} == {3}
    assert opened[0] == opened[1] == opened[2] != opened[3] == opened[4] != opened[5]


def test_a_share_of_less_than_one_group_is_refused_with_the_groups_that_do() -> None:
    with pytest.raises(
        UserError, match=r"select/repeated_random.groups: .*0.40% is less than one group; 250 are enough"
    ):
        registry.make({"use": "select/repeated_random", "fraction": "0.4%"})
    assert registry.make({"use": "select/repeated_random", "fraction": "0.4%", "groups": 250}).size == 1


def test_once_is_one_subset_for_good() -> None:
    found = rounds(RepeatedRandom(fraction=0.2, groups=10, draw="once"), 6)
    assert len(found[0]) == 2 and all(one == found[0] for one in found)


def test_the_whole_is_everything_in_every_round() -> None:
    assert rounds(RepeatedRandom(fraction=1.0, groups=4), 3) == [{0, 1, 2, 3}] * 3


@pytest.mark.parametrize(("written", "share"), [("10%", 0.1), (0.25, 0.25), ("100%", 1.0)])
def test_percent_and_fraction_mean_the_same(written: Any, share: float) -> None:
    assert registry.make({"use": "select/repeated_random", "fraction": written}).fraction == pytest.approx(share)


@pytest.mark.parametrize("written", [0, "0%", 1.5, "some"])
def test_a_share_that_is_none_is_refused(written: Any) -> None:
    with pytest.raises(UserError, match="select/repeated_random.fraction"):
        registry.make({"use": "select/repeated_random", "fraction": written})

"""A long series kept short: no spike is lost, and what is told piece by piece is the whole."""

from __future__ import annotations

import math
import random

from tutelage.server.thin import Point, Thin


def test_a_spike_among_a_million_points_is_still_there() -> None:
    thin = Thin(most=100)
    for x in range(200_000):
        thin.add(x, 50.0 if x == 123_456 else -9.0 if x == 77_777 else 1.0 + 0.1 * math.sin(x))
    assert len(thin.points) <= 200
    values = [y for _, y in thin.points if y is not None]
    assert max(values) == 50.0 and min(values) == -9.0
    assert [x for x, y in thin.points if y == 50.0] == [123_456]
    xs = [x for x, _ in thin.points if x is not None]
    assert xs == sorted(xs) and xs[0] < 5_000 and xs[-1] > 195_000


def test_what_is_no_number_leaves_a_gap_and_is_remembered() -> None:
    thin = Thin(most=20)
    for x in range(1_000):
        thin.add(x, {400: "nan", 401: "inf", 402: float("-inf")}.get(x, 2.0))
    assert thin.odd == [(400, "nan"), (401, "inf"), (402, "-inf")]
    assert any(y is None for _, y in thin.points)
    assert all(y is None or math.isfinite(y) for _, y in thin.points)


def test_news_put_together_are_the_whole() -> None:
    rng, thin, have = random.Random(0), Thin(most=50), list[Point]()
    for x in range(5_000):
        thin.add(x, rng.random())
        if rng.random() < 0.2:
            start, more = thin.news()
            have[start:] = more
            assert have == thin.points
    assert len(have) > 50

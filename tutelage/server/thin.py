"""A long series kept short enough to draw, point by point, without losing a spike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

MOST = 500  # buckets; each gives at most two points and a gap
Point = list[float | None]


class Thin:
    """Points (x, y), x rising. Neighbors share a bucket, of which the least and the greatest are kept; when there are too
    many buckets, each takes in its neighbor. What is no number leaves a gap and is remembered apart."""

    def __init__(self, *, most: int = MOST) -> None:
        self.most, self.width = most, 1.0
        self.odd: list[tuple[float, str]] = []  # where y was no number, and what it was
        self._points: list[Point] = []  # of all buckets but the newest
        self._bucket = -1.0  # index of the newest; then its least, its greatest and its gap, each (x, y)
        self._low: tuple[float, float] | None = None
        self._high: tuple[float, float] | None = None
        self._gap: float | None = None
        self._told = 0  # points from here on are not as they were when last asked

    def add(self, x: float, y: Any) -> None:
        """One more point; `y` may be one of the strings that stand for NaN and infinity in a run's files."""
        bucket = x // self.width
        if bucket != self._bucket:
            self._close()
            self._bucket = bucket
        number = y if type(y) is float else _number(y)
        if number - number != 0.0:
            self.odd.append((x, str(number)))
            self._gap = x if self._gap is None else self._gap
            return
        if self._low is None or self._high is None:
            self._low = self._high = (x, number)
        elif number < self._low[1]:
            self._low = (x, number)
        elif number > self._high[1]:
            self._high = (x, number)

    def extend(self, points: Iterable[tuple[float, Any]]) -> None:
        for x, y in points:
            self.add(x, y)

    @property
    def points(self) -> list[Point]:
        """All points, as they are drawn."""
        return [*self._points, *self._newest()]

    def news(self) -> tuple[int, list[Point]]:
        """Where it differs from what this gave before, and the points from there on."""
        start, self._told = self._told, len(self._points)
        return start, [*self._points[start:], *self._newest()]

    def _newest(self) -> list[Point]:
        found: set[tuple[float, float | None]] = {point for point in (self._low, self._high) if point}
        if self._gap is not None:
            found.add((self._gap, None))
        return [[x, y] for x, y in sorted(found, key=lambda point: point[0])]

    def _close(self) -> None:
        """The newest bucket is full."""
        self._points += self._newest()
        self._low = self._high = self._gap = None
        if len(self._points) > 2 * self.most:
            self._widen()

    def _widen(self) -> None:
        """Buckets of twice the width, until they are few enough."""
        old, self._points, self._told = self._points, [], 0
        while len(old) > self.most and self.width < 1e15:
            self.width *= 2
            groups: dict[float, list[Point]] = {}
            for point in old:
                groups.setdefault((point[0] or 0.0) // self.width, []).append(point)
            old = [point for group in groups.values() for point in _least(group)]
        self._points = old


def _least(points: list[Point]) -> list[Point]:
    """The least and the greatest of a bucket, and one gap if there is one, in their order."""
    finite = [point for point in points if point[1] is not None]
    gaps = [point for point in points if point[1] is None]
    kept = [min(finite, key=lambda p: p[1] or 0.0), max(finite, key=lambda p: p[1] or 0.0)] if finite else []
    if len(kept) == 2 and kept[0] is kept[1]:
        kept.pop()
    return sorted([*kept, *gaps[:1]], key=lambda p: p[0] or 0.0)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan

"""Differences between paired runs: the interval, the correction for asking many times, the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["effect seen", "opposite", "no effect", "inconclusive"]


@dataclass(frozen=True)
class Paired:
    """Differences (arm minus baseline) of runs paired by seed: their mean, its interval, and Student's two-sided p.

    With fewer than two pairs there is a mean but no interval: `low`, `high` and `p` are None.
    """

    differences: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None
    p: float | None
    confidence: float = 0.95

    @property
    def n(self) -> int:
        return len(self.differences)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "differences": list(self.differences), "n": self.n}


def paired(differences: Sequence[float], *, confidence: float = 0.95) -> Paired:
    """Student's t on paired differences (Student 1908). Raises ValueError for none, or for one that is no number."""
    import numpy as np  # here, as verdicts are told without: the command line lists them
    from scipy import stats

    values = np.asarray(differences, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"paired differences must be numbers, at least one (got {list(differences)})")
    found, mean = tuple(float(v) for v in values), float(values.mean())
    if len(values) < 2:
        return Paired(found, mean, None, None, None, confidence)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0.0:  # all differences are the same: nothing to doubt, and t is no number when they are all zero
        return Paired(found, mean, mean, mean, 1.0 if mean == 0.0 else 0.0, confidence)
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean / error), len(values) - 1))
    return Paired(found, mean, mean - half, mean + half, p, confidence)


def blocked(series: Sequence[float], *, blocks: int, confidence: float = 0.95) -> Paired:
    """Student's t on the means of equal blocks of a series whose neighbors are alike (batch means, Schmeiser 1982).

    What is left over after whole blocks is left out at the beginning. A series shorter than `blocks` is one a block.
    """
    import numpy as np

    count = min(blocks, len(series))
    size = len(series) // max(1, count)
    values = np.asarray(series[len(series) - count * size :], dtype=np.float64)
    return paired(values.reshape(count, size).mean(1).tolist() if count else [], confidence=confidence)


def benjamini_hochberg(p: Mapping[str, float | None], *, rate: float = 0.05) -> dict[str, bool]:
    """Which of many questions hold at a false discovery rate (Benjamini & Hochberg 1995); None never does."""
    asked = {name: value for name, value in p.items() if value is not None and math.isfinite(value)}
    if not asked:
        return dict.fromkeys(p, False)
    ranked = sorted(asked.values())
    least = max((value for i, value in enumerate(ranked, 1) if value <= rate * i / len(ranked)), default=-1.0)
    return {name: name in asked and asked[name] <= least for name in p}


def verdict(
    found: Paired, *, rejected: bool, better: Literal["lower", "higher"], margin: float | None = None
) -> Status:
    """What may be said of one difference.

    `rejected` is Benjamini–Hochberg's answer over all verdicts. An interval wholly inside ±`margin` is `no effect`
    also where it excludes zero: the margin was fixed beforehand as what is too small to matter.
    """
    if found.low is None or found.high is None:
        return "inconclusive"
    if margin is not None and -margin < found.low and found.high < margin:
        return "no effect"
    if rejected and (found.low > 0 or found.high < 0):
        return "effect seen" if (found.mean < 0) == (better == "lower") else "opposite"
    return "inconclusive"


def verdicts(
    questions: Mapping[str, Paired],
    *,
    better: Mapping[str, Any],
    margin: Mapping[str, float | None],
    rate: float = 0.05,
) -> dict[str, Status]:
    """Verdicts over many questions at once, corrected together. `better` and `margin` are by question."""
    holds = benjamini_hochberg({name: found.p for name, found in questions.items()}, rate=rate)
    return {
        name: verdict(found, rejected=holds[name], better=better[name], margin=margin.get(name))
        for name, found in questions.items()
    }


def shown(found: Paired, *, digits: int = 3) -> str:
    """`−0.120 [−0.180, −0.060], 5 seeds`, or without an interval `−0.120, one seed`."""
    mean = f"{found.mean:+.{digits}f}"
    if found.low is None or found.high is None:
        return f"{mean}, one seed"
    return f"{mean} [{found.low:+.{digits}f}, {found.high:+.{digits}f}], {found.n} seeds"

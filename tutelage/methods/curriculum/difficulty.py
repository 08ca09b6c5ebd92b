"""Difficulty curriculum: easy documents before hard ones, in one sweep, in waves, as a growing pool, or as a warm-up.

Paper:   Zhang et al. 2025 (Beyond Random Sampling), arXiv:2506.11300
Use:     `measure` compression, diversity or readability, which did best in the paper; `over: 20%` as a warm-up, whose gain
    lasts, `over: 100%` to get early where random order gets late; more `groups` for a finer order
Works:   text; readability knows English syllables, words are runs of letters and digits; any packing and objective
Costs:   every chunk is decoded and measured when the stage is built, also when it goes on after a cut: on one core half a
    second a MB to decode (bytes as tokens), 0.06 (compression) to 0.3 s (readability) to measure; steps cost what they did
With:    any mix: classes are made within each source, so that shares hold in every step
Differs: what is ordered is a chunk, the part of a document that fits in a row; classes of equal size stand for ranks, and
    inside them order is random, so a stage that is shorter than an epoch sees a random sample of each; perplexity is
    that of pairs of tokens in the source itself, not of a pretrained model; the paper names its pacing functions and
    10 groups, but how these are drawn is not known to us: here a pool begins with one group and grows to all; the
    compression ratio is zlib's; MTLD and Flesch's formula are counted here, syllables by groups of vowels
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from pydantic import Field

from tutelage.base.clock import Span, SpanField
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.difficulty import compression, diversity, fertility, surprise, unreadability

Chunk = tuple[str, np.ndarray]  # text and tokens
Measure = Literal["compression", "diversity", "readability", "length", "fertility", "perplexity"]


class Difficulty(Method):
    measure: Measure = Field("compression", description="what makes a chunk hard: the less it compresses, and so on")
    order: Literal["sorted", "paced", "interleaved"] = Field(
        "sorted", description="one sweep; a pool that grows from the easiest; or `cycles` sweeps"
    )
    over: SpanField = Field(Span(100.0, "%"), description="how long it lasts; afterwards all classes are drawn alike")
    groups: int = Field(10, ge=2, description="classes of difficulty, of equal size")
    pacing: Literal["linear", "quadratic", "inverse"] = Field(
        "linear", description="how the pool grows with time t: t, t², or 1 - (1 - t)²"
    )
    cycles: int = Field(5, ge=1, description="sweeps from easy to hard of `interleaved`")

    no_off = "leave the slot out instead"
    baseline = {}
    on = {"measure": "length", "groups": 4}

    def grade(self, chunks: Sequence[Chunk]) -> Iterable[int]:
        """The class of each chunk, 0 the easiest: so that all classes have as many tokens, ties in their order."""
        lengths: list[int] = []
        hard = np.array(difficulties(counted(chunks, lengths), self.measure))
        sizes = np.array(lengths, dtype=np.int64)
        order = np.argsort(hard, kind="stable")
        middle = np.cumsum(sizes[order]) - sizes[order] / 2
        classes = np.empty(len(order), dtype=np.int64)
        classes[order] = np.minimum(middle * self.groups / max(1, sizes.sum()), self.groups - 1).astype(np.int64)
        return classes.tolist()

    def classes(self, view: Any) -> dict[int, float]:
        """How far each class is open: a function of how much of `over` has passed, and of nothing else."""
        passed = view.clock.passed(self.over)
        if passed >= 1.0 - 1e-9:
            return dict.fromkeys(range(self.groups), 1.0)
        if self.order != "paced":
            sweep = passed * self.cycles % 1.0 if self.order == "interleaved" else passed
            return {int(sweep * self.groups + 1e-9): 1.0}
        grown = {"linear": passed, "quadratic": passed**2, "inverse": 1.0 - (1.0 - passed) ** 2}[self.pacing]
        pool = 1.0 + grown * (self.groups - 1)
        return {key: min(1.0, pool - key) for key in range(self.groups) if pool > key}


def counted(chunks: Iterable[Chunk], lengths: list[int]) -> Iterator[Chunk]:
    """The chunks, whose tokens are counted on the way: each is decoded once."""
    for text, tokens in chunks:
        lengths.append(len(tokens))
        yield text, tokens


def difficulties(chunks: Iterable[Chunk], measure: Measure) -> list[float]:
    """How hard each chunk is, larger is harder. `chunks` are text and tokens, gone through once."""
    if measure == "perplexity":
        return surprise([tokens for _, tokens in chunks])
    if measure == "length":
        return [float(len(tokens)) for _, tokens in chunks]
    if measure == "fertility":
        return [fertility(text, len(tokens)) for text, tokens in chunks]
    of = {"compression": compression, "diversity": diversity, "readability": unreadability}[measure]
    return [of(text) for text, _ in chunks]


def effect(run: Seen) -> dict[str, float]:
    """The mean class of what the first and the last third of the steps drew, by the parts whose cursors moved."""
    rows = [row for row in run.rows if row["kind"] == "train"]
    drawn = []
    for before, after in pairwise(rows):
        moved = [name for name, cursor in before["cursors"].items() if after["cursors"][name] != cursor]
        found = [float(name.rpartition(":")[2]) for name in moved if ":" in name]
        drawn.append(sum(found) / len(found) if found else 0.0)
    third = len(drawn) // 3
    return {"first": sum(drawn[:third]) / third, "last": sum(drawn[-third:]) / third}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Easy first, hard last."""
    return on["last"] > on["first"] + 1.5 and off["last"] == off["first"]


BENCH = Bench(
    base="recipes/bench/from-scratch.yaml",
    arm={"curriculum": {"use": "curriculum/difficulty", "over": "25%"}},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"curriculum.measure": ["compression", "diversity", "readability"], "optim.lr": [1e-3, 3e-3]},
    tune_baseline={"optim.lr": [5e-4, 1e-3, 2e-3, 3e-3, 6e-3, 1e-2]},
    scale="0.5 B and 1 B parameters, up to 100 B tokens; as a warm-up up to 3.5 % on eight benchmarks",
)

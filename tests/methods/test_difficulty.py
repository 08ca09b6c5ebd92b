"""Difficulty: each measure against its formula, classes of equal size, and what is open when."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.toy import graph, numbers
from tutelage.base import load
from tutelage.base.clock import Clock
from tutelage.base.errors import UserError
from tutelage.core.parts import Parts
from tutelage.core.run import run_graph
from tutelage.core.types import Piece
from tutelage.look import batch_of
from tutelage.methods._kit.difficulty import compression, diversity, fertility, surprise, syllables, unreadability
from tutelage.methods.curriculum.difficulty import Difficulty

# -- measures ----------------------------------------------------------------------------------------------------------


def test_compression_is_compressed_bytes_over_bytes() -> None:
    assert compression("ab" * 500) == len(zlib.compress(b"ab" * 500, 9)) / 1000
    assert compression("ab" * 500) < compression("the cat sat on a mat, and then it slept")


def test_mtld_counts_factors_both_ways_and_a_rest_in_part() -> None:
    """Forwards a b a (2/3) is a factor and leaves `b c`; backwards c b a b (3/4) a (3/5) is one and leaves nothing."""
    forwards = 5 / (1 + (1 - 2 / 2) / 0.28)
    backwards = 5 / 1
    assert diversity("a b a b c") == pytest.approx((forwards + backwards) / 2)
    assert diversity("a b c a") == pytest.approx(
        4 / ((1 - 3 / 4) / 0.28)
    )  # never below 0.72: a factor in part, both ways
    assert diversity("One two three!") == 3.0 and diversity("...") == 0.0
    assert diversity("the cat the cat the cat the cat") < diversity("the cat sat and the dog ran on a mat")


def test_flesch_s_ease_with_its_sign_turned() -> None:
    text = "The cat sat on the mat. It was happy!"  # 9 words, 2 sentences, 10 syllables
    assert unreadability(text) == pytest.approx(1.015 * 9 / 2 + 84.6 * 10 / 9 - 206.835)
    assert unreadability("Version 3.14 is here") == pytest.approx(1.015 * 5 + 84.6 * 6 / 5 - 206.835)  # one sentence


@pytest.mark.parametrize(
    ("word", "count"),
    [("cat", 1), ("happy", 2), ("make", 1), ("table", 2), ("see", 1), ("the", 1), ("rhythm", 1), ("7", 1)],
)
def test_syllables_are_groups_of_vowels(word: str, count: int) -> None:
    assert syllables(word) == count


def test_fertility_is_tokens_a_word() -> None:
    assert fertility("two words", 6) == 3.0 and fertility("", 4) == 4.0


def test_surprise_is_the_mean_of_pair_and_single_frequencies() -> None:
    one, two = np.array([0, 1, 0, 1]), np.array([0, 2])
    # Pairs: 01 twice, 10 once, 02 once. After 0 come 1, 1, 2; second tokens are 1, 0, 1, 2.
    p01, p10, p02 = (2 / 3 + 2 / 4) / 2, (1 / 1 + 1 / 4) / 2, (1 / 3 + 1 / 4) / 2
    assert surprise([one, two]) == pytest.approx([-(2 * math.log(p01) + math.log(p10)) / 3, -math.log(p02)])
    assert surprise([np.array([5])]) == [0.0] and surprise([]) == []


# -- classes -----------------------------------------------------------------------------------------------------------


def chunks_of(*sizes: int) -> list[tuple[str, np.ndarray]]:
    return [("x " * size, np.arange(size)) for size in sizes]


def test_classes_hold_the_same_number_of_tokens_the_easiest_first() -> None:
    method = Difficulty(measure="length", groups=2)
    assert list(method.grade(chunks_of(8, 1, 2, 4, 1))) == [1, 0, 0, 0, 0]  # 8 of 16 tokens lie in the longest
    assert list(Difficulty(measure="length", groups=4).grade(chunks_of(5, 5, 5, 5))) == [0, 1, 2, 3]


@pytest.mark.parametrize("measure", ["compression", "diversity", "readability", "length", "fertility", "perplexity"])
def test_every_measure_grades_texts_and_nothing(measure: Any) -> None:
    texts = [
        "",
        "the the the the",
        "Incomprehensible antidisestablishmentarianism notwithstanding, he ran.",
        "a b. c d.",
    ]
    chunks = [(text, np.frombuffer(text.encode(), np.uint8)) for text in texts]
    found = list(Difficulty(measure=measure, groups=3).grade(chunks))
    assert len(found) == 4 and set(found) <= {0, 1, 2}
    assert list(Difficulty(measure=measure).grade([])) == []


def opened(method: Difficulty, frac: float) -> dict[int, float]:
    view: Any = SimpleNamespace(clock=Clock(step=round(1000 * frac), total={"step": 1000.0}))
    return method.classes(view)


def test_sorted_opens_one_class_after_the_other_and_afterwards_all() -> None:
    method = Difficulty(groups=4, over="50%")  # type: ignore[arg-type]
    assert [opened(method, f) for f in (0.0, 0.124, 0.125, 0.499)] == [{0: 1.0}, {0: 1.0}, {1: 1.0}, {3: 1.0}]
    assert opened(method, 0.5) == opened(method, 0.9) == dict.fromkeys(range(4), 1.0)


def test_interleaved_sweeps_several_times() -> None:
    method = Difficulty(groups=2, order="interleaved", cycles=2)
    assert [next(iter(opened(method, f))) for f in (0.0, 0.25, 0.5, 0.75)] == [0, 1, 0, 1]


@pytest.mark.parametrize(("pacing", "pool"), [("linear", 2.5), ("quadratic", 1.75), ("inverse", 3.25)])
def test_a_pool_grows_from_one_class_to_all_by_its_function(pacing: Any, pool: float) -> None:
    method = Difficulty(groups=4, order="paced", pacing=pacing)
    assert opened(method, 0.0) == {0: 1.0}
    assert sum(opened(method, 0.5).values()) == pytest.approx(pool)
    assert opened(method, 0.5)[0] == 1.0


# -- in a stage --------------------------------------------------------------------------------------------------------


class Documents:
    """A source in memory of which document i has the text `chr(97 + i)`, with parts."""

    def __init__(self, name: str, chunks: list[list[int]]) -> None:
        self.name, self.fingerprint, self.stored = name, name, False
        self.chunks = np.array(chunks, dtype=np.int64).reshape(-1, 3)
        self.facts = {"tokens": float(self.chunks[:, 2].sum())}

    def read(self, piece: Piece) -> dict[str, np.ndarray]:
        return {"tokens": np.full(piece.length, piece.doc)}

    def part(self, name: str, chunks: np.ndarray) -> Documents:
        return Documents(name, chunks.tolist())


def parted(**sources: list[int]) -> Parts:
    """Parts of sources whose documents have the given classes, and as many positions as their class's number and one."""

    def grade(chunks: Any) -> list[int]:
        return [len(text) - 1 for text, _ in chunks]

    found = Parts(grade=grade, decode=lambda ids: "x" * len(ids))
    for name, classes in sources.items():
        found.add(Documents(name, [[i, 0, c + 1] for i, c in enumerate(classes)]))  # type: ignore[arg-type]
    return found


def test_every_source_gives_its_share_of_what_is_open() -> None:
    parts = parted(a=[0, 0, 1], b=[1])
    assert parts.names == {"a": {0: "a:0", 1: "a:1"}, "b": {1: "b:1"}}
    whole = parts.weights({"a": 0.6, "b": 0.2, "replayed": 0.2}, 8)
    assert whole == pytest.approx({"a:0": 0.3, "a:1": 0.3, "b:1": 0.2, "replayed": 0.2})  # nothing said: all are open
    parts.classes = {0: 1.0, 1: 0.5}
    assert parts.weights({"a": 0.6, "b": 0.4}, 8) == pytest.approx({"a:0": 0.4, "a:1": 0.2, "b:1": 0.4})
    parts.classes = {0: 1.0}
    assert parts.weights({"a": 0.6, "b": 0.4}, 8) == pytest.approx(
        {"a:0": 0.6, "b:1": 0.4}
    )  # of b the nearest stands in
    assert parts.lengths({"a": 1.0}) == {} and parts.passes("a", {"a:0": 1.0, "a:1": 2.0}) == pytest.approx(1.5)


def test_a_source_without_parts_cannot_be_graded() -> None:
    rigid: Any = SimpleNamespace(name="b", chunks=np.array([[0, 0, 9]]))
    with pytest.raises(UserError, match="source 'b' cannot be divided"):
        Parts(grade=lambda chunks: [0], decode=str).add(rigid)


def test_short_documents_come_first_and_any_step_is_named_again(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        one = recipe["stages"]["one"]
        recipe["stages"] = {"one": one}
        one |= {"curriculum": {"use": "curriculum/difficulty", "measure": "length", "groups": 3}, "packing": "single"}
        one["evals"] = {"every": "none", "run": []}

    made = graph(tmp_path, change=change, steps=6)
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed, result.failed
    folder = made.nodes["one"].folder
    assert folder is not None
    (folder.parent.parent / "recipe.yaml").write_text(load.dump(made.recipe), encoding="utf-8")
    rows = numbers(folder, kind="train")
    assert [row["classes"] for row in rows] == [{str(c): 1.0} for c in (0, 0, 1, 1, 2, 2)]
    steps = {tick: named(batch_of(folder, tick)) for tick in (1, 3, 5)}
    assert all(len(found) == rows[tick - 1]["rows"] for tick, found in steps.items())
    assert max(Counter(piece for found in steps.values() for piece in found).values()) == 1
    sizes = {tick: [last - first for _, first, last in found] for tick, found in steps.items()}
    # A document's first token stands for no byte.
    assert max(sizes[1]) <= min(sizes[3]) + 1 and max(sizes[3]) <= min(sizes[5]) + 1 and min(sizes[1]) < min(sizes[5])


def named(lines: list[str]) -> list[tuple[int, ...]]:
    """Document, first and last byte of each piece that a step is said to have drawn."""
    found = re.findall(r"document=(\d+)  bytes=\[(\d+), (\d+)\]", " ".join(lines))
    return [tuple(map(int, piece)) for piece in found]

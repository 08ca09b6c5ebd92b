"""Sources cut by a curriculum: nothing twice, nothing but rests lost, shares kept, and every batch named again."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from tests.toy import graph, numbers
from tutelage.base import load
from tutelage.base.errors import UserError
from tutelage.core.engine import Engine
from tutelage.core.flops import FlopMeter
from tutelage.core.graph import Graph
from tutelage.core.parts import Parts, divide
from tutelage.core.run import run_graph
from tutelage.core.stream import Stream
from tutelage.core.types import Batch, Row
from tutelage.look import batch_of

BUCKETS = {"use": "curriculum/length_buckets", "shortest": 8, "cycles": 2}


class Whole:
    """A source in memory whose documents have the given lengths; may be cut."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        self.name, self.fingerprint, self.stored = name, name, False
        self.chunks = np.array([[i, 0, n] for i, n in enumerate(lengths)], dtype=np.int64)
        self.facts = {"tokens": float(sum(lengths))}

    def read(self, piece: Any) -> dict[str, np.ndarray]:
        return {}

    def part(self, name: str, chunks: np.ndarray) -> Whole:
        made = Whole(name, [])
        made.chunks, made.facts = chunks, {"tokens": float(chunks[:, 2].sum())}
        return made


def halves(size: int) -> list[int]:
    """8s and 4s, and 1s are left out."""
    return [8] * (size // 8) + [4] * (size % 8 // 4)


def parts_of(**lengths: list[int]) -> tuple[Parts, dict[str, Any]]:
    parts, found = Parts(halves), {}
    for name, sizes in lengths.items():
        found |= parts.add(Whole(name, sizes))
    return parts, found


def test_pieces_lie_side_by_side_in_their_chunk_and_only_rests_are_missing() -> None:
    whole, parts = divide(Whole("a", [21, 3, 5, 8]), halves)
    assert list(parts) == [4, 8] and parts[4].name == "a:4"
    assert parts[8].chunks.tolist() == [[0, 0, 8], [0, 8, 8], [3, 0, 8]]
    assert parts[4].chunks.tolist() == [[0, 16, 4], [2, 0, 4]]
    assert whole.name == "a" and len(whole.chunks) == 5


def test_a_source_of_which_nothing_is_left_and_one_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(UserError, match="source 'a': the curriculum leaves nothing of it .*3 positions"):
        divide(Whole("a", [3, 2]), halves)
    rigid: Any = SimpleNamespace(name="b", chunks=np.array([[0, 0, 9]]))
    with pytest.raises(UserError, match="source 'b' cannot be divided"):
        divide(rigid, halves)


def test_a_step_draws_pieces_of_its_length_from_every_source_that_has_some() -> None:
    parts, _ = parts_of(a=[8, 8, 8, 4, 4], b=[4, 4], own=[8])  # of a, 24 positions lie in 8s and 8 in 4s
    weights = {"a": 0.5, "b": 0.25, "own": 0.0, "replayed": 0.25}
    assert parts.lengths(weights) == pytest.approx({4: (0.5 / 4 + 0.25) / 0.75, 8: 0.5 * 0.75 / 0.75})
    four = parts.weights(weights, 4)
    assert four == pytest.approx({"a:4": 0.75 / 3, "b:4": 0.75 * 2 / 3, "replayed": 0.25})
    assert parts.weights(weights, 8) == pytest.approx({"a:8": 0.75, "own:8": 0.0, "replayed": 0.25})
    with pytest.raises(UserError, match="no source has pieces of 16 positions .there are: 4, 8."):
        parts.weights(weights, 16)


def test_over_all_lengths_every_source_comes_to_its_share() -> None:
    parts, found = parts_of(a=[8] * 30 + [4] * 10, b=[4] * 30 + [8])
    weights = {"a": 0.6, "b": 0.4}
    stream = Stream(parts.orders(found, seed=0, packing="documents"))
    lengths, drawn = parts.lengths(weights), Counter[str]()
    for length, share in lengths.items():
        for row in stream.draw(parts.weights(weights, length), length, round(4096 * share / length)):
            assert [piece.length for piece in row.pieces] == [length]
            drawn[row.source.partition(":")[0]] += length
    assert drawn["a"] / drawn.total() == pytest.approx(0.6, abs=0.01)
    passes = stream.epochs()
    assert parts.passes("a", passes) == pytest.approx(drawn["a"] / found["a"].facts["tokens"])


def test_without_a_cut_nothing_changes() -> None:
    parts, source = Parts(), Whole("a", [5])
    assert parts.add(source) == {"a": source} and parts.lengths({"a": 1.0}) == {}
    assert parts.weights({"a": 1.0}, 5) == {"a": 1.0} and parts.passes("a", {"a": 0.5}) == 0.5


def test_a_micro_batch_of_short_rows_has_more_of_them() -> None:
    engine = Engine(model=torch.nn.Linear(1, 1), anatomy=None, modality=None, device=torch.device("cpu"), micro=4)  # type: ignore[arg-type]

    def rows(length: int) -> int:
        return engine._rows(Batch({"tokens": torch.zeros(64, length)}, [Row("a", ())] * 64, torch.ones(64)))

    assert rows(8) == 4  # rows do not change where no curriculum is
    engine.length = 32
    assert [rows(length) for length in (32, 8, 20, 64)] == [4, 16, 6, 2]


def test_work_within_other_work_is_counted_once() -> None:
    meter, a = FlopMeter(), torch.ones(4, 8)

    def begin() -> None:
        for _ in range(3):
            meter.count("train", (), lambda: a @ a.T)

    _, flops = meter.count("begin", (), begin)
    assert flops == meter.total == meter.totals["begin"] == 3 * 2 * 4 * 8 * 4
    meter.count("train", (), lambda: a @ a.T)
    assert meter.totals["train"] == 2 * 4 * 8 * 4


# -- a stage whose data are cut ---------------------------------------------------------------------------------------


def both(recipe: dict[str, Any]) -> None:
    """One stage on both toy sources, cut."""
    two = recipe["stages"].pop("two")
    recipe["stages"]["one"] |= {"curriculum": BUCKETS, "data": {**recipe["stages"]["one"]["data"], **two["data"]}}


def trained(folder: Path, change: Any = both) -> Graph:
    made = graph(folder, change=change)
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed, result.failed
    return made


def test_a_step_says_its_sources_and_any_of_its_rows_is_named_again(tmp_path: Path) -> None:
    made = trained(tmp_path)
    home = made.nodes["one"].folder
    assert home is not None
    (home.parent.parent / "recipe.yaml").write_text(load.dump(made.recipe), encoding="utf-8")
    rows = numbers(home, kind="train")
    assert {tuple(row["weights"]) for row in rows} == {("a", "b")}
    assert {row["length"] * row["rows"] for row in rows} == {256} and {row["padding"] for row in rows} == {0.0}
    assert len({row["length"] for row in rows}) > 1 and rows[-1]["tokens"] == 12 * 256
    texts = {name: (tmp_path / "data" / f"{name}.jsonl").read_bytes().splitlines() for name in "ab"}
    seen = Counter[tuple[str, str, str]]()
    for row in rows:
        lines = batch_of(home, row["tick"])
        assert len(lines) == row["rows"]
        for line in lines:
            said = dict(part.split("=", 1) for part in line.partition(": ")[2].split("  ") if "=" in part)
            name, length = said["source"].split(":")
            assert int(length) == row["length"]
            text = orjson.loads(texts[name][int(said["line"]) - 1])["text"]
            assert text_of(line) in text
            seen[name, said["line"], said["bytes"]] += 1
    assert max(seen.values()) == 1  # within the first pass no piece comes twice
    assert rows[-1]["epochs"] < 1


def text_of(line: str) -> str:
    return re.sub("<[a-z]+>", "", line.rpartition("text=")[2].strip("'\""))


def test_prompts_alone_make_no_pieces(tmp_path: Path) -> None:
    """A piece in which nothing is learned would be a row that teaches nothing."""
    path = tmp_path / "asked.jsonl"
    records = [{"prompt": "q" * 40, "answer": f"{i:08d}"} for i in range(80)]
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))

    def asked(recipe: dict[str, Any]) -> None:
        both(recipe)
        recipe["stages"]["one"] |= {
            "data": {"asked": str(path)},
            "length": 64,
            "objective": "align/sft",
            "batch": "4sample",
        }
        recipe["stages"]["one"]["evals"]["run"] = []

    made = trained(tmp_path, asked)
    home = made.nodes["one"].folder
    assert home is not None
    rows = numbers(home, kind="train")
    assert rows and all(row["counted"] >= row["rows"] for row in rows)

"""Curves in few points: means of what was recorded, bounded however long the run is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tutelage import brief
from tutelage.base.errors import UserError


def written(folder: Path, count: int, *, evals: int = 0, **more: Any) -> Path:
    with open(folder / "metrics.jsonl", "w") as handle:
        for i in range(1, count + 1):
            row = {
                "kind": "train",
                "tick": i,
                "step": i,
                "loss": float(i),
                "weights": {"a": 0.25},
                "cursors": {},
                **more,
            }
            handle.write(json.dumps(row, separators=(",", ":")) + "\n")
            if evals and i % evals == 0:
                made = {"kind": "eval", "tick": i, "step": i, "final": False, "values": {"bits": i / 10}}
                handle.write(json.dumps(made, separators=(",", ":")) + "\n")
    return folder


def test_a_point_is_the_mean_of_its_stretch(tmp_path: Path) -> None:
    points = brief.curve(written(tmp_path, 100), ["loss", "weights.a"], points=4)
    assert [(p["tick"], p["of"], p["loss"], p["weights.a"]) for p in points] == [
        (25, 25, 13.0, 0.25), (50, 25, 38.0, 0.25), (75, 25, 63.0, 0.25), (100, 25, 88.0, 0.25)
    ]  # fmt: skip
    assert [p["tick"] for p in brief.curve(tmp_path, ["loss"], since=98, points=50)] == [98, 99, 100]


def test_a_curve_of_a_file_too_large_to_read_is_a_sample_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path, 20_000, evals=5000)
    whole = brief.curve(folder, ["loss"], points=10)
    monkeypatch.setattr(brief, "WHOLE", 10_000)
    monkeypatch.setattr(brief, "PIECE", 4096)
    read = []
    lines = brief._lines
    monkeypatch.setattr(brief, "_lines", lambda path, at, count: read.append(count) or lines(path, at, count))
    sample = brief.curve(folder, ["loss"], points=10)
    assert len(sample) == len(whole) == 10 and sum(read) < (folder / "metrics.jsonl").stat().st_size / 10
    assert sample[0]["tick"] < 100 and sample[-1]["tick"] == 20_000
    ticks = [p["tick"] for p in sample]
    assert ticks == sorted(ticks) and all(p["of"] > 10 for p in sample)
    late = brief.curve(folder, ["loss"], since=18_000, points=10)
    assert all(p["tick"] >= 18_000 for p in late) and late[0]["tick"] < 18_400
    assert [row["step"] for row in brief.evals(folder, last=3)] == [10_000, 15_000, 20_000]


def test_numbers_that_are_none_are_counted_and_in_no_mean(tmp_path: Path) -> None:
    written(tmp_path, 4)
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"kind":"train","tick":5,"step":5,"loss":"nan","weights":{}}\n{"kind":"train","tick":6,"st')
    (point,) = brief.curve(tmp_path, ["loss"], points=1)
    assert point == {"tick": 5, "step": 5, "of": 5, "loss": 2.5, "not_finite": 1}
    assert brief.latest(tmp_path)["tick"] == 5


def test_what_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    assert brief.curve(tmp_path, ["loss"]) == [] and brief.evals(tmp_path) == [] and brief.latest(tmp_path) == {}
    written(tmp_path, 3)
    with pytest.raises(UserError, match="did you mean 'loss'"):
        brief.curve(tmp_path, ["lost"])
    with pytest.raises(UserError, match="between 1 and 500"):
        brief.curve(tmp_path, ["loss"], points=501)

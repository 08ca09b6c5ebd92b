"""Twelve methods in one stage: they run together, a cut run retraces, and the report says what each took."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.test_kill import after_step, in_child
from tests.toy import graph, numbers
from tutelage.core import profile, report
from tutelage.core.graph import Graph
from tutelage.core.run import run_graph
from tutelage.look import digest_of

RECIPE = Path(__file__).resolve().parents[2] / "recipes/quickstart/twelve.yaml"
SOONER = {
    "continual/replay": {"of": "one"},
    "continual/ewc": {"rows": 8},
    "steer/bold_driver": {"every": 2},
    "steer/plateau": {"watch": "loss", "every": 1, "patience": 0, "threshold": 0.9, "cooldown": 2},
    "steer/format_then_drift": {"tokens": 2, "every": 3, "form": r"(?s).*"},
}
"""So that they do something within eight steps."""


def twelve(recipe: dict[str, Any]) -> None:
    methods = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["stages"]["code"]["methods"]
    recipe["stages"]["two"]["methods"] = [{**entry, **SOONER.get(entry["use"], {})} for entry in methods]


def test_twelve_methods_run_together_and_a_killed_run_retraces(tmp_path: Path) -> None:
    def run(folder: Path) -> Graph:
        made = graph(folder, steps=8, change=twelve)
        result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
        assert not result.failed and not result.stopped
        return made

    def killed() -> None:
        after_step("two", 6)()
        run(tmp_path / "cut")

    made = run(tmp_path / "whole")
    assert in_child(killed) == -signal.SIGKILL
    whole, again = (found.nodes["two"].folder for found in (made, run(tmp_path / "cut")))
    assert whole and again
    assert digest_of(again) == digest_of(whole) and numbers(again) == numbers(whole)
    assert len(numbers(whole, kind="train")) == 8

    data = report.write(made, tmp_path / "out")
    table = {row["method"]: row for row in data["stages"]["two"]["profile"]}
    methods = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["stages"]["code"]["methods"]
    assert len(methods) == 12 and {entry["use"] for entry in methods} - {"continual/replay"} <= set(table)
    assert table["continual/ewc"]["hooks"]["penalty"]["calls"] == 8 and table["continual/ewc"]["before"] > 0
    assert table["steer/plateau"]["hooks"]["act"]["calls"] == 8
    assert (
        table["objective/causal_lm"]["hooks"]["loss"]["calls"] == 16
    )  # two micro-batches a step, and none of EWC's own
    assert table["continual/lwf"]["hooks"]["auxiliary"]["seconds"] > table["steer/plateau"]["seconds"] > 0
    assert 0 < sum(row["share"] for row in table.values()) <= 1.1  # what is neither training nor a policy's is rest
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "What methods take of the time" in page and "time of the methods of two" in page


def test_sums_of_a_resumed_stage_are_added_to_those_before(tmp_path: Path) -> None:
    def once() -> profile.Profile:
        return profile.Profile({"a/b": {"act": [2, 0.5], "begin": [1, 1.0]}, "c/d": {"act": [0, 0.0]}})

    for _ in range(2):
        once().keep(tmp_path)
    (row,) = profile.rows(tmp_path, training=4.0)
    assert (row["method"], row["seconds"], row["share"], row["before"]) == ("a/b", 1.0, 0.2, pytest.approx(2.0))
    assert row["hooks"]["act"] == {"calls": 4, "seconds": 1.0}
    assert profile.rows(tmp_path / "nothing", training=1.0) == []

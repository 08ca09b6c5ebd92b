"""Values of a table in the settings, spans and shares of later stages; what a stage takes from the one it starts from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.toy import graph, numbers
from tutelage.base.errors import UserError
from tutelage.core.graph import Graph
from tutelage.core.run import run_graph
from tutelage.plan_text import lines
from tutelage.planning import plan

LAW = '''
"""Writes the numbers that it is given."""
from typing import Any
from tutelage.base.method import Method

class Law(Method):
    numbers: dict[str, float]
    no_off = "it only measures"

    def measure(self, model: Any, view: Any) -> dict[str, float]:
        return dict(self.numbers)
'''
FOUND = {"length": 24.2, "rows": 6.0, "steps": 4.0, "tokens": 700.0, "share": 0.3333333333, "rate": 0.00212345678}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "law_of_this_test.py").write_text(LAW)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "law_of_this_test", raising=False)
    return tmp_path


def bound(recipe: dict[str, Any], found: dict[str, float] = FOUND) -> None:
    """Stage `law` writes numbers, and `two` has them wherever a number or a span stands."""

    def wait(value: str, **unit: str) -> dict[str, str]:
        return {"of": "law", "value": value, **unit}

    stages = recipe["stages"]
    stages["law"] = {
        "start": "one", "measure": [{"use": "law_of_this_test:Law", "numbers": dict(found)}], "engine": {"device": "cpu"},
    }  # fmt: skip
    stages["two"] |= {
        "data": {"b": {**stages["two"]["data"]["b"], "weight": wait("share")}, "a": {**stages["one"]["data"]["a"], "weight": 1}},
        "length": wait("length"), "batch": wait("rows"), "until": wait("tokens", unit="tok"),
        "optim": {"use": "optim/adamw", "lr": wait("rate")},
        "schedule": {"use": "schedule/constant", "warm": wait("steps", unit="step")},
        "engine": {"micro": wait("rows"), "device": "cpu", "clip": wait("share")},
    }  # fmt: skip
    stages["mean"] = {
        "start": ["one", "two"], "apply": {"use": "merge/linear", "weights": [1, wait("share")]},
        "evals": stages["one"]["evals"], "engine": {"device": "cpu"},
    }  # fmt: skip


def ran(made: Graph) -> Graph:
    result = run_graph(made, only=None, jobs=0, drift="retrain", tell=lambda stage, said: None)
    assert not result.failed and not result.stopped
    return made


def about(made: Graph, name: str) -> dict[str, Any]:
    folder = made.nodes[name].folder
    assert folder is not None
    found: dict[str, Any] = json.loads((folder / "stage.json").read_text())
    return found


def test_a_stage_runs_with_what_a_table_wrote(folder: Path) -> None:
    before = {row["stage"]: row for row in plan(graph(folder, steps=4, change=bound))}
    assert before["two"]["waits"] == ["law"] and before["two"]["state"] == "unknown"
    assert any("sizes are known when law is done" in line for line in lines(before["two"]))
    made = ran(graph(folder, steps=4, change=bound))
    parts = about(made, "two")["parts"]
    assert (parts["length"], parts["batch"], parts["until"]) == (24, "6sample", "700tok")
    assert parts["data"]["b"][1]["weight"] == 0.333333 and parts["optim"]["lr"] == 0.00212346
    assert parts["engine"]["clip"] == 0.333333 and parts["schedule"]["warm"] == "4step"
    assert about(made, "mean")["parts"]["apply"]["weights"] == [1.0, 0.333333]
    home = made.nodes["two"].folder
    assert home is not None
    rows = numbers(home, kind="train")
    assert {row["rows"] for row in rows} == {6} and {row["length"] for row in rows} == {24}
    assert rows[-1]["tokens"] >= 700 > rows[-2]["tokens"]
    assert rows[-1]["lr"] == pytest.approx(0.00212346) and rows[0]["lr"] < 0.001
    assert rows[0]["weights"] == {"b": pytest.approx(0.25, abs=1e-6), "a": pytest.approx(0.75, abs=1e-6)}
    again = {row["stage"]: row["state"] for row in plan(graph(folder, steps=4, change=bound))}
    assert set(again.values()) == {"done"}


def test_a_value_that_differs_in_the_seventh_digit_is_the_same_value(folder: Path) -> None:
    first = ran(graph(folder, steps=4, change=bound)).nodes["two"].fingerprint
    near = ran(graph(folder, steps=4, change=lambda r: bound(r, {**FOUND, "rate": 0.002123461, "share": 0.33333334})))
    assert near.nodes["two"].fingerprint == first and near.nodes["two"].state == "done"
    far = ran(graph(folder, steps=4, change=lambda r: bound(r, {**FOUND, "rate": 0.0021236})))
    assert far.nodes["two"].fingerprint != first


def test_a_value_that_does_not_fit_ends_the_run_in_a_line(folder: Path) -> None:
    with pytest.raises(
        UserError, match="stages.two.length: length of law is 3; here it should be greater than or equal to 8"
    ):
        ran(graph(folder, steps=4, change=lambda r: bound(r, {**FOUND, "length": 3.0})))


def test_the_report_of_a_recipe_that_waits_for_values_can_be_written(folder: Path) -> None:
    from tutelage.core import report

    made = graph(folder, steps=4, change=bound)
    data = report.write(made, folder / "out")
    assert data["stages"]["two"]["until"] == "tokens of law (tok)"
    assert "two" in (folder / "out" / "report.html").read_text()


def written(recipe: dict[str, Any]) -> None:
    """Stage `words` writes data, from a model whose rows have 32 tokens."""
    recipe["stages"]["words"] = {
        "start": "one", "make": {"use": "synth/self_samples", "passages": 4, "length": 16}, "engine": {"device": "cpu"},
    }  # fmt: skip


def test_a_stage_that_writes_data_is_not_made_anew_for_what_it_never_uses(folder: Path) -> None:
    def other(recipe: dict[str, Any]) -> None:
        written(recipe)
        recipe["stages"]["words"] |= {"optim": "optim/muon", "schedule": "schedule/constant", "mix": "mix/temperature"}

    def longer(recipe: dict[str, Any]) -> None:
        written(recipe)
        recipe["stages"]["words"]["make"]["length"] = 17

    prints = {}
    for name, change in (("as it was", written), ("other", other), ("longer", longer)):
        made = graph(folder, steps=4, change=change)
        plan(made)
        prints[name] = made.nodes["words"].fingerprint
        code, trained = made.nodes["words"].parts["code"], made.nodes["one"].parts["code"]
        assert list(code) == ["synth/self_samples"] and "optim/adamw" in trained
    assert prints["as it was"] == prints["other"] != prints["longer"]
    assert made.nodes["words"].stage.length == 32

"""A stage that fails takes nothing along: the report tells of what is done and why the rest is not, wherever it ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.toy import graph
from tutelage.base.errors import UserError
from tutelage.command import run_recipe
from tutelage.core import run as running
from tutelage.core.graph import Drift
from tutelage.modalities.text import toy
from tutelage.planning import plan


@pytest.mark.parametrize("jobs", [1, 0], ids=["forked", "here"])
def test_a_report_is_written_when_a_stage_fails(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = running.build

    def broken(node: Any, **kwargs: Any) -> Any:
        if node.name == "two":
            raise RuntimeError("no such luck")
        return build(node, **kwargs)

    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy.recipe(tmp_path / "data", steps=1)))
    how: dict[str, Any] = {"sets": [], "only": None, "reuse": False, "retrain": False, "runs": tmp_path / "runs"}
    monkeypatch.setattr(running, "build", broken)
    if jobs:
        assert run_recipe(tmp_path / "toy.yaml", jobs=jobs, **how) == 2
    else:  # with its trace, which is what one runs it here for
        with pytest.raises(RuntimeError, match="no such luck"):
            run_recipe(tmp_path / "toy.yaml", jobs=jobs, **how)
    home = tmp_path / "runs/toy"
    found = json.loads((home / "report.json").read_text())
    assert found["stages"]["one"]["state"] == "done" and list(found["forgetting_matrix"]) == ["one"]
    assert found["stages"]["two"]["state"] == "failed" and "no such luck" in found["stages"]["two"]["why"]
    assert "no such luck" in (home / "report.html").read_text()
    assert "in broken\n" in (home / "two/1/error.txt").read_text()
    if not jobs:
        monkeypatch.setattr(running, "build", build)
        made = graph(tmp_path, steps=1)
        running.run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
        assert not (home / "two/1/error.txt").exists(), "of a failure that is mended"


def test_a_recipe_that_was_mended_before_anything_was_made_runs_without_a_question(tmp_path: Path) -> None:
    def bad(recipe: dict[str, Any]) -> None:
        (tmp_path / "data/broken.jsonl").write_text('{"text":\n' * 9)
        recipe["stages"]["one"]["data"] = {"a": {"path": str(tmp_path / "data/broken.jsonl"), "bad": "fatal"}}

    how: dict[str, Any] = {"only": "one", "jobs": 0, "drift": "refuse", "tell": lambda stage, said: None}
    with pytest.raises(UserError, match=r"broken.jsonl line 1: not JSON.*write `bad: skip`"):
        running.run_graph(graph(tmp_path, steps=1, change=bad), **how)
    assert plan(graph(tmp_path, steps=1))[0]["state"] == "new"
    assert running.run_graph(graph(tmp_path, steps=1), **how).done == ["one"]
    assert plan(graph(tmp_path, steps=2))[0]["state"] == "changed"
    with pytest.raises(Drift, match="until: 1step → 2step"):
        running.run_graph(graph(tmp_path, steps=2), **how)


def test_a_stage_without_a_place_lets_those_at_work_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle, result = running.settle, running.Result()

    def unclear(made: Any, node: Any, **kwargs: Any) -> None:
        if node.name == "two":
            raise UserError("two was made from something else")
        settle(made, node, **kwargs)

    def alone(recipe: dict[str, Any]) -> None:
        recipe["stages"]["two"] |= {key: recipe["stages"]["one"][key] for key in ("start", "tokenizer")}

    monkeypatch.setattr(running, "settle", unclear)
    made = graph(tmp_path, steps=1, change=alone)
    with pytest.raises(UserError, match="something else"):
        running.run_graph(made, only=None, jobs=2, drift="refuse", tell=lambda stage, said: None, result=result)
    assert result.done == ["one"] and made.nodes["one"].artifact.exists()

"""Tiny runs that are steered while they run: in this process at exact ticks, or as a command in one of its own."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.forked import Forked
from tests.toy import graph
from tutelage import steering
from tutelage.base import load
from tutelage.base.method import Method
from tutelage.core import steer
from tutelage.core.run import run_graph
from tutelage.modalities.text import toy

Change = Callable[[dict[str, Any]], None]
Script = dict[int, list[tuple[str, list[dict[str, Any]]]]]  # at a tick: ids with actions; `bot-…` is an agent's


class Cools(Method):
    """A policy that lowers the rate when it has seen the loss fall three times, and counts what it was asked."""

    def act(self, view: Any) -> list[dict[str, Any]]:
        last = self.state.get("last", 1e9)
        self.state["falls"] = self.state.get("falls", 0) + int(view.signals["loss"] < last)
        self.state["last"] = float(view.signals["loss"])
        return [{"do": "scale", "path": "optim.lr", "by": 0.9}] if self.state["falls"] % 3 == 2 else []


def changed(folder: Path, *, steps: int, change: Change | None) -> dict[str, Any]:
    """The toy's recipe with two sources in stage `one` and a save every four steps."""
    recipe = toy.recipe(folder / "data", steps=steps)
    stages = recipe["stages"]
    stages["one"]["data"]["b"] = stages["two"]["data"]["b"]
    for stage in stages.values():
        stage["save"] = {"every": "4step", "keep": 3}
    if change:
        change(recipe)
    return recipe


def steered(
    folder: Path,
    script: Script,
    *,
    monkeypatch: pytest.MonkeyPatch,
    steps: int = 12,
    change: Change | None = None,
    only: str | None = None,
) -> Path:
    """Run the toy with requests that appear just before a tick's are collected; returns where runs are kept."""
    recipe = load.load(changed(folder, steps=steps, change=change))
    runs = folder / "runs"
    (runs / "toy").mkdir(parents=True)
    (runs / "toy/recipe.yaml").write_text(load.dump(recipe), encoding="utf-8")

    def replaced(tree: dict[str, Any]) -> None:
        tree.clear()
        tree.update(changed(folder, steps=steps, change=change))

    made = graph(folder, change=replaced)
    collect = steer.collect

    def collected(run: Any) -> Any:
        for id, do in script.get(run.clock.tick, []) if run.node.name == "one" else []:
            steering.send(
                run.folder, do, by=id, id=id, actor="agent" if id.startswith("bot") else "person", why="to see"
            )
        return collect(run)

    with monkeypatch.context() as patch:
        patch.setattr(steer, "collect", collected)
        result = run_graph(made, only=only, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed and not result.stopped
    return runs


QUIET = 20  # the tick from which on the policy of a stage at work asks for nothing more


class Slow(Cools):
    """The same, and it takes its time: a stage that runs as long as a test looks at it, and leaves the test some of the machine."""

    def act(self, view: Any) -> list[dict[str, Any]]:
        time.sleep(0.1)
        return super().act(view) if view.clock.tick < QUIET else []


def slow(recipe: dict[str, Any]) -> None:
    recipe["stages"]["one"]["methods"] = [{"use": "tests.steering.steered:Slow"}]
    recipe["stages"]["one"]["save"] = {"every": "40step", "keep": 3}


@contextlib.contextmanager
def at_work(folder: Path, *, steps: int = 100_000) -> Iterator[Path]:
    """The folder of a stage that `tutelage run` works on in a process of its own, once its policy has said all it will."""
    recipe = changed(folder, steps=steps, change=slow)
    (folder / "toy.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "tutelage", "run", str(folder / "toy.yaml"), "--runs", str(folder / "runs")]
    with open(folder / "said", "wb") as said:
        process = Forked([*command, "--only", "one"], stdout=said)
    stage, until = folder / "runs/toy/one/1", time.monotonic() + 300
    try:
        while not (stage / "controls.json").exists() or steering.controls(stage)["tick"] <= QUIET:
            assert process.poll() is None and time.monotonic() < until, (folder / "said").read_text()
            time.sleep(0.05)
        yield stage
    finally:
        process.kill()
        process.wait()

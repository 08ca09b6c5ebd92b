"""A running toy stage with requests that appear at given ticks, as clients write them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.test_kill import in_child
from tests.toy import graph
from tutelage.core import loop, steer
from tutelage.core.record import read_lines
from tutelage.core.run import run_graph

Change = Callable[[dict[str, Any]], None]
Script = dict[
    int, list[list[tuple[str, dict[str, Any]]]]
]  # tick -> looks in a row -> (id, request) that lie there then
ONE = "runs/toy/one/1"


def ask(*do: dict[str, Any], by: str = "ada", actor: str = "person", **more: Any) -> dict[str, Any]:
    return {"by": by, "actor": actor, "do": list(do), "why": "to see", **more}


def put(home: Path, name: str, request: dict[str, Any]) -> None:
    """As a client writes it: beside, then renamed."""
    (home / "requests").mkdir(parents=True, exist_ok=True)
    beside = home / "requests" / f".{name}"
    beside.write_text(json.dumps(request))
    beside.rename(home / "requests" / f"{name}.json")


def run(
    folder: Path, script: Script | None = None, *, change: Change | None = None, steps: int = 8, jobs: int = 0
) -> Path:
    """Stage `one` of the toy with a script, in this process or (`jobs` 1) one of its own; its folder."""
    home, left = folder / ONE, {tick: list(looks) for tick, looks in (script or {}).items()}
    collect = steer.collect

    def collected(stage: Any) -> Any:
        looks = left.get(stage.clock.tick)
        for name, request in looks.pop(0) if looks else []:
            put(home, name, request)
        return collect(stage)

    steer.collect = collected
    try:
        made = graph(folder, steps=steps, change=change)
        result = run_graph(made, only="one", jobs=jobs, drift="refuse", tell=lambda stage, said: None)
    finally:
        steer.collect = collect
    assert not result.failed and not result.stopped, result
    return home


def killed(
    folder: Path, step: int, *, change: Change | None = None, script: Script | None = None, steps: int = 8
) -> None:
    """The same, killed right after a step's row was recorded."""

    def work() -> None:
        import os

        record = loop.record

        def recorded(stage: Any, *args: Any, **kwargs: Any) -> None:
            record(stage, *args, **kwargs)
            if stage.clock.tick == step:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.record = recorded
        run(folder, script, change=change, steps=steps)

    assert in_child(work) == -signal.SIGKILL


def answer(home: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "answers" / f"{name}.json").read_text())
    return found


def journal(home: Path, *, by: str | None = None) -> list[dict[str, Any]]:
    return [line for line in read_lines(home / "journal.jsonl") if by is None or line["by"] == by]

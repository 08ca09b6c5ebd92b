"""Two processes, steered: after each action both hold the same state, an action one of them cannot do is done by none."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.test_ranks import errors, ranks
from tests.steering.live import answer, ask, journal, put
from tutelage.core import artifact, loop, steer
from tutelage.core.run import STOPPED

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two processes would share one GPU")

SCRIPT: dict[int, list[list[tuple[str, dict[str, Any]]]]] = {
    1: [[("lr", ask({"do": "set", "path": "optim.lr", "to": 3e-3})), ("save", ask({"do": "save"}))]],
    2: [[("mix", ask({"do": "mix", "weights": {"a": 3, "b": 1}})), ("skip", ask({"do": "skip_data", "source": "a", "rows": 2}))]],
    3: [[("cold", ask({"do": "freeze", "modules": ["*mlp*"]}))]],
    4: [[("halt", ask({"do": "pause"}))],
        [("new", ask({"do": "reset", "modules": ["*norm*"]})),
                                           ("say", ask({"do": "sample", "prompt": "a", "tokens": 3}))]],
    5: [[("look", ask({"do": "eval"}))], [("on", ask({"do": "resume"}))]],
    6: [[("guess", ask({"do": "rollback", "to": 1}, {"do": "skip_data", "source": "b", "rows": 1},
                       {"do": "scale", "path": "optim.lr", "by": 0.5}, {"do": "unfreeze", "modules": ["*mlp*"]}, dry=True)),
         ("back", ask({"do": "rollback", "to": 1})), ("drop", ask({"do": "drop_source", "name": "b"}))]],
    9: [[("undo", ask({"do": "undo", "id": "cold"}))]],
    10: [[("bad", ask({"do": "set", "path": "optim.lr", "to": 1e-3}, {"do": "mix", "weights": {"nobody": 1}}))]],
}  # fmt: skip


def recipe_of(recipe: dict[str, Any]) -> None:
    stages = recipe["stages"]
    stages["one"]["data"]["b"] = stages["two"]["data"]["b"]
    del stages["two"]
    stages["one"] |= {"engine": {"device": "cpu"}, "save": {"every": "100step"}}


def patched(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Requests appear by the script; each rank writes its digests down, step by step."""
    home, collect, record = folder / "runs/toy/one/1", steer.collect, loop.record
    left = {tick: list(looks) for tick, looks in SCRIPT.items()}

    def collected(stage: Any) -> Any:
        looks = left.get(stage.clock.tick)
        found = looks.pop(0) if looks else []
        for name, request in found if stage.engine.world.rank == 0 else []:
            put(home, name, request)
            time.sleep(0.002)
        return collect(stage)

    def recorded(stage: Any, *args: Any, **kwargs: Any) -> None:
        record(stage, *args, **kwargs)
        rates = [group["lr"] for group in stage.engine.optimizer.param_groups]
        slots = [(f"{i}{k}", v) for i, s in enumerate(stage.engine.optimizer.state.values()) for k, v in s.items()]
        found = [artifact.digest(artifact.tensors_of(stage.engine.model).items()), artifact.digest(slots), rates,
                 stage.stream.state(), stage.clock.tick, stage.steered.mix, sorted(stage.engine.params)]  # fmt: skip
        with open(folder / f"rank{stage.engine.world.rank}.jsonl", "a") as file:
            file.write(json.dumps(found) + "\n")

    monkeypatch.setattr(steer, "collect", collected)
    monkeypatch.setattr(loop, "record", recorded)
    return home


def test_after_every_action_both_ranks_hold_the_same_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = patched(monkeypatch, tmp_path)
    assert ranks(tmp_path, change=recipe_of, steps=8) == [0, 0], errors(tmp_path)
    mine, theirs = ((tmp_path / f"rank{rank}.jsonl").read_text().splitlines() for rank in (0, 1))
    assert mine == theirs and len(mine) > 8
    names = [name for looks in SCRIPT.values() for look in looks for name, _ in look]
    states = {name: answer(home, name)["state"] for name in names}
    assert states == {**dict.fromkeys(names, "applied"), "bad": "refused", "guess": "dry"}
    then = json.loads((home / "state/000000001/state.json").read_text())["stream"]["sources"]["b"]["cursor"][0]
    assert answer(home, "guess")["effects"][1]["changes"][0]["was"] == then
    assert isinstance(answer(home, "say")["effects"][0]["text"], str)
    assert [line["id"] for line in journal(home) if line["by"] == "ada"] == [name for name in names if name not in ("bad", "guess")]


def test_what_one_rank_cannot_do_none_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = patched(monkeypatch, tmp_path)
    check = steer.acts.check

    def fails_on_one(run: Any, action: Any, *args: Any) -> Any:
        if run.engine.world.rank == 1 and action.do == "freeze":
            raise OSError("this machine lacks a file")
        return check(run, action, *args)

    monkeypatch.setattr(steer.acts, "check", fails_on_one)
    assert ranks(tmp_path, change=recipe_of, steps=8) == [0, 0], errors(tmp_path)
    assert answer(home, "cold")["state"] == "refused" and "another rank" in answer(home, "cold")["error"]
    mine, theirs = ((tmp_path / f"rank{rank}.jsonl").read_text().splitlines() for rank in (0, 1))
    assert mine == theirs


def test_a_stop_in_a_pause_stops_both(tmp_path: Path) -> None:
    home = tmp_path / "runs/toy/one/1"
    put(home, "halt", ask({"do": "pause"}))

    def stop(pids: list[int]) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (home / "answers/halt.json").exists():
            time.sleep(0.02)
        os.kill(pids[1], signal.SIGTERM)

    assert ranks(tmp_path, change=recipe_of, steps=8, meanwhile=stop) == [STOPPED, STOPPED], errors(tmp_path)
    assert json.loads((home / "controls.json").read_text())["state"] == "stopped"
    put(home, "on", ask({"do": "resume"}))
    assert ranks(tmp_path, change=recipe_of, steps=8) == [0, 0], errors(tmp_path)

"""Kills a stage with actions in flight, at counted moments of its disk work, and resumes it."""
# ruff: noqa: E501  a table of requests

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests.faults.test_kill import in_child
from tests.steering.live import Change, Script, answer, ask, journal, put, run
from tests.toy import numbers
from tutelage.core import controls
from tutelage.look import digest_of

ASKED: dict[int, list[tuple[str, dict[str, Any]]]] = {
    1: [("low", ask({"do": "scale", "path": "optim.lr", "by": 0.5}))],
    2: [("mix", ask({"do": "mix", "weights": {"a": 3, "b": 1}})), ("robot", ask({"do": "set", "path": "engine.clip", "to": 0.5}, by="robo", actor="agent"))],
    3: [("cold", ask({"do": "freeze", "modules": ["*mlp*"]}, {"do": "save"}))],
    4: [("skip", ask({"do": "skip_data", "source": "a", "rows": 2})), ("new", ask({"do": "reset", "modules": ["*norm*"]}))],
    6: [("warm", ask({"do": "undo", "id": "cold"})), ("long", ask({"do": "extend", "until": "9step"}))],
}  # fmt: skip
SCRIPT: Script = {tick: [requests] for tick, requests in ASKED.items()}
NAMES = [name for requests in ASKED.values() for name, _ in requests]
CALLS = ("fsync", "rename", "replace", "truncate", "unlink")


class TooLate(Exception):
    """There was nothing left to kill."""


def stage(recipe: dict[str, Any]) -> None:
    stages = recipe["stages"]
    stages["one"]["data"]["b"] = stages["two"]["data"]["b"]
    stages["one"]["save"] = {"every": "3step", "keep": 2}


def counting(limit: int, folder: Path) -> int:
    """Run the script in a child that is killed at its `limit`-th call of the disk; the calls it made if it ended before."""

    def work() -> None:
        made = 0

        def counted(call: Any) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                nonlocal made
                made += 1
                if made == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapper

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        controls.EVERY = float("inf")  # what is written by the clock would make the count another one each time
        run(folder, SCRIPT, change=stage)
        (folder / "calls").write_text(str(made))

    folder.mkdir(parents=True, exist_ok=True)
    code = in_child(work)
    if code == -signal.SIGKILL:
        return limit
    assert code == 0
    return int((folder / "calls").read_text())


def resumed(folder: Path) -> Path:
    """The same command again; whoever had no answer has left the request where it was, or sends it again."""
    home = folder / "runs/toy/one/1"
    for name, request in (both for requests in ASKED.values() for both in requests):
        if not (home / f"answers/{name}.json").exists() and name != "warm":
            put(home, name, request)
    return run(folder, {tick: [requests] for tick, requests in ASKED.items() if tick == 6}, change=stage)


def replayed(folder: Path, home: Path) -> Path:
    """The journal's actions as a recipe's, in a run of its own."""
    acts = [{"tick": line["tick"], **act} for line in journal(home) if "actor" in line for act in line["do"]]

    def change(recipe: dict[str, Any]) -> None:
        stage(recipe)
        recipe["stages"]["one"]["actions"] = acts

    return run(folder / "replay", change=change)


def survived(folder: Path, limit: int) -> list[str]:
    """What is wrong after a kill at the `limit`-th call, a resume and a replay; nothing, when all is well.

    TooLate where the run ended before: how often the disk is called differs by a few from run to run.
    """
    if counting(limit, folder) != limit and limit:
        raise TooLate
    home = resumed(folder)
    wrong = []
    for name in NAMES:
        lines = [line for line in journal(home) if line["id"] == name]
        effects = [e for line in journal(home, by="engine") for e in line["do"] if e.get("id") == name]
        if answer(home, name)["state"] != "applied" or len(lines) != 1 or [e["do"] for e in effects] != ["applied"]:
            wrong.append(f"{name}: {answer(home, name)}, {len(lines)} lines, {effects}")
    again = replayed(folder, home)
    if digest_of(again) != digest_of(home):
        wrong.append("the replay has other weights")
    if numbers(again, kind="train") != numbers(home, kind="train"):
        wrong.append("the replay has other numbers")
    return wrong


__all__ = ["Change", "TooLate", "counting", "survived"]

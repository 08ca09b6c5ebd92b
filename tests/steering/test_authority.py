"""Person over agent over policy: limits, budget, approval, locks; whoever loses is refused, in writing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.steering.live import Change, answer, ask, journal, killed, run
from tests.toy import numbers
from tutelage import steering
from tutelage.base.method import Method
from tutelage.core.run import run_graph
from tutelage.look import digest_of

LR = "optim.lr"


def agent(*do: dict[str, Any], **more: Any) -> dict[str, Any]:
    return ask(*do, by="robo", actor="agent", **more)


def scale(by: float) -> dict[str, Any]:
    return {"do": "scale", "path": LR, "by": by}


def rules(**steering: Any) -> Change:
    def change(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["steering"] = steering

    return change


def test_an_agent_stays_within_its_limits_over_a_window(tmp_path: Path) -> None:
    limits = {"agent": {"limits": {LR: {"by": [0.5, 2.0], "per": "4step"}}}}
    script = {
        1: [[("wild", agent(scale(3.0)))]],
        2: [[("half", agent(scale(0.5)))]],
        3: [[("again", agent(scale(0.9)))]],
        6: [[("later", agent({"do": "set", "path": LR, "to": 2.5e-3}))]],
    }
    home = run(tmp_path, script, change=rules(**limits))
    assert {name: answer(home, name)["state"] for name in ("wild", "half", "again", "later")} == {
        "wild": "refused", "half": "applied", "again": "refused", "later": "applied"}  # fmt: skip
    assert "×[0.5, 2] per 4 steps" in answer(home, "again")["error"]
    refused = [e for line in journal(home, by="engine") for e in line["do"] if e["do"] == "refused"]
    assert [e["id"] for e in refused] == ["wild", "again"]


def test_a_person_wins_at_the_same_tick_and_holds_for_a_while(tmp_path: Path) -> None:
    script = {
        2: [[("a-robot", agent(scale(0.5))), ("person", ask(scale(2.0)))]],
        3: [[("soon", agent(scale(0.6)))]],
        6: [[("late", agent(scale(0.6)))]],
    }
    home = run(tmp_path, script, change=rules(hold="3step"))
    assert [answer(home, n)["state"] for n in ("person", "a-robot", "soon", "late")] == [
        "applied",
        "refused",
        "refused",
        "applied",
    ]
    assert "a person changed optim.lr at tick 2" in answer(home, "soon")["error"]


def test_one_request_does_not_take_in_two_steps_what_a_limit_forbids_in_one(tmp_path: Path) -> None:
    """Twice the most, under both names of the rate, or behind an action that is told before it."""
    note = {"do": "note", "text": "x"}
    script = {
        1: [[("twice", agent(scale(2.0), scale(2.0)))]],
        2: [
            [("named", agent({"do": "set", "path": LR, "to": 1.5e-2}, {"do": "scale", "path": "optim.base", "by": 2}))]
        ],
        3: [
            [
                (
                    "behind",
                    agent({"do": "drop_source", "name": "b"}, {"do": "add_source", "name": "b"}, note, scale(100.0)),
                )
            ]
        ],
        4: [[("once", agent(scale(2.0)))]],
        5: [[("person", ask(scale(2.0), scale(0.25)))]],
    }

    def change(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["data"]["b"] = recipe["stages"]["two"]["data"]["b"]
        recipe["stages"]["one"]["steering"] = {"agent": {"approve": []}}

    home = run(tmp_path, script, change=change)
    states = {name: answer(home, name)["state"] for name in ("twice", "named", "behind", "once", "person")}
    assert states == {
        "twice": "refused",
        "named": "refused",
        "behind": "refused",
        "once": "applied",
        "person": "applied",
    }
    assert "changed twice" in answer(home, "named")["error"] and "leaves ×" in answer(home, "behind")["error"]
    rates = [row["lr"] for row in numbers(home, kind="train")]
    assert rates == pytest.approx([1e-2] * 4 + [2e-2] + [1e-2] * 3)


def test_an_undo_is_judged_by_what_it_does(tmp_path: Path) -> None:
    """Of a person's change, of an agent's own, and back to the weights before it, which waits as a rollback does."""
    script = {
        1: [[("mine", ask({"do": "set", "path": LR, "to": 5e-3}))]],
        2: [[("unmine", agent({"do": "undo", "id": "mine"}))]],
        3: [[("own", agent({"do": "set", "path": "engine.clip", "to": 0.5}))]],
        4: [
            [
                ("unown", agent({"do": "undo", "id": "own"})),
                ("back", agent({"do": "undo", "id": "own", "weights": True})),
            ]
        ],
    }
    home = run(tmp_path, script)
    states = {name: answer(home, name)["state"] for name in ("mine", "unmine", "own", "unown", "back")}
    assert states == {"mine": "applied", "unmine": "refused", "own": "applied", "unown": "applied", "back": "waiting"}
    assert "a person changed optim.lr" in answer(home, "unmine")["error"]
    assert "`rollback` waits" in answer(home, "back")["error"]


def test_an_end_put_forward_waits_as_an_end_does(tmp_path: Path) -> None:
    script = {
        2: [
            [
                ("nearer", agent({"do": "extend", "until": "3step"})),
                ("further", agent({"do": "extend", "until": "9step"})),
            ]
        ],
        3: [[("past", ask({"do": "extend", "until": "2step"})), ("odd", agent({"do": "extend", "until": "1Tflop"}))]],
    }
    home = run(tmp_path, script)
    states = {name: answer(home, name)["state"] for name in ("nearer", "further", "past", "odd")}
    assert states == {"nearer": "waiting", "further": "applied", "past": "refused", "odd": "refused"}
    assert numbers(home)[-1]["step"] == 9


def test_what_is_risky_waits_for_a_person(tmp_path: Path) -> None:
    script = {
        2: [[("end", agent({"do": "end_stage"})), ("more", agent({"do": "reset", "modules": ["*norm*"]}))]],
        4: [[("no", ask({"do": "refuse", "id": "more"})), ("robot", agent({"do": "approve", "id": "end"}))]],
        5: [[("yes", ask({"do": "approve", "id": "end"}))]],
    }
    home = run(tmp_path, script)
    assert numbers(home)[-1]["step"] == 5
    assert (answer(home, "end")["state"], answer(home, "end")["tick"]) == ("applied", 5)
    assert answer(home, "more")["state"] == "refused" and "ada refused it" in answer(home, "more")["error"]
    assert "only a person" in answer(home, "robot")["error"]
    assert [(line["id"], line["actor"]) for line in journal(home) if "actor" in line] == [
        ("no", "person"), ("yes", "person"), ("end", "agent")]  # fmt: skip


def test_a_waiting_request_survives_a_crash(tmp_path: Path) -> None:
    script = {
        2: [[("end", agent({"do": "end_stage", "after": "4step"}))]],
        5: [[("yes", ask({"do": "approve", "id": "end"}))]],
    }
    whole = run(tmp_path / "whole", script, steps=20)
    killed(tmp_path / "cut", 4, script=script, steps=20)
    again = run(tmp_path / "cut", {5: script[5]}, steps=20)
    assert numbers(again)[-1]["step"] == numbers(whole)[-1]["step"] == 9
    assert digest_of(again) == digest_of(whole)


def test_a_person_locks_agents_out_and_budgets_end(tmp_path: Path) -> None:
    note = {"do": "note", "text": "still here"}
    script = {
        1: [[("one", agent(scale(0.9)))]],
        2: [[("two", agent(scale(0.9)))], []],
        3: [[("lock", ask({"do": "lock", "actors": ["agent"]}))]],
        4: [[("three", agent(note))]],
        5: [[("unlock", ask({"do": "unlock"}))]],
        6: [[("four", agent(note))]],
    }
    home = run(tmp_path, script, change=rules(agent={"budget": 1}))
    states = {name: answer(home, name)["state"] for name in ("one", "two", "three", "four")}
    assert states == {"one": "applied", "two": "refused", "three": "refused", "four": "applied"}
    assert "budget of 1" in answer(home, "two")["error"] and "locked agents out" in answer(home, "three")["error"]


def test_no_request_calls_a_class_of_some_module(tmp_path: Path) -> None:
    out = tmp_path / "made"
    code = {"use": "subprocess:Popen", "args": {"args": ["touch", str(out)]}}
    home = run(tmp_path, {2: [[("code", ask({"do": "add_source", "name": "x", "source": code}))]]})
    assert answer(home, "code")["state"] == "refused" and "not code" in answer(home, "code")["error"]
    assert not out.exists()


class Halver(Method):
    """A policy: halves the rate at tick 3, and goes back with half the rate when the loss is no number."""

    every: int = 3
    guards = True
    off = {"every": 0}

    def act(self, view: Any) -> list[dict[str, Any]]:
        self.state["asked"] = self.state.get("asked", 0) + 1
        if not view.signals.get("finite", 1.0):
            return [{"do": "rollback", "to": "last", "skip": True}, {"do": "scale", "path": LR, "by": 0.5}]
        return [{"do": "scale", "path": LR, "by": 0.5}] if view.clock.tick == self.every else []


def policy(**more: Any) -> Change:
    def change(recipe: dict[str, Any]) -> None:
        one = recipe["stages"]["one"]
        one["methods"] = [{"use": f"{__name__}:Halver"}]
        one["save"] = {"every": "2step", "keep": 2}
        one |= more

    return change


def test_a_policy_acts_is_journaled_and_retraces(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", change=policy())
    (line,) = [line for line in journal(whole) if line.get("actor") == "policy"]
    assert (line["tick"], line["by"]) == (3, f"{__name__}:Halver")
    assert [row["lr"] for row in numbers(whole, kind="train")] == pytest.approx([1e-2] * 3 + [5e-3] * 5)
    for step in (3, 5):
        killed(tmp_path / f"cut{step}", step, change=policy())
        again = run(tmp_path / f"cut{step}", change=policy())
        assert digest_of(again) == digest_of(whole) and numbers(again) == numbers(whole)
        assert len([line for line in journal(again) if line.get("actor") == "policy"]) == 1
    replay = policy(actions=[{"tick": 3, "do": "scale", "path": LR, "by": 0.5}], steering={"replay": True})
    assert digest_of(run(tmp_path / "replay", change=replay)) == digest_of(whole)


def test_a_person_goes_over_a_policy(tmp_path: Path) -> None:
    home = run(tmp_path, {3: [[("mine", ask({"do": "set", "path": LR, "to": 2e-2}))]]}, change=policy())
    assert [row["lr"] for row in numbers(home, kind="train")] == pytest.approx([1e-2] * 3 + [2e-2] * 5)
    refused = [e for line in journal(home, by="engine") for e in line["do"] if e["do"] == "refused"]
    assert len(refused) == 1 and refused[0]["request"]["actor"] == "policy"


def test_a_policy_that_guards_brings_a_stage_back_from_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.core.engine import Engine

    step = Engine.step

    def broken(self: Any, batch: Any, view: Any) -> Any:
        found = step(self, batch, view)
        if view.clock.tick == 5:
            for p in self.params.values():
                p.data.fill_(math.nan)
            return {**found, "loss": math.nan}
        return found

    monkeypatch.setattr(Engine, "step", broken)
    home = run(tmp_path / "guarded", change=policy(until="8step"))
    rows = numbers(home, kind="train")
    assert rows[5]["loss"] == "nan" and all(isinstance(row["loss"], float) for row in rows[6:])
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert rows[-1]["lr"] == pytest.approx(2.5e-3)
    told = {one["kind"]: one["text"] for one in steering.controls(home)["alerts"]}
    assert "no number at tick 6" in told["loss"] and "Halver did rollback + scale optim.lr at tick 6" in told["acted"]
    from tests.toy import graph

    made = graph(tmp_path / "bare", steps=8)
    assert "not a number at step 6" in str(
        run_graph(made, only="one", jobs=1, drift="refuse", tell=lambda s, d: None).failed
    )
    (failed,) = steering.controls(tmp_path / "bare/runs/toy/one/1")["alerts"]
    assert failed["kind"] == "failed" and "not a number at step 6" in failed["text"]

"""What an independent reader found: valid requests that ended a run, and ways round what a person had said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.steering.live import answer, ask, journal, run
from tests.toy import numbers
from tutelage.core import acts, steer
from tutelage.replaying import told


def two_sources(recipe: dict[str, Any]) -> None:
    stages = recipe["stages"]
    stages["one"]["data"]["b"] = stages["two"]["data"]["b"]
    stages["one"]["save"] = {"every": "2step", "keep": 2}


def states(home: Path, *names: str) -> dict[str, str]:
    return {name: answer(home, name)["state"] for name in names}


def test_a_way_back_keeps_its_save_and_what_cannot_be_done_is_refused_before_it_is_written(tmp_path: Path) -> None:
    every = ask({"do": "freeze", "modules": ["*layers*"]}, {"do": "freeze", "modules": ["*embed*", "*norm*", "*head*"]})
    looks = [
        [
            ("huge", ask({"do": "mix", "weights": {"a": 1e308, "b": 1e308}})),
            ("none", ask({"do": "mix", "weights": {"a": 1, "b": 0}}, {"do": "drop_source", "name": "a"})),
            ("cold", every),
            ("own", ask({"do": "undo", "id": "x", "acts": [{"do": "set", "path": "optim.lr", "to": 0.5}]})),
        ]
    ]
    home = run(
        tmp_path, {3: looks, 5: [[("back", ask({"do": "rollback", "to": 2}))]]}, change=two_sources
    )  # saves of 2 and 4; the one made before going back would push out that of 2
    assert states(home, "huge", "none", "cold", "own") == dict.fromkeys(("huge", "none", "cold", "own"), "refused")
    assert (
        "nothing would be left to train" in answer(home, "cold")["error"]
        and "`id` alone" in answer(home, "own")["error"]
    )
    assert answer(home, "back")["state"] == "applied" and answer(home, "back")["effects"][0]["tick"] == 2
    assert numbers(home, kind="train")[-1]["step"] == 8


@pytest.mark.parametrize(
    ("schedule", "first"),
    [({"use": "schedule/wsd", "warm": "0step", "cooldown": "10%"}, {"do": "end_stage"}),
     ({"use": "schedule/wsd", "warm": "4step", "cooldown": "10%"}, {"do": "rollback", "to": 0})],
)  # fmt: skip
def test_a_rate_is_set_where_it_is_then_not_where_it_is_now(schedule: Any, first: Any, tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"] |= {"schedule": schedule, "save": {"every": "2step", "keep": 9}}
        recipe["stages"]["one"]["steering"] = {"replay": False}

    looks = [[("keep", ask({"do": "save"}))]]
    both = [[("both", ask(first, {"do": "set", "path": "optim.lr", "to": 1e-3}))]]
    home = run(tmp_path, {0: looks, 4: both}, change=change)
    told = answer(home, "both")
    assert told["state"] == "refused" and "the schedule makes the rate 0" in told["error"]


def test_what_a_person_puts_back_is_theirs_and_a_group_that_stands_still_speaks_for_none(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        two_sources(recipe)
        recipe["stages"]["one"]["groups"] = [{"match": "*embed*", "rate": 0}]

    robot: dict[str, Any] = {"by": "robo", "actor": "agent"}
    cooler = {"do": "scale", "path": "optim.lr", "by": 0.9}
    looks = {
        2: [[("wild", ask({"do": "scale", "path": "optim.lr", "by": 100.0}, **robot)), ("cool", ask(cooler, **robot))]],
        3: [[("back", ask({"do": "undo", "id": "cool"})), ("again", ask(cooler, **robot))]],
        4: [[("later", ask(cooler, **robot))]],
    }
    home = run(tmp_path, looks, change=change)
    assert states(home, "wild", "cool", "back", "again", "later") == {
        "wild": "refused", "cool": "applied", "back": "applied", "again": "refused", "later": "refused"
    }  # fmt: skip
    assert "leaves ×" in answer(home, "wild")["error"] and "a person changed optim.lr" in answer(home, "later")["error"]


def test_what_waits_stays_what_it_was_and_who_is_locked_out_has_nothing_read(tmp_path: Path) -> None:
    robot: dict[str, Any] = {"by": "robo", "actor": "agent"}
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"text": "nobody is to read this"}\n' * 50)
    looks = {
        2: [
            [("end", ask({"do": "end_stage"}, **robot))],
            [("end", ask({"do": "reset", "modules": ["*norm*"]}, **robot))],
            [("yes", ask({"do": "approve", "id": "end"}))],
        ],
    }
    source = ask({"do": "add_source", "name": "s", "source": {"path": str(secret)}, "weight": 0.1}, **robot)
    looks[1] = [[("lock", ask({"do": "lock", "actors": ["agent"]}))], [("read", source)],
                [("open", ask({"do": "unlock", "actors": ["agent"]}))], [("ask", source)]]  # fmt: skip
    looks[1] = [[("halt", ask({"do": "pause"})), *looks[1][0]], *looks[1][1:], [("on", ask({"do": "resume"}))]]
    home = run(tmp_path, {tick: found for tick, found in looks.items() if tick == 1}, change=two_sources, steps=3)
    assert states(home, "read", "ask") == {"read": "refused", "ask": "waiting"}
    assert not any(b"nobody" in path.read_bytes() for path in (tmp_path / "runs/.data").rglob("*") if path.is_file())

    halted = [[("halt", ask({"do": "pause"})), *looks[2][0]], *looks[2][1:], [("on", ask({"do": "resume"}))]]
    other = run(tmp_path / "other", {2: halted}, change=two_sources)
    assert answer(other, "end")["state"] == "applied" and len(numbers(other, kind="train")) == 2
    done = [act["do"] for line in journal(other) if line["id"] == "end" for act in line["do"]]
    assert done == ["end_stage"]


def test_a_fault_in_doing_it_ends_one_process_and_not_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = acts.apply

    def broken(stage: Any, action: Any) -> Any:
        if action.do == "skip_data":
            raise ZeroDivisionError("a fault of ours")
        return apply(stage, action)

    script = {3: [[("skip", ask({"do": "skip_data", "source": "a", "rows": 1}))]]}
    with monkeypatch.context() as patch:
        patch.setattr(steer.acts, "apply", broken)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, script, change=two_sources)
    home = run(tmp_path, change=two_sources)
    assert len(numbers(home, kind="train")) == 8
    (line,) = [entry for line in journal(home, by="engine") for entry in line["do"] if entry["do"] == "failed"]
    assert line["id"] == "skip" and "a fault of ours" in line["why"]
    again = [act["do"] for line in told(journal(home)) for act in line["do"]]
    assert not {"skip_data", "failed"} & set(again), "nothing of it is done in a replay"

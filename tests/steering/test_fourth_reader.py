"""What a fourth reader found, who repeated the faults of another program by running them here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.steering.live import answer, ask, run
from tests.steering.test_second_reader import agent, one, source
from tests.toy import numbers


def test_a_source_that_joins_takes_its_share_of_a_mix_that_was_set(tmp_path: Path) -> None:
    """And keeps it when another that the mix names goes and comes back; a recipe's own mix gives it the share, too."""
    join = {"do": "add_source", "name": "c", "source": source(tmp_path), "weight": 0.5}
    looks = {
        2: [[("mix", ask({"do": "mix", "weights": {"a": 3, "b": 1}}))]],
        3: [[("join", ask(join))]],
        5: [[("drop", ask({"do": "drop_source", "name": "b"}))]],
        6: [[("back", ask({"do": "add_source", "name": "b"}))]],
        7: [[("own", ask({"do": "mix", "weights": {}}))]],
    }
    home = run(tmp_path, looks, change=one())
    assert {answer(home, name)["state"] for name in ("mix", "join", "drop", "back", "own")} == {"applied"}
    shares = {row["tick"]: row["weights"] for row in numbers(home, kind="train")}
    assert shares[3] == {"a": 0.75, "b": 0.25}
    assert shares[4] == shares[5] == shares[7] == pytest.approx({"a": 0.375, "b": 0.125, "c": 0.5})
    assert shares[6] == pytest.approx({"a": 3 / 7, "c": 4 / 7}, abs=1e-4) and shares[8]["c"] == 0.5
    last = numbers(home, kind="train")[-1]["cursors"]
    assert any(name.startswith("c") and cursor[0] for name, cursor in last.items()), "rows of it are drawn"


def test_a_source_that_comes_back_into_a_mix_without_it_is_told_so(tmp_path: Path) -> None:
    looks = {
        2: [[("drop", ask({"do": "drop_source", "name": "b"}))]],
        3: [[("mix", ask({"do": "mix", "weights": {"a": 1}}))]],
        4: [[("back", ask({"do": "add_source", "name": "b"}))]],
    }
    home = run(tmp_path, looks, change=one())
    assert answer(home, "back")["effects"][0]["changes"][0]["now"] == "back; the mix gives it nothing"


def test_what_is_looked_at_of_a_mix_after_a_source_that_joins_is_what_is_done(tmp_path: Path) -> None:
    join = {"do": "add_source", "name": "c", "source": source(tmp_path), "weight": 0.5}
    mix = {"do": "mix", "weights": {"a": 1, "b": 1, "c": 1}}
    looks = {
        2: [[("first", ask({"do": "mix", "weights": {"a": 3, "b": 1}}))]],
        3: [[("dry", ask(join, mix, dry=True)), ("both", ask(join, mix))]],
    }
    home = run(tmp_path, looks, change=one())
    dry, done = ([effect["changes"] for effect in answer(home, name)["effects"]] for name in ("dry", "both"))
    assert dry == done and done[1][0]["was"] == {"a": 3, "b": 1, "c": 4}


def test_whoever_is_told_that_he_approved_finds_it_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to what waited is there before the answer to the approval."""
    from tutelage.core import steer

    order, write = [], steer.answer

    def noted(stage, request, *, state, **more):  # type: ignore[no-untyped-def]
        order.append((request["id"], state))
        write(stage, request, state=state, **more)

    monkeypatch.setattr(steer, "answer", noted)
    steering = {"agent": {"approve": ["end_stage"]}}
    looks = {
        2: [[("wish", agent({"do": "end_stage", "after": "2step"}))]],
        3: [[("yes", ask({"do": "approve", "id": "wish"}))]],
    }
    run(tmp_path, looks, change=one(steering=steering))
    assert order == [("wish", "waiting"), ("wish", "applied"), ("yes", "applied")]

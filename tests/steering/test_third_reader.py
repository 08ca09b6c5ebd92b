"""What a third reader found: what one request's actions make of each other, twins that never end, ways round a limit."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests import forked
from tests.steering.beside import Beside
from tests.steering.live import answer, ask, journal, run
from tests.steering.test_second_reader import LR, agent, one, put, source
from tests.toy import numbers
from tutelage import modalities, steering, trying
from tutelage.base import load
from tutelage.core import steer
from tutelage.core.graph import Graph
from tutelage.core.run import run_graph
from tutelage.look import digest_of
from tutelage.modalities.text.toy import MODELS
from tutelage.replaying import replay
from tutelage.retelling import retell

DROP = "model.dropout"


def dropout(recipe: dict[str, Any]) -> None:
    recipe["stages"]["one"]["start"] = {**MODELS["gpt2"], "resid_pdrop": 0.1, "embd_pdrop": 0.1}


def test_a_value_that_two_actions_together_put_out_of_its_bounds_is_refused(tmp_path: Path) -> None:
    up = {"do": "scale", "path": DROP, "by": 2.0}
    looks = {
        2: [[("set", ask(put(DROP, 0.9), up))]],
        3: [[("scale", ask(up, up, up, up))]],
        4: [[("fits", ask(up, up))]],
    }
    home = run(tmp_path, looks, change=dropout)
    assert [answer(home, name)["state"] for name in ("set", "scale", "fits")] == ["refused", "refused", "applied"]
    assert len(numbers(home, kind="train")) == 8


# -- twins ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("more", [None, {"tick": 5, "do": "pause"}])
def test_twins_that_are_told_to_pause_go_on(
    more: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is tried, or by the recipe: nobody sits beside a twin."""
    monkeypatch.setattr(trying, "subprocess", forked.SUBPROCESS)
    stage = Beside(tmp_path, steps=12, pause=3, more=[more] if more else []).paused()
    do = {"do": "note", "text": "x"} if more else {"do": "pause"}
    tried = trying.begin_try(stage.folder, [do], 3, by="ada")
    done = threading.Thread(target=trying.run_try, args=(tried,), daemon=True)
    done.start()
    done.join(60)
    assert not done.is_alive() and tried.state == "measured"
    stage.person({"do": "resume"})
    if more:
        stage.paused()
    stage.finish()


# -- again ------------------------------------------------------------------------------------------------------------


def recipe_of(home: Path) -> Path:
    """The recipe where the command leaves it."""
    return home.parent.parent / "recipe.yaml"


def retold(folder: Path, home: Path, steps: int) -> Path:
    retell("toy", out=folder / "again.yaml", runs=folder / "runs", console=Console(quiet=True))
    made = Graph.resolve(
        load.load(folder / "again.yaml"), name="again", modality=modalities.find("text"), runs=folder / "runs"
    )
    result = run_graph(made, only="one", jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed, result.failed
    return folder / "runs/again/one/1"


def kept(folder: Path, change: Any, steps: int = 8) -> None:
    """The recipe, where replays and retellings read it."""
    from tests.toy import graph

    (folder / "runs/toy").mkdir(parents=True, exist_ok=True)
    made = graph(folder, steps=steps, change=change)
    (folder / "runs/toy/recipe.yaml").write_text(load.dump(made.recipe))


PAUSED: dict[str, list[list[tuple[str, dict[str, Any]]]]] = {
    "a change and back to the weights before it": [
        [("halt", ask({"do": "pause"}))],
        [("stays", ask(put(LR, 2e-2)))],
        [("x", ask({"do": "freeze", "modules": ["*layers.0*"]}))],
        [("back", ask({"do": "undo", "id": "x", "weights": True}))],
    ],
    "a save, and back to it": [
        [("halt", ask({"do": "pause"})), ("stays", ask(put(LR, 2e-2)))],
        [("x", ask({"do": "save"}))],
        [("back", ask({"do": "rollback", "to": "last"}))],
    ],
}


@pytest.mark.parametrize("name", PAUSED)
def test_what_was_done_within_one_pause_is_retold_to_the_same_bits(name: str, tmp_path: Path) -> None:
    change = one(save={"every": "2step", "keep": 9})
    kept(tmp_path, change)
    looks = [*PAUSED[name]]
    home = run(tmp_path, {5: looks, 6: [[("on", ask({"do": "resume"}))]]}, change=change)
    assert answer(home, "back")["state"] == "applied"
    again = retold(tmp_path, home, 8)
    assert digest_of(again) == digest_of(home)


def test_rows_of_a_source_that_joined_in_the_same_pause_are_retold(tmp_path: Path) -> None:
    kept(tmp_path, one())
    join = {"do": "add_source", "name": "c", "source": source(tmp_path), "weight": 0.5}
    looks = [
        [("halt", ask({"do": "pause"}))],
        [("x", ask(join))],
        [("skip", ask({"do": "skip_data", "source": "c", "rows": 3}))],
        [("on", ask({"do": "resume"}))],
    ]
    home = run(tmp_path, {3: looks}, change=one())
    assert answer(home, "skip")["state"] == "applied"
    assert digest_of(retold(tmp_path, home, 8)) == digest_of(home)


def test_a_pause_that_the_recipe_planned_stops_no_replay(tmp_path: Path) -> None:
    change = one(actions=[{"tick": 3, "do": "pause"}])
    kept(tmp_path, change)
    home = run(tmp_path, {3: [[("on", ask({"do": "resume"}))]]}, change=change)
    found: list[Any] = []
    work = threading.Thread(target=lambda: found.extend(replay("toy/one", runs=tmp_path / "runs")), daemon=True)
    work.start()
    work.join(60)
    try:
        assert found and found[0].equal
    finally:
        if work.is_alive():
            other = home.parents[2] / "toy--replay/one/1"
            steering.send(other, [{"do": "resume"}], by="ada")
            work.join(60)


def test_two_moves_of_the_tick_pass_over_no_action_of_the_recipe(tmp_path: Path) -> None:
    change = one(actions=[{"tick": 5, "do": "scale", "path": LR, "by": 0.5}])
    resets = [{"do": "reset", "modules": [f"*layers.{i}.mlp*"]} for i in (0, 1)]
    home = run(tmp_path, {4: [[("x", ask(*resets))]]}, change=change)
    assert {row["tick"]: row["lr"] for row in numbers(home, kind="train")}[7] == pytest.approx(5e-3)
    assert [line["id"] for line in journal(home, by="recipe")] == ["recipe-5"]


# -- data -------------------------------------------------------------------------------------------------------------


def test_before_a_source_joined_nothing_was_drawn_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way back to there: it begins anew, and the rows of all sources sum to the samples counted."""
    collect, seen = steer.collect, {}

    def looked(stage: Any) -> Any:
        rows = sum(entry["rows"] for entry in stage.stream.ledger().values())
        seen[stage.clock.tick] = (rows, int(stage.clock.samples))
        return collect(stage)

    monkeypatch.setattr(steer, "collect", looked)
    join = {"do": "add_source", "name": "c", "source": source(tmp_path), "weight": 0.5}
    script = {3: [[("x", ask(join))]], 5: [[("back", ask({"do": "rollback", "to": 2}))]]}
    home = run(tmp_path, script, change=one(save={"every": "2step", "keep": 9}))
    assert answer(home, "back")["state"] == "applied"
    assert all(rows == samples for rows, samples in seen.values()), seen


def test_who_wants_the_weights_before_a_change_is_not_given_older_ones(tmp_path: Path) -> None:
    script: Any = {tick: [[(f"x{tick}", ask({"do": "scale", "path": LR, "by": 0.99}))]] for tick in range(2, 7)}
    script[1] = [[("old", ask({"do": "save"}))]]
    script[7] = [[("back", ask({"do": "undo", "id": "x2", "weights": True}))]]
    home = run(tmp_path, script, change=one(save={"every": "100step", "keep": 1}), steps=9)
    told = answer(home, "back")
    assert told["state"] == "refused" and "is gone" in told["error"]


# -- who may do what --------------------------------------------------------------------------------------------------


def test_a_later_end_is_no_way_round_a_limit_on_the_rate(tmp_path: Path) -> None:
    limits = {"agent": {"limits": {LR: {"by": [0.5, 2.0], "per": "4step"}}}}
    change = one(steering=limits, schedule={"use": "schedule/cosine", "warm": "0step", "floor": 0.0})
    far, near = ({"do": "extend", "until": f"{n}step"} for n in (80, 9))
    script = {
        6: [
            [("far", agent(far)), ("both", agent(near, {"do": "scale", "path": LR, "by": 1.9}))],
            [("near", agent(near))],
            [("mine", ask(far, near))],
        ]
    }
    script[6].insert(0, [("halt", ask({"do": "pause"}))])
    script[6].append([("on", ask({"do": "resume"}))])
    home = run(tmp_path, script, change=change)
    states = {name: answer(home, name)["state"] for name in ("far", "both", "near", "mine")}
    assert states == {"far": "refused", "both": "refused", "near": "applied", "mine": "applied"}


def test_a_request_has_so_many_actions_at_most(tmp_path: Path) -> None:
    looks = [{"do": "sample", "tokens": 1}] * 1000
    home = run(tmp_path, {2: [[("x", agent(*looks))]]}, change=one())
    assert answer(home, "x")["state"] == "refused" and "at most" in answer(home, "x")["error"]


def test_nobody_signs_as_what_a_replay_is_known_by(tmp_path: Path) -> None:
    home = run(tmp_path, {2: [[("x", ask({"do": "eval"}, by="replay"))]]}, change=one())
    assert answer(home, "x")["state"] == "refused"
    assert json.loads((home / "answers/x.json").read_text())["error"]

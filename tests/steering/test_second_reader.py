"""What a second reader found: valid requests that ended a run or hung it, and ways round a limit, an approval, a word."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_kill import in_child
from tests.steering.live import answer, ask, journal, killed, run
from tests.toy import numbers
from tutelage import brief, steering
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.base.method import Method
from tutelage.base.spec import SourceSpec
from tutelage.core import acts, artifact, steer
from tutelage.core.record import dumps, plain
from tutelage.look import digest_of
from tutelage.modalities.text import imports
from tutelage.modalities.text.toy import MODELS
from tutelage.replaying import told
from tutelage.server import api
from tutelage.server.feed import said

Change = Callable[[dict[str, Any]], None]
LR = "optim.lr"


def agent(*do: dict[str, Any], **more: Any) -> dict[str, Any]:
    return ask(*do, by="robo", actor="agent", **more)


def put(path: str, to: Any) -> dict[str, Any]:
    return {"do": "set", "path": path, "to": to}


def one(**keys: Any) -> Change:
    def change(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        stages["one"]["data"]["b"] = stages["two"]["data"]["b"]
        for key, value in keys.items():
            before = stages["one"].get(key)
            stages["one"][key] = {**before, **value} if isinstance(before, dict) and key != "schedule" else value

    return change


def source(folder: Path, **fields: Any) -> dict[str, Any]:
    path = folder / "more.jsonl"
    rows = [json.dumps({"text": f"cat dog {i} ran home", **fields}) + "\n" for i in range(60)]
    path.write_text("".join(rows), encoding="utf-8")
    return {"path": str(path), "val": "20%"}


WSD = {"use": "schedule/wsd", "warm": "0step", "cooldown": "10%"}
METADATA = [{"use": "condition/metadata", "form": "{source}: ", "cooldown": "2step"}]
BANDIT = {"use": "mix/bandit", "every": "2step", "passages": 4}
SKILLS = {"use": "mix/skill_it", "every": "2step", "pilot": 0, "passages": 4}
BUCKETS = {"use": "curriculum/length_buckets", "shortest": 8, "cycles": 2}
FORGETTING = [{"use": "steer/forgetting_budget", "allowed": 1e308, "cap": 1, "then": "pause"}]
UNTOLD: dict[str, tuple[Change, dict[str, Any], str]] = {
    "a last span that nobody can count": (one(schedule=WSD), put("schedule/wsd.cooldown", "1e12flop"), "not known"),
    "a method's own last span": (one(methods=METADATA), put("condition/metadata.cooldown", "1Tflop"), "not known"),
    "an end that other spans are not told in": (one(methods=METADATA), {"do": "extend", "until": "1Tflop"}, "flop"),
    "an end that measurements are not told in": (
        one(evals={"every": "512tok"}), {"do": "extend", "until": "2Gflop"}, "flop"
    ),
    "more measurements than memory holds": (
        one(evals={"every": "1step"}), {"do": "extend", "until": "300Mstep"}, "measurements"
    ),
    "more steps than are counted": (one(), {"do": "extend", "until": "2Gstep"}, "fewer than"),
    "shares of which none is a number": (one(mix=BANDIT), put("mix/bandit.temperature", 1e-310), "greater"),
    "scores of which none is a number": (one(mix=BANDIT), put("mix/bandit.explore", 1e308), "less"),
    "weights of which none is a number": (one(mix=SKILLS), put("mix/skill_it.eta", 1e308), "less"),
    "so many cycles that none ends": (one(curriculum=BUCKETS), put("curriculum/length_buckets.cycles", 1e15), "less"),
    "a number that is none any more": (
        one(methods=FORGETTING),
        {"do": "scale", "path": "steer/forgetting_budget.allowed", "by": 1000},
        "no number is so large",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNTOLD)
def test_what_would_end_or_hang_the_stage_later_is_refused_now(name: str, tmp_path: Path) -> None:
    change, act, why = UNTOLD[name]
    home = run(tmp_path, {3: [[("x", ask(act))]]}, change=change)
    assert answer(home, "x")["state"] == "refused" and why in answer(home, "x")["error"]
    assert len(numbers(home, kind="train")) == 8


def test_a_stage_that_counts_flops_is_extended_in_them_and_its_steps_are_told(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        one(until="300Mflop", evals={"every": "2step"})(recipe)

    homes = [tmp_path / "whole", tmp_path / "cut"]
    script = {5: [[("x", ask({"do": "extend", "until": "600Mflop"}))]]}
    killed(homes[1], 6, change=change, script=script)
    found = [run(home, script, change=change) for home in homes]
    assert numbers(found[0]) == numbers(found[1]) and digest_of(found[0]) == digest_of(found[1])
    assert numbers(found[0], kind="train")[-1]["flops"] >= 600e6


def test_one_answer_to_what_waits_is_enough(tmp_path: Path) -> None:
    yes, no = ({"do": do, "id": "end"} for do in ("approve", "refuse"))
    looks = [[("twice", ask(yes, yes))], [("both", ask(yes, no))], [("once", ask(yes))]]
    script = {
        2: [
            [("halt", ask({"do": "pause"})), ("end", agent({"do": "end_stage"}))],
            *looks,
            [("on", ask({"do": "resume"}))],
        ]
    }
    home = run(tmp_path, script)
    states = {name: answer(home, name)["state"] for name in ("twice", "both", "once", "end")}
    assert states == {"twice": "refused", "both": "refused", "once": "applied", "end": "applied"}
    assert len(numbers(home, kind="train")) == 2


def test_sources_that_join_at_once_leave_something_for_the_others(tmp_path: Path) -> None:
    joins = [{"do": "add_source", "name": n, "source": source(tmp_path), "weight": 0.6} for n in ("c", "d")]
    home = run(tmp_path, {3: [[("both", ask(*joins)), ("first", ask(joins[0]))]]}, change=one())
    assert "whole mixture" in answer(home, "both")["error"] and answer(home, "first")["state"] == "applied"


def test_what_is_left_is_drawn_also_where_the_mix_gave_it_nothing(tmp_path: Path) -> None:
    mix = {"use": "mix/fixed", "shares": {"a": 1.0, "b": 0.0}}
    home = run(tmp_path, {3: [[("x", ask({"do": "drop_source", "name": "a"}))]]}, change=one(mix=mix))
    assert answer(home, "x")["state"] == "applied"
    assert [row["weights"] for row in numbers(home, kind="train")][3:] == [{"b": 1.0}] * 5


def test_a_source_that_the_stage_cannot_draw_is_refused(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        folders = [tmp_path / name for name in ("a", "b")]
        for folder in folders:
            folder.mkdir()
            recipe["stages"]["one"]["data"][folder.name] = source(folder, url="http://x.org/1")
        recipe["stages"]["one"]["methods"] = [{"use": "condition/metadata", "form": "{url.host} ", "cooldown": "0step"}]

    join = {"do": "add_source", "name": "c", "source": source(tmp_path), "weight": 0.1}
    home = run(tmp_path, {3: [[("x", ask(join))]]}, change=change)
    assert answer(home, "x")["state"] == "refused" and "form asks for {url}" in answer(home, "x")["error"]


def test_what_is_held_in_four_bits_is_neither_freed_nor_begun_anew(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    asked = {do: ask({"do": do, "modules": ["*mlp*"]}) for do in ("unfreeze", "reset")}
    change = one(train=["*norm*"], engine={"quantize": "nf4"})
    home = run(tmp_path, {3: [list(asked.items())]}, change=change)
    assert all("held in four bits" in answer(home, do)["error"] for do in asked)


def test_nobody_goes_back_to_a_save_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = steer.collect

    def cut(stage: Any) -> Any:
        path = stage.folder / "state" / "000000002" / "model.safetensors"
        if stage.clock.tick == 5 and path.stat().st_size > 500:
            path.write_bytes(path.read_bytes()[:500])
        return collect(stage)

    monkeypatch.setattr(steer, "collect", cut)
    script = {2: [[("save", ask({"do": "save"}))]], 5: [[("x", ask({"do": "rollback", "to": 2}))]]}
    home = run(tmp_path, script, change=one())
    assert answer(home, "x")["state"] == "refused" and "(saves: 4)" in answer(home, "x")["error"]
    assert not artifact.whole(home / "state/000000002")


def test_the_smallest_weights_of_a_gate_end_nothing(tmp_path: Path) -> None:
    gate = "steer/objective_gate"
    both = ask(put(f"{gate}.strength", 1e-300), put(f"{gate}.phase", 1e-300))
    home = run(tmp_path, {3: [[("x", both)]]}, change=one(methods=[{"use": gate}]))
    assert answer(home, "x")["state"] == "applied" and len(numbers(home, kind="train")) == 8


def test_a_penalty_whose_weights_are_all_frozen_is_none(tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        one(keep={"old": dict(recipe["stages"]["two"]["data"]["b"])}, train=["*layers.0*"])(recipe)
        recipe["stages"]["one"]["methods"] = [{"use": "continual/ewc", "rows": 4, "of": "old"}]

    swap = [{"do": "unfreeze", "modules": ["*layers.1*"]}, {"do": "freeze", "modules": ["*layers.0*"]}]
    home = run(tmp_path, {3: [[("x", ask(*swap))]]}, change=change)
    pulls = [row["penalty/continual/ewc"] for row in numbers(home, kind="train")]
    assert pulls[2] > 0 and pulls[3:] == [0.0] * 5


def test_an_undo_gives_every_module_back_its_own_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect, seen, path = steer.collect, {}, "model.dropout"

    def looked(stage: Any) -> Any:
        drops = {getattr(module, name) for module, name in acts.dropouts(stage.engine.model)}
        seen[stage.clock.tick] = sorted(drops)
        return collect(stage)

    monkeypatch.setattr(steer, "collect", looked)
    model = {**MODELS["gpt2"], "resid_pdrop": 0.2, "embd_pdrop": 0.1}

    def change(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["start"] = model

    script = {1: [[("a", ask(put(path, 0.3)))]], 2: [[("b", ask(put(path, 0.4)))]],
              3: [[("c", ask({"do": "undo", "id": "b"}))]], 4: [[("d", ask({"do": "undo", "id": "a"}))]]}  # fmt: skip
    home = run(tmp_path, script, change=change, steps=6)
    assert [answer(home, name)["state"] for name in "abcd"] == ["applied"] * 4
    assert [seen[tick] for tick in range(1, 6)] == [[0.0, 0.1, 0.2], [0.3], [0.4], [0.3], [0.0, 0.1, 0.2]]


# -- what the recipe says beside what people do -----------------------------------------------------------------------


def test_an_action_of_the_recipe_that_steering_made_impossible_is_refused_in_writing(tmp_path: Path) -> None:
    drop = {"do": "drop_source", "name": "b"}
    change = one(actions=[{"tick": 6, **drop}])
    script = {3: [[("x", ask(drop))]]}
    home = run(tmp_path / "whole", script, change=change)
    assert len(numbers(home, kind="train")) == 8
    (refused,) = [e for line in journal(home, by="engine") for e in line["do"] if e["do"] == "refused"]
    assert refused["id"] == "recipe-6" and "no source 'b'" in refused["why"]
    killed(tmp_path / "cut", 7, change=change, script=script)
    assert journal(run(tmp_path / "cut", change=change))[-1]["do"][0]["id"] == "recipe-6"
    with pytest.raises(UserError, match="no source 'c'"):
        run(tmp_path / "plain", change=one(actions=[{"tick": 6, "do": "drop_source", "name": "c"}]))


def test_a_way_back_does_not_pass_over_an_action_of_the_recipe(tmp_path: Path) -> None:
    """A way back moves the tick; what the recipe says of the next one is done there, now and after a cut."""
    change = one(actions=[{"tick": 5, "do": "scale", "path": LR, "by": 0.5}], save={"every": "2step", "keep": 9})
    script = {4: [[("x", ask({"do": "rollback", "to": 2}))]]}
    whole = run(tmp_path / "whole", script, change=change)
    assert {row["tick"]: row["lr"] for row in numbers(whole, kind="train")}[6] == pytest.approx(5e-3)
    killed(tmp_path / "cut", 7, change=change, script=script)
    assert digest_of(run(tmp_path / "cut", change=change)) == digest_of(whole)


class Counts(Method):
    """A policy that remembers when it was asked."""

    def act(self, view: Any) -> list[dict[str, Any]]:
        self.state["asked"] = f"{self.state.get('asked', '')} {int(view.clock.tick)}"
        return []


def test_a_policy_is_asked_as_often_after_a_cut_as_without(tmp_path: Path) -> None:
    """Also where the stage is saved at a tick that a way back has made."""
    change = one(methods=[{"use": f"{__name__}:Counts"}], save={"every": "2step", "keep": 9})
    script = {4: [[("x", ask({"do": "rollback", "to": 2}, {"do": "save"}))]]}
    homes = [tmp_path / "whole", tmp_path / "cut"]
    killed(homes[1], 6, change=change, script=script)
    asked = []
    for home in [run(home, script if home is homes[0] else None, change=change) for home in homes]:
        asked.append(artifact.load_state(artifact.states(home / "state")[-1])[1]["methods"])
    assert asked[0] == asked[1]


class Wishes(Method):
    """A policy that wants something once."""

    def act(self, view: Any) -> list[dict[str, Any]]:
        return [{"do": "scale", "path": LR, "by": 0.5}] if int(view.clock.tick) == 3 else []


def test_a_policys_wish_is_not_lost_when_the_cut_comes_before_its_turn(tmp_path: Path) -> None:
    change = one(methods=[{"use": f"{__name__}:Wishes"}])
    script = {3: [[("x", ask({"do": "eval"}))]]}

    def work() -> None:
        decide = steer.decide

        def cut(stage: Any, request: dict[str, Any]) -> None:
            if request["actor"] == "policy":
                os.kill(os.getpid(), signal.SIGKILL)
            decide(stage, request)

        steer.decide = cut
        run(tmp_path / "cut", script, change=change)

    assert in_child(work) == -signal.SIGKILL
    whole, again = run(tmp_path / "whole", script, change=change), run(tmp_path / "cut", change=change)
    assert digest_of(again) == digest_of(whole) and numbers(again) == numbers(whole)


def test_a_policys_pause_stops_no_replay() -> None:
    line = {"id": "3-x", "tick": 3, "by": "x", "actor": "policy", "do": [{"do": "pause"}]}
    assert [found["do"] for found in told([line]) if found["by"] == "x"] == [[]]


def test_the_rate_that_is_told_is_the_one_that_is_used(tmp_path: Path) -> None:
    """Also where a later action of the same request moves the schedule."""
    both = ask(put(LR, 1e-3), put("schedule/cosine.floor", 0.9))
    home = run(tmp_path, {3: [[("x", both)]]}, change=one(schedule={"use": "schedule/cosine", "warm": "0step"}))
    used = {change["used"] for change in answer(home, "x")["effects"][0]["changes"]}
    assert used == {next(row["lr"] for row in numbers(home, kind="train") if row["tick"] == 4)}


# -- who may do what --------------------------------------------------------------------------------------------------


def test_nothing_is_read_for_an_agent_that_only_asks(tmp_path: Path) -> None:
    join = {"do": "add_source", "name": "c", "source": source(tmp_path, password="x"), "weight": 0.1}
    script = {
        2: [[("ask", agent(join, dry=True))]],
        3: [[("lock", ask({"do": "lock"}))], [("locked", agent(join, dry=True))]],
    }
    script[3] = [[("halt", ask({"do": "pause"})), *script[3][0]], script[3][1], [("on", ask({"do": "resume"}))]]
    (tmp_path / "runs").mkdir()
    home = run(tmp_path, script, change=one())
    assert "waits for a person" in answer(home, "ask")["error"] and "locked" in answer(home, "locked")["error"]
    assert {answer(home, name)["state"] for name in ("ask", "locked")} == {"refused"}
    assert len(list((tmp_path / "runs/.data").glob("*/"))) == 2 and not steering.controls(home)["waiting"]


def test_a_schedule_is_no_way_round_a_limit_on_the_rate_nor_round_a_persons_word(tmp_path: Path) -> None:
    level = "schedule/constant.level"
    limits = {"agent": {"limits": {LR: {"by": [0.5, 2.0], "per": "4step"}}}, "hold": "3step"}
    script = {
        1: [[("wild", agent(put(level, 50.0))), ("some", agent(put(level, 1.5)))]],
        2: [[("more", agent({"do": "scale", "path": LR, "by": 1.5}))]],
        3: [[("mine", ask(put(LR, 5e-3)))]],
        4: [[("held", agent(put(level, 1.4)))]],
    }
    home = run(tmp_path, script, change=one(steering=limits))
    states = {name: answer(home, name)["state"] for name in ("wild", "some", "more", "mine", "held")}
    assert states == {"wild": "refused", "some": "applied", "more": "refused", "mine": "applied", "held": "refused"}
    assert "a person changed optim.lr" in answer(home, "held")["error"]


def test_every_value_that_an_undo_moves_counts_for_a_limit(tmp_path: Path) -> None:
    clip = "engine.clip"
    limits = {"agent": {"limits": {clip: {"by": [0.5, 2.0], "per": "3step"}}}}
    script = {
        1: [[("up", agent({"do": "scale", "path": clip, "by": 2.0}, {"do": "scale", "path": LR, "by": 0.9}))]],
        3: [[("back", agent({"do": "undo", "id": "up"}))]],
        4: [[("down", agent({"do": "scale", "path": clip, "by": 0.5}))]],
    }
    home = run(tmp_path, script, change=one(steering=limits))
    assert [answer(home, name)["state"] for name in ("up", "back", "down")] == ["applied", "applied", "refused"]


@pytest.mark.parametrize(
    ("rules", "why"),
    [({"approve": ["rolback"]}, "rollback"), ({"approve": ["undo"]}, "what it does"),
     ({"limits": {"optim.rl": {"by": [0.5, 2]}}}, "optim.lr"), ({"limits": {"optim.base": {"by": [0.5, 2]}}}, "optim.base")],
)  # fmt: skip
def test_a_rule_that_would_hold_nobody_is_refused(rules: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        run(tmp_path, change=one(steering={"agent": rules}))


def test_a_number_of_any_size_is_shown(tmp_path: Path) -> None:
    home = run(tmp_path, {3: [[("x", agent({"do": "rollback", "to": 10**30}))]]}, change=one())
    for found in (steering.controls(home), steering.log(home), steering.answer(home, "x")):
        assert b"1000000000000000000000000000000" in said(plain(found))


@pytest.mark.parametrize("look", [steering.log, brief.latest, brief.evals, api._brief])
def test_files_of_lines_that_are_links_are_not_followed(look: Callable[[Any], Any], tmp_path: Path) -> None:
    home, secret = tmp_path / "runs/toy/one/1", tmp_path / "secret.jsonl"
    home.mkdir(parents=True)
    (home / "stage.json").write_text("{}")
    act = {"id": "x", "by": "ada", "tick": 1, "do": [{"do": "note", "text": "hidden"}]}
    rows = [
        {"kind": "train", "tick": 1, "loss": "hidden"},
        {"kind": "eval", "tick": 1, "step": 1, "final": False, "values": {"hidden": 1}},
    ]
    secret.write_text("".join(dumps(row) + "\n" for row in (rows if look is not steering.log else [act])))
    (home / ("journal.jsonl" if look is steering.log else "metrics.jsonl")).symlink_to(secret)
    what = steering.stages(tmp_path / "runs")[0] if look is api._brief else home
    try:
        assert "hidden" not in str(look(what))
    except UserError as error:
        assert "is a link" in str(error)


@pytest.mark.parametrize("name", ["untold:", "untold:X.Y", "untold:X:Z", "untold:é", "untold:X Y"])
def test_what_a_branch_is_not_refused_for_is_not_imported_either(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "untold.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="names no code"):
        registry.make({"use": name})
    with pytest.raises(UserError, match="write the generator"):
        list(imports.importer(SourceSpec(use=name))[1](None))  # type: ignore[index]

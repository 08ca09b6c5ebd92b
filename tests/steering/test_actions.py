"""Every action does what it says at its tick, outlives a crash, and can be put back where it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.steering.live import Change, answer, ask, journal, killed, run
from tests.toy import numbers
from tutelage import steering
from tutelage.asking import words_like
from tutelage.core import artifact, loop
from tutelage.look import digest_of


def stage(**keys: Any) -> Change:
    def change(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        two = stages["two"]["data"]["b"]
        more = {"c": {**two, "path": two["path"]} if isinstance(two, dict) else {"path": two}}
        stages["one"]["data"]["b"] = two
        stages["one"] |= {
            k: (json.loads(json.dumps(v).replace('"SOURCE"', json.dumps(more["c"])))) for k, v in keys.items()
        }

    return change


def at(tick: int, do: str, **fields: Any) -> dict[str, Any]:
    return {"tick": tick, "do": do, **fields}


OFTEN = {"every": "2step", "keep": 2}
COURSES: dict[str, dict[str, Any]] = {
    "what is trained": {
        "actions": [at(2, "freeze", modules=["*mlp*"]), at(4, "unfreeze", modules=["*mlp*"]), at(5, "reset", modules=["*norm*"]),
                    at(6, "freeze", modules=["*embed*"])]
    },
    "what is drawn": {
        "actions": [at(2, "add_source", name="c", source="SOURCE", weight=0.5), at(3, "skip_data", source="a", rows=3),
                    at(4, "drop_source", name="b"), at(5, "add_source", name="b"), at(6, "mix", weights={"a": 1, "c": 1}),
                    at(7, "mix", weights={})]
    },
    "what is drawn in pieces": {
        "curriculum": {"use": "curriculum/length_buckets", "shortest": 8, "cycles": 2},
        "actions": [at(2, "add_source", name="c", source="SOURCE", weight=0.5), at(3, "skip_data", source="a:8", rows=3),
                    at(4, "drop_source", name="b"), at(5, "set", path="curriculum/length_buckets.cycles", to=4),
                    at(6, "mix", weights={"a": 1, "c": 1})]
    },
    "going back": {
        "actions": [at(3, "save"), at(5, "rollback", to=3), at(5, "set", path="engine.clip", to=0.5),
                    at(8, "rollback", to="last", skip=True)]
    },
    "going back to what was picked before": {
        "curriculum": {"use": "select/facility_location", "warm": "2step", "every": "2step", "partition": 40},
        "actions": [at(3, "save"), at(5, "rollback", to=3), at(8, "rollback", to="last", skip=True)]
    },
    "the last fall": {
        "schedule": {"use": "schedule/wsd", "warm": "0step", "cooldown": "10%"},
        "actions": [at(2, "set", path="schedule/wsd.floor", to=0.1), at(4, "end_stage", after="3step", decay=True)],
    },
}  # fmt: skip


@pytest.mark.parametrize("course", COURSES)
def test_a_cut_and_resumed_stage_takes_the_same_course(course: str, tmp_path: Path) -> None:
    change = stage(save=OFTEN, **COURSES[course])
    whole = run(tmp_path / "whole", change=change)
    for step in (3, 7):
        killed(tmp_path / f"cut{step}", step, change=change)
        again = run(tmp_path / f"cut{step}", change=change)
        assert digest_of(again) == digest_of(whole)
        assert numbers(again) == numbers(whole)
    assert digest_of(whole) != digest_of(run(tmp_path / "plain", change=stage(save=OFTEN)))


def test_where_sources_are_cut_the_pieces_are_offered_that_skipping_takes(tmp_path: Path) -> None:
    skips = [(name, ask({"do": "skip_data", "source": name, "rows": 1}, dry=True)) for name in ("a", "a:8", "b:16")]
    cut = {"use": "curriculum/length_buckets", "shortest": 8, "cycles": 2}
    home = run(
        tmp_path,
        {2: [[(name.replace(":", "-"), asked) for name, asked in skips]]},
        change=stage(curriculum=cut),
        steps=4,
    )
    offered = words_like("toy/one", ["skip-data"], "", runs=tmp_path / "runs")
    assert offered == steering.controls(home)["drawn"] and {"a:8", "b:16"} <= set(offered) and "a" not in offered
    assert f"(there are: {', '.join(offered)})" in answer(home, "a")["error"]
    assert [answer(home, name)["state"] for name in ("a-8", "b-16")] == ["dry", "dry"]
    assert words_like("toy/one", ["drop-source"], "", runs=tmp_path / "runs") == ["a", "b"]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Which parameters changed in each step, with the tick before it."""
    found: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    record = loop.record

    def recorded(stage: Any, *args: Any, **kwargs: Any) -> None:
        record(stage, *args, **kwargs)
        now = {name: p.detach().clone() for name, p in stage.engine.model.named_parameters()}
        changed = {name for name, p in now.items() if name in before and not p.equal(before[name])}
        found.append(
            {"tick": stage.clock.tick - 1, "names": changed, "rates": stage.engine.optimizer.param_groups[0]["lr"]}
        )
        before.clear()
        before.update(now)

    monkeypatch.setattr(loop, "record", recorded)
    return found


def test_what_is_frozen_stands_still_and_goes_on_with_its_momentum(tmp_path: Path, moved: list[dict[str, Any]]) -> None:
    home = run(
        tmp_path,
        {
            3: [[("cold", ask({"do": "freeze", "modules": ["*mlp*"]}))]],
            6: [[("warm", ask({"do": "undo", "id": "cold"}))]],
        },
        change=stage(),
    )
    mlp = [any("mlp" in name for name in step["names"]) for step in moved[1:]]
    assert mlp == [True, True, False, False, False, True, True]
    assert all(any("attn" in name for name in step["names"]) for step in moved[1:])
    (change,) = answer(home, "cold")["effects"][0]["changes"]
    assert change["was"] - change["now"] == sum("mlp" in name for name in moved[1]["names"]) > 0
    state = artifact.load_state(artifact.states(home / "state")[-1])[0]["optimizer"]
    steps = {name.split("|")[0]: int(t) for name, t in state.items() if name.endswith("|step")}
    assert {steps[n] for n in steps if "mlp" in n} == {5} and {steps[n] for n in steps if "attn" in n} == {8}


def test_everything_works_in_a_pause_and_no_step_is_taken(tmp_path: Path) -> None:
    looks = [
        [("halt", ask({"do": "pause"}))],
        [("look", ask({"do": "eval"})), ("say", ask({"do": "sample", "prompt": "a", "tokens": 4}))],
        [("half", ask({"do": "scale", "path": "optim.lr", "by": 0.5})), ("keep", ask({"do": "save"}))],
        [
            ("mix", ask({"do": "mix", "weights": {"a": 3, "b": 1}})),
            ("would", ask({"do": "reset", "modules": ["*"]}, dry=True)),
        ],
        [("two", ask({"do": "step", "n": 2}))],
    ]
    home = run(tmp_path, {3: looks, 5: [[], [("on", ask({"do": "resume"}))]]}, change=stage())
    names = ["halt", "look", "say", "half", "keep", "mix", "two"]
    assert {name: (answer(home, name)["state"], answer(home, name)["tick"]) for name in names} == dict.fromkeys(
        names, ("applied", 3)
    )
    assert answer(home, "on")["tick"] == 5
    assert answer(home, "would")["state"] == "dry" and "fresh" in str(answer(home, "would")["effects"])
    assert isinstance(answer(home, "say")["effects"][0]["text"], str)
    rows = numbers(home, kind="train")
    assert [row["lr"] for row in rows] == pytest.approx([1e-2] * 3 + [5e-3] * 5)
    assert [row["weights"]["a"] for row in rows] == pytest.approx([0.5] * 3 + [0.75] * 5)
    assert [row["tick"] for row in numbers(home, kind="eval")] == [0, 3, 8]
    assert (home / "state/000000003/kept").exists()
    assert len(rows) == 8


def test_a_pause_outlives_a_crash(tmp_path: Path) -> None:
    script = {3: [[("halt", ask({"do": "pause"}))], [("on", ask({"do": "resume"}))]]}
    whole = run(tmp_path / "whole", script)
    killed(tmp_path / "cut", 2, script=script)
    again = run(tmp_path / "cut", script)
    assert digest_of(again) == digest_of(whole)
    assert [line["do"][0]["do"] for line in journal(again) if line["by"] == "ada"] == ["pause", "resume"]


def test_an_undo_puts_values_back_and_with_weights_the_state_before_too(tmp_path: Path) -> None:
    lr = {"do": "set", "path": "optim.lr", "to": 3e-3}
    script = {2: [[("low", ask(lr))]], 4: [[("back", ask({"do": "undo", "id": "low"}))]]}
    rows = numbers(run(tmp_path / "values", script), kind="train")
    assert [row["lr"] for row in rows] == pytest.approx([1e-2, 1e-2, 3e-3, 3e-3, 1e-2, 1e-2, 1e-2, 1e-2])
    script = {2: [[("low", ask(lr))]], 4: [[("back", ask({"do": "undo", "id": "low", "weights": True}))]]}
    home = run(tmp_path / "weights", script)
    rows = numbers(home, kind="train")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    assert [row["tick"] for row in rows] == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert [row["lr"] for row in rows[4:]] == pytest.approx([1e-2] * 6)
    assert answer(home, "low")["saved"] == 2
    again = {**script, 7: [[("more", ask({"do": "undo", "id": "nobody"}))]]}
    assert "no request 'nobody'" in answer(run(tmp_path / "unknown", again), "more")["error"]


def test_rolled_back_weights_are_those_of_the_save(tmp_path: Path) -> None:
    script = {3: [[("keep", ask({"do": "save"}))]], 6: [[("back", ask({"do": "rollback", "to": 3}, {"do": "save"}))]]}
    home = run(tmp_path, script)
    assert answer(home, "back")["effects"][0]["tick"] == 3
    weights = [artifact.load_tensors(home / f"state/{tick:09d}/model.safetensors") for tick in (3, 7)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    then = [json.loads((home / f"state/{tick:09d}/state.json").read_text()) for tick in (3, 7)]
    assert then[0]["stream"] == then[1]["stream"] and then[1]["clock"]["flops"] > then[0]["clock"]["flops"]


def test_the_last_fall_begins_where_it_is_asked_and_takes_what_is_left(tmp_path: Path) -> None:
    schedule = {"use": "schedule/wsd", "warm": "0step", "cooldown": "10%", "decay": "linear"}
    script = {4: [[("fall", ask({"do": "end_stage", "after": "4step", "decay": True}))]]}
    home = run(tmp_path, script, change=stage(schedule=schedule), steps=40)
    rates = [row["lr"] for row in numbers(home, kind="train")]
    assert rates == pytest.approx([1e-2] * 5 + [7.5e-3, 5e-3, 2.5e-3])
    plain = {4: [[("end", ask({"do": "end_stage", "decay": True, "after": "1step"}))]]}
    refused = answer(run(tmp_path / "cosine", plain), "end")
    assert "no last fall" in refused["error"]


def test_controls_say_what_the_optimizer_uses(tmp_path: Path) -> None:
    home = run(tmp_path, {3: [[("low", ask({"do": "set", "path": "optim.lr", "to": 4e-3}))]]}, change=stage(groups=[
        {"match": "*embed*", "rate": 0.5}]))  # fmt: skip
    now = json.loads((home / "controls.json").read_text())
    (rate,) = [target for target in now["targets"] if target["path"] == "optim.lr"]
    assert rate["now"] == pytest.approx(4e-3)
    assert {round(g["used"], 9) for g in rate["groups"]} == {4e-3, 2e-3}
    assert now["state"] == "finished" and now["tick"] == 8 and now["sources"] == ["a", "b"]
    assert now["drawn"] == ["a", "b"] and now["alerts"] == []
    assert {"optim/adamw.decay", "engine.clip", "optim.base"} <= {target["path"] for target in now["targets"]}
    (changes,) = [effect["changes"] for effect in answer(home, "low")["effects"]]
    assert changes[0] == {"what": "optim.lr", "group": changes[0]["group"], "was": 1e-2, "now": 4e-3, "used": 4e-3}
    assert any(change["used"] == pytest.approx(2e-3) for change in changes)


def test_weight_decay_is_set_in_the_groups_that_decay(tmp_path: Path) -> None:
    home = run(tmp_path, {2: [[("more", ask({"do": "set", "path": "optim/adamw.decay", "to": 0.5}))]]})
    state = json.loads((artifact.states(home / "state")[-1] / "state.json").read_text())
    assert {g["weight_decay"] for g in state["groups"]} == {0.0, 0.5}
    assert state["settings"]["optim/adamw"] == {"decay": 0.5}


def test_a_request_sent_twice_does_nothing_twice(tmp_path: Path) -> None:
    half = ("half", ask({"do": "scale", "path": "optim.lr", "by": 0.5}))
    home = run(tmp_path, {2: [[half]], 5: [[half]]})
    assert [row["lr"] for row in numbers(home, kind="train")] == pytest.approx([1e-2] * 2 + [5e-3] * 6)
    assert answer(home, "half")["tick"] == 2 and not list((home / "requests").iterdir())


def test_a_request_after_the_end_is_answered(tmp_path: Path) -> None:
    more = ("more", ask({"do": "extend", "until": "10step"}))
    home = run(tmp_path / "in time", {8: [[more]]})
    assert numbers(home)[-1]["step"] == 10
    late = run(tmp_path / "late", {8: [[], [more]]})
    assert answer(late, "more")["state"] == "refused" and "over" in answer(late, "more")["error"]

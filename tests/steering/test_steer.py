"""`tutelage steer` on a stage that really runs: what is typed is done, shown, written down; branches begin."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests import forked
from tests.steering.steered import at_work
from tutelage import steering, wording
from tutelage.asking import runs_like, words_like
from tutelage.base.errors import UserError
from tutelage.cli import app

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with at_work(tmp_path_factory.mktemp("work")) as folder:
        yield folder


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands start at once."""
    monkeypatch.setattr(steering, "subprocess", forked.SUBPROCESS)


@pytest.fixture
def runs(stage: Path) -> Path:
    return stage.parents[2]


def steer(runs: Path, *words: str) -> Result:
    done: Result = CliRunner().invoke(app, ["steer", "toy", *words, "--runs", str(runs), "--wait", "120"])
    return done


def told(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    found: dict[str, Any] = json.loads(done.output)
    return found


def test_what_is_typed_holds_and_is_shown_as_asked_and_as_it_is_in_effect(stage: Path, runs: Path) -> None:
    done = steer(runs, "set", "optim.lr", "4e-3", "+", "mix", "a=1", "b=3", "--why", "too hot", "--by", "ada")
    assert done.exit_code == 0, done.output
    assert "applied at tick" in done.output and "→ 0.004" in done.output and "mix" in done.output
    entry = steering.log(stage)[-1]
    assert (entry["by"], entry["actor"], entry["why"], entry["state"]) == ("ada", "person", "too hot", "applied")
    assert entry["effects"][1]["changes"][0]["now"] == {"a": 0.25, "b": 0.75}
    shown = steer(runs, "log").output
    assert "ada (person): set optim.lr 0.004 + mix a=1 b=3  “too hot”" in shown
    status = steer(runs).output
    assert "toy/one  running" in status and "optim.lr  0.004" in status and "mix  a=1 b=3" in status


def test_a_request_sent_twice_does_nothing_twice(stage: Path) -> None:
    before = steering.controls(stage)["tick"]
    halved = [{"do": "scale", "path": "optim.lr", "by": 0.5}]
    for _ in range(2):
        assert steering.send(stage, halved, by="ada", id="once") == "once"
        assert steering.wait(stage, "once", seconds=120)["state"] == "applied"
    assert sum(entry["id"] == "once" for entry in steering.log(stage)) == 1
    change = steering.answer(stage, "once")
    assert change is not None and change["tick"] >= before
    rate = change["effects"][0]["changes"][0]["now"]
    assert steering.controls(stage)["targets"][0]["groups"][0]["base"] == pytest.approx(rate)


def test_dry_is_only_asked_and_a_refusal_is_an_exit_code(stage: Path, runs: Path) -> None:
    def asked() -> list[str]:
        return [e["id"] for e in steering.log(stage) if e["actor"] != "policy"]  # the stage's own policy acts meanwhile

    before = asked()
    done = steer(runs, "set", "optim.lr", "1", "--dry", "--json")
    assert told(done)["state"] == "dry" and asked() == before
    refused = steer(runs, "set", "optim.beta", "1")
    assert refused.exit_code == 1 and "optim.beta" in refused.output


def test_a_pause_steps_and_a_sample(stage: Path, runs: Path) -> None:
    tick = told(steer(runs, "pause", "--json"))["tick"]
    told(steer(runs, "step", "3", "--json"))
    until = time.monotonic() + 180
    while steering.controls(stage)["tick"] < tick + 3 and time.monotonic() < until:
        time.sleep(0.05)
    text = told(steer(runs, "sample", "the cat", "--tokens", "5", "--json"))
    assert text["tick"] == tick + 3 and isinstance(text["effects"][0]["text"], str)
    assert steering.controls(stage)["state"] == "paused"
    told(steer(runs, "resume", "--json"))


def test_undo_by_id_and_a_way_back(stage: Path, runs: Path) -> None:
    saved = told(steer(runs, "save", "--json"))["effects"][0]["tick"]
    first = told(steer(runs, "scale", "optim.lr", "0.5", "--json"))
    was = first["effects"][0]["changes"][0]["was"]
    back = told(steer(runs, "undo", first["id"], "--json"))
    assert back["effects"][0]["changes"][0]["now"] == pytest.approx(was)
    assert told(steer(runs, "rollback", str(saved), "--skip", "--json"))["effects"][0]["tick"] == saved


def test_a_branch_is_a_run_of_its_own(stage: Path, runs: Path) -> None:
    made = told(steer(runs, "branch", "hot", "optim.lr=0.02", "until=2step", "--start", "beside", "--json"))
    (begun,) = made["branches"]
    assert begun["run"] == "hot" and "lr: 0.02" in Path(begun["recipe"]).read_text()
    until = time.monotonic() + 300
    while not (runs / "hot/one/1/artifact").exists() and time.monotonic() < until:
        time.sleep(0.2)
    assert (runs / "hot/one/1/artifact").exists(), Path(begun["log"]).read_text()
    assert steering.stages(runs)[0].lineage == ["toy/one"]
    again = steer(runs, "branch", "hot")
    assert isinstance(again.exception, UserError) and "already" in str(again.exception)


@pytest.mark.usefixtures("warm")
def test_a_branch_may_wait_for_the_stage(stage: Path, runs: Path) -> None:
    made = told(steer(runs, "branch", "later", "until=2step", "--start", "after", "--json"))
    (begun,) = made["branches"]
    time.sleep(2)
    os.kill(begun["process"], 0)
    assert not (runs / "later/one").exists()
    os.kill(begun["process"], signal.SIGKILL)


@pytest.mark.usefixtures("warm")
def test_a_branch_brings_in_no_code_of_anybodys(stage: Path, runs: Path) -> None:
    action = {"do": "branch", "name": "bad", "sets": {"methods": [{"use": "subprocess:Popen"}]}}
    tick = steering.wait(stage, steering.send(stage, [action], by="bot"), seconds=120)["effects"][0]["tick"]
    with pytest.raises(UserError, match="subprocess:Popen, code that the stage did not use"):
        steering.branch(stage, {**action, "tick": tick}, runs=runs)
    assert not (runs / "bad").exists()
    for name in ("../out", "a/b", "..", ""):
        with pytest.raises(UserError):
            steering.branch(stage, {"do": "branch", "name": name, "tick": tick}, runs=runs)


def test_the_tab_key_knows_what_is_steerable(stage: Path, runs: Path) -> None:
    assert "toy/one" in runs_like("to", runs=runs)
    assert words_like("toy", [], "ro", runs=runs) == ["rollback"]
    assert "optim.lr" in words_like("toy", ["set"], "opt", runs=runs)
    assert words_like("toy", ["pause", "+", "mix"], "", runs=runs) == ["a=", "b="]
    assert "model.layers.0.*" in words_like("toy", ["freeze"], "model.l", runs=runs)
    assert words_like("nothing", ["set"], "", runs=runs) == []
    done = steering.log(stage)
    assert set(words_like("toy", ["undo"], "", runs=runs)) == {e["id"] for e in done if e["state"] == "applied"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("set optim.lr 3e-4", {"do": "set", "path": "optim.lr", "to": 3e-4}),
        ("set schedule/wsd.fall 10%", {"do": "set", "path": "schedule/wsd.fall", "to": "10%"}),
        ("mix", {"do": "mix", "weights": {}}),
        ("end-stage --after 10% --decay", {"do": "end_stage", "after": "10%", "decay": True}),
        ("rollback last --skip", {"do": "rollback", "to": "last", "skip": True}),
        ("rollback 1,204", {"do": "rollback", "to": 1204}),
        ("add-source code stdlib:code --weight 0.2",
         {"do": "add_source", "name": "code", "source": {"path": "stdlib:code"}, "weight": 0.2}),
        ("add-source code", {"do": "add_source", "name": "code"}),
        ("lock", {"do": "lock"}),
        ("note looks well", {"do": "note", "text": "looks well"}),
        ("step", {"do": "step"}),
    ],
)  # fmt: skip
def test_words_are_actions(words: str, wanted: dict[str, Any]) -> None:
    assert wording.actions(words.split()) == [wanted]


@pytest.mark.parametrize(
    "words", ["", "stets x", "set optim.lr", "scale optim.lr -1", "mix a", "rollback soon", "freeze"]
)
def test_words_that_say_nothing_are_told_what_to_write(words: str) -> None:
    with pytest.raises(UserError) as error:
        wording.actions(words.split())
    assert "\n" not in str(error.value)

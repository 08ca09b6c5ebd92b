"""A try against a really running stage: what it costs, two twins, what came of them, and the stage goes on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests import forked
from tests.steering.steered import at_work, steered
from tests.toy import numbers
from tutelage import steering, trying
from tutelage.base.errors import UserError
from tutelage.cli import app
from tutelage.core import artifact
from tutelage.core.stats import blocked, paired

STEPS = 100  # of about a tenth of a second: long enough that a try begins in their midst
TRIPLED = [{"do": "scale", "path": "optim.lr", "by": 3.0}]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a stage at work, with a policy of its own; each test leaves it running."""
    with at_work(tmp_path_factory.mktemp("work")) as folder:
        yield folder


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins start at once."""
    monkeypatch.setattr(trying, "subprocess", forked.SUBPROCESS)


@pytest.fixture
def running(stage: Path) -> Path:
    """The stage, not paused, and its rate as it was at first."""
    do = [{"do": "set", "path": "optim.lr", "to": 1e-2}, {"do": "resume"}]
    assert steering.wait(stage, steering.send(stage, do, by="ada"), seconds=120)["state"] == "applied"
    return stage


def passes(folder: Path, tick: int) -> bool:
    """Whether the stage comes past a tick."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if steering.controls(folder)["tick"] > tick:
            return True
        time.sleep(0.05)
    return False


def steps_of(folder: Path, *, first: int, last: int) -> list[dict[str, Any]]:
    return [row for row in numbers(folder, kind="train") if first < row["tick"] <= last]


@pytest.mark.usefixtures("warm")
def test_the_plain_twin_is_what_the_stage_itself_does_next(running: Path) -> None:
    tried = trying.begin_try(running, TRIPLED, 6, by="ada")
    assert tried.live and tried.effects[0]["changes"][0]["now"] == pytest.approx(
        3 * tried.effects[0]["changes"][0]["was"]
    )
    assert tried.estimate["seconds"] > 0
    seen: list[tuple[str, int, int]] = []
    trying.run_try(tried, say=lambda twin, done, of: seen.append((twin, done, of)))
    assert steering.controls(running)["state"] == "paused"
    assert {twin for twin, _, _ in seen} == {"plain", "changed"} and all(of == 6 for _, _, of in seen)
    result = tried.result
    assert result is not None and result["steps"] == result["same_batches"] == 6
    assert result["loss"]["mean"] != 0 and result["pairs"][0][1] == result["pairs"][0][2], (
        "the first batch is seen before"
    )
    assert set(result["measures"]) == {"bits_per_byte/a", "bits_per_byte/b"}
    trying.settle(tried, adopt=False)
    assert passes(running, tried.tick + 8)
    steering.wait(running, steering.send(running, [{"do": "pause"}], by="ada"), seconds=120)
    mine = steps_of(running, first=tried.tick, last=tried.tick + 6)
    twin = steps_of(tried.place / "plain", first=tried.tick, last=tried.tick + 6)
    assert len(mine) == 6 and mine == twin
    changed = steps_of(tried.place / "changed", first=tried.tick, last=tried.tick + 6)
    assert [row["loss"] for row in changed] != [row["loss"] for row in twin]
    assert not (tried.place / "plain/state").exists(), "its weights are gone"
    assert trying.load_try(running, tried.id).state == "discarded"


def test_an_adopted_action_gives_the_changed_twins_steps(running: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["try", "toy", "scale", "optim.lr", "3", "--steps", "5", "--yes", "--adopt", "--runs",
         str(running.parents[2])],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "adopted" in done.output and "same batches" in done.output
    tried = trying.tries(running)[-1]
    assert tried.state == "adopted"
    assert passes(running, tried.tick + 7)
    steering.wait(running, steering.send(running, [{"do": "pause"}], by="ada"), seconds=120)
    mine = steps_of(running, first=tried.tick, last=tried.tick + 5)
    assert mine == steps_of(tried.place / "changed", first=tried.tick, last=tried.tick + 5)
    assert mine[0]["lr"] == pytest.approx(3e-2, rel=0.2)


def test_what_goes_wrong_in_a_twin_leaves_the_stage_running(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = trying.begin_try(running, TRIPLED, 5, by="ada")
    popen = subprocess.Popen

    def broken(command: list[str], **kwargs: Any) -> Any:
        return popen([command[0], "-c", "import sys; sys.exit('no memory left')"], **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trying.subprocess, "Popen", broken)
        with pytest.raises(UserError, match="the twin changed failed: no memory left"):
            trying.run_try(tried)
    assert passes(running, tried.tick + 1)
    assert trying.load_try(running, tried.id).state == "failed"


def test_what_the_stage_refuses_is_not_tried(running: Path) -> None:
    with pytest.raises(UserError, match="toy/one refuses it: .*optim.beta"):
        trying.begin_try(running, [{"do": "set", "path": "optim.beta", "to": 1.0}], 5, by="ada")
    assert steering.controls(running)["state"] == "running"
    assert not any(tried.do[0].get("path") == "optim.beta" for tried in trying.tries(running))


@pytest.mark.usefixtures("warm")
def test_a_stage_paused_by_a_person_stays_paused(running: Path) -> None:
    steering.wait(running, steering.send(running, [{"do": "pause"}], by="bob"), seconds=120)
    tried = trying.run_try(trying.begin_try(running, TRIPLED, 3, by="ada"))
    trying.settle(tried, adopt=True)
    assert steering.controls(running)["state"] == "paused"
    assert any(entry["do"] == TRIPLED for entry in steering.log(running))


def paused_at(folder: Path, tick: int) -> None:
    until = time.monotonic() + 120
    while (now := steering.controls(folder))["state"] != "paused" or now["tick"] < tick:
        assert time.monotonic() < until, now
        time.sleep(0.05)
    assert now["tick"] == tick


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("adopt", [True, False])
def test_a_stage_in_the_midst_of_steps_pauses_after_them_as_it_would_have(running: Path, adopt: bool) -> None:
    asked = steering.send(running, [{"do": "step", "n": STEPS}], by="bob")
    begun = steering.wait(running, asked, seconds=120)["tick"]
    tried = trying.run_try(trying.begin_try(running, TRIPLED, 3, by="ada"))
    assert tried.until == begun + STEPS > tried.tick
    trying.settle(tried, adopt=adopt)
    paused_at(running, begun + STEPS)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("adopt", [True, False])
def test_a_stage_that_somebody_paused_during_a_try_stays_paused(running: Path, adopt: bool) -> None:
    tried = trying.run_try(trying.begin_try(running, TRIPLED, 3, by="ada"))
    steering.wait(running, steering.send(running, [{"do": "pause"}], by="bob"), seconds=120)
    trying.settle(tried, adopt=adopt)
    assert steering.controls(running)["state"] == "paused"
    time.sleep(0.5)
    paused_at(running, tried.tick)


@pytest.mark.usefixtures("warm")
def test_a_stage_that_is_not_running_is_tried_from_its_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = steered(tmp_path, {}, monkeypatch=monkeypatch, only="one", steps=12)
    folder = runs / "toy/one/1"
    with pytest.raises(UserError, match="the twin changed did not do it .refused.: there is no source 'z' to mix"):
        trying.run_try(trying.begin_try(folder, [{"do": "mix", "weights": {"z": 1}}], 3, by="ada"))
    done = CliRunner().invoke(
        app, ["try", "toy/one", "mix", "b=1", "--steps", "3", "--yes", "--runs", str(runs), "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.strip().splitlines()[-1])
    assert (told["state"], told["tick"], told["live"]) == ("discarded", 8, False)
    assert told["result"]["steps"] == 3 and told["result"]["same_batches"] == 0
    assert told["result"]["loss"] is None, "other batches are no pairs"
    twin = steps_of(folder.parent / "tries" / told["id"] / "plain", first=8, last=11)
    assert twin == steps_of(folder, first=8, last=11)


def test_the_number_of_steps_and_the_end_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = steered(tmp_path, {}, monkeypatch=monkeypatch, only="one", steps=3)
    folder = runs / "toy/one/1"
    with pytest.raises(UserError, match="one step at least"):
        trying.begin_try(folder, TRIPLED, 0, by="ada")
    assert len(artifact.states(folder / "state")) == 1
    with pytest.raises(UserError, match="is over, and has no save from before its end"):
        trying.begin_try(folder, TRIPLED, 3, by="ada")
    done = CliRunner().invoke(app, ["try", "toy/one", "save", "--runs", str(runs)])
    assert isinstance(done.exception, UserError)


def test_intervals_from_blocks_hold_where_neighbors_are_alike() -> None:
    """Of steps whose differences follow an autoregression with 0.5, as many intervals as promised hold the truth."""
    rng = np.random.default_rng(0)
    held = {"blocks": 0, "steps": 0}
    for _ in range(300):
        noise = rng.standard_normal(140)
        for i in range(1, 140):
            noise[i] += 0.5 * noise[i - 1]
        series = noise[40:].tolist()
        for name, found in (("blocks", blocked(series, blocks=10)), ("steps", paired(series))):
            assert found.low is not None and found.high is not None
            held[name] += found.low < 0 < found.high
    assert held["blocks"] > 0.9 * 300 > 0.8 * 300 > held["steps"]


def test_blocks_leave_out_what_is_left_over_at_the_beginning() -> None:
    assert blocked([9.0, 1.0, 3.0, 5.0, 7.0], blocks=2).differences == (2.0, 6.0)
    assert blocked([1.0, 2.0], blocks=10).n == 2

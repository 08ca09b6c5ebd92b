"""What the page shows of a stage whose files are damaged, whose folder is gone, whose trainer says that something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.server import folders
from tutelage.server.feed import Feed
from tutelage.server.page_first import First
from tutelage.server.page_live import Column, Live


def live_of(folder: Path) -> Live:
    feed = Feed(folder, index=None)
    feed.poll()
    live = Live(feed, "demo/code")
    live.read()
    return live


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    act = (20, "anna", [{"do": "scale", "path": "optim.lr", "by": 0.5}], "too hot")
    return folders.lay(tmp_path / "runs", ticks=40, journal=folders.lines(act))


def held(folder: Path, **told: Any) -> Live:
    """The stage with its trainer at work, which wrote this."""
    wrote = json.loads((folder / "controls.json").read_text())
    (folder / "controls.json").write_text(json.dumps(wrote | told))
    for _ in folders.held(folder):
        return live_of(folder)
    raise AssertionError


def test_what_the_trainer_alerts_of_is_shown_and_whether_it_is_grave(folder: Path) -> None:
    alerts = [
        {"kind": "spike", "tick": 38, "text": "it leapt", "grave": True},
        {"kind": "acted", "tick": 39, "text": "scout did scale", "grave": False},
    ]
    assert held(folder).alerts() == []
    live = held(folder, alerts=alerts)
    assert live.alerts() == [("it leapt", True), ("scout did scale", False)] and live.state == "running"


def test_memory_is_a_series(folder: Path) -> None:
    series = held(folder).series
    assert series["memory"].points[-1] == [40, 1_200_000_040] and series["memory_peak"].points[-1][1] == 1_500_000_000


def test_a_trainer_that_ended_without_a_word_is_told(folder: Path) -> None:
    live = live_of(folder)
    assert (live.state, live.live) == ("stopped", False)
    assert [(said[:39], grave) for said, grave in live.alerts()] == [("the trainer ended at about tick 40 with", True)]
    (folder / "error.txt").write_text("Traceback …\nRuntimeError: boom\n")
    live = live_of(folder)
    assert live.state == "failed" and live.alerts() == [("RuntimeError: boom", True)]


def test_damaged_lines_are_left_out_and_told(folder: Path) -> None:
    for name in ("metrics.jsonl", "journal.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"kind": "tra\n')
    live = held(folder)
    journal, metrics = sorted(text for text, grave in live.alerts() if not grave)
    assert journal.startswith("journal.jsonl") and metrics.startswith("metrics.jsonl is damaged: 1 of its lines")
    assert live.last["tick"] == 40 and live.state == "running"


def test_a_folder_that_is_gone_has_no_buttons(folder: Path) -> None:
    live = held(folder)
    shutil.rmtree(folder)
    live.feed.poll()
    live.read()
    assert (live.state, live.live) == ("unreadable", False)
    assert live.alerts() == [("the folder of stage code is gone", True)]
    assert live.last["tick"] == 40, "what was read is still to be seen"


def test_a_description_that_is_damaged_hides_nothing_else(folder: Path) -> None:
    (folder / "stage.json").write_text("{")
    live = held(folder)
    assert live.description() == {} and live.last["tick"] == 40 and live.columns()


@pytest.mark.parametrize("now", [float("nan"), float("inf")])
def test_a_measure_that_is_no_number_is_called_that(now: float) -> None:
    column = Column("prose", now, float("nan"), own=True, known=False, alarm=False, named=False, curve=[2.0, now])
    words, look = First._verdict(column)
    assert words == "not a number" and "bad" in look

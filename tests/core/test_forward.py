"""Handing metrics on: each row once, in one run over restarts, and never at training's expense."""

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
from typing import ClassVar

import pytest

from tests.core.fabricate import eval_row, train_rows
from tutelage.base.errors import UserError
from tutelage.core import forward
from tutelage.core.record import dumps


class Memory:
    """A tracker that remembers; `broken` makes it fail."""

    runs: ClassVar[dict] = {}
    broken = False

    def __init__(self, folder, *, project, name, run, config):
        self.rows = Memory.runs.setdefault(run, [])

    def log(self, values, texts, tick, order):
        if Memory.broken:
            raise ConnectionError("no network")
        self.rows.append((tick, values, texts))

    def close(self):
        pass


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setitem(forward.TRACKERS, "wandb", Memory)
    Memory.runs, Memory.broken = {}, False
    return Memory


def follower(folder):
    return forward.Follower(folder, tracker="wandb", project="p", name="n", config={})


def add(folder, rows):
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write("".join(dumps(row) + "\n" for row in rows))


def test_a_resumed_stage_goes_on_in_the_same_run_and_no_row_goes_twice(tmp_path, memory):
    rows = train_rows(steps=6)
    add(tmp_path, [eval_row(0, {"prose": 8.0}), *rows[:4]])
    cut = (tmp_path / "metrics.jsonl").stat().st_size
    add(tmp_path, rows[4:])
    follower(tmp_path).close()
    os.truncate(tmp_path / "metrics.jsonl", cut)  # as a resume does, then the steps are done again at another pace
    again = [{**row, "seconds": 123.456} for row in rows[4:]]
    add(tmp_path, [*again, eval_row(6, {"prose": 2.0}, final=True, texts={"sample/a": "b"})])
    follower(tmp_path).close()
    ((_, sent),) = memory.runs.items()
    assert [tick for tick, *_ in sent] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert sent[-1] == (6, {"bits_per_byte/prose": 2.0}, {"sample/a": "b"})
    assert sent[1][1]["train/loss"] == rows[0]["loss"] and sent[1][1]["share/prose"] == 1.0


def test_a_line_half_written_waits(tmp_path, memory):
    add(tmp_path, train_rows(steps=1))
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"kind": "train"')
    reader = follower(tmp_path)
    assert reader.pump() == 1
    assert reader.pump() == 0


def test_what_is_no_number_is_not_sent(tmp_path, memory):
    add(tmp_path, [eval_row(0, {"prose": float("nan"), "code": 1.0})])
    follower(tmp_path).close()
    ((_, sent),) = memory.runs.items()
    assert sent == [(0, {"bits_per_byte/code": 1.0}, {})]


def test_a_tracker_that_fails_is_a_warning(tmp_path, memory):
    memory.broken, heard = True, []
    add(tmp_path, train_rows(steps=1))
    with forward.forwarding(tmp_path, ["wandb"], project="p", name="n", warn=heard.append):
        pass
    assert len(heard) == 1 and "no network" in heard[0] and "training goes on" in heard[0]


def test_a_library_that_is_absent_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install trackio"):
        forward.check(["trackio"])


def test_tensorboard_holds_one_run_over_a_restart(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train_rows(steps=4)
    for part in (rows[:2], rows[2:]):
        add(tmp_path, part)
        with forward.forwarding(tmp_path, ["tensorboard"], project="p", name="n", warn=pytest.fail):
            pass
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


# -- the real ones, offline; what a killed process and the next one wrote ------------------------------------------------

CHILD = """
import os, signal, sys, time
from pathlib import Path
from tutelage.core import forward
forward.EVERY = 0.2
folder, tracker, wait, end = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
with forward.forwarding(folder, [tracker], project="p", name="two", config={"length": 8}, warn=sys.exit):
    place, size = folder / f"forward-{tracker}.json", (folder / "metrics.jsonl").stat().st_size
    while f'"bytes":{size},' not in (place.read_text() if place.exists() else ""):
        time.sleep(0.1)
    time.sleep(wait)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_and_resumed(folder, tracker, **environment):
    """Steps 1 to 5 and a kill; a resume cuts two of them, does them again, and measures at the last of these."""
    rows = train_rows(steps=8)
    add(folder, [eval_row(0, {"prose": 8.0}), *rows[:3]])
    cut = (folder / "metrics.jsonl").stat().st_size
    add(folder, rows[3:5])
    after = [{**row, "seconds": 9.0} for row in rows[3:]]
    after.insert(2, eval_row(5, {"prose": 4.0}))  # the tick that was handed on last before the kill
    for end in ("kill", "finish"):
        if end == "finish":
            os.truncate(folder / "metrics.jsonl", cut)
            add(folder, [*after, eval_row(8, {"prose": 2.0}, final=True, texts={"sample/a": "b"})])
        command = [sys.executable, "-c", CHILD, str(folder), tracker, "3", end]
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr[-2000:]
    losses = [(row["tick"], row["loss"]) for row in rows]
    return losses, [(0, 8.0), (5, 4.0), (8, 2.0)]


def records_of(path):
    """The records of a `.wandb` file: LevelDB's log format after seven bytes, whatever was written before a kill."""
    from wandb.proto import wandb_internal_pb2

    data, at, held = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if left < 7 or not kind:
            at += left
            continue
        held, at = held + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def test_wandb_goes_on_in_the_same_run_after_a_kill_and_no_point_goes_twice(tmp_path):
    pytest.importorskip("wandb")
    losses, bits = killed_and_resumed(tmp_path, "wandb", WANDB_MODE="offline")
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1
    records = [record for path in files for record in records_of(path)]
    assert len({record.run.run_id for record in records if record.HasField("run")}) == 1
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert [(row["tick"], row["train/loss"]) for row in rows if "train/loss" in row] == losses
    assert [(row["tick"], row["bits_per_byte/prose"]) for row in rows if "bits_per_byte/prose" in row] == bits
    assert rows[-1]["sample/a"] == "b"


def test_trackio_goes_on_in_the_same_run_after_a_kill_and_no_point_goes_twice(tmp_path):
    pytest.importorskip("trackio")
    losses, bits = killed_and_resumed(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "home"))
    with sqlite3.connect(tmp_path / "home" / "p.db") as base:
        found = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({run for run, *_ in found}) == 1
    rows = [(step, json.loads(metrics)) for _, step, metrics in found]
    assert [(step, row["train/loss"]) for step, row in rows if "train/loss" in row] == losses
    assert [(step, row["bits_per_byte/prose"]) for step, row in rows if "bits_per_byte/prose" in row] == bits

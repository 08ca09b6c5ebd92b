"""What viewers get of a growing stage: every point once, spikes and NaN always, cuts told."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.core.fabricate import eval_row, train_rows, write_stage
from tutelage.core.record import Journal, Metrics, dumps
from tutelage.server import columns, table
from tutelage.server.columns import thin
from tutelage.server.feed import Feed
from tutelage.server.table import Table


def rows_of(first: int, last: int, **more: Any) -> list[dict[str, Any]]:
    return train_rows(steps=last, **more)[first - 1 :]


def append(folder: Path, rows: list[dict[str, Any]]) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(dumps(row) + "\n" for row in rows))


def begun(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> tuple[Path, Feed]:
    folder = write_stage(tmp_path / "runs/demo/base/1", rows, done=False, **more)
    feed = Feed(folder, index=tmp_path / "runs/.index/demo/base/1")
    feed.poll()
    return folder, feed


class Client:
    """A viewer that does what it is told, and complains of a number that comes twice or is left out."""

    def __init__(self) -> None:
        self.points: dict[int, tuple[int, Any]] = {}  # by number: tick, loss
        self.journal: list[dict[str, Any]] = []
        self.cuts: list[int] = []
        self.seq: int | None = None

    def catch_up(self, feed: Feed) -> None:
        if self.seq is None:
            text, self.seq = feed.snapshot(names=("loss",), width=5000)
            message = json.loads(text, parse_constant=pytest.fail)
            self._take(message["series"], after=0)
            self.journal = [event["entry"] for event in message["events"] if event["type"] == "journal"]
        while self.seq < feed.last:
            before = self.seq
            text, self.seq = feed.since(before, names=("loss",))
            for part in json.loads(text, parse_constant=pytest.fail)["parts"]:
                if part["type"] == "points":
                    self._take(part["series"], after=before)
                elif part["type"] == "journal":
                    self.journal.append(part["entry"])
                elif part["type"] == "cut" and part["of"] == "metrics":
                    self.cuts.append(part["tick"])
                    self.points = {seq: point for seq, point in self.points.items() if point[0] <= part["tick"]}

    def _take(self, series: dict[str, Any], *, after: int) -> None:
        points = series.get("loss", {"seq": [], "tick": [], "value": []})
        for seq, tick, value in zip(points["seq"], points["tick"], points["value"], strict=True):
            assert seq > after, "told twice"
            assert seq not in self.points, "told twice"
            self.points[seq] = (tick, value)

    @property
    def ticks(self) -> list[int]:
        return [self.points[seq][0] for seq in sorted(self.points)]


# -- points -----------------------------------------------------------------------------------------------------------


def test_a_nan_and_infinities_come_through_as_words_and_the_json_is_valid(tmp_path: Path) -> None:
    odd = {3: math.nan, 5: math.inf, 7: -math.inf}
    _, feed = begun(tmp_path, train_rows(loss=lambda i: odd.get(i, 1.0)))
    assert feed.points("loss")["value"] == [1.0, 1.0, "nan", 1.0, "inf", 1.0, "-inf", 1.0, 1.0, 1.0]
    message = json.loads(feed.snapshot()[0], parse_constant=pytest.fail)
    assert message["series"]["loss"]["value"][2] == "nan"


def test_downsampling_keeps_every_spike_and_every_point_that_is_no_number() -> None:
    value = np.sin(np.arange(100_000) / 5000)
    value[[777, 50_001]] = [9.0, -9.0]
    value[[123, 124, 60_000]] = [math.nan, math.inf, math.nan]
    value[70_000:80_000] = math.nan
    kept = thin(np.arange(100_000), value, width=200)
    assert len(kept) < 450
    assert {777, 50_001, 123, 124, 60_000, 70_000, 79_999, 0, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()


def test_where_every_second_point_is_nan_the_answer_stays_short_and_still_says_so() -> None:
    value = np.where(np.arange(100_000) % 2, 1.0, math.nan)
    kept = thin(np.arange(100_000), value, width=200)
    assert len(kept) < 1000
    assert np.isnan(value[kept]).sum() >= 200


def test_overviews_of_full_chunks_show_the_spike_that_the_rows_hold(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(columns, "CHUNK", 2048)
    monkeypatch.setattr(table, "CHUNK", 2048)
    monkeypatch.setattr(table, "FULL", 1000)
    rows = train_rows(steps=9000, loss=lambda i: {3333: 50.0, 4444: math.nan}.get(i, 1.0 + i % 7))
    _, feed = begun(tmp_path, rows)
    assert len(feed.table.chunks) >= 4
    points = feed.points("loss", width=50)
    assert len(points["tick"]) <= 110
    found = dict(zip(points["tick"], points["value"], strict=True))
    assert found[3333] == 50.0 and found[4444] == "nan" and min(v for v in found.values() if v != "nan") == 1.0
    inside = feed.points("loss", start=3330, to=3340)
    assert inside["tick"] == list(range(3330, 3341)) and inside["value"][3] == 50.0
    assert feed.points("loss", start=8990, to=20_000)["tick"] == list(range(8990, 9001))


def test_series_that_come_later_or_seldom_have_their_own_points(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = rows_of(1, 4)
    rows += [
        eval_row(4, {"prose": 2.5}),
        *rows_of(5, 6, weights={"prose": 0.5, "code": 0.5}),
        eval_row(6, {"prose": math.nan}),
    ]
    _, feed = begun(tmp_path, rows)
    assert feed.points("weights/code")["tick"] == [5, 6]
    assert feed.points("eval/bits_per_byte/prose")["value"] == [2.5, "nan"]
    assert set(feed.names(["eval/", "loss"])) == {"loss", "eval/bits_per_byte/prose", "eval/seconds"}


# -- every point once -------------------------------------------------------------------------------------------------


def test_a_client_that_comes_back_gets_what_it_missed_and_nothing_twice(tmp_path: Path) -> None:
    folder, feed = begun(tmp_path, rows_of(1, 10))
    client = Client()
    client.catch_up(feed)
    left_at = client.seq
    append(folder, rows_of(11, 20))
    Journal(folder / "journal.jsonl").append(tick=20, by="anna", do=[{"do": "note", "text": "x"}])
    feed.poll()
    append(folder, rows_of(21, 30))
    feed.poll()
    assert left_at is not None and feed.knows(left_at)
    client.catch_up(feed)
    assert client.ticks == list(range(1, 31))
    assert [line["by"] for line in client.journal] == ["anna"]
    base = feed.numbers.base
    assert sorted(client.points) == [*range(base, base + 10), *range(base + 11, base + 31)]  # between them, the note
    again = json.loads(feed.since(client.seq or 0)[0])
    assert again["parts"] == []


def test_a_line_that_is_half_written_is_waited_for(tmp_path: Path) -> None:
    folder, feed = begun(tmp_path, rows_of(1, 3))
    line = dumps(rows_of(4, 4)[0])
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(line[:40])
        file.flush()
        feed.poll()
        assert feed.points("loss")["tick"] == [1, 2, 3]
        file.write(line[40:] + "\n")
    feed.poll()
    assert feed.points("loss")["tick"] == [1, 2, 3, 4]


def test_a_resumed_run_cuts_its_metrics_and_clients_are_told_to_which_tick(tmp_path: Path) -> None:
    folder, feed = begun(tmp_path, rows_of(1, 10, seconds=10.0))
    client, late = Client(), Client()
    client.catch_up(feed)
    whole = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(whole[:6]))
    append(folder, rows_of(7, 12, seconds=11.0))  # longer than before, and other times
    feed.poll()
    client.catch_up(feed)
    assert client.cuts == [6]
    assert client.ticks == list(range(1, 13))
    assert feed.points("seconds")["value"][6] == pytest.approx(11.0 * 7 / 12)
    late.catch_up(feed)
    assert late.ticks == client.ticks


def test_a_cut_into_full_chunks_is_found_also_where_the_index_was_written_before(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(table, "CHUNK", 2048)
    folder, feed = begun(tmp_path, rows_of(1, 5000, seconds=10.0))
    client = Client()
    client.catch_up(feed)
    assert len(feed.table.chunks) == 2
    whole = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(whole[:3000]))
    feed.poll()
    assert len(feed.table.chunks) == 1 and feed.table.rows == 3000
    append(folder, rows_of(3001, 5100, seconds=12.0))
    other = Table(folder / "metrics.jsonl", index=feed.index)  # the second file of the index is of the rows before
    assert other.rows == 2048
    feed.poll()
    client.catch_up(feed)
    assert client.cuts == [3000] and client.ticks == list(range(1, 5101))


def test_rows_that_a_resumed_run_writes_again_unchanged_are_no_news(tmp_path: Path) -> None:
    folder, feed = begun(tmp_path, rows_of(1, 10))
    before = feed.last
    path = folder / "metrics.jsonl"
    text = path.read_bytes()
    path.write_bytes(text + dumps(rows_of(11, 11)[0]).encode() + b"\n")
    path.write_bytes(text)
    feed.poll()
    assert feed.last == before


def test_a_cut_while_a_trainer_writes_ends_in_the_same_points(tmp_path: Path) -> None:
    """Metrics as the trainer writes them, cut twice, a viewer looking all the while."""
    folder, feed = begun(tmp_path, [])
    client, done = Client(), threading.Event()

    def train() -> None:
        keep = 0
        for seconds, last in ((1.0, 400), (2.0, 600), (3.0, 800)):
            metrics = Metrics(folder / "metrics.jsonl", keep_bytes=keep)
            for row in rows_of((0 if not keep else 300) + 1, last, seconds=seconds):
                metrics.add(row)
                if row["tick"] == 300 and not keep:
                    keep = metrics.flush()
                if row["tick"] % 50 == 0:
                    time.sleep(0.002)
            metrics.close()
        done.set()

    thread = threading.Thread(target=train)
    thread.start()
    while not done.is_set():
        feed.poll()
        client.catch_up(feed)
    thread.join()
    feed.poll()
    client.catch_up(feed)
    assert client.ticks == list(range(1, 801))
    stayed = [*rows_of(1, 400, seconds=1.0)[:300], *rows_of(301, 800, seconds=3.0)]
    assert feed.points("seconds", width=None)["value"] == [row["seconds"] for row in stayed]


def test_a_client_of_an_earlier_feed_is_known_to_be_one(tmp_path: Path) -> None:
    folder, feed = begun(tmp_path, rows_of(1, 10))
    old = feed.last
    feed = Feed(folder, index=None)
    feed.poll()
    assert not feed.knows(old) and not feed.knows(0) and not feed.knows(feed.last + 1)
    assert feed.knows(feed.last)


# -- the index --------------------------------------------------------------------------------------------------------


def test_the_index_gives_the_same_points_and_may_be_deleted_or_damaged(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(table, "CHUNK", 2048)
    rows = train_rows(steps=5000, loss=lambda i: math.nan if i == 99 else float(i % 13))
    rows[3000:3000] = [eval_row(3000, {"prose": 2.0})]
    folder, feed = begun(tmp_path, rows)
    index = feed.index
    assert index is not None
    kept = sorted(index.iterdir())
    assert len(kept) == 2
    from_index, without = Table(folder / "metrics.jsonl", index=index), Table(folder / "metrics.jsonl", index=None)
    assert from_index.rows == 4096 and without.rows == 0
    kept[1].unlink()
    kept[1].write_bytes(b"no safetensors")
    damaged = Table(folder / "metrics.jsonl", index=index)
    assert damaged.rows == 2048
    for made in (from_index, without, damaged):
        list(made.read())
        for name in feed.table.names():
            mine, theirs = (t.points(name, start=0, stop=t.rows, width=None) for t in (feed.table, made))
            assert mine.row.tolist() == theirs.row.tolist()
            np.testing.assert_array_equal(mine.value, theirs.value)
            np.testing.assert_array_equal(mine.axes, theirs.axes)


def test_an_index_of_another_file_of_that_name_is_not_believed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(table, "CHUNK", 2048)
    folder, feed = begun(tmp_path, rows_of(1, 3000))
    (folder / "metrics.jsonl").write_text("".join(dumps(row) + "\n" for row in rows_of(1, 3000, loss=lambda i: 7.0)))
    fresh = Feed(folder, index=feed.index)
    fresh.poll()
    assert set(fresh.points("loss")["value"]) == {7.0}


# -- what is not as it should be --------------------------------------------------------------------------------------


def test_lines_that_are_no_json_are_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder, feed = begun(tmp_path, rows_of(1, 3))
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "tick": \n\xff\xfe\n[1]\nnull\n{}\n')
    append(folder, rows_of(4, 5, loss=lambda i: None))
    append(folder, [{**rows_of(6, 6)[0], "loss": "words", "tick": "six", "weights": None}, *rows_of(7, 7)])
    feed.poll()
    assert feed.fault == "" and feed.table.broken == 4
    assert feed.points("loss")["tick"] == [1, 2, 3, 7]
    assert feed.points("lr")["tick"] == [1, 2, 3, 4, 5, 5, 7]


def test_a_folder_that_vanishes_leaves_one_line_and_no_traceback(tmp_path: Path) -> None:
    folder, feed = begun(tmp_path, rows_of(1, 3))
    folder.rename(tmp_path / "elsewhere")
    feed.poll()
    assert "gone" in feed.fault
    (tmp_path / "elsewhere").rename(folder)
    feed.poll()
    assert feed.fault == "" and feed.points("loss")["tick"] == [1, 2, 3]


def test_a_metrics_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    folder, _ = begun(tmp_path, rows_of(1, 3))
    (tmp_path / "secret").write_text('{"kind":"train","tick":1,"loss":42}\n')
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(tmp_path / "secret")
    feed = Feed(folder, index=None)
    feed.poll()
    assert feed.fault and feed.names() == []

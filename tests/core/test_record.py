"""Lines of JSON: what is not finite has a name, everything else is as json has it."""

from __future__ import annotations

import json
import math

from tutelage.core import record
from tutelage.core.record import dumps


def test_numbers_that_are_not_finite_become_their_names_and_the_rest_of_the_line_stays() -> None:
    row = {"loss": math.nan, "by": {"a": [math.inf, 1e-5, 3], 2: -math.inf}, "text": "ä"}
    assert dumps(row) == '{"loss":"nan","by":{"a":["inf",1e-05,3],"2":"-inf"},"text":"ä"}'


def test_a_line_with_finite_numbers_only_reads_back_as_it_was() -> None:
    row = {"tick": 3, "loss": 0.1 + 0.2, "cursors": {"a": [7, [[1, 2]]]}, "none": None, "yes": True}
    assert json.loads(dumps(row)) == row
    assert dumps({1: (2, 3)}) == '{"1":[2,3]}'


def test_a_key_that_json_does_not_know_is_written_as_its_text() -> None:
    assert dumps({("a", 1): 2}) == "{\"('a', 1)\":2}"


def test_the_newest_row_of_a_kind_is_found_without_reading_the_others(tmp_path, monkeypatch):
    path, parsed = tmp_path / "metrics.jsonl", []
    rows = [{"kind": "train" if i % 10 else "eval", "tick": i} for i in range(95)]
    path.write_text("".join(record.dumps(row) + "\n" for row in rows) + '{"kind":"eval","tick":')
    assert list(record.each_line(path)) == rows and record.newest_line(tmp_path / "none", kind="eval") == {}
    real = record.json.loads
    monkeypatch.setattr(record.json, "loads", lambda line: parsed.append(line) or real(line))
    assert record.newest_line(path, kind="eval")["tick"] == 90 and len(parsed) == 1
    assert [row["tick"] for row in record.each_line(path, kind="eval")] == list(range(0, 95, 10)) and len(parsed) == 11
    path.write_text('{"tick":1,"kind":"eval"}\n{"tick":2,"kind":"train"}\n')  # kinds that do not stand first
    assert record.newest_line(path, kind="eval")["tick"] == 1

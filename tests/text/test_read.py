import csv
import gzip
import json
import os
import re
from pathlib import Path

import datasets
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.conftest import data
from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.modalities.text import imports, read
from tutelage.modalities.text.fields import Content, Empty, content_of, shape_of
from tutelage.modalities.text.read import Bad, Record

LINES = [
    b'{"text": "one"}',
    b"{not json}",
    b"",
    b'["a list"]',
    b'{"text": "\xff\xfe"}',
    b'{"text": "six"}',
    b'{"text": "' + b"x" * 300 + b'"}',
    b'{"text": "last, without a line break"}',
]


def records_of(path, size=read.BLOCK):
    files, _ = read.find(str(path))
    return [record for block in read.blocks(files, size=size) for record in read.records(block)]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("size", [1, 40, 10_000])
def test_malformed_lines_are_located_however_the_file_is_cut_or_packed(tmp_path, packed, size):
    raw = b"\n".join(LINES)
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packed](raw))
    found = records_of(path, size)
    assert [r.line for r in found if isinstance(r, Bad)] == [2, 4, 5]
    assert [r.line for r in found if isinstance(r, Record)] == [1, 6, 7, 8]
    bad = [str(r) for r in found if isinstance(r, Bad)]
    assert bad[0].startswith(f"{path} line 2: not JSON")
    assert bad[1].endswith("line 4: holds a list where a record {…} is expected")
    assert "line 5: not UTF-8 (byte 0xff at column 11)" in bad[2]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(LINES), max_size=30), st.integers(1, 500))
def test_blocks_hold_every_byte_once_whatever_their_size(tmp_path_factory, lines, size):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    whole = records_of(path, 1 << 20)
    assert records_of(path, size) == whole
    parts = [part for block in read.blocks(read.find(str(path))[0], size=size) for part in block.parts]
    edges = [(part.start, part.stop) for part in parts]
    assert [a for a, _ in edges[1:]] == [b for _, b in edges[:-1]]


def test_an_archive_that_breaks_off_gives_what_came_before_and_says_where(tmp_path):
    raw = b"".join(orjson.dumps({"text": f"line {i} {i * 7919 % 1000003}"}) + b"\n" for i in range(5000))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(raw)[:-4000])
    found = records_of(path)
    assert isinstance(found[-1], Bad) and "broken from here on" in found[-1].why
    assert found[-1].line == len(found)
    assert [r.line for r in found] == list(range(1, len(found) + 1))


def test_csv_rows_keep_the_line_they_begin_on(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"one\ntwo",1\nthree,2\nfour\nfive,3\n')
    found = records_of(path)
    assert [(r.line, type(r).__name__) for r in found] == [(2, "Record"), (4, "Record"), (5, "Bad"), (6, "Record")]
    assert found[2].why == "has 1 columns, the header has 2"
    assert found[0].data == {"text": "one\ntwo", "n": "1"}


def test_tables_arrays_and_data_sets_give_the_same_records(tmp_path):
    rows = [{"text": f"text {i}", "n": i} for i in range(1200)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    (tmp_path / "b.json").write_bytes(orjson.dumps(rows))
    (tmp_path / "c.json").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    with open(tmp_path / "d.tsv", "w", newline="") as stream:
        table = csv.DictWriter(stream, ["text", "n"], delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "e")
    for name in "a.parquet", "b.json", "c.json":
        assert [r.data for r in records_of(tmp_path / name, 500)] == rows
    assert [r.data["text"] for r in records_of(tmp_path / "d.tsv")] == [row["text"] for row in rows]
    for spec in SourceSpec(hub=str(tmp_path / "e")), SourceSpec(path=str(tmp_path / "e")):
        files, _ = imports.files_of(spec, cache=tmp_path / "cache")
        assert [r.data for block in read.blocks(files) for r in read.records(block)] == rows


class Counting:
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        yield from ({"text": f"number {i}"} for i in range(self.count))
        yield "no record"
        yield {"text": "half a pair \ud800"}


def test_a_generator_is_imported_and_its_malformed_records_are_counted(tmp_path):
    spec = SourceSpec(use=f"{__name__}:Counting", args={"count": 3})
    files, _ = imports.files_of(spec, cache=tmp_path)
    found = [r for block in read.blocks(files) for r in read.records(block)]
    assert [r.data["text"] for r in found[:3]] == ["number 0", "number 1", "number 2"]
    assert str(found[3]).endswith(":Counting record 4: is a string where a record (dict) is expected")
    assert found[4].line == 5 and "JSON" in found[4].why
    other = SourceSpec(use=f"{__name__}:Counting", args={"count": 4})
    assert imports.content_id(spec) == imports.content_id(spec) != imports.content_id(other)


def test_a_generator_that_is_not_there_is_named_with_the_nearest_one():
    with pytest.raises(UserError, match="has no 'Countin'; did you mean 'Counting'"):
        imports.content_id(SourceSpec(use=f"{__name__}:Countin"))
    with pytest.raises(UserError, match="does not take these args"):
        imports.content_id(SourceSpec(use=f"{__name__}:Counting", args={"cuont": 1}))


def test_a_folder_is_read_recursively_and_says_what_it_passed_over(tmp_path):
    for name in "b.txt", "a/c.md", "a/d.py", ".git/e.txt", "f.png", "__pycache__/g.py", "h.txt.gz":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(b"packed") if name.endswith("gz") else b"some text")
    files, notes = read.find(str(tmp_path))
    assert [str(f.path.relative_to(tmp_path)) for f in files] == ["a/c.md", "a/d.py", "b.txt", "h.txt.gz"]
    assert notes == [f"{tmp_path}: 1 files of other kinds passed over (first: {tmp_path / 'f.png'})"]
    assert [r.data["text"] for r in records_of(tmp_path)] == ["some text"] * 3 + ["packed"]
    assert len(read.find([str(tmp_path), str(tmp_path / "*.txt")])[0]) == 4


def test_content_is_known_by_what_it_is_and_not_by_its_name(tmp_path):
    for folder in "one", "two":
        (tmp_path / folder).mkdir()
    (tmp_path / "one/a.txt").write_text("text")
    (tmp_path / "two/other.txt").write_text("text")
    one, two = (imports.content_id(SourceSpec(path=str(tmp_path / folder))) for folder in ("one", "two"))
    assert one == two
    (tmp_path / "two/other.txt").write_text("changed")
    assert imports.content_id(SourceSpec(path=str(tmp_path / "two"))) != one


@pytest.mark.parametrize(
    ("record", "kind", "fields"),
    [
        ({"text": "a", "content": "b"}, "text", ("text",)),
        ({"content": "a", "id": "b"}, "text", ("content",)),
        ({"messages": [{"role": "user", "content": "a"}], "id": "b"}, "chat", ("messages",)),
        ({"conversations": [{"from": "human", "value": "a"}]}, "chat", ("conversations",)),
        ({"prompt": "a", "completion": "b"}, "pair", ("prompt", "completion")),
        ({"prompt": "a", "response": "b"}, "pair", ("prompt", "response")),
        ({"instruction": "a", "input": "c", "output": "b"}, "pair", ("instruction", "input", "output")),
        ({"question": "a", "answer": "b"}, "pair", ("question", "answer")),
        ({"id": "1", "story": "a long one"}, "text", ("story",)),
    ],
)
def test_fields_are_found_by_their_names(record, kind, fields):
    shape = shape_of("mine", SourceSpec(path="x"), [Record("x", 1, record)])
    assert (shape.kind, shape.fields) == (kind, fields)
    assert bool(shape.note) == (fields == ("story",))


def test_a_field_that_is_nowhere_is_named_with_the_nearest_one():
    samples = [Record("a.jsonl", 1, {"text": "a", "title": "b"})]
    with pytest.raises(UserError, match=r"data.mine: no record of a.jsonl has a field 'txt'; did you mean 'text'"):
        shape_of("mine", SourceSpec(path="x", field="txt"), samples)
    with pytest.raises(UserError, match="template needs messages"):
        shape_of("mine", SourceSpec(path="x", template=True), samples)


def test_records_that_do_not_fit_say_why():
    shape = shape_of("mine", SourceSpec(path="x", field="text"), [Record("x", 1, {"text": "a"})])
    assert content_of(Record("x", 7, {"txet": "a"}), shape) == Bad("x", 7, "has no field 'text'; did you mean 'txet'?")
    assert content_of(Record("x", 7, {"text": 3}), shape) == Bad("x", 7, "field 'text' holds a number, not a string")
    assert content_of(Record("x", 7, {"text": " \n"}), shape) == Empty()
    assert content_of(Record("x", 7, {"text": None}), shape) == Empty()
    assert "surrogate" in content_of(Record("x", 7, {"text": "\ud800"}), shape).why
    chat = shape_of("mine", SourceSpec(path="x"), [Record("x", 1, {"messages": [{"role": "user", "content": "a"}]})])
    assert "message 2" in content_of(Record("x", 7, {"messages": [{"role": "user", "content": "a"}, {}]}), chat).why
    assert "assistant" in content_of(Record("x", 7, {"messages": [{"role": "user", "content": "a"}]}), chat).why


def test_the_same_content_has_the_same_key_whatever_stands_beside_it():
    one, two = Content("text", text="same", rest={"id": 1}), Content("text", text="same")
    assert one.key() == two.key() != Content("text", text="other").key()


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("a.bin", bytes(range(256)) * 4, "is a binary file"),
        ("a.txt", "naïve".encode("latin-1"), r"line 1: not UTF-8 \(byte 0xef at offset 2\)"),
        ("a.txt", "text".encode("utf-16"), "UTF-16"),
        ("a.jsonl", b'{"text": "x"}\n'.decode().encode("utf-16"), "UTF-16; convert"),
        ("a.jsonl", b'[\n{"text": "x"}\n]\n', "name such a file .json"),
        ("a.parquet", b"no table", "not a readable parquet file"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', "line 2: not JSON"),
        ("a.txt.gz", b"no archive", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, raw, says):
    (tmp_path / name).write_bytes(raw)
    found, *_ = records_of(tmp_path / name)
    assert isinstance(found, Bad)
    assert re.search(says, str(found)), str(found)


def test_paths_that_lead_nowhere_are_one_clear_line(tmp_path):
    (tmp_path / "books.txt").write_text("text")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean '.*books.txt'"):
        read.find(str(tmp_path / "boks.txt"))
    with pytest.raises(UserError, match="matches no file"):
        read.find(str(tmp_path / "*.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no text or record files"):
        read.find(str(tmp_path / "empty"))


@pytest.mark.parametrize("kind", ["device", "link", "pipe", "proc", "linked proc", "folder", "glob"])
def test_what_may_never_end_is_no_source(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "kmsg.jsonl").symlink_to("/proc/kmsg")
    named = {"device": "/dev/zero", "link": "zero.jsonl", "pipe": "pipe.jsonl", "proc": "/proc/self/maps"}
    named |= {"linked proc": "kmsg.jsonl", "folder": ".", "glob": "[pz]*.jsonl"}
    (tmp_path / "kmsg.jsonl").unlink() if kind == "folder" else None
    with pytest.raises(UserError, match=r"may never end|no text or record files|matches no file"):
        read.find(str(tmp_path / named[kind]))


def test_real_files_are_read_as_they_are():
    lines = data("gsm8k", "train.jsonl")
    assert [r.data for r in records_of(lines)] == [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(records_of(data("humaneval", "HumanEval.jsonl.gz"))) == 164


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("roneneldan/TinyStories", "; a data set of the hub is written hub: roneneldan/TinyStories"),
        ("./roneneldan/TinyStories", ""),
        ("stories.jsonl", ""),
        ("{here}/stories", ""),
    ],
)
def test_a_hub_name_where_a_path_belongs_is_one_clear_line(path: str, hint: str, tmp_path: Path) -> None:
    path = path.replace("{here}", str(tmp_path))
    with pytest.raises(UserError) as caught:
        read.find(path)
    assert str(caught.value) == f"{path}: no such file or folder{hint}"


def test_a_hub_data_set_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing: `datasets` cannot load it") as caught:
        imports.content_id(SourceSpec(hub="nobody/nothing"))
    assert "\n" not in str(caught.value)

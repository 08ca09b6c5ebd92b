"""Find a source's files and read records from them, a few megabytes at a time.

Files become `Block`s of about `BLOCK` bytes whose borders depend on the content alone, so that blocks can be read
in any process, in any number of them, and again after a cut. Every record keeps its file and line; a malformed one
comes out as a `Bad` that says where and why.
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import zstandard

from tutelage.base.errors import UserError, did_you_mean
from tutelage.core import hashes
from tutelage.modalities.text.tables import BROKEN, csv_rows, kind_of, open_packed, parquet_rows, short

BLOCK = 8 << 20  # bytes of text in a unit of work
RECORDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# Only a folder is filtered by these endings; a file or glob that the user named is read whatever it is called.
DOCUMENTS = frozenset(
    f".{ending}"
    for ending in """
    txt text md markdown rst tex org adoc html htm xml srt vtt log py pyi ipynb js mjs ts tsx jsx c h cc cpp cxx hh hpp
    cu java kt scala go rs rb php pl lua r jl m swift cs fs hs ml ex exs erl clj lisp scm el sh bash zsh ps1 sql css
    scss yaml yml toml ini cfg cmake proto v sv vhd f90 asm s lean coq agda dart zig nim vue svelte""".split()  # noqa: SIM905
)
ENDINGS = {".gz": "gz", ".zst": "zst"}


class Bad(NamedTuple):
    """A malformed record: where it is and what is wrong with it; line 0 means the whole file."""

    file: str
    line: int
    why: str
    unit: str = "line"  # what `line` counts: records in a parquet file, a JSON array and whatever is imported

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.line}: {self.why}" if self.line else f"{self.file}: {self.why}"


class Record(NamedTuple):
    """One record; `whole` marks a file that is itself the document, under the key `text`."""

    file: str
    line: int
    data: dict[str, Any]
    whole: bool = False
    unit: str = "line"


class File(NamedTuple):
    """A file of a source. `label` is its name in reports: for what was imported, the name of its origin."""

    path: Path
    label: str
    kind: str  # document, jsonl, json, csv, parquet or spool (imported records, written down as lines)
    zip: str  # "", gz or zst
    size: int  # bytes on disk


class Part(NamedTuple):
    """A stretch of one file: a byte range to read, or content where a range would not do."""

    file: str
    kind: str  # document, lines, rows or bad
    line: int  # number of the first line or row, from 1
    path: str = ""
    zip: str = ""
    start: int = 0
    stop: int = 0
    unit: str = "line"
    data: Any = None  # bytes for lines, [(line, dict or what is wrong)] for rows, what is wrong for bad


class Block(NamedTuple):
    """A unit of work: some parts, and how many bytes on disk they account for."""

    parts: tuple[Part, ...]
    size: int


def find(paths: str | list[str]) -> tuple[list[File], list[str]]:
    """The files behind a path, folder, glob or list of them, in order of name, and notes on what was passed over.

    Raises `UserError` when one of them does not exist, matches nothing or holds no file that can be read.
    """
    files: list[File] = []
    notes: list[str] = []
    for given in [paths] if isinstance(paths, str) else paths:
        place = Path(given).expanduser()
        if Path(os.path.realpath(place)).parts[1:2] in (("proc",), ("sys",)):
            raise UserError(f"{given}: files that the system makes up may never end; copy what you want to learn from")
        if place.is_dir():
            found, passed = _folder(place)
            if not found:
                raise UserError(f"{given}: the folder holds no text or record files; name them with a glob instead")
            if passed:
                notes.append(f"{given}: {len(passed)} files of other kinds passed over (first: {passed[0]})")
        elif place.is_file():
            found = [place]
        elif place.exists():
            raise UserError(f"{given}: a device, pipe or socket, which may never end; write what it gives to a file")
        elif glob.has_magic(given):
            found = [Path(p) for p in sorted(glob.glob(str(place), recursive=True)) if Path(p).is_file()]
            if not found:
                raise UserError(f"{given}: matches no file; check the pattern and the folder the command runs in")
        else:
            siblings = [str(p) for p in place.parent.iterdir()] if place.parent.is_dir() else []
            hint = did_you_mean(str(place), siblings)
            if not hint and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given) and not place.parent.exists():
                hint = f"; a data set of the hub is written hub: {given}"
            raise UserError(f"{given}: no such file or folder{hint}")
        files += [_file(path) for path in found]
    unique = list({os.path.realpath(file.path): file for file in files}.values())
    if len(unique) < len(files):
        notes.append(f"{len(files) - len(unique)} files named twice are read once")
    return unique, notes


def _folder(place: Path) -> tuple[list[Path], list[str]]:
    found, passed = [], []
    for here, folders, names in os.walk(place, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        for name in sorted(names):
            if not name.startswith("."):
                ending = Path(name[: -len(Path(name).suffix)] if Path(name).suffix in ENDINGS else name).suffix.lower()
                known = ending in DOCUMENTS or ending in RECORDS
                whole = known and Path(here, name).is_file()  # no pipe, and no link to what may never end
                (found if whole else passed).append(Path(here, name))
    return sorted(found), sorted(str(p) for p in passed)


def _file(path: Path) -> File:
    packed = ENDINGS.get(path.suffix.lower(), "")
    name = path.with_suffix("") if packed else path
    kind = RECORDS.get(name.suffix.lower(), "document")
    try:
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return File(path, str(path), kind, packed, size)


def digest(file: File) -> str:
    """Hash of a file's bytes; not read again, also in later runs, as long as its size, times and inode stay."""
    try:
        return hashes.digest(file.path)
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror})") from None


def blocks(files: Iterable[File], *, size: int = BLOCK) -> Iterator[Block]:
    """The files' content as blocks of about `size` bytes, in order. Borders depend on content only."""
    held: list[Part] = []
    total = disk = 0
    for file in files:
        for part, text, read in _parts(file, size):
            held.append(part)
            total, disk = total + text, disk + read
            if total >= size:
                yield Block(tuple(held), disk)
                held, total, disk = [], 0, 0
    if held:
        yield Block(tuple(held), disk)


def records(block: Block) -> Iterator[Record | Bad]:
    """The records of a block, in order; blank lines are none."""
    for part in block.parts:
        if part.kind == "document":
            yield _document(part)
        elif part.kind == "lines":
            yield from _lines(part)
        elif part.kind == "rows":
            for line, row in part.data:
                bad = isinstance(row, str)
                yield Bad(part.file, line, row, part.unit) if bad else Record(part.file, line, row, unit=part.unit)
        else:
            yield Bad(part.file, part.line, part.data)


def peek(files: Iterable[File], count: int = 100) -> list[Record]:
    """The first readable records of the files that hold records rather than being documents."""
    kinds = (record for block in blocks(f for f in files if f.kind != "document") for record in records(block))
    return list(islice((record for record in kinds if isinstance(record, Record)), count))


def _document(part: Part) -> Record | Bad:
    try:
        with open_packed(part.path, part.zip) as stream:
            raw = stream.read()
    except BROKEN as error:
        return Bad(part.file, 0, f"cannot be read ({short(error)})")
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return Bad(part.file, 0, "is UTF-16; convert it to UTF-8")
        if b"\0" in raw[:8192]:
            return Bad(part.file, 0, "is a binary file, not text")
        line = raw.count(b"\n", 0, error.start) + 1
        return Bad(part.file, line, f"not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start})")
    if "\0" in text:
        return Bad(part.file, 0, "is a binary file, not text")
    return Record(part.file, 1, {"text": text}, whole=True)


def _lines(part: Part) -> Iterator[Record | Bad]:
    raw = part.data
    if raw is None:
        with open(part.path, "rb") as stream:
            stream.seek(part.start)
            raw = stream.read(part.stop - part.start)
    if part.line == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(raw.split(b"\n"), part.line):
        if line and not line.isspace():
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                yield Bad(part.file, number, _not_json(line, error), part.unit)
                continue
            if not isinstance(row, dict):
                why = f"holds {kind_of(row)} where a record {{…}} is expected"
                yield Bad(part.file, number, why, part.unit)
            elif "__bad__" in row:  # an imported record that could not be written down
                yield Bad(part.file, number, str(row["__bad__"]), part.unit)
            else:
                yield Record(part.file, number, row, unit=part.unit)


def _not_json(line: bytes, error: Exception) -> str:
    if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "is UTF-16; convert the file to UTF-8"
    if line.strip() == b"[":
        return "begins an array that goes on over lines; name such a file .json"
    if b"\0" in line:
        return "binary data, not JSON"
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return f"not UTF-8 (byte 0x{line[wrong.start]:02x} at column {wrong.start + 1})"
    return f"not JSON ({short(error)})"


def _parts(file: File, size: int) -> Iterator[tuple[Part, int, int]]:
    """Parts of a file with their weight in bytes of text and on disk."""
    if file.kind == "document":
        yield Part(file.label, "document", 1, str(file.path), file.zip), file.size, file.size
    elif file.kind in ("jsonl", "spool"):
        yield from _packed_lines(file, size) if file.zip else _plain_lines(file, size)
    elif file.kind == "json":
        yield from _json(file, size)
    else:
        csv = file.kind == "csv"
        rows = csv_rows(file.path, file.zip) if csv else parquet_rows(file.path, file.zip, file.size)
        yield from _rows(file, rows, size, unit="line" if csv else "record")


def _plain_lines(file: File, size: int) -> Iterator[tuple[Part, int, int]]:
    start, line = 0, 1
    with open(file.path, "rb") as stream:
        while start < file.size:
            stream.seek(start)
            raw = stream.read(size)
            raw += stream.readline() if raw[-1:] != b"\n" else b""
            stop = start + len(raw)
            unit = "record" if file.kind == "spool" else "line"
            yield Part(file.label, "lines", line, str(file.path), "", start, stop, unit), len(raw), len(raw)
            start, line = stop, line + raw.count(b"\n")


def _packed_lines(file: File, size: int) -> Iterator[tuple[Part, int, int]]:
    line, seen = 1, 0
    with open(file.path, "rb") as under:
        whole = gzip.GzipFile(fileobj=under) if file.zip == "gz" else zstandard.ZstdDecompressor().stream_reader(under)
        stream = io.BufferedReader(whole, 1 << 20)
        while True:
            raw, wrong = b"", ""
            try:
                while len(raw) < size and (more := stream.read1(1 << 20)):
                    raw += more
                raw += stream.readline() if raw and raw[-1:] != b"\n" else b""
            except BROKEN as error:
                wrong = f"the archive is broken from here on ({short(error)})"
            if wrong:  # the last line is cut short by the break: it is part of what is reported, not a record
                raw = raw[: raw.rfind(b"\n") + 1]
            read, seen = under.tell() - seen, under.tell()
            if raw:
                yield Part(file.label, "lines", line, data=raw), len(raw), read
            line += raw.count(b"\n")
            if wrong:
                yield Part(file.label, "bad", line, data=wrong), 0, 0
            if wrong or not raw:
                return


def _json(file: File, size: int) -> Iterator[tuple[Part, int, int]]:
    """A JSON file: an array of records, one record, or (as many are) lines of records."""
    try:
        with open_packed(file.path, file.zip) as stream:
            raw = stream.read()
    except BROKEN as error:
        yield Part(file.label, "bad", 0, data=f"cannot be read ({short(error)})"), 0, file.size
        return
    try:
        value = orjson.loads(raw) if raw.strip() else []
    except orjson.JSONDecodeError as error:
        if raw.lstrip()[:1] != b"{" or b"\n" not in raw.strip():
            line = raw.count(b"\n", 0, error.pos) + 1
            yield Part(file.label, "bad", line, data=_not_json(raw, error)), 0, file.size
            return
        yield from (
            _packed_lines(file._replace(kind="jsonl"), size)
            if file.zip
            else _plain_lines(file._replace(kind="jsonl"), size)
        )
        return
    items = value if isinstance(value, list) else [value]
    wrong = "holds {} where a record {{…}} is expected"
    rows = ((i, r if isinstance(r, dict) else wrong.format(kind_of(r)), 0) for i, r in enumerate(items, 1))
    yield from _rows(file, rows, size, unit="record", each=len(raw) // max(len(items), 1))


def _rows(
    file: File, rows: Iterator[tuple[int, dict | str, int]], size: int, *, unit: str, each: int = 0
) -> Iterator[tuple[Part, int, int]]:
    """Rows gathered into parts. `rows` yields line, row (or what is wrong with it) and bytes on disk read so far."""
    held, total, seen = [], 0, 0
    for line, row, read in rows:
        held.append((line, row))
        total += each or _weight(row)
        if total >= size:
            now = read or min(seen + total, file.size)
            yield Part(file.label, "rows", held[0][0], unit=unit, data=held), total, now - seen
            held, total, seen = [], 0, now
    if held:
        yield Part(file.label, "rows", held[0][0], unit=unit, data=held), total, file.size - seen


def _weight(row: dict | str) -> int:
    return 16 + (len(row) if isinstance(row, str) else sum(len(v) for v in row.values() if isinstance(v, str)))

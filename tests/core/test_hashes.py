"""Hashes of files are remembered between runs, and a changed file is noticed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.toy import graph
from tutelage.core import hashes
from tutelage.planning import plan


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were really read; nothing is remembered from other tests."""
    found: list[str] = []
    real = hashlib.file_digest

    def counted(stream, kind):  # type: ignore[no-untyped-def]
        found.append(Path(stream.name).name)
        return real(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    monkeypatch.setattr(hashes, "SETTLED", 0.0)
    forget(monkeypatch)
    return found


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(hashes, "_known", {})
    monkeypatch.setattr(hashes, "_fresh", [])
    monkeypatch.setattr(hashes, "_read", set())


def test_a_later_run_reads_no_file_again_and_a_changed_one_is_noticed(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prints() -> dict[str, str]:
        made = graph(tmp_path, steps=2)
        plan(made)
        hashes.flush(tmp_path / "runs/.data")
        return {name: node.fingerprint for name, node in made.nodes.items()}

    first = prints()
    assert {"a.jsonl", "b.jsonl"} <= set(reads)
    forget(monkeypatch)
    reads.clear()
    assert prints() == first and not reads
    forget(monkeypatch)
    path = tmp_path / "data/b.jsonl"
    before = path.stat()
    text = path.read_bytes()
    path.write_bytes(text.replace(b"1", b"2", 1))  # of the same size, with its old time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    now = prints()
    assert reads == ["b.jsonl"] and now["one"] == first["one"] and now["two"] != first["two"]


def test_a_file_that_was_changed_a_moment_ago_is_read_again(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SETTLED", 3600.0)
    path = tmp_path / "x"
    path.write_bytes(b"one")
    assert hashes.digest(path) == hashes.digest(path) == hashlib.blake2b(b"one", digest_size=16).hexdigest()
    assert reads == ["x", "x"] and not hashes._fresh
    assert hashes.digest(path, "sha256") == hashlib.sha256(b"one").hexdigest()


def test_a_long_reading_makes_no_file_older(reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written while the first gigabytes are read may have the same time; the file was young when that began."""
    path = tmp_path / "x"
    path.write_bytes(b"one")
    now = [path.stat().st_mtime + 0.5]
    real = hashlib.file_digest

    def slow(stream, kind):  # type: ignore[no-untyped-def]
        now[0] += 60.0
        return real(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", slow)
    monkeypatch.setattr(hashes, "SETTLED", 2.0)
    monkeypatch.setattr(hashes.time, "time", lambda: now[0])
    hashes.digest(path)
    assert not hashes._fresh and not hashes._known
    hashes.digest(path)
    assert hashes._fresh, "a minute later it is"


def test_a_broken_cache_or_disk_costs_time_only(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "x", tmp_path / ".data"
    path.write_bytes(b"one")
    known = hashes.digest(path)
    hashes.flush(data)
    with open(data / hashes.NAME, "a") as handle:
        handle.write('17\n["half a li')
    forget(monkeypatch)
    reads.clear()
    hashes.remember(data)
    assert hashes.digest(path) == known and not reads
    forget(monkeypatch)
    hashes.digest(path)
    hashes.flush(path / "no folder")  # a file stands there
    with pytest.raises(FileNotFoundError):
        hashes.digest(tmp_path / "gone")

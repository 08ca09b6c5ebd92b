"""A stage's folder while it grows: journal, metrics, lock. Everything here survives a `kill -9`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import queue
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tutelage.base.errors import UserError


def plain(value: Any) -> Any:
    """Make a value JSON can hold: NaN and infinity become the strings `nan`, `inf`, `-inf`."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def dumps(value: Any) -> str:
    """A value on one line of JSON. Hardly ever is anything not finite, so it is looked for only when it was found."""
    try:
        return _encode(value)
    except (TypeError, ValueError):
        return _encode(plain(value))


@contextlib.contextmanager
def disk_errors(what: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"the disk is full while writing {what}; free some space and run the same command again"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES):
            raise UserError(f"{what} cannot be written: {error.strerror}") from error
        raise


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is whole or absent."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with disk_errors(path):
        with open(beside, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, path)
        sync(path.parent)


def ours(path: Path, *, folder: bool) -> Path:
    """`path`, free for a folder (which is made) or a file of ours: what else lies there, a link too, is put aside by name."""
    if path.is_symlink() or (path.exists() and path.is_dir() != folder):
        os.rename(path, path.with_name(f"{path.name}.aside-{time.time_ns()}"))
    if folder:
        path.mkdir(exist_ok=True)
    return path


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; a second process gets one line that says who has it. The lock dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115  held until the block ends
    try:
        for left in reversed(range(100)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if left:  # somebody who only looks whether the stage is at work lets go at once
                    time.sleep(0.02)
                    continue
                handle.seek(0)
                who = handle.read().strip() or "another process"
                raise UserError(f"{folder} is being written by {who}; wait for it or end it, then run again") from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield
    finally:
        handle.close()


class Journal:
    """Append-only list of what was done to a stage, one line a tick, on disk before it is applied."""

    def __init__(self, path: Path, *, lines: list[dict[str, Any]] | None = None) -> None:
        self.path = path
        self.lines = read_lines(path) if lines is None else lines

    def append(
        self,
        *,
        tick: int,
        by: str,
        do: list[dict[str, Any]],
        actor: str | None = None,
        why: str = "",
        id: str | None = None,
        write: bool = True,
    ) -> dict[str, Any]:
        """Add one line and fsync it. `do` holds the tick's actions. Ranks but the first only remember (`write`)."""
        line: dict[str, Any] = {"id": id or uuid.uuid4().hex[:12], "tick": tick, "by": by}
        line |= ({"actor": actor} if actor else {}) | {"do": do} | ({"why": why} if why else {})
        self.lines.append(line)
        if not write:
            return line
        with disk_errors(self.path), open(self.path, "a", encoding="utf-8") as handle:
            handle.write(dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        return line

    def engine(self, what: str) -> dict[str, Any] | None:
        """The engine's last note of one kind: a choice made by measuring the machine, obeyed on resume."""
        notes = (act for line in reversed(self.lines) if line["by"] == "engine" for act in line["do"])
        return next((act for act in notes if act["do"] == what), None)


class Metrics:
    """Append-only numbers, written in batches by a thread so that a step never waits for the disk."""

    def __init__(self, path: Path, *, keep_bytes: int | None = None, write: bool = True) -> None:
        self.path = path
        self.writes = write  # ranks but the first only count along
        if not write:
            return
        if keep_bytes is not None and path.exists():  # what came after the checkpoint is done again
            os.truncate(path, min(keep_bytes, path.stat().st_size))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed in close()
        self._queue: queue.SimpleQueue[dict[str, Any] | threading.Event | tuple[Path, str] | None] = queue.SimpleQueue()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="metrics", daemon=True)
        self._thread.start()

    def add(self, row: dict[str, Any]) -> None:
        """Queue one row; the error of an earlier write is raised here."""
        if not self.writes:
            return
        if self._failed:
            raise self._failed
        self._queue.put(row)

    def beside(self, path: Path, text: str) -> None:
        """Queue a small file to be replaced: readers see it whole; a crash may leave the one before."""
        if self.writes:
            self._queue.put((path, text))

    def flush(self) -> int:
        """Wait until everything is on disk; returns the file's size in bytes."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        if self._failed:
            raise self._failed
        return self.path.stat().st_size

    def close(self) -> None:
        if not self.writes:
            return
        self.flush()
        self._queue.put(None)
        self._thread.join()
        self._file.close()

    def _write(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if item is None:
                    return
                if isinstance(item, threading.Event):
                    if not self._failed:
                        with disk_errors(self.path):
                            self._file.flush()
                            os.fsync(self._file.fileno())
                elif isinstance(item, tuple):
                    if not self._failed:  # readers of the small file find the rows from before it
                        with disk_errors(self.path):
                            self._file.flush()
                    _replace(*item)
                elif not self._failed:
                    with disk_errors(self.path):
                        self._file.write(dumps(item) + "\n")
                        if self._queue.empty():
                            self._file.flush()
            except BaseException as error:
                self._failed = error
            finally:
                if isinstance(item, threading.Event):
                    item.set()


def _replace(path: Path, text: str) -> None:
    """A file that is no loss when it cannot be written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)


def no_link(path: str, flags: int) -> int:
    """Opens what a stage's folder holds for one who looks from outside: a link could lead out of the runs folder."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def opened(path: Path) -> BinaryIO:
    """A file of lines; UserError for a link to one."""
    try:
        return open(path, "rb", opener=no_link)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, which is not followed") from error
        raise


def read_lines(path: Path, *, mend: bool = False) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a last line cut by a crash is left out (and removed from the file with `mend`)."""
    if not path.exists():
        return []
    with opened(path) as handle:
        data = handle.read()
    whole = data.rfind(b"\n") + 1
    if mend and whole < len(data):
        os.truncate(path, whole)
    return [json.loads(line) for line in data[:whole].splitlines() if line.strip()]


def each_line(path: Path, *, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The same rows one at a time, for files that grow with the steps of a stage: never more than a line in memory.

    With `kind` only those of that kind (`train`, `eval`); the others pass by unread where their line begins with it.
    """
    yield from filter(lambda row: kind is None or row.get("kind") == kind, map(json.loads, _lines(path, kind)))


def newest_line(path: Path, *, kind: str) -> dict[str, Any]:
    """The last row of a kind, empty where there is none. Of a million rows one is parsed."""
    last = deque(_lines(path, kind), maxlen=1)
    row: dict[str, Any] = json.loads(last[0]) if last else {}
    if row.get("kind", kind) != kind:  # lines that do not begin with their kind must all be looked into
        row = next(iter(deque(each_line(path, kind=kind), maxlen=1)), {})
    return row


def _lines(path: Path, kind: str | None) -> Iterator[bytes]:
    """Whole lines, without those that begin with another kind."""
    if not path.exists():
        return
    head, mine = b'{"kind":"', f'{{"kind":"{kind}"'.encode()
    with opened(path) as handle:
        for line in handle:
            other = kind is not None and line.startswith(head) and not line.startswith(mine)
            if not other and line.endswith(b"\n") and line.strip():
                yield line

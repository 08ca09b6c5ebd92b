"""Hashes of files, remembered between runs: a file whose size, times and inode are as they were is not read again.

`runs/.data/hashes.jsonl` holds a line a file. It is a cache: it may be deleted, and a line that is broken counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "hashes.jsonl"
SETTLED = 2.0  # seconds from a file's last change to its reading, below which it might change again without its times showing it
KINDS: dict[str, Callable[[], Any]] = {
    "blake2b": lambda: hashlib.blake2b(digest_size=16),
    "sha256": hashlib.sha256,
}

_known: dict[str, str] = {}  # what was hashed or read back, in this process
_fresh: list[str] = []  # lines that are not on disk yet
_read: set[Path] = set()


def remember(folder: Path) -> None:
    """Take in what earlier runs wrote under `folder` (`runs/.data`), once."""
    if folder in _read:
        return
    _read.add(folder)
    try:
        lines = (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            key, value = json.loads(line)
            _known[str(key)] = str(value)
        except (ValueError, TypeError):  # cut by a crash
            continue


def flush(folder: Path) -> None:
    """Write down what was hashed since. A full or read-only disk costs the cache, never the run."""
    if not _fresh:
        return
    text = "".join(line + "\n" for line in _fresh)
    _fresh.clear()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / NAME, "a", encoding="utf-8") as handle:
            handle.write(text)
    except OSError:
        return


def digest(path: Path, kind: str = "blake2b") -> str:
    """Hash of a file's bytes, in hexadecimal digits. Raises OSError for a file that cannot be read."""
    about = os.stat(path)
    mark = [kind, os.path.abspath(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    key = json.dumps(mark)
    if key not in _known:
        began = time.time()  # before it is read: a file that is still being written may change behind the reader's back
        with open(path, "rb") as stream:
            found = hashlib.file_digest(stream, KINDS[kind]).hexdigest()
        if began - max(about.st_mtime, about.st_ctime) < SETTLED:
            return found  # not remembered, not even here
        _known[key] = found
        _fresh.append(json.dumps([key, found]))
    return _known[key]

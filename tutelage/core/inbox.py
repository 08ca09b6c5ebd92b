"""The folder in which requests lie, looked into between any two steps, and what a request is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from tutelage.base.action import DEEPEST
from tutelage.base.errors import UserError
from tutelage.core.record import dumps, ours

LARGEST = 1 << 17  # bytes of a request
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=-]{0,63}")
_OURS = re.compile(r"recipe-\d|\d+-[a-z]")  # ids that the recipe's actions and policies' requests have

Request = dict[str, Any]  # id, by, actor, do, why, dry

# in nanoseconds: after which a folder's time stands for one change, and for which that is believed
OLD, SURE = 100_000_000, 1_000_000_000


class Inbox:
    """Requests by name and age. To list a folder takes a quarter of a millisecond, to ask an open one for its time a
    hundredth of that: it is listed when it has changed, and once a second, for a disk elsewhere may tell of its times late."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handle: int | None = None
        self.changed = self.listed = 0  # nanoseconds

    def files(self) -> list[Path]:
        """What may not have been read, oldest first. What is no plain file (a folder, a pipe, a link) is no request; one may
        be taken back."""
        if self._known():
            return []
        found = []
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".json") and not entry.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        if entry.is_file(follow_symlinks=False):
                            found.append((entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry.path)))
        return [path for _, path in sorted(found)]

    def _known(self) -> bool:
        """Whether nothing has come since the folder was listed.

        Its time tells of two changes in one tick of its clock as of one, so it is believed only once it is old.
        """
        now = time.time_ns()
        lately = self.handle is not None and self.listed <= now < self.listed + SURE
        if lately and os.fstat(self.handle).st_mtime_ns == self.changed:  # type: ignore[arg-type]
            return True
        self.close()  # it may have been put anew in its place
        with contextlib.suppress(OSError):
            for place in (self.folder, self.folder.with_name("answers")):
                if os.path.lexists(place):
                    ours(place, folder=True)  # whatever was put in its place meanwhile
            self.handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        self.changed = os.fstat(self.handle).st_mtime_ns if self.handle is not None else now
        self.listed = now if now - self.changed > OLD else 0
        return False

    def close(self) -> None:
        """Let the folder go; it is opened again when it is asked."""
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)

    __del__ = close


def read(path: Path) -> Request:
    """A request's contents, of which `do` is a list of mappings. What is none is a UserError, ValueError or OSError."""
    name = path.stem
    if not ID.fullmatch(name):
        raise UserError("an id has letters, digits, '-', '_', '.' and '=', at most 64")
    if _OURS.match(name):
        raise UserError(f"the id '{name}' is one of the recipe's or a policy's; take another")
    request = _loaded(path)
    do = request.get("do") if isinstance(request, dict) else None
    if not (isinstance(do, list) and all(isinstance(act, dict) for act in do) and request.get("by")):
        raise UserError("a request is {by: name, actor: person, do: [actions], why: text}")
    by, actor = str(request["by"])[:100], request.get("actor", "person")
    if by in ("engine", "recipe", "replay") or actor not in ("person", "agent"):
        raise UserError(f"by: '{by}', actor: '{str(actor)[:100]}': the actor of a request is a person or an agent")
    why, dry = str(request.get("why") or "")[:10_000], bool(request.get("dry"))
    return {"id": name, "by": by, "actor": actor, "do": do, "why": why, "dry": dry}


def _loaded(path: Path) -> Any:
    """A request's JSON, read within bounds. ValueError for what could not be written down again as it is."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        data = os.read(handle, LARGEST + 1)
    finally:
        os.close(handle)
    if len(data) > LARGEST:
        raise UserError(f"a request has at most {LARGEST} bytes")
    if deepest(data) > DEEPEST:
        raise UserError(f"a request has at most {DEEPEST} levels")
    found = json.loads(data)
    try:
        dumps(found).encode()
    except UnicodeEncodeError as error:
        raise UserError("its text holds half of a surrogate pair, which no file can hold") from error
    return found


def deepest(data: bytes) -> int:
    """How many brackets are open at most, those within texts counted, too; 0 where there are few."""
    depth = most = 0
    if data.count(b"[") + data.count(b"{") <= DEEPEST:
        return 0
    for byte in data:
        if byte in b"[{":
            depth += 1
            most = max(most, depth)
        elif byte in b"]}":
            depth -= 1
    return most

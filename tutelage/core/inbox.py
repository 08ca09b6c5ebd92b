"""The folder in which requests lie, looked into between any two steps."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

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
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder) as entries:
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

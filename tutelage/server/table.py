"""A metrics file followed as it grows: its rows as columns, cut back where a resumed run cut it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tutelage.core.record import no_link
from tutelage.server import columns
from tutelage.server.columns import CHUNK, Chunk, Floats, Growing, Ints, Part, thin

CHECK = 256  # bytes before an offset by which a file is known again: times in them differ from run to run
BATCH = 1024  # lines that are parsed at once
PIECE = 1 << 21  # bytes that are read at once
FULL = 6 * CHUNK  # a window of up to so many rows is looked at row by row
LINE = 1 << 24  # bytes of the longest line


def whole_lines(path: Path, offset: int) -> Iterator[bytes]:
    """The complete lines from an offset to the file's end, without their newlines; none where there is no file."""
    try:
        handle = open(path, "rb", opener=no_link)  # noqa: SIM115  closed below
    except FileNotFoundError:
        return
    with handle:
        handle.seek(offset)
        rest = b""
        while piece := handle.read(PIECE):
            lines = (rest + piece).split(b"\n")
            rest = lines.pop()
            if len(rest) > LINE:
                return
            yield from lines


def ending(path: Path, offset: int) -> bytes | None:
    """The bytes before an offset by which a file is known again; None where it is shorter."""
    start = max(0, offset - CHECK)
    try:
        with open(path, "rb", opener=no_link) as handle:
            handle.seek(start)
            found = handle.read(offset - start)
    except FileNotFoundError:
        found = b""
    return found if len(found) == offset - start else None


class Table:
    """The columns of one metrics file. `index`: a folder for full chunks, or None to keep them in memory.

    Not for several threads at once; whoever shares it holds a lock.
    """

    def __init__(self, path: Path, *, index: Path | None) -> None:
        self.path, self.index = path, index
        self.chunks: list[Chunk] = []
        self.tail = Growing()
        self.offset, self._end = 0, b""  # behind the last line that was taken in, and the bytes before that
        self.broken = 0  # lines that are no JSON object
        self._from_index()

    @property
    def rows(self) -> int:
        return self._first() + len(self.tail)

    @property
    def tick(self) -> int:
        """The last row's."""
        if len(self.tail):
            return self.tail.axes["tick"][-1]
        return self.chunks[-1].ticks[1] if self.chunks else 0

    def _first(self) -> int:
        return self.chunks[-1].first + self.chunks[-1].n if self.chunks else 0

    def _from_index(self) -> None:
        """Take up the chunks that an earlier process wrote, as far as they are of this very file."""
        while (place := self._place()) and (chunk := columns.opened(place, first=self._first())):
            self.chunks.append(chunk)
        self._drop_foreign()

    def _place(self) -> Path | None:
        """Where the next chunk is kept."""
        return self.index / f"{len(self.chunks):06d}.safetensors" if self.index else None

    def _drop_foreign(self) -> list[Chunk]:
        """Drop the chunks that are not of the file as it is now (the newest come first); returns them, oldest first."""
        dropped: list[Chunk] = []
        while self.chunks:
            last = self.chunks[-1]
            end = ending(self.path, last.end)
            if end is not None and zlib.crc32(end) == last.check:
                self.offset, self._end = last.end, end
                return dropped[::-1]
            dropped.append(self.chunks.pop())
        self.offset, self._end = 0, b""
        return dropped[::-1]

    # -- reading ----------------------------------------------------------------------------------------------------

    def cut_back(self) -> int | None:
        """Look whether the file still begins with what is known of it; if not, forget what it no longer holds.

        Returns None where no row was lost, else the number of rows that are left.
        """
        if ending(self.path, self.offset) == self._end:
            return None
        before, self.broken = self.rows, 0
        tail, self.tail = self.tail, Growing()
        dropped = self._drop_foreign()
        known = np.concatenate([*(c.arrays(["crc"])[0] for c in dropped), np.array(tail.crc, dtype=np.uint32)])
        same: list[bytes] = []
        for line, old in zip(whole_lines(self.path, self.offset), known, strict=False):
            if zlib.crc32(line) != old:
                break
            same.append(line)
            if len(same) == BATCH:
                self._take(same)
                same = []
        if same:
            self._take(same)
        return self.rows if self.rows < before else None

    def read(self) -> Iterator[list[dict[str, Any]]]:
        """Take in what is new, some lines at a time; yields their rows. What is no JSON object is an empty row."""
        batch: list[bytes] = []
        for line in whole_lines(self.path, self.offset):
            batch.append(line)
            if len(batch) == BATCH:
                yield self._take(batch)
                batch = []
        if batch:
            yield self._take(batch)

    def _take(self, lines: list[bytes]) -> list[dict[str, Any]]:
        rows = [self._parsed(line) for line in lines]
        self.tail.extend(rows, map(zlib.crc32, lines))
        self.offset += sum(map(len, lines)) + len(lines)
        last = b"\n".join(lines[-8:]) + b"\n"  # long enough, as a rule
        if len(last) < CHECK:
            last = self._end + b"\n".join(lines) + b"\n"
        self._end = last[-CHECK:]
        if len(self.tail) >= CHUNK:
            first, check, place = self._first(), zlib.crc32(self._end), self._place()
            self.chunks.append(columns.sealed(self.tail, first=first, end=self.offset, check=check, place=place))
            self.tail = Growing()
        return rows

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            row = orjson.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            self.broken += 1
            return {}
        return row

    # -- looking ----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        found = dict.fromkeys(name for chunk in self.chunks for name in chunk.overview)
        return list(found | dict.fromkeys(name for name, (where, _) in self.tail.cols.items() if len(where)))

    def row_at(self, tick: int, *, after: bool = False) -> int:
        """The first row of `tick` or later; with `after`, the first row of a later tick."""
        side: Any = "right" if after else "left"
        for chunk in self.chunks:
            if chunk.ticks[1] > tick or (chunk.ticks[1] == tick and not after):
                return chunk.first + int(np.searchsorted(chunk.all_axes()[0], tick, side=side))
        return self._first() + int(np.searchsorted(np.array(self.tail.axes["tick"], dtype=np.int64), tick, side=side))

    def points(self, name: str, *, start: int, stop: int, width: int | None) -> Part:
        """A series between two rows, as few points as `width` buckets need (all of them: None). See `columns.thin`."""
        parts = []
        many = width is not None and stop - start > FULL
        for chunk in self.chunks:
            if chunk.first + chunk.n > start and chunk.first < stop:
                whole = start <= chunk.first and chunk.first + chunk.n <= stop
                parts.append(chunk.part(name) if many and whole else self._part(chunk, chunk.first, name))
        parts.append(self._part(self.tail, self._first(), name))
        row, value = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        axes = np.concatenate([part.axes for part in parts], axis=1)
        inside = (row >= start) & (row < stop)
        found = Part(row[inside], value[inside], axes[:, inside])
        if width is None or not len(found.row):
            return found
        kept = thin(found.row, found.value, width=width)
        return Part(found.row[kept], found.value[kept], found.axes[:, kept])

    @staticmethod
    def _part(rows: Chunk | Growing, first: int, name: str) -> Part:
        where, value = rows.column(name)
        return Part(where + first, value, rows.all_axes()[:, where])


def preview(path: Path, *, points: int = 600) -> dict[str, tuple[Ints, Floats]]:
    """What a long file looks like before it was read: ticks and values of equally spaced lines, by series."""
    rows, size = [], path.stat().st_size
    with open(path, "rb", opener=no_link) as handle:
        for at in np.linspace(0, size, points, endpoint=False).astype(int):
            handle.seek(at)
            if at:
                handle.readline(LINE)
            try:
                row = orjson.loads(handle.readline(LINE))
            except ValueError:
                continue
            if isinstance(row, dict) and (not rows or row.get("tick", 0) > rows[-1].get("tick", 0)):
                rows.append(row)
    seen = Growing()
    seen.extend(rows, [0] * len(rows))
    ticks = seen.all_axes()[0]
    return {name: (ticks[where], value) for name in seen.cols for where, value in [seen.column(name)]}

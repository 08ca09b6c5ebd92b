"""What all viewers of a stage share: its folder followed as it grows, and everything in it numbered.

Every line of metrics and every event has a number, rising by one; a client that says up to which number it knows gets what
came after, once. Numbers begin at the microseconds of the feed's making, so that those of an earlier feed are seen to be
none of this one's, and its client begins anew. A run that was cut and resumed cuts its metrics back: clients are told
the last tick that stays, and get what follows it again.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import orjson

from tutelage.base.errors import UserError
from tutelage.core.record import dumps, plain
from tutelage.server.columns import Part
from tutelage.server.table import CHECK, Table, ending, preview, whole_lines
from tutelage.steering import controls

EVENTS = 5000  # that are kept; a client that knows none of them begins anew
PAGE = 5000  # rows in one message at most
LOOK = 2.0  # seconds between two looks whether a stage's process lives
TEXT = 4000  # characters of a sample in an event
USUAL = ("loss", "lr", "grad_norm", "tokens_per_second", "weights/", "eval/")  # series that a viewer gets unasked
log = logging.getLogger("tutelage.server")
Points = dict[str, list[Any]]
T = TypeVar("T")


class Numbers:
    """Which number a row has: row + offset, the offset growing where something else came between."""

    def __init__(self, first: int) -> None:
        self.base = self.next = first
        self._rows: list[int] = []
        self._starts: list[int] = []  # the number of the row of that place

    def add(self, row: int, many: int) -> None:
        """`many` rows from `row` on get the next numbers."""
        if not self._rows or self.next - row != self._starts[-1] - self._rows[-1]:
            self._rows.append(row)
            self._starts.append(self.next)
        self.next += many

    def one(self) -> int:
        """A number for something that is no row."""
        self.next += 1
        return self.next - 1

    def cut(self, rows: int) -> None:
        while self._rows and self._rows[-1] >= rows:
            self._rows.pop()
            self._starts.pop()

    def of(self, rows: Any) -> Any:
        if not self._rows:
            return rows
        at = np.searchsorted(self._rows, rows, side="right") - 1
        return rows + (np.array(self._starts) - np.array(self._rows))[at]

    def row_after(self, number: int, rows: int) -> int:
        """The first of `rows` rows with a larger number."""
        at = bisect.bisect_right(self._starts, number) - 1
        if at < 0:
            return 0
        end = self._rows[at + 1] if at + 1 < len(self._rows) else rows
        return min(end, self._rows[at] + number - self._starts[at] + 1)


class Feed:
    """One stage, followed. `poll` reads what is new; the rest only looks, from any thread."""

    def __init__(self, folder: Path, *, index: Path | None) -> None:
        self.folder = folder
        self.index = index
        self.viewers = 0
        self.used = time.monotonic()
        self.fault = ""  # why it can be read no further
        self.loading: float | None = 0.0  # the share that was read, until it is all
        self.controls: dict[str, Any] = {}
        self.version = 0  # rises with everything that changes
        self.numbers = Numbers(time.time_ns() // 1000)
        self.events: deque[tuple[int, dict[str, Any]]] = deque(maxlen=EVENTS)
        self.journal: list[dict[str, Any]] = []
        self._table: Table | None = None
        self._forgotten = self.numbers.base - 1  # the newest event that is kept no more
        self._crc: list[int] = []
        self._offset, self._end = 0, b""
        self._looked, self._written = 0.0, 0
        self._said: OrderedDict[Any, Any] = OrderedDict()
        self._stop = False
        self.lock = threading.RLock()

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def table(self) -> Table:
        """Made by the first poll: an index may have to be read for it."""
        if self._table is None:
            self._table = Table(self.folder / "metrics.jsonl", index=self.index)
            self.numbers.add(0, self._table.rows)
        return self._table

    def poll(self) -> None:
        """Read what is new. A folder that is gone or cannot be read leaves its reason in `fault`."""
        try:
            if not (self.folder / "stage.json").is_file():
                raise UserError(f"the folder of stage {self.folder.parent.name} is gone")
            self._journal()
            self._metrics()
            self._controls()
            fault = ""
        except (UserError, OSError, ValueError) as error:
            fault = str(error)
        except Exception as error:  # its viewers are told, and those of other stages do not notice
            log.error("stage %s cannot be followed", self.folder, exc_info=error)
            fault = f"{type(error).__name__}: {error}"
        if fault != self.fault:
            self.fault = fault
            self.version += 1
        if self.loading is not None and not self._stop:
            self.loading = None
            self.version += 1

    def stop(self) -> None:
        """Read no further; a poll in another thread ends soon."""
        self._stop = True

    def _metrics(self) -> None:
        with self.lock:
            table = self.table
            left = table.cut_back()
            if left is not None:
                self.numbers.cut(left)
                self._event({"type": "cut", "tick": table.tick, "of": "metrics"})
            reading = table.read()
        while not self._stop:
            with self.lock:
                at = table.rows
                rows = next(reading, None)
                if rows is None:
                    break
                self.numbers.add(at, len(rows))
                for row in rows:
                    self._texts(row)
                self.version += 1
            if self.loading is not None:
                self.loading = min(0.99, table.offset / max(1, table.path.stat().st_size))
            time.sleep(0)  # whoever waits to look may look

    def _texts(self, row: dict[str, Any]) -> None:
        texts = row.get("texts") if row.get("kind") == "eval" else {"sample": row.get("text")}
        if isinstance(texts, dict) and any(texts.values()):
            said = {key: str(text)[:TEXT] for key, text in texts.items()}
            self._event({"type": "sample", "tick": row.get("tick"), "step": row.get("step"), "texts": said})

    def _journal(self) -> None:
        path = self.folder / "journal.jsonl"
        if ending(path, self._offset) != self._end:  # rare, and short: read again from the start
            self._offset, self._end = 0, b""
            lines = list(whole_lines(path, 0))
            same = next((i for i, (a, b) in enumerate(zip(lines, self._crc, strict=False)) if zlib.crc32(a) != b), None)
            same = min(len(lines), len(self._crc)) if same is None else same
            with self.lock:
                if same < len(self._crc):
                    del self._crc[same:], self.journal[same:]
                    self._event({"type": "cut", "lines": same, "of": "journal"})
                for line in lines[:same]:
                    self._behind(line)
        for line in whole_lines(path, self._offset):
            try:
                found = plain(orjson.loads(line))
            except ValueError:
                found = None
            with self.lock:
                entry = found if isinstance(found, dict) else {"tick": None, "by": "", "do": [], "broken": True}
                self._crc.append(zlib.crc32(line))
                self.journal.append(entry)
                self._behind(line)
                self._event({"type": "journal", "line": len(self.journal), "entry": entry})

    def _behind(self, line: bytes) -> None:
        self._offset += len(line) + 1
        self._end = (self._end + line + b"\n")[-CHECK:]

    def _event(self, event: dict[str, Any]) -> None:
        if len(self.events) == EVENTS:
            self._forgotten = self.events[0][0]
        number = self.numbers.one()
        self.events.append((number, {**event, "seq": number}))
        self.version += 1

    def _controls(self) -> None:
        path = self.folder / "controls.json"
        written = path.stat().st_mtime_ns if path.exists() else 0
        if written != self._written or time.monotonic() - self._looked > LOOK:
            self._written, self._looked = written, time.monotonic()
            found = plain(controls(self.folder))
            if found != self.controls:
                self.controls = found
                self.version += 1

    # -- looking ----------------------------------------------------------------------------------------------------

    def knows(self, number: int) -> bool:
        """Whether a client that has everything up to `number` can be told just what followed."""
        return self.numbers.base - 1 <= number < self.numbers.next and number >= self._forgotten

    @property
    def last(self) -> int:
        return self.numbers.next - 1

    def names(self, wanted: Sequence[str] | None = None) -> list[str]:
        """The series there are; of those `wanted` (a name that ends in `/` stands for all that begin so)."""
        with self.lock:
            known = self.table.names()
        return known if wanted is None else [name for name in known if _among(name, wanted)]

    def points(
        self,
        series: str,
        *,
        since: int | None = None,
        start: int | None = None,
        to: int | None = None,
        width: int | None = 1000,
    ) -> Points:
        """A series from tick `start` to tick `to`, both included, or what is newer than number `since`.

        Lists of equal length: seq, tick, step, tokens, value. What is not finite is `nan`, `inf` or `-inf`. At most
        about 2 · `width` points; no spike is lost (see `columns.thin`). `width=None`: every point.
        """
        with self.lock:
            first = 0 if start is None else self.table.row_at(start)
            if since is not None:
                first = max(first, self.numbers.row_after(since, self.table.rows))
            stop = self.table.rows if to is None else self.table.row_at(to, after=True)
            return self._listed(self.table.points(series, start=first, stop=stop, width=width))

    def _listed(self, part: Part) -> Points:
        tick, step, tokens = (axis.tolist() for axis in part.axes)
        values: list[Any] = part.value.tolist()
        for i in np.flatnonzero(~np.isfinite(part.value)):
            values[i] = str(values[i])
        return {
            "seq": self.numbers.of(part.row).tolist(),
            "tick": tick,
            "step": step,
            "tokens": tokens,
            "value": values,
        }

    def snapshot(self, *, names: Sequence[str] | None = USUAL, width: int = 500) -> tuple[bytes, int]:
        """Everything a new viewer needs, as one message, and the number up to which it goes; `names=None`: every series."""
        return self._once(("snapshot", names, width, self.version), lambda: self._whole(names, width))

    def _whole(self, names: Sequence[str] | None, width: int) -> tuple[bytes, int]:
        with self.lock:
            series = {name: self.points(name, width=width) for name in self.names(names)}
            events = [event for _, event in list(self.events)[-200:]]
            last = self.last
            about = {"seq": last, "tick": self.table.tick, "rows": self.table.rows, "known": self.table.names()}
            message = {"type": "snapshot", **about, "series": series, "events": events, "controls": self.controls}
        return said(message), last

    def preview(self, *, names: Sequence[str] | None = USUAL) -> bytes:
        """While a long file is read for the first time: what its lines look like here and there."""
        return self._once(("preview", names), lambda: said({**self.progress(), "series": self._sketch(names)}))

    def progress(self) -> dict[str, Any]:
        return {"type": "loading", "share": round(self.loading if self.loading is not None else 1.0, 3)}

    def _sketch(self, names: Sequence[str] | None) -> dict[str, Any]:
        path, found = self.folder / "metrics.jsonl", {}
        for name, (tick, value) in (preview(path) if path.exists() else {}).items():
            if _among(name, names or [name]):
                found[name] = {"tick": tick.tolist(), "value": plain(value.tolist())}
        return found

    def since(self, number: int, *, names: Sequence[str] | None = USUAL) -> tuple[bytes, int]:
        """What came after a number, as one message of at most `PAGE` rows, and the number up to which it goes.

        The parts of the message are in order: {"type": "points", …} with the rows between two events, and events.
        """
        return self._once(("since", number, names, self.last), lambda: self._after(number, names))

    def _end_of(self, number: int) -> int:
        with self.lock:
            row = self.numbers.row_after(number, self.table.rows) + PAGE
            return self.last if row >= self.table.rows else int(self.numbers.of(np.array([row]))[0]) - 1

    def _after(self, number: int, names: Sequence[str] | None) -> tuple[bytes, int]:
        with self.lock:
            end = self._end_of(number)
            events = [(at, event) for at, event in self.events if number < at <= end]
            parts: list[dict[str, Any]] = []
            row = self.numbers.row_after(number, self.table.rows)
            for at, event in [*events, (end + 1, {})]:
                stop = self.numbers.row_after(at - 1, self.table.rows)
                if stop > row:
                    parts.append(self._between(row, stop, names))
                    row = stop
                parts += [event] if event else []
        return said({"type": "news", "seq": end, "parts": parts}), end

    def _between(self, row: int, stop: int, names: Sequence[str] | None) -> dict[str, Any]:
        found = {n: self._listed(self.table.points(n, start=row, stop=stop, width=None)) for n in self.names(names)}
        return {"type": "points", "series": {name: points for name, points in found.items() if points["seq"]}}

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        """What several viewers ask for is made once."""
        with self.lock:
            if key not in self._said:
                self._said[key] = make()
                while len(self._said) > 16:
                    self._said.popitem(last=False)
            return cast(T, self._said[key])


def _among(name: str, wanted: Sequence[str]) -> bool:
    return any(name == one or (one.endswith("/") and name.startswith(one)) for one in wanted)


def said(message: Any) -> bytes:
    """JSON; NaN and infinity have become strings before."""
    try:
        return orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except TypeError:  # a whole number that 64 bits do not hold, which somebody may have asked for
        return dumps(message).encode()

"""What all viewers of one stage share: read once a second at most, thinned, and told in news that are the same for all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tutelage import steering, watching
from tutelage.base.errors import UserError
from tutelage.core.ledger import BITS, Ledger
from tutelage.core.words import amount, finite, number
from tutelage.server.charts import PREFIXES, WANTED
from tutelage.server.feed import Feed
from tutelage.server.page_words import spell
from tutelage.server.thin import MOST, Thin

EVERY = 0.8  # seconds between two readings, however many look
LOST = 0.05  # bits per byte above which a column is marked where the recipe names no alarm
RECENT = 100  # steps that the time left is told from
NAMES = (*WANTED, *PREFIXES)
POINT = ("seq", "tick", "step", "tokens", "value")
COUNTS = {"tok": "tokens", "step": "step", "sample": "samples", "epoch": "epochs", "flop": "flops"}
COUNTED = {"step": "steps", "tok": "tokens", "sample": "samples", "epoch": "epochs", "flop": "FLOPs"}


@dataclass
class Column:
    """One column of the forgetting matrix, now."""

    name: str
    now: float
    lost: float  # bits per byte against its best before; below zero it got better
    own: bool  # this stage trains on it
    known: bool  # it was learned before, so that it can be forgotten
    alarm: bool
    named: bool  # the alarm is the recipe's own
    curve: list[float] = field(default_factory=list)


class Live:
    """A stage as the page shows it, drawn from its feed."""

    def __init__(self, feed: Feed, name: str) -> None:
        self.feed, self.folder, self.name = feed, feed.folder, name
        self.series: dict[str, Thin] = {}
        self.evals: list[dict[str, Any]] = []
        self.controls = steering.controls(feed.folder)
        self.entries: list[dict[str, Any]] = []  # what was asked, and what became of it
        self.torn = ""  # why that cannot be read
        self.last: dict[str, Any] = {}  # the last step
        self.recent: list[
            tuple[float, float, float]
        ] = []  # of the newest steps: loss, seconds, count of the stage's unit
        self.frame = 0
        self.said = ""  # the news of this frame, as text, the same for all who saw the one before
        self.full = False  # whether these begin anew
        self.viewers = 0
        self._about: dict[str, Any] = {}
        self._lock, self._read_at, self._seen = asyncio.Lock(), 0.0, ""
        self._version, self._seq, self._lines = -1, -1, -1

    # -- reading ----------------------------------------------------------------------------------------------------

    async def refresh(self, look: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Take in what is new, unless somebody just did. `look` does something beside the event loop."""
        async with self._lock:
            self.feed.used = time.monotonic()
            if time.monotonic() - self._read_at >= EVERY:
                await look(self.read)
                self._read_at = time.monotonic()

    def stale(self) -> None:
        """Let the next look read again, however soon it comes."""
        self._read_at, self._version = 0.0, -1

    def read(self) -> None:
        """Take in what the feed has beyond what is known. Blocking; one thread at a time."""
        feed, version = self.feed, self.feed.version
        if version == self._version:
            return
        self.controls = feed.controls or steering.controls(self.folder)
        if len(feed.journal) != self._lines or self._version == -1:
            self._lines = len(feed.journal)
            try:
                self.entries, self.torn = steering.log(self.folder), ""
            except (UserError, ValueError, KeyError) as error:  # the rest of the page is still worth seeing
                self.torn = f"journal.jsonl or an answer is damaged, so the log is not up to date: {error}"
        if feed.loading is not None:
            self._sketch()
        else:
            self._version = version
            self._points()
        marks = self.marks()
        news = {name: thin.news() for name, thin in self.series.items()}
        seen = json.dumps([marks, self.last.get("tick")])
        if any(more for _, more in news.values()) or self.full or seen != self._seen:
            self._seen = seen
            self.frame += 1
            self.said = self.whole() if self.full else self._news(news, full=False, marks=marks)

    def _sketch(self) -> None:
        """A long file that is read for the first time: lines here and there, until it is."""
        self.series, self.full = {}, True
        for name, points in json.loads(self.feed.preview(names=NAMES))["series"].items():
            self._at(name).extend(zip(points["tick"], points["value"], strict=True))
            if points["tick"] and name in WANTED:
                self.last |= {name: points["value"][-1], "tick": points["tick"][-1]}

    def _points(self) -> None:
        feed = self.feed
        with feed.lock:
            cut = any(seq > self._seq and event.get("of") == "metrics" for seq, event in feed.events)
            self.full = cut or not feed.knows(self._seq)
            if self.full:
                self.series, self.last = {}, {}
            since, width, fresh = (None, MOST, True) if self.full else (self._seq, None, False)
            for name in feed.names(NAMES):
                points = feed.points(name, since=since, width=width)
                if points["tick"]:
                    fresh = fresh or name.startswith("eval/")
                    self._at(name).extend(zip(points["tick"], points["value"], strict=True))
                    if name in WANTED or name.startswith("weights/"):
                        self._stepped(name, points)
            if fresh:
                self._measured()
            self._seq = feed.last
            self._newest()

    def _stepped(self, name: str, points: dict[str, list[Any]]) -> None:
        """A series of the steps went on: its newest value, and where training stands."""
        tick = points["tick"][-1]
        if tick != self.last.get("tick"):
            self.last = {"tick": tick, "step": points["step"][-1], "tokens": points["tokens"][-1], "weights": {}}
        head, _, source = name.partition("/")
        if head == "weights":
            self.last["weights"][source] = points["value"][-1]
        else:
            self.last[name] = points["value"][-1]

    def _measured(self) -> None:
        """The rows of measurements, put together from their columns."""
        rows: dict[int, dict[str, Any]] = {}
        for name in self.feed.names(["eval/"]):
            points = self.feed.points(name, width=None)
            for seq, tick, step, tokens, value in zip(*(points[k] for k in POINT), strict=True):
                row = rows.setdefault(
                    seq, {"kind": "eval", "tick": tick, "step": step, "tokens": tokens, "flops": 0, "values": {}}
                )
                row["values"][name.removeprefix("eval/")] = value
        self.evals = [rows[seq] for seq in sorted(rows)]

    def _newest(self) -> None:
        """The last steps, for the trend and the time left."""
        start = int(self.last.get("tick", 0)) - RECENT
        unit = COUNTS.get(str((self.controls["total"] or {}).get("unit")), "step")
        losses, seconds = (self.feed.points(name, start=start, width=None) for name in ("loss", "seconds"))
        counts = (
            seconds[unit] if unit in ("step", "tokens") else self.feed.points(unit, start=start, width=None)["value"]
        )
        rows = zip(losses["value"], seconds["value"], counts, strict=False)
        self.recent = [(number(loss), number(took), number(count)) for loss, took, count in rows]
        if self.recent:
            self.last["count"] = self.recent[-1][2]

    def description(self) -> dict[str, Any]:
        """The stage as its recipe has it."""
        if not self._about:
            with contextlib.suppress(UserError):
                self._about = (watching.read(self.folder / "stage.json") or {}).get("stage", {})
        return self._about

    def _at(self, name: str) -> Thin:
        return self.series.setdefault(name, Thin())

    # -- what is told -----------------------------------------------------------------------------------------------

    def whole(self) -> str:
        """All points, for one who has none: JSON for `tutelage.take`."""
        return self._news({name: (0, thin.points) for name, thin in self.series.items()}, full=True, marks=self.marks())

    def _news(self, series: dict[str, Any], *, full: bool, marks: list[dict[str, Any]]) -> str:
        sent = {name: part for name, part in series.items() if full or part[1] or part[0] == 0}
        ends = {"first": 0, "last": self.last.get("tick", 0)}
        return json.dumps({"stage": self.name, "full": full, "series": sent, "marks": marks, **ends})

    def marks(self) -> list[dict[str, Any]]:
        """Every action, with who and why, and every stretch of what is no number."""
        found = []
        for line in self.entries:
            if line["state"] in ("applied", "written"):
                why = f" — {line['why']}" if line.get("why") else ""
                found.append({"kind": "act", "x": line["tick"], "text": f"{line['by']}: {spell(line['do'])}{why}"})
        for name, thin in list(self.series.items()):
            for first, last, what, many in _stretches(thin.odd):
                where = f"at tick {first:g}" if many == 1 else f"{many} times, ticks {first:g} to {last:g}"
                short = {"nan": "NaN", "inf": "∞", "-inf": "−∞"}.get(what, what)
                found.append(
                    {"kind": "nan", "x": first, "series": name, "short": short, "text": f"{name} {short} {where}"}
                )
        return found

    @property
    def state(self) -> str:
        found = "unreadable" if self.feed.fault else str(self.controls["state"])
        return "failed" if found == "stopped" and (self.folder / "error.txt").exists() else found

    @property
    def live(self) -> bool:
        return bool(self.controls["live"]) and not self.feed.fault

    def rate(self) -> float:
        """The rate in use: what the next step will use, where the trainer says it; else that of the last step."""
        used = number(self.target("optim.lr").get("now"))
        return used if finite(used) and self.live else number(self.last.get("lr"))

    def target(self, path: str) -> dict[str, Any]:
        """What the trainer says of a value that can be set; empty where there is none."""
        return next((t for t in self.controls["targets"] if t["path"] == path), {})

    def shares(self) -> dict[str, float]:
        """The mixture of the last step; before it, what was asked for."""
        found = self.last.get("weights") or self.controls["mix"] or dict.fromkeys(self.controls["sources"])
        return {name: number(share) for name, share in found.items()}

    def left(self) -> float:
        """Seconds left at the pace of the newest steps; NaN where nothing is known."""
        total, rows = self.controls["total"] or {}, self.recent
        fresh = next((i for i in range(len(rows) - 1, 0, -1) if rows[i][1] < rows[i - 1][1]), 0)  # since a resume
        rows = rows[fresh:]
        if len(rows) < 2 or not total:
            return float("nan")
        did, took = rows[-1][2] - rows[0][2], rows[-1][1] - rows[0][1]
        return max(0.0, (number(total["value"]) - rows[-1][2]) * took / did) if did > 0 else float("nan")

    def columns(self) -> list[Column]:
        """The forgetting matrix's newest row; what was learned before comes first, the most lost at its head."""
        values = self.evals[-1]["values"] if self.evals else {}
        own = set(self.description().get("data") or {})
        book, found = Ledger(None, evals=self.evals), []
        for key, value in values.items():
            if not key.startswith(BITS):
                continue
            name = key.removeprefix(BITS)
            curve = [point.bits for point in book.curve(name)]
            before = [bits for bits in curve[:-1] if finite(bits)] or [number(value)]
            best = before[0] if name in own else min(before)  # what is being learned is told against where it began
            lost = number(values.get(f"forgetting/{name}", (curve[-1] if curve else number(value)) - best))
            known, named = f"forgetting/{name}" in values and name not in own, f"alarm/{name}" in values
            alarm = number(values.get(f"alarm/{name}")) > 0 if named else known and lost > LOST
            found.append(Column(name, number(value), lost, name in own, known, alarm, named, curve))
        return sorted(found, key=lambda c: (not c.known, c.own, -c.lost if finite(c.lost) else 0.0))

    def alerts(self) -> list[tuple[str, bool]]:
        """What somebody should look at now, in words, and whether it is grave."""
        if self.feed.fault:
            return [(self.feed.fault, True)]
        found = [(str(one["text"]), bool(one["grave"])) for one in self.controls["alerts"]]
        found += [(self.torn, False)] if self.torn else []
        if self.feed.loading is None and (broken := self.feed.table.broken):
            found.append((f"metrics.jsonl is damaged: {broken} of its lines cannot be read and are left out", False))
        return list(dict.fromkeys(found))

    def trend(self) -> str:
        """How the loss moved, last ten steps against the ten before."""
        if self.feed.loading is not None:
            return f"reading what there is: {self.feed.loading:.0%}"
        losses, where = [row[0] for row in self.recent], f"tick {self.last.get('tick', 0):,}"
        if len(losses) < 20 or not all(finite(x) for x in losses[-20:]):
            return where
        change = sum(losses[-10:]) / 10 - sum(losses[-20:-10]) / 10
        return f"{change:+.3f} over ten steps · {where}".replace("-", "−", 1)

    def progress(self) -> tuple[float, str]:
        """Share done, and that in words."""
        total = self.controls["total"]
        share = 1.0 if self.state == "finished" else number(self.controls["frac"])
        if not total:
            return share, f"step {self.last.get('step', 0):,}"
        unit = COUNTED.get(total["unit"], total["unit"])
        return share, f"{amount(self.last.get('count', 0))} of {amount(total['value'])} {unit}"


def _stretches(odd: list[tuple[float, str]]) -> list[tuple[float, float, str, int]]:
    """First and last tick, what it was, how often: neighbors of one kind are one stretch; the newest twenty."""
    found: list[tuple[float, float, str, int]] = []
    for x, what in odd:
        if found and found[-1][2] == what and x - found[-1][1] <= 20:
            found[-1] = (found[-1][0], x, what, found[-1][3] + 1)
        else:
            found.append((x, x, what, 1))
    return found[-20:]

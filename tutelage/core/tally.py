"""What a stage's training rows come to, summed up while the file is read: memory does not grow with the steps."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

from tutelage.core.words import number

CURVE = 200  # points of a training curve that are kept
PLACES = 4096  # ticks whose time is kept; beyond, every second one, every fourth, …
_COUNTS = ("tick", "step", "tokens", "samples", "epochs", "flops")


@dataclass
class Tally:
    """Sums over training rows. `until` leaves out rows beyond a step."""

    until: int | None = None
    rows: int = 0
    last: dict[str, Any] = field(default_factory=dict)  # counts of the newest row
    slots: float = 0.0  # positions, padding included
    padded: float = 0.0
    memory: float | None = None  # the most bytes that were held
    grown: float = 0.0  # tokens trained on, those that a rollback took back too
    seconds: float = 0.0  # of training up to the newest row
    loss: list[list[float]] = field(default_factory=list)  # bins: tokens at the end, sum of losses, rows
    _shares: dict[str, float] = field(default_factory=dict)
    _before: float = 0.0  # seconds of processes that are gone
    _process: float = 0.0  # of the newest one
    _size: int = 1  # rows of a bin of the loss
    _ticks: list[float] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)
    _stride: int = 1

    def __len__(self) -> int:
        return self.rows

    def add(self, row: dict[str, Any]) -> None:
        """Count a row; they come in the order of the file."""
        here = number(row.get("seconds", 0.0))
        if here < self._process:  # a row's own seconds begin anew when a stage is resumed
            self._before += self._process
        self._process = here
        if self.until is not None and row["step"] > self.until:
            return
        self.seconds = self._before + here
        if self.rows % self._stride == 0:
            self._ticks.append(number(row["tick"]))
            self._times.append(self.seconds)
            if len(self._ticks) > PLACES:
                del self._ticks[1::2], self._times[1::2]
                self._stride *= 2
        self.rows += 1
        more = max(0.0, number(row["tokens"]) - number(self.last.get("tokens", 0.0)))
        self.grown += more
        for name, share in row.get("weights", {}).items():
            self._shares[name] = self._shares.get(name, 0.0) + more * number(share)
        if "memory_peak" in row:
            self.memory = max(self.memory or 0.0, number(row["memory_peak"]))
        places = row["rows"] * row["length"]
        self.slots, self.padded = self.slots + places, self.padded + number(row["padding"]) * places
        self.last = {key: row[key] for key in _COUNTS if key in row}
        self._bin(number(row["tokens"]), number(row["loss"]))

    def _bin(self, tokens: float, loss: float) -> None:
        if self.loss and self.loss[-1][2] < self._size:
            part = self.loss[-1]
            part[0], part[1], part[2] = tokens, part[1] + loss, part[2] + 1
            return
        if len(self.loss) == CURVE:  # half as many, twice as wide
            pairs = zip(self.loss[::2], self.loss[1::2], strict=True)
            self.loss = [[b[0], a[1] + b[1], a[2] + b[2]] for a, b in pairs]
            self._size *= 2
        self.loss.append([tokens, loss, 1])

    def curve(self) -> list[list[float]]:
        """Tokens and training loss, means over neighbors where there are more than can be seen."""
        return [[tokens, total / rows] for tokens, total, rows in self.loss]

    def shares(self) -> dict[str, float]:
        """Mean share of each source over the steps, by tokens."""
        return {name: total / self.grown for name, total in self._shares.items()} if self.grown else {}

    def at(self, tick: float) -> float:
        """Seconds of training up to a tick; to within a few rows in a very long stage."""
        if self.last and tick >= number(self.last["tick"]):
            return self.seconds
        found = bisect_right(self._ticks, tick)
        return self._times[found - 1] if found else 0.0

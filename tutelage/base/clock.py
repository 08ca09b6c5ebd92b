"""Where a stage stands: ticks, steps, tokens; and spans such as `20Mtok` or `10%` measured against them."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from tutelage.base.errors import UserError

UNITS = {
    "step": ("step", "steps"),
    "tok": ("tok", "toks", "token", "tokens"),
    "sample": ("sample", "samples", "example", "examples", "row", "rows"),
    "epoch": ("epoch", "epochs", "ep"),
    "min": ("min", "mins", "minute", "minutes"),
    "flop": ("flop", "flops"),
    "%": ("%",),
}
_UNIT = {spelling: unit for unit, spellings in UNITS.items() for spelling in spellings}
_SCALE = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15}
_SPAN = re.compile(
    r"\s*([0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([kMGBTP]?)\s*([A-Za-z%]+)\s*"
)


@dataclass(frozen=True, slots=True)
class Span:
    """A length of training: `500step`, `20Mtok`, `1epoch`, `10min`, `1e13flop`, `10%`."""

    value: float
    unit: str

    @staticmethod
    def parse(text: Any) -> Span:
        """Read a span; a bare number counts steps. UserError names what was meant."""
        if isinstance(text, Span):
            return text
        if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
            return Span(float(text), "step")
        found = _SPAN.fullmatch(text) if isinstance(text, str) else None
        unit = _UNIT.get(found[3].lower()) if found else None
        value = float(found[1]) * _SCALE[found[2]] if found else math.inf
        value = 0.0 if value < 1e-300 else value  # nothing can be divided by a percent of it
        if not found or not unit or not math.isfinite(value):
            raise UserError(
                f"'{text}' is not a span: write for example 500step, 20Mtok, 1epoch, 10min, 1e13flop or 10%"
            )
        return Span(value, unit)

    def __str__(self) -> str:
        """The shortest text that reads back as this very span: `820ktok`, but `16384tok`."""
        return _shortest(self)

    @property
    def share(self) -> float:
        """A percent span as a fraction."""
        assert self.unit == "%", self
        return self.value / 100


@lru_cache(4096)
def _shortest(span: Span) -> str:
    letters = ("",) if span.unit in ("%", "min", "epoch") else ("", "k", "M", "G", "T")
    texts = [
        f"{number}{a}{span.unit}" for a in letters for number in _numbers(span.value / _SCALE[a]) if span.value >= 0
    ]
    return min((text for text in texts if Span.parse(text) == span), key=len, default=f"{span.value!r}{span.unit}")


def _numbers(value: float) -> tuple[str, str]:
    return f"{value:.12g}", repr(value)


def _span(value: Any) -> Span:
    try:
        return Span.parse(value)
    except UserError as error:
        raise ValueError(str(error)) from error


SpanField = Annotated[Span, BeforeValidator(_span), PlainSerializer(str)]
"""A pydantic field that reads and writes spans as text."""


@dataclass(slots=True)
class Clock:
    """Counts since the stage began. `tick` only rises; `step` and what follows it may be set back by a rollback.

    `flops` counts work of every kind and is never set back. `epochs` counts passes over the largest source.
    `total` holds what each unit is expected to reach when the stage ends, so that percent spans and schedules
    are plain arithmetic; `origin` is what was counted before this stage when the schedule was carried along.
    """

    tick: int = 0
    step: int = 0
    tokens: int = 0
    samples: int = 0
    epochs: float = 0.0
    flops: float = 0.0
    total: dict[str, float] = field(default_factory=dict)
    origin: dict[str, float] = field(default_factory=dict)

    def count(self, unit: str) -> float:
        """How much of a unit has passed since the stage began."""
        names = {"step": "step", "tok": "tokens", "sample": "samples", "epoch": "epochs", "flop": "flops"}
        return float(getattr(self, names[unit]))

    @property
    def until(self) -> str:
        """The unit in which the end of the stage is written."""
        return str(next(iter(self.total), "step"))

    @property
    def frac(self) -> float:
        """Share of the schedule done, in [0, 1]; counts from the schedule's origin."""
        unit = self.until
        whole = self.total.get(unit, 0.0) + self.origin.get(unit, 0.0)
        return min(1.0, (self.count(unit) + self.origin.get(unit, 0.0)) / whole) if whole else 0.0

    def passed(self, span: Span) -> float:
        """How much of `span` has passed since the schedule's origin: 0 at the start, 1 when it is over, and on."""
        if span.value == 0:
            return math.inf
        if span.unit == "%":
            return self.frac / span.share
        return (self.count(span.unit) + self.origin.get(span.unit, 0.0)) / span.value

    def left(self, span: Span) -> float:
        """How many `span`s are left before the stage ends: 1 at the moment that the last span begins, 0 at the end."""
        if span.value == 0:
            return math.inf
        if span.unit == "%":
            return (1.0 - self.frac) / span.share
        if span.unit not in self.total:
            raise UserError(
                f"the length of this stage in {span.unit} is not known, so '{span}' before its end is not either"
            )
        return (self.total[span.unit] - self.count(span.unit)) / span.value

    def reached(self) -> bool:
        """Whether the stage is over."""
        return self.count(self.until) >= self.total[self.until] - 1e-9

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def copy(self) -> Clock:
        return replace(self, total=dict(self.total), origin=dict(self.origin))

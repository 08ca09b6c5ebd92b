"""Spans and the clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tutelage.base.clock import UNITS, Clock, Span, SpanField
from tutelage.base.errors import UserError


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("500step", 500, "step"),
        ("20Mtok", 20e6, "tok"),
        ("1epoch", 1, "epoch"),
        ("10min", 10, "min"),
        ("1e13flop", 1e13, "flop"),
        ("10%", 10, "%"),
        ("12.5%", 12.5, "%"),
        ("128ktok", 128e3, "tok"),
        ("128 ktokens", 128e3, "tok"),
        ("3 Epochs", 3, "epoch"),
        ("1Brow", 1e9, "sample"),
        (".5epoch", 0.5, "epoch"),
        (700, 700, "step"),
    ],
)
def test_a_span_is_read(text: str | int, value: float, unit: str) -> None:
    assert Span.parse(text) == Span(value, unit)


@pytest.mark.parametrize("text", ["", "step", "5", "1.2.3step", "-1step", "5parsec", "1e999step", -1, True, 0.5, None])
def test_what_is_no_span_is_refused_with_examples(text: object) -> None:
    with pytest.raises(UserError, match=r"is not a span: write for example 500step, 20Mtok"):
        Span.parse(text)


def test_a_span_is_written_as_a_person_would() -> None:
    texts = ["16384tok", "820ktok", "20Mtok", "500step", "1epoch", "10min", "10%", "0step", "12.5%"]
    assert [str(Span.parse(text)) for text in texts] == texts


@given(st.just(0.0) | st.floats(1e-299, 1e25), st.sampled_from(sorted(UNITS)))
def test_a_span_reads_back_to_the_bit(value: float, unit: str) -> None:
    span = Span(value, unit)
    assert Span.parse(str(span)) == span


def test_a_span_too_small_to_divide_by_is_none_at_all() -> None:
    assert Span.parse("1e-301%") == Span(0.0, "%") and Span.parse("1e-323step") == Span(0.0, "step")


def test_a_field_takes_text_and_writes_text() -> None:
    adapter = TypeAdapter(SpanField)
    assert adapter.validate_python("2ktok") == Span(2000, "tok")
    assert adapter.dump_python(Span(2000, "tok")) == "2ktok"


def test_a_clock_measures_spans_from_the_schedules_origin() -> None:
    clock = Clock(step=30, tokens=3000, total={"step": 100, "tok": 10000})
    assert clock.frac == pytest.approx(0.3)
    assert clock.passed(Span(10, "%")) == pytest.approx(3)
    assert clock.passed(Span(60, "step")) == pytest.approx(0.5)
    assert clock.left(Span(20, "%")) == pytest.approx(3.5)
    assert clock.left(Span(7000, "tok")) == pytest.approx(1)
    carried = Clock(step=30, total={"step": 100}, origin={"step": 100})
    assert carried.frac == pytest.approx(0.65)
    assert carried.passed(Span(65, "step")) == pytest.approx(2)


def test_a_span_of_nothing_has_always_passed() -> None:
    assert Clock(total={"step": 10}).passed(Span(0, "step")) == math.inf


def test_the_end_is_not_known_in_every_unit() -> None:
    with pytest.raises(UserError, match="length of this stage in flop is not known"):
        Clock(total={"step": 10}).left(Span(1e9, "flop"))


def test_a_stage_ends_when_its_own_unit_is_full() -> None:
    clock = Clock(step=9, total={"step": 10, "tok": 5}, tokens=5)
    assert not clock.reached()
    clock.step = 10
    assert clock.reached()


def test_a_copy_shares_nothing() -> None:
    clock = Clock(total={"step": 10})
    other = clock.copy()
    other.total["step"] = 20
    other.step = 3
    assert (clock.total["step"], clock.step) == (10, 0)
    assert Clock(**clock.state()) == clock

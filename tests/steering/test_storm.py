"""Random requests, half of them wrong: the stage lives, each is answered, each accepted one is seen."""

from __future__ import annotations

from pathlib import Path

from tests.steering.storm import storm


def test_a_storm_of_requests_hurts_nothing_and_each_is_answered_rightly(tmp_path: Path) -> None:
    found = storm(tmp_path, count=250, seed=1)
    assert found.wrong == []
    assert found.counts["valid applied"] + found.counts["invalid refused"] == 250
    assert found.counts["valid applied"] > 90


def test_requests_of_several_actions_asked_dry_show_what_they_then_do(tmp_path: Path) -> None:
    found = storm(tmp_path, count=120, seed=2, several=True)
    assert found.wrong == []
    assert found.counts["applied"] > 60

"""A kill with actions in flight: each accepted action holds exactly once, and the end is that of the replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.steering.kills import counting, survived

MOMENTS = 6


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> int:
    return counting(0, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_kill_with_actions_in_flight_loses_and_doubles_nothing(moment: int, calls: int, tmp_path: Path) -> None:
    assert survived(tmp_path, 5 + round((calls - 10) * (moment + 0.5) / MOMENTS)) == []

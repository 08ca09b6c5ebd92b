"""A wish to stop is never lost: not between stages, not while one is built; and it outlives no graph."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.toy import graph
from tutelage.core import loop
from tutelage.core import run as running
from tutelage.core.run import SIGNALS, run_graph


@pytest.mark.parametrize("jobs", [1, 0], ids=["forked", "here"])
def test_a_wish_between_stages_begins_no_other(jobs: int, tmp_path: Path) -> None:
    def tell(stage: str, said: dict[str, Any]) -> None:
        if "finished" in said:
            os.kill(os.getpid(), signal.SIGTERM)

    result = run_graph(graph(tmp_path), only=None, jobs=jobs, drift="refuse", tell=tell)
    assert (result.done, result.stopped, result.failed) == (["one"], ["two"], {})
    assert not (tmp_path / "runs/toy/two").exists()
    again = run_graph(graph(tmp_path), only=None, jobs=jobs, drift="refuse", tell=lambda stage, said: None)
    assert (again.reused, again.done) == (["one"], ["two"])


@pytest.mark.parametrize("jobs", [1, 0], ids=["forked", "here"])
def test_a_wish_while_a_stage_is_built_ends_it(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU stages run in the command's own process, the second one after the first one's loop has heard signals."""
    build = running.build

    def slow(node: Any, **kwargs: Any) -> Any:
        if node.name == "one":
            return build(node, **kwargs)
        os.kill(os.getppid() if jobs else os.getpid(), signal.SIGTERM)
        time.sleep(30)
        raise AssertionError("nobody stopped it")

    monkeypatch.setattr(running, "build", slow)
    began = time.monotonic()
    result = run_graph(graph(tmp_path), only=None, jobs=jobs, drift="refuse", tell=lambda stage, said: None)
    assert (result.done, result.stopped, result.failed) == (["one"], ["two"], {})
    assert time.monotonic() - began < 25


def test_a_wish_too_late_for_the_loop_is_heard_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = loop.measure

    def last(run: Any, *, final: bool = False) -> None:
        measure(run, final=final)
        if final:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "measure", last)
        result = run_graph(graph(tmp_path), only="one", jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert (result.done, result.stopped) == ([], ["one"])
    again = run_graph(graph(tmp_path), only="one", jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert again.done == ["one"]


@pytest.mark.parametrize("jobs", [1, 0], ids=["forked", "here"])
def test_what_signals_did_before_they_do_again(jobs: int, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    run_graph(graph(tmp_path, steps=1), only="one", jobs=jobs, drift="refuse", tell=lambda stage, said: None)
    assert [signal.getsignal(number) for number in SIGNALS] == before

"""`engine: {compile: true}` on a CPU: it learns what the plain run learns, and says at once what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder, exc

from tests.toy import graph, numbers
from tutelage.base.errors import UserError
from tutelage.core import loop
from tutelage.core.run import run_graph
from tutelage.look import digest_of


def compiled(recipe: dict[str, Any]) -> None:
    recipe["stages"]["one"]["save"] = {"every": "2step"}
    recipe["stages"]["one"] |= {"engine": {"device": "cpu", "micro": 4, "compile": True}, "evals": {"run": []}}


def run(folder: Path, change: Any) -> Any:
    built = graph(folder, steps=4, change=change)
    return run_graph(built, only="one", jobs=0, drift="refuse", tell=lambda stage, said: None)


def test_a_machine_without_a_compiler_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(
        UserError, match=r"stages.one.engine.compile: .* needs a C\+\+ compiler .*: install g\+\+ .*leave"
    ):
        run(tmp_path, compiled)
    assert not list(tmp_path.glob("runs/.data/*/meta.json")), "said before the data are read"


@pytest.mark.slow
def test_a_compiled_stage_learns_the_same_and_a_cut_one_retraces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        pytest.skip("no C++ compiler here: torch.compile cannot be tried")
    torch._dynamo.reset()
    counters.clear()
    assert run(tmp_path / "whole", compiled).done == ["one"]
    assert counters["stats"]["unique_graphs"] > 0, "it was compiled"

    def plain(recipe: dict[str, Any]) -> None:
        compiled(recipe)
        recipe["stages"]["one"]["engine"]["compile"] = False

    run(tmp_path / "plain", plain)
    losses = {
        name: [row["loss"] for row in numbers(tmp_path / name / "runs/toy/one/1", kind="train")]
        for name in ("whole", "plain")
    }
    assert losses["whole"] == pytest.approx(losses["plain"], rel=1e-4)
    record = loop.record

    def stopping(at: Any, *args: Any, **kwargs: Any) -> None:
        record(at, *args, **kwargs)
        if at.clock.step == 3:
            raise loop.Stopped("test")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "record", stopping)
        assert run(tmp_path / "cut", compiled).stopped == ["one"]
    assert run(tmp_path / "cut", compiled).done == ["one"]
    assert digest_of(tmp_path / "cut/runs/toy/one/1") == digest_of(tmp_path / "whole/runs/toy/one/1")

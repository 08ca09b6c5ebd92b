"""`engine: {compile: true}` on a CPU: it learns what the plain run learns, and says at once what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import cpp_builder, exc

from tests.toy import graph, numbers
from tutelage.base.errors import UserError
from tutelage.core import loop
from tutelage.core.run import run_graph
from tutelage.look import digest_of

ONE = "runs/toy/one/1"


def compiled(recipe: dict[str, Any]) -> None:
    recipe["stages"]["one"]["save"] = {"every": "2step"}
    recipe["stages"]["one"] |= {"engine": {"device": "cpu", "micro": 4, "compile": True}, "evals": {"run": []}}


def run(folder: Path, change: Any) -> Any:
    built = graph(folder, steps=8, change=change)
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


class Backend:
    """Takes the graphs that torch finds in the model and runs them as they are: what is compiled is seen, without a compiler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        compile = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend=self))
        torch._dynamo.reset()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def products(self) -> list[int]:
        """Linear layers of each graph."""
        return [sum("linear" in str(node.target) for node in graph.graph.nodes) for graph in self.graphs]


def test_a_compiled_stage_learns_the_same_over_rows_of_several_lengths_and_a_cut_one_retraces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(recipe: dict[str, Any]) -> None:
        compiled(recipe)
        recipe["stages"]["one"]["curriculum"] = {"use": "curriculum/length_buckets", "shortest": 16, "cycles": 2}
        recipe["stages"]["one"]["length"] = 64

    def plain(recipe: dict[str, Any]) -> None:
        change(recipe)
        recipe["stages"]["one"]["engine"]["compile"] = False

    backend = Backend(monkeypatch)
    assert run(tmp_path / "whole", change).done == ["one"]
    blocks = backend.products().count(14)  # of two blocks, as one graph
    assert 0 < blocks <= 4, "no more often than for each length, and once without gradients"
    run(tmp_path / "plain", plain)
    rows = {name: numbers(tmp_path / name / ONE, kind="train") for name in ("whole", "plain")}
    assert len({row["length"] for row in rows["whole"]}) == 3
    losses = {name: [row["loss"] for row in found] for name, found in rows.items()}
    assert losses["whole"] == pytest.approx(losses["plain"], rel=1e-4)
    record = loop.record

    def stopping(at: Any, *args: Any, **kwargs: Any) -> None:
        record(at, *args, **kwargs)
        if at.clock.step == 3:
            raise loop.Stopped("test")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "record", stopping)
        assert run(tmp_path / "cut", change).stopped == ["one"]
    torch._dynamo.reset()
    assert run(tmp_path / "cut", change).done == ["one"]
    assert digest_of(tmp_path / "cut" / ONE) == digest_of(tmp_path / "whole" / ONE)

"""Two processes, as torchrun starts them, run a recipe as one process does, and stop as one."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import graph, numbers
from tutelage.core import artifact
from tutelage.core.artifact import load_tensors
from tutelage.core.record import read_lines
from tutelage.core.run import STOPPED, run_graph

Change = Callable[[dict[str, Any]], None]


def staged(recipe: dict[str, Any]) -> None:
    """Data that a model writes, training with what is replayed and distilled, a merge and a table."""
    stages = recipe["stages"]
    small = {"length": 32, "engine": {"device": "cpu"}, "evals": stages["one"]["evals"]}
    for stage in (stages["one"], stages["two"]):
        stage["optim"]["eps"] = 1e-2  # so that Adam does not enlarge what is rounding
        stage["batch"] = "7sample"  # parts of two sizes
    stages["two"]["methods"] = [
        {"use": "continual/lwf", "strength": 0.5},
        {"use": "continual/replay", "of": "one", "rate": 0.25},
    ]
    stages["two"]["evals"] = {**stages["two"]["evals"], "every": "2step", "budget": "1%"}
    stages["written"] = {"start": "one", "make": {"use": "synth/self_samples", "passages": 8, "length": 16}, **small}
    stages["three"] = {**stages["two"], "start": "two", "data": {"own": {"stage": "written", "val": "20%"}}}
    stages["three"]["methods"] = []
    stages["three"]["until"] = "2epoch"
    stages["merged"] = {"start": ["two", "three"], "apply": "merge/linear", **small}
    stages["table"] = {"measure": ["probe/bits_per_byte"], "of": ["one", "merged"], **small}


def ranks(
    folder: Path, *, change: Change, steps: int, meanwhile: Callable[[list[int]], None] | None = None
) -> list[int]:
    """Run the recipe in two processes forked from here; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os._exit(_rank(rank, port, folder, change, steps))
        pids.append(pid)
    if meanwhile:
        meanwhile(pids)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _rank(rank: int, port: int, folder: Path, change: Change, steps: int) -> int:
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        made = graph(folder, steps=steps, change=change)
        result = run_graph(made, only=None, jobs=None, drift="refuse", tell=lambda stage, said: None)
        torch.distributed.destroy_process_group()
        return STOPPED if result.stopped else 0
    except BaseException:
        import traceback

        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        return 1


def errors(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("error*.txt")))


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_tensors(folder / f"runs/toy/{stage}/1/artifact/model/model.safetensors")


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes would share one GPU")
def test_two_processes_make_what_one_makes(tmp_path: Path) -> None:
    alone = graph(tmp_path / "alone", steps=5, change=staged)
    result = run_graph(alone, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert len(result.done) == 6
    (tmp_path / "both").mkdir()
    assert ranks(tmp_path / "both", change=staged, steps=5) == [0, 0], errors(tmp_path / "both")
    for stage in ("one", "two", "three", "merged"):
        mine, theirs = weights(tmp_path / "both", stage), weights(tmp_path / "alone", stage)
        assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in theirs), stage
    for stage in ("one", "two", "three"):
        folders = [tmp_path / which / f"runs/toy/{stage}/1" for which in ("both", "alone")]
        ours, others = (numbers(folder, kind="train") for folder in folders)
        for row, other in zip(ours, others, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
            for key in ("tick", "step", "tokens", "samples", "epochs", "counted", "cursors", "weights", "lr"):
                assert row[key] == other[key], key
            assert row["flops"] == pytest.approx(other["flops"], rel=0.5)
    rows = [
        json.loads((tmp_path / which / "runs/toy/table/1/artifact/table/table.json").read_text())
        for which in ("both", "alone")
    ]
    assert rows[0].keys() == rows[1].keys() == {"one", "merged"}
    for name, row in rows[1].items():
        assert row and rows[0][name] == pytest.approx(row, abs=1e-4)


def slow(recipe: dict[str, Any]) -> None:
    del recipe["stages"]["two"]
    recipe["stages"]["one"] |= {"save": {"every": "10min"}, "engine": {"device": "cpu"}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes would share one GPU")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_asked_of_one_rank_stops_both_and_both_go_on(rank: int, tmp_path: Path) -> None:
    home = tmp_path / "runs/toy/one/1"

    def ask(pids: list[int]) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until and len(read_lines(home / "metrics.jsonl")) < 5:
            time.sleep(0.02)
        os.kill(pids[rank], signal.SIGTERM)

    steps = 400
    assert ranks(tmp_path, change=slow, steps=steps, meanwhile=ask) == [STOPPED, STOPPED], errors(tmp_path)
    rows = numbers(home, kind="train")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "one rank writes"
    assert int(artifact.states(home / "state")[-1].name) == len(rows) < steps
    if rank:
        return
    shorter = {"by": "ada", "do": [{"do": "end_stage"}]}
    (home / "requests").mkdir(exist_ok=True)
    (home / "requests/enough.json").write_text(json.dumps(shorter))
    assert ranks(tmp_path, change=slow, steps=steps) == [0, 0], errors(tmp_path)
    assert numbers(home)[-1]["step"] == len(rows)
    assert "ada" in [line["by"] for line in read_lines(home / "journal.jsonl")]

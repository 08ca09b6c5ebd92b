"""From the command to a stage: the files on the way are those that docs/architecture.md lists, and no stage stays behind."""

from __future__ import annotations

import gc
import re
import traceback
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from tests.toy import graph
from tutelage import cli
from tutelage.core import run as running
from tutelage.modalities.text import toy

ROOT = Path(cli.__file__).resolve().parent


def test_from_run_to_the_first_step_are_the_five_files_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain: list[str] = []
    step = torch.optim.AdamW.step

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not chain:
            files = [Path(frame.filename) for frame in traceback.extract_stack()]
            chain.extend(dict.fromkeys(str(f.relative_to(ROOT)) for f in files if ROOT in f.parents))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy.recipe(tmp_path / "data", steps=1)))
    command = ["run", str(tmp_path / "toy.yaml"), "--only", "one", "--jobs", "0", "--runs", str(tmp_path / "runs")]
    try:
        cli.app(command, standalone_mode=False)
    except typer.Exit as done:
        assert done.exit_code == 0
    page = (ROOT.parent / "docs/architecture.md").read_text(encoding="utf-8")
    section = page.split("## From `run` to the first optimizer step")[1].split("##")[0]
    assert chain == re.findall(r"^\| `([\w/]+\.py)", section, re.MULTILINE)
    assert len(chain) <= 5


def test_a_stage_is_gone_when_the_next_is_built_in_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU two stages' weights and optimizers would lie there at once, which halves what fits."""
    build, models = running.build, []

    def seen(node: Any, **kwargs: Any) -> Any:
        assert [ref() for ref in models if ref() is not None] == []
        run = build(node, **kwargs)
        models.append(weakref.ref(run.engine.model))
        return run

    monkeypatch.setattr(running, "build", seen)
    gc.disable()  # or it might come by at the right moment
    try:
        running.run_graph(graph(tmp_path, steps=2), only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    finally:
        gc.enable()
    assert len(models) == 2

"""How far it is from the command to an optimizer's step: the files that docs/architecture.md lists, and no more."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from tutelage import cli
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

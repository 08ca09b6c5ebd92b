"""What help costs: the command line answers before torch or any method is imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "tutelage.methods", "tutelage.core")


def imported(*command: str) -> set[str]:
    """Modules that a fresh interpreter imports for a command."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in lines}


@pytest.mark.skipif(importlib.util.find_spec("tutelage.cli") is None, reason="there is no command line")
def test_help_imports_neither_torch_nor_methods() -> None:
    found = imported("-m", "tutelage", "--help")
    assert "tutelage.cli" in found
    assert {name for name in found if name in HEAVY or name.startswith("tutelage.methods.")} == set()


def test_papers_are_listed_with_their_verdicts_without_torch_and_numpy() -> None:
    found = imported("-m", "tutelage", "papers")
    assert "tutelage.claims" in found
    heavy = {"torch", "transformers", "numpy", "scipy"}
    assert {name for name in found if name in heavy or name.startswith("tutelage.methods.")} == set()


def test_loading_a_recipe_imports_neither_torch_nor_methods() -> None:
    code = "from tutelage.base.load import load; load('recipes/quickstart/demo.yaml')"
    found = imported("-c", code)
    assert "tutelage.base.load" in found
    assert {name for name in found if name in HEAVY or name.startswith("tutelage.methods.")} == set()

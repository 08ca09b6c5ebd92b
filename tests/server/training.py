"""Trains the toy for a long while, as a person would start it: `python -m tests.server.training HOME RUNS`."""

from __future__ import annotations

import sys
from pathlib import Path

from tutelage.base import load
from tutelage.command import run_recipe
from tutelage.modalities.text import toy


def main(home: Path, runs: Path) -> None:
    recipe = toy.recipe(home / "data", model="llama", steps=200_000)
    recipe["stages"]["one"]["save"] = {"every": "50step"}
    path = home / "toy.yaml"
    path.write_text(load.dump(load.load(recipe)), encoding="utf-8")
    run_recipe(path, sets=[], only="one", jobs=0, reuse=False, retrain=False, runs=runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

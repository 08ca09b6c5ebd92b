"""Trains the toy for a long while, as a person would start it: `python -m tests.server.training HOME RUNS`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tutelage.base import load
from tutelage.base.method import Method
from tutelage.command import run_recipe
from tutelage.modalities.text import toy


class Slow(Method):
    """Leaves the browser some of the machine."""

    no_off = "it changes nothing"

    def act(self, view: Any) -> list[dict[str, Any]]:
        """No action."""
        time.sleep(0.05)
        return []


def main(home: Path, runs: Path) -> None:
    recipe = toy.recipe(home / "data", model="llama", steps=200_000)
    recipe["stages"]["one"]["save"] = {"every": "50step"}
    recipe["stages"]["one"]["methods"] = [{"use": "tests.server.training:Slow"}]
    path = home / "toy.yaml"
    path.write_text(load.dump(load.load(recipe)), encoding="utf-8")
    run_recipe(path, sets=[], only="one", jobs=0, reuse=False, retrain=False, runs=runs)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""The process of one twin of a try: `python -m tutelage.twins TWIN STAGE` goes on in a copy of a stage's folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch

from tutelage.base.errors import UserError
from tutelage.base.spec import Stage
from tutelage.core.run import run_stage, threads
from tutelage.core.shard import World
from tutelage.look import node_of
from tutelage.watching import read


def run(folder: Path, of: Path) -> None:
    """Run the stage `of` in `folder`, as `folder`'s own stage.json has it; nobody outside is told of its numbers."""
    about = read(folder / "stage.json")
    assert about is not None
    node = node_of(of)
    node.folder, node.stage = folder, Stage.model_validate(about["stage"])
    node.fingerprint, node.parts = about["fingerprint"], about["parts"]
    node.graph.recipe.report_to = []
    torch.set_num_threads(threads(node))
    run_stage(node, world=World(), say=lambda said: None)


if __name__ == "__main__":
    sys.path.append(str(Path.cwd()))  # a recipe may name a method of the user's own
    try:
        run(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None

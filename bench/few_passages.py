"""Some kilobytes of each task: fit multiples of task vectors on them (merge/anisotropic), or train all weights on them?

Either side has models of the three tasks and the same text, reads it as often (60 steps of four rows a task, of fewer
where the text is less) and is tuned. The one learns a multiple for each parameter of each task vector; the other trains
all weights, from the models' sum at one scale or from their base, whichever is better.

Writes bench/results/few_passages.json and prints the differences. Run from the repository's root:
`python -m bench.few_passages`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.instructions import Instructions
from bench.records import Records
from tutelage import bench, claims
from tutelage.base.method import Bench
from tutelage.core import stats
from tutelage.core.record import write_whole
from tutelage.modalities.text import stdlib
from tutelage.modalities.text.stdlib import Split

RESULTS = claims.RESULTS / "few_passages.json"
PIECE = 480  # bytes of a piece of code, about a row of 128 tokens
TASKS = ("code", "asked", "records")
STEPS, ROWS = 60, 4  # rows of each task in a step
KEEP = ("date", "metric", "bench", "tuning", "seeds", "values", "measures", "cost", "difference", "versions")
ANEW = 1  # seed of instructions and records: no record is one of the measured; instructions are few, half of them were there


class Few:
    """The first `kilobytes` of a task: instructions or records drawn anew, or pieces of the code that models are trained on."""

    def __init__(self, task: str, kilobytes: float = 6.0) -> None:
        made: dict[str, Callable[[], Iterator[dict[str, str]]]] = {
            "code": pieces,
            "asked": lambda: iter(Instructions(2000, seed=ANEW)),
            "records": lambda: iter(Records(2000, seed=ANEW)),
        }
        self.make, self.bytes = made[task], 1000 * kilobytes

    def __iter__(self) -> Iterator[dict[str, str]]:
        have = 0
        for record in self.make():
            yield record
            have += sum(len(text.encode()) for text in record.values())
            if have >= self.bytes:
                return


def pieces(split: Split = "train") -> Iterator[dict[str, str]]:
    """Pieces of modules of the standard library, each from the beginning of a line; modules in an order of chance."""
    rng = random.Random("pieces")
    every = list(stdlib.records("stdlib:code", split))
    for record in rng.sample(every, len(every)):
        lines = record["text"].splitlines(keepends=True)
        text = "".join(lines[rng.randrange(len(lines)) :]) if lines else ""
        if text.strip():
            yield {"text": text.encode()[:PIECE].decode("utf-8", "ignore")}


def compared(kilobytes: float) -> Bench:
    """Both sides, given so many kilobytes of each task."""
    data: dict[str, Any] = {}
    for task in TASKS:
        args = {"task": task, "kilobytes": kilobytes}
        data[f"few_{task}"] = {"use": "bench.few_passages:Few", "args": args, "val": 0}
    data["few_asked"]["template"] = True
    return Bench(
        base="recipes/bench/few-passages.yaml",
        arm={"data": data, "apply": {"use": "merge/anisotropic", "steps": STEPS, "rows": ROWS, "passages": 64}},
        baseline={
            "start": "summed",
            "apply": None,
            "data": data,
            "batch": f"{ROWS * len(TASKS)}sample",
            "optim": {"use": "optim/adamw", "lr": 3e-4},
            "schedule": {"use": "schedule/cosine", "warm": "10%", "floor": 0.0},
            "until": f"{STEPS}step",
        },
        metric="bits_per_byte/asked,code,records",
        better="lower",
        margin=0.01,
        tune={"apply.rate": [0.03, 0.1, 0.3], "apply.decay": [0.0, 0.1]},
        tune_baseline={"start": ["summed", "one"], "optim.lr": [1e-4, 3e-4, 1e-3]},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kilobytes", type=float, nargs="+", default=[0.5, 6.0], help="of each task")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = []
    for size in options.kilobytes:
        with tempfile.TemporaryDirectory() as apart:  # a verdict is of a file's own BENCH
            entry = bench.run_bench(
                "merge/anisotropic",
                bench=compared(size),
                seeds=options.seeds,
                runs=options.runs,
                results=Path(apart),
            )
        found.append({"kilobytes": size, **{key: entry[key] for key in KEEP}})
        told = stats.shown(stats.paired(entry["differences"]), digits=4)
        print(f"{size:g} kB a task: multiples fitted, minus all weights trained: {told} bits per byte", flush=True)
    write_whole(options.results, json.dumps(found, indent=1) + "\n")
    print(f"{options.results} is written")


if __name__ == "__main__":
    main()

"""Ten thousand random requests at a live stage, half of them wrong: none is lost, none hurts, each valid one is seen.

python -m bench.random_actions            writes bench/results/random_actions.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from tests.steering.storm import storm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = storm(Path(folder), count=given.count, seed=given.seed)
    entry = {"date": str(date.today()), "count": given.count, "seed": given.seed, "seconds": round(time.perf_counter() - began),
             "outcomes": dict(sorted(found.counts.items())), "wrong": found.wrong[:50]}  # fmt: skip
    path = Path(__file__).parent / "results" / "random_actions.json"
    old = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*old, entry], indent=1) + "\n")
    for name, count in entry["outcomes"].items():
        print(f"{name:<24} {count}")
    print(f"{len(found.wrong)} answered wrongly or not seen", *found.wrong[:10], sep="\n")
    raise SystemExit(bool(found.wrong))


if __name__ == "__main__":
    main()

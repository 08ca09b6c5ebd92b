"""The quickstart recipe with several seeds: does replay take back what a new domain made the model forget?

Writes bench/results/demo_seeds.json and docs/forgetting.svg. Run from the repository's root: `make demo-seeds`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RECIPE = Path("recipes/quickstart/demo.yaml")
RESULTS = Path("bench/results/demo_seeds.json")
PICTURE = Path("docs/forgetting.svg")


def run(seed: int, runs: Path) -> dict[str, Any]:
    """Make every stage with one seed (what is there already is not made again) and gather its numbers."""
    place = Path(f"{runs}-{seed}")
    command = [sys.executable, "-m", "tutelage", "run", str(RECIPE), "--set", f"seed={seed}", "--runs", str(place)]
    done = subprocess.run([*command, "--jobs", "1"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"seed {seed} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    print(f"seed {seed} is done", flush=True)
    return gathered(seed, place)


def gathered(seed: int, place: Path) -> dict[str, Any]:
    """The report's numbers, from the run folders."""
    from tutelage.command import graph_of
    from tutelage.core.report import gather
    from tutelage.core.settle import settle

    graph = graph_of(RECIPE, sets=[f"seed={seed}"], runs=place)
    for node in graph.nodes.values():
        settle(graph, node, drift="refuse")
    return gather(graph)


def summary(reports: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """What the picture and the README are made from: a matrix a seed, the differences of arms, the scale."""
    from tutelage.core.stats import paired
    from tutelage.core.words import amount

    matrix = [report["forgetting_matrix"] for report in reports]
    forgot = {
        arm: [row[arm]["prose"] - row["base"]["prose"] for row in matrix] for arm in ("code--rewarmed", "code--replay")
    }
    back = [with_ - without for without, with_ in zip(forgot["code--rewarmed"], forgot["code--replay"], strict=True)]
    price = [row["code--replay"]["code"] - row["code--rewarmed"]["code"] for row in matrix]
    spent = {name: reports[0]["stages"][name]["tokens"] for name in ("base", "code--replay")}
    return {
        "recipe": str(RECIPE),
        "seeds": seeds,
        "size": f"{amount(reports[0]['parameters'])} parameters",
        "tokens": f"{amount(spent['base'])} tokens of prose, then {amount(spent['code--replay'])} of code",
        "matrix": matrix,
        "forgetting": {arm: paired(values).as_dict() for arm, values in forgot.items()},
        "replay_minus_rewarmed": {"forgetting of prose": paired(back).as_dict(), "code": paired(price).as_dict()},
        "costs": [report["totals"] for report in reports],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-seeds"), help="`-<seed>` is added")
    parser.add_argument("--side-by-side", type=int, default=2)
    options = parser.parse_args()
    with ThreadPoolExecutor(options.side_by_side) as pool:
        reports = list(pool.map(lambda seed: run(seed, options.runs), options.seeds))
    from tutelage.core.pictures import forgetting_seeds

    data = summary(reports, options.seeds)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    forgetting_seeds(data, PICTURE)
    print(f"{RESULTS} and {PICTURE} are written")


if __name__ == "__main__":
    main()

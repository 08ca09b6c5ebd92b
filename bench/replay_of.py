"""What to replay when prose is followed by code: the true data, a proxy, the model's own samples, or nothing?

Every arm trains as many steps on batches of one size, so training takes the same operations; what writing the samples
takes comes on top and is reported. The proxy is prose of another hand, of the samples' size: docstrings of numpy, a
dependency, where the true data are the language reference and the docstrings of the standard library. One rate for all
arms, tuned for none of them.

Writes bench/results/replay_of.json and prints a table. Run from the repository's root: `python -m bench.replay_of`.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

BASE = Path("recipes/bench/two-domains.yaml")
RESULTS = Path("bench/results/replay_of.json")
SHARE = 0.125  # of every batch: one row of eight
LENGTH, BYTES = 128, 4  # tokens of a passage, bytes of a token (about), for the proxy's size
ROWS = 16  # passages that are written at once
ARMS = ("none", "true", "proxy", "self")


def proxy(path: Path, size: int) -> None:
    """Docstrings of numpy, a module a record, in an order of chance, until there are `size` bytes."""
    import numpy

    home = Path(numpy.__file__).parent
    files = [p for p in sorted(home.rglob("*.py")) if "tests" not in p.relative_to(home).parts]
    random.Random(0).shuffle(files)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    lines, have = [], 0
    for file in files:
        nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, kinds)]
        text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))[: size - have]
        if text.strip():
            lines.append(json.dumps({"id": file.relative_to(home).as_posix(), "text": text}) + "\n")
            have += len(text)
        if have >= size:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def recipe(place: Path, *, steps: tuple[int, int], passages: int) -> Path:
    """The base recipe with the four arms, written into the folder of the runs."""
    made = yaml.safe_load(BASE.read_text(encoding="utf-8"))
    one, samples, two = (made["stages"][name] for name in ("one", "samples", "two"))
    beside = place.with_name(f"{place.name}-data") / f"numpy-docstrings-{passages}.jsonl"
    proxy(beside, passages * LENGTH * BYTES)
    one["until"], two["until"] = (f"{count}step" for count in steps)
    samples["make"] = {"use": "synth/self_samples", "passages": passages, "length": LENGTH, "rows": ROWS}
    of = {"true": "previous", "proxy": "proxy", "self": "samples"}
    arms = {name: {"methods": [{"use": "continual/replay", "of": of[name], "rate": SHARE}]} for name in ARMS[1:]}
    arms["proxy"]["keep"] = {"proxy": {"path": str(beside.absolute()), "val": "2%"}}  # type: ignore[assignment]
    two["sweep"] = {"none": {"methods": []}, **arms}
    path = place.with_name(f"{place.name}-data") / "replay_of.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    return path


def run(path: Path, seed: int, runs: Path) -> Path:
    """Make every stage with one seed (what is there already is not made again); returns where."""
    place = Path(f"{runs}-{seed}")
    command = [sys.executable, "-m", "tutelage", "run", str(path), "--set", f"seed={seed}", "--runs", str(place)]
    done = subprocess.run([*command, "--jobs", "1"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"seed {seed} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    print(f"seed {seed} is done", flush=True)
    return place


def gathered(path: Path, seed: int, place: Path) -> dict[str, Any]:
    """By arm: bits per byte at the end, what was forgotten, operations of training and of writing what is replayed."""
    from tutelage.command import graph_of
    from tutelage.core.report import gather
    from tutelage.core.settle import settle

    graph = graph_of(path, sets=[f"seed={seed}"], runs=place)
    for node in graph.nodes.values():
        settle(graph, node, drift="refuse")
    report = gather(graph)
    matrix, stages = report["forgetting_matrix"], report["stages"]
    counts = json.loads((graph.nodes["samples"].artifact / "counts.json").read_text(encoding="utf-8"))
    written = counts["rows"] + counts.get("dropped", 0)
    spent = -(-written // ROWS) * generation(graph.nodes["one"].artifact / "model", seed)
    arms = {}
    for arm in ARMS:
        name = f"two--{arm}"
        arms[arm] = {
            "prose": matrix[name]["prose"],
            "code": matrix[name]["code"],
            "forgetting": matrix[name]["prose"] - matrix["one"]["prose"],
            "training_flops": stages[name]["flops"],
            "generation_flops": float(spent) if arm == "self" else 0.0,
        }
    return {
        "seed": seed,
        "parameters": report["parameters"],
        "before": matrix["one"],
        "samples": counts,
        "tokens": {name: stages[name]["tokens"] for name in ("one", "two--none")},
        "arms": arms,
    }


def generation(model: Path, seed: int) -> int:
    """Operations of writing `ROWS` passages, counted while it is done."""
    from functools import partial

    from transformers import AutoModelForCausalLM

    from tutelage.core.flops import count
    from tutelage.modalities.text import models, tokenizer

    opened, processor = AutoModelForCausalLM.from_pretrained(model), tokenizer.load(str(model))
    settings: dict[str, Any] = {"prompts": [""] * ROWS, "tokens": LENGTH, "seed": seed, "rows": ROWS}
    return count(partial(models.generate, opened, processor, **settings))[1]


def summary(found: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Each arm against none, paired by seed, and every seed's numbers."""
    from tutelage.core.stats import paired

    against = {
        arm: {
            what: paired([one["arms"][arm][what] - one["arms"]["none"][what] for one in found]).as_dict()
            for what in ("forgetting", "code")
        }
        for arm in ARMS[1:]
    }
    forgetting = {arm: paired([one["arms"][arm]["forgetting"] for one in found]).as_dict() for arm in ARMS}
    return {
        "recipe": str(BASE),
        "seeds": options.seeds,
        "steps": options.steps,
        "share": SHARE,
        "passages": options.passages,
        "proxy": "docstrings of numpy",
        "forgetting": forgetting,
        "against_none": against,
        "runs": found,
    }


def table(data: dict[str, Any]) -> str:
    """For the terminal."""
    from tutelage.core.stats import Paired, shown
    from tutelage.core.words import amount

    def told(kept: dict[str, Any]) -> str:
        return shown(Paired(**{k: v for k, v in kept.items() if k != "n"}))

    first, runs = data["runs"][0], data["runs"]
    lines = [
        f"{amount(first['parameters'])} parameters; {amount(first['tokens']['one'])} tokens of prose, then "
        f"{amount(first['tokens']['two--none'])} of code with {data['share']:.1%} replayed; bits per byte",
        f"{'replayed':9} {'forgetting of prose':38} {'code, against none':38} FLOPs, generation included",
    ]
    for arm in ARMS:
        price = "" if arm == "none" else told(data["against_none"][arm]["code"])
        mean = [
            sum(one["arms"][arm][f"{what}_flops"] for one in runs) / len(runs) for what in ("training", "generation")
        ]
        spent = f"{amount(sum(mean))} ({mean[1] / sum(mean):.1%} generation)"
        lines.append(f"{arm:9} {told(data['forgetting'][arm]):38} {price:38} {spent}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/replay-of"), help="`-<seed>` is added")
    parser.add_argument("--side-by-side", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs=2, default=[800, 400], help="of prose, and of code")
    parser.add_argument("--passages", type=int, default=512, help="samples to write; the proxy has their size")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = recipe(options.runs, steps=tuple(options.steps), passages=options.passages)
    with ThreadPoolExecutor(options.side_by_side) as pool:
        places = list(pool.map(lambda seed: run(path, seed, options.runs), options.seeds))
    # one by one: transformers opens no two models at once in one process, weights stay unset
    found = [gathered(path, seed, place) for seed, place in zip(options.seeds, places, strict=True)]
    data = summary(found, options)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(table(data))
    print(f"{options.results} is written")


if __name__ == "__main__":
    main()

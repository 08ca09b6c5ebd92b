"""Merges beside mergekit's: the same folders, settings and (for DARE) draws; and how much memory a streamed merge takes.

    python -m bench.peers.merging [--python PATH]      adds an entry to bench/results/merging.json

PATH is an interpreter that has mergekit (this one when left out); its merges run there through its documented
`run_merge`, see merging_peer.py. Reported: the largest absolute difference of any weight, and, of DARE with each one's own
draws, the share of entries kept and how much of the task vector is left (what one draw leaves of its expectation).
Memory is what merging added to a process of its own at its peak, in multiples of the largest tensor, pages of mapped files
included. The models are Llamas with drawn weights, in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file

from bench.peers.probes_of_merging import apart, digest
from tutelage.base import registry
from tutelage.core.artifact import read_header
from tutelage.core.surgery import Site, transform
from tutelage.methods.merge.dare import kept_of

RESULTS = Path(__file__).parents[1] / "results" / "merging.json"
SEED, STAGE = 0, "merged"
SIZES = [(384, 5), (384, 10), (2048, 4)]  # hidden width, blocks: 9 tensors a block and 3 beside them
Tensors = dict[str, torch.Tensor]

# name: our entry, mergekit's method with its shared parameters, its parameters a model, how many models beside a base
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], list[dict[str, float]], bool]] = {
    "linear": ({"use": "merge/linear", "weights": [0.2, 0.5, 0.3]}, "linear", {},
               [{"weight": w} for w in (0.2, 0.5, 0.3)], False),
    "linear, bare sum": ({"use": "merge/linear", "weights": [0.2, 0.5, 0.7], "normalize": False}, "linear",
                         {"normalize": False}, [{"weight": w} for w in (0.2, 0.5, 0.7)], False),
    "slerp": ({"use": "merge/slerp", "t": 0.3}, "slerp", {"t": 0.3}, [{}, {}], False),
    "task_arithmetic": ({"use": "merge/task_arithmetic", "weights": [0.6, -0.4], "scale": 0.5}, "task_arithmetic",
                        {"lambda": 0.5}, [{"weight": w} for w in (0.6, -0.4)], True),
    "task_arithmetic, normalized": ({"use": "merge/task_arithmetic", "weights": [0.6, 0.9], "normalize": True},
                                    "task_arithmetic", {"normalize": True}, [{"weight": w} for w in (0.6, 0.9)], True),
    "ties": ({"use": "merge/ties", "density": [0.2, 0.5], "weights": [0.6, 1.0], "scale": 0.8}, "ties",
             {"lambda": 0.8}, [{"weight": 0.6, "density": 0.2}, {"weight": 1.0, "density": 0.5}], True),
    "ties, bare sum": ({"use": "merge/ties", "density": 0.3, "normalize": False}, "ties", {"normalize": False},
                       [{"weight": 1.0, "density": 0.3}] * 2, True),
    "dare_linear": ({"use": "merge/dare", "drop": [0.8, 0.5], "rescale": False, "weights": [0.6, 1.0]}, "dare_linear",
                    {"rescale": False}, [{"weight": 0.6, "density": 0.2}, {"weight": 1.0, "density": 0.5}], True),
    "dare_ties": ({"use": "merge/dare", "drop": [0.8, 0.5], "rescale": False, "weights": [0.6, 1.0],
                   "combine": "ties"}, "dare_ties", {"rescale": False},
                  [{"weight": 0.6, "density": 0.2}, {"weight": 1.0, "density": 0.5}], True),
    "dare_linear, rescaled": ({"use": "merge/dare", "drop": 0.5}, "dare_linear", {},
                              [{"weight": 1.0, "density": 0.5}] * 2, True),
    "dare_ties, rescaled": ({"use": "merge/dare", "drop": 0.5, "combine": "ties"}, "dare_ties", {},
                            [{"weight": 1.0, "density": 0.5}] * 2, True),
}  # fmt: skip


# -- models -----------------------------------------------------------------------------------------------------------


def write_models(folder: Path, *, count: int, hidden: int, blocks: int) -> list[Path]:
    """A base and models near it: Llamas with drawn weights, written without ever being models."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=512, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        dtype="float32",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    folders = []
    for i in range(count):
        tensors = {}
        for number, (name, shape) in enumerate(shapes.items()):
            base = torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.05
            near = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * i + number)) * 0.01
            tensors[name] = base + near if i else base
        folders.append(folder / f"model-{i}")
        folders[-1].mkdir(parents=True)
        save_file(tensors, folders[-1] / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folders[-1])
    return folders


def read(folder: Path) -> Tensors:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def masks_of(base: Tensors, models: list[Tensors], entry: dict[str, Any]) -> Tensors:
    """What our DARE keeps, by a digest of the task vector it is kept of."""
    site = Site(SEED, STAGE)
    drops = entry["drop"] if isinstance(entry["drop"], list) else [entry["drop"]] * len(models)
    found = {}
    for i, (model, drop) in enumerate(zip(models, drops, strict=True)):
        for name, tensor in base.items():
            vector = model[name] - tensor
            found[digest(vector)] = kept_of(vector, drop, site.rng(f"drop|{i}|{name}")).to(torch.uint8)
    return found


# -- both systems -----------------------------------------------------------------------------------------------------


def ours(entry: dict[str, Any], folders: list[Path], out: Path) -> None:
    out.mkdir()
    transform(registry.make(entry), folders, out, place="stages.merged", seed=SEED, stage=STAGE)


def config_of(
    method: str, shared: dict[str, Any], each: list[dict[str, float]], folders: list[Path], based: bool
) -> Any:
    """mergekit's configuration of one merge."""
    models: list[dict[str, Any]] = [
        {"model": str(f), "parameters": p} for f, p in zip(folders[based:], each, strict=True)
    ]
    config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32", "parameters": shared}
    if based or method == "slerp":
        config["base_model"] = str(folders[0])
    if based:
        models.insert(0, {"model": str(folders[0])})
    return config


def theirs(python: str, jobs: list[dict[str, Any]], place: Path) -> dict[str, Any]:
    """Its version, and the memory that each of its merges took."""
    file = place / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    peer = Path(__file__).with_name("merging_peer.py")
    ran = subprocess.run([python, str(peer), str(file)], capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"mergekit failed; --python names an interpreter that has it:\n{ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def distance(a: Tensors, b: Tensors) -> float:
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:3]
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def compare(python: str, place: Path) -> tuple[str, dict[str, Any]]:
    """mergekit's version, and the largest difference of any weight, merge by merge."""
    folders = write_models(place / "tiny", count=3, hidden=64, blocks=2)
    tensors = [read(folder) for folder in folders]
    jobs = []
    for number, (entry, method, shared, each, based) in enumerate(CASES.values()):
        starts, masks = folders[: len(each) + based], None
        ours(entry, starts, place / f"ours-{number}")
        if "dare" in method:
            masks = str(place / f"{number}.masks")
            save_file(masks_of(tensors[0], tensors[1:], entry), masks)
        config = config_of(method, shared, each, starts, based)
        jobs.append({"config": config, "out": str(place / f"theirs-{number}"), "masks": masks})
    alone = [{"weight": 1.0, "density": 0.3}]
    config = config_of("dare_linear", {"rescale": False}, alone, folders[:2], True)
    jobs.append({"config": config, "out": str(place / "theirs-alone"), "masks": None})
    ours({"use": "merge/dare", "drop": 0.7, "rescale": False}, folders[:2], place / "ours-alone")
    version = theirs(python, jobs, place)["version"]
    found: dict[str, Any] = {
        case: distance(read(place / f"ours-{number}"), read(place / f"theirs-{number}"))
        for number, case in enumerate(CASES)
    }
    for who in ("ours", "theirs"):
        found[f"dare with draws of its own, {who}"] = kept(tensors, read(place / f"{who}-alone"))
    return version, found


def kept(tensors: list[Tensors], merged: Tensors) -> dict[str, float]:
    """Entries that left the base, those of them that reached the tuned model, and the share of the task vector left."""
    base, tuned = (torch.cat([t[name].flatten() for name in tensors[0]]).double() for t in tensors[:2])
    result = torch.cat([merged[name].flatten() for name in tensors[0]]).double()
    left = result != base
    vector = tuned - base
    return {
        "kept": float(left.double().mean()),
        "kept_whole": float((result[left] - tuned[left]).abs().max()),
        "task_vector_left": float((result - base) @ vector / (vector @ vector)),
    }


# -- memory -----------------------------------------------------------------------------------------------------------

MEMORY: dict[str, tuple[dict[str, Any], str, dict[str, float]]] = {
    "task_arithmetic": ({"use": "merge/task_arithmetic"}, "task_arithmetic", {"weight": 1.0}),
    "ties": ({"use": "merge/ties"}, "ties", {"weight": 1.0, "density": 0.2}),
    "dare_linear": ({"use": "merge/dare"}, "dare_linear", {"weight": 1.0, "density": 0.5}),
}


def memory(python: str, place: Path) -> list[dict[str, Any]]:
    """A base and two models at several sizes: peaks in multiples of the largest tensor."""
    rows = []
    for hidden, blocks in SIZES:
        with tempfile.TemporaryDirectory(dir=place) as inside:
            # in a child, which leaves this process's allocator as it is
            apart(lambda at=inside, h=hidden, b=blocks: write_models(Path(at), count=3, hidden=h, blocks=b))
            folders = [Path(inside, f"model-{i}") for i in range(3)]
            sizes = [about.size for about in read_header(folders[0] / "model.safetensors").values()]
            row: dict[str, Any] = {"tensors": len(sizes), "largest_MB": max(sizes) / 1e6, "model_MB": sum(sizes) / 1e6}
            jobs = [
                {"config": config_of(method, {}, [each] * 2, folders, True), "out": f"{inside}/{name}", "masks": None}
                for name, (_, method, each) in MEMORY.items()
            ]
            peers = theirs(python, jobs, Path(inside))["memory"]
            for (name, (entry, _, _)), peer in zip(MEMORY.items(), peers, strict=True):
                mine = apart(partial(ours, entry, folders, Path(inside, f"{name}-ours")))
                row[name] = {"ours": round(mine / max(sizes), 2), "mergekit": round(peer / max(sizes), 2)}
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has mergekit")
    parser.add_argument("--dry", action="store_true", help="write nothing down")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        version, differences = compare(given.python, Path(place))
        print(json.dumps(differences, indent=1), flush=True)
        rows = memory(given.python, Path(place))
    entry = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "what": "merges of Llamas with drawn weights in float32, beside mergekit's",
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "mergekit": version,
            "transformers": transformers.__version__, "safetensors": safetensors.__version__,
        },
        "largest_difference": differences,
        "peak_memory_in_largest_tensors": rows,
    }  # fmt: skip
    if not given.dry:
        before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
        RESULTS.write_text(json.dumps([*before, entry], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the commands do, once torch may be imported."""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for CUDA must not start it: stages are forked
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from rich.console import Console
from rich.prompt import Prompt

from tutelage import modalities
from tutelage.base import load
from tutelage.base.errors import UserError
from tutelage.core import compare, forward, quantized, report
from tutelage.core.flops import measured_peak
from tutelage.core.graph import Drift, Graph
from tutelage.core.record import write_whole
from tutelage.core.run import STOPPED, Result, run_graph
from tutelage.core.settle import look
from tutelage.core.shard import World
from tutelage.display import Display

console = Console(highlight=False, markup=False)


def graph_of(recipe: Path, *, sets: list[str], runs: Path) -> Graph:
    """Read, check and resolve a recipe."""
    loaded = load.load(recipe, sets=sets)
    return Graph.resolve(loaded, name=recipe.stem, modality=modalities.find(loaded.modality), runs=runs)


def run_recipe(
    recipe: Path, *, sets: list[str], only: str | None, jobs: int | None, reuse: bool, retrain: bool, runs: Path
) -> int:
    """Run, show progress, close with the report. Returns the exit code."""
    if reuse and retrain:
        raise UserError("--reuse and --retrain say opposite things; give one")
    graph = graph_of(recipe, sets=sets, runs=runs)
    forward.check(graph.recipe.report_to)
    quantized.check_library(graph.recipe.stages)
    drift: Any = "reuse" if reuse else "retrain" if retrain else "refuse"
    world = World.join()
    if not world.rank and not (runs / graph.name / "recipe.yaml").exists():  # a killed run can be branched from too
        write_recipe(recipe, sets=sets, home=runs / graph.name)
    peak = 0.0 if torch.cuda.is_available() else _peak_in_child()
    with Display(console if world.rank == 0 else Console(quiet=True, markup=False), peak=peak) as display:
        if drift == "refuse" and world.size == 1 and sys.stdin.isatty() and console.is_terminal:
            drift = partial(ask, display=display)
        result = Result()
        try:
            run_graph(graph, only=only, jobs=jobs, drift=drift, tell=display.tell, result=result)
        except Exception:
            if (result.failed or result.done) and not world.rank:
                with contextlib.suppress(UserError):  # a full disk, say, which is what is told of anyway
                    _report(graph, result, recipe, sets=sets, runs=runs)
            raise
    if world.rank:  # the first says how it ended: a launcher ends all others as soon as one of them is not content
        return 1 if result.failed else 0
    _report(graph, result, recipe, sets=sets, runs=runs)
    again = " ".join(["tutelage", *sys.argv[1:]])
    for name, why in result.failed.items():
        Console(stderr=True, highlight=False, markup=False).print(
            f"error: stage {name}: {why}", soft_wrap=True, style="red"
        )
    if result.failed:
        return 2
    if result.stopped:
        console.print(f"Stopped and saved: {', '.join(result.stopped)}. To go on: {again}", soft_wrap=True)
        return STOPPED
    return 0


def _report(graph: Graph, result: Result, recipe: Path, *, sets: list[str], runs: Path) -> None:
    """Write the report of what is done and what failed, and show it in short."""
    home = runs / graph.name
    write_recipe(recipe, sets=sets, home=home)
    look(graph)
    data = report.write(graph, home, failed=result.failed)
    console.print(report.short(data))
    console.print(f"Report: {home / 'report.html'} (numbers: report.json beside it)", soft_wrap=True)


def ask(found: Drift, *, display: Display) -> str:
    """Show what changed in a stage that is there and ask what to do; Drift again when the answer is neither."""
    with display.paused():
        console.print(found.what, soft_wrap=True, markup=False, style="yellow")
        question = "retrain it beside the old one, reuse what is there, or stop?"
        answer = Prompt.ask(question, choices=["retrain", "reuse", "stop"], default="stop", console=console)
    if answer == "stop":
        raise found
    return answer


def write_recipe(recipe: Path, *, sets: list[str], home: Path) -> None:
    """The recipe as it was run, beside its stages: `show`, `export --step` and `branch` rebuild stages from it."""
    home.mkdir(parents=True, exist_ok=True)
    write_whole(home / "recipe.yaml", load.dump(load.load(recipe, sets=sets)))


def _peak_in_child() -> float:
    """FLOP/s of one thread here, measured in a child: a process that has computed cannot be forked safely."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os.write(write, str(measured_peak("cpu")).encode())
        os._exit(0)
    os.close(write)
    value = os.read(read, 64)
    os.close(read)
    os.waitpid(pid, 0)
    return float(value or 0)


def compare_targets(first: str, second: str, *, seeds: int, runs: Path) -> None:
    """Compare two finished things, or two recipes that are first run with several seeds."""
    places = []
    for target in (first, second):
        if seeds:
            places.append([_seeded(Path(target), seed, runs) for seed in range(1, seeds + 1)])
        else:
            places.append([compare.find(target, runs=runs)])
    data = compare.compare(places[0], places[1], names=(first, second))
    folder = runs / "compare" / f"{Path(first).stem}-{Path(second).stem}"
    compare.write(data, folder)
    console.print(compare.short(data))
    console.print(f"Page: {folder / 'compare.html'}", soft_wrap=True)


def _seeded(recipe: Path, seed: int, runs: Path) -> Path:
    """The last model of a recipe run with a seed; made if it is not there."""
    if not recipe.is_file():
        raise UserError(f"--seeds runs recipes; {recipe} is no file")
    place = runs / f"seed-{seed}"
    code = run_recipe(recipe, sets=[f"seed={seed}"], only=None, jobs=None, reuse=False, retrain=False, runs=place)
    if code:
        raise UserError(f"{recipe} with seed {seed} did not finish")
    return compare.find(recipe.stem, runs=place)

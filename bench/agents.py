"""A rate far too high: is a run that an agent looks after worth more at its end than one left alone, or one with a controller?

The smallest honest test of what Interactive Training (Zhang et al. 2025, arXiv:2510.02297) shows. The agent here is a rule
behind a real OpenAI-compatible endpoint on loopback, NOT a language model: it shows that the way there and back works, not
how well a model steers. What steering costs a step is measured by bench/overhead.py.

Writes bench/results/agents.json. Run from the repository's root: python -m bench.agents
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RECIPE = Path("recipes/steer/too-hot.yaml")
RESULTS = Path("bench/results/agents.json")
STAGE, METRIC = "hot", "bits_per_byte/prose"
FORK = multiprocessing.get_context("fork")
EVERY = 30  # steps between two questions to the agent
ARMS: dict[str, list[str]] = {
    "left alone": [],
    "steer/plateau": ["methods=[{use: steer/plateau, watch: loss, every: 10, patience: 2, factor: 0.5}]"],
    "steer/bold_driver": ["methods=[{use: steer/bold_driver, every: 10}]"],
    "agent (a rule)": [],
    "right rate from the start": ["optim.lr=3e-3"],
}
RULE = f"the rate is halved when the loss fell by less than 1 % between the two halves of the last {EVERY} steps"


# -- the agent --------------------------------------------------------------------------------------------------------


def rule(told: dict[str, Any]) -> dict[str, Any]:
    """What the rule asks for, of the description that `tutelage agent` sends."""
    points = told["last steps"]
    losses = [point["loss"] for point in points if point["loss"] is not None]
    if len(losses) < 4 or told["step"] < EVERY:
        return {"why": "too early to say", "do": []}
    half = len(losses) // 2
    before, after = statistics.fmean(losses[:half]), statistics.fmean(losses[half:])
    bad = any("not_finite" in point for point in points)
    if not bad and after < 0.99 * before:
        return {"why": f"the loss falls, {before:.3f} to {after:.3f}", "do": []}
    return {"why": f"{before:.3f} to {after:.3f}: no progress", "do": [{"do": "scale", "path": "optim.lr", "by": 0.5}]}


class Handler(BaseHTTPRequestHandler):
    """`/v1/chat/completions`, as a model's server answers it."""

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["content-length"])))
        content = json.dumps(rule(json.loads(question["messages"][-1]["content"])))
        message = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        data = json.dumps({"object": "chat.completion", "model": question["model"], "choices": [message]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def free() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def serve(port: int) -> None:
    """The endpoint, until it is killed."""
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


# -- what a run is worth ----------------------------------------------------------------------------------------------


def place_of(arm: str, runs: Path) -> Path:
    """An arm's own runs folder: equal recipes in one folder would share what they made."""
    return runs / arm.replace(" ", "-").replace("/", "-")


def train(arm: str, seed: int, runs: Path) -> None:
    """One run of one arm, in a process of its own."""
    import torch

    from tutelage import modalities
    from tutelage.base import load
    from tutelage.core.graph import Graph
    from tutelage.core.run import run_graph

    torch.set_num_threads(1)
    recipe = load.load(RECIPE, sets=[f"seed={seed}", *(f"stages.{STAGE}.{text}" for text in ARMS[arm])])
    graph = Graph.resolve(recipe, name=f"seed-{seed}", modality=modalities.find("text"), runs=place_of(arm, runs))
    result = run_graph(graph, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    if result.failed:
        raise SystemExit(f"{arm}, seed {seed}: {result.failed}")


def look_after(folder: Path, url: str) -> None:
    """The agent, in a process of its own, from the stage's first moment to its end."""
    from tutelage import agent, steering

    while not steering.live(folder):
        time.sleep(0.05)
    settings = agent.Settings(url, "a-rule", name="rule", every=EVERY)
    asyncio.run(agent.follow(folder, settings, say=lambda said: None))


def make_all(jobs: list[tuple[str, int]], *, runs: Path, url: str, side_by_side: int) -> None:
    """Make every run that is not there yet, a few at a time, each forked from this thread."""
    waiting = [job for job in jobs if not (folder_of(job, runs) / "artifact").exists()]
    at_work: dict[tuple[str, int], list[Any]] = {}
    while waiting or at_work:
        while waiting and len(at_work) < side_by_side:
            job = waiting.pop(0)
            found = [FORK.Process(target=train, args=(*job, runs))]
            if job[0].startswith("agent"):
                found.append(FORK.Process(target=look_after, args=(folder_of(job, runs), url)))
            for process in found:
                process.start()
            at_work[job] = found
        for job, (training, *agents) in list(at_work.items()):
            if not training.is_alive():
                for process in agents:
                    process.join(30)
                    process.kill()
                if not (folder_of(job, runs) / "artifact").exists():
                    raise SystemExit(f"{job[0]}, seed {job[1]} failed with {training.exitcode}")
                print(f"{job[0]}, seed {job[1]}: {outcome(job, runs)}", flush=True)
                del at_work[job]
        time.sleep(0.2)


def folder_of(job: tuple[str, int], runs: Path) -> Path:
    return place_of(job[0], runs) / f"seed-{job[1]}" / STAGE / "1"


def outcome(job: tuple[str, int], runs: Path) -> dict[str, Any]:
    """Bits per byte at a run's end, its last rate, how often it was changed, seconds a step took."""
    from tutelage import brief, steering

    folder = folder_of(job, runs)
    value = brief.evals(folder, last=1)[-1]["values"][METRIC]
    states = [entry["state"] for entry in steering.log(folder)]
    last = brief.latest(folder)
    counts = {state: states.count(state) for state in ("applied", "refused", "waiting")}
    return {"value": value, "last_rate": last["lr"], **counts, "step_seconds": round(last["seconds"] / last["step"], 4)}


def qualities(seeds: list[int], runs: Path, side_by_side: int) -> dict[str, Any]:
    """Every arm with every seed; differences paired by seed."""
    import transformers  # noqa: F401  once, here: every run is forked from this process, which computes nothing itself

    import tutelage.core.run  # noqa: F401
    from tutelage.core.stats import paired

    endpoint = FORK.Process(target=serve, args=(address := free(),), daemon=True)
    endpoint.start()
    url = f"http://127.0.0.1:{address}/v1"
    jobs = [(arm, seed) for seed in seeds for arm in ARMS]
    make_all(jobs, runs=runs, url=url, side_by_side=side_by_side)
    endpoint.kill()
    found = {job: outcome(job, runs) for job in jobs}
    values = {arm: [found[arm, seed]["value"] for seed in seeds] for arm in ARMS}
    against = [("agent (a rule)", "left alone"), ("steer/plateau", "left alone"), ("steer/bold_driver", "left alone"),
               ("agent (a rule)", "steer/plateau"), ("agent (a rule)", "steer/bold_driver"),
               ("agent (a rule)", "right rate from the start")]  # fmt: skip
    return {
        "recipe": str(RECIPE),
        "measure": f"{METRIC} at the end; lower is better",
        "agent": f"a rule behind an OpenAI-compatible endpoint, not a language model: {RULE}",
        "arms": ARMS,
        "seeds": seeds,
        "values": values,
        "runs": {arm: [found[arm, seed] for seed in seeds] for arm in ARMS},
        "differences": {
            f"{one} minus {other}": paired([a - b for a, b in zip(values[one], values[other], strict=True)]).as_dict()
            for one, other in against
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/agents"))
    parser.add_argument("--side-by-side", type=int, default=2)
    options = parser.parse_args()
    data = qualities(options.seeds, options.runs, options.side_by_side)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for what, found in data["differences"].items():
        print(f"{what}: {found['mean']:+.3f} [{found['low']}, {found['high']}]")
    print(f"Wrote {RESULTS}")


if __name__ == "__main__":
    main()

"""Is a run that an agent looks after worth more at its end than one left alone, or one with a controller?

The smallest honest tests of what Interactive Training (Zhang et al. 2025, arXiv:2510.02297) shows. The agents here are rules
behind a real OpenAI-compatible endpoint on loopback, NOT language models: they show that the way there and back works, not
how well a model steers. What steering costs a step is measured by bench/overhead.py. Two regimes:

too hot     A rate thirty times too high. All that there is to see is the loss, which a controller sees as well.
undecoded   From step 40 on a third of every batch is prose that somebody forgot to decode (base64 of compressed text, 6 bits for
            a byte that cannot be foretold). Chosen before any arm was compared, because one loss over all sources cannot say
            which of them is to blame, and the description that every endpoint gets can: it has held-out bits per source.
            The controllers of the rate stand as in the first regime. So that it is not one more lever that wins,
            steer/forgetting_budget gets one on the mixture (replay of prose and code, in all arms at 5 %, otherwise with its
            defaults), and measure and bound of the agent's rule: bits per byte, the worst column above 5. That bound needs
            no trial: an untrained model has 11 bits for a token of about three bytes, and such a delivery about 6
            bits for one byte, once learned. Nothing was tuned in any arm.

Appends to bench/results/agents.json. Run from the repository's root: python -m bench.agents --regime undecoded
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bench import undecoded
from bench.turns import append

RESULTS = Path("bench/results/agents.json")
FORK = multiprocessing.get_context("fork")
EVERY = 30  # steps between two questions to the agent
MOST = 5.0  # bits per byte that text may have
ALONE, AGENT = "left alone", "agent (a rule)"
PLATEAU = "{use: steer/plateau, watch: loss, every: 10, patience: 2, factor: 0.5}"
BOLD = "{use: steer/bold_driver, every: 10}"
BUDGET = f"{{use: steer/forgetting_budget, watch: bits_per_byte, allowed: {MOST}}}"
REPLAY = "{use: continual/replay, rate: 5%}"


# -- the agents -------------------------------------------------------------------------------------------------------


def cool(told: dict[str, Any]) -> dict[str, Any]:
    """The rate is halved when the loss no longer falls. `told`: the description that `tutelage agent` sends."""
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


def sort_out(told: dict[str, Any]) -> dict[str, Any]:
    """A source whose held-out bits stand above `MOST` is drawn from no more; the others share equally."""
    newest = told["measured"][-1] if told["measured"] else {}
    bits = {name: newest.get(f"bits_per_byte/{name}", 0.0) for name in told["sources"]}
    bad = [name for name in bits if bits[name] > MOST]
    drawn = [name for name in bad if told["mix"] is None or told["mix"].get(name)]
    if not drawn or len(bad) == len(bits):
        return {"why": "every source that is drawn from reads like text", "do": []}
    why = ", ".join(f"{name} has {bits[name]:.2f} bits per byte held out" for name in drawn)
    return {"why": why, "do": [{"do": "mix", "weights": {name: 0 if name in bad else 1 for name in bits}}]}


@dataclass(frozen=True)
class Regime:
    """What is compared: arms are `key=value`s of the one stage that is trained, `columns` what the end is worth."""

    recipe: str
    stage: str
    columns: tuple[str, ...]
    rule: Callable[[dict[str, Any]], dict[str, Any]]
    says: str
    arms: dict[str, list[str]]
    prepare: Callable[[], None] | None = None  # writes the data that the recipe names

    def against(self) -> list[tuple[str, str]]:
        """The pairs that are compared: the controllers with nothing, the agent with everything."""
        controllers = [arm for arm in self.arms if arm.startswith("steer/")]
        return [(arm, ALONE) for arm in controllers] + [(AGENT, arm) for arm in self.arms if arm != AGENT]


REGIMES = {
    "too hot": Regime(
        "recipes/steer/too-hot.yaml",
        "hot",
        ("prose",),
        cool,
        f"the rate is halved when the loss fell by less than 1 % between the two halves of the last {EVERY} steps",
        {
            ALONE: [],
            "steer/plateau": [f"methods=[{PLATEAU}]"],
            "steer/bold_driver": [f"methods=[{BOLD}]"],
            AGENT: [],
            "right rate from the start": ["optim.lr=3e-3"],
        },
    ),
    "undecoded": Regime(
        "recipes/steer/undecoded.yaml",
        "fed",
        ("prose", "code"),
        sort_out,
        f"a source with more than {MOST:g} held-out bits per byte gets no share of the mixture any more",
        {
            ALONE: [],
            "steer/plateau": [f"methods=[{REPLAY}, {PLATEAU}]"],
            "steer/bold_driver": [f"methods=[{REPLAY}, {BOLD}]"],
            "steer/forgetting_budget": [f"methods=[{REPLAY}, {BUDGET}]"],
            AGENT: [],
            "never delivered": ["actions=[]"],
        },
        undecoded.write,
    ),
}


class Handler(BaseHTTPRequestHandler):
    """`/v1/chat/completions`, as a model's server answers it. The model's name is its regime's."""

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["content-length"])))
        content = json.dumps(REGIMES[question["model"]].rule(json.loads(question["messages"][-1]["content"])))
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


@dataclass(frozen=True)
class Job:
    """One run of one arm. Arms have runs folders of their own: equal recipes in one would share what they made."""

    regime: str
    arm: str
    seed: int
    runs: Path  # of the regime

    @property
    def place(self) -> Path:
        return self.runs / self.arm.replace(" ", "-").replace("/", "-")

    @property
    def folder(self) -> Path:
        return self.place / f"seed-{self.seed}" / REGIMES[self.regime].stage / "1"

    @property
    def made(self) -> bool:
        return (self.folder / "artifact").exists()


def train(job: Job) -> None:
    """Make it, in a process of its own."""
    import torch

    from tutelage import modalities
    from tutelage.base import load
    from tutelage.core.graph import Graph
    from tutelage.core.run import run_graph

    torch.set_num_threads(1)
    regime = REGIMES[job.regime]
    sets = [f"seed={job.seed}", *(f"stages.{regime.stage}.{text}" for text in regime.arms[job.arm])]
    recipe = load.load(Path(regime.recipe), sets=sets)
    graph = Graph.resolve(recipe, name=f"seed-{job.seed}", modality=modalities.find("text"), runs=job.place)
    result = run_graph(graph, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    if result.failed:
        raise SystemExit(f"{job.arm}, seed {job.seed}: {result.failed}")


def look_after(job: Job, url: str) -> None:
    """The agent, in a process of its own, from the stage's first moment to its end."""
    from tutelage import agent, steering

    while not steering.live(job.folder):
        time.sleep(0.05)
    settings = agent.Settings(url, job.regime, name="rule", every=EVERY)
    asyncio.run(agent.follow(job.folder, settings, say=lambda said: None))


def share_tokens(job: Job) -> None:
    """What was tokenized for one arm is there for all."""
    whole, own = (job.runs / ".data").absolute(), job.place / ".data"
    whole.mkdir(parents=True, exist_ok=True)
    job.place.mkdir(exist_ok=True)
    if not own.exists():
        own.symlink_to(whole)


def make_all(jobs: list[Job], *, url: str, side_by_side: int) -> None:
    """Make every run that is not there yet, a few at a time, each forked from this thread."""
    waiting = [job for job in jobs if not job.made]
    at_work: dict[Job, list[Any]] = {}
    while waiting or at_work:
        while waiting and len(at_work) < side_by_side:
            job = waiting.pop(0)
            share_tokens(job)
            found = [FORK.Process(target=train, args=(job,))]
            if job.arm == AGENT:
                found.append(FORK.Process(target=look_after, args=(job, url)))
            for process in found:
                process.start()
            at_work[job] = found
        for job, (training, *agents) in list(at_work.items()):
            if not training.is_alive():
                for process in agents:
                    process.join(30)
                    process.kill()
                if not job.made:
                    raise SystemExit(f"{job.arm}, seed {job.seed} failed with {training.exitcode}")
                print(f"{job.arm}, seed {job.seed}: {outcome(job)}", flush=True)
                del at_work[job]
        time.sleep(0.2)


def outcome(job: Job) -> dict[str, Any]:
    """Bits per byte at a run's end, its last rate and shares, what was changed and when, seconds a step took."""
    from tutelage import brief, steering

    found = brief.evals(job.folder, last=1)[-1]["values"]
    asked = [entry for entry in steering.log(job.folder) if entry["actor"] in ("agent", "policy")]
    last = brief.latest(job.folder)
    states = [entry["state"] for entry in asked]
    return {
        "value": statistics.fmean(found[f"bits_per_byte/{column}"] for column in REGIMES[job.regime].columns),
        "last_rate": last["lr"],
        **{state: states.count(state) for state in ("applied", "refused", "waiting")},
        "ticks": [entry["tick"] for entry in asked if entry["state"] == "applied"],
        "last_shares": {name: round(share, 4) for name, share in last["weights"].items()},
        "step_seconds": round(last["seconds"] / last["step"], 4),
    }


def qualities(name: str, seeds: list[int], runs: Path, side_by_side: int) -> dict[str, Any]:
    """Every arm with every seed; differences paired by seed."""
    import transformers  # noqa: F401  once, here: every run is forked from this process, which computes nothing itself

    import tutelage.core.run  # noqa: F401
    from tutelage.core.stats import paired

    regime, runs = REGIMES[name], runs / name.replace(" ", "-")
    if regime.prepare is not None:
        regime.prepare()
    endpoint = FORK.Process(target=serve, args=(address := free(),), daemon=True)
    endpoint.start()
    jobs = {(arm, seed): Job(name, arm, seed, runs) for seed in seeds for arm in regime.arms}
    make_all(list(jobs.values()), url=f"http://127.0.0.1:{address}/v1", side_by_side=side_by_side)
    endpoint.kill()
    found = {arm: [outcome(jobs[arm, seed]) for seed in seeds] for arm in regime.arms}
    values = {arm: [run["value"] for run in found[arm]] for arm in found}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "recipe": regime.recipe,
        "measure": f"bits per byte at the end, mean over {', '.join(regime.columns)}; lower is better",
        "agent": f"a rule behind an OpenAI-compatible endpoint, not a language model: {regime.says}",
        "arms": regime.arms,
        "seeds": seeds,
        "values": values,
        "runs": found,
        "differences": {
            f"{one} minus {other}": paired([a - b for a, b in zip(values[one], values[other], strict=True)]).as_dict()
            for one, other in regime.against()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", choices=list(REGIMES), default="too hot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/agents"))
    parser.add_argument("--side-by-side", type=int, default=2)
    options = parser.parse_args()
    data = qualities(options.regime, options.seeds, options.runs, options.side_by_side)
    append(RESULTS, data)
    for what, found in data["differences"].items():
        print(f"{what}: {found['mean']:+.3f} [{found['low']}, {found['high']}]")
    print(f"Wrote {RESULTS}")


if __name__ == "__main__":
    main()

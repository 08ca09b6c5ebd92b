"""What steering costs a step: the journal, a policy, and somebody who looks on, against the same run without any.

By turns (bench/turns.py), at steps of about 20 ms on one thread. A turn is about a second, in which falls

    steering    requests looked for between all steps, `controls.json` each second, and one note: asked for through the
                folder by another process, written to the journal and fsynced, applied, answered
    policy      the same, and a method whose `act` is asked after every step
    viewer      the same as steering, and another process that reads controls, new metrics and answers twice
    all         all of it

Two figures. `within`: the share of a run's step time that passes inside `steer.turn`, which is all that steering adds to the
loop, policies included; it is measured in the run itself and hardly knows how fast the machine is just then. Turns in which a
request is carried out are counted apart, by the milliseconds that each takes. And the
ratio of step times to those of the run without, which would see what is not in there (a viewer's reads), but within a few
percent only: so much one process differs from the next.

    python -m bench.overhead                    adds an entry to bench/results/overhead.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.peers.throughput import ours
from bench.turns import Turn, append, race, ratios
from tutelage import watching
from tutelage.base.method import Method
from tutelage.core import steer
from tutelage.steering import send

STEPS = 50  # of a turn
NOTE, LOOK = b"n", b"l"
# By system, shared with its processes: seconds of idle turns, of all steps, of turns with requests; how many these were.
WITHIN: dict[str, Any] = {}


class Watcher(Method):
    """A policy that remembers and asks for nothing, as all do nearly always."""

    no_off = "it only watches"

    def act(self, view: Any) -> list[dict[str, Any]]:
        """No action. The mean of the loss goes into its state."""
        loss = float(view.signals["loss"]) if "loss" in view.signals else 0.0
        self.state["mean"] = 0.99 * self.state.get("mean", loss) + 0.01 * loss
        return [] if self.state["mean"] < 1e9 else [{"do": "pause"}]


def outside(runs: Path) -> Callable[[bytes], Any]:
    """A process beside the run, which does what it is told by a byte: so it is busy in its run's turns only."""
    read, write = os.pipe()
    if os.fork():
        os.close(read)
        return partial(os.write, write)
    os.close(write)
    seen = 0
    while wanted := os.read(read, 1):
        (folder,) = runs.glob("t/one/1")
        if wanted == NOTE:
            send(folder, [{"do": "note", "text": "still here"}], by="anna", why="to see what it costs")
            continue
        watching.controls(folder)
        with open(folder / "metrics.jsonl", encoding="utf-8") as lines:
            lines.seek(seen)
            text = lines.read()
        whole = text.rfind("\n") + 1
        seen += len(text[:whole].encode())
        [json.loads(line) for line in text[:whole].splitlines()]
        sum(1 for _ in (folder / "answers").glob("*.json"))
    os._exit(0)


def steered(folder: Path, turn: Turn, *, steering: bool = True, policy: bool = False, viewer: bool = False) -> None:
    """A run with some of it."""
    tell = outside(folder / "runs") if steering else None
    spent, began = WITHIN.get(folder.name), 0.0
    usual, count = steer.turn, 0

    def timed(run: Any, stop: Callable[[], int] = lambda: 0) -> int:
        begun, known = time.perf_counter(), len(run.journal.lines)
        asked = usual(run, stop)
        took, busy = time.perf_counter() - begun, len(run.journal.lines) > known
        if spent:
            spent[0] += 0.0 if busy else took
            spent[2] += took if busy else 0.0
            spent[3] += busy
        return asked

    # off: nothing looked for, asked, told or written
    steer.turn = timed if steering else lambda run, stop=lambda: 0: stop()

    def step() -> None:
        nonlocal count, began
        if spent and count:
            spent[1] += time.perf_counter() - began
        turn()
        began = time.perf_counter()
        if tell and count % STEPS == 5:
            tell(NOTE)
        if tell and viewer and count % (STEPS // 2) == 10:
            tell(LOOK)
        count += 1

    ours(folder, step, size="20ms", parts=1, methods=["bench.overhead:Watcher"] if policy else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lives", type=int, default=5, help="how often all processes begin anew")
    parser.add_argument("--rounds", type=int, default=12, help="of a life")
    parser.add_argument("--dry", action="store_true", help="write nothing down")
    given = parser.parse_args()
    systems: dict[str, Callable[..., None]] = {
        "nothing": partial(steered, steering=False),
        "steering": steered,
        "policy": partial(steered, policy=True),
        "viewer": partial(steered, viewer=True),
        "all": partial(steered, policy=True, viewer=True),
    }
    WITHIN.update({name: multiprocessing.Array("d", 4) for name in systems if name != "nothing"})
    took = race(systems, lives=given.lives, rounds=given.rounds, steps=STEPS)
    found = ratios(took, of="nothing", lives=given.lives)
    about = {"date": str(date.today()), "torch": torch.__version__, "machine": platform.machine()}
    asked = {"lives": given.lives, "rounds": given.rounds, "steps": STEPS, "load": round(os.getloadavg()[0], 2)}
    entry = {
        **about, **asked, "within": {name: round(spent[0] / spent[1], 5) for name, spent in WITHIN.items()},
        "milliseconds_a_request": {name: round(1e3 * spent[2] / max(1, spent[3]), 2) for name, spent in WITHIN.items()},
        "ratio_to_nothing": found,
        "milliseconds_a_step": {name: round(1e3 * median(t["wall"]), 2) for name, t in took.items()},
        "seconds_a_step": {n: {c: [round(s, 6) for s in t[c]] for c in t} for n, t in took.items()},
    }  # fmt: skip
    if not given.dry:
        append(Path(__file__).parent / "results" / "overhead.json", entry)
    for name, share in entry["within"].items():
        each = entry["milliseconds_a_request"][name]
        print(f"{name}: {100 * share:.2f} % of its steps' time passes in `steer.turn`; a request takes {each:.1f} ms")
    for name, clocks in found.items():
        for clock, r in clocks.items():
            print(
                f"{name}: {100 * (r['median'] - 1):+.2f} % ({100 * (r['low'] - 1):+.2f} to {100 * (r['high'] - 1):+.2f}, {clock})"
            )


if __name__ == "__main__":
    main()

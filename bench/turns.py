"""Systems measured by turns, for machines whose speed drifts: all alive at once, one at work while the others wait.

Each system runs in a process of its own, forked from one warm parent, on one thread. Before every few steps it waits
until it is called, and afterwards says what they took. A round is one turn of each, in an order drawn anew, so a round
is over before the machine has drifted far; what counts are ratios within rounds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

WARM = 3  # rounds that nobody counts


class Turn:
    """A process's place in the round. Called once a step, always at the same point; returns when it is its turn."""

    def __init__(self, pipe: Connection, steps: int) -> None:
        self.pipe, self.steps, self.done = pipe, steps, 0
        self.wall = self.cpu = 0.0

    def __call__(self) -> None:
        if self.done % self.steps == 0:
            took = [time.perf_counter() - self.wall, time.process_time() - self.cpu]  # the first is only "ready"
            self.pipe.send_bytes(json.dumps([seconds / self.steps for seconds in took]).encode())
            if self.pipe.recv_bytes() == b"leave":
                os._exit(0)
            self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.done += 1


System = Callable[[Path, Turn], Any]
"""Trains in a folder of its own, calling its turn once a step, for longer than it will be asked to."""


def race(systems: dict[str, System], *, lives: int, rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """`wall` and `cpu` seconds a step of every system in every round, `rounds` of each of the lives.

    A process keeps its speed for as long as it lives, within a few percent, by what happens to lie where in its memory:
    so all of them begin anew several times. RuntimeError when a system ends early.
    """
    took: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in systems}
    for life in range(lives):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            pipes = {name: _born(name, system, Path(folder), steps, stack) for name, system in systems.items()}
            for i in range(-WARM, rounds):
                for name in random.Random(f"{life} {i}").sample(list(systems), len(systems)):
                    pipes[name].send_bytes(b"go")
                    wall, cpu = _said(pipes[name], name)
                    if i >= 0:
                        took[name]["wall"].append(wall)
                        took[name]["cpu"].append(cpu)
                print(f"life {life + 1}, round {i + 1} of {rounds}  ", end="\r", file=sys.stderr, flush=True)
            for pipe in pipes.values():
                pipe.send_bytes(b"leave")
    return took


def _born(name: str, system: System, folder: Path, steps: int, stack: contextlib.ExitStack) -> Connection:
    """Begin a system's process; returns once it has built what it needs and stands before its first step."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    work = (system, folder / name.replace(" ", "-"), Turn(theirs, steps))
    child = fork.Process(target=_live, args=work, daemon=True)
    child.start()
    stack.callback(child.join)
    stack.callback(child.kill)
    theirs.close()
    _said(ours, name)
    return ours


def _live(system: System, folder: Path, turn: Turn) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody waits for a turn that no one gives
    torch.set_num_threads(1)
    folder.mkdir()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            system(folder, turn)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _said(pipe: Connection, name: str) -> list[float]:
    try:
        return [float(value) for value in json.loads(pipe.recv_bytes())]
    except EOFError:
        raise RuntimeError(f"{name} ended before its turn was over") from None


def ratios(took: dict[str, dict[str, list[float]]], *, of: str, lives: int) -> dict[str, dict[str, dict[str, float]]]:
    """Other systems' seconds over those of one (above 1: that one is faster): median, and 95 % bootstrap interval.

    Lives are drawn anew, then rounds within them.
    """
    return {
        name: {
            clock: _summary((np.array(times[clock]) / np.array(took[of][clock])).reshape(lives, -1)) for clock in times
        }
        for name, times in took.items()
        if name != of
    }


def _summary(ratio_LR: np.ndarray) -> dict[str, float]:
    rng, (lives, rounds) = np.random.default_rng(0), ratio_LR.shape
    life_NL1 = rng.integers(lives, size=(2000, lives, 1))
    drawn_NLR = ratio_LR[life_NL1, rng.integers(rounds, size=(2000, lives, rounds))]
    low, high = np.quantile(np.median(drawn_NLR, axis=(1, 2)), [0.025, 0.975])
    return {"median": round(float(np.median(ratio_LR)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add an entry, a line, to a file of results; earlier ones stay as they are."""
    old = json.loads(path.read_text()) if path.exists() else []
    path.write_text("[\n" + ",\n".join(json.dumps(each) for each in [*old, entry]) + "\n]\n")

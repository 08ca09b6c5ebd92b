"""Stage folders laid out by hand, as a trainer would leave them, for tests that need no trainer."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tutelage.core.record import dumps


def row(tick: int, *, loss: float | None = None) -> dict[str, Any]:
    """A training row of a stage whose loss falls, with two sources."""
    share = 0.75 + 0.2 * math.sin(tick / 40)
    value = 3.0 + 3.5 * math.exp(-tick / 120) + 0.08 * math.sin(tick * 1.7) if loss is None else loss
    return {
        "kind": "train",
        "tick": tick,
        "step": tick,
        "tokens": tick * 1024,
        "samples": tick * 8,
        "epochs": tick / 1000,
        "flops": tick * 7.5e9,
        "loss": value,
        "grad_norm": 0.8 + 0.3 * math.cos(tick * 0.9),
        "lr": 3e-3 * min(1.0, tick / 20),
        "length": 128,
        "rows": 8,
        "trained": 8,
        "padding": 0.0,
        "weights": {"code": share, "base/prose": 1 - share},
        "cursors": {"code": [tick * 8, []], "base/prose": [tick, []]},
        "owed": {"code": 0.0, "base/prose": 0.0},
        "seconds": tick * 0.2,
        "tokens_per_second": 5120.0 + 200 * math.sin(tick / 9),
        "memory": 1_200_000_000 + tick,
        "memory_peak": 1_500_000_000,
    }


def measured(tick: int, *, alarm: bool = False) -> dict[str, Any]:
    """A measurement: prose is slowly lost, code is learned."""
    lost = 0.11 * (1 - math.exp(-tick / 150))
    values = {
        "bits_per_byte/prose": 3.06 + lost,
        "bits_per_byte/code": 3.43 - 0.4 * (1 - math.exp(-tick / 90)),
        "forgetting/prose": lost,
    }
    if alarm:
        values["alarm/prose"] = float(lost > 0.05)
    base = {"kind": "eval", "tick": tick, "step": tick, "tokens": tick * 1024, "flops": tick * 7.5e9, "final": False}
    return base | {"values": values, "texts": {}, "seconds": 0.5}


def controls(tick: int, ticks: int, **other: Any) -> dict[str, Any]:
    """What the trainer says can be steered."""
    rate = {"path": "optim.lr", "now": 3e-3 * min(1.0, tick / 20), "low": 0.0, "high": None}
    strength = {"path": "continual/replay.rate", "now": 0.125, "low": 0.0, "high": 1.0, "groups": []}
    return {
        "process": os.getpid(),
        "host": "here",
        "stage": "code",
        "state": "running",
        "tick": tick,
        "step": tick,
        "total": {"unit": "step", "value": float(2 * ticks)},
        "frac": tick / (2 * ticks),
        "targets": [
            rate | {"kind": "number", "says": "learning rate in use"},
            rate
            | {"path": "optim.base", "now": 3e-3, "kind": "number", "says": "learning rate at the schedule's peak"},
            strength | {"kind": "number", "says": "share of each batch that comes from before"},
        ],
        "mix": None,
        "sources": ["code"],
        "drawn": ["code", "base/prose"],
        "modules": [{"name": f"model.layers.{i}.*", "frozen": i == 0} for i in range(4)],
        "saves": [{"tick": ticks // 2, "kept": False}],
        "waiting": [],
        "locked": [],
        "rules": {"agent": {"budget": 100}},
        "written": time.time(),
    } | other


def lay(
    runs: Path,
    name: str = "demo/code",
    *,
    ticks: int = 300,
    journal: list[dict[str, Any]] | None = None,
    loss: Callable[[int], float | None] = lambda tick: None,
    alarm: bool = False,
    start: Any = None,
    **other: Any,
) -> Path:
    """A stage's folder after so many ticks. `loss` may say what the loss of a tick was; `other` goes into controls."""
    run, stage = name.split("/")
    folder = runs / run / stage / "1"
    folder.mkdir(parents=True)
    about = {"fingerprint": "0" * 16, "parts": {"seed": 0}}
    about["stage"] = {"start": start, "data": {"code": {"path": "stdlib:code"}}, "until": f"{2 * ticks}step"}
    (folder / "stage.json").write_text(json.dumps(about), encoding="utf-8")
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.write(dumps(measured(0, alarm=alarm)) + "\n")
        for tick in range(1, ticks + 1):
            file.write(dumps(row(tick, loss=loss(tick))) + "\n")
            if tick % max(1, ticks // 12) == 0:
                file.write(dumps(measured(tick, alarm=alarm)) + "\n")
    (folder / "journal.jsonl").write_text("".join(dumps(line) + "\n" for line in journal or []), encoding="utf-8")
    (folder / "controls.json").write_text(dumps(controls(ticks, ticks, **other)), encoding="utf-8")
    (folder / "lock").touch()
    return folder


def held(folder: Path) -> Iterator[TextIO]:
    """Hold a stage's lock, as its trainer would."""
    with open(folder / "lock", "a+", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle


def lines(*acts: tuple[int, str, list[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """A journal: (tick, by, actions, why) and, after each, that it was applied."""
    found: list[dict[str, Any]] = []
    for i, (tick, by, do, why) in enumerate(acts):
        id = f"act{i}"
        found.append({"id": id, "tick": tick, "by": by, "actor": "person", "do": do, "why": why})
        change = {"what": "optim.lr", "group": "all", "was": 0.006, "now": 0.003, "used": 0.003}
        effects = [{"do": act["do"], "changes": [change] if act["do"] in ("set", "scale") else []} for act in do]
        undo = [{"do": "set", "path": "optim.lr", "to": 0.006}]
        found.append(
            {
                "id": f"{id}e",
                "tick": tick,
                "by": "engine",
                "do": [{"do": "applied", "id": id, "effects": effects, "undo": undo}],
            }
        )
    return found

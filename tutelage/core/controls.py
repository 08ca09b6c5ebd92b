"""`controls.json`: what can be steered in a running stage, with present values and bounds, for those who only see its folder."""

from __future__ import annotations

import os
import socket
import time
from functools import cache
from typing import TYPE_CHECKING, Any, get_args

from annotated_types import Ge, Gt, Le, Lt

from tutelage.base.clock import Span
from tutelage.base.method import Method
from tutelage.core import acts, artifact
from tutelage.core.alerts import alerts
from tutelage.core.record import dumps

if TYPE_CHECKING:
    from tutelage.core.stage import Run

EVERY = 1.0  # seconds between two writes while nothing happens


def controls(run: Run, *, state: str) -> dict[str, Any]:
    """The contents of `controls.json`."""
    clock, standing = run.clock, run.standing
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "stage": run.node.name,
        "state": state,
        "step_to": standing.step_to,
        "tick": clock.tick,
        "step": clock.step,
        "total": {"unit": clock.until, "value": clock.total[clock.until]},
        "frac": clock.count(clock.until) / max(1e-9, clock.total[clock.until]),
        "targets": [target(run, path) for path in acts.steerable(run)],
        "mix": run.steered.mix,
        "sources": run.own(),
        "drawn": list(run.stream.cursors()),
        "dropped": list(run.steered.dropped),
        "modules": modules(run),
        "saves": [
            {"tick": int(path.name), "kept": (path / "kept").exists()} for path in artifact.states(run.folder / "state")
        ],
        "waiting": [{"id": name, **request} for name, request in standing.waiting.items()],
        "locked": sorted(standing.locked),
        "rules": run.node.stage.steering.model_dump(mode="json"),
        "alerts": alerts(run),
        "written": time.time(),
    }


def target(run: Run, path: str) -> dict[str, Any]:
    """One value that can be set."""
    now = acts.value(run, path)
    low: Any = None
    high: Any = None
    says, kind = acts.OWN.get(path), "number"
    if path in acts.OWN:
        low, high = {"model.dropout": (0.0, 1.0)}.get(path, (0.0, None))
    else:
        name, _, key = path.rpartition(".")
        low, high, says = declared(type(next(m for m in run.methods.all() if m.name() == name)), key)
        kind = "span" if isinstance(now, Span) else "integer" if isinstance(now, int) else "number"
    found = {"path": path, "now": acts.plain(now), "low": low, "high": high, "kind": kind, "says": says}
    if path in ("optim.lr", "optim.base"):
        share = acts.factor(run)
        found["groups"] = [
            {"group": g["role"], "ratio": g["ratio"], "base": g["base_lr"], "used": g["base_lr"] * share}
            for g in run.engine.optimizer.param_groups
        ]
    return found


@cache
def declared(cls: type[Method], key: str) -> tuple[Any, Any, str | None]:
    """Bounds of a method's field, None where there are none, and what it says of itself."""
    field = cls.model_fields[key]
    bounds = list(field.metadata) + [m for arg in get_args(field.annotation) for m in getattr(arg, "metadata", ())]
    low = next((b.ge if isinstance(b, Ge) else b.gt for b in bounds if isinstance(b, (Ge, Gt))), None)
    high = next((b.le if isinstance(b, Le) else b.lt for b in bounds if isinstance(b, (Le, Lt))), None)
    return low, high, field.description


def modules(run: Run) -> list[dict[str, Any]]:
    """Top modules and blocks of the model, as patterns for `freeze`, and whether nothing in them is trained."""
    parts = run.engine.anatomy
    names = [name for name, _ in run.engine.model.named_parameters()]
    blocks = [f"{stack.name}.{i}" for stack in parts.stacks for i in range(len(stack.blocks))]
    prefixes = blocks + sorted({name.rsplit(".", 1)[0] for name in names if not _inside(name, blocks)})
    return [
        {"name": f"{prefix}.*", "frozen": not any(name.startswith(prefix + ".") for name in run.engine.params)}
        for prefix in prefixes
    ]


def _inside(name: str, prefixes: list[str]) -> bool:
    return any(name.startswith(prefix + ".") for prefix in prefixes)


def write(run: Run, *, state: str, sync: bool = False) -> None:
    """Hand the file to the thread that writes metrics; `sync` waits until it lies there."""
    run.metrics.beside(run.folder / "controls.json", dumps(controls(run, state=state)))
    if sync:
        run.metrics.flush()

"""What each method takes of a stage's time: its hooks are timed where they are called, and the sums kept beside the stage.

A hook's own time, on the wall. What a loss or penalty costs in the backward pass, and what a wrapper adds to the model's
passes, belongs to the model: it is in `loss` or in none. On a GPU a hook that does not wait for its result counts what it
takes to ask for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, cast

from tutelage.base.method import Method
from tutelage.core.record import write_whole

FILE = "profile.json"
BEFORE = "begin"  # asked once, before the first step
TIMED = {BEFORE, "loss", "auxiliary", "penalty", "grads", "batch", "weigh", "after", "observe", "act", "step"}


@dataclass
class Profile:
    """Calls and seconds by method and hook, of one process. Methods of one name are summed."""

    hooks: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    inside: bool = False  # a hook is at work; what it makes others do is its own time

    def of(self, method: Method) -> Method:
        """The method, its hooks timed."""
        return cast(Method, Watched(method, self))

    def keep(self, folder: Path) -> None:
        """Add this process's sums to those of the stage's earlier ones. A process that was killed left none."""
        hooks = read(folder)
        for name, found in self.hooks.items():
            for hook, (calls, took) in found.items():
                old = hooks.setdefault(name, {}).setdefault(hook, [0, 0.0])
                old[0] += calls
                old[1] = round(old[1] + took, 6)
        write_whole(folder / FILE, json.dumps(hooks))

    def timed(self, name: str, called: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook of the method of that name, timed."""
        sums = self.hooks.setdefault(name, {}).setdefault(called, [0, 0.0])

        @wraps(hook)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return hook(*args, **kwargs)
            self.inside, began = True, time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.inside = False
                sums[0] += 1
                sums[1] += time.perf_counter() - began

        return call


class Watched:
    """A method whose hooks are timed; in all else it is that method, as it is when it is asked."""

    def __init__(self, method: Method, profile: Profile) -> None:
        self._method, self._profile = method, profile

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._method, name)
        if name in TIMED:
            found = vars(self)[name] = self._profile.timed(self._method.name(), name, found)
        return found


def read(folder: Path | None) -> dict[str, dict[str, list[float]]]:
    """What was kept of a stage: calls and seconds by method and hook."""
    path = folder / FILE if folder else None
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path and path.exists() else {}


def rows(folder: Path | None, *, training: float) -> list[dict[str, Any]]:
    """A row a method, the costliest first.

    training: seconds of the stage's steps; `share` is of these and of what policies took between them
    `seconds` are those of the steps, `before` those of the work before the first; `hooks` has calls and seconds of each.
    """
    table, kept = [], read(folder)
    training += sum(hooks["act"][1] for hooks in kept.values() if "act" in hooks)
    for name, hooks in kept.items():
        called = {hook: {"calls": int(calls), "seconds": took} for hook, (calls, took) in hooks.items() if calls}
        before = sum(took["seconds"] for hook, took in called.items() if hook == BEFORE)
        within = sum(took["seconds"] for took in called.values()) - before
        share = within / training if training else None
        if called:
            table.append({"method": name, "seconds": within, "share": share, "before": before, "hooks": called})
    return sorted(table, key=lambda row: -row["seconds"])

"""What needs torch, or long: done in a process of its own, with a time limit, so that the server stays small and quick.

`python -m tutelage.server.work` reads a job (JSON) and writes `{"done": …}` or `{"error": one line}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from tutelage.base.errors import UserError
from tutelage.core.record import dumps

SIDE = 2  # jobs side by side
NICE = 5  # training on the same machine comes first


class Jobs:
    """Runs jobs, a few at a time; what was computed a moment ago of the same files is not computed again."""

    def __init__(self, *, keep: float = 10.0) -> None:
        self.keep = keep
        self._free = asyncio.Semaphore(SIDE)
        self._known: dict[bytes, tuple[float, Any]] = {}
        self._children: set[int] = set()
        self._stopped = False

    async def run(self, job: dict[str, Any], *, seconds: float, kept: bool = False) -> Any:
        """The job's result. UserError for what it refused, for one that took too long, and when the server stops."""
        key = dumps(job).encode()
        before = self._known.get(key)
        if kept and before and time.monotonic() - before[0] < self.keep:
            return before[1]
        async with self._free:
            found = await self._child(key, seconds=seconds, what=str(job["do"]))
        if kept:
            now = time.monotonic()
            self._known = {k: v for k, v in self._known.items() if now - v[0] < self.keep} | {key: (now, found)}
        return found

    def stop(self) -> None:
        """End what is at work."""
        self._stopped = True
        for pid in list(self._children):
            _kill(pid)

    async def _child(self, job: bytes, *, seconds: float, what: str) -> Any:
        if self._stopped:
            raise UserError("the server stops")
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tutelage.server.work", stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self._children.add(child.pid)
        try:
            out, said = await asyncio.wait_for(child.communicate(job), seconds)
        except TimeoutError as error:
            raise UserError(f"{what}: it took more than {seconds:.0f} s and was ended") from error
        finally:
            if child.returncode is None:
                _kill(child.pid)
                await child.wait()
            self._children.discard(child.pid)
        try:
            found = orjson.loads(out)
        except ValueError as error:
            last = said.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"code {child.returncode}"]
            raise UserError(f"{what} failed: {last[0]}") from error
        if "error" in found:
            raise UserError(found["error"])
        return found["done"]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


# -- in the child -----------------------------------------------------------------------------------------------------


def matrix(folder: str) -> dict[str, Any]:
    """The forgetting matrix of a stage's run, and what sums it up: as the report has it."""
    from tutelage.core import report
    from tutelage.look import node_of

    graph = node_of(Path(folder)).graph
    found = report.gather(graph)
    names = (
        "order",
        "sources",
        "forgetting_matrix",
        "filled",
        "at_start",
        "transfer",
        "dips",
        "alarms",
        "seeds",
        "scale",
    )
    return {"recipe": graph.name, **{name: found[name] for name in names}}


def batch(folder: str, tick: int) -> dict[str, Any]:
    """Which documents the step that ended at `tick` saw."""
    from tutelage.look import batch_of

    return {"tick": tick, "rows": batch_of(Path(folder), tick)}


def compare(a: str, b: str, names: list[str]) -> dict[str, Any]:
    """Two stages at equal budget; see core/compare.py."""
    from tutelage.core.compare import compare, said

    found = compare([Path(a)], [Path(b)], names=(names[0], names[1]))
    return {**found, "said": said(found)}


def attempt(folder: str, tick: int | None, prompts: list[str], tokens: int, temperature: float, seed: int) -> Any:
    """Text from a finished stage, or from a saved tick of it. Nothing is written."""
    from tutelage.core.elsewhere import model_at
    from tutelage.look import node_of

    node = node_of(Path(folder))
    model, processor = model_at(node, tick)
    write = node.graph.modality.generate
    texts = write(model, processor, prompts=prompts, tokens=tokens, seed=seed, temperature=temperature)
    return {"tick": tick, "texts": texts}


def branch(folder: str, action: dict[str, Any], runs: str) -> dict[str, Any]:
    """Make the run of a branch that the trainer answered, and start it if it says so."""
    from tutelage.steering import branch

    return branch(Path(folder), action, runs=Path(runs)).as_dict()


_DOES: dict[str, Callable[..., Any]] = {
    "matrix": matrix,
    "batch": batch,
    "compare": compare,
    "try": attempt,
    "branch": branch,
}


def main() -> None:
    job = json.load(sys.stdin)
    if job["do"] != "branch":  # what that starts is training itself
        os.nice(NICE)
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        found = {"done": _DOES[job.pop("do")](**job)}
    except UserError as error:
        found = {"error": " ".join(str(error).split())}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    with os.fdopen(out, "w", encoding="utf-8") as handle:
        handle.write(dumps(found))


if __name__ == "__main__":
    main()

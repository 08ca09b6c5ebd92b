"""Merges that look at data: a method's `fit`, step by step, with its numbers, its cost and its way back after a kill."""

from __future__ import annotations

import copy
import math
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.base.method import Method
from tutelage.core import artifact, memory
from tutelage.core.graph import Node
from tutelage.core.layout import saved_names
from tutelage.core.loop import Stop, Stopped
from tutelage.core.out import Out
from tutelage.core.record import Metrics
from tutelage.core.shard import World
from tutelage.core.stage import Opened, Say, opened
from tutelage.core.surgery import Weights
from tutelage.core.types import Batch
from tutelage.core.view import View

SHARE = 0.5  # of the free memory that the weights of all starts may take; beyond, they are read from their files again
STATES = "fit"  # in a stage's folder: what a method had found by then
KEEP = 2  # of these


class Starts:
    """The models that a merge starts from, as `fit` reads them. Weights go by the names of the model's parameters.

    They are float32 on the stage's device. Where those of all starts take more than SHARE of what is free there, they are
    read from their files whenever they are asked for; the numbers are the same.
    """

    def __init__(self, inputs: Sequence[Weights], labels: Sequence[str], view: View) -> None:
        model = view.engine.model
        self.labels = tuple(labels)  # what each is called, for people
        self.files = filed(model, inputs[0])  # the name in files of each parameter
        self._inputs, self._view = inputs, view
        self._held: dict[tuple[int, str], Tensor] = {}
        size = 4 * sum(p.numel() for p in model.parameters()) * len(inputs)
        self.held = size <= SHARE * memory.available(view.engine.device)
        self._frozen: tuple[int, nn.Module] | None = None  # the model that answers now, and which start it is

    def __len__(self) -> int:
        return len(self._inputs)

    def read(self, i: int, name: str) -> Tensor:
        """A parameter of the `i`-th start. Nobody writes into it."""
        if (i, name) in self._held:
            return self._held[i, name]
        found = self._inputs[i][self.files[name]].to(self._view.engine.device, torch.float32)
        if self.held:
            self._held[i, name] = found
        return found

    def answer(self, i: int, batch: Batch) -> Out:
        """What the `i`-th start answers, without gradients. It holds until another start is asked."""
        if self._frozen is None or self._frozen[0] != i:
            module = copy.deepcopy(self._view.engine.model) if self._frozen is None else self._frozen[1]
            for name, p in module.requires_grad_(False).named_parameters():
                p.data = self.read(i, name)
            self._frozen = i, module
        return self._view.without_gradients(self._frozen[1], batch)


def filed(model: nn.Module, weights: Weights) -> dict[str, str]:
    """The name in files of each parameter; of a tied one the files hold one name. UserError where they have none."""
    saved = saved_names(model)
    aliases: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(p), []).append(name)
    found = {}
    for name, p in model.named_parameters():
        known = [saved[alias] for alias in aliases[id(p)] if saved[alias] in weights.about]
        if not known:
            raise UserError(f"{weights.folder}: its files have no tensor for {name} under the name that it is saved by")
        found[name] = known[0]
    return found


@dataclass(frozen=True)
class Fitted:
    """What fitting came to: the clock's counts, and how long the metrics file was."""

    counts: dict[str, Any]
    bytes: int


def fit(node: Node, method: Method, inputs: Sequence[Weights], *, say: Say) -> Fitted:
    """Run a method's `fit` to its end, or from where it was cut. What it found is in the method's state.

    Every step is a row of the metrics, as a training step is; between two steps a wish to stop is heard and, as often as
    the stage saves, the state is written down. One process does all of it. Raises `Stopped` after saving.
    """
    base = opened(node, world=World(), say=say, start=node.starts()[0])
    assert base.engine.objective is not None
    needs = method.needs | base.engine.objective.needs
    run = _Run(node, method, base, say)
    stop = Stop()
    try:
        starts = Starts(inputs, labels_of(node), base.view)
        for numbers, batches in method.fit(partial(base.engine.out, needs=needs), starts, base.view):
            run.stepped(numbers, batches)
            if stop.asked:
                run.save()
                raise Stopped(signal.Signals(stop.asked).name)
        run.save()
    finally:
        run.metrics.close()
        stop.end()
    return Fitted(run.counts(), (run.folder / "metrics.jsonl").stat().st_size)


def labels_of(node: Node) -> list[str]:
    """What each start is called: its stage, or the last part of its path; numbered where two are called alike."""
    names = [node.graph.stage_name(start) or Path(str(start)).name for start in node.starts()]
    return [name if names.count(name) == 1 else f"{name}.{i}" for i, name in enumerate(names)]


def forget(folder: Path) -> None:
    """What was found on the way is of no use once the merge is there."""
    shutil.rmtree(folder / STATES, ignore_errors=True)


class _Run:
    """Counts, rows and states of a fit."""

    def __init__(self, node: Node, method: Method, base: Opened, say: Say) -> None:
        assert node.folder is not None
        self.node, self.method, self.folder, self.say = node, method, node.folder, say
        self.view, self.engine, self.clock = base.view, base.engine, base.view.clock
        self.engine.model.eval()
        self.engine.params = dict(self.engine.model.named_parameters())
        saved = artifact.newest_state(self.folder / STATES, warn=lambda text: say({"warning": text}))
        if saved:
            tensors, facts = saved
            method.state.update(artifact.unflatten({**tensors["method"], **facts["method"]}))
            self.engine.flops.load(facts["flops"])
            for name, value in facts["clock"].items():
                setattr(self.clock, name, value)
        self.metrics = Metrics(self.folder / "metrics.jsonl", keep_bytes=saved[1]["metrics_bytes"] if saved else 0)
        self.spent = 0.0  # seconds in steps since this process began
        self.last = self.saved_at = self.said = time.perf_counter()
        self.saved = self.clock.copy()

    def counts(self) -> dict[str, Any]:
        return {name: getattr(self.clock, name) for name in ("tick", "step", "tokens", "flops")}

    def stepped(self, numbers: dict[str, float], batches: Sequence[Batch]) -> None:
        """A step is over: count it and write it down."""
        clock, now = self.clock, time.perf_counter()
        if not math.isfinite(numbers["loss"]):
            raise UserError(
                f"stage {self.node.name}: the loss of {self.method.name()} is not a number at step {clock.step + 1}; "
                "lower its rate"
            )
        tokens, rows = sum(batch.tokens for batch in batches), sum(map(len, batches))
        took, self.last = now - self.last, now
        self.spent += took
        clock.tick, clock.step = clock.tick + 1, clock.step + 1
        clock.tokens, clock.samples = clock.tokens + tokens, clock.samples + rows
        clock.flops = float(self.engine.flops.total)
        places = sum(next(iter(batch.fields.values())).shape[:2].numel() for batch in batches)
        drawn = [row.source for batch in batches for row in batch.rows]
        held, peak = memory.in_use(self.engine.device)
        self.metrics.add(
            {
                "kind": "train",
                "tick": clock.tick,
                "step": clock.step,
                "tokens": clock.tokens,
                "samples": clock.samples,
                "flops": clock.flops,
                **numbers,
                "length": self.node.stage.length,
                "rows": rows,
                "trained": rows,
                "padding": 1 - tokens / places,
                "weights": {name: drawn.count(name) / rows for name in self.node.stage.data if name in drawn},
                "seconds": self.spent,
                "tokens_per_second": tokens / max(1e-9, took),
                "memory": held,
                "memory_peak": peak,
            }
        )
        if self._due():
            self.save()
        if now - self.said > 0.2:
            self.said = now
            self.say({"doing": f"{self.method.name()} fits: step {clock.step}, loss {numbers['loss']:.4f}"})

    def _due(self) -> bool:
        every = self.node.stage.save.every
        if every.unit == "min":
            return time.perf_counter() - self.saved_at >= 60 * every.value
        return every.unit != "%" and self.clock.count(every.unit) - self.saved.count(every.unit) >= every.value

    def save(self) -> None:
        """Write down all that the next step depends on."""
        tensors, scalars = artifact.flatten(self.method.state)
        facts = {
            "clock": self.clock.state(),
            "flops": self.engine.flops.state(),
            "method": scalars,
            "metrics_bytes": self.metrics.flush(),
        }
        place = self.folder / STATES
        artifact.save_state(place, tick=self.clock.tick, tensors={"method": tensors}, facts=facts, keep=KEEP)
        self.saved, self.saved_at = self.clock.copy(), time.perf_counter()
        self.last = time.perf_counter()  # saving is no step

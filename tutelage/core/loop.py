"""The only training loop. Read it from top to bottom: this is what a stage does."""

from __future__ import annotations

import signal
from typing import Any

import torch

from tutelage.base.errors import UserError
from tutelage.core import checkpoint, memory, steer
from tutelage.core.acts import base_rate
from tutelage.core.measure import measure
from tutelage.core.pace import Pace
from tutelage.core.parts import mix_weights, shape_of
from tutelage.core.stage import Run
from tutelage.core.types import Batch


class Stopped(Exception):
    """Raised after saving when the process was asked to stop."""


def train(run: Run) -> None:
    """Train a built stage to its end, or to where it is asked to stop."""
    clock, view, engine, methods = run.clock, run.view, run.engine, run.methods
    stop = Stop()
    counted = engine.flops.total
    if run.fresh:
        clock.flops = float(view.sum(torch.tensor(counted, device=engine.device)))
    pace = Pace(run)
    schedule, step = methods.slots["schedule"], methods.slots["step"]
    assert schedule is not None
    batchers, weighers = methods.having("batch"), methods.having("weigh")
    afters, observers = methods.having("after"), methods.having("observe")
    guards = any(method.guards for method in methods.having("act"))
    if run.fresh:
        measure(run)
        if run.node.graph.step_wanted(run.node.name, 0) or methods.having(
            "act"
        ):  # a policy may want to go back to here
            checkpoint.save(run, mark="kept")

    while True:
        lines = len(run.journal.lines)
        asked = steer.turn(run, lambda: stop.asked)
        if len(run.journal.lines) > lines:
            pace.rest()
        if asked:
            if not run.unsound:  # the last good save is what to go on from
                checkpoint.save(run)
            steer.show(run, "stopped", now=True)
            raise Stopped(signal.Signals(asked).name)
        if run.unsound:
            raise not_a_number(run)
        if clock.reached():
            break
        weights = mix_weights(run)
        length, rows = shape_of(run, weights)
        before = run.stream.cursors()
        view.reseed("batch")
        drawn_rows = run.stream.draw(run.parts.weights(weights, length), length, rows)
        batch = run.modality.collate(drawn_rows, run.sources, length=length)
        tokens, drawn = batch.tokens, len(batch)
        for method in batchers:
            batch = method.batch(batch, view)
        for method in weighers:
            batch = batch.weighted(method.weigh(batch, view))
        rate = schedule.factor(clock)
        for group in engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        numbers = step.step(engine, batch, view) if step else engine.step(batch, view)
        run.unsound = not all(map(_finite, (numbers["loss"], numbers.get("grad_norm", 0.0))))
        for method in afters:
            with torch.no_grad():
                method.after(engine.params, view)

        clock.tick += 1
        clock.step += 1
        clock.tokens += tokens
        clock.samples += drawn
        clock.epochs = run.epochs()
        clock.flops += float(view.sum(torch.tensor(engine.flops.total - counted, device=engine.device)))
        counted = engine.flops.total
        view.signals.update(numbers, lr=base_rate(engine.optimizer) * rate, finite=float(not run.unsound))
        for method in observers:
            method.observe(batch, numbers, view)
        pace.count(tokens)
        record(run, numbers, batch, before, weights, tokens=tokens, drawn=drawn, length=length, pace=pace)
        if run.unsound and guards:
            continue  # measuring and saving such weights would help nobody; the turn asks the policies
        if run.unsound:
            raise not_a_number(run)
        pace.decide(run)
        run.rules.look({**numbers, "lr": view.signals["lr"]})
        if run.evals.due(clock.step) and not clock.reached():
            with pace.apart():
                measure(run)
        wanted = run.node.graph.step_wanted(run.node.name, clock.step)
        if wanted or pace.save_due(run):
            with pace.apart():
                checkpoint.save(run, mark="kept" if wanted else None)

    if not run.measured:
        measure(run, final=True)
        run.measured = True
        checkpoint.save(run)
    steer.close(run)
    stop.end()


def not_a_number(run: Run) -> UserError:
    """What ends a stage whose loss is no number: the last checkpoint is from before it."""
    found = run.view.signals
    return UserError(
        f"stage {run.node.name}: the loss or its gradient is not a number at step {run.clock.step} "
        f"(loss {found['loss']}, gradient norm {found.get('grad_norm')}); lower the rate "
        "(`--set stages.…optim.lr=…`); the run goes on from its last checkpoint"
    )


def _finite(value: float) -> bool:
    return value - value == 0.0


def record(
    run: Run,
    numbers: dict[str, float],
    batch: Batch,
    before: dict[str, Any],
    weights: dict[str, float],
    *,
    tokens: int,
    drawn: int,
    length: int,
    pace: Pace,
) -> None:
    """One line of metrics a step. With `cursors`, the batch of any tick can be named again."""
    clock = run.clock
    run.watch.look(clock.tick, numbers)
    held, peak = memory.in_use(run.engine.device)
    run.metrics.add(
        {
            "kind": "train",
            "tick": clock.tick,
            "step": clock.step,
            "tokens": clock.tokens,
            "samples": clock.samples,
            "epochs": clock.epochs,
            "flops": clock.flops,
            **numbers,
            "lr": run.view.signals["lr"],
            "length": length,
            "rows": drawn,
            "trained": len(batch),
            "padding": 1 - tokens / (drawn * length),
            "weights": weights,
            **run.parts.noted(),
            "cursors": {name: [c.next, [list(p) for p in c.pending]] for name, c in before.items()},
            "owed": pace.owed,
            "seconds": pace.training,
            "tokens_per_second": pace.tokens_per_second,
            "memory": held,
            "memory_peak": peak,
        }
    )
    pace.owed = run.stream.owed()
    if pace.time_to_say():
        run.say(
            {
                "step": clock.step,
                "frac": pace.share_done(clock),
                "loss": numbers["loss"],
                "tokens_per_second": pace.tokens_per_second,
                "flops_per_second": pace.flops_per_second(clock),
                "left": pace.seconds_left(clock),
            }
        )


class Stop:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a wish that the loop grants after its step. A second Ctrl-C is immediate."""

    def __init__(self) -> None:
        self.asked = 0  # the signal's number
        self.before: dict[int, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self.before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            pass

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def end(self) -> None:
        """Signals do again what they did before; a wish too late for the loop reaches whoever heard them then."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.asked:
            signal.raise_signal(self.asked)

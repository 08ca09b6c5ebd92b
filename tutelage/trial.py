"""The body of `tutelage try`: what it costs, consent, the twins, what came of it, adopt or discard. No torch."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.prompt import Confirm

from tutelage import trying, wording
from tutelage.asking import effects, login
from tutelage.base.errors import UserError
from tutelage.core.record import dumps
from tutelage.core.words import amount, duration, number
from tutelage.steering import name_of
from tutelage.trying import Try
from tutelage.watching import find

console = Console(highlight=False, markup=False)


def try_command(
    run: str, words: list[str], *, steps: int, yes: bool, adopt: bool | None, by: str | None, as_json: bool, runs: Path
) -> int:
    """Try actions on a stage; returns the exit code."""
    folder = find(run, runs=runs)
    asks = sys.stdin.isatty() and console.is_terminal
    if not yes and not asks:
        raise UserError("try pauses the stage and computes: say --yes where there is no terminal to ask on")
    tried = trying.begin_try(folder, wording.actions(words), steps, by=by or login())
    say([] if as_json else cost(tried))
    if not yes and not Confirm.ask("Try it?", console=console, default=False):
        return 0
    with console.status("") as shown:

        def progress(twin: str, done: int, of: int) -> None:
            shown.update(f"twin {twin}: step {done} of {of}" if done else f"twin {twin}: opening the model")

        trying.run_try(tried, say=progress)
    say([] if as_json else outcome(tried))
    try:
        if adopt is None:
            adopt = asks and not as_json and Confirm.ask("Adopt it?", console=console, default=False)
        told = trying.settle(tried, adopt=adopt)
    except BaseException:
        trying.release(tried)
        raise
    if as_json:
        print(dumps(tried.as_dict()))
        return 0
    where = f" at tick {told['tick']:,}" if told else ", when it is run again" if adopt else ""
    say([f"{tried.state}{where}" if adopt else f"discarded; {name_of(folder)} is as it was"])
    return 0


def say(lines: list[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def cost(tried: Try) -> list[str]:
    """What will happen, and what it takes."""
    found = tried.estimate
    time = f"about {duration(found['seconds'])} of computing" if found["seconds"] else "a time that nobody knows yet"
    memory = f"at least {amount(found['memory'], unit='B')} of memory beside it" if found["memory"] else ""
    pause = (
        f"{name_of(tried.folder)} saves and pauses meanwhile" if tried.live else f"from the save of tick {tried.tick}"
    )
    return [
        f"Two twins of {tried.steps} steps, one after the other: {', '.join(part for part in (time, memory) if part)}; "
        f"opening the model twice comes on top; {pause}.",
        *effects({"effects": tried.effects}),
    ]


def outcome(tried: Try) -> list[str]:
    """What came of it."""
    found = tried.result or {}
    same, steps = found["same_batches"], found["steps"]
    lines = [f"From tick {found['tick']:,}, {steps} steps, {same} on the same batches. Changed minus plain:"]
    for name, label in (("loss", "loss"), ("late", "loss, second half")):
        if found[name]:
            lines.append(f"  {label}  {interval(found[name])}")
    if not same:
        lines.append(
            "  the batches differ, so step losses are no pairs; the measures below are on the same held-out data"
        )
    for name, one in found["measures"].items():
        values = f"{number(one['plain']):.4f} → {number(one['changed']):.4f}"
        lines.append(f"  {name}  {number(one['difference']):+.4f}  ({values})")
    return [*lines, "One pair of twins: other seeds and more steps may say otherwise."]


def interval(found: dict[str, Any]) -> str:
    if found["low"] is None or not math.isfinite(found["low"]):
        return f"{found['mean']:+.4f}"
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]  95%, from {found['n']} blocks of steps"

"""What somebody should look at in a running stage, told from what the trainer knows anyway; it changes no number.

An alert is {"kind", "tick", "text", "grave"}: what of, since when, one sentence, and whether it hurts the run or is only
worth knowing. `watching.controls` adds what only shows from outside: a trainer that died, is silent, an agent that is gone.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from tutelage.core.words import amount, bits, finite

if TYPE_CHECKING:
    from tutelage.core.stage import Run

RECENT = 200  # ticks for which what happened once is told
WINDOW, LEAST = 100, 20  # losses that a new one is held against, and how few will do
LEAP = 6.0  # deviations above their median, from which on a loss has leapt
ROOM = 2.0  # saves that must still fit onto the disk

Alert = dict[str, Any]


def alert(kind: str, tick: int, text: str, *, grave: bool = True) -> Alert:
    return {"kind": kind, "tick": tick, "text": text, "grave": grave}


@dataclass
class Watch:
    """The newest losses and what stood out of them. It is not saved: after a resume it begins anew."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    found: dict[str, Alert] = field(default_factory=dict)  # the newest of each kind
    saved: Any = None  # the checkpoint whose size is known
    size: int = 0

    def look(self, tick: int, numbers: dict[str, float]) -> None:
        """Take in a step: a few comparisons, unless its loss is above all the newest ones."""
        loss, norm = numbers["loss"], numbers.get("grad_norm", 0.0)
        if not (finite(loss) and finite(norm)):
            text = f"no number at tick {tick:,}: the loss was {loss:.4g}, the gradient's norm {norm:.4g}"
            self.found["loss"] = alert("loss", tick, text)
            return
        if len(self.losses) >= LEAST and loss > max(self.losses):
            middle = median(self.losses)
            spread = 1.4826 * median(abs(before - middle) for before in self.losses)  # a deviation, were they normal
            if loss > middle + max(LEAP * spread, 0.05 * abs(middle)):
                text = f"the loss leapt to {loss:.3f} at tick {tick:,}; the median of the steps before was {middle:.3f}"
                self.found["spike"] = alert("spike", tick, text)
        self.losses.append(loss)


def alerts(run: Run) -> list[Alert]:
    """All that holds now, what is grave first."""
    tick = run.clock.tick
    found = [one for one in run.watch.found.values() if tick - one["tick"] <= RECENT]
    found += [*_forgotten(run.view.signals), *_room(run), *_waiting(run), *_journaled(run.journal.lines, tick)]
    return sorted(found, key=lambda one: not one["grave"])


def _forgotten(signals: dict[str, float]) -> list[Alert]:
    """Columns that the last measurement found beyond the bound that the recipe names."""
    names = [key.removeprefix("eval/alarm/") for key, on in signals.items() if key.startswith("eval/alarm/") and on > 0]
    tick = int(signals.get("eval/tick", 0))
    return [alert("forgetting", tick, f"{name} is forgotten beyond its bound{_lost(signals, name)}") for name in names]


def _lost(signals: dict[str, float], name: str) -> str:
    lost = signals.get(f"eval/forgetting/{name}")
    return "" if lost is None else f": {bits(lost, sign=True)} bits per byte against its best"


def _room(run: Run) -> list[Alert]:
    """A disk on which few saves still have room."""
    watch = run.watch
    if run.saved is None:
        return []
    with contextlib.suppress(OSError):
        if watch.saved != run.saved:
            place = run.folder / "state" / f"{run.saved[0]:09d}"
            watch.saved, watch.size = run.saved, sum(path.stat().st_size for path in place.iterdir())
        free = shutil.disk_usage(run.folder).free
        if free < ROOM * watch.size:
            text = f"the disk has {amount(free)}B left, and a save takes {amount(watch.size)}B"
            return [alert("disk", run.clock.tick, text)]
    return []


def _waiting(run: Run) -> list[Alert]:
    return [
        alert("waiting", run.clock.tick, f"{request['by']} asks for {_named(request['do'])}; it waits for a person", grave=False)
        for request in run.standing.waiting.values()
    ]  # fmt: skip


def _journaled(lines: list[dict[str, Any]], now: int) -> list[Alert]:
    """What was done, or refused, to others than persons, and what the machine forced: the newest of each kind and actor."""
    found: dict[tuple[str, str], Alert] = {}
    for line in reversed(lines):
        if line["tick"] < now - RECENT:
            break
        if line.get("actor") in ("agent", "policy"):
            told = [_told("acted", line["tick"], line, f"did {_named(line['do'])}")]
        elif line["by"] == "engine":
            told = [one for act in line["do"] for one in _noted(act, line["tick"])]
        else:
            told = []
        for one in told:
            found.setdefault((one["kind"], one.pop("by", "")), one)
    return list(found.values())


def _noted(act: dict[str, Any], tick: int) -> list[Alert]:
    """What an entry of the engine's tells."""
    request = act.get("request") or {}
    if act["do"] == "refused" and request.get("actor") in ("agent", "policy"):
        return [_told("refused", tick, {**request, "why": act.get("why")}, f"was refused {_named(request['do'])}")]
    if act["do"] == "thin" and len(act["steps"]) < act["planned"]:
        text = f"{len(act['steps'])} of {act['planned']} planned measurements are made: more would exceed their budget"
        return [alert("thinned", tick, text, grave=False)]
    if act["do"] == "micro" and tick:
        return [alert("micro", tick, f"memory ran out at tick {tick:,}: {act['rows']} rows at once since", grave=False)]
    return []


def _told(kind: str, tick: int, line: dict[str, Any], what: str) -> Alert:
    why = f": {str(line['why'])[:200]}" if line.get("why") else ""
    return {**alert(kind, tick, f"{line['by']} {what} at tick {tick:,}{why}", grave=False), "by": line["by"]}


def _named(do: Any) -> str:
    """Actions by their names and what they lay hands on; what was refused may be of any form."""
    acts = [act for act in do if isinstance(act, dict)] if isinstance(do, list) else []
    return " + ".join(
        " ".join(str(act[key]) for key in ("do", "path", "name", "source") if act.get(key)) for act in acts
    )

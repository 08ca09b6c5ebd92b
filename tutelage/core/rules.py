"""`on:` rules at work: which one ends a stage, and which stages are made because of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.links import references
from tutelage.base.rules import entered_by
from tutelage.base.spec import Rule
from tutelage.core.record import each_line, read_lines
from tutelage.core.words import finite

if TYPE_CHECKING:
    from tutelage.core.graph import Graph, Node
    from tutelage.core.stage import Run

UNMADE = "not entered"  # the state of a stage that no rule entered


# -- in a running stage -----------------------------------------------------------------------------------------------


class Rules:
    """A stage's rules while it trains, from its first step on.

    How often each held in a row is counted anew from the metrics when a stage is resumed, and what was journaled is
    obeyed, so a cut run takes the way that a whole one takes.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rules: list[Rule] = run.node.stage.on
        self.held = [0] * len(self.rules)
        self.checked = not run.fresh
        self.taken: dict[str, Any] | None = None  # of the journal, with its tick
        for line in run.journal.lines if self.rules else ():
            found = [act for act in line["do"] if line["by"] == "engine" and act["do"] == "enter"]
            self.taken = {"tick": line["tick"], **found[0]} if found else self.taken
        if self.rules and not run.fresh:
            world = run.engine.world
            rows = each_line(run.folder / "metrics.jsonl") if not world.rank else iter(())
            self.held = world.agree(self._recounted(rows))

    def _recounted(self, rows: Iterator[dict[str, Any]]) -> list[int]:
        for row in rows:
            if row["tick"] and not row.get("final"):
                self._count(row["values"] if row["kind"] == "eval" else row)
        return self.held

    def _count(self, found: dict[str, Any]) -> None:
        for i, rule in enumerate(self.rules):
            if rule.signal in found:
                self.held[i] = self.held[i] + 1 if _holds(rule, found[rule.signal]) else 0

    def measured(self, found: dict[str, Any], *, final: bool) -> None:
        """After a measurement, that of the untrained stage apart."""
        if final:
            self._close(found)
        elif self.run.clock.tick:
            self.look(found)

    def look(self, found: dict[str, Any]) -> None:
        """After a step or a measurement: the first rule that holds ends the stage. `found` is what was learned now."""
        clock = self.run.clock
        if not self.rules:
            return
        self._check(found)
        if self.taken is not None:  # before its tick nothing ends the stage, whatever this machine computes
            signal = self.rules[self.taken["rule"]].signal
            if clock.tick > self.taken["tick"] or (clock.tick == self.taken["tick"] and signal in found):
                self._end()
            return
        self._count(found)
        ready = [i for i, rule in enumerate(self.rules) if rule.signal in found and self.held[i] >= rule.times]
        chosen = self.run.engine.world.agree(ready[0] if ready else None)
        if chosen is not None:
            self._enter(chosen, found)
            self._end()

    def _close(self, found: dict[str, Any]) -> None:
        """The stage has ended and was measured: what holds now is entered, else the `otherwise`."""
        if not self.rules or self.taken is not None:
            return
        self._count(found)
        ready = [i for i, rule in enumerate(self.rules) if rule.signal in found and self.held[i] >= rule.times]
        last = [i for i, rule in enumerate(self.rules) if rule.otherwise]
        chosen = self.run.engine.world.agree(next(iter([*ready, *last]), None))
        if chosen is not None:
            self._enter(chosen, found)

    def _enter(self, number: int, found: dict[str, Any]) -> None:
        run, rule = self.run, self.rules[number]
        act = {"do": "enter", "stage": rule.enter, "rule": number}
        was = "" if rule.otherwise else f" ({found[str(rule.signal)]:.6g})"
        run.journal.append(
            tick=run.clock.tick, by="engine", do=[act], why=f"{rule}{was}", write=run.engine.world.rank == 0
        )
        self.taken = {"tick": run.clock.tick, **act}
        run.say({"note": f"{rule}{was}: {rule.enter} is entered"})

    def _end(self) -> None:
        clock = self.run.clock
        clock.total = {unit: clock.count(unit) for unit in clock.total}

    def _check(self, found: dict[str, Any]) -> None:
        """UserError, after the first step, for a signal that is neither a step's nor was measured when the stage began."""
        if self.checked:
            return
        self.checked = True
        known = {**found, **self.run.evals.results}
        for i, rule in enumerate(self.rules):
            if rule.signal is not None and rule.signal not in known:
                hint = did_you_mean(rule.signal, known) or f"; there is {', '.join(known)}"
                raise UserError(
                    f"stages.{self.run.node.name}.on.{i}.signal: nothing here is called '{rule.signal}'{hint}"
                )


def _holds(rule: Rule, value: Any) -> bool:
    """Whether a number is beyond the rule's bounds; what is no number is not."""
    if not finite(value):
        return False
    return (rule.above is None or value > rule.above) and (rule.below is None or value < rule.below)


# -- in the graph -----------------------------------------------------------------------------------------------------


def entered(folder: Path | None) -> dict[str, Any] | None:
    """What the rules of a finished stage entered: `stage`, `rule` (its number), `why` and `tick`; None for nothing."""
    if folder is None or not (folder / "artifact").exists():
        return None
    own = folder / "journal.jsonl"
    lines = read_lines(own if own.exists() else folder / "artifact" / "journal.jsonl")
    found = [
        {**act, "why": line.get("why", ""), "tick": line["tick"]}
        for line in lines
        for act in line["do"]
        if line["by"] == "engine" and act["do"] == "enter"
    ]
    return found[-1] if found else None


def standing(node: Node, *, done: Collection[str], unmade: Collection[str]) -> Literal["ready", "waits", "unmade"]:
    """Whether a stage can be made, given which are `done` and which will not be (`unmade`).

    A stage that a rule may enter is made when one did. One that needs a stage which is not made is not made either,
    but `best` chooses among those that are.
    """
    graph, nodes = node.graph, node.graph.nodes
    doors = entered_by({name: other.stage for name, other in nodes.items()}).get(node.name, [])
    opened = [name for name in doors if name in done and (entered(nodes[name].folder) or {}).get("stage") == node.name]
    choices = [start["best"] for start in node.starts() if isinstance(start, dict) and "best" in start]
    plainly = [start for start in node.starts() if not (isinstance(start, dict) and "best" in start)]
    needed = references(node.stage.model_copy(update={"start": plainly}), among=nodes)
    if any(name in unmade for name in needed) or any(
        all(graph.stage_name(name) in unmade for name in listed) for listed in choices
    ):
        return "unmade"
    if doors and not opened and all(name in done or name in unmade for name in doors):
        return "unmade"
    waits = [name for name in node.inputs if name not in done and name not in unmade]
    return "waits" if waits or (doors and not opened) else "ready"


def unmade(graph: Graph) -> list[str]:
    """The stages that no rule entered, as far as that is known from what is done."""
    done: set[str] = set()
    found: list[str] = []
    for name, node in graph.nodes.items():
        if standing(node, done=done, unmade=found) == "unmade":
            found.append(name)
        elif node.folder is not None and (node.folder / "artifact").exists():
            done.add(name)
    return found

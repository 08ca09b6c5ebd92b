"""How a stage stands with those who steer it: what is paused, locked, waiting, and who may do what.

All of it follows from the journal, line by line, so that it is the same after a crash and nothing of it is saved.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tutelage.base.action import PERSONS_ONLY, RANK, Action, parse, target
from tutelage.base.errors import UserError
from tutelage.base.spec import ActorSpec, SteeringSpec

Moved = tuple[str, float, float, float]  # path, before, after, and what becomes of the rate in use besides


class Waits(Exception):
    """A request that a person must approve first; its text says which rule asks for it."""


@dataclass
class Change:
    """One value changed by somebody."""

    tick: int
    actor: str
    path: str
    was: float
    by: float = 1.0  # of the rate: what a change of the schedule made of it, besides


@dataclass
class Standing:
    """What the journal amounts to, up to its last line."""

    rules: SteeringSpec
    paused: bool = False
    step_to: int | None = None  # the tick at which a `step` is over
    locked: set[str] = field(default_factory=set)
    waiting: dict[str, dict[str, Any]] = field(default_factory=dict)  # requests by id
    released: dict[str, dict[str, Any]] = field(default_factory=dict)  # of these, the ones a person has answered
    done: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # what became of each request: its engine line's entry
    journaled: set[str] = field(default_factory=set)  # requests that were accepted
    held: dict[str, tuple[int, str, bool]] = field(
        default_factory=dict
    )  # target: tick, actor, now and then by a person
    counts: Counter[str] = field(default_factory=Counter)  # requests done, by actor
    changes: list[Change] = field(default_factory=list)

    def fold(self, line: dict[str, Any]) -> None:
        """Take one line of the journal into account."""
        if line["by"] == "engine":
            for entry in line["do"]:
                self._answered(line, entry)
            return
        actor = line.get("actor", "person")
        self.journaled.add(line["id"])
        self.released.pop(line["id"], None)
        acts = [parse(act, place="journal") for act in line["do"]]
        if any(act.do != "note" for act in acts):
            self.counts[actor] += 1
        for act in acts:
            self._takes(act, tick=line["tick"], actor=actor, by=line["by"])

    def _takes(self, act: Action, *, tick: int, actor: str, by: str) -> None:
        if act.do == "pause":
            self.paused, self.step_to = True, None
        elif act.do == "resume":
            self.paused, self.step_to = False, None
        elif act.do == "step":
            self.paused, self.step_to = False, tick + act.n
        elif act.do == "lock":
            self.locked |= set(act.actors)
        elif act.do == "unlock":
            self.locked -= set(act.actors)
        elif act.do in ("approve", "refuse") and act.id in self.waiting:
            kept = self.waiting.pop(act.id)
            self.released[act.id] = {**kept, "approved": act.do == "approve", "refused_by": by}
        elif act.do == "undo":  # what it does is as much theirs as if they had asked for it
            for inner in act.acts or []:
                self._takes(parse(inner, place="journal"), tick=tick, actor=actor, by=by)
        touched = target(act)
        if touched:
            self.held[touched] = (tick, actor, actor == "person")

    def _answered(self, line: dict[str, Any], entry: dict[str, Any]) -> None:
        if entry["do"] == "applied":
            self.done[entry["id"]] = {**entry, "tick": line["tick"]}
            for effect in entry["effects"]:
                for change in effect.get("changes", []):
                    for path, was, _, by in _moved(change):
                        self.changes.append(Change(line["tick"], entry["actor"], path, was, by))
        elif entry["do"] == "waiting":
            self.waiting[entry["id"]] = entry["request"]
        elif entry["do"] in ("refused", "failed"):
            self.done[entry["id"]] = {**entry, "tick": line["tick"]}
            self.released.pop(entry["id"], None)

    def stopped_at(self, tick: int) -> bool:
        """Whether the stage waits before this tick's step."""
        return self.paused or (self.step_to is not None and tick >= self.step_to)

    # -- who may do what ----------------------------------------------------------------------------------------------

    def admit(self, acts: list[Action], *, actor: str, approved: bool = False) -> None:
        """What needs no look at the stage, and comes before anything is read for a request: UserError, Waits."""
        if actor in ("person", "recipe"):
            return
        only = sorted({act.do for act in acts} & PERSONS_ONLY)
        if only:
            raise UserError(f"only a person may {only[0]}")
        if all(act.do == "resume" for act in acts) and self.held.get("pause", (0, ""))[1] == actor:
            return  # who has paused the stage may always let it go on, or it would stand for good
        if actor in self.locked:
            raise UserError(f"a person has locked {'agents' if actor == 'agent' else 'policies'} out")
        rules: ActorSpec = getattr(self.rules, actor)
        if self.counts[actor] >= rules.budget and any(act.do != "note" for act in acts):
            raise UserError(f"the budget of {rules.budget} requests is spent (steering.{actor}.budget)")
        if "add_source" in rules.approve and not approved and any(a.do == "add_source" and a.source for a in acts):
            raise Waits(f"`add_source` waits for a person (steering.{actor}.approve)")  # no file is read before

    def judge(
        self, acts: list[Action], effects: list[dict[str, Any]], *, actor: str, tick: int, approved: bool = False
    ) -> None:
        """UserError for what this actor may not do now; Waits for what a person must allow first.

        acts: what is done, one with its effect, an `undo` as the actions that it stands for.
        """
        if actor in ("person", "recipe"):
            return
        rules: ActorSpec = getattr(self.rules, actor)
        touched = [target(act) for act in acts]
        for path in touched:
            self._free(path, actor=actor, tick=tick)
        twice = next(
            (
                act
                for act, path in zip(acts, touched, strict=True)
                if act.do in ("set", "scale") and touched.count(path) > 1
            ),
            None,
        )
        if twice is not None:  # each would stay within limits that both together leave
            raise UserError(f"{touched[acts.index(twice)]} is changed twice in one request; say once what it shall be")
        moved = [_moved(change) for effect in effects for change in effect.get("changes", [])[:1]]
        for i, own in enumerate(moved):
            others = [other for j, change in enumerate(moved) if j != i for other in change]
            self._within(own, others, rules, actor=actor, tick=tick)
        risky = [name for act, effect in zip(acts, effects, strict=True) if (name := _as(act, effect)) in rules.approve]
        if risky and not approved:
            raise Waits(f"`{risky[0]}` waits for a person (steering.{actor}.approve)")

    def _free(self, touched: str | None, *, actor: str, tick: int) -> None:
        """What a higher actor has just taken, or a person a while ago, is not to be had."""
        if touched is None or touched not in self.held:
            return
        when, who, person = self.held[touched]
        until = when + int(self.rules.hold.value)
        if person and (tick < until or (touched == "pause" and self.stopped_at(tick))):
            raise UserError(f"a person changed {touched} at tick {when}; it is theirs until tick {until}")
        if when == tick and RANK[who] < RANK[actor]:
            raise UserError(
                f"{touched} was changed at this tick by {'an' if who == 'agent' else 'a'} {who}, who goes first"
            )

    def _within(self, moved: list[Moved], others: list[Moved], rules: ActorSpec, *, actor: str, tick: int) -> None:
        """The factor on a value over the last steps stays within the actor's limits, with what `others` of the request add."""
        for path, was, now, by in moved:
            limit = rules.limits.get(path)
            if limit is None:
                continue
            window = int(limit.per.value)
            recent = [c for c in self.changes if c.path == path and c.tick > tick - window and c.actor == actor]
            was = recent[0].was if recent else was
            now *= math.prod([by, *(c.by for c in recent), *(more for what, _, _, more in others if what == path)])
            low, high = limit.by
            if not low * was - 1e-12 * abs(was) <= now <= high * was + 1e-12 * abs(was):
                raise UserError(
                    f"{path} from {was:g} to {now:g} leaves ×[{low:g}, {high:g}] per {window} steps (steering.{actor}.limits)"
                )


def _moved(change: dict[str, Any]) -> list[Moved]:
    """What a change moves that is a number: path, before, after, and what becomes of the rate in use besides."""
    found, was, now = [], change.get("was"), change.get("now")
    if isinstance(was, (int, float)) and isinstance(now, (int, float)):
        found.append((str(change["what"]), float(was), float(now), 1.0))
    if "rate" in change:  # of a schedule
        found.append(("optim.lr", float(change["base"]), float(change["base"]), float(change["rate"])))
    return found


def _as(act: Action, effect: dict[str, Any]) -> str:
    """What an action amounts to: an end put forward ends the stage."""
    if act.do != "extend":
        return act.do
    change = effect["changes"][0]
    return "end_stage" if change["now"] < change["was"] else act.do

"""Acting from the page: what a change would do is shown before it is sent, and what became of it after."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nicegui import ui

from tutelage.base.action import CHANGES
from tutelage.base.errors import UserError
from tutelage.server.auth import Denied
from tutelage.server.page_bits import box, button, field, table, text
from tutelage.server.page_words import plain, rate

if TYPE_CHECKING:
    from tutelage.server.page import Viewer

RISKY = frozenset({"rollback", "reset", "end_stage", "drop_source", "skip_data", "lock"})
TOLD = frozenset({"do", "path", "changes", "text", "acts", "undo"})  # said in other words
WRONG = (UserError, Denied)  # what a request can be turned down with
PATIENCE = 600.0  # seconds that the page waits for an answer: one comes between two steps
PUT_BACK = frozenset({"set", "scale", "mix", "freeze", "unfreeze", "extend", "drop_source", "add_source"})
BACK = {
    "undo": "Undo from now on: the value goes back, the weights stay as training made them since.",
    "weights": "Back to the weights of the save made before the change; what was learned since is gone.",
    "rollback": "Weights, optimizer and methods as that save has them; ticks go on counting.",
}
SKIP = {"skip": "Go past the data seen since, instead of training on them again"}


async def answered(viewer: Viewer, do: list[dict[str, Any]], *, dry: bool = False, why: str = "") -> dict[str, Any]:
    """Send in the viewer's name, and wait for the answer. WRONG where it cannot be sent, or nobody would answer."""
    desk, folder = viewer.house.desk, viewer.live.folder
    if not viewer.live.live:
        raise UserError(f"this stage is {viewer.live.state}: nothing is changed now")
    id = await desk.act(viewer.who, folder, do, why=why, dry=dry, address=viewer.address)
    until = time.monotonic() + PATIENCE
    found: dict[str, Any] = {"id": id, "state": "pending"}
    while found["state"] == "pending" and time.monotonic() < until and not viewer.gone:
        found = await desk.answer(folder, id, seconds=5.0)
        if found["state"] == "pending" and not viewer.live.live:
            raise UserError(f"the stage is {viewer.live.state} now; the request waits there until it is run again")
    return found


def wrong(error: Exception) -> str:
    """What is wrong with a request, without saying that it is one."""
    return str(error).removeprefix("request: ")


def effects_of(answer: dict[str, Any]) -> list[list[str]]:
    """What an answer says that changes or changed: a row for each value, before, after and as used. Groups that change
    alike share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for effect in answer.get("effects") or []:
        changes = effect.get("changes") or []
        for change in changes:
            write = rate if str(change.get("what")).startswith(("optim.lr", "optim.base")) else plain
            numbers = [write(change[key]) if key in change else "" for key in ("was", "now", "used")]
            rows.setdefault((str(change.get("what")), *numbers), []).append(str(change.get("group") or ""))
        rest = {k: v for k, v in effect.items() if k not in TOLD and v not in (None, "", {}, [])}
        if not changes and rest:
            rows.setdefault((str(effect.get("do")), "", plain(rest), ""), []).append("")
    return [[_named(what, groups), *numbers] for (what, *numbers), groups in rows.items()]


def _named(what: str, groups: list[str]) -> str:
    named = [group for group in groups if group and group != "all"]
    return f"{what} ({', '.join(named)})" if named else what


def back_to_before(entry: dict[str, Any]) -> bool:
    """Whether a save was made before an entry of the log, to which `undo` with `weights` goes."""
    return entry.get("actor") in ("person", "agent") and any(act["do"] in CHANGES for act in entry.get("do") or [])


def show_effects(answer: dict[str, Any], *, said: str = "what changes") -> None:
    rows = effects_of(answer)
    for what, _, now, _ in [row for row in rows if not row[1] and not row[3]]:
        text(f"{what}: {now}" if now else what, "small")
    rows = [row for row in rows if row[1] or row[3]]
    used = any(row[3] for row in rows)
    if rows:
        head = (
            ["value", "now", "becomes", "in use next step"]
            if answer["state"] == "dry"
            else ["value", "was", "now", "in use"]
        )
        table(head if used else head[:3], [row if used else row[:3] for row in rows], said=said)


class Ask:
    """A dialog for one request: what it does, what it would change, why, and then the sending."""

    def __init__(
        self,
        viewer: Viewer,
        do: list[dict[str, Any]],
        *,
        title: str,
        says: str = "",
        options: dict[str, str] | None = None,
    ) -> None:
        self.viewer, self.do, self.title, self.says = viewer, do, title, says
        self.options = options or {}  # flags of the (single) action that can be ticked: name to what it says
        self.risky = any(act["do"] in RISKY or act.get("weights") for act in do)
        self.sure: ui.checkbox | None = None

    async def open(self) -> None:
        with self.viewer.root, ui.dialog() as self.dialog, box("t-dialog pile wide"):
            self.dialog.props(f'aria-label="{self.title}"').on("hide", self.dialog.delete)
            text(self.title, tag="h2")
            if self.says:
                text(self.says, "soft", tag="p")
            self.effect = box("pile", role="status", label="effect")
            for flag, said in self.options.items():
                ui.checkbox(said, on_change=lambda e, flag=flag: self._flag(flag, e.value)).props("dense")
            self.why = field("Why (kept in the journal)").props("autofocus").on("keydown.enter", self.send)
            if self.risky:
                self.sure = ui.checkbox("I have read what this does", on_change=lambda: self._ready()).props("dense")
            with box("line").style("justify-content: flex-end"):
                button("Cancel", self.dialog.close, "plain")
                self.go = button("Apply", self.send, "main risk" if self.risky else "main")
                self.go.set_enabled(False)
        self.dialog.open()
        await self.look()

    async def _flag(self, flag: str, value: bool) -> None:
        self.do[0][flag] = value
        await self.look()

    def _ready(self) -> None:
        self.go.set_enabled(self.possible and (self.sure is None or bool(self.sure.value)))

    async def look(self) -> None:
        """Ask the trainer what it would do, and show that."""
        self.possible = False
        self._ready()
        self._say("Asking the trainer what this would do; it answers between two steps …", "soft")
        try:
            answer = await answered(self.viewer, self.do, dry=True)
        except WRONG as error:
            return self._say(wrong(error), "bad")
        if self.dialog.is_deleted:
            return None
        self.possible = answer["state"] in ("dry", "waiting")
        self.effect.clear()
        with self.effect:
            if answer["state"] == "refused":
                text(str(answer.get("error") or "refused"), "bad")
            elif answer["state"] == "waiting":
                text(f"A person must approve this first: {answer.get('error', '')}", "warn")
            show_effects(answer)
        self._ready()
        return None

    def _say(self, said: str, look: str) -> None:
        self.effect.clear()
        with self.effect:
            text(said, look)

    async def send(self) -> None:
        if not self.go.enabled:
            return
        why = self.why.value or ""
        self.dialog.close()
        await act(self.viewer, self.do, title=self.title, why=why)


async def act(viewer: Viewer, do: list[dict[str, Any]], *, title: str, why: str = "") -> dict[str, Any] | None:
    """Send now and say on the page what becomes of it. None where it could not be sent."""
    viewer.say(f"{title}: sent, waiting for the next step …", "soft")
    try:
        answer = await answered(viewer, do, why=why)
    except WRONG as error:
        viewer.say(f"{title}: {wrong(error)}", "bad")
        return None
    state, where = answer["state"], f"at tick {answer.get('tick', '–')}"
    reason = f": {answer['error']}" if answer.get("error") else ""
    brief = "; ".join(f"{row[0]} {row[1]} → {row[2]}" for row in effects_of(answer)[:2] if row[1])
    words = {"applied": f"applied {where}", "refused": f"refused{reason}", "waiting": f"waits for a person{reason}"}
    said = f"{title}: {words.get(state, 'no answer yet; it is in the log once there is one')}"
    look = {"applied": "good", "refused": "bad", "waiting": "warn"}.get(state, "soft")
    undo = answer["id"] if state == "applied" and do[0]["do"] in PUT_BACK else ""
    viewer.say(f"{said} · {brief}" if brief else said, look, undo=undo)
    await viewer.refresh()
    return answer

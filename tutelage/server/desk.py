"""What a server holds, and the one way by which anybody, page or program, asks a stage for something."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from tutelage import steering
from tutelage.base.action import parse
from tutelage.base.errors import UserError
from tutelage.server.auth import PERSONS, Denied, Gate, Who
from tutelage.server.feeds import EVERY, KEEP, Feeds
from tutelage.server.work import Jobs
from tutelage.watching import NAME

LOOK = 0.1  # seconds between two looks for an answer
WAIT = 60.0  # seconds that an answer is waited for at most
BRANCH = 300.0  # seconds that making a branch may take
TRY = 180.0
COUNT = 180.0  # of matrix, batch, compare


class Missing(UserError):
    """There is no such run, stage or request."""


class Desk:
    """One runs folder as it is served. Methods that need a right check it first (Denied)."""

    def __init__(self, runs: Path, gate: Gate, *, every: float = EVERY, keep: float = KEEP) -> None:
        self.runs, self.gate = runs, gate
        self.feeds = Feeds(runs, every=every, keep=keep)
        self.jobs = Jobs()

    def begin_stop(self) -> None:
        """Whoever waits is told at once that the server stops. From the event loop."""
        self.jobs.stop()
        self.feeds.stopping.set()

    async def stop(self) -> None:
        self.begin_stop()
        await self.feeds.stop()

    # -- finding ----------------------------------------------------------------------------------------------------

    def folder(self, run: str, stage: str) -> Path:
        """The newest folder of a stage, always within the runs folder. Missing where there is none."""
        try:
            found = steering.find(f"{run}/{stage}", runs=self.runs)
        except UserError as error:
            raise Missing(str(error)) from error
        if not found.resolve().is_relative_to(self.runs.resolve()):
            raise Missing(f"stage {run}/{stage} lies outside of the runs folder")
        return found

    # -- asking -----------------------------------------------------------------------------------------------------

    async def act(
        self,
        who: Who,
        folder: Path,
        do: list[dict[str, Any]],
        *,
        why: str = "",
        dry: bool = False,
        id: str | None = None,
        address: str = "",
    ) -> str:
        """Send a request in somebody's name; returns its id."""
        self.gate.need(who, "steer")
        names = {str(act.get("do")) for act in do if isinstance(act, dict)}
        if who.actor != "person" and names & PERSONS:
            raise Denied(403, f"{', '.join(sorted(names & PERSONS))}: for persons only; {who.name} is an {who.actor}")
        self.gate.paced(self.gate.actions, who, address)
        asked: dict[str, Any] = {"by": who.name, "actor": who.actor, "why": why, "dry": dry, "id": id}
        return await self.feeds.look(lambda: steering.send(folder, do, **asked))

    async def answer(self, folder: Path, id: str, *, seconds: float) -> dict[str, Any]:
        """What became of a request, `{"state": "pending"}` as long as nobody has said. Missing where it was not asked."""
        until = time.monotonic() + min(seconds, WAIT)
        while True:
            found = await self.feeds.look(lambda: _told(folder, id))
            stopping = self.feeds.stopping.is_set()
            if found.get("state") != "pending" or time.monotonic() >= until or stopping:
                return found
            await asyncio.sleep(LOOK)

    async def attempt(self, who: Who, folder: Path, job: dict[str, Any], *, address: str = "") -> dict[str, Any]:
        """Text from a model: a running stage writes it itself, between two steps; else a process of its own does.

        job: prompts, tokens, temperature, seed, tick (None: the weights as they are now).
        """
        self.gate.need(who, "steer")
        self.gate.paced(self.gate.heavy, who, address)
        if job["tick"] is None and await self.feeds.look(lambda: steering.live(folder)):
            parts = {"tokens": job["tokens"], "temperature": job["temperature"]}
            do = [{"do": "sample", "prompt": prompt, **parts} for prompt in job["prompts"]]
            id = await self.act(who, folder, do, why="try", address=address)
            found = await self.answer(folder, id, seconds=WAIT)
            effects = found.get("effects", [])
            if failed := next((effect["failed"] for effect in effects if "failed" in effect), ""):
                raise UserError(f"no text: {failed}")
            texts = [effect.get("text") for effect in effects]
            return {"id": id, "state": found["state"], "tick": found.get("tick"), "texts": texts} | (
                {"error": found["error"]} if found.get("error") else {}
            )
        return dict(await self.jobs.run({"do": "try", "folder": str(folder), **job}, seconds=TRY))

    async def branch(self, who: Who, folder: Path, action: dict[str, Any], *, why: str, address: str) -> dict[str, Any]:
        """A branch as a run of its own. A live stage makes or marks the save first; starting a process is for admins."""
        self.gate.need(who, "admin" if action["run"] != "no" else "steer")
        self.gate.paced(self.gate.heavy, who, address)
        asked = {"do": "branch", **{key: value for key, value in action.items() if value is not None}}
        parse(asked, place="request")  # the name, too, before a file system sees it
        name = action["name"]
        if not NAME.fullmatch(name) or (self.runs / name).exists():
            raise UserError(f"branch: '{name}' is not the name of a new run in {self.runs.name}")
        if await self.feeds.look(lambda: steering.live(folder)):
            id = await self.act(who, folder, [asked], why=why, address=address)
            found = await self.answer(folder, id, seconds=WAIT)
            if found["state"] != "applied":
                return {"id": id, **{key: found[key] for key in ("state", "error") if key in found}}
            ticks = [effect["tick"] for effect in found.get("effects", []) if "tick" in effect]
            asked |= {"tick": ticks[0]} if ticks else {}
        elif who.actor != "person":
            raise Denied(403, "a stage that does not run cannot say whether an agent may branch from it; ask a person")
        job = {"do": "branch", "folder": str(folder), "action": asked, "runs": str(self.runs)}
        return {"state": "applied", **await self.jobs.run(job, seconds=BRANCH)}


def _told(folder: Path, id: str) -> dict[str, Any]:
    for _ in range(2):  # an answer is written before its request goes
        found = steering.answer(folder, id)
        if found is not None:
            return {"id": id, **found}
        if (folder / "requests" / f"{id}.json").exists():
            return {"id": id, "state": "pending"}
    raise Missing(f"{steering.name_of(folder)} has no request '{id}'")

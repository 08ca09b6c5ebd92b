"""The HTTP routes. What they answer is always valid JSON: NaN and infinity are the strings `nan`, `inf`, `-inf`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.websockets import WebSocket

import tutelage
from tutelage import steering, watching
from tutelage.base.action import DEEPEST, MOST
from tutelage.base.errors import UserError
from tutelage.core.record import no_link, plain
from tutelage.server import live
from tutelage.server.auth import address_of
from tutelage.server.desk import COUNT, WAIT, Desk, Missing
from tutelage.server.feed import Feed, said
from tutelage.server.guard import who_of

Names = Annotated[str | None, Query(description="series, separated by commas; `eval/` stands for all that begin so")]
Width = Annotated[int, Query(ge=10, le=5000, description="buckets; about two points each, spikes always among them")]
Seconds = Annotated[float, Query(ge=0, le=WAIT, description="wait so long for an answer")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Ask(Body):
    """A request: actions as in docs/steering.md. Who asks is whose token or session it is."""

    do: list[dict[str, Any]] = Field(min_length=1, max_length=MOST)
    why: str = Field("", max_length=2000)
    dry: bool = False
    id: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$")


class Try(Body):
    """Prompts for a model. `tick`: a saved one; left out, the weights as they are now."""

    prompts: list[Annotated[str, Field(max_length=20_000)]] = Field(min_length=1, max_length=8)
    tokens: int = Field(64, ge=1, le=512)
    temperature: float = Field(1.0, ge=0, le=5)
    seed: int = 0
    tick: int | None = Field(None, ge=0)


class Branch(Body):
    """A branch as a run `name` of its own. `sets`: changes of the recipe."""

    name: str = Field(max_length=200)
    to: int | None = Field(None, ge=0)
    sets: dict[str, Any] = Field(default_factory=dict)
    run: Literal["beside", "after", "no"] = "no"
    why: str = Field("", max_length=2000)


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else said(plain(content))


def routes(desk: Desk) -> APIRouter:
    """`/api/…` and `/ws/…`."""
    router = APIRouter(default_response_class=Json)
    _looking(router, desk)
    _computing(router, desk)
    _asking(router, desk)

    @router.websocket("/ws/{run}/{stage}")
    async def follow(
        socket: WebSocket, run: str, stage: str, since: int | None = None, names: str | None = None, width: Width = 500
    ) -> None:
        """A stage, live. `since`: the last number known; what came after it follows, and nothing twice."""
        folder = await desk.feeds.look(lambda: desk.folder(run, stage))
        await live.view(socket, desk, folder, who_of(socket), since=since, names=_split(names), width=width)

    return router


def _looking(router: APIRouter, desk: Desk) -> None:
    async def place(run: str, stage: str) -> Path:
        return await desk.feeds.look(lambda: desk.folder(run, stage))

    async def feed_of(run: str, stage: str) -> Feed:
        feed = await desk.feeds.ready(await place(run, stage))
        if feed.fault:
            raise UserError(feed.fault)
        return feed

    async def looked(what: Callable[[], Any]) -> Json:
        return Json(await desk.feeds.look(what))

    @router.get("/api")
    async def about(request: Request) -> Json:
        """Who you are here, and what you may do."""
        who = who_of(request)
        found = {"name": who.name, "actor": who.actor, "scope": who.scope}
        return Json({"tutelage": tutelage.__version__, "you": found, "runs": str(desk.runs.name)})

    @router.get("/api/runs")
    async def runs() -> Json:
        """Every stage that has begun, with its last step."""
        return await looked(lambda: {"stages": [_brief(info) for info in steering.stages(desk.runs)]})

    @router.get("/api/runs/{run}/{stage}")
    async def stage(run: str, stage: str) -> Json:
        """A stage: what it is, what it comes from, what can be steered, which series there are."""
        feed = await feed_of(run, stage)
        return await looked(lambda: _described(desk, feed))

    @router.get("/api/runs/{run}/{stage}/series")
    async def series(
        run: str,
        stage: str,
        names: Names = None,
        since: Annotated[int | None, Query(description="only what is newer than this number")] = None,
        start: Annotated[int | None, Query(description="from this tick on")] = None,
        to: Annotated[int | None, Query(description="up to this tick")] = None,
        width: Width = 1000,
    ) -> Json:
        """Series as lists of equal length: seq, tick, step, tokens, value."""
        feed = await feed_of(run, stage)
        wanted = _split(names)

        def all_of() -> bytes:
            with feed.lock:
                found = {n: feed.points(n, since=since, start=start, to=to, width=width) for n in feed.names(wanted)}
                head = {"seq": feed.last, "loading": feed.loading, "known": feed.names()}
            return said({**head, "series": found})

        return await looked(all_of)

    @router.get("/api/runs/{run}/{stage}/journal")
    async def journal(
        run: str,
        stage: str,
        after: Annotated[int, Query(ge=0, description="lines to leave out from the start")] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    ) -> Json:
        """The journal's lines as they are (`lines`), oldest first; `total` says how many there are."""
        feed = await feed_of(run, stage)
        lines = feed.journal[after : after + limit]
        return Json({"after": after, "total": len(feed.journal), "lines": lines})

    @router.get("/api/runs/{run}/{stage}/log")
    async def log(run: str, stage: str, limit: Annotated[int, Query(ge=1, le=1000)] = 200) -> Json:
        """What was asked of a stage and what became of it, the newest `limit`, oldest first."""
        folder = await place(run, stage)
        return await looked(lambda: {"entries": steering.log(folder)[-limit:]})

    @router.get("/api/runs/{run}/{stage}/controls")
    async def controls(run: str, stage: str) -> Json:
        """What can be steered now."""
        folder = await place(run, stage)
        return await looked(lambda: steering.controls(folder))

    @router.get("/api/runs/{run}/{stage}/actions/{id}")
    async def answer(run: str, stage: str, id: str, wait: Seconds = 0) -> Json:
        """What became of a request; `pending` as long as nobody has said."""
        return Json(await desk.answer(await place(run, stage), id, seconds=wait))


def _computing(router: APIRouter, desk: Desk) -> None:
    async def job(request: Request, what: dict[str, Any], *, kept: bool = False) -> Json:
        desk.gate.paced(desk.gate.heavy, who_of(request), address_of(request.scope))
        return Json(await desk.jobs.run(what, seconds=COUNT, kept=kept))

    async def place(run: str, stage: str) -> str:
        return str(await desk.feeds.look(lambda: desk.folder(run, stage)))

    @router.get("/api/runs/{run}/{stage}/matrix")
    async def matrix(request: Request, run: str, stage: str) -> Json:
        """The forgetting matrix of the stage's run: bits per byte by stage and source."""
        return await job(request, {"do": "matrix", "folder": await place(run, stage)}, kept=True)

    @router.get("/api/runs/{run}/{stage}/batch")
    async def batch(request: Request, run: str, stage: str, tick: Annotated[int, Query(ge=1)]) -> Json:
        """Which documents the step that ended at `tick` saw."""
        return await job(request, {"do": "batch", "folder": await place(run, stage), "tick": tick}, kept=True)

    @router.get("/api/compare")
    async def compare(
        request: Request,
        a: Annotated[str, Query(description="RUN/STAGE")],
        b: Annotated[str, Query(description="RUN/STAGE")],
    ) -> Json:
        """Two stages at equal budget: differences are b minus a, in bits per byte."""
        places = []
        for name in (a, b):
            run, _, stage = name.partition("/")
            places.append(await place(run, stage))
        what = {"do": "compare", "a": places[0], "b": places[1], "names": [a, b]}
        return await job(request, what, kept=True)


def _asking(router: APIRouter, desk: Desk) -> None:
    @router.post("/api/runs/{run}/{stage}/actions", status_code=202)
    async def act(request: Request, run: str, stage: str, ask: Ask, wait: Seconds = 0) -> Json:
        """Ask a stage for something (`dry`: only what it would do). Returns the id, or, with `wait`, the answer."""
        _finite(ask.do)
        who, address = who_of(request), address_of(request.scope)
        desk.gate.need(who, "steer")  # before it is said which stages there are
        folder = await desk.feeds.look(lambda: desk.folder(run, stage))
        id = await desk.act(who, folder, ask.do, why=ask.why, dry=ask.dry, id=ask.id, address=address)
        return Json(await desk.answer(folder, id, seconds=wait), status_code=202)

    @router.post("/api/runs/{run}/{stage}/try")
    async def attempt(request: Request, run: str, stage: str, ask: Try) -> Json:
        """Text from a model: of a running stage, between two of its steps; of a finished one, or a saved tick, here."""
        who, address = who_of(request), address_of(request.scope)
        desk.gate.need(who, "steer")
        folder = await desk.feeds.look(lambda: desk.folder(run, stage))
        return Json(await desk.attempt(who, folder, ask.model_dump(), address=address))

    @router.post("/api/runs/{run}/{stage}/branch")
    async def branch(request: Request, run: str, stage: str, ask: Branch) -> Json:
        """Make a run that goes on from a save of this stage; `run: beside` and `after` start it."""
        _finite(ask.sets)
        who, address = who_of(request), address_of(request.scope)
        desk.gate.need(who, "steer")
        folder = await desk.feeds.look(lambda: desk.folder(run, stage))
        action = ask.model_dump(exclude={"why"})
        return Json(await desk.branch(who, folder, action, why=ask.why, address=address))


# -- what is answered -------------------------------------------------------------------------------------------------


def _split(names: str | None) -> list[str] | None:
    return [name for name in names.split(",") if name] if names is not None else None


def _finite(value: Any, *, levels: int = DEEPEST) -> None:
    """UserError for what Python's JSON reader lets pass and no file or answer holds: NaN, infinity, half a surrogate pair."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError("a request's numbers are finite")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError("a request's text holds half of a surrogate pair")
    if not levels:
        raise UserError(f"a request has at most {DEEPEST} levels")
    for part in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(part, levels=levels - 1)


def _brief(info: steering.StageInfo) -> dict[str, Any]:
    last = _last(info.folder / "metrics.jsonl")
    kept = {key: last.get(key) for key in ("step", "tokens", "loss", "lr", "seconds")}
    return {**_named(info), "last": kept if last else None}


def _named(info: steering.StageInfo) -> dict[str, Any]:
    found = info.as_dict()
    found["version"] = int(found.pop("folder").rpartition("/")[2])
    return found


def _last(path: Path) -> dict[str, Any]:
    """The last step in a metrics file, looked for near its end only."""
    try:
        with open(path, "rb", opener=no_link) as handle:
            handle.seek(max(0, path.stat().st_size - 65_536))
            lines = handle.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = orjson.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") == "train":
            return row
    return {}


def _described(desk: Desk, feed: Feed) -> dict[str, Any]:
    folder = feed.folder
    name = steering.name_of(folder)
    info = next((info for info in steering.stages(desk.runs) if info.name == name), None)
    if info is None:
        raise Missing(f"stage {name} is gone")
    about = watching.read(folder / "stage.json")
    broken = feed.table.broken
    return {
        **_named(info),
        "about": (about or {}).get("stage", {}),
        "controls": feed.controls,
        "series": feed.names(),
        "rows": feed.table.rows,
        "seq": feed.last,
        "loading": feed.loading,
        "faults": [f"metrics.jsonl: {broken} lines are no JSON"] if broken else [],
        "error": watching.last_line(folder / "error.txt"),
    }

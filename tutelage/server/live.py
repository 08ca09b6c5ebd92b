"""The WebSocket of a stage: everything there is, then everything that comes, each once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from pathlib import Path

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from tutelage.base.errors import UserError
from tutelage.server.auth import Gate, Who
from tutelage.server.desk import Desk
from tutelage.server.feed import USUAL, Feed, said

QUIET = 15.0  # seconds without news after which a viewer is told that all is well
SLOW = 30.0  # seconds that a viewer may take for one message
HELD = 2.0  # seconds between two looks whether a viewer's token is still good
GONE, DENIED, STOPS, BUSY, FAILED = 4404, 4401, 1001, 1013, 1011

log = logging.getLogger("tutelage.server")


async def view(
    socket: WebSocket, desk: Desk, folder: Path, who: Who, *, since: int | None, names: list[str] | None, width: int
) -> None:
    """Serve one viewer until it leaves, its token is taken back, the stage goes or the server stops.

    since: the number up to which it knows everything. If the feed still knows what followed, that is what it gets, as
    `news`; else a `snapshot`, which takes the place of all it had.
    """
    await socket.accept()
    viewer = asyncio.create_task(
        _serve(socket, desk, folder, since, tuple(names) if names is not None else USUAL, width)
    )
    left = asyncio.create_task(_left(socket))
    stops = asyncio.create_task(desk.feeds.stopping.wait())
    denied = asyncio.create_task(_denied(desk.gate, who))
    tasks = (viewer, left, stops, denied)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        stopped, barred = stops.done(), denied.done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    code, why = _ended(viewer)
    if stopped or barred:
        code, why = (
            (STOPS, "the server stops") if stopped else (DENIED, "the token was taken back, or the session ended")
        )
    if socket.client_state is WebSocketState.CONNECTED and socket.application_state is WebSocketState.CONNECTED:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):
            await asyncio.wait_for(socket.close(code, why[:120]), 1.0)


def _ended(viewer: asyncio.Task[None]) -> tuple[int, str]:
    """Why a viewer is sent away, as a WebSocket says it."""
    error = None if viewer.cancelled() else viewer.exception()
    if error is None or isinstance(error, (WebSocketDisconnect, RuntimeError)):  # the stage, or the viewer, has gone
        return GONE, ""
    if isinstance(error, (UserError, TimeoutError)):
        return BUSY, str(error) or "too slow"
    log.error("a viewer's feed failed", exc_info=error)
    return FAILED, "the server failed; its log says where"


async def _left(socket: WebSocket) -> None:
    """Until the viewer leaves. What it says is not listened to: requests go over HTTP, where they can be refused."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while (await socket.receive())["type"] != "websocket.disconnect":
            pass


async def _denied(gate: Gate, who: Who) -> None:
    """Until the viewer's token is good no longer, or nobody can say whether it is."""
    with contextlib.suppress(UserError):
        while gate.still(who):
            await asyncio.sleep(HELD)


async def _serve(
    socket: WebSocket, desk: Desk, folder: Path, since: int | None, names: tuple[str, ...] | None, width: int
) -> None:
    async with desk.feeds.watched(folder) as feed:
        if feed.loading is not None:
            await _send(socket, await desk.feeds.look(lambda: feed.preview(names=names)))
        while feed.loading is not None and not feed.fault:
            await desk.feeds.news(feed, seconds=0.5)
            await _send(socket, said(feed.progress()))
        version = -1
        if since is not None and feed.knows(since):
            at = since
        else:
            message, at = await desk.feeds.look(lambda: feed.snapshot(names=names, width=width))
            await _send(socket, message)
        controls = feed.controls
        await _send(socket, said({"type": "controls", "controls": controls}))
        while not feed.fault:
            if feed.version == version:
                await desk.feeds.news(feed, seconds=QUIET)
                if feed.version == version:
                    await _send(socket, said({"type": "alive", "seq": at}))
            version = feed.version
            at = await _news(socket, desk, feed, at, names)
            if feed.controls != controls:
                controls = feed.controls
                await _send(socket, said({"type": "controls", "controls": controls}))
        await _send(socket, said({"type": "gone", "error": feed.fault}))


async def _news(socket: WebSocket, desk: Desk, feed: Feed, at: int, names: tuple[str, ...] | None) -> int:
    """Send what came after number `at`; returns up to where."""
    while at < feed.last:
        if not feed.knows(at):  # so slow that what it missed is kept no more
            message, at = await desk.feeds.look(lambda: feed.snapshot(names=names))
        else:
            message, at = await desk.feeds.look(partial(feed.since, at, names=names))
        await _send(socket, message)
    return at


async def _send(socket: WebSocket, message: bytes) -> None:
    await asyncio.wait_for(socket.send_text(message.decode()), SLOW)

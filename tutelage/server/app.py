"""The server as a whole, and the process that runs it: needs the runs folder alone, and may end at any time."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from rich.console import Console
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocket

import tutelage
from tutelage.base.errors import UserError
from tutelage.server.api import Json, routes
from tutelage.server.auth import Denied, Gate
from tutelage.server.desk import Desk, Missing
from tutelage.server.feeds import EVERY, KEEP
from tutelage.server.guard import Guard, doors, refusal

console = Console(highlight=False, markup=False)
log = logging.getLogger("tutelage.server")
SWITCH = 0.0005  # seconds after which a thread that parses lets another one go on


def build(
    runs: Path,
    *,
    gate: Gate | None = None,
    root_path: str = "",
    every: float = EVERY,
    keep: float = KEEP,
) -> FastAPI:
    """The application over a runs folder; `app.state.desk` is what it holds.

    root_path: where a proxy shows it; gate: who may come in, by default readers on this machine, and tokens.
    """
    gate = gate or Gate(runs, hosts=[], origins=[])
    desk = Desk(runs, gate, every=every, keep=keep)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await desk.stop()

    app = FastAPI(
        title="Tutelage",
        version=tutelage.__version__,
        description="Runs, live; and requests to running stages (docs/serving.md, docs/steering.md).",
        lifespan=life,
    )
    app.state.desk = desk
    _errors(app)
    app.include_router(doors(gate))
    app.include_router(routes(desk))
    app.add_middleware(Guard, gate=gate, root=root_path)
    return app


def _errors(app: FastAPI) -> None:
    """Every error is `{"error": one line}`."""

    async def told(connection: Request | WebSocket, error: Exception) -> Any:
        status = 404 if isinstance(error, Missing) else error.status if isinstance(error, Denied) else 400
        return await _answered(connection, status, error)

    async def invalid(connection: Request | WebSocket, error: Any) -> Any:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return await _answered(connection, 422, f"{where}: {first['msg']}")

    async def http(connection: Request, error: Any) -> Any:
        return Json({"error": error.detail}, status_code=error.status_code, headers=error.headers)

    async def failed(connection: Request | WebSocket, error: Exception) -> Any:
        log.error("%s: %s", type(error).__name__, error, exc_info=error)
        return await _answered(connection, 500, f"the server failed: {type(error).__name__}; its log says where")

    for kind in (UserError, Denied):
        app.add_exception_handler(kind, told)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


async def _answered(connection: Request | WebSocket, status: int, why: object) -> Any:
    denied = Denied(status, " ".join(str(why).split()))
    if isinstance(connection, WebSocket):
        await refusal(connection.scope, denied)(connection.scope, connection.receive, connection.send)
        return None
    return refusal(connection.scope, denied)


# -- the process ------------------------------------------------------------------------------------------------------


class Process(uvicorn.Server):
    """Uvicorn, which on a signal first tells everybody who waits."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self.desk = desk

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.desk.begin_stop()
        await super().shutdown(sockets)


def serve(
    runs: Path,
    *,
    host: str,
    port: int,
    root_path: str,
    hosts: list[str],
    origins: list[str],
    closed: bool,
) -> None:
    """Serve until a signal. UserError for an address elsewhere without tokens, and for a port that is taken."""
    gate = Gate(runs, host=host, hosts=hosts, origins=origins, closed=closed)
    if not runs.is_dir():
        raise UserError(f"there is no folder {runs}; say with --runs where runs are kept")
    if not gate.loopback and not gate.tokens.known():
        raise UserError(
            f"--host {host} can be reached from other machines, so it needs tokens: tutelage serve --new-token NAME. "
            "Or leave --host out and come through an ssh tunnel"
        )
    root = "/" + root_path.strip("/") if root_path.strip("/") else ""
    from tutelage.server.page import mount  # the API alone needs no NiceGUI

    app = build(runs, gate=gate, root_path=root)
    mount(app)
    sock = _bound(host, port)
    port = sock.getsockname()[1]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}{root}"
    console.print(f"Serving {runs} at {url}/ (API: {url}/docs). Ctrl-C ends it; training goes on.", soft_wrap=True)
    if gate.loopback:
        console.print(f"To steer, open once: {url}/enter?key={gate.new_key()}", soft_wrap=True, markup=False)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws_max_size=1 << 16,
        timeout_graceful_shutdown=2,
        lifespan="on",
    )
    sys.setswitchinterval(SWITCH)
    Process(config, app.state.desk).run(sockets=[sock])


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)  # from now on nobody is refused: the URL is told before the first answer can be given
    except (OSError, OverflowError) as error:
        sock.close()
        raise UserError(f"{host} port {port} cannot be listened on: {error}; take another with --port") from error
    return sock

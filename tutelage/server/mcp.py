"""The MCP server: agents steer over stdio, or over HTTP on this machine with a token. Its tools are in mcp_tools.py."""

from __future__ import annotations

import asyncio
import functools
import inspect
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import AnyHttpUrl, ValidationError

from tutelage import steering
from tutelage.base.errors import UserError
from tutelage.server.auth import SCOPES, Tokens, Who

try:
    from mcp.server.auth.provider import AccessToken
    from mcp.server.auth.settings import AuthSettings
    from mcp.server.mcpserver import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
    from mcp_types import ToolAnnotations
except ImportError as error:
    raise UserError("the MCP server needs the mcp package: install tutelage[serve,mcp]") from error

from tutelage.server.mcp_tools import Desk, instructions


class _Server(MCPServer[Any]):
    """The SDK's server; what a caller got wrong is one line."""

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError):
                first = error.__cause__.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise ToolError(f"{name}: {where}: {first['msg']}") from None
            if isinstance(error.__cause__, ToolError):
                raise ToolError(str(error.__cause__)) from None  # without "Error executing tool …"
            raise


def _told(tool: Callable[..., Any]) -> Callable[..., Any]:
    """A tool whose UserError the client sees as a failed call, one line."""

    @functools.wraps(tool)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            if inspect.iscoroutinefunction(tool):
                return await tool(*args, **kwargs)
            return await asyncio.to_thread(tool, *args, **kwargs)  # it may wait; nobody else shall
        except UserError as error:
            raise ToolError(" ".join(str(error).split())) from error

    return call


def build(runs: Path, *, who: Who | None, auth: AuthSettings | None = None, verifier: Any = None) -> MCPServer[Any]:
    """A server of the runs folder: for one agent (`who`, stdio), or for whoever a token names."""
    desk = Desk(runs, who)
    server = _Server(
        "tutelage",
        instructions=instructions(),
        log_level="WARNING",
        auth=auth,
        token_verifier=verifier,
        subscriptions=False,
    )
    looking = (
        desk.list_runs, desk.describe, desk.read_metrics, desk.read_measurements, desk.read_journal, desk.steerable,
        desk.compare, desk.wait_for_answer, desk.try_result, desk.dry_run,
    )  # fmt: skip
    acting = (desk.act, desk.ask_approval, desk.sample, desk.try_out, desk.branch)
    destroying = (desk.act, desk.ask_approval)
    for tool in (*looking, *acting):
        reads = tool in looking
        hints = ToolAnnotations(read_only_hint=reads, destructive_hint=tool in destroying, open_world_hint=False)
        server.add_tool(_told(tool), description=" ".join((tool.__doc__ or "").split()), annotations=hints)
    return server


class Verifier:
    """Tokens of the runs folder, as the SDK asks for them. Scopes include the lower ones; the last is the highest."""

    def __init__(self, runs: Path) -> None:
        self.tokens = Tokens(runs)

    async def verify_token(self, token: str) -> AccessToken | None:
        who = self.tokens.find(token)
        if who is None:
            return None
        return AccessToken(token=who.token, client_id=who.name, scopes=list(SCOPES[: SCOPES.index(who.scope) + 1]))


def serve_stdio(runs: Path, *, name: str, scope: str) -> None:
    """Answer on stdin and stdout until stdin ends."""
    if scope not in SCOPES:
        raise UserError(f"--scope is one of {', '.join(SCOPES)}")
    if name in steering.OURS or not name.strip():
        raise UserError(f"--as: '{name}' is not an agent's name")
    build(runs, who=Who(name, "agent", scope)).run("stdio")


def serve_http(runs: Path, *, port: int, say: Callable[[str], None]) -> None:
    """Answer on http://127.0.0.1:PORT/mcp; every request needs a token of the runs folder."""
    import uvicorn

    place = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind(("127.0.0.1", port))
        place.listen(128)  # from now on nobody is refused: the URL is told before the first answer can be given
    except OSError as error:
        raise UserError(f"--http {port}: {error.strerror}") from error
    url = f"http://127.0.0.1:{place.getsockname()[1]}"
    auth = AuthSettings(issuer_url=AnyHttpUrl(url), resource_server_url=None, required_scopes=["read"])
    server = build(runs, who=None, auth=auth, verifier=Verifier(runs))
    app = server.streamable_http_app(stateless_http=True, json_response=True, max_request_body_size=1 << 20)
    if not Verifier(runs).tokens.known():
        say("no token yet: tutelage serve --new-token NAME --scope steer --actor agent")
    say(f"MCP at {url}/mcp")
    uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on")).run(sockets=[place])

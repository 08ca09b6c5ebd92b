"""The gate as a layer around the whole server, pages included: nothing behind it is reached unasked."""

from __future__ import annotations

import html
from typing import Any
from urllib.parse import parse_qs

import orjson
from fastapi import APIRouter, Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tutelage.base.errors import UserError
from tutelage.server.auth import BODY, Denied, Gate, Who, address_of

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"referrer-policy", b"same-origin"),
)
_FORM = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Tutelage</title>
<body style="font: 16px system-ui; max-width: 34em; margin: 15vh auto; padding: 0 1em">
<h1 style="font-size: 1.3em">Tutelage</h1><p>{why}</p>
<form method="post" action="{root}/login"><label>Token <input name="token" type="password" autofocus
 autocomplete="current-password" size="48"></label> <button>Log in</button></form></body></html>"""
# A page that goes on by itself: after a redirect the browser would still count the first link as where we came from,
# and keep a strict cookie back if that was another site.
_ON = (
    '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={root}/"><a href="{root}/">on</a>'
)


class Guard:
    """ASGI layer: lets in what the gate lets in, and puts who it is into `scope["state"]["who"]`."""

    def __init__(self, app: ASGIApp, gate: Gate, root: str = "") -> None:
        self.app, self.gate, self.root = app, gate, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if self.root:
            scope["root_path"] = self.root
        try:
            who = self.gate.check(scope)
            if int(Headers(scope=scope).get("content-length") or 0) > BODY:
                raise Denied(413, f"a request's body is at most {BODY} bytes")
        except Denied as denied:
            await refusal(scope, denied)(scope, receive, send)
            return
        except UserError as error:
            await refusal(scope, Denied(503, str(error)))(scope, receive, send)
            return
        except ValueError:
            await refusal(scope, Denied(400, "the Content-Length is no number"))(scope, receive, send)
            return
        scope.setdefault("state", {})["who"] = who
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self.app(scope, _counted(receive), _marked(send))


def refusal(scope: Scope, denied: Denied) -> Any:
    """An answer that turns a request down: for a browser that wants a page the form to log in, else one line."""
    accept = Headers(scope=scope).get("accept", "")
    if scope["type"] == "http" and denied.status == 401 and "text/html" in accept:
        return form(denied.why, root=str(scope.get("root_path", "")))
    head = {"www-authenticate": "Bearer"} if denied.status == 401 else None
    response = JSONResponse({"error": denied.why}, status_code=denied.status, headers=head)
    if scope["type"] == "http":
        return response

    async def turned_down(scope: Scope, receive: Receive, send: Send) -> None:
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 4000 + denied.status, "reason": denied.why[:120]})
            return
        await send({"type": "websocket.http.response.start", "status": denied.status, "headers": response.raw_headers})
        await send({"type": "websocket.http.response.body", "body": response.body})

    return turned_down


def form(why: str, *, root: str) -> HTMLResponse:
    return HTMLResponse(_FORM.format(why=html.escape(why), root=html.escape(root)), status_code=401)


def _counted(receive: Receive) -> Receive:
    """A body that is sent in pieces is cut off where it grows too long."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > BODY:
            raise HTTPException(413, f"a request's body is at most {BODY} bytes")
        return message

    return counted


def _marked(send: Send) -> Send:
    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
        await send(message)

    return marked


def who_of(connection: Any) -> Who:
    """Who a request, a WebSocket or a page's client (anything with an ASGI `scope`) is from."""
    found = connection.scope.get("state", {}).get("who")
    assert isinstance(found, Who), "the gate stands before everything"
    return found


# -- becoming somebody ------------------------------------------------------------------------------------------------


def doors(gate: Gate) -> APIRouter:
    """`/enter?key=…` (the URL that the start prints), `/login` (a form, or `{"token": …}`), `/logout`."""
    router = APIRouter(include_in_schema=False)

    def opened(request: Request, secret: str) -> Response:
        root = str(request.scope.get("root_path", ""))
        response = HTMLResponse(_ON.format(root=html.escape(root)), headers={"cache-control": "no-store"})
        secure = request.url.scheme == "https"
        response.set_cookie(gate.cookie, secret, httponly=True, samesite="strict", path=f"{root}/", secure=secure)
        return response

    @router.get("/enter")
    def enter(request: Request, key: str = "") -> Response:
        return opened(request, gate.enter(key, address=address_of(request.scope)))

    @router.get("/login")
    def ask(request: Request) -> Response:
        return form(
            "Log in with a token: tutelage serve --new-token NAME", root=str(request.scope.get("root_path", ""))
        )

    @router.post("/login")
    async def login(request: Request) -> Response:
        body = await request.body()
        if request.headers.get("content-type", "").startswith("application/json"):
            try:
                token = orjson.loads(body)["token"]
            except (ValueError, KeyError, TypeError):
                token = None
        else:
            token = parse_qs(body.decode("utf-8", "replace")).get("token", [None])[0]
        if not isinstance(token, str):
            raise Denied(400, 'a token is given as the form\'s field, or as {"token": "…"}')
        return opened(request, gate.login(token, address=address_of(request.scope)))

    @router.post("/logout")
    def logout(request: Request) -> Response:
        gate.logout(request.scope)
        response = JSONResponse({"done": True})
        response.delete_cookie(gate.cookie, path=f"{request.scope.get('root_path', '')}/")
        return response

    return router

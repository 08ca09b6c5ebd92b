"""Talks to an OpenAI-compatible endpoint, which may be slow, lie or be dead: a whole reply in time, or one clear line."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from tutelage.base.endpoint import is_local
from tutelage.base.errors import UserError

if TYPE_CHECKING:
    import httpx
    from anyio.from_thread import BlockingPortal

MOST_BYTES = 1_000_000  # of a reply


class Reply(NamedTuple):
    """What came back, of whatever status. `wait` is how many seconds the endpoint asks for, if it does."""

    status: int
    data: bytes
    wait: float | None


def connect(url: str) -> httpx.AsyncClient:
    """A client for one endpoint; it follows no redirect, for a key would go along. UserError where httpx is missing."""
    try:
        import httpx
    except ImportError as error:
        raise UserError("an endpoint needs httpx: pip install tutelage[endpoint]") from error
    return httpx.AsyncClient(timeout=None, follow_redirects=False, trust_env=not is_local(url))


def portal() -> AbstractContextManager[BlockingPortal]:
    """A way into a loop in a thread of its own: in the caller's one may run already, as in a notebook."""
    from anyio.from_thread import start_blocking_portal

    return start_blocking_portal()


async def post(
    client: httpx.AsyncClient, url: str, question: dict[str, Any], *, key: str | None, timeout: float
) -> Reply:
    """The reply to a chat question, within `timeout` seconds and a megabyte; UserError for everything else."""
    import httpx

    head = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        where = url.rstrip("/") + "/chat/completions"
        async with asyncio.timeout(timeout), client.stream("POST", where, json=question, headers=head) as reply:
            data = b""
            async for piece in reply.aiter_bytes():
                data += piece
                if len(data) > MOST_BYTES:
                    raise UserError(f"the reply is longer than {MOST_BYTES:,} bytes")
            return Reply(reply.status_code, data, _seconds(reply.headers.get("retry-after")))
    except TimeoutError as error:
        raise UserError(f"no whole reply within {timeout:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:  # a date
        return None


def said(data: bytes) -> tuple[str | None, str | None]:
    """The text of a chat completion (None where the model refused) and why it ended. UserError for what is no completion."""
    try:
        choice = json.loads(data)["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError("the reply is no chat completion") from error
    if content is not None and not isinstance(content, str):
        raise UserError("the reply has no text")
    return content, reason if isinstance(reason, str) else None


def complaint(reply: Reply, *, key: str | None) -> str:
    """One printable line about a reply that is no answer, in the endpoint's own words as far as it has any."""
    text = reply.data[:2000].decode("utf-8", "replace")
    try:
        found = json.loads(reply.data)
        found = found.get("error", found.get("detail", found.get("message", text)))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError, RecursionError):
        pass
    text = text.replace(key, "***") if key else text
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
    return f"HTTP {reply.status}: {line}".rstrip(": ")

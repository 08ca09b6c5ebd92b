"""Who may ask the server for what: tokens, sessions, where a request comes from, how often it may come.

Reading from the same machine needs nothing (unless the server is closed); everything else needs a token, or a session
that a token or the one-time key of the start was exchanged for. A token is 256 bits by chance, so its plain SHA-256 is
what is kept. Who a request is from is never read from its body.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import hmac
import ipaddress
import json
import math
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from tutelage.base.errors import UserError
from tutelage.core.record import write_whole
from tutelage.steering import ACTORS, OURS

SCOPES = ("read", "steer", "admin")
PERSONS = frozenset({"approve", "refuse", "lock", "unlock"})  # actions that are for persons only
SESSION = 12 * 3600.0  # seconds after its last use
BODY = 1 << 20  # bytes of a request's body
_TOKEN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,63}")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_PUBLIC = frozenset({"/enter", "/login"})  # what one must reach to become somebody


class Denied(Exception):
    """A request that is turned down: an HTTP status and one line."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True)
class Who:
    """Somebody who asks. `scope`: read, steer (requests, branches' recipes, trying), admin (starting processes too)."""

    name: str
    actor: str = "person"
    scope: str = "read"
    token: str = ""  # hash of the token behind it, if there is one
    session: str = ""  # and of the session's secret

    def may(self, scope: str) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


# -- tokens -----------------------------------------------------------------------------------------------------------


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Tokens:
    """The tokens of a runs folder, in `.tokens.json` (mode 600). Read again when the file changes."""

    def __init__(self, runs: Path) -> None:
        self.path = runs / ".tokens.json"
        self._seen: tuple[int, int, int] | None = None
        self._known: dict[str, Who] = {}

    def known(self) -> dict[str, Who]:
        """By hash. UserError for a file that others may read, or that is none of ours."""
        try:
            about = self.path.stat()
        except FileNotFoundError:
            self._seen, self._known = None, {}
            return {}
        if stat.S_IMODE(about.st_mode) & 0o077:
            raise UserError(f"{self.path} can be read by others; run: chmod 600 {self.path}")
        seen = (about.st_mtime_ns, about.st_size, about.st_ino)
        if seen != self._seen:
            try:
                rows = json.loads(self.path.read_text(encoding="utf-8"))["tokens"]
                known = {r["hash"]: Who(r["name"], r["actor"], r["scope"], r["hash"]) for r in rows}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path} is not a list of tokens: {error}") from error
            self._seen, self._known = seen, known
        return self._known

    def make(self, name: str, *, scope: str, actor: str) -> str:
        """A new token, shown once. UserError for a name that is taken or that nobody may sign with."""
        if not _TOKEN_NAME.fullmatch(name) or name in OURS:
            raise UserError(f"--new-token '{name}': letters, digits, spaces and . _ @ -, and none of {', '.join(OURS)}")
        if scope not in SCOPES or actor not in ACTORS:
            raise UserError(f"--scope is one of {', '.join(SCOPES)}, --actor one of {', '.join(ACTORS)}")
        text = f"tut_{secrets.token_urlsafe(32)}"
        made = {"name": name, "scope": scope, "actor": actor, "hash": _hash(text), "made": time.time()}
        with self._alone():
            rows = self._rows()
            if any(row["name"] == name for row in rows):
                raise UserError(f"there is a token '{name}' already; take it back with --drop-token first")
            self._write([*rows, made])
        return text

    def drop(self, name: str) -> None:
        """A token is no longer good from now on; neither are sessions that it opened."""
        with self._alone():
            rows = self._rows()
            if not any(row["name"] == name for row in rows):
                raise UserError(f"no token '{name}' (there are: {', '.join(row['name'] for row in rows) or 'none'})")
            self._write([row for row in rows if row["name"] != name])

    def find(self, text: str) -> Who | None:
        """Whose token this is. Every hash is compared, each in constant time."""
        asked, found = _hash(text), None
        for known, who in self.known().items():
            if hmac.compare_digest(known, asked):
                found = who
        return found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process changes the list meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _rows(self) -> list[dict[str, Any]]:
        self.known()  # refuses a file that is not ours
        return list(json.loads(self.path.read_text(encoding="utf-8"))["tokens"]) if self.path.exists() else []

    def _write(self, rows: list[dict[str, Any]]) -> None:
        before = os.umask(0o077)
        try:
            write_whole(self.path, json.dumps({"tokens": rows}, indent=1) + "\n")
        finally:
            os.umask(before)


# -- how often --------------------------------------------------------------------------------------------------------


class Limit:
    """At most `burst` at once and `rate` a second, for each key. It forgets whom it has not seen for long."""

    def __init__(self, *, burst: float, rate: float) -> None:
        self.burst, self.rate = burst, rate
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> float:
        """0, or how many seconds to wait."""
        now = time.monotonic()
        if len(self._left) > 1000:
            full = self.burst / self.rate
            self._left = {k: v for k, v in self._left.items() if now - v[1] < full}
        left, at = self._left.get(key, (self.burst, now))
        left = min(self.burst, left + (now - at) * self.rate)
        if left < 1:
            self._left[key] = (left, now)
            return (1 - left) / self.rate
        self._left[key] = (left - 1, now)
        return 0.0


# -- the gate ---------------------------------------------------------------------------------------------------------


class Gate:
    """Decides of every request and WebSocket who it is from and whether it may come in.

    host: the address that is listened on; hosts and origins: further names and origins (`https://hub.example.org`) that
    a proxy in front is reached by; closed: reading needs a token, too.
    """

    def __init__(
        self, runs: Path, *, host: str = "127.0.0.1", hosts: list[str], origins: list[str], closed: bool = False
    ) -> None:
        self.tokens = Tokens(runs)
        self.loopback = is_loopback(host)
        self.closed = closed
        self.anywhere = host in ("0.0.0.0", "::", "")
        own = {socket.gethostname().lower(), socket.getfqdn().lower()} if not self.loopback else set()
        self.hosts = _LOOPBACK | own | {name.lower() for name in [host, *hosts] if name}
        self.origins = {origin.rstrip("/").lower() for origin in origins}
        self.cookie = f"tutelage_{_hash(str(runs.resolve()))[:8]}"
        self.actions = Limit(burst=20, rate=1.0)
        self.heavy = Limit(burst=6, rate=0.2)
        self._failed = Limit(burst=10, rate=0.2)
        self._key: str | None = None
        self._sessions: dict[str, tuple[Who, float]] = {}

    # -- becoming somebody ------------------------------------------------------------------------------------------

    def new_key(self) -> str:
        """A key that opens one person's session, once: for whoever sees this process's terminal."""
        key = secrets.token_urlsafe(24)
        self._key = _hash(key)
        return key

    def enter(self, key: str, *, address: str) -> str:
        """Exchange the key of the start for a session's cookie; Denied for any other, and the second time."""
        if self._key is None or not hmac.compare_digest(self._key, _hash(key)):
            raise self._failure(
                address, "this key was used, or is none; the server's terminal or a token opens a session"
            )
        self._key = None
        return self._open(Who(_user(), "person", "admin"))

    def login(self, token: str, *, address: str) -> str:
        """Exchange a token for a session's cookie."""
        who = self.tokens.find(token.strip())
        if who is None:
            raise self._failure(address, "no such token")
        return self._open(who)

    def logout(self, scope: Any) -> None:
        self._sessions.pop(_hash(_cookie(Headers(scope=scope), self.cookie)), None)

    def _open(self, who: Who) -> str:
        now = time.monotonic()
        self._sessions = {k: v for k, v in self._sessions.items() if now - v[1] < SESSION}
        secret = secrets.token_urlsafe(32)
        self._sessions[_hash(secret)] = (replace(who, session=_hash(secret)), now)
        return secret

    def _failure(self, address: str, why: str) -> Denied:
        wait = self._failed.take(address)
        return Denied(429, f"too many wrong tokens; wait {wait:.0f} s") if wait else Denied(401, why)

    # -- asking -----------------------------------------------------------------------------------------------------

    def check(self, scope: Any) -> Who:
        """Who a request (an ASGI scope, http or websocket) is from. Denied for one that may not even read."""
        headers = Headers(scope=scope)
        self._from_here(headers, scope)
        address = address_of(scope)
        who = self._known(headers, address)
        if who is not None:
            return who
        if route(scope) in _PUBLIC:
            return Who("nobody")
        if self.closed or not self.loopback or not is_loopback(address) or _forwarded(headers):
            raise Denied(401, "a token is needed: send it as `Authorization: Bearer …`, or log in")
        return Who("nobody")

    def still(self, who: Who) -> bool:
        """Whether somebody known from earlier (a page that was opened) is still good: a session ends, a token is taken back."""
        if who.session and time.monotonic() - self._sessions.get(who.session, (who, -math.inf))[1] > SESSION:
            return False
        return not who.token or who.token in self.tokens.known()

    def need(self, who: Who, scope: str) -> None:
        """Denied unless `who` is somebody of at least that scope."""
        if who.name == "nobody" and scope != "read":
            raise Denied(401, f"a token of scope {scope} is needed: `tutelage serve --new-token NAME --scope {scope}`")
        if not who.may(scope) or not self.still(who):
            raise Denied(403, f"{who.name} may {who.scope}; this needs a token of scope {scope}")
        if who.session:
            self._sessions[who.session] = (who, time.monotonic())

    def paced(self, limit: Limit, who: Who, address: str) -> None:
        """Denied for one who asks too often."""
        wait = limit.take(who.token or f"{who.name} {address}")
        if wait:
            raise Denied(429, f"too many requests; wait {max(1, round(wait))} s")

    def _known(self, headers: Headers, address: str) -> Who | None:
        given = headers.get("authorization")
        if given is not None:
            kind, _, token = given.partition(" ")
            who = self.tokens.find(token.strip()) if kind.lower() == "bearer" else None
            if who is None:
                raise self._failure(address, "no such token")
            return who
        secret = _cookie(headers, self.cookie)
        entry = self._sessions.get(_hash(secret)) if secret else None
        if entry is None or not self.still(entry[0]):
            return None
        self._sessions[_hash(secret)] = (entry[0], time.monotonic())
        return entry[0]

    def _from_here(self, headers: Headers, scope: Any) -> None:
        """Turn down what another site makes a browser send: a name rebound to our address, a foreign page's request."""
        if len(headers.getlist("host")) != 1:
            raise Denied(400, "a request has one Host")
        host = headers["host"].lower()
        name = _name(host)
        if name not in self.hosts and not (self.anywhere and _is_address(name)):
            raise Denied(403, f"this server is not called '{name}' (a proxy's name is allowed with --allow-host)")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in self.origins and urlsplit(origin.lower()).netloc != host:
            raise Denied(403, f"pages of '{origin}' may not ask this server (a proxy's is allowed with --allow-origin)")
        site, mode = headers.get("sec-fetch-site"), headers.get("sec-fetch-mode")
        safe = scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and mode == "navigate"
        if origin is None and site in ("cross-site", "same-site") and not safe:
            raise Denied(403, "other sites may link to this server, not ask it")


def route(scope: Any) -> str:
    """The path below `root_path`, whether a proxy left that on or not."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def address_of(scope: Any) -> str:
    return str((scope.get("client") or ("", 0))[0])


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _name(host: str) -> str:
    """Of `name:port` or `[::1]:port` the name; of anything else all of it, which nobody is called."""
    found = re.fullmatch(r"(?:\[([^\]]*)\]|([^:]*))(?::\d{0,5})?", host)
    return (found[1] or found[2] or "") if found else host


def _forwarded(headers: Headers) -> bool:
    """Whether a proxy hands on somebody from elsewhere."""
    return any(name in headers for name in ("forwarded", "x-forwarded-for", "x-real-ip"))


def _cookie(headers: Headers, name: str) -> str:
    return cookie_parser(headers.get("cookie", "")).get(name, "")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"user{os.getuid()}"

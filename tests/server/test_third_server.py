"""What a third reader found of the server: rights of what is open still, and words that no answer can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from tests.server.apps import client_of, quickstart
from tutelage.server import live
from tutelage.server.auth import Denied, Gate, Tokens

WS = "ws://127.0.0.1:8765/ws/demo/base"
BASE = "/api/runs/demo/base"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return quickstart(tmp_path)


def scope_of(gate: Gate, secret: str) -> dict[str, Any]:
    headers = [(b"host", b"127.0.0.1:8765"), (b"cookie", f"{gate.cookie}={secret}".encode())]
    return {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": ("127.0.0.1", 5)}


def test_a_page_that_is_open_still_may_no_longer_ask_once_its_session_was_ended(runs: Path) -> None:
    """A page asks in the name of who opened it, long after."""
    gate = Gate(runs, hosts=[], origins=[])
    token = Tokens(runs).make("anna", scope="steer", actor="person")
    for secret in (gate.enter(gate.new_key(), address="x"), gate.login(token, address="x")):
        scope = scope_of(gate, secret)
        who = gate.check(scope)
        gate.need(who, "steer")
        gate.logout(scope)
        assert not gate.still(who)
        with pytest.raises(Denied):
            gate.need(who, "steer")


def test_a_session_that_nobody_used_for_long_is_over_for_its_open_pages_too(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tutelage.server import auth

    now = [1000.0]
    monkeypatch.setattr(auth.time, "monotonic", lambda: now[0])
    gate = Gate(runs, hosts=[], origins=[])
    who = gate.check(scope_of(gate, gate.enter(gate.new_key(), address="x")))
    for _ in range(3):  # what an open page asks for is use of it
        now[0] += auth.SESSION * 0.9
        gate.need(who, "steer")
    now[0] += auth.SESSION * 1.1
    with pytest.raises(Denied):
        gate.need(who, "steer")


def test_who_looks_on_is_sent_away_after_a_logout(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "HELD", 0.05)
    token = Tokens(runs).make("anna", scope="read", actor="person")
    with client_of(runs, closed=True) as client:
        assert client.post("/login", json={"token": token}).status_code == 200
        with client.websocket_connect(WS) as socket:
            socket.receive_json()
            assert client.post("/logout").status_code == 200
            with pytest.raises(WebSocketDisconnect) as closed:
                while True:
                    socket.receive_json()
            assert closed.value.code == live.DENIED


def test_what_no_answer_can_hold_is_refused_in_one_line(runs: Path, client: TestClient) -> None:
    token = Tokens(runs).make("anna", scope="steer", actor="person")
    head = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    half = rb'{"do": [{"do": "note", "text": "x", "\ud800": 1}]}'
    deep = b'{"do": [{"do": "note", "text": "x", "y": ' + b"[" * 5000 + b"]" * 5000 + b"}]}"
    for body in (half, deep):
        answer = client.post(f"{BASE}/actions", content=body, headers=head)
        assert answer.status_code in (400, 422) and answer.json()["error"], answer.text
    sets = rb'{"name": "b", "sets": {"\ud800": 1}}'
    answer = client.post(f"{BASE}/branch", content=sets, headers=head)
    assert answer.status_code in (400, 422) and answer.json()["error"], answer.text
    answer = client.post(f"{BASE}/branch", json={"name": "\U0001f600" * 200}, headers=head)
    assert answer.status_code == 400 and answer.json()["error"], answer.text

"""Who comes in, and who does not."""

from __future__ import annotations

import json
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from tests.server.apps import client_of, quickstart
from tutelage.base.errors import UserError
from tutelage.server import live
from tutelage.server.app import build, serve
from tutelage.server.auth import BODY, Gate, Limit, Tokens

NOTE = {"do": [{"do": "note", "text": "seen"}]}
ACT = "/api/runs/demo/base/actions"
WS = "ws://127.0.0.1:8765/ws/demo/base"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return quickstart(tmp_path)


def bearer(runs: Path, scope: str, *, actor: str = "person", name: str = "") -> dict[str, str]:
    token = Tokens(runs).make(name or f"{actor}-{scope}", scope=scope, actor=actor)
    return {"authorization": f"Bearer {token}"}


def requests_in(runs: Path) -> list[Path]:
    return [*runs.glob("*/*/*/requests/*")]


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_on_this_machine_reading_needs_nothing_and_asking_needs_a_token(runs: Path, client: TestClient) -> None:
    assert client.get("/api/runs").status_code == 200
    assert client.post(ACT, json=NOTE).status_code == 401
    assert client.post("/api/runs/demo/base/try", json={"prompts": ["x"]}).status_code == 401
    assert client.post("/api/runs/demo/base/branch", json={"name": "b"}).status_code == 401
    assert client.post(ACT, json=NOTE, headers=bearer(runs, "read")).status_code == 403
    assert requests_in(runs) == []
    assert client.post(ACT, json=NOTE, headers=bearer(runs, "steer")).status_code == 202
    assert len(requests_in(runs)) == 1


def test_the_token_file_holds_hashes_and_only_its_owner_reads_it(runs: Path, client: TestClient) -> None:
    head = bearer(runs, "steer", name="anna")
    path = runs / ".tokens.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert head["authorization"].split()[1] not in path.read_text()
    assert client.get("/api", headers=head).json()["you"] == {"name": "anna", "actor": "person", "scope": "steer"}
    path.chmod(0o644)
    answer = client.get("/api", headers=head)
    assert answer.status_code == 503 and "chmod 600" in answer.json()["error"]


def test_a_token_that_was_taken_back_opens_nothing_nor_do_its_sessions(runs: Path, client: TestClient) -> None:
    head = bearer(runs, "steer", name="anna")
    assert client.post("/login", json={"token": head["authorization"].split()[1]}).status_code == 200
    assert client.post(ACT, json=NOTE).status_code == 202
    Tokens(runs).drop("anna")
    assert client.post(ACT, json=NOTE, headers=head).status_code == 401
    assert client.post(ACT, json=NOTE).status_code == 401


def test_who_looks_on_is_sent_away_once_the_token_is_taken_back(
    runs: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "HELD", 0.05)
    kept, gone = bearer(runs, "read", name="anna"), bearer(runs, "read", name="bob")
    with client.websocket_connect(WS, headers=kept) as stays, client.websocket_connect(WS, headers=gone) as leaves:
        first = [socket.receive_json()["type"] for socket in (stays, leaves)]
        Tokens(runs).drop("bob")
        with pytest.raises(WebSocketDisconnect) as closed:
            while True:
                leaves.receive_json()
        assert closed.value.code == live.DENIED and "taken back" in closed.value.reason
        stays.close()
    assert set(first) <= {"loading", "snapshot"}


def test_a_wrong_token_is_refused_even_where_none_is_needed_and_guessing_is_slowed(client: TestClient) -> None:
    head = {"authorization": "Bearer tut_guess"}
    codes = [client.get("/api/runs", headers=head).status_code for _ in range(15)]
    assert codes[0] == 401 and codes[-1] == 429
    assert client.get("/api/runs").status_code == 200


def test_an_agent_cannot_approve_nor_unlock_and_signs_as_an_agent(runs: Path, client: TestClient) -> None:
    head = bearer(runs, "admin", actor="agent", name="bot")
    for do in ("approve", "refuse", "lock", "unlock"):
        act = {"do": do, "id": "x"} if do in ("approve", "refuse") else {"do": do, "actors": ["agent"]}
        answer = client.post(ACT, json={"do": [{"do": "note", "text": "x"}, act]}, headers=head)
        assert answer.status_code == 403 and "persons" in answer.json()["error"]
    assert requests_in(runs) == []
    assert client.post(ACT, json=NOTE, headers=head).status_code == 202
    request = json.loads(requests_in(runs)[0].read_text())
    assert (request["by"], request["actor"]) == ("bot", "agent")


def test_who_asks_is_never_read_from_the_body(runs: Path, client: TestClient) -> None:
    head = bearer(runs, "steer", actor="agent", name="bot")
    for lie in ({"by": "anna"}, {"actor": "person"}):
        assert client.post(ACT, json={**NOTE, **lie}, headers=head).status_code == 422
    assert requests_in(runs) == []


def test_starting_a_process_is_for_admins(runs: Path, client: TestClient) -> None:
    body = {"name": "b", "run": "beside", "to": 5}
    answer = client.post("/api/runs/demo/base/branch", json=body, headers=bearer(runs, "steer"))
    assert answer.status_code == 403 and "admin" in answer.json()["error"]


@pytest.mark.parametrize("name", ["engine", "recipe", "policy", "", "a/b", "x" * 80, "<b>"])
def test_a_token_has_a_name_that_one_may_sign_with(runs: Path, name: str) -> None:
    with pytest.raises(UserError):
        Tokens(runs).make(name, scope="read", actor="person")


def test_two_tokens_have_two_names(runs: Path) -> None:
    Tokens(runs).make("anna", scope="read", actor="person")
    with pytest.raises(UserError, match="already"):
        Tokens(runs).make("anna", scope="admin", actor="person")


def test_tokens_made_and_taken_back_at_one_moment_are_all_heeded(runs: Path) -> None:
    for i in range(8):
        Tokens(runs).make(f"old{i}", scope="read", actor="person")
    start = threading.Barrier(16)

    def change(i: int) -> None:
        start.wait()
        if i % 2:
            Tokens(runs).drop(f"old{i // 2}")
        else:
            Tokens(runs).make(f"new{i // 2}", scope="read", actor="person")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(change, range(16)))
    assert {who.name for who in Tokens(runs).known().values()} == {f"new{i}" for i in range(8)}


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_the_key_of_the_start_opens_one_session_and_is_then_used_up(runs: Path) -> None:
    gate = Gate(runs, hosts=[], origins=[])
    app, key = build(runs, gate=gate), gate.new_key()
    with TestClient(app, base_url="http://127.0.0.1:1", client=("127.0.0.1", 1)) as client:
        answer = client.get(f"/enter?key={key}")
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/api").json()["you"]["scope"] == "admin"
        assert client.post(ACT, json=NOTE).status_code == 202
        client.post("/logout")
        assert client.post(ACT, json=NOTE).status_code == 401
    with TestClient(app, base_url="http://127.0.0.1:1", client=("127.0.0.1", 1)) as other:
        assert other.get(f"/enter?key={key}").status_code == 401
        assert other.get("/enter?key=").status_code == 401
        assert other.get("/api").json()["you"]["name"] == "nobody"


def test_a_browser_without_a_right_gets_a_form_and_a_token_in_it_opens_a_session(runs: Path) -> None:
    head = bearer(runs, "read", name="anna")
    with client_of(runs, closed=True) as client:
        page = client.get("/api/runs", headers={"accept": "text/html"})
        assert page.status_code == 401 and "<form" in page.text
        assert set(client.get("/api/runs").json()) == {"error"}
        client.post("/login", data={"token": head["authorization"].split()[1]})
        assert client.get("/api/runs").status_code == 200


# -- where from -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "",
        "127.0.0.1:80@evil.example",
        "localhost:evil.example",
        "[::1]@evil.example",
    ],
)
def test_a_name_that_was_rebound_to_this_machine_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/api/runs", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1:8765", "[::1]:8765", "LOCALHOST"])
def test_a_tunnel_may_have_any_port_here(client: TestClient, host: str) -> None:
    assert client.get("/api/runs", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://evil.example:8765"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
)
def test_pages_of_other_sites_may_neither_read_nor_ask(runs: Path, client: TestClient, head: dict[str, str]) -> None:
    assert client.get("/api/runs", headers=head).status_code == 403
    assert client.post(ACT, json=NOTE, headers={**head, **bearer(runs, "admin")}).status_code == 403
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(WS, headers=head):
        pass
    assert denied.value.status_code == 403 and "error" in denied.value.json()


def test_our_own_pages_and_links_to_them_and_an_allowed_proxy_come_in(runs: Path, client: TestClient) -> None:
    with client.websocket_connect(WS, headers={"origin": "http://127.0.0.1:8765"}) as ws:
        assert ws.receive_json()["type"] in ("loading", "snapshot")
    assert client.get("/api/runs", headers={"origin": "http://127.0.0.1:8765"}).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/api/runs", headers=link).status_code == 200
    assert client.post(ACT, json=NOTE, headers=link).status_code == 403
    with client_of(runs, hosts=["hub.example.org"], origins=["https://hub.example.org"]) as behind:
        head = {"host": "hub.example.org", "origin": "https://hub.example.org"}
        assert behind.get("/api/runs", headers=head).status_code == 200


def test_from_another_machine_reading_needs_a_token_too(runs: Path) -> None:
    head, there = bearer(runs, "read"), "ws://10.0.0.1:8765/ws/demo/base"
    with client_of(runs, host="0.0.0.0", address="10.0.0.7", base="http://10.0.0.1:8765") as client:
        assert client.get("/api/runs").status_code == 401
        assert client.get("/openapi.json").status_code == 401
        assert client.get("/api/runs", headers=head).status_code == 200
        with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(there):
            pass
        assert denied.value.status_code == 401
        with client.websocket_connect(there, headers=head) as ws:
            assert ws.receive_json()["type"] in ("loading", "snapshot")
        assert client.get("/api/runs", headers={**head, "host": "rebound.example"}).status_code == 403


def test_a_proxy_that_hands_on_somebody_from_elsewhere_does_not_make_him_local(client: TestClient) -> None:
    assert client.get("/api/runs", headers={"x-forwarded-for": "10.0.0.7"}).status_code == 401


def test_an_address_elsewhere_is_listened_on_only_where_there_are_tokens(runs: Path) -> None:
    more: dict[str, Any] = {"port": 0, "root_path": "", "hosts": [], "origins": [], "closed": False}
    with pytest.raises(UserError, match="tokens"):
        serve(runs, host="0.0.0.0", **more)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="--port"):
            serve(runs, host="127.0.0.1", **{**more, "port": taken.getsockname()[1]})


# -- how much ---------------------------------------------------------------------------------------------------------


def test_somebody_who_asks_without_end_is_slowed_and_others_are_not(runs: Path, client: TestClient) -> None:
    busy, calm = bearer(runs, "steer", name="busy"), bearer(runs, "steer", name="calm")
    codes = [client.post(ACT, json=NOTE, headers=busy).status_code for _ in range(40)]
    assert codes[0] == 202 and codes[-1] == 429
    assert client.post(ACT, json=NOTE, headers=calm).status_code == 202


def test_a_limit_lets_in_again_what_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    limit = Limit(burst=2, rate=0.5)
    assert [limit.take("a") > 0 for _ in range(3)] == [False, False, True]
    now += 2.0
    assert [limit.take("a") > 0 for _ in range(2)] == [False, True]


def test_a_body_is_bounded_however_it_is_sent(runs: Path, client: TestClient) -> None:
    head = {**bearer(runs, "steer"), "content-type": "application/json"}
    large = json.dumps({**NOTE, "why": "x" * BODY}).encode()
    assert client.post(ACT, content=large, headers=head).status_code == 413

    def pieces() -> Any:
        yield from (large[i : i + 100_000] for i in range(0, len(large), 100_000))

    assert client.post(ACT, content=pieces(), headers=head).status_code == 413
    assert requests_in(runs) == []


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/api/runs/../../etc",
        "/api/runs/%2e%2e/%2e%2e",
        "/api/runs/..%2f..%2f/etc",
        "/api/runs/demo/%2e%2e",
        "/api/runs/demo/%2e%2e%2f%2e%2e%2fsecret",
        "/api/runs//etc/passwd",
        "/api/runs/%2fetc/passwd",
        "/api/runs/demo/base%00",
        "/api/runs/.index/demo",
        "/api/runs/linked/base",
        "/api/runs/demo/linked",
        "/api/runs/demo\\..\\/base",
    ],
)
def test_names_never_leave_the_runs_folder(runs: Path, client: TestClient, path: str) -> None:
    outside = runs.parent / "secret" / "base" / "1"
    outside.mkdir(parents=True)
    (outside / "stage.json").write_text('{"fingerprint": "secret", "stage": {}}')
    (runs / "linked").symlink_to(runs.parent / "secret")
    (runs / "demo" / "linked").symlink_to(outside.parent)
    head = bearer(runs, "admin")
    for answer in (client.get(path, headers=head), client.post(f"{path}/actions", json=NOTE, headers=head)):
        assert answer.status_code in (404, 405), (path, answer.text)
        assert set(answer.json()) == {"error"} and "fingerprint" not in answer.text
    assert not (outside / "requests").exists() and requests_in(runs) == []


@pytest.mark.parametrize("name", ["../evil", "a/b", "/tmp/evil", "..", ".hidden", "demo", ""])
def test_a_branch_never_leaves_the_runs_folder_nor_takes_a_name(runs: Path, client: TestClient, name: str) -> None:
    head = bearer(runs, "admin")
    before = sorted(runs.parent.rglob("*"))
    answer = client.post("/api/runs/demo/base/branch", json={"name": name, "to": 5}, headers=head)
    assert answer.status_code in (400, 422) and "error" in answer.json(), answer.text
    assert sorted(runs.parent.rglob("*")) == before

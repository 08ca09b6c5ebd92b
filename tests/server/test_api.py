"""The served API, as programs and pages use it."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests import toy
from tests.core.fabricate import train_rows, write_stage
from tests.server.apps import Served, client_of, quickstart
from tests.server.test_auth import bearer
from tutelage.base import load
from tutelage.base.errors import UserError
from tutelage.core.record import dumps, write_whole
from tutelage.core.run import run_graph
from tutelage.server import work
from tutelage.server.auth import Tokens

BASE = "/api/runs/demo/base"
PATIENCE = 60  # seconds: for a machine with much else to do


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return quickstart(tmp_path)


def strict(text: str | bytes) -> Any:
    """JSON as browsers read it: a bare NaN is an error."""
    return json.loads(text, parse_constant=pytest.fail)


def live_stage(runs: Path, *, steps: int, **more: Any) -> Path:
    return write_stage(runs / "demo/live/1", train_rows(steps=steps, **more), done=False)


def add(folder: Path, first: int, last: int) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(dumps(row) + "\n" for row in train_rows(steps=last)[first - 1 :]))


def socket_of(served: Served, stage: str = "demo/live", **query: Any) -> ClientConnection:
    asked = "&".join(f"{key}={value}" for key, value in query.items())
    return connect(f"{served.url.replace('http', 'ws')}/ws/{stage}?{asked}", max_size=None, open_timeout=PATIENCE)


def take(ws: ClientConnection, *, until: Callable[[dict[int, int]], bool], seen: dict[int, int]) -> int:
    """Points of the loss into `seen` (number to tick) until that is enough; returns the last number."""
    last, end = 0, time.monotonic() + PATIENCE
    while not until(seen):
        assert time.monotonic() < end, seen
        message = strict(ws.recv(timeout=PATIENCE))
        parts = [message] if message["type"] == "snapshot" else message.get("parts", [])
        for part in parts:
            points = part.get("series", {}).get("loss", {"seq": [], "tick": []})
            for seq, tick in zip(points["seq"], points["tick"], strict=True):
                assert seq not in seen, "a point came twice"
                seen[seq] = tick
        last = message.get("seq", last)
    return last


# -- looking ----------------------------------------------------------------------------------------------------------


def test_runs_stages_and_series_are_told_as_valid_json(runs: Path, client: TestClient) -> None:
    live_stage(runs, steps=5, loss=lambda i: [1.0, math.nan, math.inf, -math.inf, 2.0][i - 1])
    found = strict(client.get("/api/runs").content)["stages"]
    assert {stage["name"]: stage["state"] for stage in found} == {
        **dict.fromkeys(
            [f"demo/{name}" for name in ("base", "code--low", "code--rewarmed", "code--replay", "merged")], "finished"
        ),
        "demo/live": "stopped",
    }
    series = strict(client.get("/api/runs/demo/live/series?names=loss,nix").content)["series"]
    assert series == {"loss": {**series["loss"], "tick": [1, 2, 3, 4, 5], "value": [1.0, "nan", "inf", "-inf", 2.0]}}
    about = strict(client.get(BASE).content)
    assert about["rows"] == 13 and "eval/bits_per_byte/prose" in about["series"]
    assert client.get(f"{BASE}/journal").json()["lines"][0]["do"][0]["do"] == "thin"
    assert client.get(f"{BASE}/controls").json()["state"] == "finished"


def test_a_window_of_ticks_and_what_is_newer_than_a_number_can_be_asked_for(client: TestClient) -> None:
    whole = client.get(f"{BASE}/series?names=loss").json()
    seq = whole["series"]["loss"]["seq"]
    assert client.get(f"{BASE}/series?names=loss&start=3&to=5").json()["series"]["loss"]["tick"] == [3, 4, 5]
    assert client.get(f"{BASE}/series?names=loss&since={seq[6]}").json()["series"]["loss"]["seq"] == seq[7:]
    assert client.get(f"{BASE}/series?names=loss&since={whole['seq']}").json()["series"]["loss"]["seq"] == []


def test_errors_are_one_line_of_json(runs: Path, client: TestClient) -> None:
    head = bearer(runs, "steer")
    wrong = [
        client.get("/api/runs/demo/nix"),
        client.get("/nix"),
        client.get(f"{BASE}/series?width=1"),
        client.get(f"{BASE}/actions/nix"),
        client.get(f"{BASE}/actions/a%20b"),
        client.delete(BASE),
        client.post(f"{BASE}/actions", headers=head, json={"do": []}),
        client.post(f"{BASE}/actions", headers=head, json={"do": [{"do": "explode"}]}),
        client.post(f"{BASE}/actions", headers=head, json={"do": [{"do": "set", "path": "optim.lr"}]}),
        client.post(f"{BASE}/actions", headers=head, content=b'{"do": [{"do": "set", "path": "optim.lr", "to": NaN}]}'),
        client.post(f"{BASE}/actions", headers=head, content=b"{"),
    ]
    assert [answer.status_code // 100 for answer in wrong] == [4] * len(wrong)
    for answer in wrong:
        found = strict(answer.content)
        assert list(found) == ["error"] and "\n" not in found["error"] and len(found["error"]) > 5, found


def test_a_stage_that_cannot_be_read_is_said_so_and_hides_no_other(runs: Path, client: TestClient) -> None:
    (runs / "demo/merged/1/stage.json").write_text("{ half")
    states = {stage["stage"]: stage["state"] for stage in client.get("/api/runs").json()["stages"]}
    assert states["merged"] == "unreadable" and states["base"] == "finished"
    answer = client.get("/api/runs/demo/merged")
    assert answer.status_code < 500, answer.text
    shutil.rmtree(runs / "demo/base")
    assert client.get(BASE).status_code == 404


# -- asking -----------------------------------------------------------------------------------------------------------


def test_a_request_passes_through_the_folder_and_its_answer_comes_back(runs: Path, client: TestClient) -> None:
    head, folder = bearer(runs, "steer", name="anna"), runs / "demo/base/1"
    asked = client.post(
        f"{BASE}/actions", headers=head, json={"do": [{"do": "save"}], "why": "keep", "dry": True, "id": "a1"}
    )
    assert asked.status_code == 202 and asked.json() == {"id": "a1", "state": "pending"}
    path = folder / "requests/a1.json"
    request = json.loads(path.read_text())
    assert request == {"by": "anna", "actor": "person", "do": [{"do": "save"}], "why": "keep", "dry": True}

    def trainer() -> None:
        time.sleep(0.3)
        (folder / "answers").mkdir()
        write_whole(
            folder / "answers/a1.json",
            dumps({**request, "state": "dry", "tick": 10, "effects": [{"x": math.nan}]}),
        )
        path.unlink()

    thread = threading.Thread(target=trainer)
    thread.start()
    answer = client.get(f"{BASE}/actions/a1?wait={PATIENCE}")
    thread.join()
    assert strict(answer.content)["state"] == "dry" and answer.json()["effects"] == [{"x": "nan"}]


def test_nothing_but_declared_routes_can_be_called(runs: Path, client: TestClient) -> None:
    """No method of any module is reached by its name; what is posted anywhere else changes nothing."""
    head = bearer(runs, "admin")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    for path in (
        "/api/call",
        "/api/runs/demo/base/os.system",
        f"{BASE}/__class__",
        "/call/os/system",
        f"{BASE}/actions/x",
    ):
        answer = client.post(path, headers=head, json={"method": "os.system", "args": ["true"]})
        assert answer.status_code in (404, 405)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == before


def test_looking_writes_nothing_into_a_stage(runs: Path, client: TestClient) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in (runs / "demo").rglob("*"))
    for path in (BASE, f"{BASE}/series", f"{BASE}/journal", f"{BASE}/log", f"{BASE}/controls", "/api/runs"):
        assert client.get(path).status_code == 200, path
    assert sorted((path, path.stat().st_mtime_ns) for path in (runs / "demo").rglob("*")) == before


def test_heavy_work_has_an_end(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutelage.server.api.COUNT", 0.05)
    start = time.monotonic()
    answer = client.get("/api/compare?a=demo/base&b=demo/merged")
    assert answer.status_code == 400 and "was ended" in answer.json()["error"] and time.monotonic() - start < 30


def test_two_stages_are_compared_in_a_process_of_its_own(client: TestClient) -> None:
    found = strict(client.get("/api/compare?a=demo/code--low&b=demo/code--replay").content)
    assert found["columns"]["prose"]["final"]["difference"]["mean"] == pytest.approx(2.20 - 2.30)
    assert client.get("/api/compare?a=demo/base&b=../etc").status_code == 404


def test_what_a_job_refuses_or_breaks_on_is_one_line(runs: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(work.os, "nice", lambda n: n)
    for job, said in (({"do": "batch", "folder": str(runs), "tick": 1}, "no tick 1"), ({"do": "nix"}, "KeyError")):
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(job)))
        saved = work.os.dup(1)
        work.main()
        work.os.dup2(saved, 1)
        found = strict(capfd.readouterr().out.strip().splitlines()[-1])
        assert list(found) == ["error"] and said in found["error"], found


def test_matrix_batch_and_text_come_from_a_real_run_and_leave_its_folder_as_it_was(tmp_path: Path) -> None:
    graph = toy.graph(tmp_path, steps=4)
    run_graph(graph, only=None, jobs=0, drift="refuse", tell=lambda *said: None)
    write_whole(graph.runs / "toy/recipe.yaml", load.dump(graph.recipe))
    folder = graph.runs / "toy/two/1"
    before = sorted((path, path.stat().st_mtime_ns) for path in graph.runs.rglob("*") if ".data" not in path.parts)
    found = work.matrix(str(folder))["forgetting_matrix"]
    assert set(found) == {"one", "two"} and set(found["two"]) == {"a", "b"}
    assert all("source=b" in row for row in work.batch(str(folder), 2)["rows"])
    done, saved = (work.attempt(str(folder), tick, ["1 2"], 6, 0.0, 0)["texts"] for tick in (None, 4))
    assert done == saved and isinstance(done[0], str)
    with pytest.raises(UserError, match="no checkpoint"):
        work.attempt(str(folder), 3, ["1 2"], 6, 0.0, 0)
    after = sorted((path, path.stat().st_mtime_ns) for path in graph.runs.rglob("*") if ".data" not in path.parts)
    assert after == before


# -- live -------------------------------------------------------------------------------------------------------------


def test_a_reconnecting_viewer_gets_each_point_once_and_the_process_ends_at_once(
    runs: Path, served: Callable[..., Served]
) -> None:
    """Points during and between three connections, and many viewers that are still there when the server is ended."""
    folder = live_stage(runs, steps=20, loss=lambda i: math.nan if i == 7 else 1.0)
    server = served(runs)
    seen: dict[int, int] = {}
    with socket_of(server) as ws:
        take(ws, until=lambda s: len(s) >= 20, seen=seen)
        add(folder, 21, 30)
        at = take(ws, until=lambda s: len(s) >= 30, seen=seen)
    add(folder, 31, 40)
    with socket_of(server, since=at) as ws:
        at = take(ws, until=lambda s: len(s) >= 40, seen=seen)
        add(folder, 41, 45)
    with socket_of(server, since=at) as ws:
        take(ws, until=lambda s: len(s) >= 45, seen=seen)
    assert [seen[seq] for seq in sorted(seen)] == list(range(1, 46))
    viewers = [socket_of(server) for _ in range(50)]
    for ws in viewers:
        assert strict(ws.recv(timeout=PATIENCE))["type"] in ("loading", "snapshot")
    assert server.end() < 15  # it stays for no viewer; alone on its machine, it takes half a second
    for ws in viewers:
        with pytest.raises((ConnectionClosed, TimeoutError)):
            while True:
                ws.recv(timeout=1)


def test_a_server_that_was_killed_and_came_back_gives_everything_anew(
    runs: Path, served: Callable[..., Served]
) -> None:
    live_stage(runs, steps=10)
    server, seen = served(runs), {}
    with socket_of(server) as ws:
        at = take(ws, until=lambda s: len(s) >= 10, seen=seen)
    server.end(signal.SIGKILL)
    again: dict[int, int] = {}
    with socket_of(served(runs), since=at) as ws:
        take(ws, until=lambda s: len(s) >= 10, seen=again)
    assert list(again.values()) == list(range(1, 11)) and min(again) > max(seen)


def test_a_stage_that_vanishes_is_told_to_its_viewers(runs: Path, client: TestClient) -> None:
    folder = live_stage(runs, steps=3)
    with client.websocket_connect("ws://127.0.0.1:8765/ws/demo/live") as ws:
        kinds = [ws.receive_json()["type"]]
        shutil.rmtree(folder)
        while kinds[-1] != "gone":
            kinds.append(ws.receive_json()["type"])
        assert ws.receive()["code"] == 4404


def test_a_proxy_path_is_served_whether_the_proxy_leaves_it_on_or_not(
    runs: Path, served: Callable[..., Served]
) -> None:
    token = Tokens(runs).make("anna", scope="read", actor="person")
    server = served(runs, "--root-path", "/user/anna/proxy/8765/", "--closed", "--allow-host", "hub.example.org")
    assert server.url.endswith("/user/anna/proxy/8765")
    root = server.url.removesuffix("/user/anna/proxy/8765")
    head = {"authorization": f"Bearer {token}"}
    for url in (server.url, root):
        assert httpx.get(f"{url}/api/runs", timeout=PATIENCE).status_code == 401
        asked = {**head, "host": "hub.example.org"}
        assert httpx.get(f"{url}/api/runs", headers=asked, timeout=PATIENCE).json()["stages"]
    with httpx.Client(timeout=PATIENCE) as browser:
        opened = browser.get(f"{server.url}/enter", params={"key": server.key})
        assert "path=/user/anna/proxy/8765/" in opened.headers["set-cookie"].lower()
        assert browser.get(f"{server.url}/api").json()["you"]["scope"] == "admin"
    told = httpx.get(f"{root}/openapi.json", headers=head, timeout=PATIENCE).json()
    assert "/user/anna/proxy/8765" in told["servers"][0]["url"]
    assert server.end(signal.SIGINT) < 15


def test_feeds_that_nobody_looks_at_are_let_go_of(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutelage.server.feeds.SELDOM", 0.02)
    with client_of(runs) as client:
        feeds = client.app.state.desk.feeds  # type: ignore[attr-defined]  a FastAPI app
        feeds.keep = 0.1
        monkeypatch.setattr("tutelage.server.feeds.MOST", 2)
        for stage in ("base", "code--low", "merged"):
            assert client.get(f"/api/runs/demo/{stage}").status_code == 200
        assert len(feeds._feeds) <= 2
        until = time.monotonic() + PATIENCE
        while feeds._feeds and time.monotonic() < until:
            time.sleep(0.02)
        assert feeds._feeds == {} and feeds._news == {} and feeds._tasks == {}

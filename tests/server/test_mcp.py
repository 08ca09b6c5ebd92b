"""Agents steer a live run through the MCP server, over both of its transports, as the official client does it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.awaited import awaited
from tests.steering.beside import Beside
from tests.toy import numbers
from tutelage import steering
from tutelage.server.auth import Tokens

mcp = pytest.importorskip("mcp")
httpx2 = pytest.importorskip("httpx2")
from mcp.client.streamable_http import streamable_http_client  # noqa: E402

HALVED = [{"do": "scale", "path": "optim.lr", "by": 0.5}]
TUTELAGE = [sys.executable, "-m", "tutelage", "mcp"]


@dataclass
class Http:
    """A server process on a port of its own, and a token of each scope."""

    url: str
    tokens: dict[str, str]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Beside]:
    made = Beside(tmp_path, steps=20).paused()
    yield made
    if steering.live(made.folder):
        made.finish()


@pytest.fixture
def http(stage: Beside) -> Iterator[Http]:
    tokens = Tokens(stage.runs)
    made = {scope: tokens.make(f"helper-{scope}", scope=scope, actor="agent") for scope in ("read", "steer")}
    made["person"] = tokens.make("ada", scope="admin", actor="person")
    process = subprocess.Popen(
        [*TUTELAGE, "--http", "0", "--runs", str(stage.runs)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("MCP at http://127.0.0.1:"), line
    yield Http(line.removeprefix("MCP at ").strip(), made)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)


@contextlib.asynccontextmanager
async def by_http(http: Http, token: str) -> AsyncIterator[Any]:
    head = {"Authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=head, trust_env=False, timeout=180) as client,
        mcp.Client(streamable_http_client(http.url, http_client=client)) as found,
    ):
        yield found


@contextlib.asynccontextmanager
async def by_stdio(runs: Path, *more: str) -> AsyncIterator[Any]:
    args = [*TUTELAGE[1:], "--runs", str(runs), "--as", "helper-steer", *more]
    async with mcp.Client(mcp.StdioServerParameters(command=TUTELAGE[0], args=args)) as found:
        yield found


Call = Callable[..., Awaitable[dict[str, Any]]]


def caller(client: Any) -> Call:
    async def call(tool: str, **arguments: Any) -> dict[str, Any]:
        found = await client.call_tool(tool, arguments)
        assert not found.is_error, found.content[0].text
        assert json.loads(found.content[0].text) == found.structured_content
        return dict(found.structured_content)

    return call


async def wrong(client: Any, tool: str, **arguments: Any) -> str:
    """The one line that a call is turned down with."""
    found = await client.call_tool(tool, arguments)
    assert found.is_error and "\n" not in found.content[0].text, found
    return str(found.content[0].text)


async def steers(client: Any, stage: Beside) -> None:
    """Everything an agent does, in one visit."""
    call = caller(client)
    (row,) = [row for row in (await call("list_runs"))["stages"] if row["name"] == "toy/one"]
    assert (row["state"], row["tick"]) == ("paused", 3)
    about = await call("describe", stage="toy")
    assert about["stage"] == "toy/one" and about["last"]["loss"] > 0 and about["measured"][0]["step"] == 0
    can = await call("steerable", stage="toy/one")
    assert {"optim.lr"} <= {target["path"] for target in can["targets"]}
    assert can["rules"]["limits"]["optim.lr"]["by"] == [0.5, 2.0] and "rollback" in can["rules"]["approve"]

    before = len(steering.log(stage.folder))
    dry = await call("dry_run", stage="toy", do=HALVED)
    assert dry["state"] == "dry" and dry["effects"][0]["changes"][0]["now"] == pytest.approx(5e-3)
    assert len(steering.log(stage.folder)) == before

    done = await call("act", stage="toy", do=[*HALVED, {"do": "note", "text": "cooler"}], why="to see")
    assert (done["state"], done["tick"]) == ("applied", 3)
    stage.person({"do": "step", "n": 3})
    stage.until(lambda: steering.controls(stage.folder)["tick"] == 6)
    stage.until(lambda: len(numbers(stage.folder, kind="train")) == 6)
    curve = (await call("read_metrics", stage="toy", names=["lr", "loss"], since=4, points=3))["points"]
    assert [point["tick"] for point in curve] == [4, 5, 6]
    assert [point["lr"] for point in curve] == pytest.approx([5e-3] * 3)

    refused = await call("act", stage="toy", do=[{"do": "scale", "path": "optim.lr", "by": 1000}], why="more")
    assert refused["state"] == "refused" and "leaves ×[0.5, 2]" in refused["error"]
    text = await call("sample", stage="toy", prompt="the cat", tokens=5, temperature=0)
    assert text["state"] == "applied" and isinstance(text["text"], str)
    journal = (await call("read_journal", stage="toy", last=50))["entries"]
    mine = [(entry["actor"], entry["state"]) for entry in journal if entry["by"] == "helper-steer"]
    assert mine == [("agent", "applied"), ("agent", "refused"), ("agent", "applied")]


async def tries(client: Any, stage: Beside) -> None:
    """A try pauses the stage and lets it go on as it was."""
    call = caller(client)
    begun = await call("try_out", stage="toy", do=[{"do": "scale", "path": "optim.lr", "by": 1.5}], steps=4)
    found = await call("try_result", stage="toy", id=begun["id"], wait=60)
    while found["state"] not in ("discarded", "failed"):
        found = await call("try_result", stage="toy", id=begun["id"], wait=60)
    assert (found["state"], found["error"]) == ("discarded", "")
    assert found["result"]["same_batches"] == 4
    assert found["result"]["loss"]["mean"] != 0 and "pairs" not in found["result"]
    assert steering.controls(stage.folder)["targets"][0]["now"] == pytest.approx(5e-3)


async def waits(client: Any, stage: Beside) -> None:
    """What is for a person to decide, and what a person decides about agents."""
    call = caller(client)
    asked = await call("ask_approval", stage="toy", do=[{"do": "end_stage"}], why="it learns no more")
    assert asked["state"] == "waiting" and "steering.agent.approve" in asked["error"]
    assert "only a person" in await wrong(
        client, "act", stage="toy", do=[{"do": "approve", "id": asked["id"]}], why="me"
    )
    assert (await call("wait_for_answer", stage="toy", id=asked["id"], wait=0))["state"] == "waiting"
    stage.person({"do": "refuse", "id": asked["id"]})
    assert (await call("wait_for_answer", stage="toy", id=asked["id"]))["state"] == "refused"
    assert "none of these waits" in await wrong(client, "ask_approval", stage="toy", do=HALVED, why="?")

    fields = {"stage": "toy", "name": "other", "why": "a lower rate", "sets": {"optim.lr": 1e-3}}
    asked = await call("branch", **fields)
    assert asked["state"] == "waiting" and not (stage.runs / "other").exists()
    looking = asyncio.create_task(call("wait_for_answer", stage="toy", id=asked["id"], wait=60))
    await asyncio.sleep(0.3)
    assert not looking.done()
    await asyncio.to_thread(stage.person, {"do": "approve", "id": asked["id"]})
    assert (await looking)["state"] == "applied"
    assert "asked for something else" in await wrong(client, "branch", **{**fields, "sets": {}}, id=asked["id"])
    made = await call("branch", **fields, id=asked["id"])
    recipe = stage.runs / "other" / "other.yaml"
    assert made["branch"]["started"] == "no" and "lr: 0.001" in recipe.read_text()

    stage.person({"do": "lock", "actors": ["agent"]})
    refused = await call("act", stage="toy", do=HALVED, why="again")
    assert refused["state"] == "refused" and "locked" in refused["error"]
    assert "only a person" in await wrong(client, "act", stage="toy", do=[{"do": "unlock"}], why="me")


def test_an_agent_steers_a_live_run_over_stdio(stage: Beside) -> None:
    async def visit() -> None:
        async with by_stdio(stage.runs) as client:
            assert "scale(path, by)" in client.instructions and "approve(" not in client.instructions
            await steers(client, stage)
            await tries(client, stage)
            await waits(client, stage)

    awaited(visit())
    rates = [row["lr"] for row in numbers(stage.finish(), kind="train")]
    assert rates == pytest.approx([1e-2] * 3 + [5e-3] * 17)


def test_an_agent_steers_a_live_run_over_http(stage: Beside, http: Http) -> None:
    async def visit() -> None:
        async with by_http(http, http.tokens["steer"]) as client:
            await steers(client, stage)
            await waits(client, stage)

    awaited(visit())


def test_a_person_s_token_makes_nobody_a_person(stage: Beside, http: Http) -> None:
    """Through this door everybody is an agent: the journal says so, and the limits hold."""

    async def visit() -> None:
        async with by_http(http, http.tokens["person"]) as client:
            found = await caller(client)(
                "act", stage="toy", do=[{"do": "scale", "path": "optim.lr", "by": 1000}], why="I may"
            )
            assert found["state"] == "refused"
            assert "only a person" in await wrong(client, "act", stage="toy", do=[{"do": "lock"}], why="I may")
            await caller(client)("act", stage="toy", do=HALVED, why="then this")

    awaited(visit())
    assert {(e["by"], e["actor"]) for e in steering.log(stage.folder) if e["by"] != "recipe"} == {("ada", "agent")}


def test_a_token_of_scope_read_reads_and_does_nothing_else(stage: Beside, http: Http) -> None:
    async def visit() -> None:
        async with by_http(http, http.tokens["read"]) as client:
            assert (await caller(client)("describe", stage="toy"))["tick"] == 3
            for tool in ("dry_run", "act"):
                more = {} if tool == "dry_run" else {"why": "?"}
                assert "needs scope steer" in await wrong(client, tool, stage="toy", do=HALVED, **more)
            assert "needs scope" in await wrong(client, "branch", stage="toy", name="x", why="?")
        async with by_http(http, http.tokens["steer"]) as client:
            assert "needs scope admin" in await wrong(client, "branch", stage="toy", name="x", why="?", run="beside")

    awaited(visit())
    assert not list((stage.folder / "requests").glob("*.json"))


def test_without_a_good_token_nobody_comes_in(stage: Beside, http: Http) -> None:
    question = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
    head = {"accept": "application/json, text/event-stream"}
    good = {"authorization": f"Bearer {http.tokens['steer']}"}
    with httpx2.Client(trust_env=False, timeout=60) as client:
        post = lambda **more: client.post(http.url, json=question, headers={**head, **more}).status_code  # noqa: E731
        assert post() == 401 and post(authorization="Bearer tut_nonsense") == 401
        assert post(**good) == 200
        assert post(**good, host="evil.example") == 421 and post(**good, origin="http://evil.example") == 403
        Tokens(stage.runs).drop("helper-steer")
        assert post(**good) == 401


def test_what_an_agent_gets_wrong_is_one_line(stage: Beside) -> None:
    async def visit() -> None:
        async with by_stdio(stage.runs, "--scope", "read") as client:
            assert "did you mean 'toy'" in await wrong(client, "describe", stage="tyo")
            assert "not RUN or RUN/STAGE" in await wrong(client, "describe", stage="../../etc")
            assert "did you mean 'loss'" in await wrong(client, "read_metrics", stage="toy", names=["los"])
            assert "points" in await wrong(client, "read_metrics", stage="toy", points=10**6)
            assert "stage" in await wrong(client, "describe")
            assert (
                "has no request" in (await caller(client)("wait_for_answer", stage="toy", id="none", wait=0))["error"]
            )

    awaited(visit())


def test_every_tool_says_what_it_does_and_what_its_fields_are(tmp_path: Path) -> None:
    from tutelage.server.auth import Who
    from tutelage.server.mcp import build

    async def visit() -> None:
        async with mcp.Client(build(tmp_path, who=Who("helper", "agent", "read"))) as client:
            for tool in (await client.list_tools()).tools:
                assert len(tool.description) > 60 and "\n" not in tool.description
                for name, field in tool.input_schema["properties"].items():
                    assert field.get("description") or any("description" in o for o in field.get("anyOf", [])), (
                        tool.name,
                        name,
                    )

    awaited(visit())

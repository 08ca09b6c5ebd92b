"""A browser, a server and runs for it: some laid out by hand, one that really trains."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forked
from tests.server import folders
from tests.server.apps import client, served  # noqa: F401  fixtures
from tutelage.server.auth import Tokens

CHROMIUM = Path("/usr/bin/chromium")
ROOT = Path(__file__).resolve().parents[2]
ACTS = (
    (80, "anna", [{"do": "scale", "path": "optim.lr", "by": 0.5}], "prose went <script>alert(1)</script>"),
    (200, "mei", [{"do": "mix", "weights": {"code": 0.8, "base/prose": 0.2}}], "more replay"),
)
WAITING = {
    "id": "w1",
    "by": "scout-" + "x" * 94,  # a name may have 100 characters
    "actor": "agent",
    "do": [{"do": "reset", "modules": ["lm_head.*"]}],
    "why": "it is stuck",
}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium; where it is not, what needs it is skipped."""
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: {CHROMIUM} is not there")
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


def child(module: str, *args: object, log: Path) -> subprocess.Popen[bytes]:
    """A process of this tree's code."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "NICEGUI_STORAGE_PATH": str(log.parent / "nicegui")}
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, args)], env=env, stdout=file, stderr=file, cwd=ROOT
        )


def end(process: subprocess.Popen[bytes] | Forked) -> None:
    """Ask a process to go, and see that it has gone."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(120)
    finally:
        process.kill()


def serve(runs: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server of `runs`, once it answers, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process, url = child("tests.server.serving", runs, port, log=log), f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{url}/-/held", timeout=5).close()
            return process, url
        except OSError:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`demo/base` and `demo/code`, laid out; of the latter a process (this one) holds the lock."""
    runs = tmp_path_factory.mktemp("page") / "runs"
    folders.lay(runs, "demo/base", ticks=200)
    folder = folders.lay(
        runs,
        "demo/code",
        journal=folders.lines(*ACTS),
        alarm=True,
        start="base",
        loss=lambda tick: float("nan") if 150 <= tick < 153 else None,
        waiting=[WAITING],
        alerts=[{"kind": "spike", "tick": 290, "text": "the loss leapt <b>far</b>", "grave": True}],
    )
    with open(folder / "lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield runs


@pytest.fixture(scope="session")
def anna(runs: Path) -> dict[str, str]:
    """Headers of a person who may do everything."""
    return {"authorization": f"Bearer {Tokens(runs).make('anna', scope='admin', actor='person')}"}


@pytest.fixture(scope="session")
def training(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a toy stage at work, `toy/one`: it trains until the tests are over."""
    home = tmp_path_factory.mktemp("toy")
    with open(home / "run.log", "wb") as log:
        process = Forked([sys.executable, "-m", "tests.server.training", str(home), str(runs)], stdout=log)
    yield runs / "toy" / "one" / "1"
    end(process)


@pytest.fixture(scope="session")
def server(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of all these runs."""
    process, url = serve(runs, tmp_path_factory.mktemp("server") / "server.log")
    yield url
    end(process)

"""A served runs folder, in this process and as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.core.fabricate import demo
from tutelage.server.app import build
from tutelage.server.auth import Gate


def client_of(
    runs: Path, *, address: str = "127.0.0.1", base: str = "http://127.0.0.1:8765", **gate: Any
) -> TestClient:
    """A client of an app over `runs`, seen as coming from `address`."""
    made = Gate(runs, **{"hosts": [], "origins": [], **gate})
    return TestClient(build(runs, gate=made, every=0.02), base_url=base, client=(address, 50_000))


def quickstart(tmp_path: Path) -> Path:
    """The fabricated quickstart: runs/demo with five finished stages."""
    demo(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def client(runs: Path) -> Iterator[TestClient]:
    with client_of(runs) as made:
        yield made


@dataclass
class Served:
    """A `tutelage serve` of its own."""

    process: subprocess.Popen[str]
    url: str
    key: str

    def end(self, number: int = signal.SIGTERM) -> float:
        """Seconds until it had gone after a signal."""
        start = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(timeout=60)
        return time.monotonic() - start


@pytest.fixture
def served() -> Iterator[Callable[..., Served]]:
    """Start a server on a free port; it is killed after the test, if it is there still."""
    made: list[subprocess.Popen[str]] = []

    def start(runs: Path, *more: str) -> Served:
        command = [sys.executable, "-m", "tutelage", "serve", "--runs", str(runs), "--port", "0", *more]
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        made.append(process)
        assert process.stdout is not None
        said = process.stdout.readline()
        url = re.search(r"at (http://\S+)/ ", said)
        assert url, said
        key = re.search(r"key=(\S+)", process.stdout.readline())
        return Served(process, url[1], key[1] if key else "")

    yield start
    for process in made:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()

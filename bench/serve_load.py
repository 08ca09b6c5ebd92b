"""Fifty viewers of a stage with a million steps: how soon the first answer, each point once, how much memory, does it end?

Writes bench/results/serve_load.json. Run from the repository's root: `python -m bench.serve_load`. Metrics of a million
steps (half a gigabyte) are made in a temporary folder. The server is measured twice: with no index, as at the first look
at a run that nobody followed, and with the index that the first server left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
from websockets.asyncio.client import connect

from tutelage.core.record import dumps

RESULTS = Path("bench/results/serve_load.json")
ODD = ("nan", "inf", "-inf")


def line(i: int) -> str:
    """One step, as wide as a real one. About one in ten thousand is not a number."""
    noise = (i * 2654435761 % 1000) / 1000
    row = {"kind": "train", "tick": i, "step": i, "tokens": i * 4096, "samples": i * 8, "epochs": i / 3e5}
    row |= {"flops": i * 1.3e12, "loss": ODD[i % 3] if i % 9973 == 0 else 2 + noise, "grad_norm": 1 + noise}
    row |= {"lr": 1e-3 * (1 + noise), "length": 512, "rows": 8, "trained": 8, "padding": 0.01 * noise}
    row |= {"weights": {"prose": 0.7, "code": 0.3}}
    row |= {"cursors": {"prose": [i * 7, [[i, 3], [i + 4, 17]]], "code": [i * 3, [[i, 44]]]}}
    row |= {"owed": {"prose": noise, "code": -noise}, "seconds": i * 0.1, "tokens_per_second": 40_960 * (1 + noise)}
    return dumps(row) + "\n"


def lay(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text('{"fingerprint": "bench", "parts": {"seed": 0}, "stage": {}}')
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(map(line, range(1, steps + 1)))


def start(runs: Path) -> tuple[subprocess.Popen[str], str, float]:
    """A server, its address, and the seconds until it listened."""
    command = [sys.executable, "-m", "tutelage", "serve", "--runs", str(runs), "--port", "0"]
    began = time.monotonic()
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    url = re.search(r"at (http://\S+)/ ", process.stdout.readline())
    assert url
    httpx.get(f"{url[1]}/api")
    return process, url[1], time.monotonic() - began


class Viewer:
    """One WebSocket client, which comes back `returns` times and complains of a point that it gets twice."""

    def __init__(self, url: str, *, returns: int) -> None:
        self.url, self.returns = url.replace("http", "ws") + "/ws/big/one", returns
        self.first: float | None = None  # seconds to the first message with series
        self.whole: float | None = None  # to the snapshot of everything
        self.ticks: list[int] = []  # of the live points
        self.twice = 0
        self.odd: set[str] = set()
        self.at: int | None = None
        self.snapshots = 0

    async def run(self, last: int) -> None:
        """Look until the point of tick `last` is there."""
        self.began, self.last, seen = time.monotonic(), last, set()
        for turn in range(self.returns + 1):
            since = f"?since={self.at}" if self.at is not None else ""
            async with connect(self.url + since, max_size=None, ping_timeout=120) as ws:
                until = time.monotonic() + (1.0 if turn < self.returns else 1e9)
                while not self.ticks or self.ticks[-1] < last:
                    if self.whole is not None and time.monotonic() > until:
                        break
                    self._take(orjson.loads(await ws.recv()), seen)

    def _take(self, message: dict[str, Any], seen: set[int]) -> None:
        now = time.monotonic() - self.began
        if message["type"] in ("loading", "snapshot") and message.get("series", {}).get("loss"):
            self.first = self.first or now
        if message["type"] == "snapshot":
            self.whole, self.snapshots = self.whole or now, self.snapshots + 1
            self.odd |= {v for v in message["series"]["loss"]["value"] if isinstance(v, str)}
        for part in message.get("parts", []):
            points = part.get("series", {}).get("loss", {"seq": [], "tick": []})
            self.twice += sum(seq in seen for seq in points["seq"])
            seen.update(points["seq"])
            self.ticks += points["tick"]
        self.at = message.get("seq", self.at)


async def look(url: str, metrics: Path, *, viewers: int, steps: int, live: int) -> list[Viewer]:
    """All viewers at once, while `live` further steps are written."""
    made = [Viewer(url, returns=2) for _ in range(viewers)]
    tasks = [asyncio.create_task(viewer.run(steps + live)) for viewer in made]
    while any(viewer.whole is None for viewer in made):
        await asyncio.sleep(0.1)
        for task in tasks:
            if task.done() and task.exception():
                raise task.exception() or AssertionError
    with open(metrics, "a", encoding="utf-8") as file:
        for i in range(steps + 1, steps + live + 1):
            file.write(line(i))
            file.flush()
            await asyncio.sleep(0.01)
    await asyncio.wait_for(asyncio.gather(*tasks), 120)
    return made


def once(runs: Path, *, viewers: int, steps: int, live: int) -> dict[str, Any]:
    """One server's life."""
    process, url, up = start(runs)
    try:
        looked = asyncio.run(look(url, runs / "big/one/1/metrics.jsonl", viewers=viewers, steps=steps, live=live))
        began = time.monotonic()
        answer = httpx.get(f"{url}/api/runs/big/one/series?names=loss&width=1000", timeout=60)
        series, asked = answer.json()["series"]["loss"], time.monotonic() - began
        memory = psutil.Process(process.pid).memory_full_info()
        still = asyncio.run(_ended(process, url, viewers))
    finally:
        process.kill()
    wanted = list(range(steps + 1, steps + live + 1))
    return {
        "seconds_until_it_listened": round(up, 2),
        "first_series_seconds": _spread([v.first or 0 for v in looked]),
        "whole_series_seconds": _spread([v.whole or 0 for v in looked]),
        "seconds_of_a_later_series_request": round(asked, 3),
        "points_of_that_answer": len(series["tick"]),
        "not_finite_in_it": sum(isinstance(v, str) for v in series["value"]),
        "viewers_with_every_live_point_once_in_order": sum(v.ticks == wanted for v in looked),
        "points_told_twice": sum(v.twice for v in looked),
        "snapshots_per_viewer": max(v.snapshots for v in looked),
        "memory_mb": {"resident": round(memory.rss / 1e6), "own": round(memory.uss / 1e6)},
        "seconds_to_end_with_all_connected": round(still, 2),
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(sorted(values)[len(values) // 2], 3), "largest": round(max(values), 3)}


async def _ended(process: subprocess.Popen[str], url: str, viewers: int) -> float:
    """Seconds from SIGTERM until the process has gone, with that many viewers connected."""
    sockets = [await connect(url.replace("http", "ws") + "/ws/big/one", max_size=None) for _ in range(viewers)]
    for ws in sockets:
        await ws.recv()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(process.wait, 60)
    took = time.monotonic() - began
    await asyncio.gather(*(ws.close() for ws in sockets), return_exceptions=True)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--live", type=int, default=500, help="steps that are written while they look")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        runs, load = Path(place) / "runs", os.getloadavg()[0]
        lay(runs / "big/one/1", given.steps)
        size = (runs / "big/one/1/metrics.jsonl").stat().st_size
        found = {"no_index": once(runs, viewers=given.viewers, steps=given.steps, live=given.live)}
        steps = given.steps + given.live
        found["index"] = once(runs, viewers=given.viewers, steps=steps, live=given.live)
        on_disk = sum(path.stat().st_size for path in (runs / ".index").rglob("*") if path.is_file())
    about = {
        "steps": given.steps,
        "viewers": given.viewers,
        "metrics_mb": round(size / 1e6),
        "index_mb": round(on_disk / 1e6),
    }
    about |= {"cores": os.cpu_count(), "load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1)}
    given.out.write_text(json.dumps({**about, **found}, indent=2) + "\n", encoding="utf-8")
    print(given.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

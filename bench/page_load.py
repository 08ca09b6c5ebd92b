"""How soon the page of a long stage is there, and how many viewers two cores carry.

    python -m bench.page_load --out bench/results/page_load.json

A stage of a million steps is laid out in a temporary folder and grows by five steps a second. In a browser: time to the
first paint, the first drawn chart, the fully read file and the spikes in its curve, cold (no index yet) and warm. Then
viewers without a browser, who open the page and stay connected: how much of a core the server takes, and how regularly each
is told what is new.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

CHROMIUM = "/usr/bin/chromium"
STAGE = "bench/long"
HIGHEST = """Math.max(...getElement(Number(document.querySelector('.spark').id.slice(1)))
    .chart.getOption().series[0].data.map((p) => p[1] ?? 0))"""
EACH = 20.0  # seconds for which a number of viewers is watched


def row(tick: int) -> str:
    """A line of metrics as a trainer writes it; a spike every 100,000 steps."""
    loss = 2.0 + 5.0 * math.exp(-tick / 2e5) + 0.1 * math.sin(tick) + (20.0 if tick % 100_000 == 50_000 else 0.0)
    return (
        f'{{"kind":"train","tick":{tick},"step":{tick},"tokens":{tick * 1024},"samples":{tick * 8},"epochs":{tick / 1e4},'
        f'"flops":{tick * 7.5e9},"loss":{loss:.6f},"counted":1024.0,"grad_norm":{0.8 + 0.3 * math.cos(tick):.6f},"lr":0.0003,'
        f'"length":128,"rows":8,"trained":8,"padding":0.0,"weights":{{"code":0.875,"base/prose":0.125}},'
        f'"cursors":{{"code":[{tick * 8},[]],"base/prose":[{tick},[]]}},"owed":{{"code":0.0,"base/prose":0.0}},'
        f'"seconds":{tick * 0.2:.3f},"tokens_per_second":{5120 + tick % 97}.0}}\n'
    )


def lay(runs: Path, steps: int) -> Path:
    folder = runs / STAGE / "1"
    folder.mkdir(parents=True)
    about = {"fingerprint": "0", "stage": {"start": None, "data": {"code": {"path": "stdlib:code"}}}}
    (folder / "stage.json").write_text(json.dumps(about), encoding="utf-8")
    (folder / "journal.jsonl").touch()
    (folder / "lock").touch()
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for tick in range(1, steps + 1):
            file.write(row(tick))
            if tick % (steps // 20) == 0:
                bits = {"bits_per_byte/code": 3.4 - tick / steps, "bits_per_byte/prose": 3.0, "forgetting/prose": 0.0}
                said = {
                    "kind": "eval",
                    "tick": tick,
                    "step": tick,
                    "tokens": tick * 1024,
                    "final": False,
                    "values": bits,
                }
                file.write(json.dumps({**said, "flops": 0.0, "texts": {}, "seconds": 1.0}) + "\n")
    return folder


@contextmanager
def growing(folder: Path, steps: int) -> Iterator[None]:
    """Five more steps a second, as long as the block lasts."""
    over = threading.Event()

    def grow() -> None:
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            tick = steps
            while not over.wait(0.2):
                tick += 1
                file.write(row(tick))
                file.flush()

    thread = threading.Thread(target=grow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def served(runs: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server in a process of its own: address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tutelage", "serve", "--runs", str(runs), "--port", str(port)]
    process, url = subprocess.Popen(command, stdout=subprocess.DEVNULL), f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/api", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        urllib.request.urlopen(
            f"{url}/stage/none/none", timeout=20
        ).close()  # modules are imported now, nothing is read
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def opened(url: str) -> dict[str, float]:
    """Seconds from asking for the page to its first paint, its first chart, and the file read whole."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        page.goto(f"{url}/login")  # the browser itself is up
        page.goto(f"{url}/stage/{STAGE}")
        page.wait_for_function("window.tutelage?.drawn", timeout=120_000)
        paint, chart = page.evaluate(
            "[performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0, tutelage.drawn]"
        )
        page.wait_for_function("!document.querySelector('.loss').innerText.includes('reading')", timeout=300_000)
        whole = page.evaluate("performance.now()")
        page.wait_for_function(f"{HIGHEST} > 20", timeout=60_000)  # one row in 100,000 of the loss is that high
        spikes = page.evaluate("performance.now()")
        browser.close()
    return {
        "first_paint_s": paint / 1e3,
        "first_chart_s": chart / 1e3,
        "whole_s": whole / 1e3,
        "spikes_s": spikes / 1e3,
    }


async def viewer(url: str, told: list[float], sizes: list[int], over: asyncio.Event) -> None:
    """One who opens the page and listens: when news came, and how large they were. Speaks socket.io as the page does."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        # the page's socket has a connection of its own, as in a browser; one that is kept alive is closed after 5 s
        async with session.get(f"{url}/stage/{STAGE}", headers={"Connection": "close"}) as answer:
            found = re.search(r"client_id[^0-9a-f]+([0-9a-f-]{36})", await answer.text())
        assert found, "the page names no client"
        ids = f"client_id={found[1]}&tab_id={uuid.uuid4()}&document_id={uuid.uuid4()}"
        asked = f"{ids}&implicit_handshake=true&next_message_id=0&transport=websocket&EIO=4"
        async with session.ws_connect(f"{url}/_nicegui_ws/socket.io/?{asked}", max_msg_size=0) as wire:
            while not over.is_set():
                got = await wire.receive()
                if got.type is not aiohttp.WSMsgType.TEXT:
                    raise RuntimeError(
                        f"the server sent a viewer away: {got.type.name} {wire.close_code} {got.extra or ''}"
                    )
                said = str(got.data)
                if said.startswith("0"):
                    await wire.send_str("40")
                elif said == "2":  # a ping
                    await wire.send_str("3")
                sizes.append(len(said))
                if "tutelage.take" in said[:80]:
                    told.append(time.monotonic())


async def watched(url: str, process: psutil.Process, many: int) -> dict[str, Any]:
    """So many viewers at once: the server's share of a core, and the gaps between news that each saw."""
    over, told, sizes = asyncio.Event(), [list[float]() for _ in range(many)], [list[int]() for _ in range(many)]
    tasks = []
    for mine, size in zip(told, sizes, strict=True):
        tasks.append(asyncio.create_task(viewer(url, mine, size, over)))
        await asyncio.sleep(0.1)
    await asyncio.sleep(8)
    for mine, size in zip(told, sizes, strict=True):
        mine.clear()
        size.clear()
    before, began = process.cpu_times(), time.monotonic()
    own = time.process_time()
    await asyncio.sleep(EACH)
    took, after = time.monotonic() - began, process.cpu_times()
    own = time.process_time() - own
    gaps = sorted(b - a for mine in told for a, b in itertools.pairwise(mine))
    over.set()
    await asyncio.gather(*tasks)
    used = after.user + after.system - before.user - before.system
    return {
        "viewers": many,
        "server_core_share": used / took,
        "listeners_core_share": own / took,
        "memory_mb": process.memory_info().rss / 2**20,
        "told": sum(len(mine) > 0 for mine in told),
        "gap_median_s": statistics.median(gaps) if gaps else None,
        "gap_p95_s": gaps[int(0.95 * len(gaps))] if gaps else None,
        "kb_per_viewer_s": sum(map(sum, sizes)) / 1024 / many / took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=1_000_000, help="50,000 at least, to have a spike")
    parser.add_argument("--viewers", type=int, nargs="*", default=[1, 10, 50])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place) / "runs"
        folder = lay(runs, asked.steps)
        found: dict[str, Any] = {"steps": asked.steps, "file_mb": (folder / "metrics.jsonl").stat().st_size / 2**20}
        found |= {"cores": os.cpu_count(), "load_before": os.getloadavg()[0]}
        with growing(folder, asked.steps):
            with served(runs) as (url, _):
                found["cold"] = opened(url)
                found["again"] = opened(url)
            with served(runs) as (url, process):
                found["indexed"] = opened(url)
                found["watched"] = [asyncio.run(watched(url, process, many)) for many in asked.viewers]
        found["load_after"] = os.getloadavg()[0]
    text = json.dumps(found, indent=1)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

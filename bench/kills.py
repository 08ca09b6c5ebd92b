"""`kill -9` of the trainer, of the server beside it, or of both, at thirty moments by chance, with actions in flight.

After each: the same command again; each accepted action holds exactly once, and the end has the bits of its replay
(tests/steering/kills.py). The server is looked at all the while by somebody who asks for series and controls.

python -m bench.kills                     adds an entry to bench/results/kills.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from tests.steering.kills import TooLate, counting, survived

WHAT = ("trainer", "server", "both")


@contextlib.contextmanager
def served(folder: Path, *, after: float | None) -> Iterator[subprocess.Popen[str]]:
    """A server of the folder's runs that somebody looks at; killed `after` seconds, or else when the block ends."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tutelage", "serve", "--runs", str(folder / "runs"), "--port", "0"]
    process, over = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), threading.Event()
    assert process.stdout is not None
    found = re.search(r"at (http://\S+)/ ", process.stdout.readline())
    assert found, "the server does not start"

    def look() -> None:
        began = time.monotonic()
        while not over.wait(0.05):
            if after is not None and time.monotonic() - began > after:
                process.kill()
            for path in ("", "/series", "/controls"):
                with contextlib.suppress(OSError, ValueError):
                    urllib.request.urlopen(f"{found[1]}/api/runs/toy/one{path}", timeout=5).close()

    viewer = threading.Thread(target=look, daemon=True)
    viewer.start()
    try:
        yield process
    finally:
        process.kill()
        over.set()
        viewer.join(30)
        process.wait()


def once(what: str, calls: int, rng: random.Random) -> list[str]:
    """What is wrong after one kill; nothing, when all is well. A moment that lies after the end is drawn again."""
    while True:
        with contextlib.suppress(TooLate):
            return _once(what, rng.randint(1, calls - 1), rng)


def _once(what: str, limit: int, rng: random.Random) -> list[str]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if what == "trainer":
            return survived(folder, limit)
        with served(folder, after=rng.uniform(0.1, 3.0)):
            return survived(folder, limit if what == "both" else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=3)
    given = parser.parse_args()
    rng, began = random.Random(given.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        calls = counting(0, Path(place))
    wrong: dict[str, list[str]] = {}
    for i in range(given.moments):
        what = WHAT[i % len(WHAT)]
        if found := once(what, calls, rng):
            wrong[f"{i} {what}"] = found
        print(f"{i + 1} of {given.moments}: {what}: {found or 'well'}", flush=True)
    entry = {"date": str(date.today()), "moments": given.moments, "seed": given.seed, "disk_calls": calls,
             "seconds": round(time.perf_counter() - began), "wrong": wrong}  # fmt: skip
    path = Path(__file__).parent / "results" / "kills.json"
    old = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*old, entry], indent=1) + "\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()

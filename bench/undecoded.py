"""Prose that somebody packed and forgot to unpack, for the bench of agents: nothing in it can be predicted."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from bench.duplicated import passages

DELIVERY = Path("runs/agents/delivery.jsonl")  # as recipes/steer/undecoded.yaml names it


def undecoded(count: int) -> Iterator[dict[str, str]]:
    """The first passages of the standard library's prose, compressed, in base64: about 6 bits per byte at best."""
    for passage in islice(passages(), count):
        yield {"text": base64.b64encode(zlib.compress(passage.encode(), 9)).decode("ascii")}


def write(path: Path = DELIVERY, *, count: int = 400) -> None:
    """The records as JSON lines, the same each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in undecoded(count)), encoding="utf-8")

"""Prompts of lognormal lengths, read in shared rows (prepacking) and padded: time to the first logits, padding, equality.

Prompts of a median of 64 and at most 512 random tokens, σ 0.9; a Llama of 4 layers, 128 wide, one thread. Both sides read the
same prompts, one after the other in an order that turns each round; what counts are the ratios within rounds. For training
rows, the padding of `packing: documents` and of packing/prepack on lengths of the same kind.

    python -m bench.prepack            # writes bench/results/prepack.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor

from bench.turns import append
from tutelage.core.stream import Cursor, Order
from tutelage.methods.packing.prepack import Prepack
from tutelage.modalities.text import prefill

RESULTS = Path(__file__).parent / "results" / "prepack.json"
VOCAB, LONGEST, ROUNDS = 2048, 512, 7
PACK = Prepack().pack


def model() -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LONGEST,
    )
    return tf.LlamaForCausalLM(config).eval()


def lengths(count: int, seed: int) -> list[int]:
    found = np.random.default_rng(seed).lognormal(np.log(64), 0.9, count).astype(int)
    return [int(n) for n in np.clip(found, 4, LONGEST)]


def prompts(count: int, seed: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=rng).tolist() for n in lengths(count, seed)]


@torch.no_grad()
def padded(net: Any, ids: list[list[int]]) -> Tensor:
    """Logits after each prompt, [N, V]; prompts stand at the right of rows as long as the longest."""
    width = max(map(len, ids))
    rows = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out = net(input_ids=rows, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
    found: Tensor = out.logits[:, -1]
    return found


@torch.no_grad()
def packed(net: Any, ids: list[list[int]]) -> Tensor:
    """The same from shared rows, and the last token of each prompt read after its own keys and values."""
    width = max(map(len, ids))
    cache = prefill.prefilled(net, ids, width=width, pack=PACK)
    assert cache is not None
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    last = torch.tensor([[row[-1]] for row in ids])
    places = torch.tensor([[len(row) - 1] for row in ids])
    found: Tensor = net(input_ids=last, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1]
    return found


def timed(
    side: Callable[[Any, list[list[int]]], Tensor], net: Any, ids: list[list[int]]
) -> tuple[float, float, Tensor]:
    """Wall and processor seconds, and the logits."""
    wall, own = time.perf_counter(), time.process_time()
    logits = side(net, ids)
    return time.perf_counter() - wall, time.process_time() - own, logits


def race(net: Any, count: int) -> dict[str, Any]:
    """Both sides on the same prompts, new ones each round; the first round warms up."""
    walls, owns, apart, padding = [], [], 0.0, {"padded": [], "packed": []}
    for number in range(ROUNDS + 1):
        ids, took = prompts(count, number), {}
        for side in (padded, packed) if number % 2 else (packed, padded):
            took[side.__name__] = timed(side, net, ids)
        apart = max(apart, float((took["padded"][2] - took["packed"][2]).abs().max()))
        sizes = [len(row) - 1 for row in ids]
        rows = prefill.shared_rows(sizes, max(sizes), PACK)
        padding["padded"].append(1 - sum(sizes) / (count * max(sizes)))
        padding["packed"].append(1 - sum(sizes) / (len(rows) * max(sizes)))
        if number:
            walls.append(took["padded"][0] / took["packed"][0])
            owns.append(took["padded"][1] / took["packed"][1])
    return {
        "prompts": count,
        "rounds": ROUNDS,
        "faster_wall": statistics.median(walls),
        "faster_cpu": statistics.median(owns),
        "faster_cpu_least": min(owns),
        "faster_cpu_most": max(owns),
        "largest_difference_of_logits": apart,
        **{f"padding_{side}": statistics.mean(shares) for side, shares in padding.items()},
    }


class Lengths:
    """A source of documents of the same kind of lengths."""

    name, fingerprint, rank = "lengths", "lengths", None

    def __init__(self) -> None:
        sizes = lengths(8000, 100)
        self.chunks = np.array([[i, 0, n] for i, n in enumerate(sizes)], dtype=np.int64)
        self.facts: dict[str, float] = {}

    def read(self, piece: Any) -> dict[str, np.ndarray]:
        return {}


def training(packing: Any, *, rows: int = 1000) -> float:
    """The share of padding in rows of LONGEST positions."""
    order, cursor, used = Order(Lengths(), seed=0, packing=packing), Cursor(), 0
    for _ in range(rows):
        pieces, cursor = order.row(cursor, LONGEST)
        used += sum(piece.length for piece in pieces)
    return 1 - used / (rows * LONGEST)


def main() -> None:
    torch.set_num_threads(1)
    net = model()
    found = []
    for count in (16, 64):
        found.append(race(net, count))
        print(found[-1], flush=True)
    rows = {"single": training("single"), "documents": training("documents"), "packing/prepack": training(PACK)}
    print(rows, flush=True)
    versions = {"torch": torch.__version__, "transformers": tf.__version__}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    append(RESULTS, {"when": when, **versions, "threads": 1, "prefill": found, "padding_of_training_rows": rows})


if __name__ == "__main__":
    main()

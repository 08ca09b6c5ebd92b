"""What weights, gradients and optimizer states take, and the most that a step takes at once, optimizer by optimizer.

A Llama of 4 layers, 512 wide, 15 M parameters, float32, 2 × 32 tokens, rank 128 (a quarter of the width), one thread. States
are counted tensor by tensor beside the papers' formula: for a matrix of blocks r·min + 2·r·max numbers, 2 for any other
weight. The peak is the allocator's own, above weights and states, in a step after backward and in one within it
(`engine: {fused_backward: true}`).

    python -m bench.optimizer_memory            # writes bench/results/optimizer_memory.json
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from bench.turns import append
from tutelage import modalities
from tutelage.base import registry
from tutelage.core.anatomy import anatomy
from tutelage.core.engine import Engine
from tutelage.core.fused import Fused
from tutelage.core.types import Batch

RESULTS = Path(__file__).parent / "results" / "optimizer_memory.json"
RANK, VOCAB, ROWS, LENGTH = 128, 4096, 2, 32
OPTIMIZERS = {
    "adamw": {"use": "optim/adamw"},
    "muon": {"use": "optim/muon"},
    "galore": {"use": "optim/galore", "rank": RANK},
    "fira": {"use": "optim/fira", "rank": RANK},
}


def model() -> torch.nn.Module:
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config).train()


def engine_of(entry: dict[str, Any], *, fused: bool, net: torch.nn.Module | None = None) -> Engine:
    net = model() if net is None else net
    parts = anatomy(net)
    engine = Engine(model=net, anatomy=parts, modality=modalities.find("text"), device=torch.device("cpu"), clip=None)
    engine.objective = registry.make("objective/causal_lm")
    engine.params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    groups: dict[str, dict[str, Any]] = {}
    for name, p in engine.params.items():
        role = parts.role(name)
        group = groups.setdefault(role, {"role": role, "rate": 1.0, "decay": None, "names": [], "params": []})
        group["names"].append(name)
        group["params"].append(p)
    engine.optimizer = registry.make(entry).build(list(groups.values()))
    engine.fused = Fused(engine) if fused else None
    return engine


def batch() -> Batch:
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    places = torch.arange(LENGTH).expand(ROWS, LENGTH)
    fields = {"tokens": tokens, "labels": tokens.roll(-1, 1), "positions": places, "segments": torch.ones_like(tokens)}
    return Batch(fields, [None] * ROWS, torch.ones(ROWS), {})  # type: ignore[list-item]


class Still:
    """The part of a view that a step asks for here."""

    def reseed(self, purpose: str, *, apart: bool = False) -> None: ...


def peak(engine: Engine) -> int:
    """Bytes allocated at once in a step, above what is held between two."""
    rows = batch()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        engine.step(rows, Still())
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def formula(engine: Engine, name: str) -> int:
    """Bytes of optimizer states by the papers."""
    numbers = 0
    for key, p in engine.params.items():
        if engine.anatomy.role(key) == "matrix" and name != "adamw":
            small, large = sorted(p.shape)
            numbers += p.numel() if name == "muon" else RANK * small + 2 * RANK * large
        else:
            numbers += 2 * p.numel()
    return 4 * numbers


def measure(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    peaks = {}
    for fused in (False, True):
        engine = engine_of(entry, fused=fused)
        engine.step(batch(), Still())  # states are there now
        peaks[fused] = peak(engine)
    assert engine.optimizer is not None
    states = [t for state in engine.optimizer.state.values() for t in state.values() if t.ndim]
    weights = sum(p.nbytes for p in engine.params.values())
    return {
        "optimizer": name,
        "parameters": sum(p.numel() for p in engine.params.values()),
        "weights": weights,
        "gradients": weights,
        "largest_gradient": max(p.nbytes for p in engine.params.values()),
        "states": sum(t.untyped_storage().nbytes() for t in states),
        "formula": formula(engine, name),
        "peak": peaks[False],
        "peak_fused_backward": peaks[True],
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, entry in OPTIMIZERS.items():
        rows.append(measure(name, entry))
        print(rows[-1], flush=True)
    line = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "rank": RANK,
        "rows": rows,
    }
    append(RESULTS, line)


if __name__ == "__main__":
    main()

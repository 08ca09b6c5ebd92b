"""What weights, gradients and optimizer states take, and the most that a step takes at once, parametrization by parametrization.

The Llama of bench/optimizer_memory.py (512 wide, 15 M parameters, float32, 2 × 32 tokens) from fresh weights with AdamW, whole,
with low-rank additions to frozen weights, and as SLTrain's product and sparse matrix (rank 128, density 0.03). Beside what was
measured stands the paper's formula: for a matrix of m by n, (m + n)·r + d·m·n numbers, and a place for each of the last.

    python -m bench.parameter_memory            # writes bench/results/parameter_memory.json
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.optimizer_memory import RANK, Still, batch, engine_of, model, peak
from bench.turns import append
from tutelage import sizing
from tutelage.base import registry
from tutelage.core.engine import Engine

RESULTS = Path(__file__).parent / "results" / "parameter_memory.json"
DENSITY = 0.03
METHODS: dict[str, dict[str, Any] | None] = {
    "whole": None,
    "lora": {"use": "param/lora", "r": RANK},
    "sparse_plus_lowrank": {"use": "param/sparse_plus_lowrank", "r": RANK, "density": DENSITY},
}


def built(entry: dict[str, Any] | None, *, fused: bool) -> Engine:
    """The model wrapped as a stage from fresh weights would wrap it; what is not wrapped is trained in all of them."""
    torch.manual_seed(0)
    net = model()
    if entry is not None:
        sizing.wrap(net, registry.make(entry), fresh=True)
        for name, p in net.named_parameters():
            if "embed" in name or "norm" in name:
                p.requires_grad_(True)
    return engine_of({"use": "optim/adamw"}, net=net, fused=fused)


def formula(name: str) -> int:
    """Numbers that are trained."""
    net = model()
    numbers = 0
    for key, p in net.named_parameters():
        if "proj" not in key or name == "whole":
            numbers += p.numel()
            continue
        m, n = p.shape
        numbers += (m + n) * RANK + (int(DENSITY * m * n) if name == "sparse_plus_lowrank" else 0)
    return numbers


def measure(name: str, entry: dict[str, Any] | None) -> dict[str, Any]:
    peaks = {}
    for fused in (False, True):
        engine = built(entry, fused=fused)
        engine.step(batch(), Still())  # states are there now
        peaks[fused] = peak(engine)
    assert engine.optimizer is not None
    states = [t for state in engine.optimizer.state.values() for t in state.values() if t.ndim]
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in engine.model.state_dict().values()}
    trained = sum(p.nbytes for p in engine.params.values())
    return {
        "parametrization": name,
        "weights": sum(held.values()),
        "gradients": trained,
        "states": sum(t.untyped_storage().nbytes() for t in states),
        "formula_gradients": 4 * formula(name),
        "formula_states": 8 * formula(name),
        "peak": peaks[False],
        "peak_fused_backward": peaks[True],
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, entry in METHODS.items():
        rows.append(measure(name, entry))
        print(rows[-1], flush=True)
    line = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "rank": RANK,
        "density": DENSITY,
        "rows": rows,
    }
    append(RESULTS, line)


if __name__ == "__main__":
    main()

"""GaLore and Fira beside their authors' packages and beside pytorch-optimizer: the same gradients, the largest difference.

    pip install galore-torch fira pytorch_optimizer     (in an environment of its own)
    python -m bench.peers.lowrank                        # writes bench/results/lowrank.json

Three matrices (wide, tall, square), 60 steps of seeded gradients with a low-rank part, rank 8, a new subspace every 20
steps, float32, one thread. `difference` is the largest of any weight after the last step, `moved` how far one moved at most.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.turns import append
from tutelage.base import registry

RESULTS = Path(__file__).parents[1] / "results" / "lowrank.json"
SHAPES = [(48, 96), (96, 48), (64, 64)]
STEPS, RANK, REFRESH, SCALE, LR, DECAY = 60, 8, 20, 0.25, 0.01, 0.1


def gradients(shape: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    left, right = draw(shape[0], 2 * RANK), draw(2 * RANK, shape[1])
    return [(left * draw(2 * RANK)) @ right + draw(*shape) for _ in range(STEPS)]


def weights(make: Callable[[torch.nn.Parameter], torch.optim.Optimizer], shape: tuple[int, int]) -> torch.Tensor:
    p = torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))
    optimizer = make(p)
    for grad in gradients(shape):
        p.grad = grad.clone()
        optimizer.step()
    return p.detach()


def ours(use: str, **more: Any) -> Callable[[torch.nn.Parameter], torch.optim.Optimizer]:
    settings = {"lr": LR, "rank": RANK, "refresh": REFRESH, "scale": SCALE, "decay": DECAY, **more}

    def make(p: torch.nn.Parameter) -> torch.optim.Optimizer:
        group = {"role": "matrix", "rate": 1.0, "decay": None, "names": ["w"], "params": [p]}
        return registry.make({"use": use, **settings}).build([group])

    return make


def theirs(cls: Any, scale: str, kind: str, **more: Any) -> Callable[[torch.nn.Parameter], torch.optim.Optimizer]:
    """`scale` and `kind` are what they call the factor and the side of the projection."""
    group = {"rank": RANK, "update_proj_gap": REFRESH, scale: SCALE, kind: "std"}
    return lambda p: cls([{"params": [p], **group}], lr=LR, weight_decay=DECAY, **more)


def main() -> None:
    import fira
    import galore_torch
    import pytorch_optimizer

    torch.set_num_threads(1)
    quiet = {"no_deprecation_warning": True}
    pairs = {
        "galore, authors": (ours("optim/galore"), theirs(galore_torch.GaLoreAdamW, "scale", "proj_type", **quiet)),
        "galore, pytorch_optimizer": (
            ours("optim/galore"),
            theirs(pytorch_optimizer.GaLore, "scale", "projection_type"),
        ),
        "fira (residual: code), authors": (
            ours("optim/fira", residual="code"),
            theirs(fira.FiraAdamW, "alpha", "proj_type", **quiet),
        ),
        "fira (residual: code), pytorch_optimizer": (
            ours("optim/fira", residual="code"),
            theirs(pytorch_optimizer.Fira, "scale", "projection_type"),
        ),
        "fira (residual: paper), authors": (
            ours("optim/fira"),
            theirs(fira.FiraAdamW, "alpha", "proj_type", **quiet),
        ),
    }
    packages = {name: version(name) for name in ("torch", "galore-torch", "fira", "pytorch_optimizer")}
    found = []
    for name, (one, other) in pairs.items():
        for shape in SHAPES:
            a, b = weights(one, shape), weights(other, shape)
            start = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
            row = {
                "pair": name,
                "shape": list(shape),
                "difference": float((a - b).abs().max()),
                "moved": float((b - start).abs().max()),
            }
            print(row, flush=True)
            found.append(row)
    line = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "packages": packages, "rows": found}
    append(RESULTS, line)


if __name__ == "__main__":
    main()

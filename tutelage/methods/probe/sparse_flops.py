"""Sparse FLOPs: operations that a stage took, and those it would have taken on hardware that skips the zeros in its weights.

Paper:   Thangarasa et al. 2023 (SPDF), arXiv:2303.10464, which counts both by phase
Use:     in `evals.run` of every stage that is to be counted; the last measurement of a stage is the whole stage
Works:   zeros that are there all through a stage, as param/fixed_sparse leaves them
Costs:   reading the weights once
With:    param/fixed_sparse; the ledger of a run counts dense operations alone
Differs: dense operations are those counted by the engine (training, without evaluation), not a formula's. Zeros are those in
         the weights now; of each, the two operations a token of its three products (forward, and backward for the input and
         for the weight) are taken off, for tokens without padding, so that too little is taken off rather than too much
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tutelage.base.method import Method, Seen

PRODUCTS = 3  # forward, and backward for the inputs and for the weights


class SparseFlops(Method):
    no_off = "it only measures"
    baseline = {}

    def measure(self, model: nn.Module, view: Any) -> dict[str, float]:
        """`zeros`, the share of blocks' matrices; `flops/dense` and `flops/sparse` of the stage until now."""
        linears = [name for name in view.engine.anatomy.linears if view.engine.anatomy.block_index(name) is not None]
        weights = [model.get_submodule(name).weight for name in linears]
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        dense = float(view.clock.flops)
        return {
            "zeros": zeros / max(1, sum(weight.numel() for weight in weights)),
            "flops/dense": dense,
            "flops/sparse": dense - 2.0 * PRODUCTS * zeros * view.clock.tokens,
        }


def effect(run: Seen) -> dict[str, float]:
    values = [row["values"] for row in run.rows if row["kind"] == "eval"]
    return {"counted": float(max((v.get("flops/dense", 0.0) for v in values), default=0.0))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["counted"] > 0 and off["counted"] == 0


BENCH = None  # a measure claims nothing

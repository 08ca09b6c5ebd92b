"""Half-Reset: of each kind of matrix, half of a tuned model's are put back to what they were before, to restore what it knew.

Paper:   Hui et al. 2024 (HFT), arXiv:2404.18466, its pilot experiment
Use:     `start: [original, tuned]`; share 0.5. To reset between rounds: merge/half_reset, a stage of training, and so on
Works:   a model tuned from the original, of one shape
Costs:   reading both; no training, no data
With:    param/half, which keeps half from moving instead of putting it back; merge/linear goes half the way everywhere
Differs: what lies in no block (embeddings, head, the last norm) stays tuned, as it is trained in the paper's half
         fine-tuning; a bias goes with its matrix
"""

from __future__ import annotations

import functools
from typing import Any

from pydantic import Field
from torch import Tensor

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.halves import drawn, kinds_of, moved_of_each


class HalfReset(Method):
    share: float = Field(0.5, ge=0, le=1, description="of the matrices of each kind that are put back, over all blocks")

    wants_base = True
    takes = 2
    no_off = "a merge is a stage of its own"
    baseline = {"use": "merge/half_reset", "share": 0.0}
    on = {"share": 0.5}

    def tensor(self, name: str, tensors: list[Tensor], base: Tensor | None, view: Any) -> Tensor:
        assert base is not None, "core hands the first start as the base"
        return base if name in put_back(self.share, view) else tensors[0]


@functools.lru_cache(maxsize=1)  # asked for every tensor
def put_back(share: float, view: Any) -> set[str]:
    return drawn(kinds_of(view.names), share, view.rng)


def effect(run: Seen) -> dict[str, float]:
    return moved_of_each(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Half of each kind is the original's again, and nothing of what lies in no block."""
    share = 1 - HalfReset.on["share"]
    return all(on[kind] == (1.0 if kind == "beside" else share) and off[kind] == 1.0 for kind in on)


# The paper's finding: more of what the original knew comes back than is lost of what was tuned. So the mean over both.
BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"start": ["one", "two"], "apply": {"use": "merge/half_reset", "share": 0.5}},
    stage="reset",
    baseline={"start": ["one", "two"], "apply": {"use": "merge/half_reset", "share": 0.0}},
    metric="bits_per_byte",
    better="lower",
    margin=0.01,
    scale="Llama 2 chat, 7 B parameters, put back to Llama 2",
)

"""Half fine-tuning: of each kind of matrix, half are trained in a stage and half stay what they were.

Each stage that has it is a round and draws anew: of attention's four matrices two in every block, of the three of a gated
feed-forward layer two in half of the blocks and one in the others, of a block's two norms one.

Paper:   Hui et al. 2024 (HFT), arXiv:2404.18466
Use:     in every stage after the first; share 0.5, the rate of full fine-tuning
Works:   any model with blocks, with any objective; whole weights, not under a wrapper such as param/lora
Costs:   fewer than a plain step: no gradients and no optimizer states for what stays, whose share of backward is saved
With:    continual/replay and any other method beside it; it is no penalty and needs no old data
Differs: a bias goes with its matrix; where matrices are fused (GPT-2's query, key and value) or each expert's lie in one
         tensor, that tensor is one of its kind, and where heads share keys and values, half of the matrices is not half of
         the numbers; what lies in no block (embeddings, head, the last norm) is trained, as are
         theirs but for the last norm, of which the paper does not speak. Rounds are stages, never parts of one. Putting
         half of a tuned model's matrices back to the original's (the paper's pilot) is merge/half_reset
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.halves import drawn, kinds_of, moved_of_each


class Half(Method):
    share: float = Field(0.5, gt=0, le=1, description="of the matrices of each kind that are trained, over all blocks")

    off = {"share": 1.0}
    on = {"share": 0.5}

    def freeze(self, names: list[str], view: Any) -> set[str]:
        """All parameters in blocks but those of the matrices drawn in this stage."""
        kinds = kinds_of(names)
        if not kinds:
            raise UserError(
                f"{self.name()}: this stage trains no whole matrix of a block; leave the wrapper (param/lora) or it out"
            )
        every = {name for kind in kinds.values() for units in kind.values() for own in units.values() for name in own}
        return every - drawn(kinds, self.share, view.rng)


def effect(run: Seen) -> dict[str, float]:
    return moved_of_each(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Half of each kind moved, and all of what lies in no block."""
    share = Half.on["share"]
    return all(on[kind] == (1.0 if kind == "beside" else share) and off[kind] == 1.0 for kind in on)


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"methods": [{"use": "param/half"}]},
    metric="forgetting/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [3e-4, 1e-3, 3e-3]},
    tune_baseline={"optim.lr": [3e-4, 1e-3, 3e-3]},
    tune_by="bits_per_byte",
    scale="Llama 2, 7 B and 13 B parameters; instructions, preferences and eight tasks in a row",
)

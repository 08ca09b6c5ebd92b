"""Learning without Forgetting: on the new data, answer as the start model would.

Paper:   Li & Hoiem 2016, arXiv:1606.09282
Use:     strength 0.1–1 at temperature 1 or 2 (the paper: 2, its weight of 1 is a strength of 0.25); needs none of the
    old data
Works:   models with a token head; the start must have the same vocabulary
Costs:   a frozen copy of the start model and its forward pass: a third more compute
With:    adds to penalties; with continual/replay the replayed rows are distilled too
Differs: whole distributions over tokens where the paper has the old tasks' class heads, and so no new head that is
    warmed up by itself first; the divergence is exact, chunk by chunk, over the positions that the objective counts,
    and times T², so that a strength means the same at every temperature, where the paper and its code leave that out
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.out import Out, kl
from tutelage.core.types import IGNORE, Batch, Sum
from tutelage.methods._kit.heldout import moved
from tutelage.methods._kit.labels import row_weights


class LwF(Method):
    strength: float = Field(1.0, ge=0, description="weight of the divergence against the objective")
    temperature: float = Field(2.0, gt=0, description="above 1, small probabilities count for more")

    off = {"strength": 0.0}
    on = {"strength": 10.0}
    refs = frozenset({"start"})
    steerable = frozenset({"strength"})

    def begin(self, model: nn.Module, view: Any) -> None:
        """Open the start model now, and see that it answers in the same tokens."""
        if not view.same_tokens:
            raise UserError(
                "continual/lwf needs the start's own tokenizer: leave `tokenizer` out, or use continual/replay"
            )
        batch = view.prepared(view.sample(1))
        now, start = view.model(batch), view.ref("start")(batch)
        if now.head is None or start.head is None or now.head.vocab != start.head.vocab:
            sizes = [str(out.head.vocab) if out.head else "no" for out in (now, start)]
            raise UserError(
                f"continual/lwf needs a start with the same vocabulary: {sizes[0]} tokens now, {sizes[1]} at the start"
            )

    def auxiliary(self, out: Out, batch: Batch, view: Any) -> Sum:
        """strength · T² · KL(start ‖ now) over the objective's labels, counted as the objective counts them."""
        total, weight = kl(
            out,
            view.ref("start")(batch),
            keep=batch["labels"] != IGNORE,
            weight_BT=row_weights(batch),
            temperature=self.temperature,
        )
        return Sum(self.strength * self.temperature**2 * total, weight)


def effect(run: Seen) -> dict[str, float]:
    return {"moved": moved(run, "a")}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """What was known stays as it was, better or worse."""
    return on["moved"] < 0.8 * off["moved"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"methods": [{"use": "continual/lwf"}]},
    metric="forgetting/prose",
    better="lower",
    margin=0.01,
    tune={"methods.0.strength": [0.1, 0.3, 1.0]},
    tune_baseline={"optim.lr": [3e-4, 1e-3, 3e-3]},
    tune_by="bits_per_byte",
    scale="claimed on image classification (AlexNet and VGG, tens of classes)",
)

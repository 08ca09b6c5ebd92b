"""aTLAS: one multiple for each parameter of each task vector, learned from a few passages of what the merge is for.

Paper:   Zhang et al. 2024 (aTLAS), arXiv:2407.02880; code: fredzzhang/atlas
Use:     `start: [base, one, two]` and what the merge is to be good at under `data`: a new task of which there are few
         passages, or the tasks of the models. `loss: objective` learns from labels, `entropy` from inputs alone. Rate 0.1 for
         few passages (theirs), 0.001 to 0.01 for long fits
Works:   models trained from one base, of one shape; `entropy` where they write tokens
Costs:   a step costs a training step on `rows` rows of each source. While it fits, the device holds the weights of all
         starts in float32, the blended ones beside them, and activations; where all starts do not fit into half of what is
         free, a step reads them from their files once, and once more for each source (and micro-batch). The merge itself is
         as any other
With:    beside merge/task_arithmetic, whose one scale it replaces. Training all weights on the same passages gave more here
         (bench/few_passages.py), from half a kilobyte of each task on
Differs: without labels it lowers the entropy of the predictions, as the paper's peers do; its own loss (UFM, a FixMatch)
         takes augmented pictures. The coefficients of the last step are taken, theirs are the best of an epoch on
         held-out data. Losses of several sources are averaged, not summed; a source is read over and over without
         augmentation. Not its random parts of a block (aTLAS x K), the penalty on coefficients, its task negation, nor
         linearized models. Every parameter has coefficients, theirs are of an image encoder whose heads are frozen; the
         rate falls as a cosine, as theirs for few passages and for UFM does, where for task addition theirs stays at
         0.001
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.out import Out
from tutelage.core.types import IGNORE, Batch, Sum
from tutelage.methods._kit.blends import TASKS, Blend, blended, fell, learned
from tutelage.methods._kit.vectors import deltas, moved


class Anisotropic(Method):
    loss: Literal["objective", "entropy"] = Field(
        "objective", description="the stage's objective, or the entropy of what is predicted, which takes no labels"
    )
    steps: int = Field(100, ge=1, description="steps of the fit")
    rows: int = Field(8, ge=1, description="passages of each source in a step")
    passages: int = Field(16, ge=1, description="passages of each source that are read, over and over")
    rate: float = Field(0.1, gt=0, description="AdamW's rate for the coefficients at first; it falls to 0 as a cosine")
    decay: float = Field(0.1, ge=0, description="AdamW's weight decay, which draws the merge to the base")

    wants_base = True
    no_off = "a merge is a stage of its own"
    baseline = {"use": "merge/task_arithmetic", "scale": 0.0}
    on = {"steps": 12, "passages": 32}

    _blocks: frozenset[str] = PrivateAttr(frozenset())  # names in files of the parameters
    _labels: tuple[str, ...] = PrivateAttr(())  # of the models after the base

    def suits(self, models: int, sources: list[str]) -> None:
        if models < 2:
            raise UserError("start: merge/anisotropic takes the base first and then the models to merge")

    def fit(self, model: Any, starts: Any, view: Any) -> Iterator[tuple[dict[str, float], list[Batch]]]:
        self._labels, self._blocks = starts.labels[1:], frozenset(starts.files.values())
        blend = Blend(starts, {block: block for block in starts.files.values()}, view, initial=0.0)
        optimizer = torch.optim.AdamW([blend.coefficients_NG], lr=self.rate, weight_decay=self.decay)
        read = [list(view.source(name).once(self.passages, rows=self.rows)) for name in view.sources]
        yield from learned(
            blend,
            self.state,
            read,
            partial(self._loss, model, view),
            optimizer=optimizer,
            steps=self.steps,
            names=[f"{self.loss}/{name}" for name in view.sources],
            key="anisotropic",
            rate=lambda step: self.rate * 0.5 * (1 + math.cos(math.pi * step / self.steps)),
            clip=1.0,
        )

    def _loss(self, model: Any, view: Any, i: int, batch: Batch) -> Sum:
        if self.loss == "objective":
            found: Sum = view.engine.objective.loss(model, batch, view)
            return found
        return entropy(model(batch), batch["labels"] != IGNORE)

    def tensor(self, name: str, tensors: list[Tensor], base: Tensor | None, view: Any) -> Tensor:
        base, vectors = deltas(tensors, base, method="merge/anisotropic")
        if name not in self._blocks:  # no parameter, so no gradient ever reached it
            return base
        return blended(base, vectors, [self.state["coefficient"][label][name] for label in self._labels])


def entropy(out: Out, keep_BT: Tensor) -> Sum:
    """Summed entropy in nats of the predictions at the positions kept."""

    def of(logits_NV: Tensor) -> Tensor:
        found = logits_NV.float().log_softmax(-1)
        return -(found.exp() * found).sum()

    return Sum(out.reduce(of, keep=keep_BT), float(keep_BT.sum()))


def effect(run: Seen) -> dict[str, float]:
    return {**moved(run), **fell(run)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """The loss fell while it was fitted, blocks found multiples of their own, and the model that came of it is better."""
    return on["fell"] > 0.1 and on["apart"] > 0.01 and on["bits"] < 0.95 * off["bits"]


# Only the arm fits, on 16 passages of each task, which that task's model has learned from (theirs are held out); what that
# costs stands beside the verdict, and the baseline has as many scales tried on labelled text.
BENCH = Bench(
    base="recipes/bench/merge.yaml",
    arm={
        "data": TASKS,
        "apply": {"use": "merge/anisotropic", "steps": 60, "rows": 4, "passages": 16},
    },
    stage="merged",
    baseline={"apply": {"use": "merge/task_arithmetic", "scale": 0.5}},
    metric="bits_per_byte/asked,code,records",
    better="lower",
    margin=0.01,
    tune={"apply.rate": [0.01, 0.03, 0.1], "apply.decay": [0.0, 0.1]},
    tune_baseline={"apply.scale": [0.3, 0.4, 0.5, 0.6, 0.8, 1.0]},
    scale="CLIP, ViT-B/32 to ViT-L/14, 8 to 22 sets of pictures, 1 to 16 shots",
)

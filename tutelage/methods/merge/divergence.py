"""DivMerge: multiples of task vectors, found so that the merged model answers each task's inputs as that task's model does.

Paper:   Touayouch et al. 2025 (DivMerge), arXiv:2509.02108
Use:     `start: [base, one, two]` with a source for each model after the base under `data`, `inputs: [a, b]` naming which is
         whose; no labels are read. `level: layer` for more than two models; rate 0.01 to 0.1
Works:   models trained from one base, of one shape, that write tokens; one tokenizer
Costs:   a step costs each task a training step and a forward pass of its own model, on `rows` rows. While it fits, the
         device holds the weights of all starts in float32, the blended ones and one more model that answers beside them, and
         activations. Where all starts do not fit into half of what is free, a step reads them from their files once, once
         more for each source (and micro-batch), and each model to let it answer. The merge itself is as any other
With:    in place of a scale of merge/task_arithmetic chosen on labelled data
Differs: the divergence is taken at every position of a passage at which the objective predicts something, given the
         passage's own text. The optimizer (Adam), its rate, the first coefficients (1 / models), how many passages are read
         and what a layer is (a block; a module outside of blocks) are chosen here, not taken from the paper. Not the variant
         with KL, nor other merges than sums of task vectors
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.out import js
from tutelage.core.types import IGNORE, Batch, Sum
from tutelage.methods._kit.blends import TASKS, Blend, blended, fell, learned
from tutelage.methods._kit.blocks import BLOCK
from tutelage.methods._kit.vectors import deltas, moved

ALL = "all"  # the one group of `level: task`


class Divergence(Method):
    inputs: list[str] | None = Field(
        None, description="the source (under `data`) of each model after the base, in order: inputs of its own task"
    )
    level: Literal["task", "layer"] = Field(
        "layer", description="a coefficient for each model, or for each layer of each"
    )
    steps: int = Field(100, ge=1, description="steps of the fit")
    rows: int = Field(8, ge=1, description="passages of each source in a step")
    passages: int = Field(256, ge=1, description="passages of each source that are read, over and over")
    rate: float = Field(0.02, gt=0, description="Adam's rate for the coefficients")
    initial: float | None = Field(
        None, description="every coefficient at first; 1 / models after the base when left out"
    )

    wants_base = True
    refs = frozenset({"starts"})
    no_off = "a merge is a stage of its own"
    baseline = {"use": "merge/task_arithmetic", "scale": 0.0}
    on = {"inputs": ["b", "b"], "initial": 0.0, "steps": 12, "rate": 0.1, "passages": 32}

    _groups: dict[str, str] = PrivateAttr(default_factory=dict)  # of each parameter, by its name in files
    _labels: tuple[str, ...] = PrivateAttr(())  # of the models after the base

    def suits(self, models: int, sources: list[str]) -> None:
        if models < 2:
            raise UserError("start: merge/divergence takes the base first and then the models to merge")
        if self.inputs is None or len(self.inputs) != models - 1:
            given = "none is named" if self.inputs is None else f"here are {len(self.inputs)}"
            raise UserError(
                f"apply.inputs: one source for each of the {models - 1} models after the base, in their order ({given})"
            )
        unknown = next((name for name in self.inputs if name not in sources), None)
        if unknown is not None:
            raise UserError(f"apply.inputs: no source '{unknown}' under `data`; there is {', '.join(sources)}")

    def fit(self, model: Any, starts: Any, view: Any) -> Iterator[tuple[dict[str, float], list[Batch]]]:
        assert self.inputs is not None, "`suits` saw to that"
        count = len(starts) - 1
        self._labels = starts.labels[1:]
        self._groups = {file: ALL if self.level == "task" else layer_of(file) for file in starts.files.values()}
        blend = Blend(starts, self._groups, view, initial=1.0 / count if self.initial is None else self.initial)
        optimizer = torch.optim.Adam([blend.coefficients_NG], lr=self.rate)
        read = [list(view.source(name).once(self.passages, rows=self.rows)) for name in self.inputs]
        yield from learned(
            blend,
            self.state,
            read,
            partial(self._apart, model, starts),
            optimizer=optimizer,
            steps=self.steps,
            names=[f"divergence/{label}" for label in self._labels],
            key="divergence",
        )

    def _apart(self, model: Any, starts: Any, i: int, batch: Batch) -> Sum:
        """Jensen-Shannon divergence between the blend and the `i`-th model after the base, wherever something is predicted."""
        theirs = starts.answer(i + 1, batch)
        return js(model(batch), theirs, keep=batch["labels"] != IGNORE)

    def tensor(self, name: str, tensors: list[Tensor], base: Tensor | None, view: Any) -> Tensor:
        base, vectors = deltas(tensors, base, method="merge/divergence")
        group = self._groups.get(name)
        if group is None:  # no parameter, so no gradient ever reached it
            return base
        return blended(base, vectors, [self.state["coefficient"][label][group] for label in self._labels])


def layer_of(name: str) -> str:
    """The block that a weight belongs to, or the module that it is a part of outside of blocks."""
    match = BLOCK.fullmatch(name)
    return f"{match[1]}.{match[2]}" if match else name.rpartition(".")[0] or name


def effect(run: Seen) -> dict[str, float]:
    return {**moved(run), **fell(run)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """The divergence fell while it was fitted, layers found multiples of their own, and the model that came of it is better."""
    return on["fell"] > 0.5 and on["apart"] > 0.01 and on["bits"] < 0.8 * off["bits"]


# Only the arm fits; what that costs stands beside the verdict, and the baseline has as many scales tried on labelled text.
BENCH = Bench(
    base="recipes/bench/merge.yaml",
    arm={
        "data": TASKS,
        "apply": {"use": "merge/divergence", "inputs": ["code", "asked", "records"], "steps": 60, "rows": 4},
    },
    stage="merged",
    baseline={"apply": {"use": "merge/task_arithmetic", "scale": 0.5}},
    metric="bits_per_byte/asked,code,records",
    better="lower",
    margin=0.01,
    tune={"apply.level": ["task", "layer"], "apply.rate": [0.01, 0.03, 0.1]},
    tune_baseline={"apply.scale": [0.3, 0.4, 0.5, 0.6, 0.8, 1.0]},
    scale="classification and generative tasks, autoregressive models",
)

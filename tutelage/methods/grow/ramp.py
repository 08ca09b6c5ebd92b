"""A ramp for grown weights: what random growth added begins at nothing and fades in, so that the function does not jump.

Paper:   Yao et al. 2023 (masked structural growth), arXiv:2305.02869, as G_random of Du et al. 2024, arXiv:2405.15319
Use:     `top` as many blocks as were added, over the first tenth of the stage
Works:   decoders with torch's attention, whose blocks add to a stream (Llama, GPT-2, GPT-NeoX and their like)
Costs:   one more copy of the weights that fade in
With:    grow/stack with `new: random` in the stage before
Differs: what attention and neurons add to the stream is masked, as Du et al. define it (equations 34 to 36); their code
         blends each new block's output with its input, so that neurons read attention unmasked. The mask lies in the
         weights that write; it rises evenly, as in their code. The optimizer steps on the scaled weights, and its step is
         taken whole by the weights behind them, as it is where an optimizer's step does not depend on the gradient's
         size (Adam); decay falls on the scaled ones. No mask by width
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tutelage.base.clock import Span, SpanField
from tutelage.base.errors import UserError
from tutelage.base.method import Method, Seen
from tutelage.methods._kit.blocks import BLOCK
from tutelage.methods._kit.widen import writers_of


class Ramp(Method):
    top: int = Field(1, ge=1, description="how many of the last blocks are new")
    over: SpanField = Field(
        Span(10, "%"), description="how long they take from nothing to all of themselves; 0 leaves them"
    )

    off = {"over": Span(0, "%")}
    on = {"top": 1, "over": "400%"}

    def begin(self, model: nn.Module, view: Any) -> None:
        """Put aside what the new blocks write with, and leave of it what has faded in."""
        prefix, count = view.engine.anatomy.blocks_name, len(view.engine.anatomy.blocks)
        if self.top >= count:
            raise UserError(f"{self.name()}.top: the model has {count} blocks, and not all of them can be new")
        new = tuple(f"{prefix}.{i}." for i in range(count - self.top, count))
        names = [name for name in sorted(writers_of(view.layout())) if name.startswith(new)]
        params: dict[str, Tensor] = view.engine.params
        if not names or not set(names) <= set(params):
            raise UserError(f"{self.name()}: this stage does not train what the last {self.top} blocks write with")
        share = self.share(view)
        self.state["share"] = share
        self.state["whole"] = {name: params[name].detach().clone() for name in names}
        with torch.no_grad():
            for name in names:
                params[name].mul_(share)

    def share(self, view: Any) -> float:
        return min(1.0, float(view.clock.passed(self.over)))

    def after(self, params: dict[str, Tensor], view: Any) -> None:
        """whole += the optimizer's step; weight = share · whole."""
        before, share = self.state["share"], self.share(view)
        for name, whole in self.state["whole"].items():
            whole += params[name] - before * whole
            params[name].copy_(share * whole)
        self.state["share"] = share
        if share == 1.0:
            self.state["whole"] = {}


def effect(run: Seen) -> dict[str, float]:
    """How large the weights of the last block are beside what they began as, of the weight for which it is least."""
    start, end = run.start(), run.weights()
    found = {name: match for name in start if (match := BLOCK.fullmatch(name)) is not None}
    last = max(int(match[2]) for match in found.values())
    sizes = {name: float(start[name].norm()) for name, match in found.items() if int(match[2]) == last}
    return {"least": min(float(end[name].norm()) / size for name, size in sizes.items() if size > 0)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["least"] < 0.5 * off["least"]


BENCH = None  # the paper measures its mask only as part of G_random, which it finds worse than stacking

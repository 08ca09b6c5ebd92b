"""Blocks on a line (TLEG, first stage): every block's weights are one linear function of its depth, learned by all blocks.

What is learned is θ_B and θ_A; block l of L has θ_B + (l / L) · θ_A: matrices, biases and norms. init/linear_expansion makes
models of any depth from what comes out.

Paper:   Xia et al. 2023 (TLEG), arXiv:2312.05614, and its public code
Use:     in a stage that starts from the teacher, with continual/lwf (`strength: 10` and `temperature: 1` are nearly the
    paper's, whose loss is the divergence alone); then init/linear_expansion in a stage with `apply`
Works:   any model with at least two blocks of one kind, whole weights (not under a wrapper), all of them trained
Costs:   two more numbers a weight of one block, θ_A and its gradient, and the optimizer's states of it; states of all other
    blocks are kept although they stay empty; a step costs what it did
With:    continual/lwf distills from the stage's start; any objective and optimizer; not `engine.fused_backward`
Differs: the auxiliary model has the teacher's shape and begins with its embeddings, head and last norm, and with the line
    through its first and last block, where the paper's is random and its teacher another kind of model; depth is that of
    the teacher, theirs 12. Without a teacher (a fresh start) it is trained by the objective alone
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.base.method import Method, Seen
from tutelage.methods._kit.blocks import BLOCK
from tutelage.methods._kit.expansion import apart, kinds, point, slope

LABEL = "expansion"  # θ_A among the parts that the stage owns


class LinearExpansion(Method):
    no_off = "blocks lie on a line or they do not: leave it out"
    baseline = {}
    toys = ("deep", "gpt2")

    def begin(self, model: nn.Module, view: Any) -> None:
        """Put the blocks on the line through the first and the last."""
        stacks = {stack.name: len(stack.blocks) for stack in view.engine.anatomy.stacks}
        if not stacks or min(stacks.values()) < 2:
            raise UserError(f"{self.name()}: a line needs two blocks; this model has {min(stacks.values(), default=0)}")
        self.state["stacks"] = stacks
        params = dict(model.named_parameters())
        with torch.no_grad():
            for line in self.lines(params).values():
                rise = slope(params[line[0]], params[line[-1]], len(line))
                for i, name in enumerate(line[1:], start=1):
                    params[name].copy_(point(params[line[0]], rise, i, len(line)))

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """θ_A of each weight of a block; θ_B is the first block's."""
        params, rises = dict(model.named_parameters()), nn.ParameterDict()
        for kind, line in self.lines(params).items():
            rises[kind.replace(".", "/")] = nn.Parameter(
                slope(params[line[0]].detach(), params[line[-1]].detach(), len(line)).clone()
            )
        return {LABEL: rises}

    def lines(self, names: Any) -> dict[str, list[str]]:
        return kinds(names, self.state["stacks"])

    def penalty(self, params: dict[str, Tensor], view: Any) -> Tensor:
        """Nothing, of θ_A: so that it has a gradient to be written into."""
        return torch.stack([0.0 * p.sum() for name, p in params.items() if name.startswith(f"{LABEL}.")]).sum()

    def grads(self, grads: dict[str, Tensor], view: Any) -> None:
        """∂θ_B = Σ_l ∂_l and ∂θ_A = Σ_l (l / L) ∂_l, of the gradients ∂_l of the blocks, which then have none."""
        for kind, line in self.lines(view.engine.params).items():
            absent = next((name for name in line if name not in grads), None)
            if absent is not None:
                raise UserError(f"{self.name()}: {absent} has no gradient; all blocks must be trained whole")
            rise = grads[f"{LABEL}.{kind.replace('.', '/')}"]
            for i, name in enumerate(line[1:], start=1):
                rise.add_(grads[name], alpha=i / len(line))
                grads[line[0]].add_(grads[name])
                grads[name].zero_()

    def after(self, params: dict[str, Tensor], view: Any) -> None:
        """The other blocks follow from θ_B and θ_A."""
        for kind, line in self.lines(params).items():
            rise = params[f"{LABEL}.{kind.replace('.', '/')}"]
            for i, name in enumerate(line[1:], start=1):
                params[name].copy_(point(params[line[0]], rise, i, len(line)))


def effect(run: Seen) -> dict[str, float]:
    """How far the blocks lie from a line, and how far θ_B and θ_A went, beside their size, of what moved least."""
    start, end = run.start(), run.weights()
    found = [match for name in end if (match := BLOCK.fullmatch(name)) is not None]
    count = 1 + max(int(match[2]) for match in found)
    lines = kinds(end, {found[0][1]: count}).values()
    base, rise = [], []
    for line in lines:
        before, after = (slope(of[line[0]], of[line[-1]], count) for of in (start, end))
        rise.append(float((after - before).norm() / end[line[0]].norm()))
        base.append(float((end[line[0]] - start[line[0]]).norm() / end[line[0]].norm()))
    off = max(apart([end[name] for name in line]) for line in lines)
    return {"off the line": off, "base": min(base), "slope": min(rise)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """All on a line, both of whose ends were learned."""
    return on["off the line"] < 1e-5 < off["off the line"] and min(on["base"], on["slope"]) > 1e-3


BENCH = None  # the auxiliary model is a means: init/linear_expansion measures what is made of it

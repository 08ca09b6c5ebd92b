"""Depthwise stacking: a deeper model made of copies of the whole trained stack of blocks, one upon the other.

Paper:   Du et al. 2024 (G_stack), arXiv:2405.15319; first Gong et al. 2019 (StackBERT)
Use:     times 4 as the paper found best; grow after about 10 B of 300 B tokens, and warm the rate up anew
Works:   any transformers model whose blocks are a numbered list; both stacks of an encoder-decoder model
Costs:   one pass over the weights; the loss jumps, since the grown model computes another function
With:    schedule/rewarm in the stage that follows
Differs: stacks the model as it is when its stage ends; when to grow, which the paper fits a law to, is the recipe's
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.blocks import BLOCK, deeper, stacks_of


class Stack(Method):
    times: int = Field(4, ge=1, description="how many times the stack is laid upon itself; 1 changes nothing")

    no_off = "growing is a stage of its own"
    baseline = {"use": "grow/stack", "times": 1}
    on = {"times": 2}

    def grow(
        self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        stacks = stacks_of(config, tensors, by=self.name())
        order = {prefix: [*range(len(blocks))] * self.times for prefix, blocks in stacks.items()}
        return deeper(config, tensors, order, by=self.name())


def effect(run: Seen) -> dict[str, float]:
    """How many times as many tensors there are, and the share of the added ones that equal one of another block."""
    start, end = run.start(), run.weights()
    added = [match for name in end if name not in start and (match := BLOCK.fullmatch(name))]
    like: dict[tuple[str, str], list[Tensor]] = {}
    for match in filter(None, map(BLOCK.fullmatch, start)):
        like.setdefault((match[1], match[3]), []).append(start[match[0]])
    copies = sum(any(end[m[0]].equal(t) for t in like.get((m[1], m[3]), [])) for m in added)
    return {"grown": len(end) / len(start), "copied": copies / len(added) if added else 0.0}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["grown"] > off["grown"] and on["copied"] == 1.0


BENCH = Bench(
    base="recipes/bench/grow.yaml",
    arm={"start": "grown"},
    stage="large",
    baseline={
        "start": "recipes/models/llama-1m.yaml",
        "tokenizer": {"train": "bpe", "vocab": 2048},
        "until": "800step",
    },
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="410 M to 7 B parameters, up to 750 B tokens",
)

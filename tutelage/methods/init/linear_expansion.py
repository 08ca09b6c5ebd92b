"""Linear expansion of a learngene (TLEG, second stage): a model of any depth, from one whose blocks lie on a line.

Block l of d begins as θ_B + (l / d) · θ_A, where the start's block l of L is θ_B + (l / L) · θ_A: matrices, biases, norms.

Paper:   Xia et al. 2023 (TLEG), arXiv:2312.05614, and its public code
Use:     from a stage with param/linear_expansion; one such stage serves every `depth`, deeper than itself or not (the
    paper: 3 to 12 blocks from 12); then train without the tie, at a rate for a model that is trained already
Works:   any transformers model whose blocks are a numbered list of one kind; both lists of an encoder-decoder one
Costs:   one pass over the weights; the stage that learned the line, once for all depths
With:    schedule/rewarm in the stage that follows; grow/stack instead for a start that is on no line
Differs: θ_A and θ_B are read off the start's first and last block, which determine them, where theirs are files of their
    own; embeddings, last norm and head are the start's, as theirs are where the data stay the same (for other labels
    they leave the head out)
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.blocks import BLOCK, deeper, stacks_of
from tutelage.methods._kit.expansion import apart, exact_to, kinds, point, slope

Grown = tuple[dict[str, Any], dict[str, Tensor]]


class LinearExpansion(Method):
    depth: int | None = Field(None, ge=1, description="blocks of each list; as many as there are when left out")

    no_off = "making a model is a stage of its own"
    baseline = {"use": "init/linear_expansion"}
    on = {"depth": 6}

    def grow(self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any) -> Grown:
        """Raises UserError for a start whose blocks lie on no line, or with one block alone."""
        stacks = stacks_of(config, tensors, by=self.name())
        counts = {prefix: len(blocks) for prefix, blocks in stacks.items()}
        if min(counts.values()) < 2:
            raise UserError(
                f"{self.name()}: two blocks make a line, and {min(counts, key=lambda p: counts[p])} has one"
            )
        depth = {prefix: self.depth or count for prefix, count in counts.items()}
        nearest = {p: [i * counts[p] // depth[p] for i in range(depth[p])] for p in stacks}  # where nothing is learned
        config, grown = deeper(config, tensors, nearest, by=self.name())
        for prefix, count in counts.items():
            for kind, line in kinds(tensors, {prefix: count}).items():
                found = [tensors[name] for name in line]
                if not found[0].is_floating_point():
                    continue
                self._check(kind, found)
                base, last = found[0].float(), found[-1].float()
                rise = slope(base, last, count)
                for i in range(depth[prefix]):
                    made = point(base, rise, i, depth[prefix])
                    grown[f"{prefix}.{i}{kind.removeprefix(prefix)}"] = made.to(found[0].dtype)
        return config, grown

    def _check(self, kind: str, line: list[Tensor]) -> None:
        off = apart(line)
        if off > max(1e-5, exact_to(line[0].dtype)):
            raise UserError(
                f"{self.name()}: the blocks' {kind} lie on no line (off by {off:.1g} of the largest number); "
                "train the start with param/linear_expansion, or stack it (grow/stack)"
            )


def effect(run: Seen) -> dict[str, float]:
    """Blocks that there are, and how far they lie from the line through the start's first and last."""
    start, end = run.start(), run.weights()
    blocks = {of: {int(m[2]) for m in map(BLOCK.fullmatch, names) if m} for of, names in (("a", start), ("b", end))}
    prefix = next(m[1] for m in map(BLOCK.fullmatch, start) if m)
    before, after = len(blocks["a"]), len(blocks["b"])
    off = []
    for kind, line in kinds(start, {prefix: before}).items():
        rise = slope(start[line[0]], start[line[-1]], before)
        rest = kind.removeprefix(prefix)
        wanted = {i: point(start[line[0]], rise, i, after) for i in range(after)}
        off += [float((end[f"{prefix}.{i}{rest}"] - t).norm() / t.norm()) for i, t in wanted.items()]
    return {"blocks": float(after), "apart": max(off)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["blocks"] == 3 * off["blocks"] and on["apart"] < 1e-6


SHALLOW = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

BENCH = Bench(  # at equal steps after it was made; embeddings, last norm and head come along with the line
    base="recipes/bench/learngene.yaml",
    arm={"start": "made"},
    stage="descendant",
    baseline={"start": SHALLOW, "tokenizer": {"train": "bpe", "vocab": 2048}},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="DeiT-Ti to -B of 3 to 12 blocks on ImageNet-1K; descendants, the auxiliary model's training aside",
)

"""Tokenizer transfer (CLP): a trained model takes another tokenizer; tokens that both know keep their embeddings.

Every other token's embedding is a mean of those of the shared tokens, weighted by how near they are to it in the embeddings
of a helper: a small model of the target language with the new tokenizer.

Paper:   Ostendorff and Rehm 2023 (CLP-Transfer), arXiv:2301.09626
Use:     `start: [source, helper]`, then continued training on the target language; the paper has 6.7 B from OPT with a
         124 M helper, and 7.1 B from BLOOM with one of 1.5 B. The more tokens are shared, the better
Works:   models of text with a `vocab_size`; tokenizers with a tokenizer.json, whose tokens are compared as they are
         written; heads that are not tied
Costs:   one product of (other tokens) × (shared tokens) × width; the helper's own training
With:    schedule/rewarm in the stage that follows; continual/lwf and others that compare answers cannot, tokens differ
Differs: a head of its own (and biases of tokens) is made like the embeddings, where the authors' code leaves it to chance;
         rows beyond the helper's tokens are the mean. Cosines are taken as they are, as in that code: where they nearly
         cancel, a row comes out long. `others: mean` and `random` are what the paper compares with
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")
ROWS = 4096  # other tokens at once


class TokenizerTransfer(Method):
    others: Literal["helper", "mean", "random"] = Field(
        "helper",
        description="what tokens that the source has not begin as: by similarity in the `helper`, the `mean` of the "
        "shared ones, or `random` numbers of their mean and spread",
    )

    takes = 2
    tokenizer_of = 1
    unrelated = True
    no_off = "another tokenizer is a stage of its own"
    baseline = {"use": "init/tokenizer_transfer", "others": "mean"}
    toys = ("llama", "gpt2")

    def grow(
        self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        source, target = view.tokens(0), view.tokens(1)
        names = [name for name in view.per_token(config) if name in tensors]
        near = self._helper(view)
        shared = [token for token in sorted(source.keys() & target.keys()) if source[token] < len(tensors[names[0]])]
        shared = [token for token in shared if target[token] < len(near)]
        if not shared:
            raise UserError(f"{self.name()}: the two tokenizers share no token, so nothing could be carried over")
        ours_S = torch.tensor([source[token] for token in shared])
        theirs_S = torch.tensor([target[token] for token in shared])
        others = sorted({i for i in target.values() if i < len(near)} - set(theirs_S.tolist()))
        others_O = torch.tensor(others, dtype=torch.long)
        made = dict(tensors)
        for name in names:
            table = tensors[name].float()
            kept = table[ours_S]
            new = kept.mean(dim=0, keepdim=True).expand(len(near), *kept.shape[1:]).clone()
            new[theirs_S] = kept
            if self.others == "helper":
                for rows in others_O.split(ROWS):
                    new[rows] = mixed(near, rows, theirs_S, kept)
            elif self.others == "random":
                noise = torch.randn(len(others_O), *kept.shape[1:], generator=view.rng(f"rows of {name}"))
                new[others_O] = kept.mean(dim=0) + kept.std(dim=0) * noise
            made[name] = new.to(tensors[name].dtype)
        self.state.update(shared=len(shared), others=len(others_O))
        special = {key: view.configs[1].get(key) for key in SPECIAL if key in config}
        return {**config, **special, "vocab_size": len(near)}, made

    @staticmethod
    def _helper(view: Any) -> Tensor:
        """[tokens, width] the helper's input embeddings, each of length one."""
        names = [name for name in view.per_token(view.configs[1]) if name in view.inputs[1].about]
        table = next(view.read(1, name) for name in names if len(view.inputs[1].about[name].shape) == 2)
        return F.normalize(table, dim=1)


def mixed(near: Tensor, rows: Tensor, shared_S: Tensor, kept: Tensor) -> Tensor:
    """What some tokens begin as: the means of the shared tokens' rows, weighted by cosine similarity in the helper."""
    weights_RS = near[rows] @ near[shared_S].T
    total_R1 = weights_RS.sum(dim=1, keepdim=True)
    even = torch.full_like(weights_RS, 1 / len(shared_S))
    weights_RS = torch.where(total_R1.abs() > 1e-6 * len(shared_S), weights_RS / total_R1, even)
    return (weights_RS @ kept.reshape(len(kept), -1)).view(len(rows), *kept.shape[1:])


def effect(run: Seen) -> dict[str, float]:
    """Shares of the embeddings that stood in the start's, and of those that stand there once only."""
    name = next(name for name in run.start() if name.endswith(("embed_tokens.weight", "wte.weight")))
    before = {row.numpy().tobytes() for row in run.start()[name]}
    rows = [row.numpy().tobytes() for row in run.weights()[name]]
    return {"shared": sum(row in before for row in rows) / len(rows), "distinct": len(set(rows)) / len(rows)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """As many are carried over, and each of the others has its own."""
    return on["shared"] == off["shared"] > 0.3 and on["distinct"] > 0.99 > off["distinct"] + 0.02


BENCH = Bench(
    base="recipes/bench/new-tokenizer.yaml",
    arm={"start": "begun"},
    stage="target",
    baseline={"start": "recipes/models/llama-1m.yaml", "tokenizer": {"train": "bpe", "vocab": 2048}},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="6.7 B and 7.1 B parameters, 50 % to 80 % of the steps saved; the source's and the helper's own not counted",
)

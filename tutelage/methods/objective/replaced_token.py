"""Replaced token detection: a small generator fills masks, and the model tells of every token whether it was replaced.

Paper:   Clark et al. 2020 (ELECTRA), arXiv:2003.10555; Niklaus & Giofré 2022 (BudgetLongformer), arXiv:2211.17135
Use:     pretraining of encoders. `width` 1/4 (small, large) to 1/3 (base) of the model's: the paper found 1/4 to 1/2 best,
    a stronger generator perhaps too hard to see through. `rate` 0.15, 0.25 for large models
Works:   models that see both sides and have `.embeddings` (BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT, DeBERTa,
    Longformer and their like); the tokenizer needs a mask token
Costs:   a pass of the generator beside the model's (of 128 tokens at a quarter of the width, 0.11 of the FLOPs of BERT
    base, 0.19 where that is 256 wide, for the vocabulary) and its states in the optimizer; logits of all hidden tokens at
    once. Every position teaches the model
With:    adds to penalties, and to auxiliaries on hidden states; no logits of tokens are trained. Bits per byte mean nothing
    here and are not measured: probe/loss says how much is detected
Differs: tokens are sampled by one number a position, drawn with the batch, instead of Gumbel noise (the same
    distribution, and the same tokens on any number of processes); every position is hidden by itself, as in
    objective/masked_lm, not a fixed number a row, and 0.85 of those are masked, as in the authors' code. The generator's
    heads are as wide as the model's. Where rows have weights, the generator's part is divided by what counts without
    them. The model's own masked-language head is frozen and goes out as it came, but for what it shares with the
    embeddings; `discriminator` in extra.safetensors is the head that was trained; the generator is thrown away, so a
    later stage begins with a new one
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.base.method import Method, Seen
from tutelage.core.out import Out
from tutelage.core.types import IGNORE, Batch, Sum
from tutelage.methods._kit.labels import row_weights
from tutelage.methods._kit.masking import lasting, masked

SAMPLED = 256  # rows of probabilities that are summed up at once


class Borrowed(nn.Module):
    """The model's embeddings, narrowed. They are the model's parameters still, so they are none of this module's."""

    def __init__(self, embeddings: nn.Module, size: int, width: int) -> None:
        super().__init__()
        self._embeddings = [embeddings]  # a list, which torch does not look into
        self.narrow = nn.Linear(size, width)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.narrow(self._embeddings[0](*args, **kwargs))


class Generator(nn.Module):
    """A narrow model of the same kind that reads the model's embeddings and answers in them."""

    def __init__(self, base: Any, *, width: float, depth: float) -> None:
        super().__init__()
        table_VE = base.get_input_embeddings().weight
        size = table_VE.shape[1]
        config = narrowed(base.config, width=width, depth=depth)
        self.body: Any = type(base)(config)
        self.body.embeddings = Borrowed(base.embeddings, size, config.hidden_size)
        if hasattr(self.body, "pooler"):
            self.body.pooler = None
        self.dense = nn.Linear(config.hidden_size, size)
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(len(table_VE)))

    def forward(self, inputs: dict[str, Any], index_N: Tensor, table_VE: Tensor) -> Tensor:
        """Logits [N, V] of the positions that `index_N` numbers."""
        hidden_NH = self.body(**inputs).last_hidden_state.flatten(0, 1).index_select(0, index_N)
        return F.linear(self.norm(F.gelu(self.dense(hidden_NH))), table_VE, self.bias)


def narrowed(config: Any, *, width: float, depth: float) -> Any:
    """A config of the same kind, its widths and depth scaled. Heads stay about as wide as they are."""
    small = copy.deepcopy(config)
    head = config.hidden_size // config.num_attention_heads
    size = max(1, round(config.hidden_size * width))
    heads = max(1, size // head)
    small.hidden_size, small.num_attention_heads = size - size % heads, heads
    small.num_hidden_layers = max(1, round(config.num_hidden_layers * depth))
    for name in ("intermediate_size", "hidden_dim"):
        if isinstance(getattr(config, name, None), int):
            setattr(small, name, max(1, round(getattr(config, name) * width)))
    if hasattr(config, "embedding_size"):
        small.embedding_size = small.hidden_size
    if isinstance(getattr(config, "attention_window", None), list):
        small.attention_window = config.attention_window[: small.num_hidden_layers]
    return small


class Detector(nn.Module):
    """From the model's hidden states to one logit a position: is this token another than it was?"""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(size, size), nn.Linear(size, 1)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.out(F.gelu(self.dense(hidden_BTD)))[..., 0]


@dataclass
class Found:
    """What both models say of a batch."""

    nll_N: Tensor  # nats of the generator for each hidden token
    index_N: Tensor  # where these are, in the batch laid out in one line
    logits_BT: Tensor  # of the model: positive for replaced
    replaced_BT: Tensor
    real_BT: Tensor


class ReplacedToken(Method):
    rate: float = Field(0.15, gt=0, le=1, description="share of the positions that the generator fills")
    mask: float = Field(0.85, ge=0, le=1, description="share of these that show it the mask token; the rest their own")
    detection: float = Field(50.0, gt=0, description="what detecting counts against filling in (λ)")
    width: float = Field(0.25, gt=0, le=1, description="the generator's width as a share of the model's")
    depth: float = Field(1.0, gt=0, le=1, description="the generator's depth as a share of the model's")
    temperature: float = Field(1.0, gt=0, description="of the distribution that the generator's tokens are drawn from")

    no_off = "a stage always has an objective"
    baseline = {"use": "objective/masked_lm"}
    toys = ("bert",)
    helpers = frozenset({"generator"})

    _generator: Generator | None = PrivateAttr(None)
    _detector: Detector | None = PrivateAttr(None)

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The generator and the model's head for detecting. UserError for a model whose embeddings cannot be shared."""
        base: Any = getattr(model, "base_model", model)
        if base is model or not isinstance(getattr(base, "embeddings", None), nn.Module):
            raise UserError(
                f"objective/replaced_token: {type(model).__name__} is no masked model whose embeddings a generator can share; "
                "it works on BERT's like"
            )
        self._generator = Generator(base, width=self.width, depth=self.depth)
        self._detector = Detector(base.config.hidden_size)
        for module in (self._generator.dense, self._generator.body.embeddings, self._detector):
            _begin(module, getattr(base.config, "initializer_range", 0.02))
        return {"generator": self._generator, "discriminator": self._detector}

    def freeze(self, names: set[str], view: Any) -> set[str]:
        """The model's own head, which nothing here asks."""
        root = view.engine.anatomy.root
        return {name for name in names if not name.startswith(f"{root.base_model_prefix}.")}

    def batch(self, batch: Batch, view: Any) -> Batch:
        """Masks, and a number each by which the generator's tokens are drawn, of this tick."""
        shape = batch["tokens"].shape
        chance_3BT = torch.rand(3, *shape, generator=view.rng("mask"))
        return self._hidden(batch, chance_3BT, torch.rand(shape, generator=view.rng("sample")))

    def measured(self, batch: Batch, view: Any) -> Batch:
        """The same that each row has for good. It carries no bytes: nothing is predicted that could be divided by them."""
        chance_4BT = lasting(batch, 4)
        made = self._hidden(batch, chance_4BT[:3], chance_4BT[3])
        return replace(made, fields={name: value for name, value in made.fields.items() if name != "bytes"})

    def loss(self, model: Callable[[Batch], Out], batch: Batch, view: Any) -> Sum:
        """λ times the mean binary cross-entropy of all real positions, plus the mean cross-entropy of the hidden tokens.

        The weight is that of the real positions. What the generator's sum is worth against it is known of the whole
        batch (`balance`), so both means come out of one division, over any number of micro-batches and processes.
        """
        found, weight_BT = self.found(model, batch, view), row_weights(batch)
        detection_BT = F.binary_cross_entropy_with_logits(found.logits_BT, found.replaced_BT.float(), reduction="none")
        weight_BT = weight_BT * found.real_BT
        filled = (found.nll_N * row_weights(batch).flatten()[found.index_N]).sum()
        total = self.detection * (detection_BT * weight_BT).sum() + batch.meta["balance"] * filled
        return Sum(total, weight_BT.sum())

    @torch.no_grad()
    def scores(self, model: Callable[[Batch], Out], batch: Batch, view: Any) -> dict[str, Sum]:
        """For probe/loss: what is detected of what there is, in shares, and the nats of either model."""
        found = self.found(model, batch, view)
        real, replaced = found.real_BT, found.replaced_BT
        detection_BT = F.binary_cross_entropy_with_logits(found.logits_BT, replaced.float(), reduction="none")
        right_BT = (found.logits_BT > 0) == replaced
        return {
            "detection": Sum((detection_BT * real).sum(), real.sum()),
            "accuracy": Sum((right_BT & real).sum(), real.sum()),
            "replaced": Sum((replaced & real).sum(), real.sum()),
            "recall": Sum((right_BT & replaced).sum(), replaced.sum()),
            "generator": Sum(found.nll_N.sum(), float(len(found.nll_N))),
        }

    def found(self, model: Callable[[Batch], Out], batch: Batch, view: Any) -> Found:
        """Let the generator fill in what is hidden, and the model look at it. No gradient passes through the tokens."""
        engine, original_BT = view.engine, batch["original"]
        if self._generator is None or self._detector is None:
            raise UserError("objective/replaced_token: only a stage that trains has a generator; measure it there")
        for module in (self._generator, self._detector):
            module.train(engine.model.training)
        index_N = (batch["labels"] != IGNORE).flatten().nonzero().flatten()
        inputs = engine.modality.inputs(batch, anatomy=engine.anatomy, packing=engine.packing)
        table_VE = engine.anatomy.root.get_input_embeddings().weight
        logits_NV = self._generator(inputs, index_N, table_VE).float()
        hidden_N = original_BT.flatten()[index_N]
        nll_N = F.cross_entropy(logits_NV, hidden_N, reduction="none")
        drawn_N = sampled(logits_NV.detach() / self.temperature, batch["chance"].flatten()[index_N])
        shown_BT = original_BT.flatten().index_copy(0, index_N, drawn_N).view_as(original_BT)
        out = model(batch.having(tokens=shown_BT))
        logits_BT = self._detector(out.hidden_BTD).float()
        return Found(nll_N, index_N, logits_BT, shown_BT != original_BT, batch["segments"] > 0)

    def _hidden(self, batch: Batch, chance_3BT: Tensor, chance_BT: Tensor) -> Batch:
        fields = masked(batch, chance_3BT, rate=self.rate, mask=self.mask, random=0.0, method=self.name())
        hidden, real = int((fields["labels"] != IGNORE).sum()), int((batch["segments"] > 0).sum())
        fields |= {"original": batch["tokens"], "chance": chance_BT.to(batch["tokens"].device)}
        meta = {**batch.meta, "prepared": True, "balance": real / max(1, hidden)}
        return replace(batch.having(**fields), meta=meta)


def _begin(module: nn.Module, scale: float) -> None:
    """Normal weights and no biases, as the models themselves begin."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=scale)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def sampled(logits_NV: Tensor, chance_N: Tensor) -> Tensor:
    """A token of each row of logits: the first up to which the probabilities sum up to more than the row's number."""
    found = []
    for logits, chance in zip(logits_NV.split(SAMPLED), chance_N.split(SAMPLED), strict=True):
        sums = logits.double().softmax(dim=1).cumsum(dim=1)
        found.append(torch.searchsorted(sums, chance.double()[:, None] * sums[:, -1:], right=True)[:, 0])
    return torch.cat(found).clamp(max=logits_NV.shape[1] - 1) if found else chance_N.long()


def effect(run: Seen) -> dict[str, float]:
    """How much of a row is learned from, the first and the last losses, and which parts are saved beside the model."""
    from safetensors import safe_open

    rows = [row for row in run.rows if row["kind"] == "train"]
    counted = [row["counted"] / row["trained"] for row in rows]
    extra, names = run.folder / "artifact" / "extra.safetensors", []
    if extra.exists():
        with safe_open(str(extra), framework="pt") as file:
            names = list(file.keys())
    start, end = run.start(), run.weights()
    heads = [name for name in start if name.startswith("cls.") and "decoder" not in name]
    return {
        "counted": sum(counted) / len(counted),
        "first": rows[0]["loss"],
        "last": sum(row["loss"] for row in rows[-3:]) / len(rows[-3:]),
        "beside": float(sum(name.startswith("discriminator.") for name in names)),
        "generators": float(sum(not name.startswith("discriminator.") for name in names)),
        "head": max(float((end[name] - start[name]).abs().max()) for name in heads),
    }


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Every position teaches; at first nothing is known of either task, then that most tokens stay but not which (50 times
    0.4 nats; if none were replaced, it would be near 0); the head goes out and the generator does not.
    """
    begun = 50 * math.log(2) + math.log(260)  # of bytes and four tokens
    return (
        on["counted"] > 4 * off["counted"]
        and abs(on["first"] - begun) < 2
        and 12 < on["last"] < 0.75 * on["first"]
        and on["beside"] == 4
        and on["generators"] == 0
        and on["head"] == 0
    )


# Its claim is about tasks after fine-tuning. No stage here trains a classifier on an encoder, and a stage of masked language
# modeling, which both sides could do, would ask for a head that only the rival has trained.
BENCH = None

"""Preferences in pretraining: each document has a reward, and what is bad is told apart, left out, unlearned or weighed less.

Paper:   Korbak et al. 2023, arXiv:2302.08582; unlikelihood: Welleck et al. 2020, arXiv:1908.04319
Use:     `objective: {use: condition/preference, …}`. `conditional` first, which had the best trade-off in the paper:
    documents begin with `good` or `poor`, and who asks the model afterwards begins with `good` (`prompt` of
    probe/matches, `prompts` of probe/sample; held-out text that is to be measured so has it in the record, masked).
    `alpha`: the authors have 1 for toxicity, 0.01 for the style of code; `beta`: 10. The reward is a field of the
    records (a filter's `quality`), or minus the matches of `violation`; what else a program is to say of documents
    comes as a field, from a generator (`use: package.module:Class`) or a `make` stage
Works:   causal models of text, packed or not. A document without the field is learned as in plain training
Costs:   `conditional`: a prefix's positions; the others nothing but a number a document; with `violation`, once, reading
    all text
With:    stands in for objective/causal_lm; not beside condition/metadata, which writes what documents begin with too
Differs: a segment is a record; the paper scores sentences (toxicity, personal data) and lines. Control tokens are read and
    not learned, where the paper learns them with the text; they are what the tokenizer makes of their text, not two
    tokens of their own, unless it has them. `filtering` reads bad documents and learns nothing of them, where the
    paper draws others in their place. Advantage-weighted regression, which has a head for values, is not here
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor, nn

from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.out import Out, cross_entropy
from tutelage.core.types import IGNORE, Batch, Sum
from tutelage.methods._kit.labels import row_weights

HEAVIEST = 1000.0  # of a document's weight, as in the paper's code
LEAST = 1e-20  # what 1 - p is taken for below, as in the paper's code


class Preference(Method):
    by: Literal["conditional", "filtering", "unlikelihood", "reward_weighted"] = Field(
        "conditional", description="what is done about bad documents"
    )
    reward: str = Field("reward", description="field of the records with the reward, a number; the higher the better")
    violation: str | None = Field(
        None, description="a regular expression: the reward is minus the number of its matches, `reward` is not read"
    )
    threshold: float = Field(0.0, description="documents with a reward below are bad")
    good: str = Field("<|good|>", description="`conditional`: what good documents begin with")
    poor: str = Field("<|bad|>", description="`conditional`: what bad documents begin with")
    bare: float = Field(0.01, ge=0, le=1, description="`conditional`: share of the documents that begin with neither")
    alpha: float = Field(1.0, ge=0, description="`unlikelihood`: weight of log(1 - p) of bad documents' tokens")
    beta: float = Field(10.0, gt=0, description="`reward_weighted`: documents weigh exp(reward / beta)")

    no_off = "a stage always has an objective"
    baseline = {"use": "objective/causal_lm"}
    on = {"reward": "bytes", "threshold": 40}
    toys = ("llama", "gpt2")

    _rewards: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # [documents] float64 of each source, NaN for none

    @field_validator("violation")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        return value

    def prefix(self, records: Iterator[dict[str, Any]], rng: random.Random) -> Iterator[str]:
        """What each document begins with: nothing, unless `conditional`. The rewards are read on the way.

        Sources are opened anew by every process and after every cut, so the rewards need not be saved. UserError where no
        record of a source has one.
        """
        rewards: list[float] = []
        name, drawn_as, known = "", "", set[str]()
        for record in records:
            name, drawn_as = record["source"], record["drawn_as"]
            known |= {"id", "line", "bytes", *record["meta"]} if len(known) < 100 else set()
            value = self._reward(record)
            rewards.append(value)
            bare = rng.random() < self.bare or math.isnan(value)
            yield "" if bare or self.by != "conditional" else self.poor if value < self.threshold else self.good
        if rewards and all(map(math.isnan, rewards)):
            raise UserError(
                f"condition/preference: no record of data.{name} has the field '{self.reward}'"
                f"{did_you_mean(self.reward, known)} (fields: {', '.join(sorted(known))}); name another `reward`, or "
                "write a `violation`"
            )
        self._rewards[drawn_as] = torch.tensor(rewards, dtype=torch.float64)

    def _reward(self, record: dict[str, Any]) -> float:
        """A record's reward, NaN where it has none. UserError where it is no number."""
        if self.violation is not None:
            return 0.0 - sum(1 for _ in re.finditer(self.violation, record["text"]))
        value = {**{key: record[key] for key in ("id", "line", "bytes")}, **record["meta"]}.get(self.reward)
        if value is None:
            return math.nan
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise UserError(
                f"condition/preference: `{self.reward}` is {str(value)[:40]!r} and no number, in {record['file']}, "
                f"record {record['line']}"
            )
        return found

    def begin(self, model: nn.Module, view: Any) -> None:
        """Refuse what cannot be learned from so: other than causal models, and data that are all alike."""
        if view.engine.anatomy.kind != "causal":
            raise UserError(f"condition/preference: a {view.engine.anatomy.kind} model; it works on causal ones")
        every = torch.cat([*self._rewards.values(), torch.zeros(0, dtype=torch.float64)])
        every = every[~every.isnan()]
        bad = int((every < self.threshold).sum())
        if self.by != "reward_weighted" and bad in (0, len(every)) and len(every):
            raise UserError(
                f"condition/preference: {'every' if bad else 'no'} document has a reward below {self.threshold:g} (they go "
                f"from {float(every.min()):g} to {float(every.max()):g}), so none is preferred; set `threshold` between"
            )

    def loss(self, model: Callable[[Batch], Out], batch: Batch, view: Any) -> Sum:
        """Cross-entropy as the documents' rewards have it, each row times its weight.

        Weights are of labels: of good documents' alone (`filtering`), else of all, so that a document of little reward
        counts in the division as any other does. Rows of other stages' data have no rewards and are learned as they are.
        """
        labels_BT, weight_BT = batch["labels"], row_weights(batch)
        if self.by == "conditional" or "plain" not in batch:
            return cross_entropy(model(batch), labels_BT, weight_BT)
        reward_BT = self._at(batch).to(labels_BT.device)
        good_BT = ~(reward_BT < self.threshold)  # of no reward, too
        if self.by == "filtering":
            return cross_entropy(model(batch), labels_BT, weight_BT * good_BT)
        there_BT = labels_BT != IGNORE
        counted = (weight_BT * there_BT).sum()
        if self.by == "unlikelihood":
            fn = partial(_either, alpha=self.alpha)
            return Sum(model(batch).reduce(fn, labels_BT, weight_BT, good_BT, keep=there_BT), counted)
        scale_BT = (reward_BT / self.beta).exp().clamp(max=HEAVIEST).nan_to_num(nan=1.0).to(weight_BT.dtype)
        return Sum(cross_entropy(model(batch), labels_BT, weight_BT * scale_BT).total, counted)

    def _at(self, batch: Batch) -> Tensor:
        """[B, T] float64: the reward of the document that each position belongs to, NaN where there is none."""
        segments_BT = batch["segments"].cpu()
        reward_BS = torch.full((len(batch), int(segments_BT.max()) + 1), math.nan, dtype=torch.float64)
        for i, row in enumerate(batch.rows):
            for number, piece in enumerate(row.pieces, 1):
                reward_BS[i, number] = self._rewards[row.source][piece.doc]
        return reward_BS.gather(1, segments_BT)


def _either(logits_NV: Tensor, labels_N: Tensor, weight_N: Tensor, good_N: Tensor, *, alpha: float) -> Tensor:
    """-log p of good documents' labels, -alpha log(1 - p) of bad ones', each times its weight, summed."""
    logprob_N = -F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
    unlike_N = (-torch.expm1(logprob_N)).clamp(min=LEAST).log()
    return -(weight_N * torch.where(good_N, logprob_N, alpha * unlike_N)).sum()


def effect(run: Seen) -> dict[str, float]:
    """The share of the positions that are learned from, and bits per byte of plain text at the end."""
    rows = [row for row in run.rows if row["kind"] == "train"]
    shares = [row["counted"] / ((1 - row["padding"]) * row["rows"] * row["length"]) for row in rows]
    last = next((row["values"] for row in reversed(run.rows) if row["kind"] == "eval"), {})
    return {"learned": sum(shares) / len(shares), "plain": last.get("bits_per_byte/b", float("nan"))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Control tokens are read and not learned, and the text after them is learned."""
    return on["learned"] < 0.95 * off["learned"] and on["plain"] < 1.2 * off["plain"]


RUDE = r"\b(darn|blasted|stupid|dumb|rotten|lousy)\b"


def _asked(prompt: str) -> list[Any]:
    """What either side is measured by: samples that begin with `prompt`."""
    return ["probe/bits_per_byte", {"use": "probe/matches", "pattern": RUDE, "prompt": prompt, "count": 256}]


BENCH = Bench(
    base="recipes/bench/manners.yaml",
    arm={
        # with bytes as tokens the paper's `<|good|>` would be eight; here it is one that the text does not have, as there
        "objective": {"use": "condition/preference", "violation": RUDE, "good": "+", "poor": "-"},
        "keep": {"polite": {"args": {"only": "good", "said": "+"}}},
        "evals": {"run": _asked("+")},
    },
    baseline={"evals": {"run": _asked("")}},
    metric="matches",
    better="lower",
    margin=0.02,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_by="bits_per_byte/polite",
    scale="124 M parameters, 3.3 B tokens: as little as a tenth of the undesirable samples, by classifiers and rules",
)

"""Matches: in which share of the model's samples a rule finds what it looks for.

Paper:   Korbak et al. 2023, arXiv:2302.08582, who score what a model writes
Use:     `pattern`, a regular expression of what should not be written; `prompt` with what the model was told to begin with
    (`<|good|>` after condition/preference). 256 samples tell shares that are 0.1 apart
Works:   models that write text
Costs:   `count` × `tokens` of generation at each measurement
With:    bits per byte beside it, for a model that writes nothing of use has no matches either
Differs: a share of samples where the paper has their mean score; temperature 1 of the whole distribution, where the
    paper has 0.7 and 0.9 of the probability
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator
from torch import nn

from tutelage.base.errors import UserError
from tutelage.base.method import Method, Seen


class Matches(Method):
    pattern: str = Field(r"\S", description="a regular expression")
    prompt: str = Field("", description="what samples begin with; nothing begins a document")
    count: int = Field(64, ge=1, description="samples")
    tokens: int = Field(160, ge=1, description="tokens to write")
    temperature: float = Field(1.0, gt=0, description="of the distribution that is sampled")
    top_p: float = Field(1.0, gt=0, le=1, description="share of the probability that is sampled from")

    no_off = "it only measures"
    baseline = {}
    on = {"pattern": ".", "count": 4, "tokens": 8}

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from error
        return value

    def measure(self, model: nn.Module, view: Any) -> dict[str, float | str]:
        """`matches`: the share of the samples with a match in [0, 1], the prompt aside. `sample/matches`: the first one."""
        if view.generate is None or view.engine.anatomy.kind not in ("causal", "seq2seq"):
            raise UserError("probe/matches reads what a model writes; this one writes no text")
        texts = view.generate(
            prompts=[self.prompt] * self.count,
            tokens=self.tokens,
            seed=view.seed,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        found = sum(re.search(self.pattern, text) is not None for text in texts)
        return {"matches": found / self.count, "sample/matches": f"{self.prompt} ⟶ {texts[0]}"}


def effect(run: Seen) -> dict[str, float]:
    values = [row["values"] for row in run.rows if row["kind"] == "eval"]
    return {"measured": float(sum("matches" in v for v in values))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["measured"] >= 1 and off["measured"] == 0


BENCH = None  # a measure claims nothing

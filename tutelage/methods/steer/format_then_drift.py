"""Format, then drift: instruction tuning ends when answers are well formed, before the model means something else.

Paper:   AlShikh et al. 2023 (Becoming self-instruct), arXiv:2307.03692
Use:     check 20 to 50 times a stage; `form` describes a whole answer; `least` 0.5–0.9, so that the plateau before
    anything is learned ends nothing; `keep:` the base's data and set `allowed`, so that drift alone ends it too
Works:   causal models and sources with a `template`; prompts given here, or those of held-out examples
Costs:   `count` × `tokens` of generation at each check
With:    align/sft; probe/forgetting and its `keep`, whose measures are the drift
Differs: a pattern decides what is a well-formed answer, where the paper trains BERT to tell answers from continuations;
    whole prompts, not fragments of them; drift is forgetting or KL on kept text, not the objectivity of answers
    (ObjecQA); the paper shows the plateau on a curve and names no rule: patience and gain are ours
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from tutelage.base.clock import SpanField
from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Seen
from tutelage.core.types import IGNORE
from tutelage.methods._kit.policy import Policy
from tutelage.methods._kit.signals import measures

SENTENCE = r"[A-Z0-9\"'(\[][^\n]*[.!?)\]\"']"  # begins as a sentence does and ends as one: a continuation rarely does


class FormatThenDrift(Policy):
    prompts: list[str] = Field(default_factory=list, description="prompts; those of held-out examples if left out")
    count: int = Field(16, ge=1, description="held-out examples asked, where no prompts are given")
    tokens: int = Field(48, ge=1, description="tokens that an answer may take")
    form: str = Field(SENTENCE, description="regular expression that the whole of a well-formed answer matches")
    every: int = Field(20, ge=1, description="steps between checks")
    gain: float = Field(0.02, ge=0, description="least rise of the share of well-formed answers that is one")
    patience: int = Field(3, ge=1, description="checks in a row without such a rise that are a plateau")
    least: float = Field(0.6, ge=0, le=1, description="a plateau below this share does not count")
    drift: str = Field("forgetting", description="the measure of what must not drift; its worst column counts")
    allowed: float | None = Field(None, description="drift that ends the stage at any share; left out, only a plateau")
    decay: SpanField | None = Field(None, description="let the rate fall over this span first, as the schedule ends")
    cap: int = Field(1, ge=0, le=1, description="0 watches nothing")

    off = {"cap": 0}
    on = {"prompts": ["the"], "form": r"(?s).*", "every": 1, "patience": 8, "tokens": 2}

    @field_validator("form")
    @classmethod
    def _compiles(cls, form: str) -> str:
        try:
            re.compile(form)
        except re.error as error:
            raise ValueError(f"'{form}' is not a regular expression ({error})") from error
        return form

    def act(self, view: Any) -> list[dict[str, Any]]:
        """The end of the stage, when the share of well-formed answers rises no more, or the drift is too large."""
        if not self.cap or self.state.get("asked"):
            return []
        drift = max(measures(view, self.drift).values(), default=None)
        if self.allowed is not None and drift is not None and drift > self.allowed:
            return self._end(f"{self.drift} is {drift:.4g}, and {self.allowed:.4g} is allowed")
        if view.clock.step % self.every:
            return []
        share = self.share(view)
        if share > self.state.get("best", -1.0) + self.gain:
            self.state["best"], self.state["flat"] = share, 0
        else:
            self.state["flat"] = self.state.get("flat", 0) + 1
        if self.state["flat"] < self.patience or share < self.least:
            return []
        shown = "" if drift is None else f"; {self.drift} is {drift:.4g}"
        return self._end(f"{share:.0%} of answers are well formed, as {self.patience} checks ago{shown}")

    def _end(self, why: str) -> list[dict[str, Any]]:
        self.state["asked"] = 1
        after = {"after": str(self.decay), "decay": True} if self.decay else {}
        return self.ask(why, {"do": "end_stage", **after})

    def share(self, view: Any) -> float:
        """Of the answers that the model writes now, greedily, how many are well formed, in [0, 1]."""
        prompts = self.prompts or _asked(view, self.count)
        answers = view.generate(prompts=prompts, tokens=self.tokens, seed=view.seed, temperature=0.0)
        return well_formed(answers, self.form)


def well_formed(answers: list[str], form: str) -> float:
    """The share of answers that match the form from end to end, white space around them aside."""
    return sum(re.fullmatch(form, answer.strip()) is not None for answer in answers) / len(answers)


def _asked(view: Any, count: int) -> list[str]:
    """Prompts of held-out examples: what stands before the first token that counts. UserError where all count."""
    found: list[str] = []
    for column in sorted(set(view.heldout) - set(view.kept)):
        for batch in view.measured(column).once(count, rows=1):
            first = (batch["labels"][0] != IGNORE).nonzero().flatten()
            segment = batch["segments"][0]
            if len(first) and int(first[0]) and segment[first[0]] == 1:
                ids = batch["tokens"][0][: int(first[0]) + 1].tolist()
                begins = ids[0] == batch.meta.get("special", {}).get("bos")  # generation adds it again
                found.append(view.decode(ids[begins:], skip_special_tokens=False))
            if len(found) == count:
                return found
    if not found:
        raise UserError("steer/format_then_drift needs `prompts`: no held-out example has a prompt before its answer")
    return found


def effect(run: Seen) -> dict[str, float]:
    return {"steps": float(sum(row["kind"] == "train" for row in run.rows))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["steps"] < off["steps"]


BENCH = Bench(
    base="recipes/bench/instructions.yaml",
    arm={"methods": [{"use": "steer/format_then_drift", "every": 5, "tokens": 24, "patience": 2}]},
    metric="forgetting/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [2e-4, 5e-4, 1e-3]},
    tune_baseline={"optim.lr": [2e-4, 5e-4, 1e-3]},
    tune_by="bits_per_byte/asked",
    scale="shown at 7 B and 13 B parameters (LLaMA), on the GPT4All instructions",
)

"""Rephrase: a model that was taught to answer tells documents anew in chosen styles, to be learned from beside the real ones.

Paper:   Maini et al. 2024 (WRAP), arXiv:2401.16380
Use:     `medium` (as in an encyclopedia) or `qa`; real and rephrased text one to one, for the writer knows no typing errors
    and no slang, and text that does must still be read. `length` 300, as the paper found that more in one passage loses
    what is said. The paper's writer had 7 B parameters
Works:   any text; styles are English unless `prompts` says otherwise. Documents that the stage holds out are left out
Costs:   one answer for each passage and style, about as long as the passage; answers are kept as they come, so a cut
    stage pays for none twice
With:    `data: {web: …, told: {stage: rephrased}}` with equal weights in the stage that learns; filter/near_duplicates and
    filter/quality_network before it, so that nothing is told twice or in vain
Differs: the prompts say what the paper's four say in words of our own, and stand in one message without a system's. What is
    taken off an answer and which answers are dropped are rules of ours (openings, closings; nothing said, cut off,
    lengths out of bounds, copies, `qa` without questions); how the paper's answers were drawn is not
    known here. A passage ends where a sentence does, and each is a document of its own
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from pydantic import Field, model_validator

from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.method import Seen
from tutelage.core.types import Answer, Document, Question, Writer
from tutelage.methods._kit.retold import Asking, bare, cut, named, says_little

STYLES = {
    "easy": "Say the same as the following paragraph in very simple, short sentences and with so few and common words that "
    "a small child understands all of it:",
    "medium": "Tell the following paragraph anew, in other words and in the clear and careful English of an encyclopedia "
    "such as Wikipedia:",
    "hard": "Say the same as the following paragraph in terse and abstruse language that only a learned scholar follows, with "
    "rare and intricate words in place of simple ones:",
    "qa": "Turn the following paragraph into a conversation of several questions and answers. Begin each question with "
    '"Question:" and each answer with "Answer:":',
}
MARKS = {"qa": ("Question:", "Answer:")}  # without which an answer has not the form asked for


class Asked(NamedTuple):
    """A passage on its way through the writer."""

    document: str
    origin: Any
    number: int
    style: str
    passage: str
    size: int


class Rephrase(Asking):
    styles: list[str] = Field(["medium"], min_length=1, description="easy, medium, hard, qa, or one of `prompts`")
    prompts: dict[str, str] = Field(
        {}, description="words that ask for a style, ours or one of yours; the passage follows"
    )
    length: int = Field(300, ge=1, description="tokens of a passage, at most")
    shortest: int = Field(16, ge=1, description="tokens that a passage has at least; shorter ones are left out")
    least: float = Field(0.2, ge=0, description="tokens of an answer to one of the passage, at least")
    most: float = Field(3.0, gt=0, description="tokens of an answer to one of the passage, at most")
    ended: bool = Field(True, description="drop answers that were cut off at `tokens`")

    baseline = {"use": "synth/rephrase", "styles": ["one"], "prompts": {"one": ""}, "length": 4096, "tokens": 24, "rows": 512,
                "shortest": 1, "least": 0.0, "most": 1e9, "ended": False}  # fmt: skip
    on = {"styles": ["one", "two"], "prompts": {"one": "the cat", "two": "7 8 9"}, "length": 20, "tokens": 24, "rows": 512,
          "shortest": 4, "least": 0.5, "most": 1.1, "ended": False}  # fmt: skip

    @model_validator(mode="after")
    def _known(self) -> Rephrase:
        for style in self.styles:
            if style not in self.prompts and style not in STYLES:
                raise ValueError(f"there is no style '{style}'{did_you_mean(style, [*STYLES, *self.prompts])}")
        return self

    def retell(self, documents: Iterable[Document], writer: Writer) -> Iterator[dict[str, Any]]:
        """A row for each answer that is kept: `text`, `style`, and where it is from (`of`, `passage`, `origin`).

        UserError where no answer was worth keeping. Counts of what was dropped and why are in the artifact.
        """
        for asked, answer in writer.answers(self._asked(documents, writer), **self.how()):
            text = bare(answer.text)
            if why := self._fault(asked, text, answer, writer):
                self.count(f"dropped_{why}")
                continue
            self.count("kept")
            yield {
                "text": text,
                "id": f"{asked.document}#{asked.number}-{asked.style}",
                "style": asked.style,
                "of": asked.document,
                "passage": asked.number,
                "origin": asked.origin,
                "made_by": self.name(),
            }
        if not self.state.get("kept"):
            dropped = ", ".join(f"{count} {key.removeprefix('dropped_')}" for key, count in self.state.items() if count)
            raise UserError(f"synth/rephrase: no answer was worth keeping ({dropped or 'there are no documents'})")

    def _asked(self, documents: Iterable[Document], writer: Writer) -> Iterator[tuple[Asked, Question]]:
        for name, document in named(documents):
            self.count("documents")
            for number, passage in enumerate(cut(document.text, size=writer.size, most=self.length)):
                size = writer.size(passage)
                if size < self.shortest:
                    self.count("short_passages")
                    continue
                for style in self.styles:
                    asked = Asked(name, document.row.get("origin"), number, style, passage, size)
                    prompt = self.prompts.get(style, STYLES.get(style, ""))
                    purpose = f"rephrase|{name}|{number}|{style}"
                    yield asked, Question(purpose, f"{prompt}\n\n{passage}" if prompt else passage)

    def _fault(self, asked: Asked, text: str, answer: Answer, writer: Writer) -> str:
        """Why an answer is not kept; nothing where it is."""
        if not answer.text and not answer.ended:
            return "unanswered"
        if says_little(text):
            return "empty"
        if self.ended and not answer.ended:
            return "cut_off"
        if " ".join(text.split()) == " ".join(asked.passage.split()):
            return "copied"
        if asked.style not in self.prompts and not all(mark in text for mark in MARKS.get(asked.style, ())):
            return "formless"
        size = writer.size(text)
        return "short" if size < self.least * asked.size else "long" if size > self.most * asked.size else ""


def effect(run: Seen) -> dict[str, float]:
    """Styles told, most passages of a document, the longest answer in bytes (the toy's tokens), and whether any is a copy."""
    rows = [orjson.loads(line) for line in (run.folder / "artifact/data/rows.jsonl").read_bytes().splitlines()]
    files = {row["origin"]["file"] for row in rows}
    real = {file: Path(file).read_text(encoding="utf-8").splitlines() for file in files}
    return {
        "styles": float(len({row["style"] for row in rows})),
        "passages": float(max(row["passage"] for row in rows) + 1),
        "longest": float(max(len(row["text"].encode()) for row in rows)),
        "copies": float(sum(row["text"] in real[row["origin"]["file"]][row["origin"]["line"] - 1] for row in rows)),
    }


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return (
        on["styles"] > off["styles"]
        and on["passages"] > off["passages"]
        and on["longest"] <= 1.1 * 20 < off["longest"]
        and on["copies"] == 0
    )


BENCH = None  # a writer that tells well is larger than what is benched here; see the recipe for paper 61

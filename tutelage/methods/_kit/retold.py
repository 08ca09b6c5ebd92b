"""What methods share that ask a writer about documents: its settings, passages of documents, and what answers are worth."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import Field

from tutelage.base.endpoint import Endpoint
from tutelage.base.method import Method
from tutelage.core.types import Document

SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+\s*")
LITTLE = 0.1  # of its size is what zlib makes of a text that says the same over and over
# What models say of an answer before and after it: "Sure!", "Here is a paraphrase of the text:", "I hope this helps."
TALK = r"(?:paraphras|rephras|rewr|version|conversation|dialog|question|paragraph|passage|text)"
TOLD = r"(?:paraphrase[ds]?|paraphrasing|rephrased?|rewritten)"
AROUND = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\A(?:sure|certainly|of course|okay|ok)\b[^\n]{0,160}?[:!.,]\s+(?=\n|here\b)",
        rf"\A\**(?:here(?:'s|’s| is| are)|below (?:is|are)|the following is)\b[^\n:]{{0,100}}?{TALK}[^\n:]{{0,80}}:\**",
        rf"\A\**(?:[^\n:]{{0,40}}\b{TOLD}\b[^\n:]{{0,60}}:\**[ \t]*\n|(?:(?:the|my|a) )?{TOLD}(?: {TALK}\w*)?:\**)",
        r"\n(?:i hope (?:this|that)|let me know|please let me know|feel free to)\b[^\n]*\Z",
    )
]


class Asking(Method):
    """A method that asks a writer: the start of its stage, or a model behind an endpoint."""

    endpoint: Endpoint | None = Field(
        None, description="{url, model, key_env, timeout, tries, parallel, options}: asked instead of the stage's start"
    )
    tokens: int = Field(640, ge=1, description="tokens of an answer, at most")
    temperature: float = Field(0.7, ge=0, description="of the writer; 0 always takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="share of the probability that is sampled from")
    rows: int = Field(16, ge=1, description="questions that the start's model answers at once")

    no_off = "it makes data, and a stage without it makes none"

    def how(self) -> dict[str, Any]:
        """The settings of an answer, as a writer takes them."""
        return {"tokens": self.tokens, "temperature": self.temperature, "top_p": self.top_p, "rows": self.rows}

    def count(self, what: str, by: int = 1) -> None:
        self.state[what] = self.state.get(what, 0) + by


def named(documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """Documents with what they are called: their own `id`, else their source and their number there; no machine's paths."""
    numbers: Counter[str] = Counter()
    for document in documents:
        origin, own = document.row.get("origin"), document.row.get("id")
        source = str(origin.get("source", "")) if isinstance(origin, dict) else ""
        numbers[source] += 1
        yield str(own) if isinstance(own, (str, int)) and own != "" else f"{source}:{numbers[source]}", document


def cut(text: str, *, size: Callable[[str], int], most: int) -> list[str]:
    """A text in passages of at most `most` tokens, cut where lines or sentences end, else between words.

    A word that is longer than that is cut, too. All that is said stands in one passage, in order.
    """
    passages: list[str] = []
    room = 0
    for piece in _pieces(text, size, most):
        length = size(piece)  # joined they have no more tokens than apart, for joining divides nothing
        if passages and length <= room:
            passages[-1] += piece
            room -= length
        else:
            passages.append(piece)
            room = most - length
    return [found for passage in passages if (found := passage.strip())]


def _pieces(text: str, size: Callable[[str], int], most: int) -> Iterator[str]:
    """Parts of a text that fit, white space included: sentences, words, halves of words."""
    for sentence in _split(text, SENTENCE):
        if size(sentence.strip()) <= most:
            yield sentence
            continue
        for word in _split(sentence, re.compile(r"\s+")):
            parts = [word]
            while parts:
                part = parts.pop(0)
                if len(part) > 1 and size(part.strip()) > most:
                    parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                else:
                    yield part


def _split(text: str, where: re.Pattern[str]) -> Iterator[str]:
    """A text after each match, which stays with what is before it."""
    start = 0
    for match in where.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text):
        yield text[start:]


def bare(text: str) -> str:
    """An answer without what is said about it: an opening, a closing, and quotation marks around the whole."""
    for pattern in AROUND:
        text = pattern.sub("", text.strip(), count=1).strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1] else text


def says_little(text: str) -> bool:
    """Whether nothing is said, or the same over and over."""
    data = text.strip().encode("utf-8", "replace")
    return not data or (len(data) > 100 and len(zlib.compress(data)) < LITTLE * len(data))

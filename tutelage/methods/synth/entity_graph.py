"""Entity graph: for each document a writer lists its entities, and then tells how each two and some three of them are related.

Paper:   Yang et al. 2024 (EntiGraph, synthetic continued pretraining), arXiv:2409.07431; code
    ZitongYang/Synthetic_Continued_Pretraining
Use:     a small corpus whose facts stand in it once; a strong writer (the paper: GPT-4 Turbo, and 1.3 M tokens of books
    became 455 M), then one or two passes at a low rate with a tenth of general text replayed. `pairs` and `triplets`
    bound what a document costs; what is learned grows with the logarithm of the tokens
Works:   any text that fits the writer's context whole: a document is read again for each answer. Prompts are English unless
    `prompts` says otherwise
Costs:   one answer for the entities of a document and one for each pair and triplet: of 20 entities 190 pairs, each with the
    whole document before it. Answers are kept as they come, so a cut stage pays for none twice
With:    continual/replay in the stage that learns; filter/near_duplicates first, so that nothing is told twice
Differs: the prompts ask in words of our own for what the authors' ask: a summary and entities as JSON; for two or three
    entities the document told anew for each of them, and how they interact. They stand in one message without a system's.
    A list that cannot be read is asked for `asks` times where their code asks until it can. Triplets are so many drawn by
    chance, where theirs go through all in mixed order until the budget ends. The first `most` entities of a list are taken,
    none twice and none of over 200 characters, where theirs has no bound; openings and closings are taken off answers, and
    empty, repetitive and cut-off ones are dropped; only a title stands before the text, where theirs has author and year
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

import orjson
from pydantic import Field, field_validator

from tutelage.base.endpoint import objects
from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.method import Seen
from tutelage.core.types import Answer, Document, Question, Writer
from tutelage.methods._kit.retold import Asking, bare, named, says_little

PROMPTS = {
    "entities": (
        "Read the document below as an analyst of knowledge. First sum it up, briefly and with all its main points. Then list "
        "every entity of weight in it, as many as there are: people by the names they have there, places, things, and ideas "
        'that matter to it. Answer with one JSON object and nothing else: {"summary": "…", "entities": ["…", "…"]}'
    ),
    "pair": (
        "Read the document and the two entities below it. Tell the content of the document anew twice, first with the first "
        "entity at its center, then with the second. Then discuss how the two are related and act on each other in this "
        "document. Give each of the three parts a heading that names the document and the entities, and enough context to be "
        "understood by one who has not read the document."
    ),
    "triplet": (
        "Read the document and the three entities below it. Tell the content of the document anew three times, each time with "
        "another of the entities at its center. Then discuss how the three are related and act on each other in this document. "
        "Give each of the four parts a heading that names the document and the entities, and enough context to be understood by "
        "one who has not read the document."
    ),
}
LONGEST = 200  # characters of an entity; what is longer is a sentence
MARK = re.compile(r"\s*(?:[-*•]|\d+[.)])\s+")  # before an entity in a list


class Found(NamedTuple):
    """What the writer found in a document."""

    entities: list[str]
    summary: str


class Asked(NamedTuple):
    """A question about entities of a document, on its way through the writer."""

    document: str
    origin: Any
    kind: str
    number: int
    entities: tuple[str, ...]


class EntityGraph(Asking):
    pairs: int | None = Field(
        None, ge=0, description="pairs of a document that are told, drawn by chance; left out: all"
    )
    triplets: int = Field(64, ge=0, description="triplets of a document that are told, drawn by chance")
    most: int = Field(40, ge=2, description="entities of a document, the first ones that the writer lists")
    asks: int = Field(3, ge=1, description="times that a document's entities are asked for while no list can be read")
    summary: bool = Field(True, description="whether a document's summary becomes a row, too")
    title: str = Field("title", description="field of the record that is told before the text, where there is one")
    between: str | None = Field(
        None, min_length=1, description="what stands between entities, of a writer that writes them plainly and no JSON"
    )
    prompts: dict[str, str] = Field({}, description="words of yours for `entities`, `pair` or `triplet`")
    tokens: int = Field(2048, ge=1, description="tokens of an answer, at most")
    temperature: float = Field(1.0, ge=0, description="of the writer; 0 always takes the likeliest token")
    ended: bool = Field(True, description="drop answers that were cut off at `tokens`")
    seed: int = Field(1, ge=0, description="of the pairs and triplets that are drawn")

    baseline = {"use": "synth/entity_graph", "pairs": 1, "triplets": 0, "between": " ", "most": 3, "summary": False,
                "prompts": {"entities": "of", "pair": "2", "triplet": "3"}, "tokens": 12, "ended": False, "rows": 512}  # fmt: skip
    on = {"triplets": 1, "between": " ", "most": 3, "summary": False,
          "prompts": {"entities": "of", "pair": "2", "triplet": "3"}, "tokens": 12, "ended": False, "rows": 512}  # fmt: skip

    @field_validator("prompts")
    @classmethod
    def _known(cls, value: dict[str, str]) -> dict[str, str]:
        for key in value:
            if key not in PROMPTS:
                raise ValueError(f"nothing is asked for '{key}'{did_you_mean(key, PROMPTS)}")
        return value

    def retell(self, documents: Iterable[Document], writer: Writer) -> Iterator[dict[str, Any]]:
        """Rows of summaries, then of pairs and triplets: `text`, `style`, `entities`, and where it is from (`of`, `origin`).

        UserError where the writer listed no two entities of any document, and where no answer was worth keeping.
        """
        found = self._found(documents, writer)
        if not any(len(one.entities) > 1 for one in found if one):
            raise UserError(
                f"synth/entity_graph: the writer listed no two entities of any of {len(found)} documents; it answers JSON, or "
                "what `between` and `prompts.entities` ask for"
            )
        self.state.update(documents=len(found), without_entities=sum(not one or len(one.entities) < 2 for one in found))
        self.state["entities"] = sum(len(one.entities) for one in found if one)
        if self.summary:
            for (name, document), one in zip(named(documents), found, strict=True):
                if one and not says_little(one.summary):
                    yield self._row(Asked(name, document.row.get("origin"), "summary", 0, ()), one.summary)
        for asked, answer in writer.answers(self._asked(documents, found), **self.how()):
            text = bare(answer.text)
            if why := self._fault(text, answer):
                self.count(f"dropped_{why}")
                continue
            yield self._row(asked, text)
        if not self.state.get("kept"):
            raise UserError("synth/entity_graph: no answer was worth keeping: all were empty, repetitive or cut off")

    def _row(self, asked: Asked, text: str) -> dict[str, Any]:
        self.count("kept")
        return {
            "text": text,
            "id": f"{asked.document}#{asked.kind}-{asked.number}",
            "style": asked.kind,
            "entities": list(asked.entities),
            "of": asked.document,
            "origin": asked.origin,
            "made_by": self.name(),
        }

    def _fault(self, text: str, answer: Answer) -> str:
        """Why an answer is not kept; nothing where it is."""
        if not answer.text and not answer.ended:
            return "unanswered"
        return "empty" if says_little(text) else "cut_off" if self.ended and not answer.ended else ""

    def _found(self, documents: Iterable[Document], writer: Writer) -> list[Found | None]:
        """What the writer found in each document, in their order; None where no list of its could be read."""
        found: list[Found | None] = [None for _ in documents]
        for attempt in range(self.asks):
            if None not in found:
                break
            asked = (
                (number, Question(f"entities|{name}|{attempt}", self._question("entities", document)))
                for number, (name, document) in enumerate(named(documents))
                if found[number] is None
            )
            for number, answer in writer.answers(asked, **self.how()):
                found[number] = (
                    plainly(answer.text, self.between, self.most) if self.between else read(answer.text, self.most)
                )
        return found

    def _asked(self, documents: Iterable[Document], found: list[Found | None]) -> Iterator[tuple[Asked, Question]]:
        for (name, document), one in zip(named(documents), found, strict=True):
            entities = one.entities if one else []
            rng = random.Random(f"{self.seed}|{name}")
            for kind, size, most in (("pair", 2, self.pairs), ("triplet", 3, self.triplets)):
                chosen = list(combinations(entities, size))
                if most is not None and len(chosen) > most:
                    chosen = [chosen[i] for i in sorted(rng.sample(range(len(chosen)), most))]
                for number, some in enumerate(chosen):
                    about = Asked(name, document.row.get("origin"), kind, number, some)
                    yield about, Question("|".join([kind, name, *some]), self._question(kind, document, some))

    def _question(self, kind: str, document: Document, entities: tuple[str, ...] = ()) -> str:
        title = document.row.get(self.title)
        head = [title] if isinstance(title, str) and title.strip() else []
        below = ["\n".join(f"- {entity}" for entity in entities)] if entities else []
        return "\n\n".join([self.prompts.get(kind, PROMPTS[kind]), "\n\n".join([*head, document.text]), *below])


def read(text: str, most: int) -> Found | None:
    """Entities and summary of the last JSON object in an answer that has `entities`; None where there is none."""
    found = None
    for value in objects(text):
        entities = value.get("entities")
        if isinstance(entities, list) and (listed := distinct(entities, most)):
            summary = value.get("summary")
            found = Found(listed, summary.strip() if isinstance(summary, str) else "")
    return found


def plainly(text: str, between: str, most: int) -> Found | None:
    """Entities of an answer that has nothing but them."""
    listed = distinct([MARK.sub("", part, count=1) for part in text.split(between)], most)
    return Found(listed, "") if listed else None


def distinct(entities: list[Any], most: int) -> list[str]:
    """The first `most` that are names of something, each once, whatever its case."""
    found: dict[str, str] = {}
    for entity in entities:
        name = " ".join(entity.split()) if isinstance(entity, str) else ""
        if name and len(name) <= LONGEST:
            found.setdefault(name.casefold(), name)
    return list(found.values())[:most]


def effect(run: Seen) -> dict[str, float]:
    """Most pairs told of one document, triplets told, and how many of either were told twice or of a name with itself."""
    rows = [orjson.loads(line) for line in (run.folder / "artifact/data/rows.jsonl").read_bytes().splitlines()]
    told = [(row["of"], *sorted(row["entities"])) for row in rows]
    pairs = [one[0] for one in told if len(one) == 3]
    return {
        "pairs": float(max(map(pairs.count, pairs))),
        "triplets": float(sum(len(one) == 4 for one in told)),
        "twice": float(len(told) - len(set(told)) + sum(len(set(one[1:])) < len(one) - 1 for one in told)),
    }


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["pairs"] == 3 > off["pairs"] and on["triplets"] > 0 == off["triplets"] and on["twice"] == 0


BENCH = None  # a writer that relates entities is larger than what is benched here; see the recipe for paper 259

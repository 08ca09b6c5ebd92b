"""A writer for tests of methods that ask one: it answers by a rule, at once, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tutelage.core.types import Answer, Document, Question


class Told:
    """A token is a word. `reply` gives the text of an answer, or a whole one."""

    def __init__(self, reply: Callable[[str], str | Answer]) -> None:
        self.reply, self.asked, self.how = reply, list[Question](), list[dict[str, Any]]()

    def size(self, text: str) -> int:
        return len(text.split())

    def answers(self, asked: Iterable[tuple[Any, Question]], **how: Any) -> Iterator[tuple[Any, Answer]]:
        self.how.append(how)
        for about, question in asked:
            self.asked.append(question)
            found = self.reply(question.text)
            yield about, found if isinstance(found, Answer) else Answer(found, True)


def documents(*texts: str, **more: Any) -> list[Document]:
    return [
        Document(text, {"origin": {"source": "web", "file": "web.jsonl", "line": i}, "text": text, **more})
        for i, text in enumerate(texts, 1)
    ]

"""Writers, for stages that make data by asking a model: the start's own, or one behind an endpoint.

What was answered is on disk before a row is made of it. A stage that was cut asks again from the beginning, in the same
order, and is given what there is; only the rest is written anew, so that nothing is paid for twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import orjson
import torch
from torch import nn

from tutelage.base.endpoint import Endpoint
from tutelage.base.errors import UserError
from tutelage.core import endpoint, randomness
from tutelage.core.device import autocast_of, device_of
from tutelage.core.graph import Node
from tutelage.core.record import opened
from tutelage.core.stage import Say, processor_of, start_of
from tutelage.core.types import Answer, Question, Writer

T = TypeVar("T")
LEDGER = "answers.jsonl"  # in the stage's folder while its data are made
BYTES_A_TOKEN = 4  # of a model whose tokenizer is elsewhere
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a request is tried again
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})  # states of an endpoint that may be another's soon
REFUSED = frozenset({400, 413, 422})  # it will not answer this question; others it may
MOST_REFUSED = 3  # more than were answered, and it is the recipe that is wrong


class Ledger:
    """Answers on disk by key, a line each; in memory only where each stands. A line that was cut is given up."""

    def __init__(self, path: Path) -> None:
        self.path, self.places = path, dict[str, int]()
        self.synced = 0.0
        if path.exists():
            self._read()
        self.file = open(path, "a+b")  # noqa: SIM115  closed by `close`

    def _read(self) -> None:
        at = 0
        with opened(self.path) as handle:
            for line in handle:
                if not line.endswith(b"\n"):
                    break
                with contextlib.suppress(orjson.JSONDecodeError, LookupError, TypeError):  # what a disk made of a line
                    self.places[orjson.loads(line)["key"]] = at
                at += len(line)
        os.truncate(self.path, at)

    def find(self, key: str) -> Answer | None:
        place = self.places.get(key)
        if place is None:
            return None
        self.file.seek(place)
        row = orjson.loads(self.file.readline())
        return Answer(row["text"], row["ended"])

    def add(self, found: list[tuple[str, Answer]]) -> None:
        """Write answers, with one call. They outlive this process at once, and the machine a second later."""
        at = self.file.seek(0, os.SEEK_END)
        lines = [orjson.dumps({"key": key, "text": a.text, "ended": a.ended}) + b"\n" for key, a in found]
        self.file.write(b"".join(lines))
        self.file.flush()
        for (key, _), line in zip(found, lines, strict=True):
            self.places[key] = at
            at += len(line)
        if time.monotonic() - self.synced > 1:
            os.fsync(self.file.fileno())
            self.synced = time.monotonic()

    def close(self, *, done: bool) -> None:
        """`done`: what it holds has become rows."""
        self.file.close()
        if done:
            self.path.unlink(missing_ok=True)


def key_of(asked: Any) -> str:
    """Names all that an answer hangs on, besides the model."""
    return hashlib.blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()


def spoken(text: str) -> str:
    """What a model says, without the thoughts before it, and nothing that no file holds (halves of characters)."""
    return text.rpartition("</think>")[2].encode("utf-8", "replace").decode().strip()


class _Told:
    """Says now and then how far a writer is."""

    def __init__(self, name: str, say: Say) -> None:
        self.name, self.say, self.count, self.last = name, say, 0, 0.0

    def more(self, count: int = 1) -> None:
        self.count += count
        if time.monotonic() - self.last > 1:
            self.last = time.monotonic()
            self.say({"doing": f"{self.name} has {self.count:,} answers"})


class Own:
    """The start's model. It answers in batches that are the same however often the stage was cut, each by its own seed."""

    def __init__(self, node: Node, ledger: Ledger, told: _Told) -> None:
        self.node, self.ledger, self.told = node, ledger, told
        self.folder, self.config = start_of(node)
        self.processor = processor_of(node, self.folder, self.config, say=told.say)
        self.model: nn.Module | None = None

    def size(self, text: str) -> int:
        return len(self.processor(text, add_special_tokens=False)["input_ids"])

    def answers(
        self, asked: Iterable[tuple[T, Question]], *, tokens: int, temperature: float, top_p: float, rows: int
    ) -> Iterator[tuple[T, Answer]]:
        how = {"tokens": tokens, "temperature": temperature, "top_p": top_p}
        for group in _groups(asked, rows):
            seed = randomness.seed_of(self.node.seed, self.node.root, 0, group[0][1].purpose)
            keys = [key_of([question, seed, place, how]) for place, (_, question) in enumerate(group)]
            known = [self.ledger.find(key) for key in keys]
            found = [answer for answer in known if answer is not None]
            if len(found) < len(group):  # a batch that was half written is written again
                found = list(self._written([question.text for _, question in group], seed, how))
                self.ledger.add(list(zip(keys, found, strict=True)))
            self.told.more(len(group))
            yield from zip((about for about, _ in group), found, strict=True)

    def _written(self, texts: list[str], seed: int, how: dict[str, Any]) -> Iterator[Answer]:
        modality, stage = self.node.graph.modality, self.node.stage
        if self.model is None:
            self.told.say({"doing": "opening the writer"})
            device = device_of(self.node)
            randomness.reseed(randomness.seed_of(self.node.seed, self.node.root, 0, "init"))
            model = modality.model(self.folder, self.config, processor=self.processor, length=stage.length)
            self.model = model.to(device, autocast_of(stage.precision, device) or torch.float32)
        ids = [modality.asked(self.processor, text, config=self.config) for text in texts]
        for text, ended in modality.answers(self.model, self.processor, asked=ids, seed=seed, **how):
            yield Answer(spoken(text), ended)


def _groups(asked: Iterable[tuple[T, Question]], rows: int) -> Iterator[list[tuple[T, Question]]]:
    group: list[tuple[T, Question]] = []
    for one in asked:
        group.append(one)
        if len(group) == rows:
            yield group
            group = []
    if group:
        yield group


class Remote:
    """A model behind an endpoint. It is asked several questions at once and a bounded number of times each."""

    def __init__(self, node: Node, spec: Endpoint, ledger: Ledger, told: _Told) -> None:
        self.node, self.spec, self.ledger, self.told = node, spec, ledger, told
        self.url, self.key = spec.address(), spec.key()
        self.answered = self.refused = 0
        self.seeds = True  # whether it takes a seed

    def size(self, text: str) -> int:
        return -(-len(text.encode("utf-8", "replace")) // BYTES_A_TOKEN)

    def answers(
        self, asked: Iterable[tuple[T, Question]], *, tokens: int, temperature: float, top_p: float, rows: int
    ) -> Iterator[tuple[T, Answer]]:
        how = {"max_tokens": tokens, "temperature": temperature, "top_p": top_p}
        waiting: deque[tuple[T, Future[Answer]]] = deque()
        client = endpoint.connect(self.url)
        with endpoint.portal() as portal, portal.wrap_async_context_manager(client):
            try:
                for about, question in asked:
                    waiting.append((about, portal.start_task_soon(self._answer, client, question, how)))
                    if len(waiting) == self.spec.parallel:
                        yield self._next(waiting)
                while waiting:
                    yield self._next(waiting)
            finally:
                for _, answer in waiting:
                    answer.cancel()

    def _next(self, waiting: deque[tuple[T, Future[Answer]]]) -> tuple[T, Answer]:
        """The first of those that are waited for; it stays among them until it is there."""
        about, answer = waiting[0][0], waiting[0][1].result()
        waiting.popleft()
        self.told.more(int(bool(answer.text)))  # one that was refused has none
        return about, answer

    async def _answer(self, client: Any, question: Question, how: dict[str, Any]) -> Answer:
        seed = randomness.seed_of(self.node.seed, self.node.root, 0, question.purpose) >> 32  # as many bits as all take
        key = key_of([question, seed, how])
        found = self.ledger.find(key)
        if found is None:
            body = {"model": self.spec.model, "messages": [{"role": "user", "content": question.text}], "seed": seed}
            body = {name: value for name, value in {**body, **how, **self.spec.options}.items() if value is not None}
            found = await self._tried(client, body)
            if found is None:
                return Answer("", False)
            self.ledger.add([(key, found)])
        self.answered += 1
        return found

    async def _tried(self, client: Any, body: dict[str, Any]) -> Answer | None:
        """The answer, or None where this question alone is refused. UserError once the endpoint has failed for good."""
        seeded = self.seeds
        for attempt in range(self.spec.tries):
            wait = FIRST_WAIT * 2**attempt
            try:
                reply = await self._posted(client, body, seeded)
                if seeded and reply.status in REFUSED and "seed" in body:
                    seeded = False
                    reply = await self._posted(client, body, seeded)
                    self.seeds &= reply.status != 200  # that was it
                if reply.status == 200:
                    text, reason = endpoint.said(reply.data)
                    ended = text is not None and reason not in ("length", "content_filter")
                    return Answer(spoken(text or ""), ended)
                wrong, wait = endpoint.complaint(reply, key=self.key), max(wait, reply.wait or 0.0)
            except UserError as error:
                wrong = str(error)
            else:
                if reply.status in REFUSED:
                    self.refused += 1
                    if self.refused <= self.answered + MOST_REFUSED:
                        return None
                if reply.status not in PASSING:
                    raise self._failed(wrong)
            if attempt + 1 < self.spec.tries:
                await asyncio.sleep(min(wait, LONGEST_WAIT))
        raise self._failed(f"{wrong} ({self.spec.tries} tries)")

    async def _posted(self, client: Any, body: dict[str, Any], seeded: bool) -> endpoint.Reply:
        body = body if seeded else {name: value for name, value in body.items() if name != "seed"}
        return await endpoint.post(client, self.url, body, key=self.key, timeout=self.spec.timeout)

    def _failed(self, wrong: str) -> UserError:
        kept = f"; {len(self.ledger.places):,} answers are kept, and the same command goes on from there"
        return UserError(f"stages.{self.node.name}.make.endpoint: {self.url}: {wrong}{kept}")


def writer_of(node: Node, spec: Endpoint | None, ledger: Ledger, *, name: str, say: Say) -> Writer:
    """The writer that a recipe names: `endpoint` of the method, or the stage's `start`."""
    if spec is not None and node.starts():
        raise UserError(f"stages.{node.name}: its writer is its `start` or an `endpoint`, not both")
    if spec is None and not node.starts():
        raise UserError(
            f"stages.{node.name}: {name} needs a writer: `start: a model that was taught to answer`, or "
            "`endpoint: {url: http://127.0.0.1:8000/v1, model: its name there}` in `make`"
        )
    told = _Told(name, say)
    return Own(node, ledger, told) if spec is None else Remote(node, spec, ledger, told)

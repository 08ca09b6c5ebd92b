"""Near-duplicates: of documents that say almost the same, one is kept and told how many there were.

Paper:   Parmar et al. 2024, arXiv:2407.06380 (the fuzzy step of its pipeline); signatures and bands: Broder 1997 and
    Leskovec et al. 2014 (no arXiv numbers), by the library datasketch
Use:     threshold 0.8 on stretches of 5 words drops reprints and edited copies, 0.5 also shared boilerplate; `unit:
    character` with width 12–24 for scripts without spaces. `drop: false` writes every document with its tags, so that
    with and without are one stage. Name first the sources whose copy is to be kept: the older ones, as the paper found
Works:   text of any form; a conversation counts as all that it says. What the stage holds out of a source is left out
Costs:   every document is read twice; about 8 KB of memory a document (128 permutations), whatever its length; 1 ms of
    a CPU core for 1,000 words, on as many cores as `engine: {threads: …}` gives. Many copies of one text cost like one;
    a cluster of n that all differ costs n² comparisons
With:    any stage that learns from rows: `data: {web: {stage: filtered}}`; tags are metadata for condition/metadata
Differs: one step of the paper's pipeline, which filters by quality and samples by attribute as well; stretches of words
    by default, 128 permutations and the bands that suit the threshold best, where NeMo Curator, the tool of the
    authors' house, takes 5 characters and 20 bands of 13; clusters are connected through pairs that are estimated to
    be alike, and never compared word by word, where that tool by default compares with two anchors of a bucket
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
import orjson
import torch
from datasketch import LeanMinHash, MinHash, MinHashLSH
from pydantic import Field

from tutelage.base.method import Bench, Method, Seen
from tutelage.core.types import Document

SCHEME = "affine32"  # of the library's permutations; it also makes a signature's size
MISSED = (0.1, 0.9)  # how little a needless comparison weighs beside a pair that no band shows
GROUP = 64  # documents signed at once

WORD = re.compile(r"\w+")


class NearDuplicates(Method):
    threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of two documents' stretches, from which on"
    )
    unit: Literal["word", "character"] = Field("word", description="what stretches are made of, in lower case")
    width: int = Field(5, ge=1, description="words or characters of a stretch")
    permutations: int = Field(128, ge=16, le=1024, description="numbers in a signature; the error is 1 / their root")
    keep: Literal["first", "longest"] = Field("first", description="which document of a cluster is kept")
    drop: bool = Field(True, description="false writes the others too, each with `copy_of`")
    seed: int = Field(1, ge=0, description="of the permutations")

    no_off = "it makes data, and a stage without it makes none"
    baseline = {"use": "filter/near_duplicates", "drop": False}
    on = {"threshold": 0.4, "width": 2}

    def rewrite(self, documents: Iterable[Document]) -> Iterator[dict[str, Any]]:
        """The kept documents as they were, with `copies` (of its cluster, itself among them) and `made_by`.

        Written too, those not kept also carry `copy_of`: where the kept one comes from.
        """
        sizes: list[int] = []
        origins: list[bytes] = []
        root = self._clusters(_noted(documents, sizes, origins))
        kept = dict[int, int]()
        for i, r in enumerate(root):
            best = kept.setdefault(r, i)
            if self.keep == "longest" and sizes[i] > sizes[best]:
                kept[r] = i
        copies = Counter(root)
        self.state.update(read=len(root), clusters=len(kept), dropped=len(root) - len(kept) if self.drop else 0)
        for i, document in enumerate(documents):
            best = kept[root[i]]
            row = {**document.row, "copies": copies[root[i]], "made_by": self.name()}
            if i == best:
                yield row
            elif not self.drop:
                yield {**row, "copy_of": orjson.loads(origins[best])}

    def _clusters(self, documents: Iterable[Document]) -> list[int]:
        """For each document the first one of its cluster."""
        index = MinHashLSH(self.threshold, num_perm=self.permutations, weights=MISSED)
        root: list[int] = []
        signatures: list[np.ndarray] = []
        first: dict[bytes, int] = {}
        for i, values in enumerate(self._signatures(documents)):
            root.append(i)
            signatures.append(values)
            same = first.setdefault(values.tobytes(), i)
            if same < i:  # to the last number alike: it has what the first one has near it
                signatures[i] = signatures[same]
                _join(root, i, same)
                continue
            signature = LeanMinHash(seed=self.seed, hashvalues=values, scheme=SCHEME)
            for other in index.query(signature):
                if np.mean(values == signatures[other]) >= self.threshold:
                    _join(root, i, other)
            index.insert(i, signature)
        return [_root(root, i) for i in range(len(root))]

    def _signatures(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        """[permutations] uint32 for each document, in order, from as many processes as there are threads."""
        settings = (self.unit, self.width, self.permutations, self.seed)
        texts = (document.text for document in documents)
        groups = iter(lambda: list(islice(texts, GROUP)), [])
        workers = torch.get_num_threads()
        if workers == 1:
            for group in groups:
                yield from signed(group, *settings)
            return
        waiting: deque[Future[np.ndarray]] = deque()
        with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            for group in groups:
                waiting.append(pool.submit(signed, group, *settings))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()


def _noted(documents: Iterable[Document], sizes: list[int], origins: list[bytes]) -> Iterator[Document]:
    """The documents; their sizes and origins are written down in passing."""
    for document in documents:
        sizes.append(len(document.text))
        origins.append(orjson.dumps(document.row["origin"]))
        yield document


def stretches(text: str, unit: str, width: int) -> set[bytes]:
    """All stretches of `width` words or characters; a text shorter than one is a stretch, and one without any none."""
    text = text.lower()
    parts = WORD.findall(text) if unit == "word" else " ".join(text.split())
    joint = " " if unit == "word" else ""
    count = max(len(parts) - width + 1, min(len(parts), 1))
    return {joint.join(parts[i : i + width]).encode() for i in range(count)}


def signed(texts: list[str], unit: str, width: int, permutations: int, seed: int) -> np.ndarray:
    """Signatures of texts, [N, permutations] uint32: depend on each text alone."""
    sets = [stretches(text, unit, width) or {text.encode()} for text in texts]  # texts without words: only if the same
    made = MinHash.generator(sets, num_perm=permutations, seed=seed, scheme=SCHEME)
    return np.stack([each.hashvalues for each in made])


def _root(root: list[int], i: int) -> int:
    while root[i] != i:
        root[i] = root[root[i]]
        i = root[i]
    return i


def _join(root: list[int], i: int, j: int) -> None:
    """Two documents are of one cluster; its root is the first of all."""
    a, b = sorted((_root(root, i), _root(root, j)))
    root[b] = a


def effect(run: Seen) -> dict[str, float]:
    """Pairs of rows that are alike, by brute force over the pairs of the written rows; and how many rows there are."""
    rows = [orjson.loads(line) for line in (run.folder / "artifact/data/rows.jsonl").read_bytes().splitlines()]
    sets = [stretches(row["text"], "word", 2) for row in rows]
    alike = [len(a & b) >= 0.6 * len(a | b) for i, a in enumerate(sets) for b in sets[:i]]
    return {"alike": float(sum(alike)), "rows": float(len(rows)), "said": float(sum(row["copies"] for row in rows))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Nothing alike is left, and the tags of what is left account for all that was there."""
    return on["alike"] == 0 < off["alike"] and on["said"] == off["rows"] > on["rows"]


BENCH = Bench(
    base="recipes/bench/duplicated.yaml",
    arm={"data": {"copied": {"use": None, "stage": "filtered", "val": 0}}},
    metric="bits_per_byte/clean",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="a step of a pipeline for trillions of tokens of web text, with exact deduplication before it",
)

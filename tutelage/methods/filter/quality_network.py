"""Quality network: a small network learns what trusted text is like, and the share of the rest that is most like it is kept.

Paper:   Fang et al. 2023 (Data Filtering Networks), arXiv:2309.17425; the network for text: Joulin et al. 2016,
    arXiv:1607.01759
Use:     little, but clean trusted text: the paper found that a few percent of poor data in it spoil the filter, and that
         how well the network does its own task says little; compare filters by the model trained on what they keep.
         `drop: false` writes every document with its score, for condition/metadata
Works:   text of any form in words; a conversation counts as all that it says. Documents of the trusted sources are not
         written, unless `judge: all`. What the stage holds out of a source is left out
Costs:   every document is read twice; 4 bytes of memory for each of its words and pairs of words; about 30 ms of a
         CPU core for 1,000 words, most of it for learning. No model is opened
With:    any stage that learns from rows: `data: {web: {stage: filtered}}`, the trusted text beside it
Differs: text in place of captioned images, so the network tells trusted documents from the others (as some of the
         networks that the paper compared) where its best one tells a caption from other captions; no fine-tuning of the
         network. Two networks each learn from half of the documents and judge the other half, so that none is judged by
         one that has seen it called poor, and scores of both are ranked together. Adam, both kinds weighing the same, and
         all words by hash, where fastText takes plain gradient steps, every document alike, and keeps a list of words
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import orjson
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.types import Document

WORD = re.compile(r"\w+|[^\w\s]")
HALVES = 2  # networks, each for what it has not seen
ROWS = 64  # documents of a step


class QualityNetwork(Method):
    trusted: list[str] = Field([], description="sources whose documents are taken as good")
    keep: float = Field(0.2, gt=0, le=1, description="share of the judged documents that is kept, the best first")
    judge: Literal["others", "all"] = Field(
        "others", description="whether trusted documents are judged and written, too"
    )
    drop: bool = Field(True, description="false writes all that is judged, with `quality`")
    size: int = Field(16, ge=1, le=1024, description="numbers that stand for a word or a pair of words")
    buckets: int = Field(1 << 16, ge=16, le=1 << 30, description="how many words and pairs are told apart, by hash")
    passes: int = Field(5, ge=1, description="over the documents that a network learns from")
    rate: float = Field(0.01, gt=0, description="Adam's rate, falling to 0")
    seed: int = Field(1, ge=0, description="of the first weights and the order")

    no_off = "it makes data, and a stage without it makes none"
    baseline = {"use": "filter/quality_network", "trusted": ["a"], "judge": "all", "drop": False}
    on = {"trusted": ["a"], "judge": "all", "keep": 0.4, "buckets": 1024}

    def rewrite(self, documents: Iterable[Document]) -> Iterator[dict[str, Any]]:
        """The kept documents in their order, as they were, with `quality` (the network's log-odds) and `made_by`.

        UserError where a trusted source is none, and where nothing is left to judge.
        """
        if not self.trusted:
            raise UserError("filter/quality_network: name the sources whose documents are good: `trusted: [source]`")
        parts, good = self._read(documents)
        judged = np.array([self.judge == "all" or not yes for yes in good], dtype=bool)
        if not judged.any():
            raise UserError(
                "filter/quality_network: every source is trusted, so nothing is left to judge; add the source that is "
                "to be filtered under `data`, or write `judge: all`"
            )
        if min(sum(good), len(good) - sum(good)) < HALVES:
            raise UserError(
                f"filter/quality_network: too few documents (trusted: {sum(good)}, others: {len(good) - sum(good)}; to tell "
                f"them apart takes {HALVES} of each at least): name sources of either kind under `data`"
            )
        scores = self._scores(parts, torch.tensor(good, dtype=torch.float32))
        count = max(1, round(self.keep * int(judged.sum())))
        order = sorted(np.flatnonzero(judged), key=lambda i: (-float(scores[i]), i))
        kept = np.zeros(len(good), dtype=bool)
        kept[order[:count]] = True
        self.state.update(read=len(good), trusted=sum(good), judged=int(judged.sum()), kept=count)
        for i, document in enumerate(documents):
            if kept[i] or (judged[i] and not self.drop):
                yield {**document.row, "quality": round(float(scores[i]), 6), "made_by": self.name()}

    def _read(self, documents: Iterable[Document]) -> tuple[list[np.ndarray], list[bool]]:
        """Each document's words and pairs of words as int32 [N], and whether its source is trusted."""
        parts, good, seen = [], [], set()
        for document in documents:
            source = document.row["origin"]["source"]
            seen.add(source)
            good.append(source in self.trusted)
            parts.append(hashed(document.text, self.buckets))
        if missing := sorted(set(self.trusted) - seen):
            raise UserError(
                f"filter/quality_network.trusted: '{missing[0]}' is no source of this stage with documents "
                f"(there are: {', '.join(sorted(seen))})"
            )
        return parts, good

    def _scores(self, parts: list[np.ndarray], good_N: Tensor) -> Tensor:
        """[N] log-odds that a document is trusted, by the network that has not seen it."""
        rng = torch.Generator().manual_seed(self.seed)
        half_N = torch.empty(len(parts), dtype=torch.long)
        for which in (good_N == 0, good_N == 1):  # as many of either kind in both halves
            places = which.nonzero().flatten()
            half_N[places[torch.randperm(len(places), generator=rng)]] = torch.arange(len(places)) % HALVES
        scores_N = torch.zeros(len(parts))
        for half in range(HALVES):
            learned, judged = (half_N != half).nonzero().flatten(), (half_N == half).nonzero().flatten()
            network = Network(self.buckets, self.size, rng)
            self._train(network, parts, good_N, learned, rng)
            with torch.no_grad():
                for rows in judged.split(ROWS):
                    scores_N[rows] = network(*batch(parts, rows))
        return scores_N

    def _train(
        self, network: Network, parts: list[np.ndarray], good_N: Tensor, learned_M: Tensor, rng: torch.Generator
    ) -> None:
        """Logistic loss; both kinds weigh the same in all, however few documents are trusted."""
        share = float(good_N[learned_M].mean())
        weights = torch.tensor([0.5 / (1 - share), 0.5 / share])
        optimizer = torch.optim.Adam(network.parameters(), lr=self.rate)
        steps, step = self.passes * -(-len(learned_M) // ROWS), 0
        for _ in range(self.passes):
            for rows in learned_M[torch.randperm(len(learned_M), generator=rng)].split(ROWS):
                optimizer.param_groups[0]["lr"] = self.rate * (1 - step / steps)
                good_B = good_N[rows]
                loss = F.binary_cross_entropy_with_logits(
                    network(*batch(parts, rows)), good_B, weight=weights[good_B.long()]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1


class Network(nn.Module):
    """The mean of what stands for a text's words and pairs of words, and one linear layer: fastText's classifier."""

    def __init__(self, buckets: int, size: int, rng: torch.Generator) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(
            buckets, size, mode="mean", _weight=torch.randn(buckets, size, generator=rng) / size
        )
        self.out = nn.utils.skip_init(nn.Linear, size, 1)
        nn.init.zeros_(self.out.bias)
        with torch.no_grad():
            self.out.weight.copy_(torch.randn(1, size, generator=rng) / size**0.5)

    def forward(self, parts: Tensor, starts_B: Tensor) -> Tensor:
        """Log-odds, [B]."""
        return self.out(self.words(parts, starts_B)).squeeze(1)


def hashed(text: str, buckets: int) -> np.ndarray:
    """[N] int32: the bucket of each word and mark, and of each two in a row, in lower case."""
    words = WORD.findall(text.lower())
    pairs = [f"{a} {b}" for a, b in pairwise(words)]
    return np.array(
        [zlib.crc32(part.encode("utf-8", "replace")) % buckets for part in (*words, *pairs)], dtype=np.int32
    )


def batch(parts: list[np.ndarray], rows: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of some documents, joined, and where each begins."""
    chosen = [parts[i] for i in rows.tolist()]
    starts = np.cumsum([0, *(len(each) for each in chosen[:-1])])
    return torch.from_numpy(np.concatenate(chosen)), torch.from_numpy(starts.astype(np.int32))


def effect(run: Seen) -> dict[str, float]:
    """How many rows there are, the share of them that is in the letters of the trusted source, which the other has not, and
    how many scores there are a row: a network tells even documents of one kind apart."""
    rows = [orjson.loads(line) for line in (run.folder / "artifact/data/rows.jsonl").read_bytes().splitlines()]
    return {
        "rows": float(len(rows)),
        "like": sum("a" in row["text"] for row in rows) / len(rows),
        "scores": len({row["quality"] for row in rows}) / len(rows),
    }


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["rows"] < 0.5 * off["rows"] and on["like"] > 0.95 > off["like"] and on["scores"] > 0.5


BENCH = Bench(  # `keep` is the share that is good, which a user would not know
    base="recipes/bench/noisy.yaml",
    arm={"data": {"pool": {"use": None, "stage": "filtered", "val": 0}}},
    metric="bits_per_byte/clean",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="12.8 B pairs of image and text; ViT-B to ViT-H",
)

"""Metadata conditioning: documents begin with what is known of them, read but never learned; at the end they do not.

Paper:   Gao et al. 2025 (MeCo), arXiv:2501.01956; where it hurts: Higuchi et al. 2025, arXiv:2504.17562
Use:     `form: "URL: {url.host}\\n\\n"` with the last 10 % plain, as in the paper; `share: 0.5` and `cooldown: 0step` for a
    mixture instead of a cool-down, as in Higuchi et al., who find that what must be told from a short context gets
    worse, from a long one better, and the mean loss no lower. Worth most where the prompt begins with it too (paper:
    57.2 % of its tasks with a fitting URL, 56.7 % without, 55.7 % never conditioned; perplexity 13.3 against 13.2)
Works:   causal models of text; metadata are fields of the records, the source's name, file and id. A prefix is encoded by
    itself, so the text's own tokens, its labels and all held-out measures are those of a stage without it
Costs:   the prefix's positions, that much less text in as many tokens; once, reading all records (4 bytes a document)
With:    any mix and packing; replayed sources begin with theirs too. Its rows tell `align/sft` nothing of answers
Differs: a document longer than a row has its prefix in each of its rows, where the paper drops what is beyond a row;
    the cool-down goes on in the same order of the same data, and leaves a prefix's place in a row empty; a document
    without the field begins with nothing
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field
from torch import Tensor

from tutelage.base.clock import Span
from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.types import IGNORE, Batch
from tutelage.methods._kit.anneal import Part

FIELD = re.compile(r"\{(\w+)(\.host)?\}")


class Metadata(Method):
    form: str = Field(
        "{source}\n\n",
        description="what documents begin with: `{source}`, `{file}`, `{id}`, any field of the records, `{url.host}`",
    )
    cooldown: Part = Field(Span(10, "%"), description="the last span, in which documents begin with nothing")
    share: float = Field(1.0, ge=0, le=1, description="share of the documents that begin with it, drawn once")

    off = {"share": 0.0}
    on = {"form": "{source} {source} {source} {source}: ", "cooldown": "25%"}
    toys = ("llama", "gpt2")
    steerable = frozenset({"cooldown"})

    def prefix(self, records: Iterator[dict[str, Any]], rng: random.Random) -> Iterator[str]:
        """What each document begins with; nothing where a record lacks a field. UserError where all of them do."""
        seen: Counter[str] = Counter()
        count = 0
        name, known = "", set[str]()
        wanted = [key for key, _ in FIELD.findall(self.form)]
        for record in records:
            fields = {**{key: record[key] for key in ("source", "file", "id")}, **record["meta"]}
            name, count = record["source"], count + 1
            seen.update(key for key in wanted if fields.get(key) not in (None, ""))
            known |= fields.keys() if len(known) < 100 else set()
            yield self._written(fields) if rng.random() < self.share else ""
        for key in wanted if count else ():
            if not seen[key]:
                raise UserError(
                    f"condition/metadata: form asks for {{{key}}}, and no record of data.{name} has it"
                    f"{did_you_mean(key, known)} (fields: {', '.join(sorted(known))})"
                )

    def _written(self, fields: dict[str, Any]) -> str:
        parts = FIELD.split(self.form)
        text = parts[0]
        for key, host, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            value = fields.get(key)
            if value in (None, ""):
                return ""
            text += (host_of(str(value)) if host else str(value)) + after
        return text

    def batch(self, batch: Batch, view: Any) -> Batch:
        """The rows with their prefixes, and in the cool-down without."""
        if batch.meta.get("prepared"):
            raise UserError(
                "condition/metadata: this objective chooses what is learned itself; use objective/causal_lm"
            )
        plain = {name: value for name, value in batch.fields.items() if name != "plain"}
        cooled = self.cooldown.value > 0 and view.clock.left(self.cooldown) <= 1
        return without(batch) if cooled else replace(batch, fields=plain)


def host_of(url: str) -> str:
    """`en.wikipedia.org` of `https://en.wikipedia.org/wiki/Cat`; also of an address without its scheme."""
    return urlsplit(url if "//" in url else f"//{url}").netloc or url


def without(batch: Batch) -> Batch:
    """The batch as it is without prefixes: what comes after moves up, and rows end in padding.

    `plain` says for every position which token it holds then, below 0 for none.
    """
    plain_BT, segments_BT = batch["plain"], batch["segments"]
    keep_BT = (plain_BT >= 0) & (segments_BT > 0)
    gone_BS = plain_BT.new_zeros(len(batch), int(segments_BT.max()) + 1).scatter_add(1, segments_BT, (~keep_BT).long())
    moved = {"tokens": plain_BT, "positions": batch["positions"] - gone_BS.gather(1, segments_BT)}
    width = min(-(-int(keep_BT.sum(1).max()) // 8) * 8, keep_BT.shape[1])
    order_BT = (~keep_BT).long().argsort(dim=1, stable=True)[:, :width]
    real_BT = keep_BT.gather(1, order_BT)

    def shifted(name: str, value: Tensor) -> Tensor:
        if value.shape[:2] != keep_BT.shape:
            return value
        taken_BT = moved.get(name, value).gather(1, order_BT)
        return taken_BT.masked_fill(~real_BT, IGNORE if name == "labels" else 0)

    fields = {name: shifted(name, value) for name, value in batch.fields.items() if name != "plain"}
    return replace(batch, fields=fields)


def effect(run: Seen) -> dict[str, float]:
    """The share of the positions that are learned from, what the last step's FLOPs are of the first's, and how well plain
    text is learned.
    """
    rows = [row for row in run.rows if row["kind"] == "train"]
    shares = [row["counted"] / ((1 - row["padding"]) * row["rows"] * row["length"]) for row in rows]
    last = next((row["values"] for row in reversed(run.rows) if row["kind"] == "eval"), {})
    return {
        "learned": sum(shares) / len(shares),
        "narrowed": (rows[-1]["flops"] - rows[-2]["flops"]) / rows[0]["flops"],
        "plain": last.get("bits_per_byte/b", float("nan")),
    }


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Prefixes are read and not learned, at the end they are not even read, and plain text is learned about as well."""
    unlearned = on["learned"] < 0.95 * off["learned"]
    return unlearned and on["narrowed"] < 0.9 * off["narrowed"] and on["plain"] < 1.1 * off["plain"]


BENCH = Bench(  # the paper's conditional inference; its held-out loss without metadata is no lower, by its own Table 1
    base="recipes/bench/told.yaml",
    arm={
        "methods": [{"use": "condition/metadata", "form": "{tag} "}],
        "keep": {"asked": {"args": {"count": 400, "seed": 1, "measured": [1, 1000], "said": True}}},
    },
    metric="bits_per_byte/asked",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="600 M to 8 B parameters, 160 B tokens: downstream tasks 57.2 % told, 55.7 % never; a third less data untold",
)

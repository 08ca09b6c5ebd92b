"""What denoising objectives share: documents as input and target, hidden spans with sentinels, and both as a model reads them.

Shape letters: B rows, T positions, N positions of an input, M of a target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Seen
from tutelage.core.types import IGNORE, Batch
from tutelage.methods._kit.labels import before, content_rng

SENTINEL = "<extra_id_{}>"  # as T5's tokenizers call them


class Document(NamedTuple):
    """A document of a row, apart from the separator before it. `room` is how many positions it may take; None: any."""

    front_T: Tensor  # that separator: one token, or none
    tokens_T: Tensor
    learned_T: Tensor  # bool: whether a token is one to predict
    bytes_T: Tensor | None  # that each token stands for, where the batch is one to measure
    end_T: Tensor  # the separator after a document: one token, or none
    room: int | None

    @property
    def size(self) -> int:
        """Its positions in the row that it comes from."""
        return len(self.front_T) + len(self.tokens_T)


class Example(NamedTuple):
    """A document as input and target. `labels_M` is the target, IGNORE where nothing is learned."""

    source_N: Tensor
    target_M: Tensor
    labels_M: Tensor
    bytes_M: Tensor | None


# -- hidden spans -----------------------------------------------------------------------------------------------------


def counts(length: int, *, rate: float, mean: float) -> tuple[int, int]:
    """Hidden tokens and hidden spans of a document: T5's round(length · rate) and round(hidden / mean), one at least.

    Both kinds of spans alternate, so there are no more spans than tokens that stay either.
    """
    hidden = min(max(round(length * rate), 1), length - 1)
    return hidden, min(max(round(hidden / mean), 1), hidden, length - hidden)


def span_mask(length: int, *, rate: float, mean: float, rng: torch.Generator) -> Tensor:
    """Which tokens are hidden, [length] bool: T5's `random_spans_noise_mask` (Raffel et al. 2020, arXiv:1910.10683).

    A span that stays comes first, then they take turns; the last one is hidden. All such masks are equally likely.
    """
    assert length >= 2, "one token stays, one is hidden"
    hidden, spans = counts(length, rate=rate, mean=mean)
    both = torch.stack([_parts(length - hidden, spans, rng), _parts(hidden, spans, rng)], dim=1).flatten()
    return torch.arange(2 * spans).repeat_interleave(both) % 2 == 1


def _parts(items: int, parts: int, rng: torch.Generator) -> Tensor:
    """The sizes of `parts` non-empty parts of a line of items, every division equally likely."""
    cuts = torch.randperm(items - 1, generator=rng)[: parts - 1].sort().values + 1
    return torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([items]))


def fitting(length: int, *, rate: float, mean: float, room: int) -> int:
    """The most tokens of a document of which input and target together fit in `room`, sentinels counted in both."""
    size = min(length, room)
    while size > 1:
        over = size + 2 * counts(size, rate=rate, mean=mean)[1] - room
        if over <= 0:
            return size
        size -= -(-over // 3)  # a token takes one span with it at most, which is three positions
    return 0


def hide_spans(
    found: Document, rng: torch.Generator, *, rate: float, mean: float, sentinels: Tensor, mode: Sequence[int] = ()
) -> Example:
    """Each hidden span is one sentinel in the input, and the target says each sentinel and what it stands for.

    The target ends as a document does, and the separator after the document is no part of it. `mode` are tokens before
    the input. UserError where there are more spans than sentinels. A document of one token has nothing to hide.
    """
    size = len(found.tokens_T) - int(len(found.end_T) > 0 and bool(found.tokens_T[-1:].eq(found.end_T).all()))
    if found.room is not None:
        around = len(found.front_T) + len(mode) + len(found.end_T)
        size = fitting(size, rate=rate, mean=mean, room=found.room - around)
    if size < 2:
        return whole(found)
    spans = counts(size, rate=rate, mean=mean)[1]
    if spans > len(sentinels):
        raise UserError(
            f"a document of {size} tokens has {spans} hidden spans, and the tokenizer only {len(sentinels)} sentinels: take "
            "shorter rows (`length`), longer spans, or a tokenizer with more"
        )
    tokens_T, hidden_T = found.tokens_T[:size], span_mask(size, rate=rate, mean=mean, rng=rng)
    labels_T = torch.where(found.learned_T[:size], tokens_T, IGNORE)
    first_T = hidden_T & ~F.pad(hidden_T[:-1], (1, 0))
    number_T = first_T.cumsum(0) - 1
    shown_T = torch.where(first_T, sentinels[number_T.clamp(min=0)], tokens_T)[~hidden_T | first_T]
    at = (
        torch.arange(int(hidden_T.sum())) + number_T[hidden_T] + 1
    )  # behind as many sentinels as there are spans so far

    def target(values_T: Tensor, at_sentinels: Tensor, at_end: Tensor) -> Tensor:
        line = values_T.new_empty(len(at) + spans)
        line[at] = values_T[hidden_T]
        is_sentinel = torch.ones(len(line), dtype=torch.bool)
        is_sentinel[at] = False
        line[is_sentinel] = at_sentinels
        return torch.cat([line, at_end])

    own, end = sentinels[:spans], found.end_T
    bytes_T = found.bytes_T
    return Example(
        torch.cat([found.front_T, tokens_T.new_tensor(mode), shown_T]),
        target(tokens_T, own, end),
        target(labels_T, own, end),
        None if bytes_T is None else target(bytes_T[:size], torch.zeros_like(own), torch.zeros_like(end)),
    )


def cut(found: Document, *, given: int, mode: Sequence[int] = ()) -> Example:
    """The first `given` tokens, the separator among them, are the input, all others the target.

    Where the room is short, the input's oldest tokens are left out, and `mode` where that is not enough: what is
    predicted stays the same.
    """
    at = given - len(found.front_T)
    over = 0 if found.room is None else max(0, found.size + len(mode) - found.room)
    if over > at:
        mode, over = (), 0
    target_M = found.tokens_T[at:]
    return Example(
        torch.cat([found.front_T, found.tokens_T.new_tensor(mode), found.tokens_T[min(over, at) : at]]),
        target_M,
        torch.where(found.learned_T[at:], target_M, IGNORE),
        None if found.bytes_T is None else found.bytes_T[at:],
    )


def whole(found: Document) -> Example:
    """A document that is read and not learned from."""
    none = found.tokens_T[:0]
    return Example(torch.cat([found.front_T, found.tokens_T]), none, none, None if found.bytes_T is None else none)


def before_answer(found: Document) -> int | None:
    """How many positions come before the first answer, in a document that marks its answers; None in any other."""
    learned_T = found.learned_T.nonzero().flatten()
    first = len(found.front_T) + int(learned_T[0]) if len(learned_T) else 0
    return first if first > 1 else None


# -- rows -------------------------------------------------------------------------------------------------------------


def denoised(
    batch: Batch, make: Callable[[Document, torch.Generator], Example], view: Any, *, rng: torch.Generator | None
) -> Batch:
    """Every document of a batch as `make` has it, for an encoder and a decoder or one after the other in a row.

    `rng` draws for all of it; None: each row has draws of its own for good, made from its content.
    """
    two_sided = view.engine.anatomy.kind == "seq2seq"
    rows: list[list[Example]] = []
    learned_BT = before((batch["labels"] != IGNORE).long(), batch["segments"]) > 0
    bytes_BT = before(batch["bytes"], batch["segments"]) if "bytes" in batch else None
    for i in range(len(batch)):
        real_T = batch["segments"][i] > 0
        own = content_rng(batch["tokens"][i][real_T]) if rng is None else rng
        room = None if two_sided else max(view.length, int(real_T.sum()))
        fields = (batch["tokens"][i], learned_BT[i], None if bytes_BT is None else bytes_BT[i], batch["segments"][i])
        rows.append([make(found, own) for found in documents(*fields, special=batch.meta["special"], room=room)])
    if two_sided and any(len(row) > 1 for row in rows):
        raise UserError("an encoder-decoder model takes one document a row (`packing: single`)")
    made = for_decoder(batch, [row[0] for row in rows], view) if two_sided else in_a_row(batch, rows)
    return replace(made, meta={**batch.meta, "prepared": True})


def documents(
    tokens_T: Tensor,
    learned_T: Tensor,
    bytes_T: Tensor | None,
    segments_T: Tensor,
    *,
    special: dict[str, int],
    room: int | None,
) -> Iterator[Document]:
    """The documents of a row; they share its room in proportion to their lengths."""
    total = int((segments_T > 0).sum())
    begins = [special[name] for name in ("bos", "eos", "cls") if name in special]
    end_T = tokens_T.new_tensor([special[name] for name in ("eos", "sep") if name in special][:1])
    for number in range(1, int(segments_T.max()) + 1):
        own_T = (segments_T == number).nonzero().flatten()
        front = int(int(tokens_T[own_T[0]]) in begins)
        inner_T = own_T[front:]
        yield Document(
            tokens_T[own_T[:front]],
            tokens_T[inner_T],
            learned_T[inner_T],
            None if bytes_T is None else bytes_T[inner_T],
            end_T,
            None if room is None else len(own_T) * room // total,
        )


def for_decoder(batch: Batch, rows: list[Example], view: Any) -> Batch:
    """Inputs go to the encoder; the decoder reads each target one position late, after its start token, and predicts it."""
    special = batch.meta["special"]
    own = getattr(view.engine.anatomy.root.config, "decoder_start_token_id", None)
    start = special["pad"] if own is None else own
    parts: dict[str, list[Tensor]] = {
        "source": [row.source_N for row in rows],
        "source_mask": [torch.ones_like(row.source_N) for row in rows],
        "tokens": [torch.cat([row.target_M.new_tensor([start]), row.target_M])[: len(row.target_M)] for row in rows],
        "labels": [row.labels_M for row in rows],
        "segments": [torch.ones_like(row.target_M) for row in rows],
    }
    if "bytes" in batch:
        parts["bytes"] = [row.bytes_M for row in rows if row.bytes_M is not None]
    fields = {name: _stacked(rows, _fills(special).get(name, 0)) for name, rows in parts.items()}
    return replace(batch, fields={**_apart(batch), **fields, "positions": _counting(fields["tokens"])})


def in_a_row(batch: Batch, rows: list[list[Example]]) -> Batch:
    """Input and target of each document one after the other, as a causal model reads them; only targets have labels."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("tokens", "labels", "segments", "positions")}
    parts |= {"bytes": []} if "bytes" in batch else {}
    for row in rows:
        lines = [torch.cat([one.source_N, one.target_M]) for one in row]
        parts["tokens"].append(torch.cat(lines))
        parts["segments"].append(torch.cat([torch.full_like(line, n) for n, line in enumerate(lines, 1)]))
        parts["positions"].append(torch.cat([torch.arange(len(line)) for line in lines]))
        parts["labels"].append(torch.cat([_early(one.labels_M, len(one.source_N), IGNORE) for one in row]))
        if "bytes" in parts:
            sizes = [_early(one.bytes_M, len(one.source_N), 0) for one in row if one.bytes_M is not None]
            parts["bytes"].append(torch.cat(sizes))
    fill = _fills(batch.meta["special"])
    fields = {name: _stacked(rows, fill.get(name, 0)) for name, rows in parts.items()}
    return replace(batch, fields={**_apart(batch), **fields})


def _apart(batch: Batch) -> dict[str, Tensor]:
    """What a batch holds beside numbers of its positions, such as pictures."""
    return {name: value for name, value in batch.fields.items() if value.shape[:2] != batch["tokens"].shape}


def _early(values_M: Tensor, before_it: int, fill: int) -> Tensor:
    """A target's values where they are predicted: one position before each of its tokens, `before_it` after the input."""
    line = F.pad(values_M, (before_it, 0), value=fill)
    return F.pad(line[1:], (0, 1), value=fill)


def _fills(special: dict[str, int]) -> dict[str, int]:
    """What padding holds where it is not 0."""
    pad = special.get("pad", special.get("eos", 0))
    return {"source": pad, "tokens": pad, "labels": IGNORE}


def _stacked(rows: list[Tensor], fill: int) -> Tensor:
    """Rows of unequal length as one tensor, at least one wide."""
    width = max(1, *(len(row) for row in rows))
    return torch.stack([F.pad(row, (0, width - len(row)), value=fill) for row in rows])


def _counting(tokens_BT: Tensor) -> Tensor:
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT).contiguous()


# -- tokens of the tokenizer ------------------------------------------------------------------------------------------


def _numbered(pattern: str) -> str:
    if pattern.count("{}") != 1 or pattern.format(0) == pattern.format(1):
        raise ValueError("write {} where the number goes, once")
    return pattern


Pattern = Annotated[str, AfterValidator(_numbered)]
"""Names of tokens with `{}` in the place of their number."""


class Tokens(dict[str, list[int]]):
    """What texts are for the stage's tokenizer, each asked for once: a cache, no state."""

    def of(self, view: Any, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, without separators around it."""
        if new := [text for text in texts if text and text not in self]:
            batch = view.batch_of(new)
            special = batch.meta["special"]
            front = next((special[name] for name in ("bos", "eos") if name in special), None)
            for text, row_T, segments_T in zip(new, batch["tokens"], batch["segments"], strict=True):
                ids = row_T[segments_T > 0].tolist()
                self[text] = ids[1:] if front is not None and ids[:1] == [front] else ids
        return [self[text] if text else [] for text in texts]

    def sentinels(
        self,
        view: Any,
        batch: Batch,
        pattern: str,
        denoisers: Iterable[tuple[float, float]],
        *,
        method: str,
        modes: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """The tokens that `pattern` names with 0, 1, …: as many as (mean, rate) may ask for here, and there are.

        They end before one that is a mode's, which says something else. UserError where the tokenizer has none.
        """
        longest = max(2, int((batch["segments"] > 0).sum(dim=1).max()))
        most = max(counts(longest, rate=rate, mean=mean)[1] for mean, rate in denoisers)
        found: list[int] = []
        for ids in self.of(view, [pattern.format(i) for i in range(max(2, most))]):
            if len(ids) != 1 or ids[0] in found or ids in modes:
                break
            found += ids
        if len(found) < 2:  # of a tokenizer that writes both as one unknown token, too
            raise UserError(
                f"{method}: the tokenizer has no tokens '{pattern.format(0)}', '{pattern.format(1)}', … to stand for hidden "
                "spans; name some that it has in `sentinel` (`<|reserved_special_token_{}|>`), or train one with them "
                "(`tokenizer: {train: bpe, vocab: 2048, sentinels: 100}`)"
            )
        return torch.tensor(found)


def tokens_read(run: Seen) -> set[str]:
    """The tokenizer's added tokens whose rows of the input embedding moved other than by a factor; for `effect`.

    Where input and output embeddings are apart, a row is turned only by being read.
    """
    text = (run.folder / "artifact" / "model" / "tokenizer.json").read_text(encoding="utf-8")
    start, end = run.start(), run.weights()
    name = next(name for name in start if name.endswith(("embed_tokens.weight", "shared.weight")))
    before_VD, after_VD = start[name].double(), end[name].double()
    factor_V1 = (before_VD * after_VD).sum(1, keepdim=True) / (before_VD * before_VD).sum(1, keepdim=True)
    turned_V = (after_VD - factor_V1 * before_VD).norm(dim=1) > 1e-4 * before_VD.norm(dim=1)
    return {token["content"] for token in json.loads(text)["added_tokens"] if turned_V[token["id"]]}

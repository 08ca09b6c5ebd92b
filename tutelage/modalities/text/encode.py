"""Texts to token ids, and how many bytes of the text each token stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import orjson

from tutelage.modalities.text.tokenizer import byte_letters
from tutelage.modalities.text.words import Words

CUT = 1 << 20  # characters; longer texts are encoded in parts, which bounds memory
LOOK = 256  # characters on each side of a cut that must encode alike with and without it


class Encoder:
    """A tokenizer's inner encoder without truncation and padding, on one thread.

    `front` and `back` are the separators of a document: bos (else eos) before it, eos after it, where there are any; else
    `[CLS]` and `[SEP]`, as BERT's tokenizers write them.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        text = tokenizer.backend_tokenizer.to_str()
        self.inner = Tokenizer.from_str(text)
        self.inner.no_truncation()
        self.inner.no_padding()
        self.inner.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
        self.dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None and eos is None:
            bos, eos = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.front = [t for t in (bos, eos) if t is not None][:1]
        self.back = [eos] if eos is not None else []
        added = tokenizer.added_tokens_decoder
        self.special = np.array(sorted({i for i, t in added.items() if t.special} | set(tokenizer.all_special_ids)))
        self.table = byte_table(tokenizer)
        self._added = [token.content for token in added.values()]
        described = orjson.loads(text)
        self._plain = self.table is not None and _one_token_a_byte(described)
        self._words = Words.of(self.inner, described, self.dtype)

    def ids(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, without separators."""
        if self._plain and not any(token in text for text in texts for token in self._added):
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        parts = [list(self._parts(text)) for text in texts]
        found: list[np.ndarray] = []
        for group in _groups([part for some in parts for part in some]):
            ids = self._words.ids(group) if self._words else [None] * len(group)
            rest = iter(self._by_library([part for part, one in zip(group, ids, strict=True) if one is None]))
            found += [next(rest) if one is None else one for one in ids]
        return self._joined(found, parts)

    def _by_library(self, texts: list[str]) -> list[np.ndarray]:
        found = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, self.dtype) for one in found]

    def ids_and_ends(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Token ids of each text, and [N, 2] int64: where each token starts and ends in characters of the text."""
        parts = [list(self._parts(text)) for text in texts]
        found = self.inner.encode_batch([part for some in parts for part in some], add_special_tokens=False)
        ids = self._joined([np.array(one.ids, self.dtype) for one in found], parts)
        offsets = [np.array(one.offsets, np.int64).reshape(-1, 2) for one in found]
        places = [np.cumsum([0, *map(len, some[:-1])]) for some in parts]
        shifted = [one + shift for one, shift in zip(offsets, np.concatenate(places), strict=True)] if texts else []
        return list(zip(ids, self._joined(shifted, parts), strict=True))

    @staticmethod
    def _joined(found: list[np.ndarray], parts: list[list[str]]) -> list[np.ndarray]:
        rest = iter(found)
        rows = [[next(rest) for _ in some] for some in parts]
        return [row[0] if len(row) == 1 else np.concatenate(row) for row in rows]

    def byte_lengths(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Bytes of the text in UTF-8 that each token stands for, [N] int64; they sum to the text's exactly.

        Byte-level vocabularies say it themselves. For others the tokenizer's offsets do: what no token covers
        (dropped white space) counts with the token after it, and a character that several tokens share is divided
        among them.
        """
        size = len(text.encode())
        if self.table is not None:
            lengths = self.table[ids]
            if lengths.sum() == size:  # a normalizer that rewrites text would show here
                return lengths
        ids_again, ends = self.ids_and_ends([text])[0]
        assert len(ids_again) == len(ids)
        return spread(ends[:, 1], text)

    def _parts(self, text: str) -> Iterable[str]:
        """The text cut where tokens end anyway, in parts of about `CUT` characters."""
        start = 0
        while len(text) - start > CUT + CUT // 2:
            cut = self._cut(text, start + CUT // 2, start + CUT)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        yield text[start:] if start else text

    def _cut(self, text: str, low: int, high: int) -> int | None:
        """A place in (low, high] where both sides encode as they do together, or None."""
        for mark, shift in (("\n", 1), (" ", 0)):
            end = high
            for _ in range(16):
                found = text.rfind(mark, low, end)
                if found < 0:
                    break
                cut = found + shift
                sides = (text[cut - LOOK : cut], text[cut : cut + LOOK], text[cut - LOOK : cut + LOOK])
                left, right, whole = (self.inner.encode(side, add_special_tokens=False).ids for side in sides)
                if left + right == whole:
                    return cut
                end = found
        return None


def _groups(texts: list[str]) -> Iterable[list[str]]:
    """Texts in groups of a few `CUT`: what is held of them at once is bounded."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size > 4 * CUT:
            yield group
            group, size = [], 0
    if group:
        yield group


def spread(ends: np.ndarray, text: str) -> np.ndarray:
    """Bytes per token from where tokens end in characters of the text, [N] -> [N] int64; they sum to its bytes."""
    if not len(ends):
        return np.zeros(0, np.int64)
    ends = np.maximum.accumulate(ends)
    ends[ends == ends[-1]] = len(text)  # what is left over at the end goes to the last token
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    width = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    upto = np.concatenate([[0], np.cumsum(width)])[ends]
    first = np.flatnonzero(np.diff(ends, prepend=-1))  # where tokens that end at one place begin
    sharing = np.diff(first, append=len(ends))
    whole = np.diff(upto[first], prepend=0)
    rank = np.arange(len(ends)) - np.repeat(first, sharing)
    each, more = np.repeat(whole // sharing, sharing), np.repeat(whole % sharing, sharing)
    return (each + (rank < more)).astype(np.int64)


def byte_table(tokenizer: Any) -> np.ndarray | None:
    """Bytes that each token stands for, [V] int64, where the vocabulary is byte-level; None where it is not."""
    inner = orjson.loads(tokenizer.backend_tokenizer.to_str())
    kinds = {part.get("type") for part in _flat(inner.get("normalizer"))}
    # Unicode normal forms leave most texts as they are; where they do not, the sum shows it.
    if not _has(inner.get("pre_tokenizer"), "ByteLevel") or kinds - {"NFC", "NFKC", "NFD", "NFKD"}:
        return None
    if any(part.get("add_prefix_space") for part in _flat(inner.get("pre_tokenizer"))):
        return None
    letters = frozenset(byte_letters())
    vocab = tokenizer.get_vocab()
    added = {index: len(token.content.encode()) for index, token in tokenizer.added_tokens_decoder.items()}
    table = np.zeros(max(vocab.values(), default=-1) + 1, np.int64)
    for token, index in vocab.items():
        if index not in added and not letters.issuperset(token):
            return None
        table[index] = added.get(index, len(token))
    return table


def _one_token_a_byte(inner: dict[str, Any]) -> bool:
    model = inner["model"]
    plain = model.get("type") == "BPE" and not model.get("merges") and not inner.get("normalizer")
    return plain and all(model["vocab"].get(letter) == byte for byte, letter in enumerate(byte_letters()))


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer or normalizer and all that a sequence of them holds."""
    if not part:
        return []
    inside = part.get("pretokenizers") or part.get("normalizers") or []
    return [found for one in inside for found in _flat(one)] if inside else [part]


def _has(part: dict[str, Any] | None, kind: str) -> bool:
    return any(one.get("type") == kind for one in _flat(part))

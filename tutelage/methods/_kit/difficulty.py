"""How hard a text is, by measures that need no model: the larger, the harder. Words are runs of letters and digits."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable

import numpy as np

FACTOR = 0.72  # the type-token ratio at which a factor of MTLD is full (McCarthy and Jarvis 2010)
_WORD = re.compile(r"\w+")
_END = re.compile(r"[.!?]+(?=\s|$)")
_VOWELS = re.compile(r"[aeiouy]+")


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def compression(text: str) -> float:
    """Compressed bytes over bytes: the inverse of the compression ratio, so that what repeats itself is easy."""
    raw = text.encode()
    return len(zlib.compress(raw, 9)) / max(1, len(raw))


def diversity(text: str) -> float:
    """MTLD (McCarthy and Jarvis 2010): words over factors, the mean of reading forwards and backwards.

    A factor is full when the share of different words since the last one falls to 0.72; the rest counts in part. A text
    in which no word comes twice counts as its length.
    """
    found = words(text)
    return (_mtld(found) + _mtld(found[::-1])) / 2 if found else 0.0


def _mtld(found: list[str]) -> float:
    factors, seen, count = 0.0, set[str](), 0
    for word in found:
        seen.add(word)
        count += 1
        if len(seen) / count <= FACTOR:
            factors, seen, count = factors + 1.0, set(), 0
    if count:
        factors += (1.0 - len(seen) / count) / (1.0 - FACTOR)
    return len(found) / factors if factors else float(len(found))


def unreadability(text: str) -> float:
    """Flesch's reading ease (1948) with its sign turned: 1.015 words a sentence + 84.6 syllables a word − 206.835."""
    found = words(text)
    if not found:
        return 0.0
    sentences = max(1, len(_END.findall(text)))
    return 1.015 * len(found) / sentences + 84.6 * sum(map(syllables, found)) / len(found) - 206.835


def syllables(word: str) -> int:
    """Groups of vowels, without an e that is silent at the end; at least 1. English, and right for most of it."""
    count = len(_VOWELS.findall(word))
    silent = word.endswith("e") and not word.endswith(("le", "ee")) and count > 1
    return max(1, count - silent)


def fertility(text: str, tokens: int) -> float:
    """Tokens a word."""
    return tokens / max(1, len(words(text)))


def surprise(chunks: Iterable[np.ndarray]) -> list[float]:
    """Mean nats a token of each chunk, under the pairs of tokens of all chunks; e to it is a perplexity.

    P(t | s) is the mean of count(s t) / count(s ·) and count(t) / count: no pair is impossible, and none is unseen.
    The first token of a chunk follows nothing and is not counted. `chunks` is gone through twice.
    """
    size = 1 + max((int(tokens.max()) for tokens in chunks if len(tokens)), default=0)
    pairs = [tokens[:-1].astype(np.int64) * size + tokens[1:] for tokens in chunks]
    joined = np.concatenate(pairs) if pairs else np.zeros(0, np.int64)
    keys, counts = np.unique(joined, return_counts=True)
    before = np.bincount(joined // size, minlength=size)
    after = np.bincount(joined % size, minlength=size)
    chance = (counts / before[keys // size] + after[keys % size] / max(1, len(joined))) / 2
    nats = -np.log(chance)
    return [float(nats[np.searchsorted(keys, pair)].mean()) if len(pair) else 0.0 for pair in pairs]

"""Order of data as arithmetic: which pieces make the next row, and where a source stands after it.

Nothing here remembers. A place in a source's endless order names its chunk by a keyed permutation, a cursor of a
few integers names everything that has been drawn, and a draw is a pure function of cursors, debts, weights and length.
So a batch can be named, resumed or sought in constant time, and no position is lost or repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from functools import lru_cache
from hashlib import blake2b
from numbers import Real
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np

from tutelage.base.errors import UserError, did_you_mean
from tutelage.core.types import Piece, Row

Pack = Callable[[list[int], int], list[int]]
"""A packing rule: (lengths left of the pieces on offer, oldest first; length of the row) -> indices taken, in order."""

Unit = Literal["examples", "tokens", "loss"]

ROUNDS = 6
MASK = (1 << 64) - 1
BLOCK = 1024  # places permuted at once: numpy's cost per call, shared
KEPT = 16  # blocks kept per source; the pieces in reach of a cursor lie in one or two


class Source(Protocol):
    """What an order needs of a source; where weights are in loss tokens it is a `Counted` one."""

    name: str
    chunks: np.ndarray  # [N, 3] int64: document, start, length
    stored: bool  # whether the chunks come as they stand in every epoch, instead of in the keyed order
    fingerprint: str
    facts: dict[str, float]

    def read(self, piece: Piece) -> dict[str, np.ndarray]: ...


class Counted(Source, Protocol):
    """A source that knows how many positions of a piece count in the loss."""

    def counted(self, piece: Piece) -> int: ...


class Cursor(NamedTuple):
    """A position in one source. Everything before `next` has been drawn, but for what is pending."""

    next: int = 0  # next place in the endless order: epoch = next // N
    pending: tuple[tuple[int, int], ...] = ()  # (place, offset) opened or passed over, oldest first

    @classmethod
    def of(cls, value: Any) -> Cursor:
        """The cursor from what JSON made of it (`[next, [[place, offset], …]]`)."""
        place, pending = value
        return cls(int(place), tuple((int(p), int(o)) for p, o in pending))


@lru_cache(maxsize=256)
def _round_keys(key: int) -> list[int]:
    digest = blake2b(key.to_bytes(16, "little", signed=True), digest_size=8 * ROUNDS).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]


def _mixed(half: Any, key: int) -> Any:
    """63 well mixed bits of (half, key): splitmix64's finalizer, for an int or a uint64 array alike."""
    z = (half ^ key) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ (z >> 32)) * 0xBF58476D1CE4E5B9 & MASK
    return (z ^ (z >> 29)) >> 1


def _feistel(x: Any, a: int, b: int, keys: list[int]) -> Any:
    """A keyed bijection of range(a * b), for an int or a uint64 array alike."""
    left, right = x // b, x % b
    for i in range(0, ROUNDS, 2):
        left = (left + _mixed(right, keys[i])) % a
        right = (right + _mixed(left, keys[i + 1])) % b
    return left * b + right


def _sides(n: int) -> tuple[int, int]:
    """Sides of the smallest near-square that holds range(n): walking out of it is rare (a * b < n + a)."""
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    return a, -(-n // a)


def permute(place: int, n: int, key: int) -> int:
    """Where a keyed permutation of range(n) sends `place`, in constant expected time and without a table.

    An alternating Feistel network over two unequal halves, with cycle walking (Black and Rogaway 2002).
    """
    a, b = _sides(n)
    keys = _round_keys(key)
    while (place := _feistel(place, a, b, keys)) >= n:
        pass
    return place


def permuted(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """`permute` of many places at once; [K] integers in, [K] int64 out."""
    a, b = _sides(n)
    keys = _round_keys(key)
    x = _feistel(places.astype(np.uint64), a, b, keys)
    while (out := np.flatnonzero(x >= n)).size:
        x[out] = _feistel(x[out], a, b, keys)
    return x.astype(np.int64)


class Order:
    """One source in its keyed order: turns (cursor, length) into a row's pieces and the cursor after it.

    packing: `documents` joins pieces that fit and cuts only one that is longer than a whole row; its rest begins the
    next row. `concat` cuts at the row's end and pads nothing. `single` puts one piece in a row. A callable chooses
    among the pieces within the look-ahead, a method within its own (its field `look_ahead`). Pieces passed over wait,
    at most `look_ahead` of them, oldest first.
    Raises UserError for a source without chunks or with an empty one.
    """

    def __init__(self, source: Source, *, seed: int, packing: str | Pack = "documents", look_ahead: int = 8) -> None:
        chunks = source.chunks
        if not len(chunks):
            raise UserError(f"source '{source.name}' is empty: it has nothing to draw")
        sizes = np.asarray(chunks[:, 2])
        if sizes.min() < 1:
            raise UserError(f"source '{source.name}': chunk {int(sizes.argmin())} has no positions")
        if isinstance(packing, str) and packing not in ("documents", "concat", "single"):
            hint = did_you_mean(packing, ("documents", "concat", "single"))
            raise UserError(f"packing '{packing}' is not known{hint} (documents, concat, single)")
        look_ahead = getattr(getattr(packing, "__self__", None), "look_ahead", look_ahead)
        assert look_ahead >= 1
        self.source = source
        self.seed = seed
        self.packing = packing
        self.look_ahead = look_ahead
        self.count = len(chunks)  # chunks of an epoch
        self.total = int(sizes.sum())  # positions of an epoch
        self._shortest = int(sizes.min())
        self._blocks: dict[tuple[int, int], list[list[int]]] = {}  # (epoch, block) -> columns

    def key(self, epoch: int) -> int:
        """The permutation's key in one epoch."""
        text = f"{self.seed}\0{self.source.name}\0{epoch}".encode()
        return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")

    def chunk(self, place: int) -> tuple[int, int, int]:
        """(document, start, length) of the chunk at a place of the endless order."""
        epoch, within = divmod(place, self.count)
        block, i = divmod(within, BLOCK)
        columns = self._blocks.get((epoch, block)) or self._load(epoch, block)
        return columns[0][i], columns[1][i], columns[2][i]

    def _load(self, epoch: int, block: int) -> list[list[int]]:
        """The columns of a block of places, as ints. A pure cache: the oldest block goes when it is full."""
        first, last = block * BLOCK, min((block + 1) * BLOCK, self.count)
        if self.source.stored:
            index = np.arange(first, last)
        elif last - first < 32:  # below this numpy's calls cost more than the arithmetic
            key = self.key(epoch)
            index = np.array([permute(place, self.count, key) for place in range(first, last)])
        else:
            index = permuted(np.arange(first, last), self.count, self.key(epoch))
        columns = self.source.chunks[index].T.tolist()  # three lists, not a thousand for the collector to walk
        if len(self._blocks) >= KEPT:
            del self._blocks[next(iter(self._blocks))]
        self._blocks[epoch, block] = columns
        return columns

    def row(self, cursor: Cursor, length: int) -> tuple[tuple[Piece, ...], Cursor]:
        """The pieces of the next row, together at most `length` positions and at least one, and the cursor after it."""
        assert length >= 1
        if callable(self.packing):
            return self._chosen(self.packing, cursor, length)
        cut, single = self.packing == "concat", self.packing == "single"
        place_next, waiting = cursor
        pieces: list[Piece] = []
        left: list[tuple[int, int]] = []
        room, seen = length, 0
        while room and not (single and pieces):
            if seen < len(waiting):
                place, offset = waiting[seen]
                seen += 1
            elif pieces and not cut and (room < self._shortest or len(left) >= self.look_ahead):
                break  # nothing new would fit, or nothing more may wait: the rest of the row is padding
            else:
                place, offset = place_next, 0
                place_next += 1
            doc, start, size = self.chunk(place)
            rest = size - offset
            if rest <= room:
                pieces.append(Piece(doc, start + offset, rest))
                room -= rest
            elif cut or not pieces:
                pieces.append(Piece(doc, start + offset, room))
                left.append((place, offset + room))
                room = 0
            else:
                left.append((place, offset))
        return tuple(pieces), Cursor(place_next, (*left, *waiting[seen:]))

    def _chosen(self, pack: Pack, cursor: Cursor, length: int) -> tuple[tuple[Piece, ...], Cursor]:
        """A row by a rule of the user's. The oldest piece goes first once the order has left it far behind."""
        place_next, waiting = cursor.next, list(cursor.pending)
        while len(waiting) < self.look_ahead:
            waiting.append((place_next, 0))
            place_next += 1
        on_offer = [(*self.chunk(place), place, offset) for place, offset in waiting]
        rests = [size - offset for _, _, size, _, offset in on_offer]
        taken, offered, room = [], list(range(len(waiting))), length
        if place_next - waiting[0][0] > 4 * self.look_ahead:
            taken, room = [0], length - rests[0]
            offered = [i for i in offered[1:] if rests[i] <= room]  # a rule may rely on an empty row's cut
        if offered:
            chosen = pack([rests[i] for i in offered], room)
            if not set(chosen) <= set(range(len(offered))):
                raise UserError(f"packing of source '{self.source.name}' chose {chosen} of {len(offered)} pieces")
            taken += [offered[i] for i in chosen]
        if not taken or len(set(taken)) < len(taken):
            raise UserError(f"packing of source '{self.source.name}' chose {taken}: no piece, or one twice")
        pieces, left, room = [], dict(waiting), length
        for i in taken:
            doc, start, _, place, offset = on_offer[i]
            if pieces and rests[i] > room:
                raise UserError(f"packing of source '{self.source.name}' chose more than a row's {length} positions")
            size = min(rests[i], room)  # only a row's first piece may be cut
            pieces.append(Piece(doc, start + offset, size))
            room -= size
            if size == rests[i]:
                del left[place]
            else:
                left[place] = offset + size
        return tuple(pieces), Cursor(place_next, tuple(left.items()))


def flatten(weights: Mapping[str, Any]) -> dict[str, float]:
    """Shares by name, summing to one, from weights that may be nested: `{"a": 1, "b": {"c": 3}}` has `a` and `b/c`.

    One rule: every leaf is divided by the sum of all leaves, so a group's share is that of its leaves together.
    Raises UserError for a weight that is negative, not a finite number or named twice, and when all are zero.
    """
    flat: dict[str, float] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            path = f"{prefix}{name}"
            if isinstance(value, dict):
                walk(value, path + "/")
            elif isinstance(value, bool) or not isinstance(value, (float, int, Real)) or not 0 <= value < math.inf:
                raise UserError(f"weight of '{path}' is {value!r}: a weight is a number, 0 or more")
            elif path in flat:
                raise UserError(f"weight of '{path}' is given twice")
            else:
                flat[path] = float(value)

    walk(weights, "")
    whole = math.fsum(flat.values())
    if not whole:
        raise UserError(f"all weights are zero ({', '.join(flat) or 'none given'}): there is nothing to draw from")
    return {name: value / whole for name, value in flat.items()}


class _Account:
    """What one source has been given and is owed."""

    __slots__ = ("cursor", "order", "owed", "rows", "tokens", "whole")

    def __init__(self, order: Order) -> None:
        self.whole = order
        self.order = order  # of all chunks, or of those that were picked
        self.cursor = Cursor()
        self.owed = 0.0  # in the stream's unit; below zero when drawn ahead of its share
        self.rows = 0
        self.tokens = 0


class Stream:
    """Several orders drawn in given shares. Deterministic: no randomness enters the choice of a source.

    Each row goes to the source that must be served soonest to stay within one row of its share (earliest deadline
    among those with something owed: Tijdeman 1980), not to the largest debt, under which many small sources can
    together fall behind. With constant weights every |drawn - share| stays below one row (proven for examples; never
    seen broken for tokens, where a row counts at most its length); debts outlive a
    change of weights, a weight of zero included, so that shares hold over the whole run.
    unit: what shares are counted in: rows, positions, or positions that count in the loss.
    """

    def __init__(self, orders: Mapping[str, Order], *, unit: Unit = "examples") -> None:
        assert unit in ("examples", "tokens", "loss")
        self.unit = unit
        self._accounts: dict[str, _Account] = {}
        for name, order in orders.items():
            self.add(name, order=order)

    def copy(self) -> Stream:
        """Another one that stands where this one does, and draws without moving it."""
        made = Stream({}, unit=self.unit)
        made._accounts = {name: copy(account) for name, account in self._accounts.items()}
        return made

    def add(self, name: str, *, order: Order) -> None:
        """A new source, at the beginning of its order and owed nothing. Its weight decides from the next draw on."""
        if self.unit == "loss" and not hasattr(order.source, "counted"):
            raise UserError(f"source '{name}' cannot count loss tokens: weigh the mixture in examples or tokens")
        if name in self._accounts:
            raise UserError(f"there is already a source '{name}'")
        self._accounts[name] = _Account(order)
        self._accounts = dict(sorted(self._accounts.items()))  # the order of a recipe's keys means nothing

    def drop(self, name: str) -> None:
        """Forget a source with its position and debt. A weight of zero keeps both."""
        del self._accounts[self._known(name)]

    def narrow(self, name: str, *, order: Order | None) -> None:
        """Draw a source in this order of some of its chunks from its beginning on; None: of all of them again."""
        account = self._accounts[self._known(name)]
        account.order, account.cursor = order or account.whole, Cursor()

    def draw(self, weights: Mapping[str, Any], length: int, rows: int) -> list[Row]:
        """The next rows, each from one source and of at most `length` positions; weights as in `flatten`.

        Sources not named have weight zero. Raises UserError for a name that is no source.
        """
        shares = flatten(weights)
        active = [(account, shares[name]) for name, account in self._accounts.items() if shares.get(name)]
        names = {id(account): name for name, account in self._accounts.items()}
        for name in shares:
            self._known(name)
        largest = 1 if self.unit == "examples" else length
        drawn = []
        for _ in range(rows):
            account = _soonest(active, largest)
            pieces, account.cursor = account.order.row(account.cursor, length)
            tokens = sum([piece.length for piece in pieces])
            account.rows += 1
            account.tokens += tokens
            if self.unit == "examples":
                amount = 1
            elif self.unit == "tokens":
                amount = tokens
            else:
                amount = sum(map(cast(Counted, account.order.source).counted, pieces))  # `add` has looked
            for other, share in active:
                other.owed += share * amount
            account.owed -= amount
            drawn.append(Row(names[id(account)], pieces))
        return drawn

    def skip(self, name: str, *, rows: int, length: int) -> None:
        """Go past the next rows of a source. They are not drawn: neither counted nor owed."""
        account = self._accounts[self._known(name)]
        for _ in range(rows):
            _, account.cursor = account.order.row(account.cursor, length)

    def epochs(self) -> dict[str, float]:
        """Passes over each source so far: positions drawn / positions there are."""
        return {name: account.tokens / account.whole.total for name, account in self._accounts.items()}

    def ledger(self) -> dict[str, dict[str, int]]:
        """Rows and tokens drawn from each source so far."""
        return {name: {"rows": a.rows, "tokens": a.tokens} for name, a in self._accounts.items()}

    def cursors(self) -> dict[str, Cursor]:
        """Where each source stands: with weights, length and rows this names the next batch."""
        return {name: account.cursor for name, account in self._accounts.items()}

    def owed(self) -> dict[str, float]:
        """What each source is owed, in the stream's unit."""
        return {name: account.owed for name, account in self._accounts.items()}

    def state(self) -> dict[str, Any]:
        """Everything a draw depends on, for JSON (which keeps floats exactly)."""
        sources = {}
        for name, a in self._accounts.items():
            cursor = [a.cursor.next, [list(pair) for pair in a.cursor.pending]]
            content = a.whole.source.fingerprint
            sources[name] = {
                "cursor": cursor, "owed": a.owed, "rows": a.rows, "tokens": a.tokens, "fingerprint": content
            }  # fmt: skip
        return {"unit": self.unit, "sources": sources}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Sources it does not name start fresh; debts in another unit are forgiven.

        Raises UserError for a source that is gone or whose content has changed, before anything is touched.
        """
        for name, saved in state["sources"].items():
            if saved["fingerprint"] != self._accounts[self._known(name)].whole.source.fingerprint:
                raise UserError(f"source '{name}' has changed since the save: its position means nothing any more")
        for name in self._accounts.keys() - state["sources"].keys():
            account = self._accounts[name]
            account.cursor, account.owed, account.rows, account.tokens = Cursor(), 0.0, 0, 0
        for name, saved in state["sources"].items():
            account = self._accounts[name]
            account.cursor = Cursor.of(saved["cursor"])
            account.owed = saved["owed"] if state["unit"] == self.unit else 0.0
            account.rows, account.tokens = saved["rows"], saved["tokens"]

    def _known(self, name: str) -> str:
        if name not in self._accounts:
            hint = did_you_mean(name, self._accounts)
            raise UserError(f"there is no source '{name}'{hint} (sources: {', '.join(self._accounts) or 'none'})")
        return name


def _soonest(active: list[tuple[_Account, float]], largest: int) -> _Account:
    """Of the sources with something owed by the end of a row of `largest`, the one to fall a row behind first."""
    best, soonest = None, math.inf
    for account, share in active:
        if account.owed + share * largest > 1e-9 * largest and (when := (largest - account.owed) / share) < soonest:
            best, soonest = account, when
    if best is None:  # all are ahead, because a source that is owed has weight zero now
        best = min(active, key=lambda pair: -pair[0].owed / pair[1])[0]
    return best

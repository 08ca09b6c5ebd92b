"""Order of data as arithmetic: no position lost or repeated, any cursor resumable, shares kept to a row."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.base.errors import UserError
from tutelage.core.stream import Cursor, Order, Stream, flatten, permute, permuted


class Numbers:
    """A source of chunks of given lengths; two chunks share a document where `halves` says so."""

    def __init__(self, lengths, name="numbers", stored=False):
        self.name = name
        lengths = np.asarray(lengths, np.int64)
        documents = np.arange(len(lengths)) // 2  # chunks 2i and 2i + 1 are neighbors in document i
        starts = np.where(np.arange(len(lengths)) % 2, np.roll(lengths, 1), 0)
        self.chunks = np.stack([documents, starts, lengths], 1)
        self.stored = stored
        self.fingerprint = f"{name}/{lengths.tolist()}"
        self.facts = {}

    def read(self, piece):
        return {"tokens": np.arange(piece.start, piece.start + piece.length)}

    def counted(self, piece):
        return max(piece.length - 1, 0)


def last_fit(lengths, length):
    """A rule that favors the youngest, so that the oldest would starve."""
    taken, room = [], length
    for i in reversed(range(len(lengths))):
        if lengths[i] <= room:
            taken.append(i)
            room -= lengths[i]
    return taken or [len(lengths) - 1]


PACKINGS = ["documents", "concat", "single", last_fit]
lengths_of_chunks = st.lists(st.integers(1, 40), min_size=1, max_size=30)
lengths_of_rows = st.lists(st.integers(1, 60), min_size=1, max_size=60)
packings = st.sampled_from(PACKINGS)


def through_json(cursor):
    return Cursor.of(json.loads(json.dumps(cursor)))


def positions(pieces):
    return Counter((piece.doc, at) for piece in pieces for at in range(piece.start, piece.start + piece.length))


def owing(order, cursor):
    """How often each position must have been drawn, by the cursor alone."""
    chunks, pending = order.source.chunks, dict(cursor.pending)
    due = Counter()
    for place in range(cursor.next):
        doc, start, length = order.chunk(place)
        assert [doc, start, length] in chunks.tolist()
        due.update((doc, at) for at in range(start, start + pending.get(place, length)))
    return due


# --- the permutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1000, 1024, 4099])
def test_a_permutation_reaches_every_chunk_once(n):
    for key in (0, 1, 2**63 + 5):
        assert sorted(permute(place, n, key) for place in range(n)) == list(range(n))


@given(st.integers(1, 10**15), st.integers(0, 2**64 - 1), st.data())
def test_many_places_at_once_go_where_each_goes_alone(n, key, data):
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    assert permuted(np.array(places), n, key).tolist() == [permute(place, n, key) for place in places]


def test_every_order_of_four_chunks_occurs_about_equally_often():
    seen = Counter(tuple(permute(place, 4, key) for place in range(4)) for key in range(4800))
    assert len(seen) == 24
    assert min(seen.values()) > 100
    assert max(seen.values()) < 320


def test_neighbors_are_scattered_and_keys_are_independent():
    n = 10_007
    one, two = (permuted(np.arange(n), n, key) for key in (1, 2))
    for moved in (np.diff(one), one - np.arange(n), one - two):
        assert abs(np.abs(moved).mean() / n - 1 / 3) < 0.02  # as of two independent places
    assert (one == two).sum() < 12
    halves = (one[: n // 2] < n // 2).sum() / (n // 2)
    assert abs(halves - 0.5) < 0.03


def test_order_differs_by_seed_source_and_epoch_and_by_nothing_else():
    def drawn(seed, name, epoch):
        order = Order(Numbers([1] * 50, name=name), seed=seed)
        return [order.chunk(epoch * 50 + i) for i in range(50)]

    base = drawn(0, "a", 0)
    assert base == drawn(0, "a", 0)
    others = [drawn(1, "a", 0), drawn(0, "b", 0), drawn(0, "a", 1)]
    assert all(base != other for other in others)
    assert all(sorted(base) == sorted(other) for other in others)


def test_stored_chunks_come_as_they_stand_in_every_epoch():
    order = Order(Numbers([7, 5, 6], stored=True), seed=0, packing="single")
    cursor, sizes = Cursor(), []
    for _ in range(6):
        (piece,), cursor = order.row(cursor, 100)
        sizes.append(piece.length)
    assert sizes == [7, 5, 6] * 2


# --- rows


@settings(max_examples=150, deadline=None)
@given(lengths_of_chunks, lengths_of_rows, packings, st.integers(1, 9))
def test_no_position_is_lost_or_repeated_whatever_the_lengths(chunks, rows, packing, look_ahead):
    order = Order(Numbers(chunks), seed=3, packing=packing, look_ahead=look_ahead)
    cursor, drawn = Cursor(), Counter()
    for length in rows:
        pieces, cursor = order.row(cursor, length)
        assert 1 <= sum(piece.length for piece in pieces) <= length
        drawn += positions(pieces)
        assert len(cursor.pending) <= look_ahead
        assert list(cursor.pending) == sorted(cursor.pending)
    assert drawn == owing(order, cursor)


@settings(max_examples=60, deadline=None)
@given(lengths_of_chunks, lengths_of_rows, packings)
def test_an_epoch_draws_every_position_of_every_chunk_exactly_once(chunks, rows, packing):
    order = Order(Numbers(chunks), seed=5, packing=packing)
    whole = Counter((doc, at) for doc, start, size in order.source.chunks.tolist() for at in range(start, start + size))
    cursor, drawn, step = Cursor(), Counter(), 0
    while cursor.next < order.count or any(place < order.count for place, _ in cursor.pending):
        pieces, cursor = order.row(cursor, rows[step % len(rows)])
        drawn += positions(pieces)
        step += 1
        assert step < 10_000
    assert drawn & whole == whole
    later = sum(drawn.values()) - sum(whole.values())  # of the next epochs, drawn while this one's last piece waited
    pending = dict(cursor.pending)
    places = range(order.count, cursor.next)
    assert later == sum(pending.get(place, order.chunk(place)[2]) for place in places)


@settings(max_examples=60, deadline=None)
@given(lengths_of_chunks, lengths_of_rows, packings, st.integers(0, 59))
def test_any_cursor_goes_on_after_json_in_a_fresh_order(chunks, rows, packing, cut):
    whole, cursor, saved = [], Cursor(), Cursor()
    order = Order(Numbers(chunks), seed=1, packing=packing)
    for step, length in enumerate(rows):
        if step == cut:
            saved = through_json(cursor)
        pieces, cursor = order.row(cursor, length)
        whole.append(pieces)
    start = cut if cut < len(rows) else 0
    fresh = Order(Numbers(chunks), seed=1, packing=packing)
    for step in range(start, len(rows)):
        pieces, saved = fresh.row(saved, rows[step])
        assert pieces == whole[step]
    assert saved == cursor


@settings(max_examples=60, deadline=None)
@given(lengths_of_chunks, st.lists(st.tuples(st.integers(1, 60), packings), min_size=1, max_size=40))
def test_the_packing_rule_may_change_between_rows(chunks, rows):
    orders = {packing: Order(Numbers(chunks), seed=1, packing=packing) for packing in PACKINGS}
    cursor, drawn = Cursor(), Counter()
    for length, packing in rows:
        pieces, cursor = orders[packing].row(cursor, length)
        drawn += positions(pieces)
    assert drawn == owing(orders["single"], cursor)


def rows_of(order, length, count):
    cursor, rows = Cursor(), []
    for _ in range(count):
        pieces, cursor = order.row(cursor, length)
        rows.append(pieces)
    return rows


def in_place(lengths, **settings_of_order):
    return Order(Numbers(lengths, stored=True), seed=0, **settings_of_order)


def test_documents_are_joined_when_they_fit_and_passed_over_when_not():
    rows = rows_of(in_place([6, 5, 4, 3, 9]), 10, 3)
    assert [[piece.length for piece in row] for row in rows] == [[6, 4], [5, 3], [9]]


def test_a_document_longer_than_the_row_is_cut_and_its_rest_begins_the_next_row():
    rows = rows_of(in_place([25, 4]), 10, 3)
    assert [[tuple(piece) for piece in row] for row in rows] == [
        [(0, 0, 10)],
        [(0, 10, 10)],
        [(0, 20, 5), (0, 25, 4)],
    ]


def test_concat_fills_every_row_to_its_last_position():
    for row in rows_of(Order(Numbers([3, 17, 5, 8]), seed=0, packing="concat"), 7, 50):
        assert sum(piece.length for piece in row) == 7


def test_single_puts_one_piece_in_a_row():
    rows = rows_of(in_place([3, 12, 5], packing="single"), 8, 5)
    assert [[piece.length for piece in row] for row in rows] == [[3], [8], [4], [5], [3]]


def test_packing_documents_pads_little():
    lengths = np.random.default_rng(0).lognormal(np.log(100), 1, 5000).astype(int) + 1
    rows = rows_of(Order(Numbers(lengths), seed=0), 512, 1000)
    assert sum(piece.length for row in rows for piece in row) / (512 * 1000) > 0.95


def test_the_oldest_piece_is_never_left_waiting_for_long():
    lengths = [30] + [1] * 200
    for packing in PACKINGS:
        order, cursor = in_place(lengths, packing=packing), Cursor()
        for _ in range(60):
            _, cursor = order.row(cursor, 31)
            oldest = cursor.pending[0][0] if cursor.pending else cursor.next
            assert cursor.next - oldest < 4 * order.look_ahead + 40


def test_a_rule_of_the_users_chooses_the_order_within_a_row():
    order = in_place([4, 3, 2, 9], packing=lambda lengths, length: [2, 0], look_ahead=3)
    pieces, cursor = order.row(Cursor(), 10)
    assert [piece.length for piece in pieces] == [2, 4]
    assert cursor == Cursor(3, ((1, 0),))


@pytest.mark.parametrize("chosen", [[], [0, 0], [99], [-1], [0, 1]])
def test_a_rule_that_chooses_what_cannot_be_is_an_error(chosen):
    order = in_place([6, 6], packing=lambda lengths, length: chosen)
    with pytest.raises(UserError, match="packing of source 'numbers' chose"):
        order.row(Cursor(), 10)


def test_seeking_far_ahead_costs_nothing():
    order = Order(Numbers([3] * 100_000), seed=0)
    pieces, cursor = order.row(Cursor(10**15, ()), 9)
    assert [piece.length for piece in pieces] == [3, 3, 3]
    assert cursor.next == 10**15 + 3


def test_a_source_without_chunks_or_with_an_empty_one_is_refused_by_name():
    empty = Numbers([1], name="void")
    empty.chunks = empty.chunks[:0]
    with pytest.raises(UserError, match="source 'void' is empty"):
        Order(empty, seed=0)
    with pytest.raises(UserError, match="'numbers': chunk 1 has no positions"):
        Order(Numbers([3, 0]), seed=0)
    with pytest.raises(UserError, match="did you mean 'documents'"):
        Order(Numbers([3]), seed=0, packing="document")


# --- shares


def stream_of(names, *, unit="examples", packing="documents", seed=0):
    rng = np.random.default_rng(seed)
    sources = [Numbers(rng.integers(2, 30, 40), name=name) for name in names]
    return Stream({s.name: Order(s, seed=seed, packing=packing) for s in sources}, unit=unit)


weights_of_sources = st.lists(st.one_of(st.floats(0.001, 1), st.integers(1, 9)), min_size=1, max_size=10)
units = st.sampled_from(["examples", "tokens", "loss"])


@settings(max_examples=80, deadline=None)
@given(weights_of_sources, units, st.sampled_from([16, 64]))
def test_constant_weights_are_kept_to_within_one_row_at_every_step(weights, unit, length):
    weights = {f"s{i}": weight for i, weight in enumerate(weights)}
    shares, stream = flatten(weights), stream_of(weights, unit=unit)
    given_to, whole = Counter(), 0
    for _ in range(80):
        (row,) = stream.draw(weights, length, 1)
        counted = stream._accounts[row.source].order.source.counted
        amount = {"examples": 1, "tokens": sum(p.length for p in row.pieces), "loss": sum(map(counted, row.pieces))}[
            unit
        ]
        given_to[row.source] += amount
        whole += amount
        for name, share in shares.items():
            assert abs(share * whole - given_to[name]) <= (1 if unit == "examples" else length) + 1e-6


def test_many_small_sources_do_not_fall_behind_together():
    weights = {"large": 50, **{f"s{i:02}": 1 for i in range(50)}}
    stream = stream_of(weights)
    for _ in range(300):
        stream.draw(weights, 16, 1)
        assert max(map(abs, stream.owed().values())) < 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any), min_size=1, max_size=40), units)
def test_what_is_owed_is_kept_when_weights_change_even_through_zero(steps, unit):
    names = ["a", "b", "c", "d"]
    stream, due = stream_of(names, unit=unit), Counter()
    for step in steps:
        weights = dict(zip(names, step, strict=True))
        before = dict(stream.owed())
        rows = stream.draw(weights, 32, 3)
        assert all(weights[row.source] for row in rows)
        after = stream.owed()
        for name in names:
            due[name] += after[name] - before[name]
            if not weights[name]:
                assert after[name] == before[name]
    assert abs(sum(stream.owed().values())) < 1e-6
    assert max(map(abs, stream.owed().values())) <= 4 * (1 if unit == "examples" else 32)


def test_a_small_weight_is_served_although_it_is_zero_every_second_step():
    stream = stream_of(["a", "b"])
    for step in range(100):
        stream.draw({"a": 0.1 * (step % 2), "b": 0.9}, 16, 1)
    assert stream.ledger()["a"]["rows"] == 5


def test_the_order_of_keys_in_a_recipe_changes_nothing():
    weights = {"b": 2, "a": 1, "c": 1}
    orders = {name: Order(Numbers([7, 20, 3], name=name), seed=0) for name in "abc"}
    forward, backward = Stream(orders), Stream(dict(reversed(orders.items())))
    assert forward.draw(weights, 32, 40) == backward.draw(dict(reversed(weights.items())), 32, 40)


def test_how_rows_are_split_over_draws_changes_nothing():
    weights = {"a": 3, "b": 1, "c": 0.3}
    whole, parts = stream_of("abc", unit="tokens"), stream_of("abc", unit="tokens")
    assert whole.draw(weights, 32, 30) == [row for _ in range(10) for row in parts.draw(weights, 32, 3)]
    assert whole.state() == parts.state()


@settings(max_examples=40, deadline=None)
@given(weights_of_sources, units, packings, st.integers(0, 20))
def test_a_stream_goes_on_after_json_to_the_bit(weights, unit, packing, cut):
    weights = {f"s{i}": weight for i, weight in enumerate(weights)}
    first = stream_of(weights, unit=unit, packing=packing)
    for step in range(cut):
        first.draw(weights, 8 + step, 2)
    second = stream_of(weights, unit=unit, packing=packing)
    second.load(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    for step in range(10):
        assert first.draw(weights, 30 - step, 2) == second.draw(weights, 30 - step, 2)
    assert second.state() == first.state()
    assert second.ledger() == first.ledger()


def test_a_source_past_its_end_begins_its_next_epoch_and_counts_it():
    stream = Stream({"few": Order(Numbers([10, 10]), seed=0)})
    stream.draw({"few": 1}, 10, 5)
    assert stream.epochs() == {"few": 2.5}
    assert stream.ledger() == {"few": {"rows": 5, "tokens": 50}}
    assert stream.cursors() == {"few": Cursor(5, ())}


def test_sources_come_and_go_between_draws():
    stream = stream_of("ab")
    stream.draw({"a": 1, "b": 1}, 16, 3)
    stream.add("c", order=Order(Numbers([5], name="c"), seed=0))
    stream.drop("a")
    assert {row.source for row in stream.draw({"b": 1, "c": 1}, 16, 6)} == {"b", "c"}
    with pytest.raises(UserError, match="there is no source 'a'"):
        stream.draw({"a": 1}, 16, 1)
    with pytest.raises(UserError, match="already a source 'b'"):
        stream.add("b", order=Order(Numbers([5], name="b"), seed=0))


def test_a_narrowed_source_is_drawn_from_its_beginning_and_passes_stay_those_over_all_of_it():
    source = Numbers([4] * 10, name="s")
    stream = Stream({"s": Order(source, seed=0, packing="single")})
    stream.draw({"s": 1}, 4, 3)
    some = Order(Numbers([4] * 2, name="s"), seed=0, packing="single")
    stream.narrow("s", order=some)
    drawn = [(piece.doc, piece.start) for row in stream.draw({"s": 1}, 4, 4) for piece in row.pieces]
    assert sorted(drawn) == [(0, 0), (0, 0), (0, 4), (0, 4)] and stream.epochs() == {"s": 7 / 10}
    again = Stream({"s": Order(source, seed=0, packing="single")})
    again.narrow("s", order=some)
    again.load(json.loads(json.dumps(stream.state())))  # the content is that of the whole source
    assert again.draw({"s": 1}, 4, 3) == stream.draw({"s": 1}, 4, 3)
    stream.narrow("s", order=None)
    assert len({(piece.doc, piece.start) for row in stream.draw({"s": 1}, 4, 10) for piece in row.pieces}) == 10


def test_a_state_of_other_content_or_of_a_source_that_is_gone_is_refused_untouched():
    state = stream_of("ab").state()
    with pytest.raises(UserError, match="no source 'b'"):
        stream_of("a").load(state)
    other = stream_of("ab", seed=1)
    other.draw({"a": 1}, 16, 2)
    before = other.state()
    with pytest.raises(UserError, match="source 'a' has changed since the save"):
        other.load(state)
    assert other.state() == before


def test_debts_in_another_unit_are_forgiven_and_positions_kept():
    tokens, examples = stream_of("ab", unit="tokens"), stream_of("ab", unit="examples")
    tokens.draw({"a": 1, "b": 2}, 16, 4)
    examples.load(tokens.state())
    assert examples.cursors() == tokens.cursors()
    assert set(examples.owed().values()) == {0.0}


def test_a_name_that_is_no_source_is_answered_with_the_nearest():
    stream = stream_of(["prose", "code"])
    with pytest.raises(UserError, match="there is no source 'porse'; did you mean 'prose'"):
        stream.draw({"porse": 1}, 16, 1)


def test_loss_tokens_need_a_source_that_counts_them():
    source = Numbers([3])
    source.counted = None
    bare = type("Bare", (), {k: getattr(source, k) for k in ("name", "chunks", "stored", "fingerprint", "facts")})()
    with pytest.raises(UserError, match="cannot count loss tokens"):
        Stream({"bare": Order(bare, seed=0)}, unit="loss")


# --- weights


def test_nested_weights_flatten_by_one_rule():
    assert flatten({"a": 1, "b": {"c": 1, "d": {"e": 2}}}) == {"a": 0.25, "b/c": 0.25, "b/d/e": 0.5}
    assert flatten({"a": np.float64(3), "b": np.float32(1), "c": 0}) == {"a": 0.75, "b": 0.25, "c": 0}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": 0, "b": {"c": 0.0}}, "all weights are zero"),
        ({}, "all weights are zero"),
        ({"a": {"b": -1}}, "weight of 'a/b' is -1"),
        ({"a": float("nan")}, "weight of 'a' is nan"),
        ({"a": float("inf")}, "weight of 'a' is inf"),
        ({"a": "1"}, "weight of 'a' is '1'"),
        ({"a": True}, "weight of 'a' is True"),
        ({"a/b": 1, "a": {"b": 1}}, "weight of 'a/b' is given twice"),
    ],
)
def test_a_weight_that_is_none_is_named(weights, says):
    with pytest.raises(UserError, match=says):
        flatten(weights)


# --- cost

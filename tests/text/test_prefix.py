"""A prefix is read and not learned, and changes nothing else: the text keeps its tokens, its labels and its bytes."""

import copy

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.conftest import SAMPLES
from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.core.types import IGNORE, Piece
from tutelage.modalities.text import source
from tutelage.modalities.text.encode import Encoder
from tutelage.modalities.text.prefix import NONE, Prefixed

R = 16


def written(records):
    """Some documents begin with nothing."""
    return ["" if record["line"] % 4 == 0 else f"{record['meta']['tag']}: " for record in records]


@pytest.fixture(scope="module", params=["bpe", "plain", "unigram"])
def both(request, tmp_path_factory):
    """A source and the same with prefixes."""
    tokenizer = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("prefix")
    rows = [{"text": f"{SAMPLES[i % 7]} {i}", "tag": f"t{i % 3}"} for i in range(30)]
    (folder / "a.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    spec = SourceSpec(path=str(folder / "a.jsonl"), val="30%")
    train, val = source.build("mine", spec, tokenizer, cache=folder / "c", chunk=R)
    return [(one, Prefixed(one, written, tokenizer=tokenizer, length=R), tokenizer) for one in (train, val)]


def whole(one, doc):
    return one.read(Piece(doc, 0, len(one._side.tokens[one._side.offsets[doc] : one._side.offsets[doc + 1]]) - 1))


def test_every_label_of_the_text_is_learned_once_as_without_prefix(both):
    for base, made, _ in both:
        chunks = made.chunks.tolist()
        for doc in range(int(base.facts["documents"])):
            read = [made.read(Piece(*chunk)) for chunk in chunks if chunk[0] == doc]
            plain, labels = (np.concatenate([r[name] for r in read]) for name in ("plain", "labels"))
            there = plain != NONE
            want = whole(base, doc)
            size = there.sum()  # the end of a held-out document is not measured
            assert np.array_equal(plain[there], want["tokens"][:size])
            assert np.array_equal(labels[there], want["labels"][:size])
            assert (want["labels"][size:] == IGNORE).all() and (labels[~there] == IGNORE).all()


def test_every_row_begins_with_its_document_s_prefix_and_fits(both):
    for base, made, tokenizer in both:
        front = Encoder(tokenizer).front
        seen = set()
        for doc, start, length in made.chunks.tolist():
            record = base.documents([doc])[0]
            text = "" if record["line"] % 4 == 0 else f"{record['meta']['tag']}: "
            ids = Encoder(tokenizer).ids([text])[0].tolist()
            begins = front if start == 0 else []  # the document's own separator stays first
            tokens = made.read(Piece(doc, start, length))["tokens"].tolist()
            assert 0 < length <= R and len(tokens) == length
            assert tokens[: len(begins) + len(ids)] == (begins + ids)[:length]
            seen.add((bool(text), start > 0))
        assert len(seen) == 4, "documents with and without prefix, longer than a row and not"


def test_what_counts_is_counted_without_reading(both):
    for _, made, _ in both:
        for chunk in made.chunks.tolist():
            assert made.counted(Piece(*chunk)) == int((made.read(Piece(*chunk))["labels"] != IGNORE).sum())


def test_bytes_of_held_out_text_are_the_text_s(both):
    base, made, _ = both[1]
    assert sum(int(made.read(Piece(*c))["bytes"].sum()) for c in made.chunks.tolist()) == base.facts["bytes"]


@settings(deadline=None, max_examples=60)
@given(place=st.integers(0, 10_000), cut=st.integers(1, R - 1))
def test_a_row_may_be_cut_anywhere(both, place, cut):
    _, made, _ = both[0]
    doc, start, length = made.chunks[place % len(made.chunks)].tolist()
    cut = min(cut, length - 1)
    if cut:
        parts = [made.read(Piece(doc, start, cut)), made.read(Piece(doc, start + cut, length - cut))]
        for name, value in made.read(Piece(doc, start, length)).items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), value), name


def test_a_piece_is_named_with_its_prefix_and_its_own_text(both):
    base, made, _ = both[0]
    doc, start, length = next(c for c in made.chunks.tolist() if c[1] > 0 and base.documents([c[0]])[0]["line"] % 4)
    named = made.name_of(Piece(doc, start, length))
    assert named["prefix"] == f"{base.documents([doc])[0]['meta']['tag']}: " and named["document"] == doc
    assert named["bytes"][0] > 0 and named["text"] not in ("", named["prefix"])


def test_other_prefixes_are_another_source(both):
    base, made, tokenizer = both[0]
    other = Prefixed(base, lambda records: ["x" for _ in records], tokenizer=tokenizer, length=R)
    none = Prefixed(base, lambda records: ["" for _ in records], tokenizer=tokenizer, length=R)
    assert len({base.fingerprint, made.fingerprint, other.fingerprint, none.fingerprint}) == 4
    assert np.array_equal(none.chunks, base.chunks)


def test_stored_documents_stay_so_with_prefixes(both):
    base, made, tokenizer = both[0]
    stored = copy.copy(base)
    stored.stored = True
    assert Prefixed(stored, written, tokenizer=tokenizer, length=R).stored and not made.stored


def test_one_that_leaves_no_room_for_text_is_refused(both):
    base, _, tokenizer = both[0]
    with pytest.raises(UserError, match="data.mine: .* of a row's 16 tokens .'qzqz.* raise `length`"):
        Prefixed(base, lambda records: ["qz" * 20 for _ in records], tokenizer=tokenizer, length=R)


def test_a_prompt_without_answer_in_its_row_is_left_out(tmp_path, plain):
    rows = [{"prompt": "a question " * 4, "answer": "yes"}] * 3
    (tmp_path / "a.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    spec = SourceSpec(path=str(tmp_path / "a.jsonl"), val=0.0)
    train, _ = source.build("mine", spec, plain, cache=tmp_path / "c", chunk=R)
    made = Prefixed(train, lambda records: ["tag:" for _ in records], tokenizer=plain, length=R)
    read = [made.read(Piece(*chunk)) for chunk in made.chunks.tolist()]
    assert all((r["labels"] != IGNORE).any() for r in read) and made.facts["chunks_left_out"] > 0
    assert sum(int((r["labels"] != IGNORE).sum()) for r in read) == sum(
        train.counted(Piece(*chunk)) for chunk in train.chunks.tolist()
    )

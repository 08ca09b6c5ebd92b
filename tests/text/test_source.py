import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.conftest import SAMPLES
from tutelage.base.spec import SourceSpec
from tutelage.core.types import IGNORE, Piece
from tutelage.modalities.text import source
from tutelage.modalities.text.source import cut
from tutelage.modalities.text.store import Side


@pytest.fixture(scope="module")
def held(tmp_path_factory, bpe):
    folder = tmp_path_factory.mktemp("source")
    path = folder / "a.jsonl"
    rows = [{"text": f"{SAMPLES[i % 7]} {i}"} for i in range(50)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    build = {"cache": folder / "c", "chunk": 16}
    return source.build("mine", SourceSpec(path=str(path), val="30%"), bpe, **build)


def test_text_that_the_tokenizer_does_not_know_is_told_of(tmp_path, unigram, bpe):
    """A vocabulary of characters that lacks most of them turns whole words into one token."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"text": f"{SAMPLES[3]} {i}"}) + b"\n" for i in range(20)))

    def told(tokenizer):
        made = source.build("mine", SourceSpec(path=str(path), val="50%"), tokenizer, cache=tmp_path / "c", chunk=16)
        train, val = made
        return [line for line in train.report() if "does not know" in line], val.facts["unknown"]

    lines, share = told(unigram)
    assert len(lines) == 1 and "34.8% of its tokens" in lines[0]
    assert 0.7 < share < 0.9, "of the bytes, which is what counts: all but numbers and punctuation"
    assert told(bpe) == ([], 0.0)


def test_every_token_but_the_first_is_a_label_once(held, bpe):
    for one in held:
        for doc in range(int(one.facts["documents"])):
            ids = one._side.tokens[one._side.offsets[doc] : one._side.offsets[doc + 1]].astype(np.int64)
            read = [one.read(Piece(*chunk)) for chunk in one.chunks.tolist() if chunk[0] == doc]
            tokens, labels = (np.concatenate([r[name] for r in read]) for name in ("tokens", "labels"))
            counted = labels != IGNORE
            assert np.array_equal(tokens, ids[: len(tokens)])
            assert np.array_equal(labels[counted], ids[1 : len(tokens) + 1][counted])
            # the end of a held-out document is not measured, and a chunk of nothing else is left out
            assert counted.sum() == len(ids) - 1 - (one is held[1])


def test_the_label_at_a_border_is_the_next_piece_s_first_token(held):
    doc, start, length = next(c for c in held[0].chunks.tolist() if c[2] == 16)
    one, two = held[0].read(Piece(doc, start, length)), held[0].read(Piece(doc, start + length, 1))
    assert one["labels"][-1] == two["tokens"][0]


def test_a_piece_up_to_the_document_s_end_has_no_label_there(held):
    size = int(held[0]._side.offsets[1])
    piece = held[0].read(Piece(0, 0, size))
    assert piece["labels"][-1] == IGNORE and piece["labels"][-2] == piece["tokens"][-1]
    assert held[0].counted(Piece(0, 0, size)) == size - 1


def test_bytes_belong_to_labels_and_sum_to_the_text(held):
    val = held[1]
    total = sum(int(val.read(Piece(*chunk))["bytes"].sum()) for chunk in val.chunks.tolist())
    assert total == val.facts["bytes"]
    assert "bytes" not in held[0].read(Piece(0, 0, 4))


def test_what_counts_is_counted_without_reading(held):
    for one in held:
        for chunk in one.chunks.tolist():
            assert one.counted(Piece(*chunk)) == int((one.read(Piece(*chunk))["labels"] != IGNORE).sum())


def test_a_piece_is_named_by_file_line_bytes_and_text(held, bpe):
    for one in held:
        doc, start, length = next(c for c in one.chunks.tolist() if c[1] == 16)
        named = one.name_of(Piece(doc, start, length))
        whole = bpe.decode(
            one._side.tokens[one._side.offsets[doc] : one._side.offsets[doc + 1]].tolist(), skip_special_tokens=True
        )
        first, last = named["bytes"]
        shown = bpe.decode(one.read(Piece(doc, start, length))["tokens"].tolist(), skip_special_tokens=True)
        assert whole.encode()[first:last].decode(errors="replace") == shown
        assert named["file"].endswith("a.jsonl") and named["line"] == one.documents([doc])[0]["line"]


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=30), max_size=8), st.integers(1, 12), st.booleans())
def test_chunks_cover_what_is_learned_and_nothing_twice(docs, chunk, masked):
    flat = np.array([yes for doc in docs for yes in doc], np.uint8)
    offsets = np.cumsum([0, *map(len, docs)])
    side = Side(tokens=np.zeros(len(flat), np.uint16), offsets=offsets, loss=flat if masked else None)
    chunks, left_out = cut(side, chunk)
    seen = np.zeros(len(flat), int)
    for doc, start, length in chunks.tolist():
        assert 0 < length <= chunk and start % chunk == 0
        labels = slice(offsets[doc] + start + 1, offsets[doc] + start + length + 1)
        assert labels.stop <= offsets[doc + 1]
        seen[labels] += 1
        assert not masked or flat[labels].any()
    assert seen.max(initial=0) <= 1
    wanted = np.ones(len(flat), bool)
    wanted[offsets[:-1]] = False
    assert (seen[wanted & (flat > 0)] == 1).all() if masked else (seen[wanted] == 1).all()
    assert left_out == sum(-(-(len(d) - 1) // chunk) for d in docs) - len(chunks)

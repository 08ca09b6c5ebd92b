import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tutelage.core.types import IGNORE, Piece, Row
from tutelage.modalities.text.collate import block_mask, collate


class Numbers:
    """Document d holds d * 1000, d * 1000 + 1, …"""

    def __init__(self, measured: bool = False) -> None:
        self.measured = measured

    def read(self, piece):
        tokens = piece.doc * 1000 + piece.start + np.arange(piece.length)
        more = {"bytes": np.ones(piece.length, np.int64)} if self.measured else {}
        return {"tokens": tokens, "labels": tokens + 1, **more}


SOURCES = {"a": Numbers(), "b": Numbers(measured=True)}


def test_pieces_stand_side_by_side_with_positions_and_numbers_of_their_own():
    rows = [Row("a", (Piece(1, 0, 3), Piece(2, 5, 2))), Row("a", (Piece(3, 0, 9),))]
    batch = collate(rows, SOURCES, 12)
    assert batch["tokens"].shape == (2, 12)
    assert batch["tokens"][0].tolist() == [1000, 1001, 1002, 2005, 2006] + [0] * 7
    assert batch["labels"][0].tolist() == [1001, 1002, 1003, 2006, 2007] + [IGNORE] * 7
    assert batch["positions"][0].tolist() == [0, 1, 2, 0, 1] + [0] * 7
    assert batch["segments"][0].tolist() == [1, 1, 1, 2, 2] + [0] * 7
    assert batch["segments"][1].tolist() == [1] * 9 + [0] * 3
    assert {value.dtype for value in batch.fields.values()} == {torch.int64}
    assert batch.weight_B.tolist() == [1, 1] and batch.rows == rows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(50, 60))
def test_the_width_is_a_multiple_of_eight_or_the_whole_length(lengths, length):
    batch = collate([Row("a", (Piece(1, 0, n),)) for n in lengths], SOURCES, length)
    width = batch["tokens"].shape[1]
    assert max(lengths) <= width <= length and (width % 8 == 0 or width == length)
    assert width - max(lengths) < 8


def test_a_field_that_only_some_sources_have_is_left_out():
    held, plain = Row("b", (Piece(1, 0, 4),)), Row("a", (Piece(1, 0, 4),))
    assert "bytes" in collate([held, held], SOURCES, 8)
    assert "bytes" not in collate([held, plain], SOURCES, 8)


def test_a_live_row_brings_its_own_content():
    extra = {"tokens": np.arange(3), "labels": np.arange(3), "advantage": np.ones(3, np.float32)}
    batch = collate([Row("live", (), extra)], {}, 8)
    assert batch["advantage"].dtype == torch.float32
    assert batch["segments"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]


def test_the_mask_keeps_documents_apart_and_padding_finite():
    segments_BT = torch.tensor([[1, 1, 2, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    mask = block_mask(segments_BT)
    assert mask.shape == (2, 1, 8, 8) and mask.dtype == torch.bool
    for b in range(2):
        for i in range(8):
            for j in range(8):
                assert mask[b, 0, i, j] == (j <= i and segments_BT[b, i] == segments_BT[b, j])
    out = F.scaled_dot_product_attention(*torch.randn(3, 2, 1, 8, 4), attn_mask=mask)
    assert out.isfinite().all()
    both = block_mask(segments_BT, causal=False)
    assert torch.equal(both & both.mT, both) and not torch.equal(both, mask)


@pytest.mark.parametrize("causal", [True, False])
def test_there_is_no_mask_where_it_would_say_nothing(causal):
    assert block_mask(torch.ones(2, 8, dtype=torch.long), causal=causal) is None
    ending = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert (block_mask(ending, causal=causal) is None) == causal
    assert block_mask(torch.tensor([[0, 0, 1, 1]]), causal=causal) is not None
    assert block_mask(torch.tensor([[1, 1, 2, 2]]), causal=causal) is not None

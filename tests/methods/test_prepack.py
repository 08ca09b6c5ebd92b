"""Prepacking: the rule by hand, padding beside the built-in rule, and prompts in shared rows beside each alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_stream import Numbers
from tests.core.tiny import VOCAB, tiny
from tutelage.core.stream import Cursor, Order
from tutelage.methods.packing.prepack import Prepack
from tutelage.modalities.text import models, prefill

PACK = Prepack().pack
FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")  # grouped and plain attention, rotary and learned positions
LENGTHS = (3, 17, 1, 9, 5, 2, 12)


def test_the_longest_that_fits_goes_first_and_of_equals_the_oldest() -> None:
    assert PACK([3, 9, 5, 4], 12) == [1, 0]
    assert PACK([4, 6, 4, 6], 14) == [1, 3]
    assert PACK([2, 2, 2], 4) == [0, 1]
    assert PACK([5, 40, 3], 12) == [1]  # longer than a row: cut, and alone


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 30))
def test_a_row_is_never_too_full_and_nothing_that_still_fits_is_left(lengths: list[int], length: int) -> None:
    taken = PACK(lengths, length)
    used = sum(lengths[i] for i in taken)
    assert taken and len(set(taken)) == len(taken) and (used <= length or len(taken) == 1)
    assert all(lengths[i] > length - used for i in range(len(lengths)) if i not in taken)


def padded(packing: Any, *, length: int = 256, rows: int = 300) -> float:
    sizes = np.clip(np.random.default_rng(0).lognormal(4.6, 0.6, 4000).astype(int), 4, length)
    order, cursor, used = Order(Numbers(sizes), seed=0, packing=packing), Cursor(), 0
    for _ in range(rows):
        pieces, cursor = order.row(cursor, length)
        used += sum(piece.length for piece in pieces)
    return 1 - used / (rows * length)


def test_training_rows_are_padded_less_than_by_the_built_in_rule() -> None:
    assert padded("documents") > 0.07
    assert 0.03 < padded(Prepack(look_ahead=8).pack) < 0.06
    assert padded(PACK) < 0.03


def prompts() -> list[list[int]]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in LENGTHS]


def test_every_prompt_lies_in_one_row() -> None:
    rows = prefill.shared_rows(LENGTHS, 17, PACK)
    assert sorted(n for row in rows for n in row) == list(range(7)) and len(rows) == 3
    assert [sum(LENGTHS[n] for n in row) for row in rows] == [17, 17, 15]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_keys_values_and_logits_are_those_of_each_prompt_alone(name: str) -> None:
    model, ids, width = tiny(name).eval(), prompts(), max(LENGTHS)
    cache = prefill.prefilled(model, ids, width=width, pack=PACK)
    assert cache.get_seq_length() == width - 1
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in LENGTHS])
    last = torch.tensor([[row[-1]] for row in ids])
    places = torch.tensor([[n - 1] for n in LENGTHS])
    states = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    together = model(input_ids=last, attention_mask=mask, position_ids=places, past_key_values=cache).logits
    for n, row in enumerate(ids):
        alone = model(input_ids=torch.tensor([row]), use_cache=True)
        torch.testing.assert_close(together[n, -1], alone.logits[0, -1], atol=1e-5, rtol=0)
        for layer, found in zip(alone.past_key_values.layers, states, strict=True):
            for own, split in zip((layer.keys, layer.values), found, strict=True):
                torch.testing.assert_close(split[n, :, width - len(row) :], own[0, :, :-1], atol=1e-5, rtol=0)
                assert not split[n, :, : width - len(row)].any()


class Letters:
    """A tokenizer of one token a character."""

    bos_token_id, eos_token_id, pad_token_id = 1, None, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_written_is_what_padded_prompts_give(name: str, temperature: float, monkeypatch: Any) -> None:
    model = tiny(name)
    model.generation_config.eos_token_id = None
    asked: dict[str, Any] = {"prompts": ["abcdefghijkl", "", "xy", "pqrst", "zz"], "tokens": 6, "seed": 3}
    plain = models.generate(model, Letters(), **asked, temperature=temperature)
    made: list[Any] = []
    before = prefill.prefilled

    def seen(*args: Any, **kwargs: Any) -> Any:
        made.append(before(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(prefill, "prefilled", seen)
    assert models.generate(model, Letters(), **asked, temperature=temperature, pack=PACK) == plain
    assert len(made) == 1 and made[0] is not None


def test_less_is_read_than_with_padding(monkeypatch: Any) -> None:
    model, read = tiny("llama").eval(), []
    forward = model.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", counted)
    prefill.prefilled(model, prompts(), width=17, pack=PACK)
    assert read == [(3, 16)]  # instead of 7 rows of 17: 2 + 16 + 8 + 4 + 1 + 11 = 42 of 48 positions


def test_equal_prompts_and_models_with_windows_are_left_to_transformers() -> None:
    assert prefill.prefilled(tiny("llama"), [[3, 4, 5]] * 4, width=3, pack=PACK) is None
    assert prefill.prefilled(tiny("llama"), [[3], [3]], width=1, pack=PACK) is None
    assert not prefill.keeps_all(tiny("gemma2")) and prefill.keeps_all(tiny("gpt2"))
    shaky: Any = SimpleNamespace(parameters=lambda: iter([torch.zeros(1)]), config=tiny("gemma2").config)
    assert prefill.prefilled(shaky, prompts(), width=17, pack=PACK) is None

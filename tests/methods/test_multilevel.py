"""Smaller by averaging and larger by copying: there and back is the same model, sums and means are those of the paper."""

import shutil

import pytest
import torch

from tests.core.tiny import tiny, tokens
from tests.methods.small import transformed
from tutelage.base.errors import UserError

FAMILIES = ("llama", "gpt2", "gpt_neox", "bert", "cohere")


def made(model, folder, **settings):
    before, after = folder / "before", folder / "after"
    shutil.rmtree(after, ignore_errors=True)
    model.save_pretrained(before)
    return transformed([before], after, use="grow/multilevel", dtype=model.dtype, **settings)[0]


def apart(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_larger_and_smaller_again_is_the_same_model(name, tied, tmp_path):
    model = tiny(name, tied=tied)
    large = made(model, tmp_path, to="larger")
    assert sum(p.numel() for p in large.parameters()) > 3 * sum(p.numel() for p in model.parameters())
    assert apart(made(large, tmp_path, to="smaller"), model) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_wider_model_answers_as_before_and_a_deeper_one_does_not(name, tmp_path):
    model = tiny(name).eval()
    inputs = tokens(name)
    wide = made(model, tmp_path, to="larger", depth=1)
    assert float((wide(**inputs).logits - model(**inputs).logits).abs().max()) < 1e-4
    deep = made(model, tmp_path, to="larger", width=1)
    assert float((deep(**inputs).logits - model(**inputs).logits).abs().max()) > 1e-3


def test_units_that_are_read_are_summed_and_units_that_are_written_averaged(tmp_path):
    model = tiny("llama", tied=False)
    small = made(model, tmp_path, to="smaller", depth=1)
    hidden, inner = model.config.hidden_size // 2, model.config.intermediate_size // 2
    for one, other in zip(small.model.layers, model.model.layers, strict=True):
        whole = other.mlp.up_proj.weight
        wanted = (whole[:inner] + whole[inner:]) / 2
        torch.testing.assert_close(one.mlp.up_proj.weight, wanted[:, :hidden] + wanted[:, hidden:])
        whole = other.mlp.down_proj.weight
        wanted = (whole[:hidden] + whole[hidden:]) / 2
        torch.testing.assert_close(one.mlp.down_proj.weight, wanted[:, :inner] + wanted[:, inner:])
        norm = other.input_layernorm.weight
        torch.testing.assert_close(one.input_layernorm.weight, (norm[:hidden] + norm[hidden:]) / 2)
    table = model.model.embed_tokens.weight
    torch.testing.assert_close(small.model.embed_tokens.weight, (table[:, :hidden] + table[:, hidden:]) / 2)


def test_neighboring_blocks_are_averaged(tmp_path):
    model = tiny("llama")
    small = made(model, tmp_path, to="smaller", width=1)
    assert len(small.model.layers) == len(model.model.layers) // 2
    first, second = (layer.self_attn.o_proj.weight for layer in model.model.layers[:2])
    torch.testing.assert_close(small.model.layers[0].self_attn.o_proj.weight, (first + second) / 2)


def test_what_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(UserError, match="blocks in groups of 5 leave some over"):
        made(tiny("llama"), tmp_path, to="smaller", width=1, depth=5)
    with pytest.raises(UserError, match="which is no whole number"):
        made(tiny("llama"), tmp_path, to="smaller", width=3, depth=1)

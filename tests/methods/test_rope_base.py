"""Another rotary base: the configuration alone changes, transformers heeds it, and what has none is refused."""

import json

import pytest
import torch

from tests.core.tiny import tiny, tokens
from tests.methods.small import transformed
from tutelage.base import registry
from tutelage.base.errors import UserError


def stretched(model, folder, **settings):
    model.save_pretrained(folder / "small")
    return transformed([folder / "small"], folder / "large", use="grow/rope_base", dtype=model.dtype, **settings)[0]


def turns(model):
    return next(buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "cohere"])
def test_each_pair_of_channels_turns_as_the_new_base_has_it(name, tmp_path):
    model = tiny(name)
    made = stretched(model, tmp_path, base=123_456.0, positions=4096)
    size = 2 * len(turns(made))
    wanted = 123_456.0 ** (-torch.arange(0, size, 2) / size)
    torch.testing.assert_close(turns(made).float(), wanted.float())
    assert not torch.allclose(turns(model).float(), wanted.float())
    assert made.config.max_position_embeddings == 4096
    for ours, theirs in zip(made.parameters(), model.parameters(), strict=True):
        assert ours.equal(theirs)


@torch.no_grad()
def test_interpolated_positions_are_the_old_ones_divided(tmp_path):
    model = tiny("llama").eval()
    made = stretched(model, tmp_path, base=None, interpolate=4.0)
    inputs = tokens("llama")
    places = torch.arange(inputs["input_ids"].shape[1])[None]
    apart = made(**inputs, position_ids=4 * places).logits - model(**inputs, position_ids=places).logits
    assert float(apart.abs().max()) < 1e-5


def test_the_old_base_once_more_is_the_same_model(tmp_path):
    model = tiny("llama")
    theta = model.config.rope_parameters["rope_theta"]
    stretched(model, tmp_path, base=theta)
    before, after = (json.loads((tmp_path / of / "config.json").read_text()) for of in ("small", "large"))
    assert before == after


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_model_with_other_positions_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="no rotary base"):
        stretched(tiny(name), tmp_path)


def test_positions_that_are_scaled_already_are_refused(tmp_path):
    model = tiny("llama")
    model.config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    with pytest.raises(UserError, match="'yarn' already"):
        stretched(model, tmp_path)


def test_of_layers_that_differ_those_that_see_everything_change():
    local = {"rope_type": "default", "rope_theta": 10000.0}
    config = {"rope_parameters": {"full_attention": dict(local), "sliding_attention": dict(local)}}
    made, _ = registry.make({"use": "grow/rope_base"}).grow(config, {}, None)
    assert made["rope_parameters"] == {"full_attention": {**local, "rope_theta": 500_000.0}, "sliding_attention": local}

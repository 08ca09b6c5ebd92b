"""Stacking: what transformers loads afterwards is the small model's blocks, run through again."""

import copy
import json

import pytest
import torch
import transformers as tf

from tests.core.tiny import AUTO, tiny, tokens
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core.surgery import transform

STACKS = {
    "llama": ["model.layers"],
    "qwen2": ["model.layers"],
    "gemma2": ["model.layers"],
    "gpt2": ["transformer.h"],
    "gpt_neox": ["gpt_neox.layers"],
    "bert": ["bert.encoder.layer"],
    "mamba": ["backbone.layers"],
    "mixtral": ["model.layers"],
    "t5": ["encoder.block", "decoder.block"],
    "bart": ["model.encoder.layers", "model.decoder.layers"],
}


def grown(model, folder, *, times):
    """The model as transformers loads it after stacking, and what it complained about."""
    small, large = folder / "small", folder / "large"
    model.save_pretrained(small)
    large.mkdir()
    transform(registry.make({"use": "grow/stack", "times": times}), [small], large, place="stages.grown")
    auto = AUTO.get(model.config.model_type, tf.AutoModelForCausalLM)
    return auto.from_pretrained(large, output_loading_info=True)


def by_hand(model, prefix, times):
    """A model whose list of blocks holds the same blocks several times."""
    parent, _, last = prefix.rpartition(".")
    blocks = model.get_submodule(prefix)
    setattr(model.get_submodule(parent), last, torch.nn.ModuleList([*blocks] * times))


@pytest.mark.parametrize("name", STACKS)
@torch.no_grad()
def test_a_stacked_model_loads_without_a_word_and_runs_its_blocks_twice(name, tmp_path):
    model = tiny(name).eval()
    larger, told = grown(model, tmp_path, times=2)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for prefix in STACKS[name]:
        assert len(larger.get_submodule(prefix)) == 4
    wanted = copy.deepcopy(model)
    for prefix in STACKS[name]:
        by_hand(wanted, prefix, 2)
    for config in (wanted.config, *(m.config for m in wanted.modules() if hasattr(m, "config"))):
        if len(vars(config).get("layer_types") or []) == 2:
            config.layer_types = config.layer_types * 2
        if hasattr(config, "num_hidden_layers") and config.num_hidden_layers == 2:
            config.num_hidden_layers = 4
    inputs = {**tokens(name), "use_cache": False} if name != "bert" else tokens(name)
    torch.testing.assert_close(larger.eval()(**inputs).logits, wanted(**inputs).logits)


def test_stacking_once_changes_nothing(tmp_path):
    model = tiny("llama")
    same, _ = grown(model, tmp_path, times=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert json.loads((tmp_path / "large/config.json").read_text()) == json.loads(
        (tmp_path / "small/config.json").read_text()
    )


def test_what_the_configuration_lists_block_by_block_grows_with_it():
    config = {"n_layer": 2, "layer_types": ["slide", "full"], "eos_token_id": [5, 6], "mlp_only_layers": []}
    tensors = {f"h.{i}.w": torch.full((2,), float(i)) for i in range(2)} | {"wte": torch.zeros(3)}
    config, tensors = registry.make({"use": "grow/stack", "times": 3}).grow(config, tensors, None)
    assert config == {
        "n_layer": 6,
        "layer_types": ["slide", "full"] * 3,
        "eos_token_id": [5, 6],
        "mlp_only_layers": [],
    }
    assert [float(tensors[f"h.{i}.w"][0]) for i in range(6)] == [0, 1, 0, 1, 0, 1]
    assert set(tensors) == {"wte", *(f"h.{i}.w" for i in range(6))}


def test_numbered_lists_that_are_no_blocks_stay_as_they_are():
    w = torch.zeros(1)
    tensors = {"h.0.w": w, "h.1.w": w, "classifier.0.w": w, "classifier.3.w": w, "convs.0.w": w}
    _, grown = registry.make("grow/stack").grow({"n_layer": 2}, tensors, None)
    assert set(grown) - set(tensors) == {f"h.{i}.w" for i in range(2, 8)}


def test_a_model_that_cannot_be_stacked_is_refused_by_name():
    method = registry.make("grow/stack")
    w = torch.zeros(1)
    with pytest.raises(UserError, match="no numbered list as long as the configuration says"):
        method.grow({"n_layer": 2}, {"wte.weight": w}, None)
    with pytest.raises(UserError, match=r"both h, vision\.blocks"):
        method.grow({"n_layer": 2}, {"h.0.w": w, "h.1.w": w, "vision.blocks.0.w": w, "vision.blocks.1.w": w}, None)
    with pytest.raises(UserError, match="blocks of h differ"):
        method.grow({"n_layer": 2}, {"h.0.dense": w, "h.1.experts": w}, None)

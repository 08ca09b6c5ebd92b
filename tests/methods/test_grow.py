"""Growing: transformers loads the large model without a word, and it answers as the small one did where it must."""

import json
import shutil

import pytest
import torch
import transformers as tf

from tests.core.tiny import tiny, tokens
from tests.methods.small import transformed, view_of
from tutelage.base import registry
from tutelage.base.errors import UserError

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox", "bert", "cohere")


def grown(model, folder, *, use="grow/bert2bert", seed=0, **settings):
    small, large = folder / "small", folder / "large"
    shutil.rmtree(large, ignore_errors=True)
    model.save_pretrained(small)
    return transformed([small], large, use=use, seed=seed, dtype=model.dtype, **settings)[0]


@torch.no_grad()
def apart(model, larger, name):
    """The largest difference of any logit."""
    inputs = tokens(name)
    return float((larger(**inputs).logits - model.eval()(**inputs).logits).abs().max())


@pytest.mark.parametrize(("tied", "width"), [(True, 2), (True, 3), (False, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_widened_model_answers_as_the_small_one(name, tied, width, tmp_path):
    model = tiny(name, tied=tied)
    larger = grown(model, tmp_path, width=width)
    assert larger.config.hidden_size == width * model.config.hidden_size
    assert larger.config.num_attention_heads == width * model.config.num_attention_heads
    assert apart(model, larger, name) < 1e-5


def test_in_double_precision_nothing_but_rounding_is_left(tmp_path):
    model = tiny("gpt2").double()
    assert apart(model, grown(model, tmp_path, width=3), "gpt2") < 1e-12


def test_query_heads_stay_with_the_key_head_that_they_share(tmp_path):
    model = tiny("llama")  # 4 query heads share 2 key heads
    larger = grown(model, tmp_path, width=2)
    assert (larger.config.num_attention_heads, larger.config.num_key_value_heads, larger.config.head_dim) == (8, 4, 8)
    q = larger.model.layers[0].self_attn.q_proj.weight.view(8, 8, 64)
    small = model.model.layers[0].self_attn.q_proj.weight.view(4, 8, 32)
    for head in range(8):
        torch.testing.assert_close(q[head, :, :32] * 2, small[head % 4])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert"])
def test_noise_on_how_copies_are_read_leaves_the_function(name, tmp_path):
    model = tiny(name)
    larger = grown(model, tmp_path, width=2, noise=0.5)
    assert apart(model, larger, name) < 1e-5
    plain = grown(model, tmp_path, width=2)
    changed = [n for n, p in plain.named_parameters() if not torch.equal(p, larger.get_parameter(n))]
    assert changed and all(larger.get_parameter(n).ndim == 2 for n in changed)


def test_copies_read_equally_stay_equal_in_training_and_copies_read_unequally_part(tmp_path):
    def spread(**settings):
        larger = grown(tiny("llama"), tmp_path, width=2, **settings).train()
        optimizer = torch.optim.SGD(larger.parameters(), lr=0.1)
        ids = tokens("llama")["input_ids"]
        for _ in range(3):
            larger(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        up = larger.model.layers[0].mlp.up_proj.weight.detach()
        return float((up[:48] - up[48:]).abs().max())

    assert spread(noise=0.0) < 1e-6 < 1e-4 < spread(noise=0.3)
    assert spread(use="grow/stack", times=1) > 3e-5, "its copies in width are split unevenly, as the paper's are"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert"])
def test_added_outputs_are_the_next_blocks_where_the_knowledge_is_advanced(name, tmp_path):
    model = tiny(name)
    larger = grown(model, tmp_path, width=2, new="aki")
    fpi = grown(model, tmp_path, width=2)
    blocks = {
        "llama": "model.layers",
        "gpt2": "transformer.h",
        "gpt_neox": "gpt_neox.layers",
        "bert": "bert.encoder.layer",
    }
    up = {"llama": "mlp.up_proj", "gpt2": "mlp.c_fc", "gpt_neox": "mlp.dense_h_to_4h", "bert": "intermediate.dense"}

    def weight(model, i):
        w = model.get_submodule(f"{blocks[name]}.{i}.{up[name]}").weight
        return w.T if name == "gpt2" else w

    half = weight(model, 0).shape[0]
    assert torch.equal(weight(larger, 0)[:half], weight(fpi, 0)[:half])
    assert torch.equal(weight(larger, 0)[half:], weight(fpi, 1)[half:])
    assert torch.equal(weight(larger, 1), weight(fpi, 1)), "the last block has none above it"
    assert apart(model, larger, name) > 1e-3


def test_depth_stacks_the_widened_blocks_whole_and_the_last_ones_on_top(tmp_path):
    larger = grown(tiny("llama"), tmp_path, width=2, depth=2.5)
    assert larger.config.num_hidden_layers == 5
    for place, i in enumerate([0, 1, 0, 1]):
        for key, value in larger.model.layers[i].state_dict().items():
            assert torch.equal(value, larger.model.layers[place].state_dict()[key])
    for key, value in larger.model.layers[1].state_dict().items():
        assert torch.equal(value, larger.model.layers[4].state_dict()[key])


def test_a_width_that_copies_channels_unequally_is_refused_unless_asked_for(tmp_path):
    model = tiny("gpt2")
    with pytest.raises(UserError, match="width 1.5 copies some channels more often"):
        grown(model, tmp_path, width=1.5)
    larger = grown(model, tmp_path, width=1.5, uneven=True)
    assert larger.config.n_embd == 48
    assert 1e-4 < apart(model, larger, "gpt2") < 1.0, "almost the same, as the paper says"


def test_chance_picks_the_copies_by_the_seed(tmp_path):
    made = []
    for seed in (0, 0, 1):
        made.append(grown(tiny("gpt2"), tmp_path, width=1.5, uneven=True, seed=seed).transformer.wte.weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mamba", "gives none of num_attention_heads"),
        ("t5", "T5ForConditionalGeneration: its layout cannot be seen"),
        ("mixtral", "Mixtral"),
        ("gemma2", "Gemma2ForCausalLM does not support"),
    ],
)
def test_a_model_whose_layout_nobody_sees_is_refused_in_one_line(name, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        grown(tiny(name), tmp_path)
    assert "\n" not in str(caught.value)


def test_heads_that_cannot_be_multiplied_are_refused(tmp_path):
    with pytest.raises(UserError, match="width 1.3 of hidden_size 32 is 41.6"):
        grown(tiny("llama"), tmp_path, width=1.3, uneven=True)


def test_a_function_that_changes_although_it_was_promised_is_refused(tmp_path):
    """Gemma scales its embeddings by its width, which the method does not know."""
    config = tf.GemmaConfig(
        vocab_size=307, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"stages\.made\.apply: .* answers otherwise than its start"):
        grown(tf.GemmaForCausalLM(config), tmp_path)


def test_the_configuration_says_no_more_than_it_must(tmp_path):
    grown(tiny("llama"), tmp_path)
    small, large = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("small", "large"))
    assert {key for key in small if small[key] != large[key]} == {
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    }


# -- the operators of grow/stack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "cohere"])
def test_blocks_whose_copies_write_nothing_leave_the_function(name, tmp_path):
    model = tiny(name)
    larger = grown(model, tmp_path, use="grow/stack", times=3, new="zero")
    assert larger.config.num_hidden_layers == 6
    assert apart(model, larger, name) < 1e-5


def test_a_block_that_norms_what_it_adds_cannot_be_left_out_by_zeros(tmp_path):
    """BERT norms the stream itself after each layer."""
    with pytest.raises(UserError, match="answers otherwise than its start"):
        grown(tiny("bert"), tmp_path, use="grow/stack", times=2, new="zero")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_new_units_at_zero_leave_the_function_and_learn(name, tied, tmp_path):
    model = tiny(name, tied=tied)
    larger = grown(model, tmp_path, use="grow/stack", times=1, width=2, new="zero")
    assert apart(model, larger, name) < 1e-5
    ids = tokens(name)["input_ids"]
    larger.train()(input_ids=ids, labels=ids).loss.backward()
    down = larger.model.layers[0].mlp.down_proj
    assert float(down.weight.detach()[32:, :48].abs().max()) == 0.0 < float(down.weight.grad[32:, :48].abs().max())


def test_zero_in_width_is_refused_where_norms_subtract_a_mean(tmp_path):
    with pytest.raises(UserError, match="norms of this model subtract a mean"):
        grown(tiny("gpt2"), tmp_path, use="grow/stack", times=1, width=2, new="zero")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert"])
def test_copies_in_width_leave_the_function(name, tmp_path):
    model = tiny(name)
    assert apart(model, grown(model, tmp_path, use="grow/stack", times=1, width=2), name) < 1e-5


def test_copies_are_read_as_unequally_as_the_authors_script_has_them(tmp_path):
    """A copy's share scatters by 1 / (√inputs · blocks) around 1/2; the two sum to 1."""
    model = tiny("llama")
    larger = grown(model, tmp_path, use="grow/stack", times=1, width=2)
    up, old = larger.model.layers[0].mlp.up_proj.weight.detach(), model.model.layers[0].mlp.up_proj.weight.detach()
    first, second = up[:48, :32] / old, up[:48, 32:] / old
    torch.testing.assert_close(first + second, torch.ones_like(first))
    wanted = 1 / (64**0.5 * 2)
    assert abs(float(first.mean()) - 0.5) < 0.01 and 0.94 * wanted < float(first.std()) < 1.06 * wanted


def test_random_weights_stand_beside_the_old_and_above_them(tmp_path):
    model = tiny("llama")
    larger = grown(model, tmp_path, use="grow/stack", times=2, width=2, new="random")
    up, old = larger.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(up[:48, :32], old)
    for new in (up[48:, :32], up[:48, 32:], up[48:, 32:], larger.model.layers[3].mlp.up_proj.weight):
        assert 0.018 < float(new.detach().std()) < 0.022
    assert torch.equal(larger.model.layers[3].input_layernorm.weight, torch.ones(64))
    again = grown(model, tmp_path, use="grow/stack", times=2, width=2, new="random")
    assert torch.equal(up, again.model.layers[0].mlp.up_proj.weight)
    other = grown(model, tmp_path, use="grow/stack", times=2, width=2, new="random", seed=1)
    assert not torch.equal(up, other.model.layers[0].mlp.up_proj.weight)


# -- grow/ramp ----------------------------------------------------------------------------------------------------------


def test_new_blocks_fade_in_as_their_weights_learn():
    model = tiny("llama")
    view = view_of("llama", objective=registry.make("objective/causal_lm"), model=model)
    view.clock.total = {"step": 100.0}
    method = registry.make({"use": "grow/ramp", "top": 1, "over": "4step"})
    names = [f"model.layers.1.{part}.weight" for part in ("self_attn.o_proj", "mlp.down_proj")]
    start = {name: model.get_parameter(name).detach().clone() for name in names}
    below = {name: p.detach().clone() for name, p in model.named_parameters() if ".layers.0." in name}
    method.begin(model, view)
    assert all(not model.get_parameter(name).any() for name in names)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in below.items())
    for step in range(1, 6):
        with torch.no_grad():
            for p in view.engine.params.values():
                p += 0.01  # an optimizer's step
            method.after(view.engine.params, view)
        share = min(1.0, (step - 1) / 4)
        for name in names:
            torch.testing.assert_close(model.get_parameter(name).detach(), share * (start[name] + 0.01 * step))
        view.clock.step += 1
    assert method.state["whole"] == {}


def test_not_every_block_can_be_new():
    view = view_of("gpt2", objective=registry.make("objective/causal_lm"))
    with pytest.raises(UserError, match="the model has 2 blocks"):
        registry.make({"use": "grow/ramp", "top": 2}).begin(view.engine.model, view)


def test_what_keeps_the_function_says_so():
    def keeps(**settings):
        return registry.make(settings).keeps_function()

    assert keeps(use="grow/bert2bert", width=2) and not keeps(use="grow/bert2bert", width=2, new="aki")
    assert not keeps(use="grow/bert2bert", width=2, depth=2) and not keeps(use="grow/bert2bert", width=2, uneven=True)
    assert keeps(use="grow/stack", times=2, new="zero") and keeps(use="grow/stack", times=1, width=2)
    assert not keeps(use="grow/stack", times=2) and not keeps(use="grow/stack", times=1, width=2, new="random")
    assert keeps(use="grow/stack", times=2, width=2, new="zero") and not keeps(use="grow/stack", times=1)

"""Half fine-tuning: how many of each kind are drawn, where, what is frozen by it, and what a reset puts back."""

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.core.tiny import tiny
from tutelage import sizing
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core import randomness
from tutelage.core.graph import Methods
from tutelage.core.surgery import Site
from tutelage.methods._kit.halves import drawn, kinds_of


def chance(seed=0):
    return lambda purpose: randomness.generator(randomness.seed_of(seed, "two", 0, purpose))


def names_of(blocks):
    """A Llama's parameters, by the paper's letters."""
    within = ["input_layernorm", "post_attention_layernorm"]
    within += [f"self_attn.{m}_proj" for m in "qkvo"] + [f"mlp.{m}_proj" for m in ("gate", "up", "down")]
    rest = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    return rest + [f"model.layers.{b}.{m}.weight" for b in range(blocks) for m in within]


def per_block(chosen, blocks, part):
    return [sum(f"layers.{b}." in name and part in name for name in chosen) for b in range(blocks)]


def test_of_each_block_two_of_attention_one_norm_and_of_the_feed_forward_two_or_one_in_half_of_the_blocks_each():
    for seed in range(20):
        chosen = drawn(kinds_of(names_of(8)), 0.5, chance(seed))
        assert per_block(chosen, 8, "self_attn") == [2] * 8
        assert per_block(chosen, 8, "norm") == [1] * 8
        assert sorted(per_block(chosen, 8, "mlp")) == [1] * 4 + [2] * 4
        assert all("layers" in name for name in chosen)


@pytest.mark.parametrize("share", [0.25, 0.4, 0.75, 1.0])
def test_another_share_is_met_over_all_blocks(share):
    chosen = drawn(kinds_of(names_of(8)), share, chance())
    for part, units in (("self_attn", 4), ("norm", 2), ("mlp", 3)):
        counts = per_block(chosen, 8, part)
        assert sum(counts) == round(8 * units * share) and max(counts) - min(counts) <= 1


def test_every_matrix_is_drawn_as_often_as_any_other_and_each_stage_draws_anew():
    counts = dict.fromkeys(names_of(2), 0)
    rounds = [drawn(kinds_of(names_of(2)), 0.5, chance(seed)) for seed in range(400)]
    for chosen in rounds:
        for name in chosen:
            counts[name] += 1
    assert all(150 < count < 250 for name, count in counts.items() if "layers" in name)
    assert len(set(map(frozenset, rounds))) > 300


def test_fused_and_nested_matrices_and_biases_are_of_their_kind():
    kinds = kinds_of(name for name, _ in tiny("gpt2").named_parameters())
    units = {kind.rpartition("|")[2]: blocks[0] for kind, blocks in kinds.items()}
    assert set(units["attn"]) == {"attn.c_attn", "attn.c_proj"} and set(units["feed-forward"]) == {
        "mlp.c_fc",
        "mlp.c_proj",
    }
    assert set(units["norm"]) == {"ln_1", "ln_2"}
    assert units["attn"]["attn.c_attn"] == ["transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.weight"]
    kinds = kinds_of(name for name, _ in tiny("bert").named_parameters())
    units = {kind.rpartition("|")[2]: set(blocks[0]) for kind, blocks in kinds.items()}
    inner = {f"attention.self.{m}" for m in ("query", "key", "value")}
    assert units["attention"] == inner | {"attention.output.dense"}
    assert units["feed-forward"] == {"intermediate.dense", "output.dense"}
    kinds = kinds_of(name for name, _ in tiny("mixtral").named_parameters())
    assert any(name.endswith("experts.down_proj") for name in kinds["model.layers|feed-forward"][0])


def test_a_wrapper_beside_it_is_refused():
    view = SimpleNamespace(rng=chance())
    with pytest.raises(UserError, match="leave the wrapper"):
        registry.make("param/half").freeze(["model.embed_tokens.weight"], view)


def test_a_plan_counts_only_what_is_trained():
    stage = SimpleNamespace(train=None, length=32)
    whole = tiny("llama")
    modality = SimpleNamespace(model=lambda *args, **kwargs: copy.deepcopy(whole).to("meta"))
    node = SimpleNamespace(stage=stage, graph=SimpleNamespace(modality=modality))
    trained = {}
    for share in (1.0, 0.5):
        method = registry.make({"use": "param/half", "share": share})
        methods = Methods({}, [method])
        trained[share] = sizing.model_of(node, {}, processor=None, methods=methods).trained
    inside = sum(p.numel() for name, p in tiny("llama").named_parameters() if "layers" in name)
    assert 0.4 * inside < trained[1.0] - trained[0.5] < 0.6 * inside


def test_a_reset_puts_back_what_it_drew_and_leaves_the_rest():
    names = names_of(4)
    site = Site(seed=0, stage="reset", names=tuple(names))
    method = registry.make("merge/half_reset")
    old, new = torch.zeros(3), torch.ones(3)
    back = {name for name in names if torch.equal(method.tensor(name, [new], old, site), old)}
    assert back == drawn(kinds_of(names), 0.5, site.rng) and len(back) == 4 * (2 + 1) + 6

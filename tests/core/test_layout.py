"""What each axis of each weight counts: against what is known of families whose code was read."""

import pytest
import torch

from tests.core.tiny import HEADS, HIDDEN, tiny
from tutelage.base.errors import UserError
from tutelage.core.layout import layout

SIZE = HIDDEN // HEADS


def seen(name, **changes):
    model = tiny(name)
    return layout({**model.config.to_dict(), "architectures": [type(model).__name__], **changes})


def spaces(found, name):
    return [f"{axis.space}{' read' if axis.read else ''}" for axis in found.axes[name]]


def test_query_heads_belong_to_the_key_head_that_they_share():
    found = seen("llama")
    axis = found.axes["model.layers.1.self_attn.q_proj.weight"][0]
    assert axis.unit_N.tolist() == [0] * 2 * SIZE + [1] * 2 * SIZE
    assert axis.part_N.tolist() == [*range(2 * SIZE)] * 2
    key, value = (found.axes[f"model.layers.1.self_attn.{part}_proj.weight"][0] for part in "kv")
    assert key.part_N.tolist() == [2 * SIZE + d for d in range(SIZE)] * 2
    assert value.part_N.tolist() == [3 * SIZE + d for d in range(SIZE)] * 2
    assert found.sizes == {"hidden": 32, "mlp": 48, "heads": 2}


def test_a_fused_projection_in_three_runs_and_one_interleaved_by_head_are_told_apart():
    runs = seen("gpt2").axes["transformer.h.0.attn.c_attn.weight"][1]
    assert runs.unit_N.tolist() == [h for _ in range(3) for h in range(HEADS) for _ in range(SIZE)]
    assert runs.part_N.tolist() == [run * SIZE + d for run in range(3) for _ in range(HEADS) for d in range(SIZE)]
    woven = seen("gpt_neox").axes["gpt_neox.layers.0.attention.query_key_value.weight"][0]
    assert woven.unit_N.tolist() == [h for h in range(HEADS) for _ in range(3 * SIZE)]
    assert woven.part_N.tolist() == [*range(3 * SIZE)] * HEADS


def test_axes_that_are_summed_over_are_told_from_those_that_are_written():
    gpt2, bert = seen("gpt2"), seen("bert")
    assert spaces(gpt2, "transformer.h.0.attn.c_proj.weight") == ["heads read", "hidden"]
    assert spaces(gpt2, "transformer.h.0.mlp.c_fc.weight") == ["hidden read", "mlp"]
    assert spaces(gpt2, "lm_head.weight") == ["", "hidden"], "a tied head is an embedding"
    assert spaces(bert, "bert.encoder.layer.0.output.dense.weight") == ["hidden", "mlp read"]
    assert spaces(bert, "bert.embeddings.token_type_embeddings.weight") == ["", "hidden"]
    assert spaces(seen("llama", tie_word_embeddings=False), "lm_head.weight") == ["", "hidden read"]


def test_what_stands_before_the_head_is_named_as_files_name_it():
    assert seen("bert").before_head == tuple(f"cls.predictions.transform.LayerNorm.{k}" for k in ("weight", "bias"))
    assert seen("llama").before_head == ("model.norm.weight",)
    assert "embed_out.weight" in seen("gpt_neox", tie_word_embeddings=False).axes


def test_a_layer_as_wide_inside_as_outside_is_no_riddle():
    assert spaces(seen("llama", intermediate_size=HIDDEN), "model.layers.0.mlp.up_proj.weight") == [
        "mlp",
        "hidden read",
    ]


def test_nothing_is_left_behind_that_makes_later_models_weightless():
    with pytest.raises(UserError):
        seen("t5")
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    assert seen("llama").tied

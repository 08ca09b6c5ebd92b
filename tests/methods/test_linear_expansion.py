"""Linear expansion: gradients beside autograd through θ_B + (l / L) · θ_A, and descendants beside the authors' formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.tiny import tiny, tokens
from tests.methods.small import batch_of, transformed, view_of
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core.types import Batch
from tutelage.methods._kit.expansion import apart, exact_to, kinds, point, slope
from tutelage.methods.objective.causal_lm import CausalLM
from tutelage.methods.param.linear_expansion import LinearExpansion

BLOCKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "bert": "bert.encoder.layer",
}


def test_the_line_by_hand() -> None:
    """Four blocks 1, 1.5, 2, 2.5: θ_B = 1, θ_A = 2; of five, the third begins at 1 + 2/5 · 2."""
    line = [torch.tensor([value]) for value in (1.0, 1.5, 2.0, 2.5)]
    rise = slope(line[0], line[-1], 4)
    assert float(rise) == 2.0 and float(point(line[0], rise, 2, 5)) == pytest.approx(1.8)
    assert apart(line) == 0.0 and apart([*line[:3], torch.tensor([3.0])]) == pytest.approx((5 / 3 - 1.5) / 3 * 2)


def test_only_what_every_block_has_lies_on_a_line() -> None:
    names = ["h.0.a.w", "h.1.a.w", "h.0.bias", "wte.w", "g.0.a.w", "g.1.a.w"]
    assert kinds(names, {"h": 2}) == {"h.a.w": ["h.0.a.w", "h.1.a.w"]}


# -- the auxiliary model --------------------------------------------------------------------------------------------


def four_blocks(name: str = "gpt2") -> Any:
    """A tiny model of four blocks, each unlike the others."""
    config = tiny(name).config
    config.num_hidden_layers = 4
    config.layer_types = None
    torch.manual_seed(1)
    model = type(tiny(name))(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def begun() -> tuple[LinearExpansion, Any, dict[str, Tensor]]:
    """The method on a model of four blocks, as a stage begins it: view, and the parameters with θ_A among them."""
    view = view_of(objective=CausalLM(), model=four_blocks())
    method = LinearExpansion()
    method.begin(view.engine.model, view)
    rises = method.modules(view.engine.model)["expansion"]
    view.engine.params |= {f"expansion.{name}": p for name, p in rises.named_parameters()}
    return method, view, view.engine.params


def loss_of(view: Any, batch: Batch) -> Tensor:
    total, weight = view.engine.objective.loss(view.engine.out, batch, view)
    return total / weight


def test_a_stage_begins_with_its_blocks_on_the_line_through_the_first_and_the_last() -> None:
    before = {name: p.detach().clone() for name, p in four_blocks().named_parameters()}
    _, _, params = begun()
    for line in kinds(before, {"transformer.h": 4}).values():
        assert params[line[0]].equal(before[line[0]])
        torch.testing.assert_close(params[line[3]], before[line[3]], atol=1e-6, rtol=0)
        torch.testing.assert_close(params[line[1]], (2 * before[line[0]] + before[line[3]]) / 3, atol=1e-6, rtol=0)
    assert params["transformer.wte.weight"].equal(before["transformer.wte.weight"])


def test_gradients_are_those_of_the_two_modules_that_make_all_blocks() -> None:
    """Autograd through weights written as θ_B + (l / L) · θ_A is the reference."""
    method, view, params = begun()
    model, batch = view.engine.model, batch_of(["abcabc", "xyz"])
    (loss_of(view, batch) + method.penalty(params, view)).backward()
    grads = {name: p.grad for name, p in params.items()}
    method.grads(grads, view)

    lines = method.lines(dict(model.named_parameters()))
    bases = {k: params[line[0]].detach().clone().requires_grad_() for k, line in lines.items()}
    rises = {k: params[f"expansion.{k.replace('.', '/')}"].detach().clone().requires_grad_() for k in lines}
    made = {name: bases[k] + (i / 4) * rises[k] for k, line in lines.items() for i, name in enumerate(line)}
    fields = {"input_ids": batch["tokens"], "attention_mask": (batch["segments"] > 0).long()}
    logits = torch.func.functional_call(model, made, (), fields).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    for kind, line in lines.items():
        torch.testing.assert_close(grads[line[0]], bases[kind].grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(grads[f"expansion.{kind.replace('.', '/')}"], rises[kind].grad, atol=1e-6, rtol=1e-4)
        assert all(not grads[name].any() for name in line[1:])


def test_after_a_step_all_blocks_follow_from_what_was_stepped() -> None:
    method, view, params = begun()
    with torch.no_grad():
        for p in params.values():
            p.add_(torch.randn_like(p), alpha=0.1)  # also of blocks that an optimizer's decay would have moved
        method.after(params, view)
    for kind, line in method.lines(dict(view.engine.model.named_parameters())).items():
        rise = params[f"expansion.{kind.replace('.', '/')}"]
        for i, name in enumerate(line):
            torch.testing.assert_close(params[name], params[line[0]] + (i / 4) * rise, atol=1e-6, rtol=0)


def test_a_block_that_is_not_trained_is_named() -> None:
    method, view, params = begun()
    grads = {name: torch.zeros_like(p) for name, p in params.items() if name != "transformer.h.2.attn.c_attn.weight"}
    with pytest.raises(UserError, match=r"transformer\.h\.2\.attn\.c_attn\.weight has no gradient"):
        method.grads(grads, view)


# -- descendants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_every_block_of_a_descendant_has_the_weights_of_its_depth(name: str, tied: bool, tmp_path: Path) -> None:
    start = tiny(name, tied=tied)  # two blocks, which lie on a line: θ_B the first, θ_A twice the difference
    start.save_pretrained(tmp_path / "start")
    made, _ = transformed([tmp_path / "start"], tmp_path / "made", use="init/linear_expansion", depth=5)
    assert len(made.get_submodule(BLOCKS[name])) == made.config.num_hidden_layers == 5
    old, new = dict(start.named_parameters()), dict(made.named_parameters())
    for kind, line in kinds(old, {BLOCKS[name]: 2}).items():
        base, rise = old[line[0]], 2 * (old[line[1]] - old[line[0]])
        for i in range(5):
            found = new[f"{BLOCKS[name]}.{i}{kind.removeprefix(BLOCKS[name])}"]
            torch.testing.assert_close(found, i / 5 * rise + base, atol=1e-6, rtol=0)
    rest = [key for key in old if not key.startswith(BLOCKS[name] + ".")]
    assert rest and all(old[key].equal(new[key]) for key in rest)


@pytest.mark.parametrize("name", [*BLOCKS, "t5", "mixtral"])
@torch.no_grad()
def test_as_deep_as_it_was_a_model_answers_as_it_did(name: str, tmp_path: Path) -> None:
    start = tiny(name).eval()
    start.save_pretrained(tmp_path / "start")
    made, _ = transformed([tmp_path / "start"], tmp_path / "made", use="init/linear_expansion")
    torch.testing.assert_close(made(**tokens(name)).logits, start(**tokens(name)).logits, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_deeper_and_back_is_the_model_that_it_was(tmp_path: Path) -> None:
    """Eight blocks are on the same line as the two they came from, which the first of them and the fifth are again."""
    start = tiny("llama")
    start.save_pretrained(tmp_path / "start")
    transformed([tmp_path / "start"], tmp_path / "deep", use="init/linear_expansion", depth=8)
    again, _ = transformed([tmp_path / "deep"], tmp_path / "again", use="init/linear_expansion", depth=2)
    for a, b in zip(start.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_blocks_on_no_line_are_refused_with_what_puts_them_there(tmp_path: Path) -> None:
    four_blocks().save_pretrained(tmp_path / "start")
    with pytest.raises(UserError, match=r"lie on no line \(off by .*train the start with param/linear_expansion"):
        transformed([tmp_path / "start"], tmp_path / "made", use="init/linear_expansion", depth=3)


def test_bf16_blocks_may_lie_off_by_their_rounding_and_no_more() -> None:
    line = [torch.linspace(0.5, 2.0, 7) + 0.3 * i for i in range(4)]
    rounded = [t.bfloat16() for t in line]
    assert 0 < apart(rounded) <= exact_to(torch.bfloat16)
    off = [*rounded[:1], rounded[1] + 0.06, *rounded[2:]]  # a fiftieth of the largest number
    assert apart(off) > exact_to(torch.bfloat16)


def test_one_block_makes_no_line() -> None:
    with pytest.raises(UserError, match="two blocks make a line, and h has one"):
        registry.make("init/linear_expansion").grow({"n_layer": 1}, {"h.0.w": torch.zeros(1)}, None)

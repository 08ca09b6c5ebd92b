"""EVA: what the factors begin with, how ranks are divided, and the round trip through PEFT."""

import json

import peft
import pytest
import torch

from tests.core.tiny import tiny
from tests.methods.small import Texts, data_of, view_of
from tests.methods.test_lora import learn, logits, wrapped, write
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.methods.param import eva

TEXTS = [f"the {animal} number {i} ran {i * i} times" for i in range(12) for animal in ("cat", "dog", "rat")]


def seen(name, **settings):
    """The model with EVA begun and wrapped, its wrappers, its method, and the view."""
    method = registry.make({"use": "param/eva", "r": 4, "passages": 36, **settings})
    model = tiny(name)
    view = view_of(name, objective=registry.make("objective/causal_lm"), model=model)
    view._sample = lambda rows: next(data_of([Texts("all", TEXTS)]).once(rows, rows=rows))
    method.begin(model, view)
    return model, wrapped(model, method), method, view


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_factor_begins_with_the_directions_in_which_the_inputs_vary_most(name):
    model, found, _, _ = seen(name, tau=0.9999)
    plain, inputs = tiny(name), {}
    view = view_of(name, objective=registry.make("objective/causal_lm"), model=plain)
    batch = next(data_of([Texts("all", TEXTS)]).once(36, rows=36))
    hooks = [
        plain.get_submodule(label).register_forward_hook(
            lambda module, args, out, label=label: inputs.__setitem__(label, eva.counted(args, eva.masks(batch), label))
        )
        for label in found
    ]
    view.model(batch)
    for hook in hooks:
        hook.remove()
    for label, wrapper in found.items():
        a = wrapper.lora_A["default"].weight.detach()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-4)
        centered = inputs[label] - inputs[label].mean(0)
        best = torch.linalg.svdvals(centered)[: len(a)].square().sum()
        assert (centered @ a.T).square().sum() > 0.98 * best, label
        chance = torch.linalg.qr(torch.randn(a.shape[1], len(a), generator=torch.Generator().manual_seed(0)))[0]
        assert (centered @ chance).square().sum() < 0.9 * best, label
    assert torch.equal(logits(model, name), logits(tiny(name), name))  # B starts at 0


def test_ranks_go_to_the_layers_whose_inputs_they_explain_and_their_sum_stays():
    _, found, method, _ = seen("llama")
    ranks = method.state["ranks"]
    assert sum(ranks.values()) == 4 * len(ranks) and len(set(ranks.values())) > 1 and max(ranks.values()) <= 8
    assert set(found) == {name for name, rank in ranks.items() if rank}
    for name, wrapper in found.items():
        assert wrapper.r["default"] == ranks[name] and wrapper.scaling["default"] == pytest.approx(16 / 4)
    assert "directions" not in method.state, "let go of once they are in the factors"
    _, _, even, _ = seen("llama", rho=1.0)
    assert set(even.state["ranks"].values()) == {4}


@pytest.mark.parametrize("rslora", [False, True])
def test_additions_of_all_ranks_have_the_same_factor(rslora):
    _, found, method, _ = seen("llama", rslora=rslora)
    assert len(set(method.state["ranks"].values())) > 1
    factors = {wrapper.scaling["default"] for wrapper in found.values()}
    assert all(factor == pytest.approx(16 / (2 if rslora else 4)) for factor in factors)


def test_a_resumed_stage_wraps_the_same_from_its_state_alone():
    _, found, method, _ = seen("llama")
    again = registry.make({"use": "param/eva", "r": 4})
    again.state.update(method.state)
    other = wrapped(tiny("llama"), again)
    shapes = [{name: w.lora_A["default"].weight.shape for name, w in made.items()} for made in (found, other)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_loads_the_adapter_with_its_ranks_and_answers_alike(name, tmp_path):
    model, found, method, _ = seen(name)
    learn(model.train(), name)
    wanted = logits(model, name)
    write(tmp_path / "adapter", method.adapter(found))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, name), wanted, rtol=0, atol=1e-5)
    folded = tiny(name)
    for label, wrapper in found.items():
        folded.get_submodule(label).weight.data = method.fold(wrapper)
    torch.testing.assert_close(logits(folded, name), wanted, rtol=0, atol=1e-5)


def test_positions_without_anything_to_learn_do_not_count():
    batch = next(data_of([Texts("some", TEXTS[:2], prompt=6)]).once(2, rows=2))
    mask = eva.masks(batch)[0]
    x = torch.randn(*mask.shape, 5)
    assert torch.equal(eva.counted((x,), [mask], "layer"), x[mask]) and not mask[:, :6].any()
    assert eva.counted(torch.randn(3, 7, 5), [mask], "layer").shape == (21, 5)


def test_what_cannot_be_is_refused_by_name(monkeypatch):
    with pytest.raises(UserError, match=r"2·rho·r is 48, more than the 32 inputs"):
        seen("llama", r=12)
    monkeypatch.setattr(eva, "MOST", 3)
    with pytest.raises(UserError, match="tau: the directions of some layer have not settled after 3"):
        seen("llama", tau=1.0)

"""SVFit: what it trains, the weight that it stands for, and the gradient of a singular value."""

import pytest
import torch

from tests.core.tiny import tiny, tokens
from tests.methods.test_lora import FAMILIES, learn, logits, wrapped
from tutelage.base import registry
from tutelage.methods._kit.wrapping import outputs_first, turned


def make(**settings):
    return registry.make({"use": "param/svfit", **settings})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("r", [5, None])
def test_a_weight_keeps_its_singular_vectors_and_gets_new_values_for_the_first_r(name, r):
    model, method = tiny(name), make(r=r)
    plain = dict(tiny(name).named_modules())
    before = logits(tiny(name), name)
    found = wrapped(model, method)
    assert torch.equal(logits(model, name), before), "nothing has moved yet"
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{label}.values" for label in found}
    learn(model.train(), name)
    wanted = logits(model, name)
    assert (wanted - before).abs().max() > 1e-3
    folded = tiny(name)
    for label, wrapper in found.items():
        weight = outputs_first(plain[label]).detach()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        assert len(wrapper.values) == (r or min(weight.shape))
        values[:r] = wrapper.values.detach()
        new = method.fold(wrapper)
        torch.testing.assert_close(new.T if turned(plain[label]) else new, (left * values) @ right, rtol=0, atol=1e-5)
        folded.get_submodule(label).weight.data = new
    torch.testing.assert_close(logits(folded, name), wanted, rtol=0, atol=1e-5)


def test_a_singular_values_gradient_is_that_of_the_weight_between_its_vectors():
    whole, name = tiny("llama").requires_grad_(True), "model.layers.0.mlp.up_proj"
    model = tiny("llama")
    wrapper = wrapped(model, make(r=7))[name]
    for each in (whole, model):
        inputs = tokens("llama", seed=4)
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    weight = whole.get_submodule(name).weight
    left, _, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    wanted = (left.T @ weight.grad @ right.T).diagonal()[:7]
    torch.testing.assert_close(wrapper.values.grad, wanted, rtol=1e-4, atol=1e-6)
    assert wrapper.values.grad.abs().max() > 1e-4


def test_the_rest_of_the_weight_can_be_dropped():
    model, method = tiny("llama"), make(r=6, rest="dropped")
    for name, wrapper in wrapped(model, method).items():
        left, values, right = torch.linalg.svd(tiny("llama").get_submodule(name).weight.detach(), full_matrices=False)
        torch.testing.assert_close(method.fold(wrapper), (left[:, :6] * values[:6]) @ right[:6], rtol=0, atol=1e-5)
        assert torch.linalg.matrix_rank(method.fold(wrapper), rtol=1e-4) == 6
    assert (logits(model, "llama") - logits(tiny("llama"), "llama")).abs().max() > 1e-2


def test_at_full_rank_it_trains_a_sixteenth_of_what_lora_of_rank_8_does_in_a_square_matrix():
    counts = []
    for method in (
        make(targets=["q_proj", "o_proj"]),
        registry.make({"use": "param/lora", "targets": ["q_proj", "o_proj"]}),
    ):
        model = tiny("llama")
        wrapped(model, method)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert counts[1] == 16 * counts[0]

"""Optimal transport: a model and its copy in another order fuse to the model itself, whatever was moved."""

import pytest
import torch
import transformers as tf

from tests.core.tiny import AUTO, tiny, tokens
from tests.methods.small import transformed
from tutelage.core.layout import layout
from tutelage.methods._kit.widen import places
from tutelage.methods.merge.optimal_transport import group_of

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox", "bert")


def unlike(model, seed=0):
    """So that no two units are alike: fresh norms and biases are all ones or zeros."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.05)
    return model


def reordered(model, folder, spaces, seed=0):
    """The same model with units of some spaces in another order, saved; how many orders are others."""
    rng, found = torch.Generator().manual_seed(seed), layout(model.config.to_dict())
    orders: dict[tuple[str, str], torch.Tensor] = {}
    model.save_pretrained(folder)
    auto = AUTO.get(model.config.model_type, tf.AutoModelForCausalLM)
    copy = auto.from_pretrained(folder, dtype=model.dtype)
    state = copy.state_dict()
    for name in sorted(found.axes.keys() & state.keys()):
        for dim, axis in enumerate(found.axes[name]):
            if axis.space in spaces:
                group = group_of(name, axis)
                order = orders.setdefault(group, torch.randperm(found.sizes[axis.space], generator=rng))
                state[name] = state[name].index_select(dim, places(axis, axis, order))
    with torch.no_grad():
        for name, p in copy.named_parameters():
            p.copy_(state[name])
    copy.tie_weights()
    copy.save_pretrained(folder)
    return copy.eval()


def fused(folders, out, model, use="merge/optimal_transport", **settings):
    return transformed(folders, out, use=use, dtype=model.dtype, **settings)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spaces", [("mlp",), ("heads",), ("mlp", "heads"), ("mlp", "heads", "hidden")])
def test_a_model_and_its_copy_in_another_order_fuse_to_the_model(name, spaces, tmp_path):
    model = unlike(tiny(name)).eval()
    model.save_pretrained(tmp_path / "one")
    copy = reordered(model, tmp_path / "other", spaces)
    inputs = tokens(name)
    wanted = model(**inputs).logits
    torch.testing.assert_close(copy(**inputs).logits, wanted, atol=1e-4, rtol=1e-4)
    folders = [tmp_path / "one", tmp_path / "other"]
    made, method = fused(folders, tmp_path / "made", model, residual="hidden" in spaces)
    torch.testing.assert_close(made(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
    moved = {key: share for key, share in method.state.items() if key.startswith("moved/")}
    several = [key for key in moved if any(f"/{space}/" in key for space in spaces)]
    if any(share for key, share in moved.items() if key in several):
        plain, _ = fused(folders, tmp_path / "plain", model, use="merge/linear")
        assert float((plain(**inputs).logits - wanted).abs().max()) > 1e-2
    else:
        assert spaces == ("heads",), "one head group alone has no other order"


def test_all_weight_on_one_is_that_one_in_the_first_ones_order(tmp_path):
    model = unlike(tiny("llama")).eval()
    model.save_pretrained(tmp_path / "one")
    other = unlike(tiny("llama"), seed=5).eval()
    other.save_pretrained(tmp_path / "other")
    made, _ = fused([tmp_path / "one", tmp_path / "other"], tmp_path / "made", model, weights=[0.0, 1.0], residual=True)
    inputs = tokens("llama")
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs).logits, other(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_models_that_share_a_start_are_averaged_as_they_are(tmp_path):
    model = unlike(tiny("llama")).eval()
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    model.save_pretrained(tmp_path / "other")
    folders = [tmp_path / "one", tmp_path / "other"]
    made, method = fused(folders, tmp_path / "made", model)
    plain, _ = fused(folders, tmp_path / "plain", model, use="merge/linear")
    assert not any(method.state.values())
    for a, b in zip(made.parameters(), plain.parameters(), strict=True):
        assert a.equal(b)

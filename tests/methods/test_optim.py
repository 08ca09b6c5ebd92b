"""Optimizers: the papers' updates, the right parameters in the right hands, and states that can be put back."""

import pytest
import torch

from tests.core.tiny import tiny, tokens
from tutelage.base import registry
from tutelage.core.anatomy import anatomy
from tutelage.methods._kit.spectra import orthogonal
from tutelage.methods.optim.muon import factor


def groups_of(model, *, rate=1.0, decay=None):
    parts = anatomy(model)
    found = {}
    for name, p in model.named_parameters():
        role = parts.role(name)
        group = found.setdefault(role, {"role": role, "rate": rate, "decay": decay, "names": [], "params": []})
        group["names"].append(name)
        group["params"].append(p)
    return list(found.values())


def train(model, optimizer, steps, *, name, first=0):
    for step in range(first, first + steps):
        batch = tokens(name, seed=step)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_adamw_decays_matrices_and_embeddings_but_no_norm_and_no_bias():
    model = tiny("gpt2")
    optimizer = registry.make({"use": "optim/adamw", "decay": 0.3}).build(groups_of(model))
    decay = {g["role"]: g["weight_decay"] for g in optimizer.param_groups}
    assert decay == {"embedding": 0.3, "norm": 0.0, "bias": 0.0, "matrix": 0.3}
    kept = registry.make({"use": "optim/adamw", "decay_embeddings": False}).build(groups_of(model))
    assert {g["role"]: g["weight_decay"] for g in kept.param_groups}["embedding"] == 0.0
    assert all(len(g["names"]) == len(g["params"]) for g in optimizer.param_groups)


def test_a_groups_own_rate_and_decay_reach_the_optimizer():
    for use in ("adamw", "muon", "galore", "fira"):
        method = registry.make({"use": f"optim/{use}", "lr": 0.01})
        optimizer = method.build(groups_of(tiny("llama"), rate=0.5, decay=0.7))
        assert {g["lr"] for g in optimizer.param_groups} == {0.005}
        assert {g["weight_decay"] for g in optimizer.param_groups} == {0.7}


def test_adamw_makes_the_papers_step():
    p = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    group = {"role": "matrix", "rate": 1.0, "decay": None, "names": ["w"], "params": [p]}
    optimizer = registry.make({"use": "optim/adamw", "lr": 0.1, "decay": 0.2, "eps": 1e-12}).build([group])
    p.grad = torch.tensor([[0.3, -5.0]])
    optimizer.step()
    wanted = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.2) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(p.detach(), wanted)


@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24), (3, 16, 40)])
def test_newton_schulz_makes_singular_values_even_and_keeps_directions(shape):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonal(x)
    values = torch.linalg.svdvals(y)
    large = values[s / torch.linalg.matrix_norm(x).unsqueeze(-1) > 0.02]
    assert large.min() > 0.6 and large.max() < 1.25
    inside = u.mT @ y @ v.mT  # diagonal in the singular vectors of x
    assert (inside - torch.diag_embed(torch.diagonal(inside, dim1=-2, dim2=-1))).abs().max() < 1e-3


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
def test_muon_is_torchs_muon_but_for_the_precision_of_its_iteration(scale):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(12, 20, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    group = {"role": "matrix", "rate": 1.0, "decay": None, "names": ["w"], "params": [ours]}
    settings = {"lr": 0.02, "momentum": 0.9}
    one = registry.make({"use": "optim/muon", "scale": scale, "decay": 0.1, **settings}).build([group])
    other = torch.optim.Muon([theirs], weight_decay=0.1, adjust_lr_fn=scale, **settings)
    for _ in range(5):
        ours.grad = torch.randn(12, 20, generator=generator)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_an_update_of_muon_is_as_large_as_one_of_adamw():
    update = orthogonal(torch.randn(128, 48, generator=torch.Generator().manual_seed(2)))
    rms = float((update * factor(128, 48, "match_rms_adamw")).square().mean().sqrt())
    assert rms == pytest.approx(0.2, rel=0.15)


def test_muon_takes_hidden_matrices_and_experts_and_leaves_the_rest_to_adamw():
    model = tiny("mixtral", tied=False)
    optimizer = registry.make("optim/muon").build(groups_of(model))
    train(model, optimizer, 1, name="mixtral")
    parts = anatomy(model)
    for name, p in model.named_parameters():
        slots = set(optimizer.state[p])
        hidden = parts.role(name) in ("matrix", "expert")
        assert slots == ({"momentum_buffer"} if hidden else {"step", "exp_avg", "exp_avg_sq"}), name
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("use", ["adamw", "muon", "galore", "fira"])
def test_a_state_put_back_by_parameter_goes_on_to_the_bit(use):
    method = registry.make({"use": f"optim/{use}", "lr": 0.01})
    whole = tiny("qwen2")
    optimizer = method.build(groups_of(whole))
    train(whole, optimizer, 2, name="qwen2")
    names = {id(p): n for n, p in whole.named_parameters()}
    saved = {names[id(p)]: {k: v.clone() for k, v in slots.items()} for p, slots in optimizer.state.items()}
    cut = tiny("qwen2")
    cut.load_state_dict(whole.state_dict())
    train(whole, optimizer, 2, name="qwen2", first=2)

    second = method.build(groups_of(cut))
    own = dict(cut.named_parameters())
    for name, slots in saved.items():
        for slot, value in slots.items():
            second.state[own[name]][slot] = value
    train(cut, second, 2, name="qwen2", first=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


@pytest.mark.parametrize("use", ["adamw", "muon", "galore", "fira"])
def test_the_rate_that_the_engine_sets_is_the_rate_of_the_step(use):
    model = tiny("llama")
    optimizer = registry.make({"use": f"optim/{use}", "lr": 0.1}).build(groups_of(model))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 1, name="llama")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

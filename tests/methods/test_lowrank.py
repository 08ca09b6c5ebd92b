"""GaLore and Fira: their papers' formulas written out, what is kept beside the formula, what is projected and what not."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tests.core.tiny import tiny
from tests.methods.test_optim import groups_of, train
from tutelage import sizing
from tutelage.base import registry
from tutelage.core.anatomy import anatomy
from tutelage.methods._kit.lowrank import basis_of

SHAPES = [(24, 40), (40, 24), (20, 20)]
RATE, RANK, REFRESH, SCALE, BETAS, EPS = 0.02, 5, 3, 0.25, (0.9, 0.99), 1e-12
SETTINGS = {"lr": RATE, "rank": RANK, "refresh": REFRESH, "scale": SCALE, "betas": BETAS, "eps": EPS}


def gradients(shape, steps=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(side, 12, generator=generator, dtype=dtype) for side in shape)
    noise = [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(steps)]
    grown = [1.0, 1.0, 3.0, 0.5, 0.5, 4.0, 4.0, 1.0]  # so that the limiter of Fira has something to limit
    return [size * (left @ right.T + 2 * each) for size, each in zip(grown, noise, strict=True)]


def papers(kind, shape, grads, *, decay=0.0, limit=1.01, code=False):
    """The change of a weight that began at 1, by the papers' formulas. They are written for m ≤ n: others are turned.

    Fira's is its algorithm 1, G̃ = α (P N + S); with `code` what its authors' code makes of it.
    """
    turned = shape[0] >= shape[1]
    weight = torch.ones(shape, dtype=torch.float64)
    m = v = before = None
    for t, grad in enumerate(grads, 1):
        g = grad.T if turned else grad
        if (t - 1) % REFRESH == 0:
            left, _, right = torch.linalg.svd(grad)  # not of g: the means outlive the signs that a routine chooses
            p = right[:RANK].T if turned else left[:, :RANK]
        r = p.T @ g
        m = (1 - BETAS[0]) * r + (0 if m is None else BETAS[0] * m)
        v = (1 - BETAS[1]) * r**2 + (0 if v is None else BETAS[1] * v)
        n = (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
        update = SCALE * p @ n
        if kind == "fira":
            phi = torch.stack([n[:, j].norm() / r[:, j].norm() for j in range(r.shape[1])])
            s = (g - (SCALE if code else 1.0) * p @ r) * phi
            # the code limits the growth before bias correction
            corrected = math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t) if code else 1.0
            if before is not None and s.norm() / corrected > limit * before:
                s = s / s.norm() * limit * before * corrected
            before = s.norm() / corrected
            update = update + (s if code else SCALE * s)
        weight = (weight - RATE * (update.T if turned else update)) * (1 - RATE * decay)
    return weight


def ours(use, shape, grads, **more):
    p = torch.nn.Parameter(torch.ones(shape, dtype=torch.float64))
    method = registry.make({"use": f"optim/{use}", **SETTINGS, **more})
    optimizer = method.build([{"role": "matrix", "rate": 1.0, "decay": None, "names": ["w"], "params": [p]}])
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use", ["galore", "fira"])
def test_the_update_is_the_papers_formula(use, shape):
    grads = gradients(shape)
    found, _ = ours(use, shape, grads, decay=0.3)
    # ours takes the singular vectors in float32
    torch.testing.assert_close(found, papers(use, shape, grads, decay=0.3), rtol=0, atol=2e-5)
    assert (found - 1).abs().max() > 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_firas_other_residual_is_what_the_authors_code_leaves(shape):
    grads = gradients(shape)
    found, _ = ours("fira", shape, grads, residual="code")
    torch.testing.assert_close(found, papers("fira", shape, grads, code=True), rtol=0, atol=2e-5)
    assert (found - ours("fira", shape, grads)[0]).abs().max() > 1e-2


def test_scale_is_firas_rate_as_its_algorithm_has_it():
    grads = gradients(SHAPES[0])
    whole, half = (ours("fira", SHAPES[0], grads, scale=scale)[0] - 1 for scale in (0.5, 0.25))
    torch.testing.assert_close(whole, 2 * half)


def test_firas_limiter_holds_the_growth_of_the_residual():
    def growth(**more):
        grads = gradients(SHAPES[0])
        norms = [float(ours("fira", SHAPES[0], grads[:n], **more)[1]["norm"]) for n in range(1, 9)]
        return max(after / before for before, after in pairwise(norms))

    assert [growth(), growth(residual="code")] == pytest.approx([1.01, 1.01], rel=1e-6)
    assert growth(limit=1e9) > 1.1 and growth(limit=1e9, residual="code") > 1.1


def test_only_matrices_in_blocks_are_projected_and_what_is_kept_follows_the_formula():
    rank = 4
    for use in ("galore", "fira"):
        model = tiny("mixtral", tied=False)
        optimizer = registry.make({"use": f"optim/{use}", "rank": rank}).build(groups_of(model))
        train(model, optimizer, 1, name="mixtral")
        parts = anatomy(model)
        for name, p in model.named_parameters():
            state = optimizer.state[p]
            kept = sum(t.numel() for t in state.values() if t.ndim)
            if parts.role(name) == "matrix":
                small, large = sorted(p.shape)
                assert kept == small * min(rank, small) + 2 * large * min(rank, small), name
                assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in state.values())
            else:
                assert kept == 2 * p.numel() and set(state) == {"step", "exp_avg", "exp_avg_sq"}, name


def test_a_rank_beyond_the_smaller_side_is_that_side():
    wide, _ = ours("galore", (6, 30), gradients((6, 30)), rank=64)
    full, _ = ours("galore", (6, 30), gradients((6, 30)), rank=6)
    assert torch.equal(wide, full)


def test_the_subspace_is_kept_between_refreshes():
    shape = SHAPES[1]
    bases = [ours("galore", shape, gradients(shape)[:steps])[1]["basis"] for steps in range(1, 8)]
    changed = [not torch.equal(a, b) for a, b in pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


def test_another_optimizers_state_or_rank_is_begun_anew():
    p = torch.nn.Parameter(torch.ones(8, 12))
    group = {"role": "matrix", "rate": 1.0, "decay": None, "names": ["w"], "params": [p]}
    optimizer = registry.make({"use": "optim/galore", "rank": 3}).build([group])
    optimizer.state[p].update(step=torch.tensor(7.0), exp_avg=torch.ones(8, 12), exp_avg_sq=torch.ones(8, 12))
    p.grad = torch.randn(8, 12)
    optimizer.step()
    assert set(optimizer.state[p]) == {"step", "basis", "low_avg", "low_avg_sq"}
    assert float(optimizer.state[p]["step"]) == 1.0
    other = registry.make({"use": "optim/galore", "rank": 2}).build([group])
    other.state[p].update(optimizer.state[p])
    other.step()
    assert other.state[p]["basis"].shape == (8, 2) and float(other.state[p]["step"]) == 1.0


def test_a_gradient_without_numbers_makes_weights_without_numbers_and_no_crash():
    grads = gradients(SHAPES[0])[:1]
    grads[0][0, 0] = math.nan
    assert basis_of(grads[0], 3).isnan().all()
    assert not ours("galore", SHAPES[0], grads)[0].isfinite().any()


@pytest.mark.parametrize("use", ["galore", "fira", "muon", "adamw"])
def test_the_plan_counts_what_the_optimizer_then_keeps(use):
    model = tiny("llama")
    method = registry.make({"use": f"optim/{use}", **({"rank": 4} if use in ("galore", "fira") else {})})
    optimizer = method.build(groups_of(model))
    train(model, optimizer, 1, name="llama")
    kept = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.ndim)
    about = sizing.Model(model, anatomy(model), 0, 0)
    planned = sizing.states_per_param(SimpleNamespace(slots={"optim": method}), about)
    assert planned * sum(p.numel() for p in model.parameters()) == pytest.approx(kept)

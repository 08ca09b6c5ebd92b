"""DivMerge on small models: what it minimizes, by which gradient, and what it finds beside a grid of equal coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from tests.core.tiny import tiny
from tests.methods.small import Texts, data_of, view_of
from tests.methods.tuned import TEXTS, beginning, tuned
from tutelage.base import registry
from tutelage.core.surgery import Site, Weights
from tutelage.core.types import IGNORE
from tutelage.methods._kit.blends import Blend
from tutelage.methods.merge.divergence import layer_of


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(kind: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tuned(kind, tmp_path_factory.mktemp(kind))


def fitted(kind: str, folders: list[Path], **settings: Any) -> tuple[Any, list[dict[str, float]]]:
    """A method that was fitted, and its steps."""
    view, starts = beginning(kind, folders)
    entry = {"inputs": list(TEXTS), "steps": 60, "rate": 0.05, "passages": 3, **settings}
    method = registry.make({"use": "merge/divergence", **entry})
    return method, [numbers for numbers, _ in method.fit(view.engine.out, starts, view)]


def by_hand(kind: str, folders: list[Path], coefficients: list[float]) -> float:
    """The mean divergence of both tasks at one coefficient for each model, from whole logits."""
    base, *models = ({n: w[f] for n, f in names(kind).items()} for w in map(Weights, folders))
    view, total = view_of(kind, objective=None), 0.0
    blend = {n: base[n] + sum(c * (m[n] - base[n]) for c, m in zip(coefficients, models, strict=True)) for n in base}
    for name, weights in zip(TEXTS, models, strict=True):
        (batch,) = data_of([Texts(name, TEXTS[name])]).once(3)
        inputs = view.engine.modality.inputs(batch, anatomy=view.engine.anatomy, packing="documents")
        with torch.no_grad():
            one, other = (functional_call(tiny(kind).eval(), w, kwargs=inputs).logits for w in (blend, weights))
        p, q = (logits.double().softmax(-1)[batch["labels"] != IGNORE] for logits in (one, other))
        middle = (p + q) / 2
        found = (p * (p / middle).log() + q * (q / middle).log()).sum(-1) / 2
        total += float(found.mean()) / len(TEXTS)
    return total


def names(kind: str) -> dict[str, str]:
    """The name in files of each parameter; these two kinds have one name for both."""
    return {name: name for name, _ in tiny(kind).named_parameters()}


def test_what_is_found_is_as_near_to_both_models_as_the_best_equal_coefficients(kind: str, folders: list[Path]) -> None:
    method, steps = fitted(kind, folders, level="task", steps=150)
    found = [method.state["coefficient"][name]["all"] for name in TEXTS]
    grid = {scale: by_hand(kind, folders, [scale, scale]) for scale in torch.linspace(0.0, 1.5, 16).tolist()}
    best = by_hand(kind, folders, found)
    assert best < 1.005 * min(grid.values()), (found, best, grid)  # how much nearer depends on the models
    assert steps[0]["loss"] == pytest.approx(by_hand(kind, folders, [0.5, 0.5]), rel=1e-4)
    assert max(found) > 0.7, found  # from 0.5, where both begin


def test_a_coefficient_for_each_layer_comes_nearer_still(kind: str, folders: list[Path]) -> None:
    task, layer = (fitted(kind, folders, level=level, steps=80)[1][-1]["loss"] for level in ("task", "layer"))
    assert layer < 0.95 * task


def test_all_of_one_model_answers_as_it_does(kind: str, folders: list[Path]) -> None:
    view, starts = beginning(kind, folders)
    blend = Blend(starts, {file: "all" for file in starts.files.values()}, view, initial=0.0)
    with torch.no_grad():
        blend.coefficients_NG[1] = 1.0
    blend.lay()
    method = registry.make({"use": "merge/divergence", "inputs": list(TEXTS)})
    (batch,) = data_of([Texts("digits", TEXTS["digits"])]).once(3)
    found = method._apart(view.engine.out, starts, 1, batch)
    assert float(found.total.detach()) / found.weight < 1e-6
    assert float(method._apart(view.engine.out, starts, 0, batch).total.detach()) / found.weight > 1e-3


@pytest.mark.parametrize("micro", [None, 2])
def test_the_gradient_is_that_of_autograd_through_the_sum(kind: str, folders: list[Path], micro: int | None) -> None:
    view, starts = beginning(kind, folders)
    view.engine.micro = micro
    blend = Blend(starts, {file: layer_of(file) for file in starts.files.values()}, view, initial=0.3)
    blend.lay()
    method = registry.make({"use": "merge/divergence", "inputs": list(TEXTS)})
    (batch,) = data_of([Texts("letters", TEXTS["letters"])]).once(3)
    blend.descend(lambda b: method._apart(view.engine.out, starts, 0, b), batch, key="test", share=0.5)

    plain = tiny(kind).eval()
    leaf_NG = torch.full((2, len(blend.names)), 0.3, requires_grad=True)
    weights = {}
    for name, column in blend.columns.items():
        base = starts.read(0, name)
        weights[name] = base + sum(leaf_NG[i, column] * (starts.read(i + 1, name) - base) for i in range(2))
    inputs = view.engine.modality.inputs(batch, anatomy=view.engine.anatomy, packing="documents")
    ours = functional_call(plain, weights, kwargs=inputs).logits
    with torch.no_grad():
        own = {name: starts.read(1, name) for name in blend.columns}
        theirs = functional_call(plain, own, kwargs=inputs).logits
    p, q = (logits.softmax(-1)[batch["labels"] != IGNORE] for logits in (ours, theirs))
    middle = (p + q) / 2
    loss = ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)).mean() / 2
    (0.5 * loss).backward()
    assert blend.coefficients_NG.grad is not None and leaf_NG.grad is not None
    torch.testing.assert_close(blend.coefficients_NG.grad, leaf_NG.grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in view.engine.params.values()), "no gradient of the model's size is kept"


def test_parameters_take_their_layers_multiples_and_buffers_stay_the_bases() -> None:
    base, one, two = (torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    method: Any = registry.make({"use": "merge/divergence", "inputs": ["a", "b"]})
    method._labels = ("one", "two")
    method._groups = {"h.0.mlp.weight": "h.0", "h.1.mlp.weight": "h.1"}
    method.state["coefficient"] = {"one": {"h.0": 0.2, "h.1": 0.5}, "two": {"h.0": 0.7, "h.1": -0.1}}
    for layer, (first, second) in {"h.0": (0.2, 0.7), "h.1": (0.5, -0.1)}.items():
        made = method.tensor(f"{layer}.mlp.weight", [one, two], base, Site(seed=0, stage="merged"))
        torch.testing.assert_close(made, base + first * (one - base) + second * (two - base), atol=1e-6, rtol=0)
    assert torch.equal(method.tensor("running_mean", [one, two], base, Site(seed=0, stage="merged")), base)


def test_a_layer_is_a_block_or_a_module_outside_of_blocks() -> None:
    named = {
        "model.layers.11.mlp.up_proj.weight": "model.layers.11",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight": "model.layers.0",
        "encoder.block.2.layer.0.k.weight": "encoder.block.2",
        "decoder.block.2.layer.0.k.weight": "decoder.block.2",
        "transformer.wte.weight": "transformer.wte",
        "model.norm.weight": "model.norm",
        "scale": "scale",
    }
    assert {name: layer_of(name) for name in named} == named

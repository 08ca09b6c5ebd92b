"""aTLAS on small models: its sum and its steps beside autograd's, few passages with labels, and inputs alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests.core.tiny import tiny
from tests.methods.small import Texts, data_of
from tests.methods.tuned import TEXTS, beginning, tuned
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core.surgery import Site
from tutelage.core.types import IGNORE
from tutelage.methods.merge.anisotropic import entropy

KIND = "llama"  # its head is tied to its embedding


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tuned(KIND, tmp_path_factory.mktemp("tuned"))


def fitted(folders: list[Path], **settings: Any) -> tuple[Any, list[dict[str, float]]]:
    view, starts = beginning(KIND, folders)
    method = registry.make({"use": "merge/anisotropic", "passages": 3, **settings})
    return method, [numbers for numbers, _ in method.fit(view.engine.out, starts, view)]


def blend(folders: list[Path], coefficients: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Weights at coefficients [N] of each parameter, and what the model takes and should answer for each text."""
    view, starts = beginning(KIND, folders)
    weights = {}
    for name, of_N in coefficients.items():
        base = starts.read(0, name)
        weights[name] = base + sum(of_N[i] * (starts.read(i + 1, name) - base) for i in range(len(TEXTS)))
    work = {}
    for name, texts in TEXTS.items():
        (batch,) = data_of([Texts(name, texts)]).once(3)
        inputs = view.engine.modality.inputs(batch, anatomy=view.engine.anatomy, packing="documents")
        work[name] = {"inputs": inputs, "labels": batch["labels"]}
    return weights, work


def by_hand(folders: list[Path], coefficients: dict[str, Tensor], *, loss: str) -> Tensor:
    """The mean over both texts of the mean loss of a position, from whole logits; differentiable."""
    weights, work = blend(folders, coefficients)
    model, total = tiny(KIND).eval(), torch.zeros(())
    for found in work.values():
        kept = found["labels"] != IGNORE
        logits = functional_call(model, weights, kwargs=found["inputs"]).logits[kept].float()
        log_p = logits.log_softmax(-1)
        labeled = -log_p.gather(-1, found["labels"][kept][:, None]).mean()
        total = total + (labeled if loss == "objective" else -(log_p.exp() * log_p).sum(-1).mean()) / len(TEXTS)
    return total


def names() -> list[str]:
    return [name for name, _ in tiny(KIND).named_parameters()]


@pytest.mark.parametrize("loss", ["objective", "entropy"])
def test_its_steps_are_those_of_adamw_through_the_papers_sum(loss: str, folders: list[Path]) -> None:
    """theta = theta_0 + sum of c[i, block] tau[i, block]; c from 0, AdamW, a cosine to 0, gradients of norm 1 at most."""
    method, steps = fitted(folders, loss=loss, steps=4, rate=0.1, decay=0.1)
    leaf_NG = torch.nn.Parameter(torch.zeros(len(TEXTS), len(names())))
    optimizer, losses = torch.optim.AdamW([leaf_NG], lr=0.1, weight_decay=0.1), []
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 4))
        found = by_hand(folders, {name: leaf_NG[:, i] for i, name in enumerate(names())}, loss=loss)
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_([leaf_NG], 1.0)
        optimizer.step()
        losses.append(float(found.detach()))
    assert [numbers["loss"] for numbers in steps] == pytest.approx(losses, rel=1e-4)
    for row, label in zip(leaf_NG.tolist(), TEXTS, strict=True):
        assert method.state["coefficient"][label] == pytest.approx(dict(zip(names(), row, strict=True)), abs=2e-3)


def test_few_passages_find_what_no_equal_coefficients_reach(folders: list[Path]) -> None:
    method, steps = fitted(folders, steps=60, decay=0.0)
    found = method.state["coefficient"]
    assert {label: sorted(of) for label, of in found.items()} == dict.fromkeys(TEXTS, sorted(names()))
    grid = []
    for scale in torch.linspace(0.0, 1.5, 16).tolist():
        with torch.no_grad():
            grid.append(float(by_hand(folders, dict.fromkeys(names(), torch.full((2,), scale)), loss="objective")))
    assert steps[0]["loss"] == pytest.approx(grid[0], rel=1e-4), "it begins at the base"
    assert steps[-1]["loss"] < 0.98 * min(grid)


def test_entropy_falls_and_labels_are_not_read(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, steps = fitted(folders, loss="entropy", steps=8)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    read = Texts.read

    def other(self: Texts, piece: Any) -> dict[str, Any]:
        row = read(self, piece)
        row["labels"] = row["labels"].copy()
        row["labels"][row["labels"] != IGNORE] = 7
        return row

    monkeypatch.setattr(Texts, "read", other)
    assert fitted(folders, loss="entropy", steps=8)[1] == steps
    assert fitted(folders, loss="objective", steps=1)[1] != fitted(folders, loss="entropy", steps=1)[1]


def test_entropy_is_that_of_whole_logits(folders: list[Path]) -> None:
    view, _ = beginning(KIND, folders)
    (batch,) = data_of([Texts("letters", TEXTS["letters"])]).once(3)
    kept = batch["labels"] != IGNORE
    inputs = view.engine.modality.inputs(batch, anatomy=view.engine.anatomy, packing="documents")
    p = view.engine.model(**inputs).logits[kept].softmax(-1)
    found = entropy(view.engine.out(batch), kept)
    torch.testing.assert_close(found.total, -(p * p.log()).sum(), rtol=1e-4, atol=1e-4)
    assert found.weight == float(kept.sum())


def test_parameters_take_their_own_multiples_and_buffers_stay_the_bases() -> None:
    base, one, two = (torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    method: Any = registry.make("merge/anisotropic")
    method._labels, method._blocks = ("one", "two"), frozenset({"a.weight", "a.bias"})
    method.state["coefficient"] = {"one": {"a.weight": 0.2, "a.bias": 0.5}, "two": {"a.weight": 0.7, "a.bias": -0.1}}
    for block, (first, second) in {"a.weight": (0.2, 0.7), "a.bias": (0.5, -0.1)}.items():
        made = method.tensor(block, [one, two], base, Site(seed=0, stage="merged"))
        torch.testing.assert_close(made, base + first * (one - base) + second * (two - base), atol=1e-6, rtol=0)
    assert torch.equal(method.tensor("running_mean", [one, two], base, Site(seed=0, stage="merged")), base)


def test_a_base_alone_is_refused() -> None:
    with pytest.raises(UserError, match="start: merge/anisotropic takes the base first"):
        registry.make("merge/anisotropic").suits(1, ["a"])

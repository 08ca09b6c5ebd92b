"""Steps within backward: the same bits with fewer bytes, and what cannot go with them is refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.core.tiny import tiny
from tests.methods.small import batch_of, view_of
from tests.methods.test_optim import groups_of
from tests.toy import graph, numbers
from tutelage import planning
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.base.method import Method
from tutelage.core import engine as engines
from tutelage.core import loop
from tutelage.core.fused import Fused
from tutelage.core.graph import Graph
from tutelage.core.run import run_graph
from tutelage.look import digest_of

LOW = {"rank": 4, "refresh": 5}
OPTIMIZERS = [
    {"use": "optim/adamw"},
    {"use": "optim/muon"},
    {"use": "optim/galore", **LOW},
    {"use": "optim/fira", **LOW},
]


def change(fused: bool, optim: dict[str, Any], /, **more: Any) -> Callable[[dict[str, Any]], None]:
    """The toy recipe without clipping, the whole batch at once, as `fused_backward` needs it."""

    def changed(recipe: dict[str, Any]) -> None:
        for stage in recipe["stages"].values():
            stage |= {"optim": optim, "engine": {"device": "cpu", "clip": None, "fused_backward": fused}}
        recipe["stages"]["two"] |= more

    return changed


def run(built: Graph) -> Graph:
    result = run_graph(built, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed, result.failed
    return built


def home(built: Graph, stage: str = "two") -> Path:
    folder = built.nodes[stage].folder
    assert folder is not None
    return folder


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda entry: entry["use"].removeprefix("optim/"))
def test_a_stage_ends_in_the_bits_of_one_that_steps_after_backward(optim: dict[str, Any], tmp_path: Path) -> None:
    plain, fused = (
        run(graph(tmp_path / str(on), steps=6, change=change(on, {**optim, "lr": 1e-2}))) for on in (False, True)
    )
    for stage in ("one", "two"):
        assert digest_of(home(fused, stage)) == digest_of(home(plain, stage))
        assert numbers(home(fused, stage)) == numbers(home(plain, stage))  # gradient norms and operations too
        assert fused.nodes[stage].fingerprint == plain.nodes[stage].fingerprint


def test_a_cut_run_retraces_and_what_an_action_freezes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = {"use": "optim/galore", "lr": 1e-2, **LOW}
    frozen = [{"tick": 3, "do": "freeze", "modules": ["*mlp*"]}, {"tick": 7, "do": "unfreeze", "modules": ["*mlp*"]}]
    plain, whole, cut = (
        graph(tmp_path / name, change=change(on, optim, actions=frozen))
        for name, on in (("plain", False), ("whole", True), ("cut", True))
    )
    run(plain)
    run(whole)
    record = loop.record

    def stopping(at: Any, *args: Any, **kwargs: Any) -> None:
        record(at, *args, **kwargs)
        if at.node.name == "two" and at.clock.step == 6:
            raise loop.Stopped("test")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "record", stopping)
        run(cut)
    again = run(graph(tmp_path / "cut", change=change(True, optim, actions=frozen)))
    assert digest_of(home(again)) == digest_of(home(whole)) == digest_of(home(plain))
    assert numbers(home(again)) == numbers(home(whole))


def bound(model: Any, *, fused: bool) -> tuple[Any, Any]:
    """A view on the model with an engine that is ready to step."""
    view = view_of("llama", objective=registry.make("objective/causal_lm"), model=model)
    view.engine.clip = None
    view.engine.optimizer = registry.make({"use": "optim/adamw", "lr": 1e-2}).build(groups_of(model))
    view.engine.fused = Fused(view.engine) if fused else None
    return view.engine, view


def test_one_gradient_is_there_at_a_time_and_none_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    engine, view = bound(model, fused=True)
    counts = []
    step = engine.optimizer.step

    def counted() -> None:
        counts.append(sum(p.grad is not None for p in model.parameters()))
        step()

    monkeypatch.setattr(engine.optimizer, "step", counted)
    engine.step(batch_of(["once upon a time", "there was a dog"]), view)
    assert counts == [1] * len(list(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    held = [p for group in engine.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(counts), "the groups are as they were"


def test_a_gradient_that_a_method_asks_for_steps_nothing() -> None:
    model = tiny("llama")
    engine, view = bound(model, fused=True)
    batch = batch_of(["once upon a time"])
    before = [p.clone() for p in model.parameters()]
    objective, asked = engine.objective, []

    class Asking:
        needs: frozenset[str] = frozenset()

        def loss(self, model: Any, batch: Any, view: Any) -> Any:
            if not asked:
                asked.append(None)
                asked[0] = view.engine.gradient_of(batch, view)  # in the midst of a step
                assert all(map(torch.equal, before, [p.detach() for p in engine.model.parameters()]))
            return objective.loss(model, batch, view)

    found = view.grad(batch)
    assert set(found) == set(engine.params)
    assert all(map(torch.equal, before, [p.detach() for p in model.parameters()]))
    engine.objective = Asking()
    engine.step(batch, view)
    assert asked[0] and not any(map(torch.equal, before, [p.detach() for p in model.parameters()]))


def peak(model: Any, *, fused: bool) -> int:
    """The most bytes allocated at once in a step, above what is held between steps."""
    engine, view = bound(model, fused=fused)
    batch = batch_of(["a b"])
    engine.step(batch, view)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        engine.step(batch, view)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_the_memory_of_all_gradients_but_the_largest_is_spared() -> None:
    model = tiny("llama", tied=False)
    sizes = [p.nbytes for p in model.parameters()]
    spared = peak(model, fused=False) - peak(model, fused=True)
    assert 0.8 * (sum(sizes) - 2 * max(sizes)) < spared <= sum(sizes)


def test_the_plan_counts_the_largest_gradient_alone(tmp_path: Path) -> None:
    plain, fused = (
        {
            row["stage"]: row
            for row in planning.plan(graph(tmp_path / str(on), change=change(on, {"use": "optim/adamw"})))
        }["one"]["memory"]
        for on in (False, True)
    )
    embedding = 4 * 32 * 259  # tied, the largest
    assert fused["gradients"] == pytest.approx(embedding, rel=0.1) and fused["micro"] == 8
    assert plain["gradients"] > 3 * fused["gradients"]
    assert plain["total"] - fused["total"] == plain["gradients"] - fused["gradients"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"engine": {"fused_backward": True}}, "clipping needs .* `engine.clip: null`"),
        ({"engine": {"fused_backward": True, "clip": None, "micro": 4}}, "leave `engine.micro` out"),
        ({"methods": [{"use": "continual/ewc"}]}, "continual/ewc adds a second backward pass"),
        ({"methods": ["tests.core.test_fused:Scaled"]}, "Scaled changes all gradients together"),
        ({"step": "tests.core.test_fused:Own"}, "Own makes the whole step itself"),
        ({"optim": "tests.core.test_fused:Together"}, "Together does not step parameters one by one"),
    ],
)
def test_what_needs_all_gradients_together_is_refused_by_name(more: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"stages.two.engine.fused_backward: .*{why}"):
        graph(tmp_path, change=change(True, {"use": "optim/adamw"}, **more))


def test_several_processes_are_refused() -> None:
    optimizer = torch.optim.SGD(tiny("llama").parameters())
    with pytest.raises(UserError, match="several processes sum whole gradients"):
        Fused(SimpleNamespace(optimizer=optimizer, world=SimpleNamespace(size=2)))  # type: ignore[arg-type]


def test_running_out_of_memory_is_an_error_and_no_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, view = bound(tiny("llama"), fused=True)
    tries = []

    def full(*_: Any) -> None:
        tries.append(1)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engines.Engine, "_descend", full)
    with pytest.raises(UserError, match="out of memory with 2 rows at once.*lower `batch`"):
        engine.step(batch_of(["once", "upon"]), view)
    assert len(tries) == 1 and engine.micro is None


class Scaled(Method):
    def grads(self, grads: dict[str, torch.Tensor], view: Any) -> None: ...


class Own(Method):
    def step(self, engine: Any, batch: Any, view: Any) -> dict[str, float]: ...


class Together(Method):
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer: ...

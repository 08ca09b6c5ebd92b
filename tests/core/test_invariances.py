"""What must not change what is learned: micro-batches, packing, measuring, cuts. To the bit where bits are promised."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.toy import graph, numbers
from tutelage.base import registry
from tutelage.base.clock import Clock
from tutelage.base.spec import SourceSpec
from tutelage.core import artifact, loop, randomness
from tutelage.core.anatomy import anatomy
from tutelage.core.artifact import load_tensors
from tutelage.core.engine import Engine
from tutelage.core.loop import Stopped
from tutelage.core.pace import Pace
from tutelage.core.record import read_lines
from tutelage.core.run import run_graph
from tutelage.core.stream import Order, Stream
from tutelage.core.view import View
from tutelage.look import digest_of
from tutelage.modalities.text import toy
from tutelage.modalities.text.modality import modality

Change = Callable[[dict[str, Any]], None]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def run(folder: Path, *, change: Change | None = None, steps: int = 6, model: str = "llama") -> dict[str, Path]:
    made = graph(folder, model=model, steps=steps, change=change)
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed and not result.stopped
    return {name: node.folder for name, node in made.nodes.items() if node.folder}


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_tensors(stage / "artifact/model/model.safetensors")


# -- how a batch is cut -----------------------------------------------------------------------------------------------


def micro(rows: int) -> Change:
    """Adam divides a gradient near nothing by its own size, rounding included; with a larger `eps` it does not."""

    def change(recipe: dict[str, Any]) -> None:
        for stage in recipe["stages"].values():
            stage["engine"]["micro"] = rows
            stage["optim"]["eps"] = 1e-3
        recipe["stages"]["two"]["methods"] = [
            {"use": "continual/lwf", "strength": 0.5},
            {"use": "continual/ewc", "strength": 5.0, "rows": 4},
            {"use": "continual/replay", "of": "one", "rate": 0.25},
        ]

    return change


@pytest.fixture(scope="module")
def whole_batches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run(tmp_path_factory.mktemp("micro8"), change=micro(8))


@pytest.mark.parametrize("rows", [4, 3, 2, 1])
def test_micro_batches_change_nothing_but_rounding(rows: int, whole_batches: dict[str, Path], tmp_path: Path) -> None:
    mine = run(tmp_path, change=micro(rows))
    for name, theirs in whole_batches.items():
        for ours, other in zip(numbers(mine[name], kind="train"), numbers(theirs, kind="train"), strict=True):
            for key in ("tokens", "counted", "weights", "cursors"):
                assert ours[key] == other[key]
            for key in ("loss", "grad_norm", *(k for k in ours if k.startswith(("aux/", "penalty/")))):
                assert ours[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5)
        end = weights(theirs)
        assert all(torch.allclose(tensor, end[key], atol=1e-5) for key, tensor in weights(mine[name]).items())


# -- the loss and its gradient, by themselves -------------------------------------------------------------------------


class Bench:
    """A toy model with the engine's arithmetic around it, and documents to cut into batches."""

    def __init__(self, folder: Path, model: str) -> None:
        processor = modality.processor("bytes", folder=None, texts=list, cache=folder)
        randomness.reseed(0)
        self.model = modality.model(None, dict(toy.MODELS[model]), processor=processor, length=64)
        self.parts = anatomy(self.model)
        spec = SourceSpec(path=toy.write(folder)["b"], val="20%")
        built: Any = modality.corpus(
            "b", spec, processor=processor, length=64, cache=folder / "cache", rows=None, progress=None, workers=1
        )
        self.source = built.train

    def engine(self, micro: int | None = None) -> Engine:
        engine = Engine(self.model, self.parts, modality, torch.device("cpu"), micro=micro)
        engine.objective = registry.make("objective/causal_lm")
        engine.params = dict(self.model.named_parameters())
        return engine

    def learned(
        self, rows: list[Any], *, micro: int | None = None, length: int = 64
    ) -> tuple[float, float, torch.Tensor]:
        """Summed loss, how much counted, and the gradient of the mean, in a row."""
        engine = self.engine(micro)
        self.model.zero_grad(set_to_none=True)
        batch = modality.collate(rows, {"b": self.source}, length=length)
        found = engine.learn(batch, View(clock=Clock(), seed=0, stage="toy", engine=engine))
        gradient = torch.cat([p.grad.flatten() for p in engine.params.values() if p.grad is not None])
        return found["loss"] * found["counted"], found["counted"], gradient

    def draw(self, rows: int, *, packing: str, seed: int, length: int = 64) -> list[Any]:
        stream = Stream({"b": Order(self.source, seed=seed, packing=packing)})
        return stream.draw({"b": 1.0}, length, rows)


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), request.param)


quick = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@quick
@given(
    rows=st.integers(2, 9),
    cut=st.integers(1, 9),
    seed=st.integers(0, 99),
    packing=st.sampled_from(["documents", "single"]),
)
def test_the_gradient_is_the_same_however_a_batch_is_cut(
    bench: Bench, rows: int, cut: int, seed: int, packing: str
) -> None:
    drawn = bench.draw(rows, packing=packing, seed=seed)
    whole, parts = bench.learned(drawn), bench.learned(drawn, micro=cut)
    assert parts[1] == whole[1]
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(parts[2], whole[2], **CLOSE)


@quick
@given(rows=st.integers(1, 6), seed=st.integers(0, 99))
def test_documents_that_share_rows_learn_as_each_would_alone(bench: Bench, rows: int, seed: int) -> None:
    packed = bench.draw(rows, packing="documents", seed=seed)
    alone = [row.__class__(row.source, (piece,)) for row in packed for piece in row.pieces]
    assert len(alone) > len(packed) or rows == 1
    together, apart = bench.learned(packed), bench.learned(alone)
    assert together[1] == apart[1]
    assert together[0] == pytest.approx(apart[0], rel=1e-5)
    torch.testing.assert_close(together[2], apart[2], **CLOSE)


@quick
@given(rows=st.integers(2, 8), seed=st.integers(0, 99))
def test_the_order_of_rows_and_the_padding_say_nothing(bench: Bench, rows: int, seed: int) -> None:
    drawn = bench.draw(rows, packing="single", seed=seed)
    shuffled = random.Random(seed).sample(drawn, rows)
    whole, other = bench.learned(drawn), bench.learned(shuffled, micro=1)
    assert other[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(other[2], whole[2], **CLOSE)


# -- measuring --------------------------------------------------------------------------------------------------------


def evaluating(every: Any, *, budget: str = "100%", passages: int = 8) -> Change:
    def change(recipe: dict[str, Any]) -> None:
        for stage in recipe["stages"].values():
            stage["evals"] |= {
                "every": every, "budget": budget, "passages": passages,
                "run": ["probe/bits_per_byte", "probe/forgetting", {"use": "probe/sample", "tokens": 8}],
            }  # fmt: skip

    return change


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run(tmp_path_factory.mktemp("unmeasured"), model="gpt2")


@pytest.mark.parametrize("every", ["1step", "40%", "log"])
def test_measuring_more_changes_no_bit(every: str, unmeasured: dict[str, Path], tmp_path: Path) -> None:
    mine = run(tmp_path, model="gpt2", change=evaluating(every))
    for name, theirs in unmeasured.items():
        assert digest_of(mine[name]) == digest_of(theirs)
        assert numbers(mine[name], kind="train") == numbers(theirs, kind="train")
        assert len(numbers(mine[name], kind="eval")) > len(numbers(theirs, kind="eval")) == 2


def test_every_column_is_measured_before_the_first_step_of_every_stage(unmeasured: dict[str, Path]) -> None:
    for stage in unmeasured.values():
        first, last = numbers(stage, kind="eval")[0], numbers(stage, kind="eval")[-1]
        assert (first["step"], first["tick"]) == (0, 0)
        for row in (first, last):
            assert {"bits_per_byte/a", "bits_per_byte/b"} <= set(row["values"])


def long_stage(recipe: dict[str, Any]) -> None:
    evaluating("1step", budget="20%", passages=8)(recipe)
    del recipe["stages"]["two"]
    recipe["stages"]["one"] |= {"until": "40step", "save": {"every": "15step"}}


def stopping(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the run after a step, before anything that follows it."""
    record = loop.record

    def stopped(run: Any, *args: Any, **kwargs: Any) -> None:
        record(run, *args, **kwargs)
        if (run.node.name, run.clock.step) == STOP:
            raise Stopped("test")

    monkeypatch.setattr(loop, "record", stopped)


STOP: tuple[str, int] = ("", 0)


def cut(folder: Path, stage: str, step: int, *, change: Change, steps: int = 6) -> None:
    """Run and stop as a killed process does: nothing is saved at the stop."""
    global STOP
    STOP = (stage, step)
    with pytest.MonkeyPatch.context() as patch:
        stopping(step, patch)
        made = graph(folder, steps=steps, change=change)
        result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
        assert result.stopped == [stage]


@pytest.mark.parametrize("step", [10, 26])
def test_what_was_left_out_to_keep_a_budget_is_obeyed_after_a_cut(step: int, tmp_path: Path) -> None:
    """Cut before and after the choice; it is made and journaled once."""
    cut(tmp_path, "one", step, change=long_stage)
    before = read_lines(tmp_path / "runs/toy/one/1/journal.jsonl")
    mine = run(tmp_path, change=long_stage)["one"]
    lines = read_lines(mine / "journal.jsonl")
    (note,) = [act for line in lines for act in line["do"] if act["do"] == "thin"]
    assert before in ([], lines)
    assert note["planned"] == 40 > len(note["steps"])
    assert [row["step"] for row in numbers(mine, kind="eval")] == [*note["steps"], 40]  # and at the end


# -- minutes ----------------------------------------------------------------------------------------------------------


def minutes(recipe: dict[str, Any]) -> None:
    del recipe["stages"]["two"]
    recipe["stages"]["one"] |= {
        "until": "0.005min", "save": {"every": "3step"}, "schedule": {"use": "schedule/linear", "warm": "0%"}
    }  # fmt: skip
    recipe["stages"]["one"]["evals"] |= {"every": "5step"}


def test_minutes_are_counted_in_steps_once_and_a_cut_retraces_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "step_seconds", 0.01)
    whole = run(tmp_path / "whole", change=minutes)["one"]
    (line,) = read_lines(whole / "journal.jsonl")
    total = line["do"][0]["total"]["step"]
    assert (line["do"][0]["do"], line["tick"]) == ("until", 20)
    assert numbers(whole)[-1]["step"] == total == 30  # exactly: 30 / 1e9 * 1e9 is less
    for state in artifact.states(whole / "state"):
        shutil.rmtree(state)
    digest, found = digest_of(whole), numbers(whole)
    shutil.rmtree(whole / "artifact")  # as if killed before its first checkpoint
    monkeypatch.setattr(Pace, "step_seconds", 0.002)  # and gone on with on a faster machine
    again = run(tmp_path / "whole", change=minutes)["one"]
    assert (digest_of(again), numbers(again)) == (digest, found)
    assert len(read_lines(again / "journal.jsonl")) == 1


# -- cuts -------------------------------------------------------------------------------------------------------------


def mixed(recipe: dict[str, Any]) -> None:
    """Three stages; the second mixes two sources, and its weights change on the way."""
    stages = recipe["stages"]
    stages["two"]["data"] = {**stages["one"]["data"], **stages["two"]["data"]}
    stages["two"]["actions"] = [
        {"tick": 2, "do": "mix", "weights": {"a": 1.0, "b": 4.0}},
        {"tick": 4, "do": "mix", "weights": {"a": 1.0, "b": 0.0}},
        {"tick": 4, "do": "scale", "path": "optim.lr", "by": 0.3},
    ]
    stages["two"]["packing"] = "concat"
    stages["three"] = {
        **stages["one"], "start": "two", "length": 24,
        "methods": [{"use": "continual/replay", "of": "two", "rate": 0.25}],
        "carry": ["optimizer", "schedule", "data"],
    }  # fmt: skip
    del stages["three"]["tokenizer"]
    for stage in stages.values():
        stage["save"] = {"every": "2step"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run(tmp_path_factory.mktemp("undisturbed"), change=mixed)


BORDERS = [("two", 3), ("two", 5)]  # just after the mixture has changed
POINTS = random.Random(7).sample(
    [(s, n) for s in ("one", "two", "three") for n in range(1, 7) if (s, n) not in BORDERS], 6
)


@pytest.mark.parametrize(("stage", "step"), [*BORDERS, *POINTS])
def test_a_run_cut_anywhere_ends_in_the_same_bits(
    stage: str, step: int, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    shared = tmp_path / "runs/toy/one"
    if stage != "one":  # what was finished before is finished
        shutil.copytree(undisturbed["one"].parent, shared)
    cut(tmp_path, stage, step, change=mixed)
    mine = run(tmp_path, change=mixed)
    for name, theirs in undisturbed.items():
        assert digest_of(mine[name]) == digest_of(theirs)
        assert numbers(mine[name]) == numbers(theirs)

"""Merges that look at data before they merge: what they read, what it costs, and that a cut one retraces."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.tiny import tiny
from tests.toy import graph, numbers
from tutelage import modalities, planning
from tutelage.base import load, registry
from tutelage.base.errors import UserError
from tutelage.core import fitting, surgery
from tutelage.core.graph import Graph
from tutelage.core.record import newest_line
from tutelage.core.run import run_graph
from tutelage.look import batch_of, digest_of
from tutelage.modalities.text import toy

FIT = {"use": "merge/divergence", "inputs": ["b", "b"], "steps": 9, "rows": 4, "passages": 12, "rate": 0.1}


def merging(recipe: dict[str, Any], **change: Any) -> None:
    """Two models tuned from one, and a merge of both that is fitted; `change` is to the merge's stage."""
    stages = recipe["stages"]
    stages["other"] = {**stages["two"], "seed": 1}
    kept = {key: stages["two"][key] for key in ("data", "length", "precision", "evals", "engine")}
    merged = {"start": ["one", "two", "other"], "apply": dict(FIT), "save": {"every": "4step"}, **kept}
    stages["merged"] = {**merged, **change}


def run(built: Graph) -> Any:
    return run_graph(built, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the toy was merged without a break."""
    folder = tmp_path_factory.mktemp("whole")
    assert "merged" in run(graph(folder, change=merging)).done
    return folder


def stage(folder: Path) -> Path:
    return folder / "runs/toy/merged/1"


def beside(whole: Path, folder: Path) -> None:
    """The stages before the merge, as they were made there."""
    home = folder / "runs/toy"
    home.mkdir(parents=True)
    for name in ("one", "two", "other"):
        (home / name).symlink_to(whole / "runs/toy" / name)


def test_what_is_merged_is_the_base_plus_the_multiples_that_are_reported(whole: Path) -> None:
    made, base, *models = (
        load_file(whole / f"runs/toy/{name}/1/artifact/model/model.safetensors")
        for name in ("merged", "one", "two", "other")
    )
    values = newest_line(stage(whole) / "metrics.jsonl", kind="eval")["values"]
    found = {key.removeprefix("coefficient/"): v for key, v in values.items() if key.startswith("coefficient/")}
    assert len(found) == 2 * 4 and len(set(found.values())) == 8, found  # the embedding, two blocks and the last norm
    for name, tensor in made.items():
        layer = next(key.partition("/")[2] for key in found if name.startswith(key.partition("/")[2] + "."))
        parts = zip(("two", "other"), models, strict=True)
        wanted = base[name] + sum(found[f"{label}/{layer}"] * (m[name] - base[name]) for label, m in parts)
        torch.testing.assert_close(tensor, wanted, atol=1e-6, rtol=0)
    card = (stage(whole) / "artifact/README.md").read_text()
    assert all(f"| coefficient/{key} | {value:.4f} |" in card for key, value in found.items())


def test_each_step_is_a_row_and_the_work_is_what_was_planned(whole: Path, tmp_path: Path) -> None:
    rows = numbers(stage(whole))
    steps, (end,) = rows[:-1], rows[-1:]
    assert [row["step"] for row in steps] == list(range(1, 10)) and end["kind"] == "eval"
    assert all({"loss", "divergence/two", "divergence/other", "grad_norm", "lr"} <= row.keys() for row in steps)
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert (end["step"], end["flops"], end["tokens"]) == (9, steps[-1]["flops"], steps[-1]["tokens"])
    plan = {row["stage"]: row for row in planning.plan(graph(tmp_path, change=merging))}["merged"]
    (found,) = plan["besides"]
    assert found["flops"] == pytest.approx(end["flops"], rel=0.06)  # padding has no logits
    assert "72 rows in all" in found["what"] and any("weights are held" in note for note in plan["notes"])
    with pytest.raises(UserError, match="each step of its fit reads the first rows"):
        batch_of(stage(whole), 3)


@pytest.mark.parametrize("at", [1, 6])
def test_a_fit_that_is_cut_goes_on_from_its_last_state(
    at: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside(whole, tmp_path)
    stepped, seen = fitting._Run.stepped, []

    def cut(self: Any, *args: Any) -> None:
        seen.append(self.clock.step)
        stepped(self, *args)
        if self.clock.step == at and len(seen) == at:
            self.metrics.flush()
            raise KeyboardInterrupt

    monkeypatch.setattr(fitting._Run, "stepped", cut)
    with pytest.raises(KeyboardInterrupt):
        run(graph(tmp_path, change=merging))
    assert run(graph(tmp_path, change=merging)).done == ["merged"]
    begun = 4 * (at // 4)
    assert seen == [*range(at), *range(begun, 9)], "what was saved is not done again"
    assert digest_of(stage(tmp_path)) == digest_of(stage(whole))
    assert numbers(stage(tmp_path)) == numbers(stage(whole))
    assert not (stage(tmp_path) / fitting.STATES).exists()


def test_a_fit_that_is_asked_to_stop_saves_and_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside(whole, tmp_path)
    stepped = fitting._Run.stepped

    def asked(self: Any, *args: Any) -> None:
        stepped(self, *args)
        if self.clock.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(fitting._Run, "stepped", asked)
        assert run(graph(tmp_path, change=merging)).stopped == ["merged"]
    assert sorted(path.name for path in (stage(tmp_path) / fitting.STATES).iterdir()) == ["000000004", "000000006"]
    assert run(graph(tmp_path, change=merging)).done == ["merged"]
    assert digest_of(stage(tmp_path)) == digest_of(stage(whole))
    assert numbers(stage(tmp_path)) == numbers(stage(whole))


def test_starts_that_do_not_fit_are_read_again_with_the_same_outcome(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside(whole, tmp_path)
    reads, get = [], surgery.Weights.__getitem__

    def seen(self: surgery.Weights, name: str) -> torch.Tensor:
        reads.append(name)
        return get(self, name)

    monkeypatch.setattr(surgery.Weights, "__getitem__", seen)
    monkeypatch.setattr(fitting, "SHARE", 0.0)
    assert run(graph(tmp_path, change=merging)).done == ["merged"]
    assert digest_of(stage(tmp_path)) == digest_of(stage(whole))
    assert reads.count("model.norm.weight") > 9 * 3


def test_data_seed_and_the_objective_are_part_of_what_a_fitted_merge_is(whole: Path, tmp_path: Path) -> None:
    beside(whole, tmp_path)

    def parts(**change: Any) -> dict[str, Any]:
        def changed(recipe: dict[str, Any]) -> None:
            merging(recipe, **change)

        built = graph(tmp_path, change=changed)
        for node in built.nodes.values():
            built.fingerprint(node)
        return {"whole": built.nodes["merged"].fingerprint, **built.nodes["merged"].parts}

    files = toy.write(tmp_path / "data")
    plain = parts()
    assert "objective/causal_lm" in plain["code"] and "merge/divergence" in plain["code"]
    assert parts()["whole"] == plain["whole"]
    others = [
        parts(data={"b": {"path": files["b"], "val": "30%"}}),
        parts(data={"b": {"path": files["a"], "val": "20%"}}),
        parts(seed=5),
        parts(apply={**FIT, "steps": 8}),
        parts(length=16),
        parts(objective="align/sft"),
    ]
    assert len({plain["whole"], *(found["whole"] for found in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {}}, r"stages.merged.data: merge/divergence fits on data; name what it reads here"),
        ({"apply": {**FIT, "inputs": ["b"]}}, r"stages.merged.apply.inputs: one source for each of the 2 models"),
        ({"apply": {"use": "merge/divergence"}}, r"stages.merged.apply.inputs: .* \(none is named\)"),
        (
            {"apply": {**FIT, "inputs": ["b", "c"]}},
            r"stages.merged.apply.inputs: no source 'c' under `data`; there is b",
        ),
        ({"start": "one"}, r"stages.merged.start: merge/divergence takes the base first"),
    ],
)
def test_what_does_not_suit_a_fit_is_refused_before_anything_is_made(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    recipe = toy.recipe(tmp_path / "data")
    merging(recipe, **change)
    with pytest.raises(UserError, match=said):
        Graph.resolve(load.load(recipe), name="toy", modality=modalities.find("text"), runs=tmp_path / "runs")


def test_a_loss_that_is_no_number_ends_the_stage_and_names_the_rate(whole: Path, tmp_path: Path) -> None:
    beside(whole, tmp_path)

    def wild(recipe: dict[str, Any]) -> None:
        merging(recipe, apply={**FIT, "rate": 1e30})

    with pytest.raises(UserError, match="the loss of merge/divergence is not a number at step [23]; lower its rate"):
        run(graph(tmp_path, change=wild))


def test_shapes_that_differ_are_refused_before_anything_is_fitted(tmp_path: Path) -> None:
    for i in range(2):
        tiny("llama").save_pretrained(tmp_path / str(i))
    path = tmp_path / "1/model.safetensors"
    save_file({**load_file(path), "model.norm.weight": torch.ones(16)}, path, metadata={"format": "pt"})
    folders = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(UserError, match=r"model.norm.weight has different shapes \(\(32,\), \(16,\)\)"):
        surgery.alike(registry.make("merge/divergence"), folders, place="stages.merged")


def test_a_tied_weight_has_one_name_in_files_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    files = fitting.filed(model, surgery.Weights(tmp_path))
    assert sorted(files) == sorted(dict(model.named_parameters())) and "lm_head.weight" not in files.values()
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no tensor for model.norm.weight"):
        fitting.filed(model, surgery.Weights(tmp_path))

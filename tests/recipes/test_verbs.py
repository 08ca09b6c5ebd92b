"""Adopt, export, branch and runs, from one end to the other on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.recipes import families
from tests.toy import graph, numbers
from tutelage import modalities, verbs
from tutelage.base import load
from tutelage.base.errors import UserError
from tutelage.core import artifact, compare
from tutelage.core.graph import Graph
from tutelage.core.record import read_lines
from tutelage.core.run import run_graph
from tutelage.look import digest_of

STEPS = 12  # of each toy stage, saved every 4


def run(made: Graph) -> Graph:
    """Make all stages, and leave the recipe beside them as the command does."""
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed and not result.stopped
    return made


def toy_run(folder: Path, *, change: Any = None) -> Path:
    """The toy's run `toy` with its recipe; returns where runs are kept."""

    def changed(recipe: dict[str, Any]) -> None:
        for stage in recipe["stages"].values():
            stage["save"] = {"every": "4step", "keep": 9}
        if change:
            change(recipe)

    made = graph(folder, steps=STEPS, change=changed)
    (folder / "runs/toy").mkdir(parents=True)
    (folder / "runs/toy/recipe.yaml").write_text(load.dump(made.recipe), encoding="utf-8")
    run(made)
    return folder / "runs"


def resolved(recipe: Any, *, runs: Path, name: str = "next", sets: tuple[str, ...] = ()) -> Graph:
    return Graph.resolve(load.load(recipe, sets=sets), name=name, modality=modalities.find("text"), runs=runs)


def last(stage: Path) -> dict[str, float]:
    return [row for row in read_lines(stage / "metrics.jsonl") if row["kind"] == "eval"][-1]["values"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_run(tmp_path_factory.mktemp("toys"))


# -- branch -----------------------------------------------------------------------------------------------------------


def test_a_branch_without_changes_ends_in_the_same_bits(toys: Path, tmp_path: Path) -> None:
    """Weights, optimizer, schedule and data position are all that the rest of this stage depends on."""
    verbs.branch_stage("toy/two", tmp_path / "again.yaml", step=4, sets=[], runs=toys)
    run(resolved(tmp_path / "again.yaml", runs=toys, name="again"))
    assert digest_of(toys / "again/two/1") == digest_of(toys / "toy/two/1")
    train = numbers(toys / "again/two/1", kind="train")
    theirs = numbers(toys / "toy/two/1", kind="train")[4:]
    assert [row["loss"] for row in train] == [row["loss"] for row in theirs]
    assert {"bits_per_byte/a", "bits_per_byte/b"} <= set(last(toys / "again/two/1"))


def test_a_branch_follows_the_schedule_that_it_carries(tmp_path: Path) -> None:
    def cosine(recipe: dict[str, Any]) -> None:
        for stage in recipe["stages"].values():
            stage["schedule"] = {"use": "schedule/cosine", "warm": "25%"}
        recipe["stages"]["two"]["until"] = "0.5epoch"

    runs = toy_run(tmp_path, change=cosine)
    rates = [row["lr"] for row in numbers(runs / "toy/two/1", kind="train")]
    assert len(rates) > 4
    verbs.branch_stage("toy/two", tmp_path / "b.yaml", step=4, sets=[], runs=runs)
    run(resolved(tmp_path / "b.yaml", runs=runs, name="b"))
    assert [row["lr"] for row in numbers(runs / "b/two/1", kind="train")] == pytest.approx(rates[4:], rel=1e-6)


def test_a_branch_takes_changes_and_says_them(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbs.branch_stage("toy/two", tmp_path / "hot.yaml", step=8, sets=["optim.lr=0.05", "until=3step"], runs=toys)
    said, text = capsys.readouterr().out, (tmp_path / "hot.yaml").read_text()
    assert "optim.lr: 0.01 → 0.05" in said.replace("\n", " ") and "optim.lr" in text
    stage = yaml.safe_load(text)["stages"]["two"]
    assert stage["start"] == "toy/two@8" and stage["until"] == "3step" and stage["optim"]["lr"] == 0.05
    assert set(stage["keep"]) == {"a"}, "what the ancestor learned from is still measured"
    assert "null" not in text and "steering" not in stage, "only what is not the default is written"
    run(resolved(tmp_path / "hot.yaml", runs=toys, name="hot"))
    values = last(toys / "hot/two/1")
    assert {"bits_per_byte/a", "bits_per_byte/b"} <= set(values)
    with pytest.raises(UserError, match="already"):
        verbs.branch_stage("toy/two", tmp_path / "hot.yaml", step=8, sets=[], runs=toys)


def test_a_stage_of_another_run_is_a_start_and_its_cost_is_counted(toys: Path) -> None:
    recipe = {
        "stages": {"more": {**stage_recipe("toy/one", Path("x"), keep="none", until="2step")["stages"]["domain"]}}
    }
    recipe["stages"]["more"] |= {"data": {"b": {"path": str(toys.parent / "data/b.jsonl"), "val": "20%"}}, "length": 32}
    made = run(resolved(recipe, runs=toys, name="more"))
    spent = numbers(toys / "toy/one/1", kind="train")[-1]["tokens"]
    assert compare.lineage(toys / "more/more/1")["tokens"] == spent
    assert made.nodes["more"].stage.start == str(toys / "toy/one/1/artifact/model")
    half = {"stages": {"more": {**recipe["stages"]["more"], "start": "toy/one@4", "carry": ["optimizer"]}}}
    run(resolved(half, runs=toys, name="half"))
    assert 0 < compare.lineage(toys / "half/more/1")["tokens"] < spent


def test_a_cut_stage_is_branched_and_exported_from_where_it_was_saved(toys: Path, tmp_path: Path) -> None:
    """Its artifact is not there yet."""
    shutil.copytree(toys / "toy", tmp_path / "runs/toy")
    shutil.rmtree(tmp_path / "runs/toy/two/1/artifact")
    shutil.rmtree(tmp_path / "runs/toy/two/1/steps", ignore_errors=True)
    with pytest.raises(UserError, match=r"not finished; export a saved step with --step .4, 8, 12"):
        verbs.export_model("toy/two", tmp_path / "out", dtype=None, step=None, runs=tmp_path / "runs")
    verbs.export_model("toy/two", tmp_path / "out", dtype=None, step=8, runs=tmp_path / "runs")
    verbs.branch_stage("toy/two", tmp_path / "b.yaml", step=8, sets=[], runs=tmp_path / "runs")
    run(resolved(tmp_path / "b.yaml", runs=tmp_path / "runs", name="b"))
    assert digest_of(tmp_path / "runs/b/two/1") == digest_of(toys / "toy/two/1")


def test_a_branch_from_the_end_wants_to_know_how_far(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is the end of .*--set until=.*it has: 4, 8, 12"):
        verbs.branch_stage("toy/two", tmp_path / "end.yaml", step=None, sets=[], runs=toys)
    verbs.branch_stage("toy/two", tmp_path / "end.yaml", step=None, sets=["until=2step"], runs=toys)
    assert yaml.safe_load((tmp_path / "end.yaml").read_text())["stages"]["two"]["until"] == "2step"


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint of step 5 .it has: 4, 8, 12"):
        verbs.branch_stage("toy/two", tmp_path / "no.yaml", step=5, sets=[], runs=toys)
    with pytest.raises(UserError, match="did you mean 'toy'"):
        verbs.branch_stage("tay/two", tmp_path / "no.yaml", step=4, sets=[], runs=toys)
    recipe = {"stages": {"x": {"start": "toy/tow@4", "until": "1step"}}}
    with pytest.raises(UserError, match="has no stage toy/tow; did you mean 'toy/two'"):
        resolved(recipe, runs=toys)


def test_a_method_of_a_branch_reads_what_it_read_under_another_name(tmp_path: Path) -> None:
    def replay(recipe: dict[str, Any]) -> None:
        recipe["stages"]["two"]["methods"] = [
            {"use": "continual/replay", "of": "one", "rate": 0.25}, {"use": "continual/ewc", "rows": 4}, "continual/lwf",
        ]  # fmt: skip

    runs = toy_run(tmp_path, change=replay)
    verbs.branch_stage("toy/two", tmp_path / "b.yaml", step=8, sets=[], runs=runs)
    methods = yaml.safe_load((tmp_path / "b.yaml").read_text())["stages"]["two"]["methods"]
    assert [entry.get("of") for entry in methods] == ["a", "a", None]
    run(resolved(tmp_path / "b.yaml", runs=runs, name="b"))
    assert numbers(runs / "b/two/1", kind="train")[-1]["weights"]["a/a"] == 0.25


@pytest.mark.parametrize("kept", [False, True])
def test_a_method_of_a_branch_reads_what_its_stage_learns_from_too(tmp_path: Path, kept: bool) -> None:
    """The old data under the same name in the new stage, or under `keep`."""

    def ewc(recipe: dict[str, Any]) -> None:
        stages, of = recipe["stages"], "a" if kept else "previous"
        stages["two"]["data"] = {**stages["one"]["data"], **stages["two"]["data"]}
        stages["two"] |= {"methods": [{"use": "continual/ewc", "of": of, "rows": 4}]}
        stages["two"] |= {"keep": stages["one"]["data"]} if kept else {}

    runs = toy_run(tmp_path, change=ewc)
    verbs.branch_stage("toy/two", tmp_path / "b.yaml", step=8, sets=[], runs=runs)
    two = yaml.safe_load((tmp_path / "b.yaml").read_text())["stages"]["two"]
    assert two["methods"][0]["of"] in two["keep"] and list(two["data"]) == ["a", "b"]
    run(resolved(tmp_path / "b.yaml", runs=runs, name="b"))


def test_a_step_of_a_wrapped_stage_is_folded_not_forgotten(tmp_path: Path) -> None:
    def lora(recipe: dict[str, Any]) -> None:
        recipe["stages"]["two"] |= {"methods": [{"use": "param/lora", "r": 4}]}
        recipe["stages"]["three"] = {**recipe["stages"]["two"], "start": "two@8", "methods": [], "until": "1step"}

    runs = toy_run(tmp_path, change=lora)
    one, end = (artifact.load_tensors(runs / f"toy/{s}/1/artifact/model/model.safetensors") for s in ("one", "two"))
    step = artifact.load_tensors(runs / "toy/two/1/steps/000000008/model.safetensors")
    moved = [name for name in one if not step[name].equal(one[name])]
    assert moved and all("layers" in name for name in moved)
    assert any(not step[name].equal(end[name]) for name in moved), "this is the step, not the end"
    verbs.branch_stage("toy/two", tmp_path / "b.yaml", step=8, sets=[], runs=runs)
    assert yaml.safe_load((tmp_path / "b.yaml").read_text())["stages"]["two"]["carry"] == ["schedule", "data"]
    run(resolved(tmp_path / "b.yaml", runs=runs, name="b"))
    verbs.export_model("toy/two", tmp_path / "out", dtype=None, step=8, runs=runs)
    assert (tmp_path / "out/adapter/adapter_config.json").exists()
    assert artifact.digest_folder(tmp_path / "out") == artifact.digest(step.items())


def test_a_stage_carries_from_the_step_that_it_starts_at(tmp_path: Path) -> None:
    """Not from the end of that stage."""

    def branches(recipe: dict[str, Any]) -> None:
        recipe["stages"]["three"] = {
            **recipe["stages"]["one"], "start": "one@4", "until": "8step", "carry": ["optimizer", "schedule", "data"],
        }  # fmt: skip
        del recipe["stages"]["three"]["tokenizer"]

    runs = toy_run(tmp_path, change=branches)
    assert digest_of(runs / "toy/three/1") == digest_of(runs / "toy/one/1")


# -- adopt ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are kept, with `outside/qwen` adopted; the model was given a little schooling first."""
    home = tmp_path_factory.mktemp("adopted")
    families.folder("qwen2", home / "raw")
    old = families.jsonl(home / "old.jsonl", [{"text": t} for t in families.sentences(200, seed=1)])
    recipe = stage_recipe(str(home / "raw"), old, keep="none", until="60step", lr=1e-2)
    run(resolved(recipe, runs=home / "school", name="school"))
    model = home / "school/school/domain/1/artifact/model"
    verbs.adopt_model(str(model), "outside/qwen", runs=home / "runs")
    return home / "runs"


def stage_recipe(
    start: str, data: Path, *, keep: Any = "self", until: str = "40step", lr: float = 3e-3, methods: Any = ()
) -> Any:
    return {
        "stages": {
            "domain": {
                "start": start, "data": {"mine": {"path": str(data), "val": "20%"}}, "keep": keep, "length": 64,
                "batch": "8sample", "optim": {"use": "optim/adamw", "lr": lr}, "schedule": "schedule/constant",
                "precision": "fp32", "methods": list(methods), "until": until,
                "evals": {"every": "none", "run": ["probe/bits_per_byte", "probe/forgetting"], "final": 16, "budget": "100%"},
                "engine": {"micro": 8, "device": "cpu"},
            }
        }
    }  # fmt: skip


def test_an_adopted_model_is_a_finished_stage_that_holds_the_same_weights(adopted: Path) -> None:
    folder = adopted / "outside/qwen/1"
    about = json.loads((folder / "stage.json").read_text())
    assert about["fingerprint"].startswith("adopted-")
    assert families.opened(folder / "artifact/model", "qwen2") is not None
    assert verbs.listing(adopted)[0]["state"] == "adopted"


def test_adopting_twice_is_once_and_another_model_under_the_name_is_refused(
    adopted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = adopted / "outside/qwen/1/artifact/model"
    verbs.adopt_model(str(again), "outside/qwen", runs=adopted)
    assert "already" in capsys.readouterr().out
    other = families.folder("qwen2", tmp_path / "other", hidden=16)
    with pytest.raises(UserError, match="holds another model"):
        verbs.adopt_model(str(other), "outside/qwen", runs=adopted)
    with pytest.raises(UserError, match="RUN/STAGE"):
        verbs.adopt_model(str(other), "qwen", runs=adopted)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        verbs.adopt_model(str(tmp_path / "bare"), "outside/bare", runs=adopted)


METHODS = {
    "none": [],
    "replay": [{"use": "continual/replay", "of": "self", "rate": 0.5}],
    "ewc": [{"use": "continual/ewc", "of": "previous", "rows": 32, "strength": 1e4}],
    "lwf": [{"use": "continual/lwf", "strength": 10.0}],
}


@pytest.fixture(scope="module")
def forgotten(adopted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Last numbers of a stage on new data that starts from the adopted model, by method."""
    data = tmp_path_factory.mktemp("new")
    rows = [{"text": " ".join(str(i + k) for k in range(25))} for i in range(150)]
    new = families.jsonl(data / "new.jsonl", rows)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        families.few_passages(patch, 64)
        for name, methods in METHODS.items():
            run(resolved(stage_recipe("outside/qwen", new, methods=methods), runs=adopted, name=f"m-{name}"))
            found[name] = last(adopted / f"m-{name}/domain/1")
    return found


@pytest.mark.parametrize("name", ["replay", "ewc", "lwf"])
def test_methods_against_forgetting_work_on_an_adopted_model(name: str, forgotten: dict[str, dict[str, float]]) -> None:
    plain, kept = forgotten["none"], forgotten[name]
    assert plain["kl/self"] > 0.05, "the toy must forget something"
    assert kept["kl/self"] < 0.8 * plain["kl/self"], (kept["kl/self"], plain["kl/self"])
    assert {"bits_per_byte/self", "forgetting/self", "original/self"} <= set(kept)


def test_stages_of_several_recipes_share_what_the_adopted_model_wrote(adopted: Path, forgotten: Any) -> None:
    """The passages are one stage, made once and found again."""
    made = [row for row in verbs.listing(adopted) if row["stage"] == "domain.self"]
    assert len(made) == 1


# -- export -----------------------------------------------------------------------------------------------------------


def test_an_export_is_a_plain_folder(toys: Path, tmp_path: Path) -> None:
    verbs.export_model("toy/two", tmp_path / "out", dtype="bf16", step=None, runs=toys)
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert net.dtype == torch.bfloat16 and tokens("the cat")["input_ids"]
    text = net.generate(**tokens("the cat", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert text.shape[1] > 7
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "generation_config.json", "tokenizer.json", "stage.yaml", "config.json"} <= names
    card = (tmp_path / "out/README.md").read_text()
    assert "bits_per_byte/a" in card and "one → two" in card


def test_an_export_of_a_step_is_that_step(toys: Path, tmp_path: Path) -> None:
    verbs.export_model("toy/two", tmp_path / "four", dtype=None, step=4, runs=toys)
    state = artifact.load_state(toys / "toy/two/1/state/000000004")[0]["model"]
    found = artifact.load_tensors(tmp_path / "four/model.safetensors")
    assert all(found[name].equal(state[name]) for name in found)
    assert "at step 4" in (tmp_path / "four/README.md").read_text()


def test_an_export_writes_over_nothing(toys: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("dear to me")
    with pytest.raises(UserError, match="not empty"):
        verbs.export_model("toy/two", tmp_path, dtype=None, step=None, runs=toys)
    with pytest.raises(UserError, match="bf16, fp16 or fp32; did you mean 'bf16'"):
        verbs.export_model("toy/two", tmp_path / "out", dtype="bf-16", step=None, runs=toys)
    assert not (tmp_path / "out").exists()


# -- runs -------------------------------------------------------------------------------------------------------------


def test_runs_are_listed_with_where_they_stand(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(row["run"], row["stage"]): row for row in verbs.listing(toys)}
    two = rows["toy", "two"]
    assert two["state"] == "done" and two["steps"] == STEPS and set(two["bits"]) == {"a", "b"}
    verbs.list_all(toys)
    assert "toy" in capsys.readouterr().out
    verbs.list_all(tmp_path / "nothing")
    assert "No runs" in capsys.readouterr().out

"""Graphs of every kind of stage: two tokenizers, data, tables, choices, rounds, arms, frozen parts, steps to start from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import numbers
from tutelage import modalities
from tutelage.base import load
from tutelage.base.errors import UserError
from tutelage.core import loop, stage
from tutelage.core.artifact import load_tensors
from tutelage.core.graph import Graph
from tutelage.core.record import read_lines
from tutelage.core.run import run_graph
from tutelage.look import batch_of, digest_of
from tutelage.modalities.text import toy
from tutelage.planning import plan

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs for all of these recipes: stage `one` is trained once."""
    return tmp_path_factory.mktemp("stages")


def graph(folder: Path, change: Change, *, name: str) -> Graph:
    recipe = toy.recipe(folder / "data", steps=6)
    for one in recipe["stages"].values():
        one["save"] = {"every": "2step", "keep": 9}
    change(recipe)
    return Graph.resolve(load.load(recipe), name=name, modality=modalities.find("text"), runs=folder / "runs")


def run(folder: Path, change: Change, *, name: str) -> Graph:
    made = graph(folder, change, name=name)
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed and not result.stopped
    assert len(result.done) + len(result.reused) == len(made.nodes)
    return made


def home(made: Graph, name: str) -> Path:
    found = made.nodes[name].folder
    assert found is not None
    return found


def weights(made: Graph, name: str) -> dict[str, torch.Tensor]:
    return load_tensors(home(made, name) / "artifact/model/model.safetensors")


def last(made: Graph, name: str) -> dict[str, float]:
    values: dict[str, float] = numbers(home(made, name), kind="eval")[-1]["values"]
    return values


# -- two tokenizers ---------------------------------------------------------------------------------------------------


def retokenized(recipe: dict[str, Any]) -> None:
    one, two = recipe["stages"]["one"], recipe["stages"]["two"]
    one["start"] |= {"vocab_size": 320, "max_position_embeddings": 64}
    one["tokenizer"] = {"train": "bpe", "vocab": 300}
    two |= {
        "tokenizer": "bytes", "length": 48,
        "methods": [{"use": "continual/replay", "of": "one", "rate": 0.25}],
    }  # fmt: skip
    two["evals"] = {**two["evals"], "run": ["probe/bits_per_byte", "probe/forgetting"]}


def test_stages_with_other_tokenizers_and_lengths_are_measured_on_one_scale(folder: Path) -> None:
    made = run(folder, retokenized, name="tokenizers")
    one, two = last(made, "one"), last(made, "two")
    for values in (one, two):
        assert {"bits_per_byte/a", "bits_per_byte/b"} <= set(values)
        assert all(math.isfinite(value) for value in values.values())
    known = len({two["bits_per_byte/a"], one["bits_per_byte/a"]})
    assert known == 2 and two["forgetting/a"] == pytest.approx(two["bits_per_byte/a"] - one["bits_per_byte/a"])
    before = numbers(home(made, "two"), kind="eval")[0]["values"]
    assert before["bits_per_byte/b"] > two["bits_per_byte/b"]
    sources = {name for row in numbers(home(made, "two"), kind="train") for name in row["cursors"]}
    assert sources == {"b", "one/a"}
    saved = made.modality.processor(None, folder=home(made, "two") / "artifact/model", texts=list, cache=folder)
    assert len(saved) < 300


def test_replayed_data_are_read_in_the_tokens_of_the_stage(folder: Path) -> None:
    made = run(folder, retokenized, name="tokenizers")
    (folder / "runs/tokenizers/recipe.yaml").write_text(load.dump(made.recipe), encoding="utf-8")
    lines = [line for tick in range(1, 7) for line in batch_of(home(made, "two"), tick)]
    replayed = [line for line in lines if "source=one/a" in line]
    assert replayed
    texts = [line.rpartition("text=")[2] for line in replayed]
    assert all(set(text.split()) & set(toy.WORDS) for text in texts if len(text) > 8)


def test_distilling_from_another_tokenizer_is_refused_in_a_line(folder: Path) -> None:
    def distilled(recipe: dict[str, Any]) -> None:
        retokenized(recipe)
        recipe["stages"]["two"]["methods"] = ["continual/lwf"]

    with pytest.raises(UserError, match="continual/lwf needs the start's own tokenizer") as refused:
        run(folder, distilled, name="distilled")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tokens", ["bytes", {"train": "bpe", "vocab": 300}])
def test_bert_from_scratch_has_a_mask_token_and_learns(tmp_path: Path, tokens: Any) -> None:
    import transformers

    def scratch(recipe: dict[str, Any]) -> None:
        one = recipe["stages"]["one"]
        one |= {"start": dict(toy.MODELS["bert"]), "tokenizer": tokens, "until": "30step"}
        one["evals"] = {**one["evals"], "every": "none", "run": ["probe/bits_per_byte", "probe/sample"]}
        del recipe["stages"]["two"]

    planned = plan(graph(tmp_path, scratch, name="bert"))[0]
    made = run(tmp_path, scratch, name="bert")
    rows = numbers(home(made, "one"), kind="train")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"] and 0 < rows[0]["counted"] < 0.4 * 8 * 32
    place = home(made, "one") / "artifact/model"
    opened = transformers.AutoTokenizer.from_pretrained(place)
    model = transformers.AutoModelForMaskedLM.from_pretrained(place)
    assert model.config.vocab_size == len(opened) == planned["vocab"] and opened.mask_token == "<mask>"
    ids = opened("the cat").input_ids
    assert (ids[0], ids[-1]) == (opened.bos_token_id, opened.eos_token_id)


# -- data, tables, choices, values ------------------------------------------------------------------------------------


def family(recipe: dict[str, Any]) -> None:
    """Arms of `two`, a table over them, the best of them, and a stage whose settings come from the table."""
    stages = recipe["stages"]
    small = {"length": 32, "engine": {"device": "cpu"}}
    stages["two"]["sweep"] = {"optim.lr": [1e-2, 1e-3], "seed": [0, 1]}
    stages["written"] = {"start": "one", "make": {"use": "synth/self_samples", "passages": 12, "length": 16}, **small}
    stages["table"] = {"measure": ["probe/bits_per_byte"], "of": ["two--*"], **small}
    stages["table"]["evals"] = {"final": 8}
    stages["best"] = {
        **stages["two"], "start": {"best": ["two--*"], "by": "bits_per_byte/b"},
        "data": {"own": {"stage": "written", "val": "20%"}},
    }  # fmt: skip
    del stages["best"]["sweep"]
    stages["late"] = {
        **stages["best"], "start": "one", "data": stages["two"]["data"],
        "optim": {"use": "optim/adamw", "lr": 1e-3, "decay": {"of": "table", "value": "bits_per_byte/b"}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def kin(folder: Path) -> Graph:
    return run(folder, family, name="family")


ARMS = ["two--lr=0.01,seed=0", "two--lr=0.01,seed=1", "two--lr=0.001,seed=0", "two--lr=0.001,seed=1"]


def test_arms_are_the_product_and_share_their_beginning(kin: Graph) -> None:
    assert [name for name in kin.nodes if name.startswith("two")] == ARMS
    assert len({digest_of(home(kin, name)) for name in ARMS}) == 4
    assert {numbers(home(kin, name), kind="train")[0]["lr"] for name in ARMS} == {1e-2, 1e-3}
    assert {kin.nodes[name].root for name in ARMS} == {"two"}


def test_a_stage_that_writes_data_feeds_another(kin: Graph) -> None:
    rows = read_lines(home(kin, "written") / "artifact/data/rows.jsonl")
    assert rows and all(row["made_by"] == "synth/self_samples" and row["text"] for row in rows)
    assert {name for row in numbers(home(kin, "best"), kind="train") for name in row["cursors"]} == {"own"}
    assert {"bits_per_byte/own", "bits_per_byte/b", "bits_per_byte/a"} <= set(last(kin, "best"))


def test_a_table_measures_every_arm_on_every_column(kin: Graph) -> None:
    table = json.loads((home(kin, "table") / "artifact/table/table.json").read_text())
    assert sorted(table) == sorted(ARMS)
    for name, row in table.items():
        assert {"bits_per_byte/a", "bits_per_byte/b"} <= set(row)
        assert row["bits_per_byte/b"] == pytest.approx(last(kin, name)["bits_per_byte/b"], abs=1e-6)
    lines = (home(kin, "table") / "artifact/table/table.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("model,")


def test_the_best_arm_is_started_from(kin: Graph) -> None:
    scores = {name: last(kin, name)["bits_per_byte/b"] for name in ARMS}
    best = min(scores, key=lambda name: scores[name])
    assert kin.nodes["best"].stage.start == best
    about = json.loads((home(kin, "best") / "stage.json").read_text())
    assert about["stage"]["start"] == best


def test_a_value_of_a_table_becomes_a_setting(kin: Graph) -> None:
    table = json.loads((home(kin, "table") / "artifact/table/table.json").read_text())
    value = list(table.values())[-1]["bits_per_byte/b"]
    about = json.loads((home(kin, "late") / "stage.json").read_text())
    assert about["parts"]["optim"]["decay"] == pytest.approx(value, rel=1e-5)
    again = graph(kin.runs.parent, family, name="family")
    assert {row["stage"]: row["state"] for row in plan(again)}["late"] == "done"
    (kin.runs / "family/recipe.yaml").write_text(load.dump(kin.recipe), encoding="utf-8")
    assert batch_of(home(kin, "late"), 1)


def test_a_value_that_no_table_wrote_is_refused_in_a_line(folder: Path, kin: Graph) -> None:
    def wrong(recipe: dict[str, Any]) -> None:
        family(recipe)
        recipe["stages"]["late"]["optim"]["decay"]["value"] = "beauty"

    with pytest.raises(UserError, match="stage 'table' wrote no value 'beauty'; it wrote .*bits_per_byte/b"):
        run(folder, wrong, name="family")


def test_rounds_begin_where_the_last_one_ended_and_merge(folder: Path) -> None:
    def rounds(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        two = {**stages.pop("two"), "until": "2step"}
        stages["cold"] = {
            "repeat": 2, "start": "one",
            "stages": {
                "left": {**two, "start": "previous"},
                "right": {**two, "start": "previous", "data": stages["one"]["data"]},
                "merged": {"start": ["left", "right"], "apply": {"use": "merge/linear", "weights": [0.5, 0.5]},
                           "length": 32, "engine": {"device": "cpu"}, "evals": two["evals"]},
            },
        }  # fmt: skip

    made = run(folder, rounds, name="rounds")
    first, second = "cold.1.merged", "cold.2.merged"
    assert made.nodes["cold.2.left"].stage.start == first
    parts = [weights(made, name) for name in ("cold.2.left", "cold.2.right", second)]
    for key, tensor in parts[2].items():
        torch.testing.assert_close(tensor, (parts[0][key] + parts[1][key]) / 2)
    assert {"bits_per_byte/a", "bits_per_byte/b"} <= set(last(made, second))
    assert digest_of(home(made, first)) != digest_of(home(made, second))


# -- what is trained --------------------------------------------------------------------------------------------------


def test_what_is_frozen_stays_to_the_bit_and_groups_have_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    train = loop.train

    def looked(built: stage.Run) -> None:
        seen["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in built.engine.optimizer.param_groups]
        seen["dropout"] = {n: m.p for n, m in built.engine.model.named_modules() if isinstance(m, torch.nn.Dropout)}
        train(built)

    monkeypatch.setattr("tutelage.core.run.train", looked)

    def parts(recipe: dict[str, Any]) -> None:
        one, two = recipe["stages"]["one"], recipe["stages"]["two"]
        one["start"] = dict(toy.MODELS["gpt2"])
        two |= {
            "train": ["*h.1.attn*", "*h.1.mlp*", "*ln_f*"],
            "groups": [
                {"match": "*mlp*", "rate": 0.1, "decay": 0.0},
                {"match": "*ln_f*", "rate": 0.0},
                {"match": "*h.1.attn*", "dropout": 0.25},
            ],
        }  # fmt: skip

    made = run(folder, parts, name="parts")
    before, after = weights(made, "one"), weights(made, "two")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".h.1." in name and "ln_1" not in name for name in moved)
    assert {name for name in before if ".h.1.mlp" in name or ".h.1.attn" in name} <= moved
    by_name = {name: group for group in seen["groups"] for name in group["names"]}
    assert not [name for name in by_name if ".h.0." in name or "wte" in name or "ln_1" in name]
    mlp = next(group for name, group in by_name.items() if "mlp.c_fc.weight" in name)
    attn = next(group for name, group in by_name.items() if "attn.c_attn.weight" in name)
    assert (mlp["base_lr"], mlp["weight_decay"]) == (pytest.approx(1e-3), 0.0)
    assert (attn["base_lr"], attn["weight_decay"]) == (1e-2, 0.1)
    assert by_name["transformer.ln_f.weight"]["base_lr"] == 0.0
    dropped = {name for name, p in seen["dropout"].items() if p == 0.25}
    assert dropped and all("h.1.attn" in name for name in dropped)
    assert {p for name, p in seen["dropout"].items() if name not in dropped} == {0.0}


# -- where a stage begins and how far it goes -------------------------------------------------------------------------


def test_a_stage_starts_from_a_step_of_another(folder: Path) -> None:
    def early(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        stages["two"]["start"] = "one@4"

    def short(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["until"] = "4step"

    made, other = run(folder, early, name="early"), run(folder, short, name="short")
    assert digest_of(home(made, "two")) == digest_of(home(other, "two"))
    four, same = load_tensors(home(made, "one") / "state/000000004/model.safetensors"), weights(other, "one")
    assert all(torch.equal(four[name], same[name]) for name in same)
    assert made.nodes["two"].fingerprint != other.nodes["two"].fingerprint


@pytest.mark.parametrize("optim", [{"use": "optim/adamw"}, {"use": "optim/galore", "rank": 4, "refresh": 4}])
def test_a_stage_that_takes_everything_along_goes_on_as_if_there_were_no_border(
    optim: dict[str, Any], folder: Path
) -> None:
    def carried(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        falling = {"use": "schedule/linear", "warm": "3step", "floor": 0.1}
        stages["one"] |= {"schedule": "schedule/constant", "optim": {**optim, "lr": 3e-3}}
        stages["two"] = {**stages["one"], "start": "one", "carry": ["optimizer", "schedule", "data"]}
        del stages["two"]["tokenizer"]
        stages["slower"] = {**stages["two"], "schedule": falling}

    def unbroken(recipe: dict[str, Any]) -> None:
        carried(recipe)
        recipe["stages"] = {"one": {**recipe["stages"]["one"], "until": "12step"}}

    kind = optim["use"].rpartition("/")[2]
    made, other = run(folder, carried, name=f"carried-{kind}"), run(folder, unbroken, name=f"unbroken-{kind}")
    assert digest_of(home(made, "two")) == digest_of(home(other, "one"))
    rows, whole = numbers(home(made, "two"), kind="train"), numbers(home(other, "one"), kind="train")[6:]
    assert [row["cursors"] for row in rows] == [row["cursors"] for row in whole]
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    rates = [row["lr"] for row in numbers(home(made, "slower"), kind="train")]
    assert rates[0] < 3e-3 and rates == sorted(rates, reverse=True), "no second warmup: the schedule goes on"


@pytest.mark.parametrize(
    ("until", "unit", "least"),
    [("5step", "step", 5), ("900tok", "tokens", 900), ("33sample", "samples", 33), ("0.2epoch", "epochs", 0.2),
     ("15%", "epochs", 0.15), ("5e8flop", "flops", 5e8)],
)  # fmt: skip
def test_a_stage_ends_at_the_first_step_that_reaches_its_span(
    until: str, unit: str, least: float, folder: Path
) -> None:
    def spanned(recipe: dict[str, Any]) -> None:
        two = recipe["stages"]["two"]
        two |= {"until": until, "schedule": {"use": "schedule/linear", "warm": "10%"}}
        two["evals"] = {**two["evals"], "every": "25%" if "flop" not in until else "2step"}

    made = run(folder, spanned, name=f"until-{unit}-{least}")
    rows = numbers(home(made, "two"), kind="train")
    assert rows[-1][unit] >= least - 1e-9 > rows[-2][unit]
    assert rows[-1]["lr"] < rows[len(rows) // 2]["lr"]
    assert len(numbers(home(made, "two"), kind="eval")) > 2


def test_an_epoch_is_one_of_the_largest_source(folder: Path) -> None:
    def both(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        (folder / "few.jsonl").write_text(
            "".join(json.dumps({"text": f"some words {i} here"}) + "\n" for i in range(12))
        )
        few = {"path": str(folder / "few.jsonl"), "val": "20%"}
        stages["two"] |= {"data": {"few": few, **stages["two"]["data"]}, "until": "0.4epoch"}

    made = run(folder, both, name="epochs")
    row = numbers(home(made, "two"), kind="train")[-1]
    assert 0.4 <= row["epochs"] < 0.6
    assert row["cursors"]["few"][0] > 12, "the small one is read more than once meanwhile"


def lines_of(graph: Graph, stage: str, *, tick: int, source: str) -> list[int]:
    """The lines of a file that a step's rows came from."""
    told = [line for line in batch_of(home(graph, stage), tick) if f"source={source} " in line]
    return [int(re.findall(r" line=(\d+) ", line)[0]) for line in told]


def test_stored_documents_are_drawn_as_they_stand_pass_after_pass(folder: Path) -> None:
    """Where a stage says so: another one draws the same documents in the keyed order."""

    few = folder / "few.jsonl"

    def stored(recipe: dict[str, Any]) -> None:
        one, two = recipe["stages"]["one"], recipe["stages"]["two"]
        few.write_text("".join(json.dumps({"text": line}) + "\n" for line in toy.texts()["a"][:20]))
        one |= {"data": {"a": {"path": str(few), "val": "20%"}}, "until": "12step", "packing": "concat"}
        two |= {"data": {**two["data"], "a": dict(one["data"]["a"])}, "packing": "concat"}
        one["data"]["a"]["order"] = "stored"

    made = run(folder, stored, name="stored")
    (folder / "runs/stored/recipe.yaml").write_text(load.dump(made.recipe), encoding="utf-8")
    one = [line for tick in range(1, 13) for line in lines_of(made, "one", tick=tick, source="a")]
    seen, there = [line for line, _ in groupby(one)], sorted(set(one))
    assert len(seen) > len(there) > 10 and seen == (there * 9)[: len(seen)]
    two = [line for tick in range(1, 7) for line in lines_of(made, "two", tick=tick, source="a")]
    assert len(two) > 10 and two != sorted(two)
    assert set(stage.columns(made.nodes["two"])) == {"a", "b"}  # what is held out of `a` is the same

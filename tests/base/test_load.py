"""Recipes: read, refused in one line, changed by --set, written back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.base.clock import Span
from tutelage.base.errors import UserError
from tutelage.base.load import dump, load
from tutelage.base.marked import parse, plain, to_yaml
from tutelage.base.spec import Recipe, Stage

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if "stages:" in p.read_text(encoding="utf-8"))

# line 2 is `a`, line 6 what a test adds to it
A = "stages:\n  a:\n    start: gpt2\n    data: {x: y.jsonl}\n    until: 1step\n"


def said(recipe: Any, *sets: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(UserError) as caught:
        load(recipe, sets=sets)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_house_loads_and_reads_back(path: Path) -> None:
    recipe = load(path)
    assert load(dump(recipe)) == recipe
    assert load(plain(recipe, bare=True)) == recipe


def test_a_bare_recipe_keeps_the_default_length_of_a_stage_that_would_take_its_starts() -> None:
    short = {"start": "gpt2", "data": {"x": "y.jsonl"}, "length": 128, "until": "1step"}
    recipe = load({"stages": {"a": short, "b": {"start": "a", "apply": "grow/stack", "length": 512}}})
    assert recipe.stages["b"].length == 512 and load(plain(recipe, bare=True)) == recipe


def test_a_bare_recipe_says_what_is_not_the_default_and_reads_back_the_same() -> None:
    written = {
        "start": "gpt2", "data": {"x": "y.jsonl"}, "until": "1step", "groups": [{"match": "*.bias", "decay": 0.0}],
        "engine": {"clip": None, "micro": None}, "steering": {"agent": {"limits": {"optim.lr": {"by": [0.9, 1.1]}}}},
    }  # fmt: skip
    recipe = load({"stages": {"a": written, "b": {"start": "a", "data": {"x": "y.jsonl"}, "until": "2step"}}})
    bare = plain(recipe, bare=True)
    assert bare["stages"]["a"] == {**written, "data": {"x": {"path": "y.jsonl"}}, "engine": {"clip": None}}
    assert load(bare) == recipe


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "recipe: the recipe is empty"),
        ("# nothing\n", "recipe: the recipe is empty"),
        ("- a\n- b\n", "recipe: a recipe is a mapping, not a list"),
        ("seed: 1\n", "recipe: the recipe has no stages; it begins with stages:"),
        ("stages:\n", "recipe:1: stages is empty"),
        ("stages: {}\n", "recipe:1: stages is empty"),
        ("stages: [a]\n", "recipe:1: stages: a mapping of keys belongs here"),
        (A + "  b:\n", "recipe:6: stages.b: a mapping of keys belongs here (here: nothing)"),
        (A + "    lenght: 8\n", "recipe:6: stages.a has no key 'lenght'; did you mean 'length'?"),
        (A + "    evals: {evry: 3}\n", "recipe:6: stages.a.evals has no key 'evry'; did you mean 'every'?"),
        (A + "    clip: 1\n", "recipe:6: stages.a has no key 'clip'; it belongs under engine: engine: {clip: …}"),
        (A + "until: 3step\n", "recipe:6: the recipe has no key 'until'; it belongs inside a stage"),
        (A + "    modality: text\n", "recipe:6: stages.a has no key 'modality'; it belongs beside `stages`"),
        (A + "    seed: x\n", "recipe:6: stages.a.seed: a whole number belongs here (here: 'x')"),
        (A + "    length: 20.5\n", "recipe:6: stages.a.length: a whole number belongs here (here: 20.5)"),
        (A + "    length: 2\n", "recipe:6: stages.a.length: a number of at least 8 belongs here (here: 2)"),
        (A + "    optim: [1]\n", "recipe:6: stages.a.optim: text or a mapping belongs here (here: [1])"),
        (A + "    precision: b16\n", "'b16' is not one of auto, fp32, bf16; did you mean 'bf16'?"),
        (A + "    groups:\n      - rate: 2\n", "recipe:7: stages.a.groups.0 lacks 'match'"),
        (A + "    save: {every: 5parsec}\n", "recipe:6: stages.a.save.every: '5parsec' is not a span"),
        (A + "    batch: 5step\n", "recipe:6: stages.a.batch: a batch is counted in tokens or rows"),
        (A + "    length: {of: a, value: n}\n", "recipe:2: stage a refers to a: stages cannot wait for one another"),
        (A + "    apply: merge/linear\n", "exactly one of until, apply, make, measure (here: until and apply)"),
        (
            A + "  b: {start: a}\n",
            "recipe:6: stages.b: a stage has exactly one of until, apply, make, measure (here: none",
        ),
        (A + "  b: {start: a, until: 1step, data: {y: {}}}\n", "stages.b.data.y: a source names exactly one of path"),
        (A + "  b/c: {until: 1step}\n", "recipe:6: 'b/c' cannot be a stage's name"),
        (A + "  previous: {until: 1step}\n", "recipe:6: 'previous' has a meaning of its own"),
        (A + "    until: 2step\n", "recipe:6: 'until' is written twice in stages.a (first on line 5)"),
        ("a: b: c\n", "recipe:1: mapping values are not allowed here"),
        ("a:\n\t- b\n", "recipe:2: a tab where YAML wants spaces"),
        (A + "---\nb: 1\n", "recipe:6: a second document begins here"),
        ("a: !!python/object:os.x 1\n", "recipe:1: no values of kind"),
        ("stages: &a {x: *a}\n", "recipe:1: an alias contains itself"),
        (A + "    learning_rate: 1\n    num_train_epochs: 2\n", "(and 1 more)"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(text: str, line: str) -> None:
    assert line in said(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "  b: {start: a@x, until: 1step}\n  c: {start: d@3, until: 1step}\n",
            "recipe:7: stages.c.start: no stage 'd'",
        ),
        ("  code: {start: a, until: 1step}\n  c: {start: cod, until: 1step}\n", "no stage 'cod'; did you mean 'code'?"),
        ("  c: {start: a, data: {s: {stage: aa}}, until: 1step}\n", "recipe:6: stages.c.data.s.stage: no stage 'aa'"),
        ("  c: {start: a, data: {s: {stage: a}}, until: 1step}\n", "stage 'a' makes a model, not data"),
        ("  c: {start: a, keep: {s: {stage: a}}, until: 1step}\n", "stages.c.keep.s.stage: stage 'a' makes a model"),
        ("  t: {measure: [probe/x], of: [a]}\n  c: {start: t, until: 1step}\n", "makes a table, and training does not"),
        (
            "  c: {start: a, methods: [{use: x/y, of: ab}], until: 1step}\n",
            "recipe:6: stages.c.methods.0.of: no stage 'ab'",
        ),
        ("  c: {measure: [probe/x], of: [ab]}\n", "recipe:6: stages.c.of.0: no stage 'ab'; did you mean 'a'?"),
        ("  c: {measure: [probe/x], of: ['b--*']}\n", "stages.c.of.0: no stage matches 'b--*'; there is a"),
        ("  c: {start: {best: ['b*'], by: mean}, until: 1step}\n", "stages.c.start.best.0: no stage matches 'b*'"),
        ("  c: {start: {best: [a], bye: mean}, until: 1step}\n", "has no key 'bye'; a choice is written {best:"),
        ("  c: {start: {best: a}, until: 1step}\n", "a choice is written {best: [stages]"),
        ("  c: {start: a, apply: {use: x/y, w: {of: law, value: r}}}\n", "stages.c.apply.w.of: no stage 'law'"),
        ("  b: {start: c, until: 1step}\n  c: {start: b, until: 1step}\n", "stage b starts from c which starts from b"),
        ("  b: {start: b, until: 1step}\n", "recipe:6: stage b starts from b"),
        (
            "  b: {start: a, make: x/y, data: {s: {stage: c}}}\n  c: {start: b, make: x/y}\n",
            "recipe:6: stage b reads data of c which starts from b",
        ),
    ],
)
def test_stages_that_do_not_fit_together_are_named(text: str, line: str) -> None:
    assert line in said(A + text)


def test_a_start_that_is_no_stage_may_be_a_hub_name_a_folder_or_a_config(tmp_path: Path) -> None:
    starts = [
        "gpt2",
        "Qwen/Qwen2.5-0.5B",
        "demo/base@500",
        "./a",
        str(tmp_path),
        {"model_type": "llama"},
        "recipes/x.yaml",
    ]
    for start in starts:
        stages = {"a": {"start": start, "until": 1}, "b": {"start": "a", "until": 1}}
        assert load({"stages": stages}).stages["a"].start == start


def test_of_may_name_what_is_kept_and_words_of_its_own() -> None:
    for of in ("previous", "self", "mine", "./data/x.jsonl"):
        stage = {"start": "a", "until": 1, "keep": {"mine": "m.jsonl"}, "methods": [{"use": "x/y", "of": of}]}
        assert load({"stages": {"a": {"start": "gpt2", "until": 1}, "b": stage}})


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (
            "learning_rate",
            "stages.a has no key 'learning_rate' (Hugging Face, Axolotl, LLaMA-Factory, torchtune); here: ",
        ),
        ("cutoff_len", "stages.a has no key 'cutoff_len' (LLaMA-Factory); here: length: 2048"),
        ("sequence-len", "stages.a has no key 'sequence-len' (Axolotl); here: length: 2048"),
    ],
)
def test_a_name_from_elsewhere_is_answered_with_the_one_here(key: str, line: str) -> None:
    assert said(A + f"    {key}: 1\n").startswith(f"recipe:6: {line}")


def test_a_whole_recipe_from_elsewhere_is_told_that_models_belong_in_stages() -> None:
    line = said("base_model: x\nsequence_len: 2048\nnum_epochs: 3\n")
    assert line.startswith("recipe:1: the recipe has no key 'base_model' (Axolotl); here, inside a stage: start:")
    assert "(and 3 more)" in line


def test_yaml_and_python_are_equal() -> None:
    value = {"start": "gpt2", "data": {"x": "y.jsonl"}, "until": "1step", "optim": {"use": "optim/adamw", "lr": 2e-5}}
    text = "stages: {a: {start: gpt2, data: {x: y.jsonl}, until: 1step, optim: {use: optim/adamw, lr: 2e-5}}}\n"
    assert load({"stages": {"a": value}}) == load(text)
    built = Recipe(stages={"a": Stage(**{**value, "until": Span(1, "step")})})
    assert load(built) == load(text)
    assert load({"stages": {"a": built.stages["a"]}}) == load(text)


def test_a_dict_has_no_lines() -> None:
    assert said({"stages": {"a": {"untl": 3}}}).startswith("stages.a has no key 'untl'; did you mean 'until'?")


def test_numbers_are_numbers_and_words_are_words() -> None:
    text = "a: 2e-5\nb: 1e13flop\nc: on\nd: 010\ne: 1:30\nf: 2024-01-01\ng: .5\nh: 1_000\ni: no\non: ~\nj: 1E6\n"
    assert parse(text) == {
        "a": 2e-5, "b": "1e13flop", "c": "on", "d": "010", "e": "1:30", "f": "2024-01-01", "g": 0.5, "h": 1000,
        "i": "no", "on": None, "j": 1e6,
    }  # fmt: skip


def test_anchors_and_merge_keys_work() -> None:
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: *a\n"
    assert parse(text) == {"a": {"x": 1, "y": [1, 2]}, "b": {"x": 2, "y": [1, 2]}, "c": {"x": 1, "y": [1, 2]}}


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
_KEYS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=6)


@settings(deadline=None)
@given(st.recursive(_SCALARS, lambda x: st.lists(x, max_size=4) | st.dictionaries(_KEYS, x, max_size=4), max_leaves=12))
def test_any_tree_reads_back_as_it_was_written(value: Any) -> None:
    assert parse(to_yaml(value)) == value


def test_a_file_that_is_not_there_is_looked_for_nearby(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(A)
    assert said(tmp_path / "dmo.yaml").endswith("no such recipe; did you mean 'demo.yaml'?")
    assert said(str(tmp_path)).endswith("is a folder; a recipe is one YAML file")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "not UTF-8 text" in said(tmp_path / "bad.yaml")
    assert load(str(tmp_path / "demo.yaml")) == load(A)


def test_the_line_is_the_files(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(A + "    lenght: 1\n")
    assert said(tmp_path / "r.yaml").startswith(f"{tmp_path}/r.yaml:6: stages.a has no key")


# -- --set -------------------------------------------------------------------------------------------------------------


def changed(*sets: str, text: str = A) -> Stage:
    return load(text, sets=sets).stages["a"]


def test_set_changes_what_is_written() -> None:
    assert changed("stages.a.until=1Mtok").until == Span(1e6, "tok")
    assert load(A, sets=["seed=7"]).seed == 7


def test_set_reaches_what_the_recipe_leaves_out() -> None:
    stage = changed("stages.a.engine.clip=0.5", "stages.a.evals.run=[probe/x]", "stages.a.carry=[data]")
    assert (stage.engine.clip, stage.evals.run, stage.carry) == (0.5, ["probe/x"], ["data"])
    assert changed("stages.a.engine.clip=null").engine.clip is None


def test_set_widens_shorthand() -> None:
    text = A + "    optim: optim/muon\n    methods: [continual/ewc]\n"
    stage = changed("stages.a.optim.lr=1e-3", "stages.a.methods.0.strength=2", "stages.a.data.x.weight=3", text=text)
    assert stage.optim == {"use": "optim/muon", "lr": 1e-3}
    assert stage.methods == [{"use": "continual/ewc", "strength": 2}]
    assert (stage.data["x"].path, stage.data["x"].weight) == ("y.jsonl", 3)
    assert changed("stages.a.optim.lr=1e-3").optim == {"use": "optim/adamw", "lr": 1e-3}


def test_set_comes_before_a_sweep_is_unrolled() -> None:
    text = A + "    sweep: {optim.lr: [1e-3, 1e-4]}\n"
    recipe = load(text, sets=["stages.a.until=9step", "stages.a.sweep.optim.lr=[1.0]"])
    assert {name: stage.until for name, stage in recipe.stages.items()} == {"a--lr=1": Span(9, "step")}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("stages.b.until=2", "no stage 'b'; there is a"),
        ("stages.a.untl=2", "stages.a has no key 'untl'; did you mean 'until'?"),
        ("stages.a.engine.clop=2", "stages.a.engine has no key 'clop'; did you mean 'clip'?"),
        ("stages.a.learning_rate=2", "stages.a has no key 'learning_rate' (Hugging Face"),
        ("stages.a.methods.0.rate=2", "stages.a.methods has 0 items, counted from 0; there is no '0'"),
        ("stages.a.until.x=2", "stages.a.until is a plain value and has nothing inside"),
        ("stages.a.until=foo", "stages.a.until: 'foo' is not a span"),
        ("sed=3", "the recipe has no key 'sed'; did you mean 'seed'?"),
        ("stages.a.until", "write path=value"),
        ("stages.a.start=[", "expected the node content"),
    ],
)
def test_a_set_that_does_not_fit_is_one_line(text: str, line: str) -> None:
    said_line = said(A, text)
    assert said_line.startswith(f"--set {text}")
    assert line in said_line


# -- property ----------------------------------------------------------------------------------------------------------

_ENTRIES = st.sampled_from(["a/b", {"use": "a/b", "x": 1e-5}, {"use": "a/b", "y": ["1e5", None, {"z": "1:2"}]}])
_STAGES = st.fixed_dictionaries(
    {"until": st.sampled_from([3, "5step", "1e13flop", "10%", "820ktok"]) | st.integers(1, 10**9)},
    optional={
        "data": st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(["p", {"path": ["a"], "weight": 2}])),
        "keep": st.sampled_from(["self", "none", {"k": "k.jsonl"}]),
        "batch": st.integers(1, 10**7) | st.sampled_from(["16ktok", "8sample"]),
        "optim": _ENTRIES,
        "methods": st.lists(_ENTRIES, max_size=2),
        "engine": st.fixed_dictionaries({}, optional={"clip": st.none() | st.floats(0.1, 9), "compile": st.booleans()}),
        "groups": st.just([{"match": "*norm*", "decay": 0.0}]),
        "seed": st.integers(0, 9),
        "tokenizer": st.sampled_from(["bytes", {"train": "bpe", "vocab": 99}]),
        "repeat": st.integers(1, 3),
        "sweep": st.sampled_from([{"low": {"length": 8}, "high": None}, {"optim.lr": [1e-3, 0.1]}]),
    },
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), _STAGES, min_size=1), st.integers(0, 9))
def test_what_was_loaded_loads_equal_when_it_is_dumped(stages: dict[str, Any], seed: int) -> None:
    recipe = load({"stages": stages, "seed": seed})
    assert load(dump(recipe)) == recipe
    assert load(to_yaml({"stages": stages, "seed": seed})) == recipe


def test_a_stage_that_does_not_train_has_rows_as_long_as_what_it_comes_from() -> None:
    train = {"start": "gpt2", "data": {"p": "p.jsonl"}, "until": "9step"}
    stages: dict[str, Any] = {
        "merged": {"start": ["./outside", "b", "a"], "apply": "merge/linear"},
        "grown": {"start": "merged", "apply": "grow/stack"},
        "table": {"measure": ["probe/bits_per_byte"], "of": ["a", "b"]},
        "told": {"start": "a", "apply": "grow/stack", "length": 512},
        "alone": {"start": "./outside", "make": "synth/self_samples"},
        "on": {**train, "start": "a"},
        "a": {**train, "length": 64}, "b": {**train, "length": 96},
    }  # fmt: skip
    found = load({"stages": stages})
    lengths = {name: stage.length for name, stage in found.stages.items()}
    assert lengths == {"a": 64, "b": 96, "merged": 96, "grown": 96, "table": 64, "told": 512, "alone": 512, "on": 512}
    assert load(dump(found)) == found
    assert load(Recipe.model_validate({"stages": stages})) == found

"""Sweeps, repeats, references between stages, their order, and values that one stage gives another."""

from __future__ import annotations

from typing import Any

import pytest

from tutelage.base.errors import UserError
from tutelage.base.expand import expand, merge, order, references, root_name
from tutelage.base.load import dump, load
from tutelage.base.marked import mark
from tutelage.base.spec import Recipe, Stage
from tutelage.base.values import late_bound, late_names

BASE = {"start": "gpt2", "data": {"p": "p.jsonl"}, "until": "9step"}


def unrolled(**stages: Any) -> dict[str, Any]:
    return dict(expand(mark({"stages": stages}))["stages"])


def said(**stages: Any) -> str:
    with pytest.raises(UserError) as caught:
        load({"stages": stages})
    return str(caught.value)


# -- sweep ------------------------------------------------------------------------------------------------------------


def test_named_arms_are_merged_into_the_stage() -> None:
    code = {
        "start": "base",
        "until": "1step",
        "optim": {"use": "optim/adamw", "lr": 1e-3},
        "methods": ["a/b"],
        "train": ["x"],
        "sweep": {"low": {"optim": {"lr": 1e-4}, "methods": ["c/d"], "train": ["y"]}, "plain": None},
    }
    recipe = load({"stages": {"base": BASE, "code": code}})
    assert list(recipe.stages) == ["base", "code--low", "code--plain"]
    low, plain = recipe.stages["code--low"], recipe.stages["code--plain"]
    assert low.optim == {"use": "optim/adamw", "lr": 1e-4}
    assert (low.methods, low.train) == (["a/b", "c/d"], ["y"])
    assert (plain.optim, plain.methods) == ({"use": "optim/adamw", "lr": 1e-3}, ["a/b"])


def test_listed_values_make_every_combination() -> None:
    sweep = {"optim.lr": [1e-3, 2e-5], "methods.0.rate": ["5%", 0.1]}
    found = unrolled(a={**BASE, "methods": ["continual/replay"], "sweep": sweep})
    names = ["a--lr=0.001,rate=5%", "a--lr=0.001,rate=0.1", "a--lr=2e-5,rate=5%", "a--lr=2e-5,rate=0.1"]
    assert list(found) == names
    assert found[names[2]]["optim"] == {"use": "optim/adamw", "lr": 2e-5}
    assert found[names[3]]["methods"] == [{"use": "continual/replay", "rate": 0.1}]
    assert all("sweep" not in arm for arm in found.values())


def test_named_arms_and_values_multiply() -> None:
    found = unrolled(a={**BASE, "sweep": {"low": {"length": 8}, "high": {}, "seed": [1, 2]}})
    assert list(found) == ["a--low,seed=1", "a--low,seed=2", "a--high,seed=1", "a--high,seed=2"]


def test_values_that_make_no_word_are_numbered() -> None:
    assert list(unrolled(a={**BASE, "sweep": {"methods": [[], ["a/b"]]}})) == ["a--methods=1", "a--methods=2"]
    assert list(unrolled(a={**BASE, "sweep": {"optim": ["optim/adamw", {"use": "optim/muon"}]}})) == [
        "a--optim=adamw",
        "a--optim=muon",
    ]
    paths = ["x/a.jsonl", "y/a.jsonl"]
    assert list(unrolled(a={**BASE, "sweep": {"data.p.path": paths}})) == ["a--path=1", "a--path=2"]


def test_arms_share_nothing() -> None:
    found = unrolled(a={**BASE, "methods": [{"use": "a/b", "x": 1}], "sweep": {"methods.0.x": [2, 3]}})
    assert [stage["methods"][0]["x"] for stage in found.values()] == [2, 3]


def test_arms_are_found_by_wildcards_and_by_name() -> None:
    stages = {
        "base": BASE,
        "code": {"start": "base", "until": "1step", "sweep": {"low": {"length": 8}, "high": {}}},
        "pick": {"start": {"best": ["code--*"], "by": "mean"}, "until": "1step"},
        "soup": {"start": ["code--*"], "apply": "merge/linear"},
        "law": {"measure": ["predict/x"], "of": ["code--*", "base"]},
        "next": {"start": "code--low@5", "until": "1step"},
    }
    recipe = load({"stages": stages})
    assert recipe.stages["pick"].start == {"best": ["code--low", "code--high"], "by": "mean"}
    assert recipe.stages["soup"].start == ["code--low", "code--high"]
    assert recipe.stages["law"].of == ["code--low", "code--high", "base"]
    assert references(recipe.stages["next"]) == ["code--low"]


def test_a_wildcard_does_not_match_the_stage_it_stands_in() -> None:
    recipe = load({"stages": {"a": BASE, "t": {"measure": ["probe/x"], "of": ["*"]}}})
    assert recipe.stages["t"].of == ["a"]


def test_an_arm_goes_on_from_the_arm_of_the_same_name() -> None:
    sweep = {"low": {"seed": 1}, "high": {"seed": 2}}
    found = unrolled(a={**BASE, "sweep": sweep}, b={"start": "a", "until": "1step", "sweep": sweep})
    assert {name: stage["start"] for name, stage in found.items() if name[0] == "b"} == {
        "b--low": "a--low",
        "b--high": "a--high",
    }


def test_starting_from_a_swept_stage_names_its_arms() -> None:
    line = said(a={**BASE, "sweep": {"low": {}, "high": {}}}, b={"start": "a", "until": "1step"})
    assert line == (
        "stages.b.start: 'a' is swept into a--low, a--high; name one of them, or {best: [a--*], by: metric}"
    )


@pytest.mark.parametrize(
    ("sweep", "line"),
    [
        ({}, "stages.a.sweep: write named arms"),
        ([1], "stages.a.sweep: write named arms"),
        ({"seed": 3}, "stages.a.sweep.seed: a list of values, or a mapping of changes"),
        ({"seed": []}, "stages.a.sweep.seed: a list of values"),
        ({"sed": [1]}, "stages.a has no key 'sed'; did you mean 'seed'?"),
        ({"optim.lr": [1], "schedule.lr": [1, 2], "methods.0.x": [1]}, "stages.a.methods has 0 items"),
        ({"low": {"sed": 1}}, "stages.a--low has no key 'sed'; did you mean 'seed'?"),
    ],
)
def test_a_sweep_that_does_not_fit_is_one_line(sweep: Any, line: str) -> None:
    assert line in said(a={**BASE, "sweep": sweep})


def test_the_line_of_an_arms_fault_is_where_it_was_written() -> None:
    text = (
        "stages:\n  a:\n    until: 1step\n    methods: []\n    sweep:\n      low:\n        evals:\n          evry: 1\n"
    )
    with pytest.raises(UserError, match=r"^recipe:8: stages\.a--low\.evals has no key 'evry'"):
        load(text)


def test_merging_widens_shorthand_and_replaces_another_method_whole() -> None:
    stage = {"optim": "optim/muon", "schedule": {"use": "schedule/wsd", "cooldown": "20%"}}
    merge(stage, {"optim": {"lr": 1}, "schedule": {"use": "schedule/cosine"}, "mix": {"alpha": 0.5}})
    assert stage == {
        "optim": {"use": "optim/muon", "lr": 1},
        "schedule": {"use": "schedule/cosine"},
        "mix": {"use": "mix/fixed", "alpha": 0.5},
    }


# -- repeat -----------------------------------------------------------------------------------------------------------


def test_a_repeated_stage_goes_on_from_itself() -> None:
    found = unrolled(
        a={**BASE, "repeat": 3}, b={"start": "a@5", "until": "1step"}, c={"start": "a.1", "until": "1step"}
    )
    assert {name: stage["start"] for name, stage in found.items()} == {
        "a.1": "gpt2",
        "a.2": "a.1",
        "a.3": "a.2",
        "b": "a.3@5",
        "c": "a.1",
    }


def test_a_block_refers_to_its_own_round_and_the_one_before() -> None:
    found = unrolled(
        base=BASE,
        rounds={
            "repeat": 2,
            "start": "base",
            "stages": {
                "write": {"start": "previous", "make": "synth/x"},
                "learn": {
                    "start": "previous@3",
                    "data": {"syn": {"stage": "write"}, "q": "q.jsonl"},
                    "methods": [{"use": "a/b", "of": "base"}, {"use": "c/d", "of": "previous"}],
                    "until": "1step",
                },
            },
        },
        end={"start": "rounds", "until": "1step"},
        second={"start": ["rounds.1", "rounds"], "apply": "merge/linear"},
    )
    assert list(found) == [
        "base", "rounds.1.write", "rounds.1.learn", "rounds.2.write", "rounds.2.learn", "end", "second",
    ]  # fmt: skip
    assert found["rounds.1.write"]["start"] == "base"
    assert found["rounds.2.write"]["start"] == "rounds.1.learn"
    assert found["rounds.2.learn"]["start"] == "rounds.1.learn@3"
    assert found["rounds.2.learn"]["data"]["syn"]["stage"] == "rounds.2.write"
    assert [method["of"] for method in found["rounds.2.learn"]["methods"]] == ["base", "previous"]
    assert found["end"]["start"] == "rounds.2.learn"
    assert found["second"]["start"] == ["rounds.1.learn", "rounds.2.learn"]


def test_previous_may_stand_for_several_and_in_a_list() -> None:
    block = {
        "repeat": 2,
        "start": ["a", "b"],
        "stages": {
            "m": {"start": ["previous", "a"], "apply": "merge/linear"},
            "t": {"start": "m", "until": "1step"},
        },
    }
    found = unrolled(a=BASE, b=BASE, r=block)
    assert found["r.1.m"]["start"] == ["a", "b", "a"]
    assert found["r.2.m"]["start"] == ["r.1.t", "a"]


def test_blocks_nest() -> None:
    inner = {"repeat": 2, "start": "previous", "stages": {"x": {"start": "previous", "until": "1step"}}}
    found = unrolled(
        base=BASE, r={"repeat": 2, "start": "base", "stages": {"in": inner, "y": {"start": "in", "until": 1}}}
    )
    assert {name: stage["start"] for name, stage in found.items() if name != "base"} == {
        "r.1.in.1.x": "base",
        "r.1.in.2.x": "r.1.in.1.x",
        "r.1.y": "r.1.in.2.x",
        "r.2.in.1.x": "r.1.y",
        "r.2.in.2.x": "r.2.in.1.x",
        "r.2.y": "r.2.in.2.x",
    }


def test_a_repeated_stage_may_be_swept_and_each_arm_is_its_own_chain() -> None:
    found = unrolled(a={**BASE, "repeat": 2, "sweep": {"seed": [1, 2]}})
    assert {name: stage["start"] for name, stage in found.items()} == {
        "a.1--seed=1": "gpt2",
        "a.1--seed=2": "gpt2",
        "a.2--seed=1": "a.1--seed=1",
        "a.2--seed=2": "a.1--seed=2",
    }


def test_arms_start_from_a_block_as_other_stages_do() -> None:
    block = {
        "repeat": 2,
        "start": "base",
        "stages": {"a": BASE | {"start": "previous"}, "b": {"start": "a", "apply": "m/x"}},
    }
    named = BASE | {"sweep": {"old": {"start": "base"}, "new": {"start": "rounds"}, "first": {"start": "rounds.1"}}}
    listed = BASE | {"sweep": {"start": ["base", "rounds"]}}
    found = unrolled(base=BASE, rounds=block, named=named, listed=listed)
    starts = {name: stage["start"] for name, stage in found.items()}
    assert starts["named--old"] == "base" and starts["named--new"] == "rounds.2.b"
    assert starts["named--first"] == "rounds.1.b"
    assert [start for name, start in starts.items() if name.startswith("listed")] == ["base", "rounds.2.b"]


def test_arms_within_a_block_know_its_rounds() -> None:
    arms = BASE | {"sweep": {"old": {"start": "previous"}, "own": {"start": "a"}}}
    block = {
        "repeat": 2,
        "start": "base",
        "stages": {"a": BASE | {"start": "previous"}, "b": arms, "c": BASE | {"start": "a"}},
    }
    starts = {name: stage["start"] for name, stage in unrolled(base=BASE, rounds=block).items()}
    assert (starts["rounds.1.b--old"], starts["rounds.1.b--own"]) == ("base", "rounds.1.a")
    assert (starts["rounds.2.b--old"], starts["rounds.2.b--own"]) == ("rounds.1.c", "rounds.2.a")


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ({**BASE, "repeat": 0}, "stages.r.repeat: how many rounds, 1 or more, not 0"),
        ({**BASE, "repeat": True}, "stages.r.repeat: how many rounds"),
        ({"repeat": 2, "stages": {}}, "stages.r.stages: a repeated block has one stage or more"),
        ({"repeat": 2, "stages": {"x": BASE}, "strt": "a"}, "no key 'strt'; did you mean 'start'?"),
        ({"repeat": 2, "stages": {"x": BASE}, "until": 3}, "no key 'until'; write it in its stages"),
        ({"stages": {"x": BASE}}, "stages.r: a block of stages says how often: repeat: 2"),
        ({"repeat": 2, "stages": {"x": {**BASE, "start": "previous"}}}, "nothing is `previous` in the first round"),
    ],
)
def test_a_repeat_that_does_not_fit_is_one_line(stage: Any, line: str) -> None:
    assert line in said(r=stage)


def test_what_was_unrolled_is_a_recipe_like_any_other() -> None:
    recipe = load({"stages": {"a": {**BASE, "repeat": 2, "sweep": {"low": {"length": 8}, "high": {}}}}})
    assert load(dump(recipe)) == recipe
    assert load(recipe, sets=["stages.a.2--low.until=3step"]).stages["a.2--low"].until is not None


def test_randomness_knows_a_stage_without_its_arm() -> None:
    names = {"code--replay=0.05": "code", "code--low": "code", "code": "code", "a.2--low,x=1": "a.2", "r.1.a": "r.1.a"}
    assert {name: root_name(name) for name in names} == names


# -- references and order ---------------------------------------------------------------------------------------------


def test_references_are_found_wherever_they_stand() -> None:
    stage = Stage.model_validate(
        {
            "start": ["a@0", {"best": ["b", "c"], "by": "x"}, {"stage": "d"}, "./folder", "org/name"],
            "data": {"s": {"stage": "e"}, "t": "f.jsonl"},
            "keep": {"k": {"stage": "g"}, "mine": "m.jsonl"},
            "methods": [{"use": "x/y", "of": "h"}, {"use": "x/y", "of": "mine"}, {"use": "x/y", "of": "previous"}],
            "optim": {"use": "x/y", "lr": {"of": "law", "value": "lr"}},
            "evals": {"run": [{"use": "x/y", "of": ["i", "a"]}]},
            "apply": {"use": "x/y", "weights": [{"of": "w", "value": "a"}, 1]},
        }
    )
    assert sorted(references(stage)) == ["a", "b", "c", "d", "e", "g", "h", "i", "law", "w"]
    assert references(stage, among={"law", "a", "z"}) == ["a", "law"]


def test_order_puts_what_is_needed_first_and_keeps_what_is_written() -> None:
    stages = {
        "merged": {"start": ["x", "y"], "apply": "merge/linear"},
        "y": {"start": "x", "until": 1, "data": {"s": {"stage": "d"}}},
        "d": {"make": "synth/x", "start": "x"},
        "x": BASE,
        "alone": BASE,
    }
    assert order(load({"stages": stages})) == ["x", "d", "y", "merged", "alone"]


def test_order_refuses_a_ring_of_three() -> None:
    ring = {a: {"start": b, "until": 1} for a, b in (("a", "b"), ("b", "c"), ("c", "a"))}
    with pytest.raises(UserError, match="stage a starts from b which starts from c which starts from a"):
        order(Recipe.model_validate({"stages": ring}))


# -- values -----------------------------------------------------------------------------------------------------------


def test_values_are_put_in_rounded_to_six_digits() -> None:
    stage = Stage.model_validate(
        {"start": "a", "until": 1, "optim": {"use": "o/p", "lr": {"of": "law", "value": "lr"}}, "methods": [
            {"use": "m/n", "w": [{"of": "law", "value": "w"}, {"of": "a"}], "of": "a"}]}
    )  # fmt: skip
    assert late_names(stage) == [("law", "lr"), ("law", "w")]
    bound = late_bound(stage, {"law": {"lr": 0.00123456789, "w": 2.0}})
    assert bound.optim == {"use": "o/p", "lr": 0.00123457}
    assert bound.methods == [{"use": "m/n", "w": [2.0, {"of": "a"}], "of": "a"}]
    assert late_names(bound) == []
    assert late_names(stage), "the stage itself is left as it was"


def test_a_value_that_was_not_written_is_named() -> None:
    stage = Stage.model_validate(
        {"start": "a", "until": 1, "optim": {"use": "o/p", "lr": {"of": "law", "value": "rate"}}}
    )
    with pytest.raises(UserError, match="stage 'law' wrote no value 'rate'; it wrote lr, n"):
        late_bound(stage, {"law": {"lr": 1.0, "n": 2.0}})


LAW = {"start": "a", "measure": ["probe/bits_per_byte"]}


def everywhere() -> dict[str, Any]:
    """A recipe in which every kind of number and span waits for a value."""

    def wait(value: str, **unit: str) -> dict[str, str]:
        return {"of": "law", "value": value, **unit}

    late = {
        "start": {"model_type": "llama", "hidden_size": wait("width")},
        "data": {"p": {"path": "p.jsonl", "weight": wait("share")}},
        "length": wait("length"), "batch": wait("rows"), "until": wait("tokens", unit="tok"),
        "optim": {"use": "optim/adamw", "lr": wait("lr")}, "schedule": {"use": "schedule/cosine", "warm": wait("warm", unit="%")},
        "mix": {"use": "mix/fixed", "shares": {"p": wait("share")}}, "engine": {"clip": wait("lr"), "micro": wait("rows")},
        "groups": [{"match": "*", "rate": wait("share")}], "evals": {"every": wait("rows", unit="step"), "final": wait("rows")},
        "save": {"every": wait("rows")}, "actions": [{"tick": 2, "do": "scale", "path": "optim.lr", "by": wait("share")}],
    }  # fmt: skip
    merged = {"start": ["a", "late"], "apply": {"use": "merge/linear", "weights": [0.5, wait("share")]}}
    return {"stages": {"a": BASE, "law": LAW, "late": late, "merged": merged}}


VALUES = {
    "length": 47.6,
    "rows": 16.0,
    "tokens": 123456789.0,
    "lr": 0.00123456789,
    "warm": 2.5,
    "share": 1 / 3,
    "width": 64.0,
}


def test_a_value_may_stand_wherever_a_number_or_a_span_does() -> None:
    recipe = load(everywhere())
    assert references(recipe.stages["late"], among=recipe.stages) == ["law"]
    assert references(recipe.stages["merged"], among=recipe.stages) == ["a", "late", "law"]
    late = late_bound(recipe.stages["late"], {"law": VALUES}, name="late")
    assert (late.length, str(late.batch), str(late.until)) == (48, "16sample", "123457ktok")
    assert (
        late.data["p"].weight == 0.333333
        and late.start["hidden_size"] == 64
        and isinstance(late.start["hidden_size"], int)
    )
    assert (late.engine.clip, late.engine.micro, late.groups[0].rate) == (0.00123457, 16, 0.333333)
    assert (late.evals.every, late.evals.final, str(late.save.every)) == ("16step", 16, "16step")
    assert late.optim == {"use": "optim/adamw", "lr": 0.00123457} and late.actions[0]["by"] == 0.333333
    assert late.schedule == {"use": "schedule/cosine", "warm": "2.5%"}
    assert late.mix == {"use": "mix/fixed", "shares": {"p": 0.333333}}
    merged = late_bound(recipe.stages["merged"], {"law": VALUES})
    assert merged.apply == {"use": "merge/linear", "weights": [0.5, 0.333333]}
    assert not late_names(late) and not late_names(merged)


def test_a_recipe_with_values_is_written_and_read_back_equal() -> None:
    recipe = load(everywhere())
    assert load(dump(recipe)) == recipe
    assert recipe.model_dump(mode="json")["stages"]["late"]["until"] == {"of": "law", "value": "tokens", "unit": "tok"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"start": {"of": "law", "value": "x"}}, "stages.b.start: a value of another stage stands for a number or a span"),
        ({"optim": {"of": "law", "value": "x"}}, "stages.b.optim: a value of another stage stands for a number"),
        ({"optim": {"use": {"of": "law", "value": "x"}}}, "stages.b.optim.use: a value of another stage"),
        ({"methods": [{"of": "law", "value": "x"}]}, "stages.b.methods.0: a value of another stage"),
        ({"data": {"of": "law", "value": "x"}}, "stages.b.data: only a source's `weight`"),
        ({"data": {"p": {"path": "p.jsonl", "val": {"of": "law", "value": "x"}}}}, "stages.b.data.p.val: only a source's `weight`"),
        ({"seed": {"of": "law", "value": "x"}}, "stages.b.seed: a seed is known before"),
        ({"precision": {"of": "law", "value": "x"}}, "stages.b.precision: a value of another stage stands for a number"),
        ({"engine": {"compile": {"of": "law", "value": "x"}}}, "stages.b.engine.compile: a value of another stage"),
        ({"repeat": {"of": "law", "value": "x"}}, "stages.b.repeat: a value of another stage stands for a number"),
        ({"sweep": {"length": {"of": "law", "value": "x"}}}, "stages.b.sweep.length: a value of another stage"),
        ({"length": {"of": "law", "value": "x", "unit": "tok"}}, "stages.b.length: a unit goes with a span"),
        ({"until": {"of": "law", "value": "x", "unit": "miles"}}, "stages.b.until: 'miles' is no unit; one of step, tok"),
        ({"until": {"of": "a", "value": "x"}}, "stages.b.until.of: stage 'a' makes a model; only one with `measure`"),
        ({"until": {"of": "lav", "value": "x"}}, "stages.b.until.of: no stage 'lav'; did you mean 'law'?"),
    ],
)  # fmt: skip
def test_a_value_that_would_change_the_graph_is_refused_in_a_line(change: dict[str, Any], line: str) -> None:
    found = said(a=BASE, law=LAW, b={**BASE, "start": "a", **change})
    assert found.startswith(line) and "\n" not in found


def test_a_misplaced_value_is_named_with_its_line(tmp_path: Any) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "stages:\n  a: {start: gpt2, until: 9step}\n  law: {start: a, measure: [probe/bits_per_byte]}\n"
        "  b:\n    start: a\n    optim: {of: law, value: x}\n    until: 9step\n"
    )
    with pytest.raises(UserError, match=r"r.yaml:6: stages.b.optim: a value of another stage"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("length", 3.0, "stages.late.length: length of law is 3; here it should be greater than or equal to 8"),
        ("lr", -1.0, r"stages.late.engine.clip: lr of law is -1(.0)?; here it should be greater than 0"),
        ("tokens", -5.0, r"stages.late.until: tokens of law \(tok\) is -5tok; here it should be .*not a span"),
        ("share", "nan", "stages.late.data.p.weight: share of law is nan, which is no number to go on with"),
        ("rows", float("inf"), "stages.late.batch: rows of law is inf, which is no number"),
    ],
)
def test_a_value_that_does_not_fit_is_named(key: str, value: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        late_bound(load(everywhere()).stages["late"], {"law": {**VALUES, key: value}}, name="late")

"""`on:` rules as a recipe has them: written, refused, unrolled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tutelage.base.errors import UserError
from tutelage.base.load import dump, load
from tutelage.base.rules import entered_by

BASE = {"start": "gpt2", "data": {"p": "p.jsonl"}, "until": "9step"}
ON = [
    {"signal": "forgetting/p", "above": 0.3, "for": 2, "enter": "rescue"},
    {"signal": "loss", "below": 2.0, "enter": "polish"},
    {"otherwise": True, "enter": "more"},
]


def stages(**changes: Any) -> dict[str, Any]:
    code = {**BASE, "start": "base", "on": ON}
    on = {**BASE, "start": "code"}
    return {"base": BASE, "code": code, "rescue": on, "polish": on, "more": {**on, "start": "rescue"}, **changes}


def test_rules_are_read_and_written_back_equal() -> None:
    recipe = load({"stages": stages()})
    rules = recipe.stages["code"].on
    assert [str(rule) for rule in rules] == ["forgetting/p above 0.3, 2 times in a row", "loss below 2", "otherwise"]
    assert [rule.times for rule in rules] == [2, 1, 1]
    assert load(dump(recipe)) == recipe
    assert recipe.model_dump(mode="json")["stages"]["code"]["on"][0]["for"] == 2
    assert load({"stages": stages()}, sets=["stages.code.on.0.for=5"]).stages["code"].on[0].times == 5
    assert entered_by(recipe.stages) == {"rescue": ["code"], "polish": ["code"], "more": ["code"]}


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ({"signal": "loss", "enter": "rescue"}, "stages.code.on.0: a rule is {signal: name, above: number"),
        ({"above": 1.0, "enter": "rescue"}, "stages.code.on.0: a rule is {signal: name"),
        ({"signal": "loss", "above": 1.0}, "stages.code.on.0 lacks 'enter'"),
        ({"signal": "loss", "above": 1.0, "entre": "x"}, "stages.code.on.0 has no key 'entre'; did you mean 'enter'?"),
        ({"otherwise": True, "above": 1.0, "enter": "rescue"}, "stages.code.on.0: `otherwise` asks for nothing"),
        ({"signal": "loss", "above": 1.0, "for": 0, "enter": "rescue"}, "stages.code.on.0.for: a number of at least 1"),
        ({"signal": "loss", "above": 1.0, "enter": "resque"}, "stages.code.on.0.enter: no stage 'resque'; did you mean 'rescue'?"),
        ({"signal": "loss", "above": 1.0, "enter": "r*"}, "stages.code.on.0.enter: a rule enters one stage; 'r*' matches rescue"),
        ({"signal": "loss", "above": 1.0, "enter": "base"}, "stages.code.on.0.enter: stage 'base' does not go on"),
        ({"signal": "loss", "above": 1.0, "enter": "code"}, "stages.code.on.0.enter: stage 'code' does not go on from 'code'"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_taken_is_refused_with_its_line(rule: dict[str, Any], line: str, tmp_path: Path) -> None:
    tree = stages()
    tree["code"] = {**tree["code"], "on": [rule, *ON[1:]]}
    with pytest.raises(UserError) as caught:
        load({"stages": tree})
    assert str(caught.value).startswith(line)
    import yaml

    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"stages": tree}, sort_keys=False))
    with pytest.raises(UserError, match=r"r\.yaml:\d+: "):
        load(path)


def test_only_a_stage_that_trains_has_ways_out_and_one_otherwise() -> None:
    merged = {"start": ["base", "code"], "apply": "merge/linear", "on": ON}
    with pytest.raises(UserError, match="stages.merged.on: only a stage that trains"):
        load({"stages": stages(merged=merged)})
    tree = stages()
    tree["code"] = {**tree["code"], "on": [*ON, ON[-1]]}
    with pytest.raises(UserError, match=r"stages.code.on.3: a second `otherwise`"):
        load({"stages": tree})


def test_arms_and_rounds_enter_their_own() -> None:
    tree = stages()
    del tree["polish"], tree["more"]
    tree["code"] = {**tree["code"], "on": ON[:1], "sweep": {"length": [64, 128]}}
    tree["rescue"] = {**tree["rescue"], "sweep": {"length": [64, 128]}}
    found = load({"stages": tree})
    assert {n: s.on[0].enter for n, s in found.stages.items() if s.on} == {
        "code--length=64": "rescue--length=64", "code--length=128": "rescue--length=128",
    }  # fmt: skip
    block = {
        "left": {**BASE, "start": "previous", "on": [{**ON[0], "enter": "right"}]},
        "right": {**BASE, "start": "left"},
    }
    found = load({"stages": {"base": BASE, "twice": {"repeat": 2, "start": "base", "stages": block}}})
    assert found.stages["twice.2.left"].on[0].enter == "twice.2.right"


def test_a_bound_may_be_a_value_of_another_stage() -> None:
    law = {"start": "base", "measure": ["probe/bits_per_byte"]}
    tree = stages(law=law)
    tree["code"] = {**tree["code"], "on": [{**ON[0], "above": {"of": "law", "value": "x"}}, *ON[1:]]}
    assert str(load({"stages": tree}).stages["code"].on[0]) == "forgetting/p above x of law, 2 times in a row"

"""The rules behind the endpoint of bench/agents.py ask for what they say, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import agents
from tutelage.base import load
from tutelage.base.action import parse


def told(bits: dict[str, float], mix: dict[str, float] | None = None) -> dict[str, Any]:
    """A description, as far as the rule reads it. The first measurement is not the newest."""
    first = {"step": 0, **{f"bits_per_byte/{name}": 9.0 for name in bits}}
    newest = {"step": 40, **{f"bits_per_byte/{name}": value for name, value in bits.items()}}
    return {"sources": ["prose", "code", "delivery"], "mix": mix, "measured": [first, newest]}


def test_a_source_that_reads_like_no_text_gets_no_share_and_the_others_equal_ones():
    reply = agents.sort_out(told({"prose": 3.1, "code": 2.8, "delivery": 7.3}))
    assert reply["do"] == [{"do": "mix", "weights": {"prose": 1, "code": 1, "delivery": 0}}]
    assert "delivery" in reply["why"] and "prose" not in reply["why"]
    assert parse(reply["do"][0], place="reply").do == "mix"


@pytest.mark.parametrize(
    ("bits", "mix"),
    [
        ({"prose": 3.1, "code": 2.8, "delivery": 4.9}, None),
        ({"prose": 3.1, "code": 2.8}, None),
        ({"prose": 3.1, "code": 2.8, "delivery": 7.3}, {"prose": 0.5, "code": 0.5, "delivery": 0.0}),
        ({"prose": 9.0, "code": 9.0, "delivery": 9.0}, None),
    ],
    ids=["all read like text", "not measured yet", "set aside already", "nothing would be left"],
)
def test_otherwise_the_mixture_is_left_alone(bits: dict[str, float], mix: dict[str, float] | None):
    assert agents.sort_out(told(bits, mix))["do"] == []
    assert agents.sort_out({"sources": ["prose"], "mix": None, "measured": []})["do"] == []


@pytest.mark.parametrize("name", agents.REGIMES)
def test_every_arm_is_a_recipe_and_the_agent_has_nothing_that_the_run_left_alone_lacks(name: str):
    regime = agents.REGIMES[name]
    made = {
        arm: load.load(Path(regime.recipe), sets=[f"stages.{regime.stage}.{text}" for text in sets])
        for arm, sets in regime.arms.items()
    }
    assert made[agents.AGENT] == made[agents.ALONE] and set(made[agents.AGENT].stages) == {regime.stage}
    assert all(made[arm] != made[agents.ALONE] for arm in made if arm not in (agents.AGENT, agents.ALONE))
    ends = {str(recipe.stages[regime.stage].until) for recipe in made.values()}
    assert len(ends) == 1, "equal steps"

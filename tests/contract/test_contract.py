"""What every method promises, tried on toys. Generated over the registry: a method's author writes none of this."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.contract.harness import Case, Outcome, Shelf, kind_of, off, on, toys_of, without
from tutelage.base import card, load, registry
from tutelage.base.errors import UserError
from tutelage.core.graph import methods_of

NAMES = registry.names()
WITH_OFF = [name for name in NAMES if registry.find(name).off is not None]
WITHOUT_OFF = [name for name in NAMES if registry.find(name).off is None]
ON_TOYS = [(name, toy) for name in NAMES for toy in toys_of(registry.find(name))]
STEP_SHARE = 0.1  # of all methods that may replace the whole step; more, and the contract is wrong

each = pytest.mark.parametrize("name", NAMES)


# -- 1: the file and its settings -------------------------------------------------------------------------------------


@each
def test_a_method_has_a_whole_card(name: str) -> None:
    assert card.lint(registry.path_of(name)) == []


@each
def test_every_setting_says_what_it_means(name: str) -> None:
    fields = registry.find(name).model_fields
    assert [key for key, field in fields.items() if not field.description] == []


@each
@pytest.mark.parametrize("settings", ["default", "on"])
def test_an_entry_survives_yaml(name: str, settings: str, tmp_path: Path) -> None:
    entry = {"use": name, **(registry.find(name).on if settings == "on" else {})}
    made = registry.make(entry)
    again = registry.make(yaml.safe_load(yaml.safe_dump({"use": name, **made.model_dump(mode="json")})))
    assert again == made
    case = Case(name, "llama", {"use": name, **made.model_dump(mode="json")})
    recipe = load.load(case.recipe(tmp_path))
    assert load.load(load.dump(recipe)) == recipe


@each
def test_an_unknown_key_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stages.two.*strenght"):
        methods_like(name, {"use": name, **registry.find(name).on, "strenght": 1}, tmp_path)


def methods_like(name: str, entry: dict[str, Any], folder: Path) -> Any:
    """What reading the entry gives where the recipe has it."""
    kind = kind_of(registry.find(name))
    if kind in ("apply", "make", "evals"):
        return registry.make(entry, place=f"stages.two.{kind}")
    recipe = load.load(Case(name, "llama", entry).recipe(folder))
    return methods_of("two", recipe.stages["two"])


# -- 2: off means off -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_OFF)
def test_off_is_the_stage_without_it_to_the_bit(name: str, shelf: Shelf) -> None:
    assert shelf.outcome(off(name)).digest() == shelf.outcome(without(name)).digest()


@pytest.mark.parametrize("name", WITH_OFF)
def test_the_neutral_settings_are_neutral(name: str, shelf: Shelf) -> None:
    """Also when the method runs with them, which the engine would spare it: `off` names no arbitrary settings."""
    kept, plain = shelf.outcome(off(name, forced=True)).weights(), shelf.outcome(without(name)).weights()
    for key, tensor in plain.items():
        torch.testing.assert_close(kept[key], tensor, rtol=1e-4, atol=1e-4)


def test_methods_without_off_say_why(record_property: Any) -> None:
    record_property("methods without off", len(WITHOUT_OFF))
    print(f"{len(WITHOUT_OFF)} of {len(NAMES)} methods have no neutral setting")
    for name in WITHOUT_OFF:
        cls = registry.find(name)
        assert cls.no_off, f"{name} has neither `off` nor a reason in `no_off`"
        assert cls.baseline is not None, f"{name} has no `off`, so it names the run without it in `baseline`"
    for name in WITH_OFF:
        cls = registry.find(name)
        assert cls.off, f"{name}: `off` is empty"
        assert set(cls.off) <= set(cls.model_fields), f"{name}: `off` names settings that there are not"
        assert registry.make({"use": name, **cls.off}).is_off()
        assert not registry.make({"use": name, **cls.on}).is_off(), f"{name}: `on` is off"


# -- 3 and 4: cut, resumed, saved -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "toy"), ON_TOYS)
def test_a_cut_run_retraces(name: str, toy: str, shelf: Shelf) -> None:
    """Cut in the second stage, which alone has the method, and gone on with in fresh objects."""
    whole, cut = shelf.outcome(on(name, model=toy)), shelf.outcome(on(name, model=toy, cut=True))
    assert cut.seen["cut"]
    assert cut.digest() == whole.digest()
    assert cut.numbers() == whole.numbers()


@each
def test_state_comes_back_as_it_was_saved(name: str, shelf: Shelf) -> None:
    """It holds tensors and scalars, and nothing whose name or type a checkpoint would change."""
    seen = shelf.outcome(on(name)).seen
    assert seen["odd"] == []
    assert seen["states"] > 0 or kind_of(registry.find(name)) in ("apply", "make", "evals")


# -- 5: it does what it says ------------------------------------------------------------------------------------------


@each
def test_its_mechanism_shows_and_only_when_it_is_on(name: str, shelf: Shelf) -> None:
    module = registry.module_of(name)
    runs = [shelf.outcome(on(name)), shelf.outcome(without(name))]
    acting, resting = (module.effect(run) for run in runs)
    assert module.holds(acting, resting), (acting, resting)
    assert not module.holds(resting, resting), resting


@each
def test_every_hook_is_called(name: str, shelf: Shelf) -> None:
    calls = {hook: 0 for hook in registry.find(name).hooks()}
    for toy in toys_of(registry.find(name)):
        for hook, count in shelf.outcome(on(name, model=toy)).seen["hooks"].items():
            calls[hook] += count
    assert [hook for hook, count in calls.items() if not count] == []


def test_few_methods_replace_the_whole_step() -> None:
    users = [name for name in NAMES if "step" in registry.find(name).hooks()]
    print(f"{len(users)} of {len(NAMES)} methods replace the whole step: {', '.join(users) or 'none'}")
    assert len(users) <= STEP_SHARE * len(NAMES)


# -- 6 and 7: less precision, more processes --------------------------------------------------------------------------


@each
def test_it_runs_in_bf16(name: str, shelf: Shelf) -> None:
    ran = shelf.outcome(on(name, stage={"precision": "bf16"}))
    values = [row["loss"] for row in ran.numbers() if row["kind"] == "train"]
    values += [v for row in ran.numbers() if row["kind"] == "eval" for v in row["values"].values()]
    assert values and all(map(math.isfinite, values))
    assert all(bool(t.isfinite().all()) for t in ran.weights().values() if t.is_floating_point())


@each
def test_two_processes_make_what_one_makes(name: str, shelf: Shelf) -> None:
    one, two = shelf.outcome(on(name)), shelf.outcome(on(name, ranks=2))
    tolerance = registry.find(name).tolerance
    assert farthest(one, two) <= tolerance


def farthest(a: Outcome, b: Outcome) -> float:
    """The largest difference of any weight."""
    left, right = a.weights(), b.weights()
    assert left.keys() == right.keys()
    return max(float((left[key].double() - right[key].double()).abs().max()) for key in left)

"""The suite can fail: methods that break a promise are seen by the check of that promise, and by no accident."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.contract import test_contract as checks
from tests.contract.harness import Shelf, off, on, without
from tutelage.core.artifact import flatten, unflatten


def wrong(name: str) -> str:
    return f"tests.contract.wrong:{name}"


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("Forgetful", checks.test_two_processes_make_what_one_makes),
        ("Pretender", checks.test_state_comes_back_as_it_was_saved),
        ("Selfish", checks.test_it_runs_in_bf16),
    ],
)
def test_what_is_right_passes(name: str, check: Callable[..., None], shelf: Shelf) -> None:
    check(wrong(name), shelf)


@pytest.mark.parametrize("name", ["Forgetful", "Moody"])
def test_state_that_is_not_saved_is_seen(name: str, shelf: Shelf) -> None:
    with pytest.raises(AssertionError):
        checks.test_a_cut_run_retraces(wrong(name), "llama", shelf)


def test_state_that_no_checkpoint_holds_is_seen(shelf: Shelf) -> None:
    with pytest.raises(TypeError, match="of/a"):
        checks.test_state_comes_back_as_it_was_saved(wrong("Clumsy"), shelf)
    with pytest.raises(TypeError, match="seen"):
        flatten({"seen": [1]})
    state: dict[str, Any] = {"whole": {}, "of": {"a": 1, "b": {}}}
    held, plain = flatten(state)
    assert not held and unflatten(plain) == state


def test_a_sum_of_one_process_alone_is_seen(shelf: Shelf) -> None:
    with pytest.raises(AssertionError):
        checks.test_two_processes_make_what_one_makes(wrong("Selfish"), shelf)


def test_settings_that_are_not_neutral_are_seen(shelf: Shelf) -> None:
    checks.test_off_is_the_stage_without_it_to_the_bit(wrong("Pretender"), shelf)  # for the engine drops it
    with pytest.raises(AssertionError):
        checks.test_the_neutral_settings_are_neutral(wrong("Pretender"), shelf)


def test_a_claim_that_does_not_show_and_a_hook_that_is_never_called_are_seen(shelf: Shelf) -> None:
    for check in (checks.test_its_mechanism_shows_and_only_when_it_is_on, checks.test_every_hook_is_called):
        with pytest.raises(AssertionError):
            check(wrong("Pretender"), shelf)


def test_a_hook_that_raises_ends_the_pair_and_the_next_job_finds_another(shelf: Shelf) -> None:
    with pytest.raises(AssertionError, match="TypeError"):
        shelf.outcome(on(wrong("Clumsy"), ranks=2))
    checks.test_two_processes_make_what_one_makes(wrong("Forgetful"), shelf)


def test_runs_are_told_apart_by_what_they_are_made_of() -> None:
    made: list[Any] = [on("continual/ewc"), on("continual/ewc", cut=True), on("continual/ewc", ranks=2)]
    made += [off("continual/ewc"), off("continual/ewc", forced=True), without("continual/ewc"), on("continual/lwf")]
    assert len({case.key for case in made}) == len(made)

"""Bold driver: the factors of Vogl et al. and Battiti, on means of losses, and the two ways it is held."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tutelage.base.registry import make


def factors(policy: Any, losses: list[float], *, lr: float = 1.0, scaled: bool = True) -> list[float | None]:
    """The factor asked for after each loss, the rate following what is asked."""
    found: list[float | None] = []
    for loss in losses:
        acts = policy.act(SimpleNamespace(signals={"loss": loss, "lr": lr, "finite": 1.0}))
        found.append(acts[0]["by"] if acts else None)
        lr *= acts[0]["by"] if acts and scaled else 1.0
    return found


def driver(**settings: Any) -> Any:
    return make({"use": "steer/bold_driver", "every": 1, **settings})


def test_the_rate_rises_a_little_after_a_fall_and_is_halved_after_a_rise() -> None:
    assert factors(driver(), [4.0, 3.0, 3.5, 3.4, 5.0]) == [None, 1.05, 0.5, 1.05, 0.5]
    assert factors(driver(down=0.7, up=1.1), [4.0, 3.0, 3.5]) == [None, 1.1, 0.7]


def test_a_loss_is_the_mean_of_so_many_steps() -> None:
    assert factors(driver(every=2), [4.0, 2.0, 5.0, 0.0, 3.0, 4.0]) == [None, None, None, 1.05, None, 0.5]


def test_a_rise_within_the_noise_is_none() -> None:
    assert factors(driver(rise=0.1), [4.0, 4.3, 4.8]) == [None, 1.05, 0.5]
    assert factors(driver(rise=0.1), [-4.0, -3.7, -3.2]) == [None, 1.05, 0.5]


def test_the_rate_stays_below_a_multiple_of_the_first() -> None:
    asked = factors(driver(up=2.0, most=4.0), [8.0, 7.0, 6.0, 5.0, 4.0, 9.0, 3.0])
    assert asked == [None, 2.0, 2.0, None, None, 0.5, 2.0]


def test_it_says_why() -> None:
    policy = driver()
    factors(policy, [4.0, 5.0])
    assert policy.why == "loss rose from 4 to 5 in 1 steps"


def test_a_rate_of_zero_is_left_alone() -> None:
    assert factors(driver(), [4.0, 3.0, 5.0], lr=0.0) == [None, None, None]

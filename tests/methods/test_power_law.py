"""Power-law rehearsal: the authors' counts, time since practice from the ledger, and a chain of stages that uses both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from tests.toy import graph, numbers
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core.run import run_graph
from tutelage.methods.mix.power_law import PowerLaw, law, times

# Samples of the task of each phase and of those 1 to 9 phases before it, in the authors' environment.
AUTHORS = [57927, 33969, 20867, 13329, 8802, 5981, 4167, 2968, 2155, 1592]


def test_the_law_gives_the_authors_counts() -> None:
    ages = {f"task{k}": float(k) for k in range(10)}
    found = law(ages, {}, decay=PowerLaw().decay, delay=PowerLaw().delay, rate=None)
    assert list(found.values()) == pytest.approx([count / sum(AUTHORS) for count in AUTHORS], rel=1e-3)
    assert found["task0"] == pytest.approx(0.38, abs=0.005)  # what the card says that is left to what is new


def test_with_a_rate_the_old_share_it_by_the_law_and_the_new_the_rest_by_weight() -> None:
    found = law({"x": 0.0, "y": 0.0, "p": 1.0, "q": 3.0}, {"x": 1.5, "y": 0.5}, decay=2.0, delay=1.0, rate=0.2)
    assert found == pytest.approx({"x": 0.6, "y": 0.2, "p": 0.16, "q": 0.04})
    even = law({"x": 0.0, "p": 1.0, "q": 3.0}, {}, decay=0.0, delay=1.0, rate=0.2)
    assert even == pytest.approx({"x": 0.8, "p": 0.1, "q": 0.1})


def test_a_rate_means_nothing_where_all_is_new_or_all_is_old() -> None:
    assert law({"x": 0.0, "y": 0.0}, {}, decay=2.0, delay=1.0, rate=0.2) == {"x": 0.5, "y": 0.5}
    assert law({"p": 1.0, "q": 3.0}, {}, decay=2.0, delay=1.0, rate=0.2) == pytest.approx({"p": 0.8, "q": 0.2})


def test_time_is_counted_in_stages_of_mean_length() -> None:
    assert times({"one": 100.0, "two": 100.0, "three": 100.0}) == {"one": 3.0, "two": 2.0, "three": 1.0}
    assert times({"long": 300.0, "short": 100.0}) == {"long": 1.5, "short": 1.0}
    assert times({"adopted": 0.0, "two": 100.0}) == {"adopted": 2.0, "two": 1.0}
    assert times({"adopted": 0.0}) == {"adopted": 1.0} and times({}) == {}


def test_new_sources_of_no_weight_at_all_are_refused_in_one_line() -> None:
    source = SimpleNamespace(facts={"weight": 0.0}, fingerprint="b")
    view: Any = SimpleNamespace(sources=["b"], source=lambda name: SimpleNamespace(sources={name: source}), trained={})
    with pytest.raises(UserError, match="data: no source has a weight above 0"):
        PowerLaw().source(view)


@pytest.mark.parametrize("wrong", [{"rate": "100%"}, {"rate": -0.1}, {"decay": -1}, {"delay": 0}])
def test_settings_that_are_no_law_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"mix/power_law.{next(iter(wrong))}"):
        registry.make({"use": "mix/power_law", **wrong})


def test_several_earlier_stages_come_back_by_when_each_was_last_practiced(tmp_path: Path) -> None:
    """`a` is learned twice: what counts is the later time. The stage's own `b` is old, `new` is not."""

    def change(recipe: dict[str, Any]) -> None:
        one, two = recipe["stages"]["one"], recipe["stages"]["two"]
        for stage in (one, two):
            stage |= {"until": "2step", "evals": {"every": "none", "run": []}}
        path = tmp_path / "data" / "new.jsonl"
        path.write_bytes(b"".join(orjson.dumps({"text": f"{n} is new, {n + 1} is not"}) + b"\n" for n in range(50)))
        old, new = {"path": one["data"]["a"]["path"], "val": "50%"}, {"path": str(path)}
        recipe["stages"] |= {
            "third": {**two, "start": "two", "data": one["data"] | {"old": old}, "until": "4step"},
            "last": {
                **two,
                "start": "third",
                "data": {"new": new, **two["data"]},
                "mix": {"use": "mix/power_law", "decay": 2, "delay": 1, "rate": "40%"},
            },
        }

    made = graph(tmp_path, change=change)
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed, result.failed
    rows = numbers(made.nodes["last"].folder, kind="train")  # type: ignore[arg-type]
    tokens = [numbers(made.nodes[n].folder, kind="train")[-1]["tokens"] for n in ("one", "two", "third")]  # type: ignore[arg-type]
    since = 1 + tokens[2] / (sum(tokens) / 3)  # of `two`, which the third stage came after
    powers = {"third/a": 2.0**-2, "third/old": 2.0**-2, "b": (1 + since) ** -2}
    whole = sum(powers.values())
    assert rows[0]["weights"] == pytest.approx({"new": 0.6} | {name: 0.4 * p / whole for name, p in powers.items()})

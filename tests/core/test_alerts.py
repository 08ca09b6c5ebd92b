"""What is said to deserve a look, and what is not."""

from __future__ import annotations

import math
import random
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tutelage.core.alerts import LEAST, RECENT, Watch, alerts


def stage(folder: Path, *, tick: int = 300, **more: Any) -> Any:
    """What `alerts` reads of a stage."""
    plain = {
        "clock": SimpleNamespace(tick=tick),
        "watch": Watch(),
        "view": SimpleNamespace(signals={}),
        "journal": SimpleNamespace(lines=[]),
        "standing": SimpleNamespace(waiting={}),
        "saved": None,
        "folder": folder,
    }
    return SimpleNamespace(**plain | more)


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return [one["kind"] for one in found]


def watched(losses: list[float], *, norm: float = 1.0) -> Watch:
    watch = Watch()
    for tick, loss in enumerate(losses, 1):
        watch.look(tick, {"loss": loss, "grad_norm": norm})
    return watch


def noisy(count: int, *, seed: int = 0, by: float = 0.1) -> list[float]:
    """A loss that falls from 5 to 3, with noise."""
    rng = random.Random(seed)
    return [3 + 2 * math.exp(-i / 50) + rng.gauss(0, by) for i in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_leap_and_a_leap_is_one(seed: int) -> None:
    calm = noisy(1000, seed=seed)
    assert watched(calm).found == {}
    found = watched([*calm, 5.0, *noisy(1000, seed=seed + 9)[950:]]).found
    assert kinds(list(found.values())) == ["spike"] and found["spike"]["tick"] == 1001
    assert "leapt to 5.000 at tick 1,001" in found["spike"]["text"] and found["spike"]["grave"]


def test_few_steps_are_not_enough_to_see_a_leap() -> None:
    assert watched([3.0] * (LEAST - 1) + [30.0]).found == {}
    assert kinds(list(watched([3.0] * LEAST + [30.0]).found.values())) == ["spike"]
    assert watched([3.0] * LEAST + [3.01]).found == {}, "what never varied may vary a little"


def test_what_is_no_number_is_told_for_a_while_and_enters_no_median() -> None:
    watch = watched([3.0] * LEAST + [math.nan, math.inf])
    assert list(watch.losses) == [3.0] * LEAST
    now = stage(Path(), tick=30, watch=watch)
    assert [(one["kind"], one["tick"]) for one in alerts(now)] == [("loss", LEAST + 2)]
    now.clock.tick += RECENT
    assert alerts(now) == []
    assert "norm nan" in watched([3.0], norm=math.nan).found["loss"]["text"]


def test_a_column_beyond_its_bound_is_an_alarm_and_one_within_is_none() -> None:
    signals = {"eval/alarm/prose": 1.0, "eval/alarm/code": 0.0, "eval/forgetting/prose": 0.0871, "eval/tick": 240.0}
    (one,) = alerts(stage(Path(), view=SimpleNamespace(signals=signals)))
    text = "prose is forgotten beyond its bound: +0.087 bits per byte against its best"
    assert (one["kind"], one["tick"], one["text"]) == ("forgetting", 240, text)


def test_what_others_than_persons_did_is_told_the_newest_of_each_for_a_while() -> None:
    half = [{"do": "scale", "path": "optim.lr", "by": 0.5}]
    refused = {"by": "scout", "actor": "agent", "do": [{"do": "reset", "modules": ["*"]}]}
    lines = [
        {"tick": 50, "by": "steer/plateau", "actor": "policy", "do": half, "id": "0"},
        {"tick": 150, "by": "steer/plateau", "actor": "policy", "do": half, "why": "no better", "id": "1"},
        {"tick": 160, "by": "anna", "actor": "person", "do": half, "id": "2"},
        {"tick": 170, "by": "steer/plateau", "actor": "policy", "do": half, "why": "still no better", "id": "3"},
        {"tick": 180, "by": "engine", "do": [{"do": "refused", "id": "4", "request": refused, "why": "too often"}]},
        {"tick": 190, "by": "engine", "do": [{"do": "refused", "id": "5", "request": {"actor": "agent", "by": "x", "do": 7}}]},
    ]  # fmt: skip
    now = stage(Path(), tick=300, journal=SimpleNamespace(lines=lines))
    assert [one["text"] for one in alerts(now)] == [
        "x was refused  at tick 190",
        "scout was refused reset at tick 180: too often",
        "steer/plateau did scale optim.lr at tick 170: still no better",
    ]
    assert not any(one["grave"] for one in alerts(now))
    now.clock.tick = 170 + RECENT
    assert len(alerts(now)) == 3
    now.clock.tick = 191 + RECENT
    assert alerts(now) == []


def test_what_the_machine_forced_and_what_waits_are_told_after_what_is_grave() -> None:
    lines = [
        {"tick": 0, "by": "engine", "do": [{"do": "micro", "rows": 8}]},
        {"tick": 20, "by": "engine", "do": [{"do": "thin", "steps": [0, 50], "planned": 9}]},
        {"tick": 40, "by": "engine", "do": [{"do": "micro", "rows": 4}]},
    ]
    asked = {"by": "scout", "actor": "agent", "do": [{"do": "rollback", "to": 5}]}
    now = stage(Path(), tick=60, journal=SimpleNamespace(lines=lines), standing=SimpleNamespace(waiting={"w": asked}))
    now.watch.look(60, {"loss": math.nan})
    assert kinds(alerts(now)) == ["loss", "waiting", "micro", "thinned"]
    lines[1]["do"][0]["planned"] = 2
    assert "thinned" not in kinds(alerts(now))


def test_a_disk_with_room_for_few_saves_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "state" / "000000040"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(bytes(1000))
    now = stage(tmp_path, saved=(40, 2))
    usage = namedtuple("usage", "total used free")
    for free, told in ((2000, []), (1999, ["disk"])):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(10**9, 0, free))
        assert kinds(alerts(now)) == told
    shutil.rmtree(place)
    now.saved = (41, 2)
    assert alerts(now) == [], "a save that has gone is no reason to stop a stage"

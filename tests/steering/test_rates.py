"""The rate that a client is shown is the one in the optimizer: each schedule, each group, each step; and mixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.steering.live import ONE, answer, ask, run
from tests.toy import numbers
from tutelage.base import registry
from tutelage.core import artifact, loop, steer
from tutelage.modalities.text.toy import MODELS

SCHEDULES = sorted(name for name in registry.names() if name.startswith("schedule/"))
GROUPS = [
    {"match": "*embed*", "rate": 0.5},
    {"match": "*mlp*", "rate": 0.0},
    {"match": "*norm*", "rate": 2.0, "decay": 0.3},
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_shown_before_a_step_is_what_the_optimizer_uses_in_it(
    schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`controls.json` as it lies there before each step, after a request of that tick; then the optimizer's groups."""
    shown: list[dict[str, Any]] = []
    used: list[list[float]] = []
    home, steps, record, turn = tmp_path / ONE, 10, loop.record, steer.turn

    def recorded(stage: Any, *args: Any, **kwargs: Any) -> None:
        used.append([group["lr"] for group in stage.engine.optimizer.param_groups])
        record(stage, *args, **kwargs)

    def turned(stage: Any, *args: Any) -> int:
        found = turn(stage, *args)
        if 1 <= stage.clock.tick < steps:
            now = json.loads((home / "controls.json").read_text())
            shown.append(next(target for target in now["targets"] if target["path"] == "optim.lr"))
        return found

    def change(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"] |= {"schedule": schedule, "groups": GROUPS}

    monkeypatch.setattr(loop, "record", recorded)
    monkeypatch.setattr(steer, "turn", turned)
    notes = {tick: [{"do": "note", "text": "look"}] for tick in range(1, steps)}
    notes[4].insert(0, {"do": "set", "path": "optim.lr", "to": 2e-3})
    script = {tick: [[(f"at{tick}", ask(*do))]] for tick, do in notes.items()}
    run(tmp_path, script, change=change, steps=steps)
    assert len(used) == steps and len(shown) == steps - 1
    for now, rates in zip(shown, used[1:], strict=True):
        assert [group["used"] for group in now["groups"]] == rates
        assert [group["ratio"] * now["now"] for group in now["groups"]] == pytest.approx(rates, rel=1e-9)
    rows = numbers(home, kind="train")
    assert [row["lr"] for row in rows[1:]] == pytest.approx([now["now"] for now in shown], rel=1e-9)
    effects = answer(home, "at4")["effects"][0]["changes"]
    assert sorted(change["used"] for change in effects) == pytest.approx(sorted(used[4]), rel=1e-9)
    assert rows[4]["lr"] == pytest.approx(2e-3)
    assert {round(rate / 2e-3, 9) for rate in used[4]} == {0.0, 0.5, 1.0, 2.0}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 8], indirect=True)
def test_a_mixture_changes_at_its_step_however_many_workers_prepared_the_text(threads: int, tmp_path: Path) -> None:
    """No worker draws rows ahead of a step: what is drawn is computed from seed and position when the step comes. What
    runs in as many processes as there are threads is tokenizing, and it is over before the first step."""

    def change(recipe: dict[str, Any]) -> None:
        one = recipe["stages"]["one"]
        one["data"]["b"] = recipe["stages"]["two"]["data"]["b"]
        one["methods"] = []

    script = {3: [[("mix", ask({"do": "mix", "weights": {"a": 1.0, "b": 3.0}}))]],
              6: [[("all", ask({"do": "mix", "weights": {"b": 1.0}}))]]}  # fmt: skip
    home = run(tmp_path / "asked", script, change=change)
    assert [answer(home, name)["tick"] for name in ("mix", "all")] == [3, 6]
    rows = numbers(home, kind="train")
    assert [row["weights"]["b"] for row in rows] == pytest.approx([0.5] * 3 + [0.75] * 3 + [1.0] * 2)
    drawn = json.loads((artifact.states(home / "state")[-1] / "state.json").read_text())["stream"]["sources"]
    assert {name: source["rows"] for name, source in drawn.items()} == {"a": 12 + 6, "b": 12 + 18 + 16}
    assert sum(source["tokens"] for source in drawn.values()) == rows[-1]["tokens"]


DROP = "model.dropout"
LR = "optim.lr"
TOGETHER: dict[str, list[dict[str, Any]]] = {
    "twice": [{"do": "set", "path": LR, "to": 4e-4}, {"do": "scale", "path": LR, "by": 0.5}],
    "schedule": [
        {"do": "set", "path": "schedule/wsd.cooldown", "to": "6step"},
        {"do": "set", "path": LR, "to": 4e-4},
        {"do": "scale", "path": "optim.base", "by": 2.0},
    ],
    "end": [
        {"do": "extend", "until": "20step"},
        {"do": "set", "path": LR, "to": 4e-4},
        {"do": "extend", "until": "9step"},
    ],
    "back": [{"do": "rollback", "to": 1}, {"do": "set", "path": LR, "to": 4e-4}],
    "dropout": [{"do": "set", "path": DROP, "to": 0.2}, {"do": "scale", "path": DROP, "by": 2.0}],
    "mix": [{"do": "mix", "weights": {"a": 1.0}}, {"do": "mix", "weights": {"a": 2.0}}],
}


@pytest.mark.parametrize("name", TOGETHER)
def test_several_actions_asked_dry_show_what_they_then_do_together(name: str, tmp_path: Path) -> None:
    def change(recipe: dict[str, Any]) -> None:
        one = recipe["stages"]["one"]
        one["start"] = {**MODELS["gpt2"], "resid_pdrop": 0.1, "embd_pdrop": 0.1}
        one |= {"schedule": {"use": "schedule/wsd", "warm": "3step", "cooldown": "4step"}, "save": {"every": "1step"}}

    do = TOGETHER[name]
    script = {2: [[("asked", ask(*do, dry=True)), ("done", ask(*do))]]}
    home = run(tmp_path, script, change=change, steps=8)
    dry, done = answer(home, "asked"), answer(home, "done")
    assert (dry["state"], dry.get("error")) == ("dry", None) and done["state"] == "applied" and done["tick"] == 2
    assert [e["changes"] for e in dry["effects"]] == [e["changes"] for e in done["effects"]]
    before, then = (e["changes"][0] for e in dry["effects"][:2])
    assert name in ("back", "schedule", "end") or then["was"] == before["now"]


def test_looking_ahead_that_fails_is_a_refusal_and_the_stage_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(steer.acts.foreseen, "do", fails)
    home = run(
        tmp_path, {2: [[("asked", ask({"do": "note", "text": "x"}, dry=True))]], 3: [[("then", ask({"do": "save"}))]]}
    )
    assert answer(home, "asked")["state"] == "refused" and "nobody thought of this" in answer(home, "asked")["error"]
    assert answer(home, "then")["state"] == "applied"

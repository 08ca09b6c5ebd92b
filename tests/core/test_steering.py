"""A running stage is changed between steps, in writing, exactly once; what was written down is a recipe."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_kill import in_child
from tests.toy import graph, numbers
from tutelage.base.errors import UserError
from tutelage.core import acts, artifact, loop, steer
from tutelage.core.record import read_lines
from tutelage.core.run import run_graph
from tutelage.look import digest_of

Change = Callable[[dict[str, Any]], None]
ONE = "runs/toy/one/1"


def run(folder: Path, *, change: Change | None = None, steps: int = 8, said: list[str] | None = None) -> Path:
    """Stage `one` of the toy; the folder it was made in."""

    def tell(stage: str, what: dict[str, Any]) -> None:
        if said is not None and "warning" in what:
            said.append(what["warning"])

    made = graph(folder, steps=steps, change=change)
    result = run_graph(made, only="one", jobs=0, drift="refuse", tell=tell)
    assert not result.failed and not result.stopped
    return folder / ONE


def request(folder: Path, *acts: Any, name: str = "first", by: Any = "ada") -> Path:
    """As a page or a person writes it: beside, then renamed."""
    place = folder / ONE / "requests"
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{name}.json"
    path.with_suffix(".new").write_text(json.dumps({"by": by, "do": list(acts), "why": "to see"}))
    path.with_suffix(".new").rename(path)
    return path


def at(tick: int, folder: Path, *acts: Any, name: str = "first", monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that appears just before a tick's actions are collected."""
    collect = steer.collect

    def collected(stage: Any) -> Any:
        if stage.clock.tick == tick:
            request(folder, *acts, name=name)
        return collect(stage)

    monkeypatch.setattr(steer, "collect", collected)


def answer_of(home: Path, name: str = "first") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / f"answers/{name}.json").read_text())
    return found


def done_to(home: Path) -> list[dict[str, Any]]:
    """The journal's lines but for what the engine chose."""
    return [line for line in read_lines(home / "journal.jsonl") if line["by"] != "engine"]


def actions(*acts: dict[str, Any]) -> Change:
    def change(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["actions"] = list(acts)

    return change


def both(*changes: Change) -> Change:
    def change(recipe: dict[str, Any]) -> None:
        for one in changes:
            one(recipe)

    return change


def two_sources(recipe: dict[str, Any]) -> None:
    stages = recipe["stages"]
    stages["one"]["data"]["b"] = stages["two"]["data"]["b"]


def groups(recipe: dict[str, Any]) -> None:
    recipe["stages"]["one"]["groups"] = [
        {"match": "*embed*", "rate": 0.5},
        {"match": "*mlp*", "rate": 0.0},
        {"match": "*norm*", "rate": 2.0, "decay": 0.3},
    ]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The rate of every group at every step, by the name of its first parameter."""
    found: list[dict[str, float]] = []
    record = loop.record

    def recorded(run: Any, *args: Any, **kwargs: Any) -> None:
        found.append({group["names"][0]: group["lr"] for group in run.engine.optimizer.param_groups})
        record(run, *args, **kwargs)

    monkeypatch.setattr(loop, "record", recorded)
    return found


# -- what each action does --------------------------------------------------------------------------------------------


def test_a_rate_is_set_and_scaled_at_its_tick_and_groups_keep_their_ratios(
    tmp_path: Path, rates: list[dict[str, float]]
) -> None:
    steps = actions(
        {"tick": 2, "do": "set", "path": "optim.lr", "to": 4e-3},
        {"tick": 5, "do": "scale", "path": "optim.lr", "by": 0.5},
    )
    home = run(tmp_path, change=both(groups, steps))
    wanted = [1e-2] * 2 + [4e-3] * 3 + [2e-3] * 3
    assert [row["lr"] for row in numbers(home, kind="train")] == pytest.approx(wanted)
    assert len(rates[0]) >= 4
    for name in rates[0]:
        ratio = 0.5 if "embed" in name else 0.0 if "mlp" in name else 2.0 if "norm" in name else 1.0
        assert [now[name] for now in rates] == pytest.approx([rate * ratio for rate in wanted])


def test_a_rate_set_to_zero_stops_learning_and_comes_back(tmp_path: Path, rates: list[dict[str, float]]) -> None:
    run(
        tmp_path,
        change=both(
            groups,
            actions(
                {"tick": 2, "do": "set", "path": "optim.lr", "to": 0.0},
                {"tick": 4, "do": "set", "path": "optim.lr", "to": 1e-2},
            ),
        ),
    )
    assert set(rates[3].values()) == {0.0}
    assert rates[4] == pytest.approx(rates[0])


def test_the_rate_that_is_set_is_the_one_that_holds_under_a_schedule(tmp_path: Path) -> None:
    def falling(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["schedule"] = {"use": "schedule/linear", "warm": "0%"}

    home = run(tmp_path, change=both(falling, actions({"tick": 4, "do": "set", "path": "optim.lr", "to": 1e-3})))
    found = [row["lr"] for row in numbers(home, kind="train")]
    assert found[4] == pytest.approx(1e-3)
    assert found[6] == pytest.approx(1e-3 * 2 / 4)


def test_a_mixture_changes_at_its_tick_and_the_ledger_is_exact(tmp_path: Path) -> None:
    mix = actions(
        {"tick": 3, "do": "mix", "weights": {"a": 1.0, "b": 3.0}}, {"tick": 6, "do": "mix", "weights": {"b": 1}}
    )
    home = run(tmp_path, change=both(two_sources, mix))
    rows = numbers(home, kind="train")
    assert [row["weights"]["b"] for row in rows] == pytest.approx([0.5] * 3 + [0.75] * 3 + [1.0] * 2)
    drawn = json.loads((artifact.states(home / "state")[-1] / "state.json").read_text())["stream"]["sources"]
    assert {name: source["rows"] for name, source in drawn.items()} == {"a": 12 + 6, "b": 12 + 18 + 16}
    assert sum(source["tokens"] for source in drawn.values()) == rows[-1]["tokens"]


def test_a_save_is_kept_when_others_go(tmp_path: Path) -> None:
    def often(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["save"] = {"every": "1step", "keep": 1}

    home = run(tmp_path, change=both(often, actions({"tick": 2, "do": "save"})))
    assert [int(path.name) for path in artifact.states(home / "state")] == [2, 8]
    assert (home / "state/000000002/kept").exists()


def test_a_stage_is_extended_and_ended(tmp_path: Path) -> None:
    longer = run(tmp_path / "longer", change=actions({"tick": 6, "do": "extend", "until": "11step"}))
    assert numbers(longer)[-1]["step"] == 11 and numbers(longer)[-1]["final"]
    shorter = run(
        tmp_path / "shorter", change=actions({"tick": 3, "do": "end_stage"}, {"tick": 3, "do": "note", "text": "x"})
    )
    assert numbers(shorter)[-1]["step"] == 3 and numbers(shorter)[-1]["final"]
    plain = run(tmp_path / "plain", steps=3)
    assert digest_of(shorter) == digest_of(plain)


def test_an_extension_survives_a_cut_with_its_measurements(tmp_path: Path) -> None:
    def measured(recipe: dict[str, Any]) -> None:
        recipe["stages"]["one"]["evals"]["every"] = "2step"

    change = both(measured, actions({"tick": 3, "do": "extend", "until": "12step"}))
    whole = run(tmp_path / "whole", change=change)
    assert in_child(lambda: killed_after(7, lambda: run(tmp_path / "cut", change=change))) == -signal.SIGKILL
    again = run(tmp_path / "cut", change=change)
    assert numbers(again) == numbers(whole)
    assert [row["step"] for row in numbers(again, kind="eval")] == [0, 2, 4, 6, 8, 10, 12]


def test_a_measurement_and_a_remark_change_no_bit(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    looked = run(
        tmp_path / "looked", change=actions({"tick": 2, "do": "eval"}, {"tick": 4, "do": "note", "text": "looks well"})
    )
    assert digest_of(looked) == digest_of(plain)
    assert [row["step"] for row in numbers(looked, kind="eval")] == [0, 2, 8]


def test_a_method_declares_what_may_be_set(tmp_path: Path) -> None:
    def pulled(recipe: dict[str, Any]) -> None:
        recipe["stages"]["two"]["methods"] = [{"use": "continual/ewc", "strength": 10.0, "rows": 2}]
        recipe["stages"]["two"]["actions"] = [
            {"tick": 3, "do": "set", "path": "continual/ewc.strength", "to": 0.0},
            {"tick": 5, "do": "set", "path": "continual/ewc.strength", "to": 5.0},
        ]

    made = graph(tmp_path, steps=8, change=pulled)
    run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    found = [row["penalty/continual/ewc"] for row in numbers(made.nodes["two"].artifact.parent, kind="train")]
    assert [value == 0.0 for value in found[1:]] == [False, False, True, True, False, False, False]


# -- requests ---------------------------------------------------------------------------------------------------------


def test_a_request_is_written_down_with_its_author_before_it_holds(tmp_path: Path, monkeypatch: Any) -> None:
    at(3, tmp_path, {"do": "scale", "path": "optim.lr", "by": 0.5}, monkeypatch=monkeypatch)
    home = run(tmp_path)
    (line,) = done_to(home)
    assert (line["id"], line["tick"], line["by"], line["why"]) == ("first", 3, "ada", "to see")
    assert [row["lr"] for row in numbers(home, kind="train")] == pytest.approx([1e-2] * 3 + [5e-3] * 5)
    assert answer_of(home)["state"] == "applied" and answer_of(home)["tick"] == 3


WRONG: dict[str, Any] = {
    "unknown action": [{"do": "explode"}],
    "no list": {"do": "note"},
    "no mapping": ["note"],
    "nothing": [],
    "unknown setting": [{"do": "set", "path": "optim.beta", "to": 1}],
    "negative rate": [{"do": "set", "path": "optim.lr", "to": -1}],
    "no number": [{"do": "set", "path": "optim.lr", "to": float("nan")}],
    "no such source": [{"do": "mix", "weights": {"c": 1}}],
    "weights of zero": [{"do": "mix", "weights": {"a": 0}}],
    "endless weight": [{"do": "mix", "weights": {"a": float("inf")}}],
    "minutes": [{"do": "extend", "until": "5min"}],
    "one good, one wrong": [
        {"do": "scale", "path": "optim.lr", "by": 0.5},
        {"do": "scale", "path": "optim.lr", "by": -1},
    ],
}


def test_what_cannot_be_done_is_refused_and_hurts_nothing(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    for i, wrong in enumerate(WRONG.values()):
        path = request(tmp_path / "asked", name=f"wrong{i}")
        path.write_text(json.dumps({"by": "ada", "do": wrong}))
    request(tmp_path / "asked", {"do": "end_stage"}, name="spoofed", by="engine")
    request(tmp_path / "asked", name="torn").write_text('{"by": "ada", "do": [')
    said: list[str] = []
    home = run(tmp_path / "asked", said=said)
    left = sorted(path.stem for path in (home / "answers").iterdir())
    assert left == sorted([*(f"wrong{i}" for i in range(len(WRONG))), "spoofed", "torn"])
    assert not list((home / "requests").iterdir())
    assert {answer_of(home, name)["state"] for name in left} == {"refused"}
    assert all(answer_of(home, name)["error"] for name in left)
    assert len(said) == len(left) and all("refused" in line and "\n" not in line for line in said)
    assert not done_to(home)
    assert digest_of(home) == digest_of(plain) and numbers(home) == numbers(plain)


def test_a_setting_out_of_its_bounds_is_refused_where_it_is_asked(tmp_path: Path) -> None:
    def pulled(recipe: dict[str, Any]) -> None:
        one = recipe["stages"]["one"]
        one["keep"] = {"own": one["data"]["a"]}
        one["methods"] = [{"use": "continual/ewc", "of": "own", "rows": 1, "strength": 1.0}]

    request(tmp_path, {"do": "set", "path": "continual/ewc.strength", "to": -3.0})
    home = run(tmp_path, change=pulled)
    assert "greater than or equal to 0" in answer_of(home)["error"]


def test_a_recipe_with_a_misspelled_action_is_refused_before_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages.one.actions.0: set.to: .*number"):
        run(tmp_path, change=actions({"tick": 6, "do": "set", "path": "optim.lr", "to": "fast"}))
    with pytest.raises(UserError, match="at which `tick`"):
        run(tmp_path / "other", change=actions({"do": "eval"}))
    assert not (tmp_path / ONE / "metrics.jsonl").exists()


# -- exactly once -----------------------------------------------------------------------------------------------------

HALVED = {"do": "scale", "path": "optim.lr", "by": 0.5}


def killed_after(step: int, work: Callable[[], Any]) -> None:
    record = loop.record

    def recorded(run: Any, *args: Any, **kwargs: Any) -> None:
        record(run, *args, **kwargs)
        if run.clock.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.record = recorded
    work()


@pytest.mark.parametrize("where", ["written", "half", "answered", "applied", "saved"])
def test_a_request_cut_by_a_kill_holds_exactly_once(where: str, tmp_path: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        at(5, tmp_path / "whole", HALVED, monkeypatch=patch)
        whole = run(tmp_path / "whole")

    def work() -> None:
        die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        at(5, tmp_path / "cut", HALVED, monkeypatch=monkeypatch)
        moments = {"written": (steer, "carry_out"), "half": (acts, "apply"), "answered": (steer, "answer")}
        if where in moments:
            monkeypatch.setattr(*moments[where], die)
        killed_after({"applied": 6, "saved": 8}.get(where, 99), lambda: run(tmp_path / "cut"))

    assert in_child(work) == -signal.SIGKILL
    assert len(done_to(tmp_path / "cut" / ONE)) == 1
    again = run(tmp_path / "cut")
    assert len(done_to(again)) == 1
    assert numbers(again) == numbers(whole) and digest_of(again) == digest_of(whole)
    assert answer_of(again)["state"] == "applied"


def test_a_steered_run_is_a_recipe(tmp_path: Path, monkeypatch: Any) -> None:
    """What the journal says, written under `actions:`, gives the same weights."""
    asked = [HALVED, {"do": "mix", "weights": {"a": 1.0, "b": 3.0}}, {"do": "extend", "until": "10step"}]
    with monkeypatch.context() as patch:
        at(3, tmp_path / "live", *asked, monkeypatch=patch)
        at(5, tmp_path / "live", {"do": "set", "path": "optim.lr", "to": 2e-3}, name="second", monkeypatch=patch)
        live = run(tmp_path / "live", change=two_sources)
    lines = done_to(live)
    replay = actions(*({"tick": line["tick"], **act} for line in lines for act in line["do"]))
    again = run(tmp_path / "again", change=both(two_sources, replay))
    assert digest_of(again) == digest_of(live) and numbers(again) == numbers(live)
    assert digest_of(live) != digest_of(run(tmp_path / "plain", change=two_sources))

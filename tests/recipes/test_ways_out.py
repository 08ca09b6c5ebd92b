"""`on:` rules: a signal ends a stage and another is entered; what was not entered is not made; a cut run takes the same way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.toy import graph, numbers
from tutelage.base.errors import UserError
from tutelage.core import report
from tutelage.core.graph import Graph
from tutelage.core.record import read_lines
from tutelage.core.run import Result, run_graph
from tutelage.look import digest_of
from tutelage.plan_text import lines
from tutelage.planning import plan


def ways(on: list[dict[str, Any]]) -> Any:
    """A change of the toy recipe: `two` is measured every second step and may enter `rescue` or `polish`."""

    def change(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        two = stages["two"]
        two["evals"] = {**two["evals"], "every": "2step", "budget": "1000000%"}  # a budget that no machine reaches
        two["save"] = {"every": "2step", "keep": 9}
        plain = {**two, "start": "two", "until": "2step"}
        small = {"engine": {"device": "cpu"}, "evals": stages["one"]["evals"]}
        stages |= {
            "rescue": dict(plain), "polish": {**plain, "data": stages["one"]["data"]},
            "merged": {"start": ["one", "rescue"], "apply": {"use": "merge/linear", "weights": [0.5, 0.5]}, **small},
            "table": {"measure": ["probe/bits_per_byte"], "of": ["one", "polish"], **small},
            "last": {**plain, "start": {"best": ["rescue", "polish"], "by": "bits_per_byte/b"}},
        }  # fmt: skip
        if on:
            two["on"] = on
        else:
            del stages["rescue"], stages["polish"], stages["merged"], stages["table"], stages["last"]

    return change


def ran(made: Graph) -> Result:
    result = run_graph(made, only=None, jobs=0, drift="retrain", tell=lambda stage, said: None)
    assert not result.failed and not result.stopped
    return result


def home(made: Graph, name: str) -> Path:
    found = made.nodes[name].folder
    assert found is not None
    return found


@pytest.fixture(scope="module")
def bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float], list[float], str]:
    """A folder with stage `one` and an unruled `two`: bits per byte by step, loss by step, and the stage's digest."""
    folder = tmp_path_factory.mktemp("ways")
    made = graph(folder, steps=8, change=ways([]))
    ran(made)
    rows = numbers(home(made, "two"), kind="eval")
    found = {row["step"]: row["values"]["bits_per_byte/b"] for row in rows if not row["final"]}
    losses = [row["loss"] for row in numbers(home(made, "two"), kind="train")]
    assert found[0] > found[2] > found[4] > found[6]
    return folder, found, losses, digest_of(home(made, "two"))


def below(at: float, **rest: Any) -> dict[str, Any]:
    return {"signal": "bits_per_byte/b", "below": at, **rest}


def test_a_measure_ends_the_stage_and_only_what_it_enters_is_made(bits: Any, tmp_path: Path) -> None:
    _, found, _, _ = bits
    on = [
        {"signal": "loss", "above": 100.0, "enter": "rescue"},
        below((found[2] + found[4]) / 2, enter="polish"),
        {"otherwise": True, "enter": "rescue"},
    ]
    made = graph(tmp_path, steps=8, change=ways(on))
    before = {row["stage"]: row for row in plan(made)}
    assert before["rescue"]["only_if"] == before["polish"]["only_if"] == ["two"]
    assert "  made if   two enters it" in lines(before["rescue"])
    assert "  on        loss above 100: enter rescue" in lines(before["two"])
    result = ran(graph(tmp_path, steps=8, change=ways(on)))
    assert set(result.done) == {"one", "two", "polish", "table", "last"} and set(result.unmade) == {"rescue", "merged"}
    made = graph(tmp_path, steps=8, change=ways(on))
    after = {row["stage"]: row for row in plan(made)}
    assert after["rescue"]["state"] == after["merged"]["state"] == "not entered" and after["last"]["state"] == "done"
    assert after["two"]["entered"].startswith("polish (bits_per_byte/b below ")
    two = home(made, "two")
    assert len(numbers(two, kind="train")) == 4 and numbers(two, kind="eval")[-1]["final"]
    (line,) = [x for x in read_lines(two / "journal.jsonl") if x["do"][0]["do"] == "enter"]
    assert (line["tick"], line["by"], line["do"]) == (4, "engine", [{"do": "enter", "stage": "polish", "rule": 1}])
    assert made.nodes["last"].stage.start == "polish"
    assert ran(graph(tmp_path, steps=8, change=ways(on))).done == []


def test_the_report_says_which_way_was_taken(bits: Any, tmp_path: Path) -> None:
    on = [{"signal": "loss", "below": bits[2][2] + 1e-6, "enter": "rescue"}, {"otherwise": True, "enter": "polish"}]
    made = graph(tmp_path, steps=8, change=ways(on))
    ran(made)
    data = report.write(made, tmp_path / "out")
    states = {name: stage["state"] for name, stage in data["stages"].items()}
    assert states["polish"] == states["table"] == "not entered" and states["rescue"] == "done"
    assert [(way["enter"], way["taken"]) for way in data["stages"]["two"]["on"]] == [
        ("rescue", True),
        ("polish", False),
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'class="way taken"' in page and 'class="way passed"' in page and "– not entered" in page
    assert any("two: loss below" in line and "rescue was entered" in line for line in report._lines(data))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["stages"]["two"]["on"][0]["tick"] == 3


def test_a_rule_must_hold_so_often_in_a_row(bits: Any, tmp_path: Path) -> None:
    _, found, losses, _ = bits
    made = graph(tmp_path, steps=8, change=ways([below(found[0], **{"for": 3, "enter": "rescue"})]))
    ran(made)
    assert [row["step"] for row in numbers(home(made, "two"), kind="eval")] == [0, 2, 4, 6, 6]
    high = sorted(losses)[4]  # holds now and then, and never three times before
    streak = next((i + 1 for i in range(1, 8) if max(losses[i - 1 : i + 1]) < high), 8)
    other = graph(tmp_path, steps=8, change=ways([{"signal": "loss", "below": high, "for": 2, "enter": "rescue"}]))
    ran(other)
    assert len(numbers(home(other, "two"), kind="train")) == streak


def test_where_no_rule_holds_the_stage_ends_by_itself_and_otherwise_is_entered(bits: Any, tmp_path: Path) -> None:
    _, _, _, unruled = bits
    never = below(0.001, enter="rescue")
    made = graph(tmp_path, steps=8, change=ways([never, {"otherwise": True, "enter": "polish"}]))
    result = ran(made)
    assert result.unmade == ["rescue", "merged"] and digest_of(home(made, "two")) == unruled
    alone = graph(tmp_path, steps=8, change=ways([never, below(0.0001, enter="polish")]))
    result = ran(alone)
    assert set(result.unmade) == {"rescue", "polish", "merged", "table", "last"} and "two" in result.done


@pytest.mark.parametrize("journaled", [True, False])
def test_a_cut_run_takes_the_same_way(journaled: bool, bits: Any, tmp_path: Path) -> None:
    _, found, _, _ = bits
    made = graph(tmp_path, steps=8, change=ways([below(found[0], **{"for": 3, "enter": "rescue"})]))
    ran(made)
    two, whole = home(made, "two"), numbers(home(made, "two"))
    digest = digest_of(two)
    shutil.rmtree(two / "artifact")
    for state in sorted((two / "state").iterdir()):
        if int(state.name) > 4:
            shutil.rmtree(state)
    journal = two / "journal.jsonl"
    lines = [line for line in journal.read_text().splitlines() if journaled or '"enter"' not in line]
    journal.write_text("".join(line + "\n" for line in lines))
    again = graph(tmp_path, steps=8, change=ways([below(found[0], **{"for": 3, "enter": "rescue"})]))
    ran(again)
    assert home(again, "two") == two and digest_of(two) == digest and numbers(two) == whole
    entered = [x for x in read_lines(journal) if x["do"][0]["do"] == "enter"]
    assert [(x["tick"], x["do"][0]["stage"]) for x in entered] == [(6, "rescue")]


def test_rules_and_what_they_hang_on_enter_the_fingerprint(bits: Any) -> None:
    def print_of(on: list[dict[str, Any]], **evals: Any) -> str:
        def change(recipe: dict[str, Any]) -> None:
            ways(on)(recipe)
            recipe["stages"]["two"]["evals"] |= evals

        made = graph(bits[0], steps=8, change=change)
        plan(made)
        return made.nodes["two"].fingerprint

    rule = [below(0.001, enter="rescue")]
    assert print_of([]) == print_of([], passages=7) != print_of(rule)
    assert len({print_of(rule), print_of([below(0.002, enter="rescue")]), print_of(rule, passages=7)}) == 3


def test_a_signal_that_is_not_there_is_refused_after_the_first_step(bits: Any, tmp_path: Path) -> None:
    on = [{"signal": "bits_per_bite/b", "below": 1.0, "enter": "rescue"}]
    with pytest.raises(
        UserError, match=r"stages.two.on.0.signal: nothing here is called 'bits_per_bite/b'; did you mean"
    ):
        ran(graph(tmp_path, steps=8, change=ways(on)))

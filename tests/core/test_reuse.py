"""What is made once is not made again, and what is not the same is never taken for it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.prompt import Prompt

from tutelage import command, modalities
from tutelage.base import load, registry
from tutelage.base.errors import UserError
from tutelage.core import identity
from tutelage.core.graph import Drift, Graph
from tutelage.core.run import Result, run_graph
from tutelage.core.settle import settle
from tutelage.display import Display
from tutelage.look import digest_of
from tutelage.modalities.text import toy

Change = Callable[[dict[str, Any]], None]
OWN = "tutelage_own_ewc"


def run(
    made: Graph, *, drift: Any = "refuse", heard: list[tuple[str, str]] | None = None, only: str | None = None
) -> Result:
    def tell(stage: str, said: dict[str, Any]) -> None:
        if heard is not None and "note" in said:
            heard.append((stage, said["note"]))

    result = run_graph(made, only=only, jobs=0, drift=drift, tell=tell)
    assert not result.failed and not result.stopped
    return result


def named(folder: Path, name: str, change: Change | None = None) -> Graph:
    """The toy recipe under another name, beside the others in `folder`/runs."""
    recipe = toy.recipe(folder / "data", steps=4)
    if change:
        change(recipe)
    return Graph.resolve(load.load(recipe), name=name, modality=modalities.find("text"), runs=folder / "runs")


def settled(made: Graph) -> dict[str, tuple[str, str]]:
    """State and fingerprint of every stage, from what is on disk; nothing runs."""
    for node in made.nodes.values():
        settle(made, node, drift="retrain")
    return {name: (node.state, node.fingerprint) for name, node in made.nodes.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the toy recipe has been run, four steps a stage."""
    folder = tmp_path_factory.mktemp("reuse")
    run(named(folder, "toy"))
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same, for tests that change what is there. The data stay where they were."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    (tmp_path / "data").symlink_to(made / "data")
    return tmp_path


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user's own method: EWC, copied to a file of theirs."""
    path = tmp_path / "own" / f"{OWN}.py"
    path.parent.mkdir()
    shutil.copyfile(registry.path_of("continual/ewc"), path)
    monkeypatch.syspath_prepend(str(path.parent))
    yield path
    sys.modules.pop(OWN, None)
    forget()


def forget() -> None:
    """As in a process that has only just begun."""
    for cache in (identity.code_id, identity.file_id, identity.weights_id, registry.find):
        cache.cache_clear()


def edit(path: Path, *pairs: tuple[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    forget()


def with_own(recipe: dict[str, Any]) -> None:
    recipe["stages"]["two"]["methods"] = [{"use": f"{OWN}:EWC", "rows": 2}]


def with_ewc(recipe: dict[str, Any]) -> None:
    recipe["stages"]["two"]["methods"] = [{"use": "continual/ewc", "rows": 2}]


# -- code -------------------------------------------------------------------------------------------------------------


def test_words_about_a_method_retrain_nothing_and_its_code_does(copy: Path, own: Path) -> None:
    run(named(copy, "toy", with_own), drift="retrain")
    before = settled(named(copy, "toy", with_own))
    assert before["two"][0] == "done"
    edit(
        own,
        ('"""Elastic Weight Consolidation', '"""Something else said of it'),
        ('"""strength / 2', '"""Half the strength'),
        ("        tokens = 0.0\n", "        # counted below\n        tokens = 0.0\n"),
        ("0.8 * off", "0.9 * off"),
        ("margin=0.01", "margin=0.02"),
    )
    assert settled(named(copy, "toy", with_own)) == before
    edit(own, ("self.strength / 2", "self.strength / 3"))
    after = settled(named(copy, "toy", with_own))
    assert after["one"] == before["one"]
    assert after["two"][0] == "new"
    with pytest.raises(UserError, match=f"code.{OWN}:EWC: .* → "):
        run(named(copy, "toy", with_own))


@pytest.mark.parametrize("file", ["_kit/labels.py", "objective/causal_lm.py", "optim/adamw.py"])
def test_a_mend_in_what_a_method_is_made_of_shows_as_drift(
    file: str, copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    house = tmp_path / "methods"
    shutil.copytree(registry.ROOT, house)
    monkeypatch.setattr(registry, "ROOT", house)
    forget()
    before = settled(named(copy, "new", with_ewc))
    edit(house / file, ("from __future__ import annotations\n", "from __future__ import annotations\n# a remark\n"))
    assert settled(named(copy, "new", with_ewc)) == before
    with open(house / file, "a", encoding="utf-8") as handle:
        handle.write("\nMENDED = True\n")
    forget()
    after = settled(named(copy, "new", with_ewc))
    assert after["two"][1] != before["two"][1]
    monkeypatch.undo()
    forget()


# -- the same stage under another name ------------------------------------------------------------------------------


def test_another_recipe_with_the_same_stages_makes_nothing(made: Path) -> None:
    again = named(made, "other")
    result = run(again)
    assert result.reused == ["one", "two"] and not result.done
    assert again.nodes["two"].folder == made / "runs/toy/two/1"
    assert not (made / "runs/other").exists()


def test_a_shared_beginning_is_trained_once(made: Path) -> None:
    def longer(recipe: dict[str, Any]) -> None:
        recipe["stages"]["two"]["until"] = "5step"

    result = run(named(made, "longer", longer))
    assert (result.reused, result.done) == (["one"], ["two"])


@pytest.mark.parametrize(
    ("change", "same"),
    [
        pytest.param({"evals": {"every": "2step", "run": ["probe/bits_per_byte"], "final": 4}}, True, id="evals"),
        pytest.param({"save": {"every": "1step"}}, True, id="save"),
        pytest.param({"keep": "none"}, True, id="keep"),
        pytest.param({"engine": {"micro": 2, "device": "cpu", "threads": 1}}, True, id="machine"),
        pytest.param({"until": "4 steps"}, True, id="other spelling"),
        pytest.param({"packing": "concat"}, False, id="packing"),
        pytest.param({"seed": 1}, False, id="seed"),
        pytest.param({"engine": {"micro": 4, "device": "cpu", "clip": 2.0}}, False, id="clip"),
        pytest.param({"actions": [{"tick": 2, "do": "scale", "path": "optim.lr", "by": 0.5}]}, False, id="actions"),
    ],
)
def test_what_changes_no_weight_is_no_other_stage(change: dict[str, Any], same: bool, made: Path) -> None:
    known = settled(named(made, "toy"))
    found = settled(named(made, "toy", lambda recipe: recipe["stages"]["two"].update(change)))
    assert (found["two"] == known["two"]) is same
    assert found["one"] == known["one"]


def test_the_weight_of_a_source_is_part_of_the_stage(made: Path) -> None:
    def weighing(weight: float) -> Change:
        def change(recipe: dict[str, Any]) -> None:
            sources = {name: recipe["stages"][stage]["data"][name] for stage, name in (("one", "a"), ("two", "b"))}
            recipe["stages"]["two"]["data"] = {"a": {**sources["a"], "weight": weight}, "b": sources["b"]}

        return change

    one, other = (settled(named(made, "toy", weighing(weight))) for weight in (1.0, 3.0))
    assert one["two"][1] != other["two"][1]


def test_a_table_of_fewer_rows_is_another_table(made: Path) -> None:
    def table(final: int) -> Change:
        def change(recipe: dict[str, Any]) -> None:
            recipe["stages"]["seen"] = {
                "measure": ["probe/bits_per_byte"], "of": ["two"], "evals": {"final": final}, "length": 32
            }  # fmt: skip

        return change

    assert settled(named(made, "t", table(4)))["seen"] != settled(named(made, "t", table(8)))["seen"]


# -- drift ------------------------------------------------------------------------------------------------------------


def other_rate(recipe: dict[str, Any]) -> None:
    recipe["stages"]["one"]["optim"]["lr"] = 5e-3


def test_drift_is_refused_by_name_and_with_both_ways_out(made: Path) -> None:
    with pytest.raises(
        UserError, match=r"stage 'one' in .*optim.lr: 0.01 → 0.005; say --retrain .* or --reuse"
    ) as refused:
        run(named(made, "toy", other_rate))
    assert "\n" not in str(refused.value)


def test_retrain_makes_it_anew_beside_the_old_one(copy: Path) -> None:
    old = digest_of(copy / "runs/toy/one/1")
    result = run(named(copy, "toy", other_rate), drift="retrain")
    assert result.done == ["one", "two"]
    assert digest_of(copy / "runs/toy/one/1") == old != digest_of(copy / "runs/toy/one/2")
    assert run(named(copy, "toy", other_rate)).reused == ["one", "two"]
    assert run(named(copy, "toy")).reused == ["one", "two"], "the old version is still there"


def test_reuse_takes_what_is_there_and_what_follows_is_made_from_it(copy: Path) -> None:
    result = run(named(copy, "toy", other_rate), drift="reuse")
    assert result.reused == ["one", "two"] and not (copy / "runs/toy/one/2").exists()

    def both(recipe: dict[str, Any]) -> None:
        other_rate(recipe)
        recipe["stages"]["three"] = {**recipe["stages"]["two"], "start": "one"}

    assert run(named(copy, "toy", both), drift="reuse").done == ["three"]
    honest = named(copy, "honest", both)
    assert settled(honest)["three"][0] == "new", "what was made from the old stage is not taken for the new one's"


def command_line(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> None:
    recipe = toy.recipe(folder / "data", steps=4)
    other_rate(recipe)
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(command, "console", Console(force_terminal=terminal, file=io.StringIO()))
    monkeypatch.setattr("sys.stdin", type("In", (), {"isatty": lambda self: terminal, "readline": lambda self: text})())
    monkeypatch.setattr(command, "_peak_in_child", lambda: 0.0)
    monkeypatch.setattr(Prompt, "get_input", classmethod(lambda cls, *args, **kwargs: text))
    command.run_recipe(path, sets=[], only="one", jobs=0, reuse=False, retrain=False, runs=folder / "runs")


def test_a_terminal_is_asked_and_without_one_it_is_an_error(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Drift, match="--retrain"):
        command_line(copy, "retrain", monkeypatch, terminal=False)
    with pytest.raises(Drift, match="--retrain"):
        command_line(copy, "stop", monkeypatch, terminal=True)
    command_line(copy, "reuse", monkeypatch, terminal=True)
    assert not (copy / "runs/toy/one/2").exists()
    command_line(copy, "retrain", monkeypatch, terminal=True)
    assert (copy / "runs/toy/one/2/artifact").exists()


def test_the_report_of_one_stage_keeps_what_is_there_of_the_others(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run --only` comes to one stage, and its report takes the place of that of all."""
    path = copy / "toy.yaml"
    path.write_text(yaml.safe_dump(toy.recipe(copy / "data", steps=4)))
    monkeypatch.setattr(command, "_peak_in_child", lambda: 0.0)

    def states(only: str | None, *sets: str) -> dict[str, str]:
        options = {"jobs": 0, "reuse": False, "retrain": bool(sets), "runs": copy / "new"}
        command.run_recipe(path, sets=list(sets), only=only, **options)
        found = json.loads((copy / "new/toy/report.json").read_text())
        return {name: stage["state"] for name, stage in found["stages"].items()}

    assert states("one") == {"one": "done", "two": "not run"}
    assert not (copy / "new/toy/two").exists(), "to look makes nothing"
    assert states(None) == states("one") == {"one": "done", "two": "done"}
    assert states("one", "stages.one.optim.lr=0.02") == {"one": "done", "two": "not run"}, (
        "that two came from another one"
    )


def test_a_question_finds_the_terminal_still(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(Console(force_terminal=True), peak=0.0)
    with display:
        assert display.progress.live.is_started
        with display.paused():
            assert not display.progress.live.is_started
        assert display.progress.live.is_started


# -- steered ----------------------------------------------------------------------------------------------------------


def steer(folder: Path, *acts: dict[str, Any], by: str = "ada") -> None:
    """A request for the stage in `folder`, as a page or a person writes it."""
    (folder / "requests").mkdir(parents=True, exist_ok=True)
    (folder / "requests" / "first.json").write_text(json.dumps({"by": by, "do": list(acts), "why": "to see"}))


def test_a_steered_stage_belongs_to_its_own_run(tmp_path: Path) -> None:
    home = tmp_path / "runs/toy/one/1"
    steer(home, {"do": "scale", "path": "optim.lr", "by": 0.5})
    run(named(tmp_path, "toy"))
    heard: list[tuple[str, str]] = []
    assert run(named(tmp_path, "toy"), heard=heard).reused == ["one", "two"]
    assert heard == [("one", "steered 1 times by ada; going on from it, as no other recipe will")]
    plain = named(tmp_path, "plain")
    assert run(plain).done == ["one", "two"], "neither the steered stage nor what follows from it"
    assert digest_of(tmp_path / "runs/plain/one/1") != digest_of(home)


def test_a_remark_is_no_steering(tmp_path: Path) -> None:
    steer(tmp_path / "runs/toy/one/1", {"do": "note", "text": "looks well"}, {"do": "save"}, {"do": "eval"})
    run(named(tmp_path, "toy"))
    assert run(named(tmp_path, "plain")).reused == ["one", "two"]


def test_a_table_of_a_steered_stage_is_not_taken_for_one_of_the_bare_recipe(tmp_path: Path) -> None:
    def table(recipe: dict[str, Any]) -> None:
        recipe["stages"]["seen"] = {"measure": ["probe/bits_per_byte"], "of": ["one"], "length": 32}

    steer(tmp_path / "runs/toy/one/1", {"do": "scale", "path": "optim.lr", "by": 0.5})
    run(named(tmp_path, "toy", table), only="seen")
    result = run(named(tmp_path, "plain", table), only="seen")
    assert result.done == ["one", "seen"]


def test_a_setting_added_to_a_method_named_by_its_name_alone_is_one_change() -> None:
    old, new = {"optim": "optim/adamw"}, {"optim": {"use": "optim/adamw", "lr": 1e-4}}
    assert identity.difference(old, new) == "optim.lr: absent → 0.0001"
    assert identity.difference(new, old) == "optim.lr: 0.0001 → absent"
    other = {"optim": {"use": "optim/muon", "lr": 1e-4}}
    assert identity.difference(old, other) == "optim.lr: absent → 0.0001, optim.use: optim/adamw → optim/muon"

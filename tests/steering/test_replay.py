"""A steered run is run again from its recipe and journal, and is a recipe itself: the same bits each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.steering.steered import Change, Script, steered
from tutelage import modalities, steering
from tutelage.base import load
from tutelage.base.errors import UserError
from tutelage.cli import app
from tutelage.core import artifact
from tutelage.core.graph import Graph
from tutelage.core.record import read_lines
from tutelage.core.run import run_graph
from tutelage.look import digest_of
from tutelage.replaying import replay, seed, told
from tutelage.retelling import retell

HALVED = {"do": "scale", "path": "optim.lr", "by": 0.5}


def policy(recipe: dict[str, Any]) -> None:
    recipe["stages"]["one"]["methods"] = [{"use": "tests.steering.steered:Cools"}]
    recipe["stages"]["one"]["steering"] = {"hold": "2step"}


def planned(recipe: dict[str, Any]) -> None:
    recipe["stages"]["one"]["actions"] = [{"tick": 3, "do": "mix", "weights": {"a": 3.0, "b": 1.0}}]


SCRIPTS: dict[str, tuple[Script, Change | None]] = {
    "values, data and an end": (
        {
            1: [("bot-1", [{"do": "set", "path": "optim.lr", "to": 8e-3}])],
            2: [("ada", [HALVED, {"do": "note", "text": "x"}])],
            3: [("bob", [{"do": "mix", "weights": {"b": 1.0}}, {"do": "skip_data", "source": "b", "rows": 5}])],
            5: [("cy", [{"do": "extend", "until": "14step"}])],
        },
        None,
    ),
    "pauses": (
        {
            4: [
                ("ada", [{"do": "pause"}]),
                ("bob", [HALVED]),
                ("cy", [{"do": "step", "n": 2}]),
            ],
            6: [("dot", [{"do": "eval"}, {"do": "resume"}])],
        },
        planned,
    ),
    "ways back": (
        {
            5: [("ada", [{"do": "skip_data", "source": "a", "rows": 3}]), ("bob", [HALVED])],
            7: [("cy", [{"do": "rollback", "to": "last"}])],
            9: [("dot", [{"do": "undo", "id": "bob", "weights": True}])],
            11: [("eve", [{"do": "rollback", "to": 6, "skip": True}, {"do": "set", "path": "optim.lr", "to": 2e-3}])],
        },
        None,
    ),
    "modules": (
        {
            3: [("ada", [{"do": "freeze", "modules": ["model.layers.0.*"]}])],
            6: [("bob", [{"do": "reset", "modules": ["model.layers.1.*"]}])],
            8: [("cy", [{"do": "unfreeze", "modules": ["model.layers.0.*"]}])],
        },
        None,
    ),
    "policies": (
        {4: [("ada", [{"do": "set", "path": "optim.lr", "to": 8e-3}])], 9: [("bob", [{"do": "eval"}])]},
        policy,
    ),
    "a policy and ways back": (
        {
            5: [("ada", [HALVED, {"do": "lock", "actors": ["policy"]}])],
            7: [("bob", [{"do": "rollback", "to": 4}, {"do": "unlock", "actors": ["policy"]}])],
        },
        policy,
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_steered_run_is_the_same_again_and_as_a_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, change = SCRIPTS[name]
    runs = steered(tmp_path, script, change=change, monkeypatch=monkeypatch, only="one")
    entries = {entry["id"]: entry["state"] for entry in steering.log(runs / "toy/one/1")}
    asked = {id for acts in script.values() for id, _ in acts}
    assert asked <= {id for id, state in entries.items() if state == "applied"}, entries
    (found,) = replay("toy/one", runs=runs)
    assert found.equal and found.digest == digest_of(runs / "toy/one/1")
    retell("toy", out=tmp_path / "told.yaml", runs=runs, console=Console(quiet=True))
    recipe = load.load(tmp_path / "told.yaml")
    graph = Graph.resolve(recipe, name="told", modality=modalities.find("text"), runs=runs)
    result = run_graph(graph, only="one", jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert result.done == ["one"]
    assert digest_of(runs / "told/one/1") == found.digest


def test_actions_are_seen_in_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what was done to it the run is another one: the comparison above can fail."""
    runs = steered(tmp_path, {2: [("ada", [HALVED])]}, monkeypatch=monkeypatch, only="one")
    plain = steered(tmp_path / "plain", {}, monkeypatch=monkeypatch, only="one")
    assert digest_of(runs / "toy/one/1") != digest_of(plain / "toy/one/1")
    journal = runs / "toy/one/1/journal.jsonl"
    lines = read_lines(journal)
    lines = [{**line, "tick": 3} if line["by"] == "ada" else line for line in lines]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = CliRunner().invoke(app, ["replay", "toy/one", "--runs", str(runs)])
    assert done.exit_code == 1 and "NOT EQUAL" in done.output


def test_a_whole_run_is_replayed_and_what_follows_a_steered_stage_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = steered(tmp_path, {2: [("ada", [HALVED])]}, monkeypatch=monkeypatch, steps=6)
    done = CliRunner().invoke(app, ["replay", "toy", "--runs", str(runs), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output.strip().splitlines()[-1])
    assert [(one["stage"], one["equal"]) for one in found] == [("toy/one", True), ("toy/two", True)]
    assert len(read_lines(runs / "toy--replay/two/1/metrics.jsonl")) > 6, "it was run, not taken over"
    with pytest.raises(UserError, match="is there already"):
        replay("toy", runs=runs)


def test_one_stage_is_replayed_from_the_parent_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = steered(tmp_path, {2: [("ada", [HALVED])]}, monkeypatch=monkeypatch, steps=6)
    (found,) = replay("toy/two", runs=runs)
    assert found.equal and (runs / "toy--replay/one").is_symlink()


def test_an_unfinished_stage_is_replayed_to_its_newest_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = steered(tmp_path, {2: [("ada", [HALVED])], 10: [("bob", [HALVED])]}, monkeypatch=monkeypatch, only="one")
    folder = runs / "toy/one/1"
    (folder / "artifact").rename(tmp_path / "gone")
    last = artifact.states(folder / "state")[-1]
    last.rename(tmp_path / "last")
    (found,) = replay("toy/one", runs=runs)
    assert (found.tick, found.equal) == (10, True)


def test_a_changed_recipe_is_not_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = steered(tmp_path, {}, monkeypatch=monkeypatch, steps=3, only="one")
    recipe = runs / "toy/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.01", "lr: 0.02"))
    with pytest.raises(UserError, match=r"optim.lr: 0.01 → 0.02.*cannot be replayed"):
        replay("toy/one", runs=runs)
    assert not (runs / "toy--replay").exists()


def test_the_recipe_says_who_did_what_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = steered(tmp_path, {2: [("ada", [HALVED])], 4: [("bot-1", [{"do": "note", "text": "hm"}])]},
                   monkeypatch=monkeypatch, change=policy, only="one")  # fmt: skip
    done = CliRunner().invoke(
        app, ["new", "recipe", "--from", "toy", "--out", str(tmp_path / "told.yaml"), "--runs", str(runs)]
    )
    assert done.exit_code == 0, done.output
    text = (tmp_path / "told.yaml").read_text()
    assert "# ada (person): to see\n      - {tick: 2, do: scale, path: optim.lr, by: 0.5, why: to see}" in text
    assert "tests.steering.steered:Cools (policy)" in text and "replay: true" in text and "hm" not in text
    with pytest.raises(UserError, match="there already"):
        retell("toy", out=tmp_path / "told.yaml", runs=runs, console=Console(quiet=True))


def test_a_request_waits_until_what_was_written_down_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that goes on after a crash, and somebody asks before it is where it was."""
    runs = steered(tmp_path, {2: [("ada", [HALVED])], 6: [("bob", [HALVED])]}, monkeypatch=monkeypatch, only="one")
    seed(runs / "toy/one/1", runs / "again/one/1", tick=None)
    steering.send(runs / "again/one/1", [{"do": "note", "text": "early"}], by="cy", id="cy")
    recipe = load.load(runs / "toy/recipe.yaml")
    graph = Graph.resolve(recipe, name="again", modality=modalities.find("text"), runs=runs)
    run_graph(graph, only="one", jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert [(entry["id"], entry["tick"]) for entry in steering.log(runs / "again/one/1")] == [
        ("ada", 2),
        ("bob", 6),
        ("cy", 6),
    ]
    assert digest_of(runs / "again/one/1") == digest_of(runs / "toy/one/1")


def test_a_replays_journal_leaves_out_what_changes_no_number_and_saves_where_somebody_goes_back() -> None:
    def line(id: str, tick: int, *do: dict[str, Any], actor: str = "person") -> dict[str, Any]:
        return {"id": id, "tick": tick, "by": id, "actor": actor, "do": list(do)}

    def done(id: str, tick: int) -> dict[str, Any]:
        entry = {"do": "applied", "id": id, "actor": "person", "effects": [], "undo": [], "saved": None}
        return {"id": f"{id}.", "tick": tick, "by": "engine", "do": [entry]}

    skip = {"do": "skip_data", "source": "a", "rows": 1}
    lines = [
        *(line("a", 4, {"do": "pause"}), done("a", 4)),
        *(line("b", 5, skip), done("b", 5), line("c", 5, HALVED, {"do": "step", "n": 1}), done("c", 5)),
        *(line("d", 9, {"do": "rollback", "to": 5, "skip": False}), done("d", 9)),
    ]
    found = told(lines)
    assert [(entry["id"], entry["tick"], [act["do"] for act in entry["do"]]) for entry in found[::2]] == [
        ("b", 5, ["skip_data"]),
        ("replay-save-5", 5, ["save"]),
        ("c", 5, ["scale"]),
        ("d", 9, ["rollback"]),
    ]
    assert [entry["do"][0]["id"] for entry in found[1::2]] == ["b", "replay-save-5", "c", "d"]

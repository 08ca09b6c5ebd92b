"""What a client sees of stages and leaves in their folders; and what it is told when nobody answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tutelage import steering, watching
from tutelage.agent import Present
from tutelage.base.errors import UserError
from tutelage.core.record import dumps, sole_writer

LOWER = [{"do": "set", "path": "optim.lr", "to": 1e-3}]


def lay(runs: Path, name: str, *, start: Any = None, version: int = 1, done: bool = False) -> Path:
    """A stage's folder as a run leaves it, as far as a client reads it."""
    folder = runs / name / str(version)
    folder.mkdir(parents=True)
    about = {"fingerprint": f"of-{name}", "stage": {"start": start}}
    (folder / "stage.json").write_text(json.dumps(about))
    (folder / "lock").touch()
    if done:
        (folder / "artifact").mkdir()
    return folder


def write_journal(folder: Path, *lines: dict[str, Any]) -> None:
    (folder / "journal.jsonl").write_text("".join(dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


# -- finding ----------------------------------------------------------------------------------------------------------


def test_stages_are_listed_with_where_they_stand_and_what_they_come_from(runs: Path) -> None:
    lay(runs, "demo/base", done=True)
    tail = lay(runs, "demo/tail", start="base")
    lay(runs, "other/more", start="demo/tail@40")
    lay(runs, "other/kin", start=[str(tail / "artifact/model"), "more"])
    (tail / "artifact/model").mkdir(parents=True)
    found = {info.name: info for info in steering.stages(runs)}
    assert list(found) == ["demo/base", "demo/tail", "other/more", "other/kin"]
    assert found["demo/base"].state == "finished" and found["demo/base"].fingerprint == "of-demo/base"
    assert found["demo/tail"].lineage == ["demo/base"]
    assert found["other/more"].lineage == ["demo/base", "demo/tail"] and found["other/more"].state == "stopped"
    assert found["other/kin"].lineage == ["demo/base", "demo/tail", "other/more"]


def test_of_a_run_the_live_stage_is_meant_else_its_last(runs: Path) -> None:
    first, last = lay(runs, "demo/zero"), lay(runs, "demo/one")
    assert steering.find("demo", runs=runs) == last
    with sole_writer(first):
        assert steering.find("demo", runs=runs) == first
        with sole_writer(last), pytest.raises(UserError, match="several stages at work: one, zero; say which"):
            steering.find("demo", runs=runs)
    newest = lay(runs, "demo/zero", version=10)
    lay(runs, "demo/zero", version=9)
    assert steering.find("demo/zero", runs=runs) == newest


@pytest.mark.parametrize(
    "name",
    ["..", "../out", "demo/..", "/demo", "demo/one/1", "", "demo/", ".hidden", "demo\\one", "linked/one", "near"],
)
def test_a_name_leads_nowhere_outside_of_the_runs(name: str, runs: Path) -> None:
    lay(runs, "demo/one")
    outside = lay(runs.parent / "out", "far/one")
    lay(runs.parent, "out/one")
    (runs / "linked").symlink_to(outside.parent.parent)
    (runs / "near").mkdir()
    (runs / "near/one").symlink_to(outside.parent)
    with pytest.raises(UserError):
        steering.find(name, runs=runs)
    assert [info.name for info in steering.stages(runs)] == ["demo/one"]


def test_a_misspelled_name_is_told_the_nearest(runs: Path) -> None:
    lay(runs, "demo/pretrain")
    with pytest.raises(UserError, match="did you mean 'demo'"):
        steering.find("demp", runs=runs)
    with pytest.raises(UserError, match="did you mean 'pretrain'"):
        steering.find("demo/pretrian", runs=runs)


# -- asking -----------------------------------------------------------------------------------------------------------


def test_a_request_lies_whole_in_the_folder_under_its_id(runs: Path) -> None:
    folder = lay(runs, "demo/one")
    id = steering.send(folder, LOWER, by="ada", why="too hot")
    (path,) = (folder / "requests").iterdir()
    assert path.name == f"{id}.json"
    assert json.loads(path.read_text()) == {
        "by": "ada",
        "actor": "person",
        "do": LOWER,
        "why": "too hot",
        "dry": False,
    }


def test_ids_sort_by_time() -> None:
    ids = [steering.new_id() for _ in range(5)]
    assert len({id[:-2] for id in ids}) <= 5 and [id[:-2] for id in ids] == sorted(id[:-2] for id in ids)


@pytest.mark.parametrize("where", ["requests", "answers", "journal"])
def test_a_request_sent_twice_is_there_once_and_another_under_its_id_is_refused(where: str, runs: Path) -> None:
    folder = lay(runs, "demo/one")
    steering.send(folder, LOWER, by="ada", id="x")
    request = folder / "requests/x.json"
    if where != "requests":
        told = json.loads(request.read_text())
        request.unlink()
        if where == "answers":
            (folder / "answers").mkdir()
            (folder / "answers/x.json").write_text(json.dumps({**told, "id": "x", "state": "applied", "tick": 3}))
        else:
            write_journal(folder, {"id": "x", "tick": 3, "by": "ada", "actor": "person", "do": told["do"]})
    assert steering.send(folder, LOWER, by="ada", id="x") == "x"
    assert request.exists() == (where == "requests")
    with pytest.raises(UserError, match="taken by another request"):
        steering.send(folder, [{"do": "eval"}], by="ada", id="x")
    with pytest.raises(UserError, match="taken by another request"):
        steering.send(folder, LOWER, by="ada", id="x", dry=True)
    assert len(list((folder / "requests").iterdir())) == (where == "requests")


@pytest.mark.parametrize("what", ["answers/x.json", "answers", "requests"])
def test_a_link_in_a_stages_folder_leads_nowhere(what: str, runs: Path, tmp_path: Path) -> None:
    folder, secret = lay(runs, "demo/one"), tmp_path / "secret"
    secret.mkdir()
    (secret / "x.json").write_text(json.dumps({"by": "ada", "do": LOWER, "state": "applied", "tick": 1}))
    (folder / "error.txt").symlink_to(secret / "x.json")
    if what == "answers/x.json":
        (folder / "answers").mkdir()
    (folder / what).symlink_to(secret / "x.json" if what.endswith("json") else secret)
    with pytest.raises(UserError, match="is a link|cannot be read"):
        steering.send(folder, LOWER, by="ada", id="x")
    if what == "answers/x.json":
        assert steering.log(folder) == []
    assert watching.last_line(folder / "error.txt") is None and [p.name for p in secret.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("do", "more"),
    [
        ([], {}),
        ([{"do": "explode"}], {}),
        ([{"do": "scale", "path": "optim.lr", "by": -1}], {}),
        (LOWER, {"by": "engine"}),
        (LOWER, {"by": " "}),
        (LOWER, {"actor": "policy"}),
        (LOWER, {"id": "../x"}),
    ],
)
def test_what_is_no_request_never_reaches_the_folder(do: Any, more: dict[str, Any], runs: Path) -> None:
    folder = lay(runs, "demo/one")
    with pytest.raises(UserError):
        steering.send(folder, do, **{"by": "ada", **more})
    assert not (folder / "requests").exists()


def test_silence_is_told_with_what_to_look_at(runs: Path) -> None:
    folder = lay(runs, "demo/one")
    id = steering.send(folder, LOWER, by="ada")
    with pytest.raises(UserError, match="demo/one is not running"):
        steering.wait(folder, id, seconds=0)
    with sole_writer(folder), pytest.raises(UserError, match="is running .* has not come to its next step"):
        steering.wait(folder, id, seconds=0.1)
    with pytest.raises(UserError, match="has no request 'other'"):
        steering.wait(folder, "other", seconds=0)
    (folder / "artifact").mkdir()
    with pytest.raises(UserError, match="is finished"):
        steering.wait(folder, id, seconds=0)


def test_an_answer_is_what_the_trainer_wrote(runs: Path) -> None:
    folder = lay(runs, "demo/one")
    id = steering.send(folder, LOWER, by="ada")
    assert steering.answer(folder, id) is None
    (folder / "answers").mkdir()
    (folder / f"answers/{id}.json").write_text(json.dumps({"state": "refused", "error": "no", "tick": 4}))
    assert steering.wait(folder, id, seconds=0)["error"] == "no"


# -- looking ----------------------------------------------------------------------------------------------------------


def test_controls_of_a_dead_stage_say_so_whatever_it_wrote_last(runs: Path) -> None:
    folder = lay(runs, "demo/one")
    (folder / "controls.json").write_text(json.dumps({"state": "paused", "tick": 7, "process": 1}))
    with sole_writer(folder):
        now = steering.controls(folder)
        assert (now["live"], now["state"], now["tick"], now["targets"]) == (True, "paused", 7, [])
    now = steering.controls(folder)
    assert (now["live"], now["state"]) == (False, "stopped")
    assert [one["kind"] for one in now["alerts"]] == ["ended"] and "about tick 7 without a word" in now["alerts"][0][
        "text"
    ]
    (folder / "error.txt").write_text("Traceback\nRuntimeError: boom\n")
    assert [(one["kind"], one["text"]) for one in steering.controls(folder)["alerts"]] == [
        ("failed", "RuntimeError: boom")
    ]


def test_a_stage_at_work_that_is_silent_for_long_is_said_to_be(runs: Path) -> None:
    folder = lay(runs, "demo/one")
    own = [{"kind": "spike", "tick": 5, "text": "it leapt", "grave": True}]
    for ago, kinds in ((20, ["spike"]), (200, ["silent", "spike"])):
        wrote = {"state": "running", "tick": 7, "written": time.time() - ago, "alerts": own}
        (folder / "controls.json").write_text(json.dumps(wrote))
        with sole_writer(folder):
            assert [one["kind"] for one in steering.controls(folder)["alerts"]] == kinds
    (folder / "controls.json").write_text(json.dumps({**wrote, "state": "stopped"}))
    assert steering.controls(folder)["alerts"] == own, "it was stopped by somebody, who knows"


def test_an_agent_that_died_is_missed_until_it_is_back_or_the_stage_ends(runs: Path) -> None:
    def missed() -> list[str]:
        return [one["text"] for one in steering.controls(folder)["alerts"] if one["kind"] == "agent"]

    folder = lay(runs, "demo/one")
    with sole_writer(folder):
        with Present(folder, "scout"):
            assert missed() == []
        assert missed() == []
        (folder / "agents/x.json").write_text('{"name": "scout", "failed": 0}')  # and nobody has locked it
        assert missed() == ["agent scout is gone: its process ended without a word"]
        with Present(folder, "kin"):
            assert len(missed()) == 1
        with Present(folder, "scout"):
            assert missed() == []
        (folder / "agents/x.json").write_text("{")
        assert missed() == ["agent ? is gone: its process ended without a word"]
    assert missed() == []


def test_the_log_joins_what_was_asked_with_what_became_of_it(runs: Path) -> None:
    folder = lay(runs, "demo/one")
    asked = {"by": "bot", "actor": "agent", "do": [{"do": "rollback", "to": 3}], "why": ""}
    effects, undo = [{"do": "set", "path": "optim.lr", "changes": []}], [{"do": "set", "path": "optim.lr", "to": 2.0}]
    write_journal(
        folder,
        {"id": "n0", "tick": 0, "by": "engine", "do": [{"do": "micro", "rows": 4}]},
        {"id": "a", "tick": 3, "by": "ada", "actor": "person", "do": LOWER, "why": "hot"},
        {"id": "n1", "tick": 3, "by": "engine", "do": [{"do": "applied", "id": "a", "effects": effects, "undo": undo}]},
        {
            "id": "n2",
            "tick": 4,
            "by": "engine",
            "do": [{"do": "refused", "id": "b", "request": asked, "why": "locked"}],
        },
        {
            "id": "n3",
            "tick": 5,
            "by": "engine",
            "do": [{"do": "waiting", "id": "c", "request": asked, "why": "approve"}],
        },
        {"id": "d", "tick": 6, "by": "ada", "actor": "person", "do": [{"do": "eval"}]},
    )
    (folder / "answers").mkdir()
    (folder / "answers/e.json").write_text(
        json.dumps({**asked, "state": "refused", "error": "no such path", "tick": 4})
    )
    found = {entry["id"]: entry for entry in steering.log(folder)}
    assert list(found) == ["a", "b", "e", "c", "d"]
    assert [entry["state"] for entry in found.values()] == ["applied", "refused", "refused", "waiting", "written"]
    assert found["a"]["effects"] == effects and found["a"]["undo"] == undo and found["a"]["why"] == "hot"
    assert found["b"]["by"] == "bot" and found["b"]["error"] == "locked" and found["b"]["tick"] == 4


def test_to_look_is_no_hindrance_to_who_begins(runs: Path) -> None:
    """A stage that starts while somebody looks at its lock gets it."""
    folder = lay(runs, "demo/one")
    looking = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time; f = open('{folder}/lock'); fcntl.flock(f, fcntl.LOCK_SH); "
         "print(flush=True); time.sleep(0.1); fcntl.flock(f, fcntl.LOCK_UN)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert looking.stdout is not None
    looking.stdout.readline()
    with sole_writer(folder):
        pass
    looking.wait()


def test_the_client_needs_no_torch() -> None:
    code = "import sys, tutelage.steering; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

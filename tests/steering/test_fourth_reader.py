"""What a fourth reader found, who repeated the faults of another program by running them here."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.steering.live import ONE, answer, ask, run
from tests.steering.test_second_reader import agent, one, source
from tests.toy import graph, numbers
from tutelage import asking, command, steering
from tutelage.base.errors import UserError
from tutelage.core import run as core_run
from tutelage.core import steer
from tutelage.core.run import run_graph
from tutelage.display import Display
from tutelage.server.page_words import spell


def test_a_source_that_joins_takes_its_share_of_a_mix_that_was_set(tmp_path: Path) -> None:
    """And keeps it when another that the mix names goes and comes back; a recipe's own mix gives it the share, too."""
    join = {"do": "add_source", "name": "c", "source": source(tmp_path), "weight": 0.5}
    looks = {
        2: [[("mix", ask({"do": "mix", "weights": {"a": 3, "b": 1}}))]],
        3: [[("join", ask(join))]],
        5: [[("drop", ask({"do": "drop_source", "name": "b"}))]],
        6: [[("back", ask({"do": "add_source", "name": "b"}))]],
        7: [[("own", ask({"do": "mix", "weights": {}}))]],
    }
    home = run(tmp_path, looks, change=one())
    assert {answer(home, name)["state"] for name in ("mix", "join", "drop", "back", "own")} == {"applied"}
    shares = {row["tick"]: row["weights"] for row in numbers(home, kind="train")}
    assert shares[3] == {"a": 0.75, "b": 0.25}
    assert shares[4] == shares[5] == shares[7] == pytest.approx({"a": 0.375, "b": 0.125, "c": 0.5})
    assert shares[6] == pytest.approx({"a": 3 / 7, "c": 4 / 7}, abs=1e-4) and shares[8]["c"] == 0.5
    last = numbers(home, kind="train")[-1]["cursors"]
    assert any(name.startswith("c") and cursor[0] for name, cursor in last.items()), "rows of it are drawn"


def test_a_source_that_comes_back_into_a_mix_without_it_is_told_so(tmp_path: Path) -> None:
    looks = {
        2: [[("drop", ask({"do": "drop_source", "name": "b"}))]],
        3: [[("mix", ask({"do": "mix", "weights": {"a": 1}}))]],
        4: [[("back", ask({"do": "add_source", "name": "b"}))]],
    }
    home = run(tmp_path, looks, change=one())
    assert answer(home, "back")["effects"][0]["changes"][0]["now"] == "back; the mix gives it nothing"


def test_what_is_looked_at_of_a_mix_after_a_source_that_joins_is_what_is_done(tmp_path: Path) -> None:
    join = {"do": "add_source", "name": "c", "source": source(tmp_path), "weight": 0.5}
    mix = {"do": "mix", "weights": {"a": 1, "b": 1, "c": 1}}
    looks = {
        2: [[("first", ask({"do": "mix", "weights": {"a": 3, "b": 1}}))]],
        3: [[("dry", ask(join, mix, dry=True)), ("both", ask(join, mix))]],
    }
    home = run(tmp_path, looks, change=one())
    dry, done = ([effect["changes"] for effect in answer(home, name)["effects"]] for name in ("dry", "both"))
    assert dry == done and done[1][0]["was"] == {"a": 3, "b": 1, "c": 4}


def blocked(place: Path, kind: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        place.write_text("not yours")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        away = place.parents[3] / "away"
        away.mkdir(exist_ok=True)
        place.symlink_to(away if kind == "link" else away / "nowhere")


@pytest.mark.parametrize("name", ["answers", "requests"])
@pytest.mark.parametrize("kind", ["file", "pipe", "link", "dangling"])
def test_what_lies_in_the_place_of_our_folders_is_put_aside(name: str, kind: str, tmp_path: Path) -> None:
    """It ends nothing, nothing is written through it, and it is still there."""
    home = tmp_path / ONE
    blocked(home / name, kind)
    run(tmp_path, {2: [[("note", ask({"do": "note", "text": "x"}))]]}, change=one())
    assert answer(home, "note")["state"] == "applied" and not (home / name).is_symlink()
    assert len(list(home.glob(f"{name}.aside-*"))) == 1 and not list((tmp_path / "runs").glob("away/*"))


def test_a_folder_in_the_place_of_an_answer_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / ONE / "answers/note.json/within").mkdir(parents=True)
    home = run(tmp_path, {2: [[("note", ask({"do": "note", "text": "x"}))]]}, change=one())
    assert answer(home, "note")["state"] == "applied"


@pytest.mark.parametrize("length", [100_000, 400_000])
def test_a_refusal_that_quotes_a_long_request_ends_nothing(length: int, tmp_path: Path) -> None:
    """Of a stage in a process of its own, which tells the one that shows it."""
    undo = {"do": "undo", "id": "a" * length}
    looks = {2: [[("long", ask(undo, dry=True)), ("robot", agent({"do": "set", "path": "b" * length, "to": 1}))]]}
    home = run(tmp_path, looks, change=one(), jobs=1)
    assert [answer(home, name)["state"] for name in ("long", "robot")] == ["refused", "refused"]
    assert all(len(answer(home, name)["error"]) < 5000 for name in ("long", "robot"))
    assert len(numbers(home, kind="train")) == 8


@pytest.mark.parametrize("text", ["[/red]", "[bold", "[link=x]", "[/]"])
def test_what_a_refusal_quotes_is_shown_as_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for plain in (True, False):
        with Display(Console(force_terminal=not plain, width=200, markup=False), peak=0.0) as display:
            display.tell("one", {"warning": f"request x refused: {text}"})
            display.tell("one", {"doing": f"reading {text}", "done": 1, "of": 2})
    assert capsys.readouterr().out.count(f"request x refused: {text}") == 2


def test_what_a_stage_tells_is_cut_and_heard_whole() -> None:
    ear, mouth = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    told: list[Any] = []
    try:
        mouth.send(json.dumps({"note": "x" * 100_000}).encode())
        child = core_run.Child(SimpleNamespace(name="one"), os.getpid(), ear)  # type: ignore[arg-type]
        core_run._hear(child, lambda stage, said: told.append((stage, len(said["note"]))))
    finally:
        ear.close()
        mouth.close()
    assert told == [("one", 100_000)]
    assert (
        len(core_run._brief("x" * 100_000)) < 4100 and core_run._brief("short") == "short" and core_run._brief(3) == 3
    )


@pytest.mark.parametrize(("field", "code"), [("stopped", 0), ("done", 0), ("failed", 1)])
def test_of_several_ranks_the_first_says_how_it_ended(
    field: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher ends all as soon as one of them is not content: the first would not come to its report."""

    def ended(graph: Any, *, result: Any, **how: Any) -> None:
        found = getattr(result, field)
        found.update(one="why") if isinstance(found, dict) else found.append("one")

    nothing: Any = SimpleNamespace(name="toy", recipe=SimpleNamespace(report_to=[], stages={}))
    monkeypatch.setattr(command, "graph_of", lambda *a, **k: nothing)
    monkeypatch.setattr(command.World, "join", staticmethod(lambda: SimpleNamespace(rank=1, size=2)))
    monkeypatch.setattr(command, "run_graph", ended)
    monkeypatch.setattr(command, "_peak_in_child", lambda: 0.0)
    how: Any = {"sets": [], "only": None, "jobs": 0, "reuse": False, "retrain": False}
    assert command.run_recipe(tmp_path / "toy.yaml", runs=tmp_path / "runs", **how) == code


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf", None])
@pytest.mark.parametrize("plain", [True, False])
def test_a_loss_that_is_no_number_is_shown(loss: Any, plain: bool) -> None:
    """As it comes from a stage in a process of its own: in words."""
    console = Console(file=io.StringIO(), force_terminal=not plain, width=200, markup=False)
    with Display(console, peak=1e9) as display:
        told = {"step": 3, "frac": 0.5, "loss": loss, "tokens_per_second": 10.0, "flops_per_second": 1e8, "left": 3.0}
        display.tell("one", {**told, "measured": {"bits_per_byte/a": loss or "nan"}})
        assert f"loss {float(loss or 'nan'):.3f}" in display.line(display.seen["one"])


@pytest.mark.parametrize("name", ["requests", "answers"])
@pytest.mark.parametrize("kind", ["file", "pipe", "link", "loop"])
def test_what_is_put_in_the_place_of_our_folders_at_work_is_put_aside(name: str, kind: str, tmp_path: Path) -> None:
    """Until then whoever asks is told so in one line."""
    home, seen = tmp_path / ONE, []

    def swapped(stage: Any) -> Any:
        place = home / name
        if stage.clock.tick == 3 and not seen:
            seen.append(shutil.rmtree(place, ignore_errors=True))
            place.symlink_to(place) if kind == "loop" else blocked(place, kind)
            with pytest.raises(UserError, match="puts it aside within a second"):
                steering.send(home, [{"do": "note", "text": "x"}], by="ada")
            steer.collect = collect
            stage.inbox.listed = 0
        return collect(stage)

    collect = steer.collect
    steer.collect = swapped
    try:
        made = graph(tmp_path, steps=8, change=one())
        assert not run_graph(made, only="one", jobs=0, drift="refuse", tell=lambda stage, said: None).failed
    finally:
        steer.collect = collect
    assert seen and (home / name).is_dir() and not (home / name).is_symlink()


def test_a_pattern_that_is_no_name_is_refused_before_it_is_compiled(tmp_path: Path) -> None:
    do = {"do": "freeze", "modules": ["*a" * 20_000]}
    home = run(tmp_path, {2: [[("long", ask(do))]]}, change=one(), steps=3)
    assert "at most 1000" in answer(home, "long")["error"]


@pytest.mark.parametrize("actor", ["person", "agent"])
@pytest.mark.parametrize("do", ["note", ["note"], [1, {"do": "set"}], {"do": "note"}, None, [{"do": "mix"}], [{}]])
def test_a_request_that_is_none_hides_nothing_of_the_log(do: Any, actor: str, tmp_path: Path) -> None:
    sound = ask({"do": "note", "text": "sound"})
    script = {2: [[("odd", {"by": "a", "actor": actor, "do": do}), ("sound", sound)]]}
    home = run(tmp_path, script, change=one(), steps=3)
    assert answer(home, "odd")["state"] == "refused"
    (home / "answers/foreign.json").write_text(json.dumps({"state": "refused", "do": do, "tick": "now"}))
    entries = steering.log(home)
    assert {entry["id"] for entry in entries} == {"odd", "sound", "foreign"}
    assert all(asking.logged(entry) and isinstance(spell(entry["do"]), str) for entry in entries)


def test_whoever_is_told_that_he_approved_finds_it_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to what waited is there before the answer to the approval."""
    order, write = [], steer.answer

    def noted(stage, request, *, state, **more):  # type: ignore[no-untyped-def]
        order.append((request["id"], state))
        write(stage, request, state=state, **more)

    monkeypatch.setattr(steer, "answer", noted)
    steering = {"agent": {"approve": ["end_stage"]}}
    looks = {
        2: [[("wish", agent({"do": "end_stage", "after": "2step"}))]],
        3: [[("yes", ask({"do": "approve", "id": "wish"}))]],
    }
    run(tmp_path, looks, change=one(steering=steering))
    assert order == [("wish", "waiting"), ("wish", "applied"), ("yes", "applied")]

"""Whatever lies in the folder of requests, the stage goes on, and its weights are those of the stage that nobody asked."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.steering.live import ONE, answer, ask, journal, run
from tests.toy import numbers
from tutelage import steering
from tutelage.base.errors import UserError
from tutelage.core import acts, inbox, steer
from tutelage.look import digest_of

HALF = "\\ud800"  # half of a surrogate pair: JSON allows it, UTF-8 has no bytes for it
NOTE = '[{"do":"note","text":"x"}]'
REFUSED: dict[str, str] = {
    "half-in-by": f'{{"by":"x{HALF}","do":{NOTE}}}',
    "half-in-why": f'{{"by":"x","why":"{HALF}","do":{NOTE}}}',
    "half-in-text": f'{{"by":"x","do":[{{"do":"note","text":"{HALF}"}}]}}',
    "half-in-prompt": f'{{"by":"x","do":[{{"do":"sample","prompt":"{HALF}"}}]}}',
    "half-in-key": f'{{"by":"x","do":[{{"do":"mix","weights":{{"{HALF}":1}}}}]}}',
    "half-in-sets": f'{{"by":"x","do":[{{"do":"branch","name":"b","sets":{{"a":"{HALF}"}}}}]}}',
    "half-in-do": f'{{"by":"x","do":[{{"do":"{HALF}"}}]}}',
    "deep": '{"by":"x","do":' + "[" * 900 + "]" * 900 + "}",
    "deep-sets": '{"by":"x","do":[{"do":"branch","name":"b","sets":{"a":' + "[" * 400 + "]" * 400 + "}}]}",
    "digits": '{"by":"x","do":[{"do":"set","path":"optim.lr","to":' + "9" * 4000 + "}]}",
    "no-actor": f'{{"by":"x","actor":["person"],"do":{NOTE}}}',
    "no-list": '{"by":"x","do":{"do":"note","text":"x"}}',
    "no-utf8": "\udcff\udcfe",
    "empty": "",
    "null": "null",
    "backwards": '{"by":"x","do":[{"do":"extend","until":"1step"}]}',
}
IGNORED: dict[str, Callable[[Path], Any]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "nowhere": lambda path: path.symlink_to("/nowhere/at/all"),
}


def test_what_is_no_request_is_refused_or_left_alone_and_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, home = steer.collect, tmp_path / "asked" / ONE

    def collected(stage: Any) -> Any:
        if stage.clock.tick == 2 and not (home / "requests/folder.json").exists():
            for name, text in REFUSED.items():
                (home / "requests" / f"{name}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
            for name, make in IGNORED.items():
                make(home / "requests" / f"{name}.json")
            with open(os.fsencode(home / "requests") + b"/\xff.json", "w") as file:
                file.write("{}")
            (home / "requests" / ("a" * 90 + ".json")).write_text("{}")
            (home / "requests" / "large.json").write_text(f'{{"by":"x","why":"{"x" * inbox.LARGEST}","do":{NOTE}}}')
        return collect(stage)

    plain = run(tmp_path / "plain")
    monkeypatch.setattr(steer, "collect", collected)
    assert run(tmp_path / "asked") == home
    states = {name: answer(home, name)["state"] for name in [*REFUSED, "large"]}
    assert states == dict.fromkeys([*REFUSED, "large"], "refused")
    assert {path.stem for path in (home / "requests").iterdir()} == set(IGNORED)
    assert [line for line in journal(home) if "actor" in line] == []
    assert digest_of(home) == digest_of(plain) and numbers(home) == numbers(plain)


def test_a_request_that_is_taken_back_while_it_is_read_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who waited long enough takes a request away just when its turn comes."""
    files, home = inbox.Inbox.files, tmp_path / ONE

    def taken(box: inbox.Inbox) -> list[Path]:
        found = files(box)
        for path in found:
            path.unlink()
        return found

    monkeypatch.setattr(inbox.Inbox, "files", taken)
    assert run(tmp_path, {2: [[("gone", ask({"do": "save"}))]]}) == home
    assert not (home / "answers").exists() and not journal(home, by="ada")


def test_a_sample_that_fails_says_so_and_the_stage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, plain = acts._sample, run(tmp_path / "plain")

    def broken(stage: Any, action: Any) -> Any:
        def fails(**asked: Any) -> Any:
            if asked["prompts"] == ["too long"]:
                raise IndexError("index out of range in self")
            return generate(**asked)

        generate, stage.view.generate = stage.view.generate, fails
        try:
            return sample(stage, action)
        finally:
            stage.view.generate = generate

    monkeypatch.setitem(acts.ACTS, "sample", (*acts.ACTS["sample"][:2], broken))
    cold = {"do": "sample", "prompt": "a", "tokens": 3, "temperature": 1e-300}
    script = {2: [[("long", ask({"do": "sample", "prompt": "too long"})), ("cold", ask(cold))]]}
    home = run(tmp_path / "asked", script)
    (effect,) = answer(home, "long")["effects"]
    assert (effect["text"], effect["failed"]) == ("", "IndexError: index out of range in self")
    (effect,) = answer(home, "cold")["effects"]
    assert "failed" not in effect
    assert digest_of(home) == digest_of(plain)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("why", ["\ud800", "\udcff"])
def test_a_client_is_told_before_it_sends_what_no_file_can_hold(why: str, tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(UserError, match="that a file can hold"):
        steering.send(tmp_path, [{"do": "note", "text": "x"}], by="ada", why=why)
    with pytest.raises(UserError):
        steering.send(tmp_path, [{"do": "set", "path": "optim.lr", "to": json.loads("9" * 4000)}], by="ada")
    assert not list(tmp_path.glob("requests/*"))


def test_a_folder_is_listed_when_it_changed_and_once_in_a_while_and_no_request_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "requests"
    box = inbox.Inbox(place)

    def listed(*, now: float, changed: float) -> bool:
        monkeypatch.setattr(time, "time_ns", lambda: int(now * inbox.SURE))
        os.utime(place, ns=(int(changed * inbox.SURE),) * 2)
        return box.files() == [place / "a.json"]

    assert box.files() == []  # no folder yet
    place.mkdir()
    (place / "a.json").touch()
    assert listed(now=100, changed=90) and not listed(now=100.1, changed=90)
    assert listed(now=100.2, changed=100.2)
    assert listed(now=100.25, changed=100.2)  # another may have come within one tick of the disk's clock
    assert listed(now=100.31, changed=100.2) and not listed(now=100.4, changed=100.2)
    assert listed(now=101.4, changed=100.2)  # nobody knows how late a disk elsewhere tells of its times
    place.rename(tmp_path / "old")
    place.mkdir()
    (place / "a.json").touch()
    assert listed(now=106, changed=100.2), "another folder in its place"

"""Asked to stop, short of disk, a damaged checkpoint, two at once: a clear word, and nothing made is lost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import forked
from tests.toy import graph, numbers
from tutelage.base.errors import UserError
from tutelage.core import artifact
from tutelage.core.record import sole_writer
from tutelage.core.run import STOPPED, run_graph
from tutelage.look import digest_of
from tutelage.modalities.text import toy


def command(folder: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "tutelage", "run", str(folder / "toy.yaml"), "--runs", str(folder / "runs"), *extra]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe long enough to be interrupted, and the digest of its whole run beside it."""
    folder = tmp_path_factory.mktemp("stop")
    made = toy.recipe(folder / "data", steps=60)
    made["stages"]["two"]["until"] = "10step"
    for stage in made["stages"].values():
        stage["save"] = {"every": "20step"}
    (folder / "toy.yaml").write_text(yaml.safe_dump(made))
    done = forked.run(command(folder, "--runs", str(folder / "whole")))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "digest").write_text(digest_of(folder / "whole/toy/two/1"))
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_stop_saves_says_how_to_go_on_and_goes_on(number: signal.Signals, recipe: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (tmp_path / "toy.yaml").write_text((recipe / "toy.yaml").read_text())
    begin = subprocess.Popen if number == signal.SIGTERM else forked.Forked  # one of them as a shell would
    with open(tmp_path / "said", "wb") as file:
        process = begin(command(tmp_path), stdout=file, stderr=file)
    metrics = runs / "toy/one/1/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 2_500):
        time.sleep(0.01)
    process.send_signal(number)
    code, said = process.wait(timeout=60), (tmp_path / "said").read_text()
    assert code == STOPPED, said
    assert "To go on: tutelage run" in said
    reached = len(numbers(runs / "toy/one/1", kind="train"))
    assert 0 < reached < 60
    assert int(artifact.states(runs / "toy/one/1/state")[-1].name) == reached
    again = forked.run(command(tmp_path))
    assert again.returncode == 0, again.stdout + again.stderr
    assert digest_of(runs / "toy/two/1") == (recipe / "digest").read_text()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path: Path) -> None:
    said: list[str] = []
    made = graph(tmp_path)
    run_graph(made, only="one", jobs=0, drift="refuse", tell=lambda stage, s: None)
    folder = tmp_path / "runs/toy/one/1"
    before = digest_of(folder)
    (folder / "artifact").rename(tmp_path / "gone")
    newest = artifact.states(folder / "state")[-1] / "model.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    result = run_graph(graph(tmp_path), only="one", jobs=0, drift="refuse", tell=lambda stage, s: said.append(str(s)))
    assert result.done == ["one"]
    assert any("damaged" in line and str(newest) in line for line in said)
    assert digest_of(folder) == before


def test_two_processes_on_one_stage_are_refused_by_name(tmp_path: Path) -> None:
    made = graph(tmp_path)
    with (
        sole_writer(tmp_path / "runs/toy/one/1"),
        pytest.raises(UserError, match=f"being written by process {os.getpid()}"),
    ):
        run_graph(made, only="one", jobs=0, drift="refuse", tell=lambda stage, s: None)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path: Path) -> None:
    """A real write that the system refuses: files may not grow beyond a few kilobytes."""
    run_graph(graph(tmp_path), only="one", jobs=0, drift="refuse", tell=lambda stage, s: None)
    before = digest_of(tmp_path / "runs/toy/one/1")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
            run_graph(graph(tmp_path), only=None, jobs=0, drift="refuse", tell=lambda stage, s: None)
        except UserError as error:
            code = 0 if "disk is full" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert digest_of(tmp_path / "runs/toy/one/1") == before
    result = run_graph(graph(tmp_path), only=None, jobs=0, drift="refuse", tell=lambda stage, s: None)
    assert result.reused == ["one"] and result.done == ["two"]

"""`python -m …` without its long start: forked from this process, which has imported everything already.

What such tests need of a command is a process of its own, to be signaled, killed and waited for. That it also starts by
itself is seen where a test leaves this out.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

FORK = multiprocessing.get_context("fork")


class Forked:
    """As much of `subprocess.Popen` as is asked of it here."""

    def __init__(self, command: list[str], *, stdout: Any, stderr: Any = None, **_: Any) -> None:
        """`command` is `[sys.executable, "-m", module, …]`; it gets the file for all that it says."""
        assert command[:2] == [sys.executable, "-m"], command
        self._process = FORK.Process(target=_become, args=(command[2:], stdout.fileno(), (stderr or stdout).fileno()))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; of one that a signal ended, the negative number of that."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with its output captured, as text."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        code = Forked(command, stdout=out, stderr=said).wait()
        for file in (out, said):
            file.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), said.read())


SUBPROCESS = SimpleNamespace(Popen=Forked, run=run, DEVNULL=subprocess.DEVNULL)  # in place of a module's `subprocess`


def _become(command: list[str], out: int, said: int) -> None:
    """Be that command: its words, its files, a session of its own, signals as a shell gives them."""
    os.setsid()
    os.dup2(out, 1)
    os.dup2(said, 2)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module, *sys.argv[1:] = command
    sys.argv[0] = module
    runpy.run_module(module, run_name="__main__", alter_sys=False)

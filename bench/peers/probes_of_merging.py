"""What both sides of merging.py look with: a tensor's digest and a process's memory (Linux). It imports nothing of ours."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def resident(key: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def apart(work: Callable[[], None]) -> int:
    """Do the work in a child that has imported all there is, and return the bytes that it added at its peak.

    What its parent freed is given back first, or the work would find room that is not counted.
    """
    reading, writing = os.pipe()
    ctypes.CDLL(None).malloc_trim(0)
    child = os.fork()
    if not child:
        try:
            before = resident("VmRSS")
            work()
            os.write(writing, str(resident("VmHWM") - before).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    if os.waitpid(child, 0)[1]:
        sys.exit("the merge failed, see above")
    with os.fdopen(reading) as found:
        return int(found.read())

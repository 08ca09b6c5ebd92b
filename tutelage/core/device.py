"""Where a stage computes: its device, and what the promise of same bits and the pace of a step ask of it."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import torch

from tutelage.base.errors import UserError
from tutelage.core import memory
from tutelage.core.graph import Node


def device_of(node: Node) -> torch.device:
    """A stage's device; sets what the promise of same bits and the pace of a step need."""
    engine = node.stage.engine
    if engine.device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    else:
        device = torch.device(engine.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"stages.{node.name}.engine.device: no CUDA device here; leave it out or write cpu")
    if engine.compile and node.stage.until is not None:
        can_compile(node.name, device)
    memory.hold()
    if device.type == "cuda" and engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(engine.deterministic, warn_only=device.type == "cuda")
    # Filling finds errors; it adds nothing to the promise. (The module is swapped for a class that has the property.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if engine.threads:
        torch.set_num_threads(engine.threads)
    return device


def can_compile(stage: str, device: torch.device) -> None:
    """Say in one line what `compile` lacks here, before the data are read; torch says it in pages at the first step."""
    from torch._inductor import cpp_builder, exc
    from torch.utils._triton import has_triton

    lacks = ""
    if device.type == "cuda":
        lacks = "" if has_triton() else "Triton, and it is not installed: pip install triton"
    elif not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        lacks = "Python's headers on a CPU, and Python.h is not there: install the package python3-dev or python3-devel"
    else:
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            lacks = "a C++ compiler on a CPU, and none was found: install g++ (or name another in the variable CXX)"
    if lacks:
        raise UserError(f"stages.{stage}.engine.compile: torch.compile needs {lacks}, or leave `compile` out")


def autocast_of(precision: str, device: torch.device) -> torch.dtype | None:
    """bf16 only where the hardware has it: on a CPU without it, it is many times slower."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16":
        return torch.bfloat16
    return torch.bfloat16 if precision == "auto" and native else None

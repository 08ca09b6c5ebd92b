"""Transformations of checkpoints: merging tensor by tensor, growing. Reads and writes safetensors, never a live model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Method
from tutelage.core.artifact import save_tensors
from tutelage.core.randomness import generator, seed_of

SHARD = 1 << 30  # bytes of tensors held at a time


class Weights:
    """A folder's tensors, opened one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(str(path), framework="pt") as read:
                self.files |= dict.fromkeys(read.keys(), path)
        if not self.files:
            raise UserError(f"{folder} holds no safetensors weights")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(str(self.files[name]), framework="pt") as read:
            return read.get_tensor(name)


@dataclass(frozen=True)
class Site:
    """The view of a hook that transforms weights: there is no model yet, but there is chance of its own."""

    seed: int
    stage: str  # without its arm

    def rng(self, purpose: str) -> torch.Generator:
        """A CPU generator that depends on seed, stage and purpose only, whatever was merged before."""
        return generator(seed_of(self.seed, self.stage, 0, purpose))


def transform(
    method: Method, folders: list[Path], out: Path, *, place: str, seed: int = 0, stage: str = "applied"
) -> None:
    """Fill `out` with what a method's `tensor` or `grow` hook makes of the starts, config and tokenizer beside it."""
    copy_beside(folders[0], out)
    if "tensor" in method.hooks():
        merge(method, folders, out, Site(seed, stage), place=place)
        return
    if "grow" not in method.hooks():
        raise UserError(
            f"{place}.apply: {method.name()} does not transform weights; it has neither `tensor` nor `grow`"
        )
    if len(folders) != 1:
        raise UserError(f"{place}.start: {method.name()} grows one model (here {len(folders)})")
    weights = Weights(folders[0])
    config = json.loads((folders[0] / "config.json").read_text(encoding="utf-8"))
    config, tensors = method.grow(config, {name: weights[name] for name in weights})
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_tensors(out / "model.safetensors", tensors)


def copy_beside(folder: Path, out: Path) -> None:
    """Everything in a model folder but its weights."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)


def merge(method: Method, folders: list[Path], out: Path, site: Site, *, place: str) -> None:
    """One tensor at a time, in shards, so that peak memory does not grow with the model."""
    inputs = [Weights(folder) for folder in folders]
    names = list(inputs[0])
    for other in inputs[1:]:
        odd = sorted(set(names) ^ set(other))
        if odd:
            raise UserError(
                f"{place}.start: {folders[0]} and {other.folder} do not hold the same tensors: {odd[0]} is in one only"
            )
    held: dict[str, Tensor] = {}
    index: dict[str, str] = {}
    shards = size = total = 0

    def flush() -> None:
        nonlocal held, shards, size
        shards += 1
        file = f"model-{shards:05d}.safetensors"
        save_tensors(out / file, held)
        index.update(dict.fromkeys(held, file))
        held, size = {}, 0

    for name in names:
        result = merge_one(method, name, [weights[name] for weights in inputs], site, place=place)
        held[name] = result
        size += result.nbytes
        total += result.nbytes
        if size >= SHARD:
            flush()
    if held:
        flush()
    if shards == 1:
        (out / "model-00001.safetensors").rename(out / "model.safetensors")
    else:
        whole: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": index}
        (out / "model.safetensors.index.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")


def merge_one(method: Method, name: str, tensors: list[Tensor], site: Site, *, place: str) -> Tensor:
    """One merged tensor, in the first input's type. The first start is the base where the method wants one."""
    if any(t.shape != tensors[0].shape for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise UserError(f"{place}.start: {name} has different shapes ({shapes}); models that merge have one shape")
    if not tensors[0].is_floating_point():
        return tensors[0]
    exact = [t.to(torch.float32) for t in tensors]
    base, rest = (exact[0], exact[1:]) if method.wants_base else (None, exact)
    return method.tensor(name, rest, base, site).to(tensors[0].dtype)

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
from tutelage.core.types import Layout

SHARD = 1 << 30  # bytes of tensors held at a time
TOLERANCE = 1e-5  # of a grown model's answers beside its start's, where the method keeps the function


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
    """The view of a `grow` hook: chance of its own, and how the model of any configuration is laid out."""

    seed: int
    stage: str

    def rng(self, purpose: str) -> torch.Generator:
        return generator(seed_of(self.seed, self.stage, 0, purpose))

    def layout(self, config: dict[str, Any]) -> Layout:
        """See `core.layout.layout`."""
        from tutelage.core.layout import layout  # transformers' models take seconds to import, and merging needs none

        return layout(config)


def transform(
    method: Method, folders: list[Path], out: Path, *, place: str, seed: int = 0, stage: str = "grown"
) -> None:
    """Fill `out` with what a method's `tensor` or `grow` hook makes of the starts, config and tokenizer beside it."""
    copy_beside(folders[0], out)
    if "tensor" in method.hooks():
        merge(method, folders, out, place=place)
        return
    if "grow" not in method.hooks():
        raise UserError(
            f"{place}.apply: {method.name()} does not transform weights; it has neither `tensor` nor `grow`"
        )
    if len(folders) != 1:
        raise UserError(f"{place}.start: {method.name()} grows one model (here {len(folders)})")
    weights = Weights(folders[0])
    config = json.loads((folders[0] / "config.json").read_text(encoding="utf-8"))
    config, tensors = method.grow(config, {name: weights[name] for name in weights}, Site(seed, stage))
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_tensors(out / "model.safetensors", tensors)
    if method.keeps_function():
        same_answers(folders[0], out, by=method.name(), place=place)


@torch.no_grad()
def same_answers(small: Path, large: Path, *, by: str, place: str) -> None:
    """Refuse a grown model that answers otherwise than its start, in the largest difference beside the largest answer."""
    from tutelage.core.layout import open_whole

    answers = []
    for folder in (small, large):
        model = open_whole(folder)
        vocab = model.get_input_embeddings().num_embeddings
        answers.append(model(input_ids=(torch.arange(8) * 7919 % vocab)[None])[0])
    own = Weights(small)
    kinds = {t.dtype for t in (own[name] for name in own) if t.is_floating_point()}
    bound = max([TOLERANCE, *(8 * torch.finfo(kind).eps for kind in kinds)])
    apart = float((answers[0] - answers[1]).abs().max() / answers[0].abs().max())
    if not apart <= bound:
        raise UserError(
            f"{place}.apply: the model that {by} made answers otherwise than its start (by {apart:.1g} of the largest "
            "answer); this kind of model depends on its width in a way that the method does not know"
        )


def copy_beside(folder: Path, out: Path) -> None:
    """Everything in a model folder but its weights."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)


def merge(method: Method, folders: list[Path], out: Path, *, place: str) -> None:
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
        result = merge_one(method, name, [weights[name] for weights in inputs], place=place)
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


def merge_one(method: Method, name: str, tensors: list[Tensor], *, place: str) -> Tensor:
    """One merged tensor, in the first input's type. The first start is the base where the method wants one."""
    if any(t.shape != tensors[0].shape for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise UserError(f"{place}.start: {name} has different shapes ({shapes}); models that merge have one shape")
    if not tensors[0].is_floating_point():
        return tensors[0]
    exact = [t.to(torch.float32) for t in tensors]
    base, rest = (exact[0], exact[1:]) if method.wants_base else (None, exact)
    return method.tensor(name, rest, base).to(tensors[0].dtype)

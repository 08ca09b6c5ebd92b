"""Transformations of checkpoints: merging tensor by tensor, growing. Reads and writes safetensors, never a live model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.base.method import Method
from tutelage.base.spec import Stage
from tutelage.base.values import unbound
from tutelage.core.artifact import About, read_header, save_tensors, write_tensors
from tutelage.core.randomness import generator, seed_of
from tutelage.core.types import Layout

SHARD = 4 << 30  # bytes of tensors in a file
TOLERANCE = 1e-5  # of a grown model's answers beside its start's, where the method keeps the function


class Weights:
    """A folder's tensors, opened one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.about: dict[str, About] = {}
        for path in sorted(folder.glob("*.safetensors")):
            found = read_header(path)
            self.files |= dict.fromkeys(found, path)
            self.about |= found
        if not self.files:
            raise UserError(f"{folder} holds no safetensors weights")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(str(self.files[name]), framework="pt") as read:
            return read.get_tensor(name)


@dataclass(frozen=True, eq=False)
class Site:
    """The view of a hook that transforms weights: no model yet, but chance of its own, and how any model is laid out."""

    seed: int
    stage: str  # without its arm
    names: tuple[str, ...] = ()  # of all tensors that are merged
    inputs: tuple[Weights, ...] = ()  # the starts, a base among them
    configs: tuple[dict[str, Any], ...] = ()  # of each

    def read(self, i: int, name: str) -> Tensor:
        """A tensor of one of the starts, in float32."""
        return self.inputs[i][name].to(torch.float32)

    def tokens(self, i: int) -> dict[str, int]:
        """The tokens of a start's tokenizer, those added to it among them, and the row that each has."""
        from tokenizers import Tokenizer

        place = self.inputs[i].folder / "tokenizer.json"
        if not place.exists():
            raise UserError(f"{place.parent} has no tokenizer.json to read tokens from")
        return dict(Tokenizer.from_file(str(place)).get_vocab(with_added_tokens=True))

    def per_token(self, config: dict[str, Any]) -> tuple[str, ...]:
        """See `core.layout.per_token`."""
        from tutelage.core.layout import per_token

        return per_token(config)

    def rng(self, purpose: str) -> torch.Generator:
        """A CPU generator that depends on seed, stage and purpose only, whatever was merged before."""
        return generator(seed_of(self.seed, self.stage, 0, purpose))

    def layout(self, config: dict[str, Any]) -> Layout:
        """See `core.layout.layout`."""
        from tutelage.core.layout import layout  # transformers' models take seconds to import, and merging needs none

        return layout(config)


def check(name: str, stage: Stage, methods: Any) -> None:
    """Refuse, before anything is made, a merge that fits on data where these are missing or do not suit it."""
    entry = unbound(stage).apply
    method = registry.make(entry, place=f"stages.{name}.apply") if entry is not None else None
    if method is None or "fit" not in method.hooks():
        return
    if not stage.data:
        raise UserError(f"stages.{name}.data: {method.name()} fits on data; name what it reads here")
    try:
        method.suits(len(stage.start) if isinstance(stage.start, list) else 1, list(stage.data))
    except UserError as error:
        raise UserError(f"stages.{name}.{error}") from error


def transform(
    method: Method, folders: list[Path], out: Path, *, place: str, seed: int = 0, stage: str = "applied"
) -> None:
    """Fill `out` with what a method's `tensor` or `grow` hook makes of the starts, config and tokenizer beside it."""
    if len(folders) <= method.tokenizer_of:
        raise UserError(f"{place}.start: {method.name()} takes {method.takes} models; here is one alone")
    copy_beside(folders[method.tokenizer_of], out)
    if "tensor" in method.hooks():
        merge(method, folders, out, Site(seed, stage), place=place)
        return
    if "grow" not in method.hooks():
        raise UserError(
            f"{place}.apply: {method.name()} does not transform weights; it has neither `tensor` nor `grow`"
        )
    if len(folders) != (method.takes or 1):
        what = f"takes {method.takes} models" if method.takes else "grows one model"
        raise UserError(f"{place}.start: {method.name()} {what} (here {len(folders)})")
    inputs, configs = tuple(map(Weights, folders)), tuple(map(_config, folders))
    first = {name: inputs[0][name] for name in inputs[0]}
    config, tensors = method.grow(configs[0], first, Site(seed, stage, inputs=inputs, configs=configs))
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


def merge(method: Method, folders: list[Path], out: Path, site: Site, *, place: str) -> None:
    """One tensor at a time, read and written, so that peak memory hangs on the largest tensor and not on the model."""
    inputs = alike(method, folders, place=place)
    names = list(inputs[0])
    about = inputs[0].about
    wide = {name: about[name].size // max(1, math.prod(about[name].shape)) for name in names}  # bytes of an entry
    site = replace(site, names=tuple(names), inputs=tuple(inputs), configs=tuple(map(_config, folders)))
    names.sort(key=lambda name: -wide[name])  # so that each begins at a multiple of its entries' size
    shards = sharded({name: about[name].size for name in names})
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = ((n, merge_one(method, n, [weights[n] for weights in inputs], site)) for n in shard)
        write_tensors(out / file, {name: about[name] for name in shard}, tensors)
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(about[name].size for name in names)
        whole: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": index}
        (out / "model.safetensors.index.json").write_text(json.dumps(whole, indent=2), encoding="utf-8")


def alike(method: Method, folders: list[Path], *, place: str) -> list[Weights]:
    """The starts of a merge. UserError where there are too many or too few, or they do not hold the same tensors."""
    if method.takes not in (None, len(folders)):
        raise UserError(f"{place}.start: {method.name()} takes {method.takes} models; here are {len(folders)}")
    inputs = [Weights(folder) for folder in folders]
    for other in inputs[1:]:
        odd = sorted(set(inputs[0]) ^ set(other))
        if odd:
            raise UserError(
                f"{place}.start: {folders[0]} and {other.folder} do not hold the same tensors: {odd[0]} is in one only"
            )
    for name in inputs[0]:
        found = [weights.about[name].shape for weights in inputs]
        if any(shape != found[0] for shape in found):
            shapes = ", ".join(str(tuple(shape)) for shape in found)
            raise UserError(f"{place}.start: {name} has different shapes ({shapes}); models that merge have one shape")
    return inputs


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def sharded(sizes: dict[str, int]) -> list[list[str]]:
    """Names in order, as many in a file as fit into SHARD bytes (at least one)."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    return shards


def merge_one(method: Method, name: str, tensors: list[Tensor], site: Site) -> Tensor:
    """One merged tensor, in the first input's type. The first start is the base where the method wants one."""
    if not tensors[0].is_floating_point():
        return tensors[0]
    exact = [t.to(torch.float32) for t in tensors]
    base, rest = (exact[0], exact[1:]) if method.wants_base else (None, exact)
    return method.tensor(name, rest, base, site).to(tensors[0].dtype)

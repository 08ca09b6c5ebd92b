"""What a stage leaves on disk: checkpoints to resume from and the artifact. Each is whole or absent; nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.core.record import disk_errors, dumps, sync


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside `folder`, sync all of it, and rename: readers see it whole or not at all."""
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        with disk_errors(folder):
            write(beside)
            for path in sorted(beside.rglob("*")):
                sync(path)
            sync(beside)
            if folder.exists():
                old = folder.with_name(f".{folder.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                os.rename(folder, old)
                os.rename(beside, folder)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(beside, folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def sweep(folder: Path) -> None:
    """Clear away what a killed writer left half-done; what it had only moved aside goes back. The folder is ours."""
    beside = ("", "state/", "picked/", "fit/")
    for path in [path for place in beside for path in folder.glob(f"{place}.*")]:
        whole = path.with_name(path.name[1:].removesuffix(".old"))
        if path.name.endswith(".old") and not whole.exists():
            os.rename(path, whole)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each tied tensor once."""
    state = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    unique = {}
    for name, tensor in state.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor.detach()
    return unique


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors and read the header back; anything that is not a tensor is refused by name."""
    wrong = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f"not a tensor, so not saved in {path.name}: {', '.join(wrong)}")
    copies = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    pointers: dict[int, str] = {}
    for name, value in copies.items():  # safetensors refuses shared storage
        if value.numel() and pointers.setdefault(value.data_ptr(), name) != name:
            copies[name] = value.clone()
    try:
        save_file(copies, str(path))
    except SafetensorError as error:  # it hides the system's error in its text
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), str(error)) if number else error) from error
    with safe_open(str(path), framework="pt") as read:
        assert set(read.keys()) == set(copies)


class About(NamedTuple):
    """A tensor in a safetensors file, as the header names it; `size` in bytes."""

    dtype: str
    shape: list[int]
    size: int


def read_header(path: Path) -> dict[str, About]:
    """What is in a safetensors file, without reading it; a damaged one is a UserError that names it."""
    try:
        with safe_open(str(path), framework="pt"):  # the library's checks, which read the header alone
            pass
        with open(path, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from error
    header.pop("__metadata__", None)
    return {n: About(e["dtype"], e["shape"], e["data_offsets"][1] - e["data_offsets"][0]) for n, e in header.items()}


def write_tensors(path: Path, about: dict[str, About], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write safetensors one tensor at a time, in `about`'s order; the library's own writer wants all of them at once.

    Raises AssertionError for a tensor whose name, shape or size in bytes is not as announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, size) in about.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (wanted, (_, shape, size)), (name, tensor) in zip(about.items(), tensors, strict=True):
            assert (name, list(tensor.shape), tensor.nbytes) == (wanted, shape, size), f"{name} is not as announced"
            stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    assert read_header(path) == about


def load_tensors(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file; a truncated one is a UserError that names it."""
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as read:
            return {name: read.get_tensor(name) for name in read.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short: {error}") from error


def flatten(tree: dict[str, Any], *, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split nested dicts into tensors and scalars by `/`-joined path. Anything else is refused by name."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if "/" in str(key):  # it would come back as a dict
            raise TypeError(f"a key in a method's state holds no '/'; '{path}' does")
        if isinstance(value, Tensor):
            tensors[path] = value
        elif isinstance(value, dict) and not value:
            scalars[f"{path}/"] = None  # nothing in it, and yet it is there
        elif isinstance(value, dict):
            inner, plain = flatten(value, prefix=path + "/")
            tensors |= inner
            scalars |= plain
        elif value is None or isinstance(value, (bool, int, float, str)):
            scalars[path] = value
        else:
            raise TypeError(f"a method's state holds tensors and numbers only; '{path}' is a {type(value).__name__}")
    return tensors, scalars


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parts, last = path.split("/")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        if last:
            node[last] = value
    return tree


MARKS = {"kept": None, "undo": 3}  # marks that hold a checkpoint back from going, and how many of the newest they hold


def save_state(
    folder: Path,
    *,
    tick: int,
    tensors: dict[str, dict[str, Tensor]],
    facts: dict[str, Any],
    keep: int,
    mark: str | None = None,
) -> Path:
    """Write one checkpoint `folder/<tick>`, then drop all but the `keep` newest and those that a mark holds."""
    place = folder / f"{tick:09d}"
    marks = {name for name in MARKS if (place / name).exists()} | ({mark} if mark else set())

    def write(beside: Path) -> None:
        for name, group in tensors.items():
            save_tensors(beside / f"{name}.safetensors", group)
        (beside / "state.json").write_text(dumps({**facts, "tick": tick, "files": sorted(tensors)}), encoding="utf-8")
        for name in marks:
            (beside / name).touch()

    publish(place, write)
    held: set[Path] = set()
    for name, count in MARKS.items():
        marked = [path for path in states(folder) if (path / name).exists()]
        held |= set(marked if count is None else marked[-count:])
    for old in states(folder)[:-keep]:
        if old not in held:
            shutil.rmtree(old, ignore_errors=True)
    return place


def mark_state(folder: Path, *, tick: int, mark: str) -> None:
    """Hold a checkpoint back from going."""
    (folder / f"{tick:09d}" / mark).touch()


def states(folder: Path) -> list[Path]:
    """The checkpoints of a stage, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*") if (path / "state.json").exists()) if folder.exists() else []


def whole(place: Path) -> bool:
    """Whether a checkpoint can be read, as far as its files' headers tell."""
    try:
        for name in json.loads((place / "state.json").read_text(encoding="utf-8"))["files"]:
            read_header(place / f"{name}.safetensors")
    except (UserError, OSError, ValueError, LookupError, TypeError):
        return False
    return True


def load_state(place: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint whole. UserError when it is damaged."""
    try:
        facts = json.loads((place / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{place / 'state.json'} is damaged: {error}") from error
    return {name: load_tensors(place / f"{name}.safetensors") for name in facts["files"]}, facts


def newest_state(
    folder: Path, *, warn: Callable[[str], None]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest checkpoint that can be read; damaged ones are passed over and named."""
    for place in reversed(states(folder)):
        try:
            return load_state(place)
        except UserError as error:
            warn(f"{error}; going back to the checkpoint before it")
    return None


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of name."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def digest_folder(folder: Path) -> str:
    """SHA-256 of the weights in a folder of safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no safetensors weights")
    return digest(item for path in files for item in load_tensors(path).items())

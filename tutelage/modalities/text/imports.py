"""Where a source's records come from: files, or an importer whose records are first written down as lines.

`stdlib:…`, `hub:` and `use:` have no files of their own. Their records are spooled to JSON lines beside the stores,
so that everything after this page reads files: in parallel, by byte ranges, and again after a cut.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.registry import CODE
from tutelage.base.spec import SourceSpec
from tutelage.core.record import disk_errors, sync
from tutelage.modalities.text import read
from tutelage.modalities.text.tables import short

Records = Callable[[Path | None], Iterable[dict[str, Any]]]  # given a cache folder, the records


def importer(spec: SourceSpec, *, split: str = "train") -> tuple[str, Records] | None:
    """Label and records of a source that is imported, None for one that is made of files."""
    if isinstance(spec.path, str) and spec.path.startswith("stdlib:"):
        name = spec.path

        def standard(cache: Path | None) -> Iterable[dict[str, Any]]:
            from tutelage.modalities.text import stdlib

            return stdlib.records(name, "train" if split == "train" else "val", cache=cache)

        return name, standard
    if spec.path is not None:
        if isinstance(spec.path, str) and _saved_to_disk(Path(spec.path).expanduser()):
            folder = spec.path
            return folder, lambda _: _data_set(folder, spec.args)
        return None
    if spec.hub:
        hub = spec.hub
        return hub, lambda _: _data_set(hub, spec.args)
    if spec.use:
        use = spec.use
        return use, lambda _: _generated(use, spec.args)
    raise UserError("a source made by a stage is read from that stage's rows; run the stage first")


def files_of(
    spec: SourceSpec, *, cache: Path, rows: Path | Iterable[dict[str, Any]] | None = None, split: str = "train"
) -> tuple[list[read.File], list[str]]:
    """The files to read and notes for the report. Imported records are spooled under `cache`.

    `rows` is a stage's data folder or its records; it takes the place of the spec's origin.
    """
    if isinstance(rows, Path):
        lines = rows / "rows.jsonl"
        return read.find(str(lines if lines.exists() else rows))
    if rows is not None:
        return [spool("rows", rows, cache)], []
    found = importer(spec, split=split)
    if found is None:
        assert spec.path is not None
        return read.find(spec.path)
    label, records = found
    return [spool(label, records(cache), cache)], []


def content_id(spec: SourceSpec, *, rows: Path | None = None) -> str:
    """Hash of a source's content. Names of files and folders stay out; their order and kinds enter."""
    if rows is None and isinstance(spec.path, str) and spec.path.startswith("stdlib:"):
        from tutelage.modalities.text import stdlib

        return hash_of(["stdlib", stdlib.fingerprint(spec.path)])
    if rows is None and importer(spec) is not None:
        return _imported_id(spec.model_dump_json(include={"path", "hub", "use", "args"}))
    return files_id(files_of(spec, cache=Path(), rows=rows)[0])


def files_id(files: list[read.File]) -> str:
    """Hash of what files hold."""
    return hash_of([[file.kind, file.zip, file.size, read.digest(file)] for file in files])


def hash_of(value: Any) -> str:
    """Hash of a JSON-able value."""
    return hashlib.blake2b(orjson.dumps(value, option=orjson.OPT_SORT_KEYS), digest_size=12).hexdigest()


@lru_cache(maxsize=64)
def _imported_id(spec: str) -> str:
    label, records = importer(SourceSpec.model_validate_json(spec)) or ("", lambda _: ())
    whole = hashlib.blake2b(digest_size=12)
    for line in _dumped(label, records(None)):
        whole.update(line)
    return whole.hexdigest()


def spool(label: str, records: Iterable[dict[str, Any]], cache: Path) -> read.File:
    """Write records down as JSON lines under a name made of their content."""
    folder = cache / "spool"
    beside = folder / f".{os.getpid()}-{hash_of(label)}"
    whole = hashlib.blake2b(digest_size=12)
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as stream:
                for line in _dumped(label, records):
                    whole.update(line)
                    stream.write(line)
            place = folder / f"{whole.hexdigest()}.jsonl"
            sync(beside)
            os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)
    return read.File(place, label, "spool", "", place.stat().st_size)


def _dumped(label: str, records: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Records as lines; what cannot be written down becomes a line that is reported as malformed."""
    for record in _guarded(label, records):
        if not isinstance(record, dict):
            line = orjson.dumps({"__bad__": f"is {read.kind_of(record)} where a record (dict) is expected"})
        else:
            try:
                line = orjson.dumps(record, default=str, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
            except (TypeError, ValueError) as error:
                line = orjson.dumps({"__bad__": f"cannot be written as JSON ({short(error)})"})
        yield line + b"\n"


def _guarded(label: str, records: Iterable[Any]) -> Iterator[Any]:
    """The records; an error of a generator of the user's names it and the record."""
    number = 0
    try:
        for record in records:
            yield record
            number += 1
    except UserError:
        raise
    except Exception as error:
        where = f"{label}, after record {number}"
        raise UserError(f"{where}: the generator failed ({type(error).__name__}: {short(error)})") from error


def _saved_to_disk(place: Path) -> bool:
    """Whether `datasets` wrote this folder (`save_to_disk`)."""
    return (place / "dataset_dict.json").exists() or (
        (place / "state.json").exists() and (place / "dataset_info.json").exists()
    )


def _data_set(name: str, args: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import datasets

    place = Path(name).expanduser()
    args = dict(args)
    split = args.pop("split", None)
    try:
        if _saved_to_disk(place):
            found = datasets.load_from_disk(str(place))
        else:
            config = args.pop("name", None)
            if args:
                raise UserError(f"{name}: args of a data set are name and split, not {', '.join(sorted(args))}")
            found = datasets.load_dataset(name, config, split=split)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: `datasets` cannot load it ({type(error).__name__}: {short(error)})") from error
    if isinstance(found, dict):
        split = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
        if split not in found:
            hint = did_you_mean(split, found)
            raise UserError(f"{name}: there is no split '{split}'{hint} (there are {', '.join(found)})")
        found = found[split]
    yield from found


def _generated(use: str, args: dict[str, Any]) -> Iterable[dict[str, Any]]:
    module, _, name = use.partition(":")
    if not CODE.fullmatch(use):
        raise UserError(f"use: {use}: write the generator as package.module:Class")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"use: {use}: cannot import '{module}' ({short(error)})") from error
    if not hasattr(found, name):
        raise UserError(f"use: {use}: '{module}' has no '{name}'{did_you_mean(name, vars(found))}")
    try:
        made = getattr(found, name)(**args)
    except TypeError as error:
        raise UserError(f"use: {use}: does not take these args ({short(error)})") from error
    if not isinstance(made, Iterable):
        raise UserError(f"use: {use}: its instances are not iterable; give the class an __iter__ that yields dicts")
    return made

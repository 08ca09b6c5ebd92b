"""Pictures and texts on disk: pictures in one memory-mapped array, texts as lines for the text modality's store.

    <cache>/pairs/<mark>/   images.bin ([N, 3, S, S] uint8 or float32), train.jsonl, val.jsonl (texts, each with the
                            number of its picture), meta.json

A record's text holds `<image>` once, where its picture belongs; without one it is put before the text.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.core import artifact, hashes
from tutelage.modalities.pair.images import Unusable, pixels
from tutelage.modalities.text import imports, read
from tutelage.modalities.text.fields import Shape, shape_of
from tutelage.modalities.text.read import Bad, Record

NUMERICS = 1  # raised by hand when the same records would give another store
TOKEN = "<image>"
PICTURE = ("image", "images")  # a record's field of the picture; a list holds one
PLACES = 20  # malformed records that a report names
Told = Callable[[float, float], None]


@dataclass
class Store:
    """An opened folder of pictures and texts."""

    mark: str
    folder: Path
    meta: dict[str, Any]
    images: np.ndarray = field(repr=False)  # [N, 3, S, S]

    @classmethod
    def open(cls, folder: Path) -> Store:
        meta = orjson.loads((folder / "meta.json").read_bytes())
        shape = (meta["images"], 3, meta["side"], meta["side"])
        images = (
            np.memmap(folder / "images.bin", meta["dtype"], "r", shape=shape) if meta["images"] else np.zeros(shape)
        )
        return cls(folder.name, folder, meta, images)


def open_or_make(
    name: str,
    spec: SourceSpec,
    share: float,
    processor: Any,
    *,
    cache: Path,
    progress: Told | None = None,
    rows: Path | None = None,
) -> Store:
    """The store of a source; made by one process while another waits."""
    side = int(processor.image_processor.crop_size["height"])
    settings = {k: v for k, v in processor.image_processor.to_dict().items() if k in ("size", "crop_size", "resample")}
    mark = imports.hash_of(
        [NUMERICS, content_id(spec, rows=rows), spec.field, share, side, orjson.dumps(settings, default=dict).decode()]
    )
    final = cache / "pairs" / mark
    if not (final / "meta.json").exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.parent / f".{mark}.lock", "w", encoding="utf-8") as lock:
            with contextlib.suppress(OSError):  # where a file system has no locks both make it
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (final / "meta.json").exists():
                maker = _Maker(name, spec, share, processor, side, rows, progress)
                artifact.publish(final, maker.write)
    held = Store.open(final)
    if spec.bad == "fatal" and held.meta["malformed"]:
        raise UserError(f"data.{name}: {held.meta['places'][0]}; mend the record or write `bad: skip`")
    return held


@dataclass
class _Maker:
    """Writes a store: every picture once, texts apart in what is learned and what is held out."""

    name: str
    spec: SourceSpec
    share: float
    processor: Any
    side: int
    rows: Path | None
    progress: Told | None
    numbers: dict[bytes, int] = field(default_factory=dict)  # of pictures, by content
    dtype: str = ""
    keys: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    malformed: int = 0

    def write(self, folder: Path) -> None:
        """Fill the folder."""
        every = _records(self.spec, rows=self.rows, told=self.progress)
        head = list(islice(every, 100))
        bare = [r._replace(data=_without_picture(r.data)) for r in head if isinstance(r, Record)]
        shape = shape_of(self.name, self.spec, bare)
        with open(folder / "images.bin", "wb") as pictures, open(folder / "all.jsonl", "wb") as lines:
            for record in chain(head, every):
                try:
                    if isinstance(record, Bad):
                        raise Unusable(str(record))
                    lines.write(orjson.dumps(self._row(record, shape, pictures)) + b"\n")
                except Unusable as error:
                    self.malformed += 1
                    where = "" if isinstance(record, Bad) else f"{record.file} {record.unit} {record.line}: "
                    self.bad = [*self.bad, f"{where}{error}"][:PLACES]
        if not self.keys:
            first = f": {self.bad[0]}" if self.bad else ""
            raise UserError(f"data.{self.name}: no record of it can be used{first}")
        self._split(folder)
        meta = {"numerics": NUMERICS, "images": len(self.numbers), "side": self.side, "dtype": self.dtype or "uint8"}
        meta |= {"kind": shape.kind, "field": shape.fields[0], "malformed": self.malformed, "places": self.bad}
        (folder / "meta.json").write_bytes(orjson.dumps(meta, option=orjson.OPT_INDENT_2))

    def _row(self, record: Record, shape: Shape, pictures: BinaryIO) -> dict[str, Any]:
        """A record for the text store: its text with the picture's place marked, and the picture's number."""
        value = _picture(record.data)
        data = marked(_without_picture(record.data), shape, has=value is not None)
        number = -1
        if value is not None:
            folder = self.rows or Path(record.file).parent
            number = self._kept(
                pixels(value, folder=folder, side=self.side, processor=self.processor.image_processor), pictures
            )
        self.keys.append(
            int.from_bytes(hashlib.blake2b(orjson.dumps([number, data]), digest_size=8).digest(), "little")
        )
        about = {"pixels": number} | ({"picture": value} if isinstance(value, str) else {})
        return {**data, **about, "from": {"file": record.file, "line": record.line}}

    def _kept(self, image: np.ndarray, pictures: BinaryIO) -> int:
        self.dtype = self.dtype or image.dtype.name
        if image.dtype.name != self.dtype:
            raise Unusable(f"image is {image.dtype.name}, the source's first is {self.dtype}; keep these apart")
        mark = hashlib.blake2b(image.data, digest_size=16).digest()
        if mark not in self.numbers:
            self.numbers[mark] = len(self.numbers)
            pictures.write(image.data)
        return self.numbers[mark]

    def _split(self, folder: Path) -> None:
        """Held out by content of text and picture together; at least one pair on each side."""
        keys = np.array(self.keys, np.uint64)
        held = keys < np.uint64(min(self.share * 2**64, 2**64 - 1))
        if self.share > 0 and len(set(self.keys)) > 1:
            held = held if held.any() else keys == keys.min()
            held = held if not held.all() else keys != keys.max()
        with (
            open(folder / "all.jsonl", "rb") as lines,
            open(folder / "train.jsonl", "wb") as train,
            open(folder / "val.jsonl", "wb") as val,
        ):
            for line, out in zip(lines, held, strict=True):
                (val if out else train).write(line)
        (folder / "all.jsonl").unlink()


# -- records ----------------------------------------------------------------------------------------------------------


def _records(spec: SourceSpec, *, rows: Path | None, told: Told | None = None) -> Iterator[Record | Bad]:
    """The records of a source, pictures and all."""
    if rows is None and spec.hub:
        raise UserError("pairs are read from files or a generator; save the hub's data set as Parquet first")
    found = imports.importer(spec) if rows is None else None
    if found is not None:
        label, records = found
        for i, data in enumerate(records(None), 1):
            yield Record(label, i, data) if isinstance(data, dict) else Bad(label, i, "is no record (dict)", "record")
        return
    files = [file for file in imports.files_of(spec, cache=Path(), rows=rows)[0] if file.kind != "document"]
    if not files:
        raise UserError(f"{spec.path or rows}: no JSONL, CSV or Parquet file of records with `image` and `text`")
    done, total = 0, sum(file.size for file in files)
    for block in read.blocks(files):
        yield from read.records(block)
        done += block.size
        if told:
            told(done, total)


def texts_of(spec: SourceSpec, *, rows: Path | None) -> Iterable[str]:
    """The texts of a source alone, for training a tokenizer on them."""
    shape = None
    for record in _records(spec, rows=rows):
        if isinstance(record, Record):
            data = _without_picture(record.data)
            shape = shape or shape_of("", spec, [record._replace(data=data)])
            with contextlib.suppress(Unusable):
                found = marked(data, shape, has=False)
                said = (
                    [m["content"] for m in found[shape.fields[0]]]
                    if shape.kind == "chat"
                    else [found[f] for f in shape.fields]
                )
                yield "\n".join(part for part in said if isinstance(part, str))


def _picture(data: dict[str, Any]) -> Any:
    value = next((data[key] for key in PICTURE if data.get(key) is not None), None)
    if isinstance(value, list) and not (value and isinstance(value[0], (list, int, float))):
        if len(value) > 1:
            raise Unusable(f"has {len(value)} pictures; a pair has one")
        return value[0] if value else None
    return value


def _without_picture(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in PICTURE}


def marked(data: dict[str, Any], shape: Shape, *, has: bool) -> dict[str, Any]:
    """The record with `<image>` once in its text (in the prompt, in the first message of the user) if it `has` one."""
    where = shape.fields[0]
    if shape.kind == "chat":
        turns = [_spelled(turn) for turn in data.get(where) or [] if isinstance(turn, dict)]
        count = sum(turn["content"].count(TOKEN) for turn in turns)
        if has and not count and turns:
            first = next((t for t in turns if t.get("role") in ("user", "human")), turns[0])
            first["content"] = f"{TOKEN}\n{first['content']}"
        data = {**data, where: turns}
    else:
        text = data.get(where)
        if not isinstance(text, str):
            raise Unusable(f"has no field '{where}' of text")
        count = sum(value.count(TOKEN) for key in shape.fields if isinstance(value := data.get(key), str))
        if has and not count:
            data = {**data, where: f"{TOKEN}{text}" if shape.kind == "text" else f"{TOKEN}\n{text}"}
    if count > has:
        raise Unusable(f"its text holds {TOKEN} {count} times, and it has {'one picture' if has else 'no picture'}")
    return data


def _spelled(turn: dict[str, Any]) -> dict[str, Any]:
    """A message with its content as one string; parts of type `image` become the token."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [TOKEN if isinstance(p, dict) and p.get("type") == "image" else (p or {}).get("text") for p in content]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(role, str) or not isinstance(content, str):
        raise Unusable("a message is not {role: …, content: …}")
    return {"role": role, "content": content}


# -- what is in a source ----------------------------------------------------------------------------------------------


def content_id(spec: SourceSpec, *, rows: Path | None = None) -> str:
    """Hash of a source's records and of the pictures that they name."""
    found = imports.content_id(spec, rows=rows)
    if rows is None and imports.importer(spec) is not None:
        return found  # a generator's arrays are in its records
    total = hashlib.blake2b(found.encode(), digest_size=12)
    for record in _records(spec, rows=rows):
        value = next((record.data.get(key) for key in PICTURE), None) if isinstance(record, Record) else None
        for one in value if isinstance(value, list) else [value]:
            if isinstance(record, Record) and isinstance(one, str):
                place = (rows or Path(record.file).parent) / one
                if place.is_file():
                    total.update(bytes.fromhex(hashes.digest(place)))
    return total.hexdigest()

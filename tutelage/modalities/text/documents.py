"""Records as documents, for stages that rewrite data: what is learned from, without what is held out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.core.types import Document
from tutelage.modalities.text import imports, read, store
from tutelage.modalities.text.fields import Content, Shape, content_of, shape_of
from tutelage.modalities.text.read import Bad, File, Record
from tutelage.modalities.text.source import said


class Opened(NamedTuple):
    """A source ready to be read: where, how, and below which key a document is held out."""

    files: list[File]
    shape: Shape
    limit: float
    fatal: bool


class Documents:
    """The documents of sources, in order, one source after another; may be gone through again.

    `specs` holds, by name, a source and the data folder of the stage it names, if it names one. Imported records are
    written down under `cache`. Held-out records, empty and malformed ones are left out. Raises UserError for a
    malformed record where these are fatal, and for a document that is one file with a share of it held out: its end
    could not be told apart afterwards.
    """

    def __init__(self, specs: dict[str, tuple[SourceSpec, Path | None]], *, cache: Path) -> None:
        self._opened = {name: _opened(name, spec, rows, cache) for name, (spec, rows) in specs.items()}

    def __iter__(self) -> Iterator[Document]:
        for name, opened in self._opened.items():
            for block in read.blocks(opened.files):
                for record in read.records(block):
                    content = content_of(record, opened.shape) if isinstance(record, Record) else record
                    if isinstance(content, Bad) and opened.fatal:
                        raise UserError(f"data.{name}: {content}; mend the record or write `bad: skip`")
                    if isinstance(record, Record) and isinstance(content, Content) and content.key() >= opened.limit:
                        yield Document(said(content), _row(name, record))


def _opened(name: str, spec: SourceSpec, rows: Path | None, cache: Path) -> Opened:
    files, _ = imports.files_of(spec, cache=cache, rows=rows)
    # a standard source has held-out documents of its own, which are another source's
    share = 0.0 if str(spec.path).startswith("stdlib:") else store.held_out(name, spec)[0]
    if share and len(files) == 1 and files[0].kind == "document":
        raise UserError(
            f"data.{name}: one document is held out by its end, which a rewriting stage cannot; give val: 0"
        )
    return Opened(files, shape_of(name, spec, read.peek(files)), share * 2**64, spec.bad == "fatal")


def _row(name: str, record: Record) -> dict[str, Any]:
    """The record as it was, with where it comes from; what an earlier stage wrote of that stays."""
    origin = {"source": name, "file": record.file, record.unit: record.line}
    return {"origin": origin, **record.data}

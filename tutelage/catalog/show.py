"""`tutelage papers`: rows of the catalog with their derived status, listed or whole. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from tutelage import claims
from tutelage.base import card, registry
from tutelage.base.errors import UserError
from tutelage.catalog import rows
from tutelage.catalog.rows import STATUSES, Row
from tutelage.core import stats
from tutelage.core.words import amount

MEASURED = ("effect seen", "opposite", "no effect", "inconclusive")
TITLE = 60  # characters of a title in the list


@dataclass
class Standing:
    """What was measured of methods, read when a row first asks for it."""

    found: dict[str, tuple[str, dict[str, Any] | None]] | None = None
    read: Callable[[], dict[str, tuple[str, dict[str, Any] | None]]] = field(default=claims.standing)

    def all(self) -> dict[str, tuple[str, dict[str, Any] | None]]:
        """Status and entry of every method that has a bench."""
        if self.found is None:
            self.found = self.read()
        return self.found

    def of(self, method: str) -> tuple[str, dict[str, Any] | None] | None:
        """Status and entry of a method that has a bench, else None."""
        return self.all().get(method)

    def status(self, row: Row) -> str:
        """One of STATUSES: what covers the row first decides."""
        if not row.covered_by:
            return "open"
        found = self.of(row.leader) if row.leader else None
        return found[0] if found else "runs"


# -- a row ------------------------------------------------------------------------------------------------------------


def section(row: Row, standing: Standing, *, link: Callable[[str], str] = "`{}`".format) -> str:
    """A row whole, in Markdown; `link` makes of what covers it how it is written."""
    about = [row.kind, row.axis, row.modality, *([f"arXiv:{row.arxiv}"] if row.arxiv else [])]
    lines = [f"## {row.id}. {row.title}", "", f"{' · '.join(about)} · **{standing.status(row)}**", ""]
    lines += [f"- **What the software must do**: {row.mechanism}", f"- **Claim**: {row.claim}"]
    lines += [f"- **Claimed at**: {row.scale}"] if row.scale else []
    lines += ["- **Covered by**: nothing yet"] if not row.covered_by else ["- **Covered by**:"]
    lines += [f"  - {link(name)}: {_here(name, standing)}" for name in row.covered_by]
    return "\n".join([*lines, ""])


def _here(name: str, standing: Standing) -> str:
    """What something that covers a row is, how it is run, and what was measured of it."""
    if name.startswith("tutelage "):
        return f"a command; `{name} --help`"
    if name.startswith("recipes/"):
        return f"`tutelage run {name}`"
    if name.startswith("bench/"):
        return f"`python -m {name.removesuffix('.py').replace('/', '.')}`"
    what = card.read(registry.path_of(name)).title
    found = standing.of(name)
    if found is None:
        return f"{what}; `tutelage methods {name}`"
    return f"{what}; {_measured(name, *found)}; `tutelage bench {name}`"


def _measured(name: str, status: str, entry: dict[str, Any] | None) -> str:
    """`**effect seen**: forgetting/prose -0.0882 [-0.0996, -0.0769], 5 seeds, at 1.07 M parameters and 1.20 M tokens; …`"""
    if entry is None:
        return f"**{status}**"
    seen = stats.shown(claims.difference(entry), digits=4)
    better = f"{entry['metric']} ({entry['better']} is better) {seen}"
    here = f"{amount(entry['scale']['parameters'])} parameters and {amount(entry['scale']['tokens'])} tokens"
    paper = claims.scale(name, entry)
    return f"**{status}**: {better}, at {here}" + (f" ({paper})" if paper else "")


# -- the list ---------------------------------------------------------------------------------------------------------


def line(row: Row, status: str) -> str:
    """Id, title shortened, axis, modality, kind, status."""
    title = row.title if len(row.title) <= TITLE else row.title[: TITLE - 1].rstrip() + "…"
    return f"{row.id:>3}  {title:<{TITLE}}  {row.axis:<11} {row.modality:<15} {row.kind:<12} {status}"


def papers_command(
    words: Sequence[str],
    *,
    axis: str | None = None,
    kind: str | None = None,
    modality: str | None = None,
    status: str | None = None,
    console: Console,
) -> None:
    """Print the rows of these ids whole, or list those that hold all words and pass the filters."""
    standing = Standing()
    if words and all(word.isdecimal() for word in words):
        chosen = [rows.row(int(word)) for word in words]
        console.print("\n".join(section(row, standing) for row in chosen), soft_wrap=True, markup=False)
        return
    rows.known("status", status, STATUSES)
    found = rows.search(words, axis=axis, kind=kind, modality=modality)
    listed = [(row, standing.status(row)) for row in found]
    listed = [(row, is_) for row, is_ in listed if status in (None, is_)]
    if not listed:
        given = {"axis": axis, "kind": kind, "modality": modality, "status": status}
        asked = [*map(repr, words), *(f"{key} {value}" for key, value in given.items() if value)]
        raise UserError(f"no paper has {', '.join(asked)}; `tutelage papers` lists all")
    for row, is_ in listed:
        console.print(line(row, is_), soft_wrap=True, markup=False)
    console.print(f"{len(listed)} of {len(rows.rows())} papers: {counts(is_ for _, is_ in listed)}", soft_wrap=True)


def counts(statuses: Iterable[str]) -> str:
    """`1 effect seen, 6 not run, 509 open`"""
    found = list(statuses)
    return ", ".join(f"{found.count(name)} {name}" for name in STATUSES if name in found)

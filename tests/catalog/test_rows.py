"""The catalog's rows: whole, found by words and filters, and true to what is in the house."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from tutelage.base import card, registry
from tutelage.base.errors import UserError
from tutelage.catalog import rows
from tutelage.catalog.rows import AXES, Kind, Row
from tutelage.claims import ROOT
from tutelage.cli import app

ONE = """
- id: 1
  title: "Anchors: a study"
  kind: study
  axis: continual
  modality: text
  mechanism: Hold on.
  claim: 3 points.
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "papers.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# -- the file ---------------------------------------------------------------------------------------------------------


def test_there_is_a_row_for_each_of_the_516_papers() -> None:
    found = rows.rows()
    assert [row.id for row in found] == list(range(1, 517))
    assert len({row.title for row in found}) == 516
    assert {row.axis for row in found} <= set(AXES) and {row.kind for row in found} == set(get_args(Kind))
    assert all(row.mechanism.endswith(".") and row.claim.endswith(".") for row in found)


def test_most_claims_are_figures() -> None:
    """Of those who ran something: what has no figure in its paper's summary says what was found."""
    assert sum(bool(re.search(r"\d", row.claim)) for row in rows.rows()) > 280


def test_an_unknown_key_is_refused_with_its_row_and_the_right_spelling(tmp_path: Path) -> None:
    assert rows.read(written(tmp_path, ONE))[0].covered_by == ()
    with pytest.raises(UserError, match=r"papers.yaml, row 1: no key 'coverd_by'; did you mean 'covered_by'\?"):
        rows.read(written(tmp_path, ONE + "  coverd_by: [grow/stack]\n"))
    with pytest.raises(UserError, match="row 1: no key 'status'"):
        rows.read(written(tmp_path, ONE + "  status: open\n"))


def test_a_wrong_value_and_a_second_row_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 1: kind: Input should be 'method', 'study'"):
        rows.read(written(tmp_path, ONE.replace("kind: study", "kind: essay")))
    with pytest.raises(UserError, match="two rows with id 1"):
        rows.read(written(tmp_path, ONE + ONE))


def test_rows_are_the_same_without_the_c_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n- ".join(rows.FILE.read_text(encoding="utf-8").split("\n- ")[:40])
    monkeypatch.delattr(rows.yaml, "CSafeLoader")
    assert rows.read(written(tmp_path, text)) == rows.rows()[:39]


# -- what covers them -------------------------------------------------------------------------------------------------


def missing(name: str) -> bool:
    """Whether something that is to cover a row is not there."""
    if name.startswith("tutelage "):
        return name.removeprefix("tutelage ") not in get_command(app).commands  # type: ignore[attr-defined]
    if name.startswith(("recipes/", "bench/")):
        return not (ROOT / name).is_file()
    return name not in registry.names()


def test_whatever_covers_a_row_is_there() -> None:
    assert [(row.id, name) for row in rows.rows() for name in row.covered_by if missing(name)] == []


@pytest.mark.parametrize("name", ["tutelage stear", "recipes/none.yaml", "bench/none.py", "grow/stak", "grow"])
def test_what_is_not_there_is_seen(name: str) -> None:
    assert missing(name)


def unclaimed(method: str, paper: str, among: tuple[Row, ...]) -> list[int]:
    """Ids of rows whose paper a method's card names though they do not name the method.

    A paper is known by its arXiv number. By the name before a title's colon, too (GaLore), unless the method covers some
    other row: two papers may call different things alike. A card that begins with "none" or says that the rule is the
    project's own has no paper, and speaks of others' in passing.
    """
    if paper.startswith(("none", "a rule of this project's")):
        return []
    named = set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", paper))
    words = set(re.findall(r"[\w-]+", paper))
    covers = {row.id for row in among if method in row.covered_by}
    found = []
    for row in among:
        head = re.match(r"([\w-]+)[:!]", row.title)
        if row.id not in covers and (row.arxiv in named or (head and head[1] in words and not covers)):
            found.append(row.id)
    return found


@pytest.mark.parametrize("method", registry.names())
def test_a_method_of_a_catalogs_paper_is_named_in_its_row(method: str) -> None:
    paper = card.read(registry.path_of(method)).fields["Paper"]
    missed = unclaimed(method, paper, rows.rows())
    assert missed == [], f"add `covered_by: [{method}]` to these rows of {rows.FILE.name}, and run `make docs`"


def test_a_method_without_its_row_is_seen() -> None:
    stacked = rows.row(60)
    bare = stacked.model_copy(update={"covered_by": ()})
    paper = card.read(registry.path_of("grow/stack")).fields["Paper"]
    assert unclaimed("grow/stack", paper, (stacked,)) == []
    assert unclaimed("grow/stack", paper, (bare,)) == [60]
    galore = rows.row(69).model_copy(update={"covered_by": ()})
    assert unclaimed("optim/galore", "Zhao et al. 2024 (GaLore)", (bare, galore)) == [69]
    assert unclaimed("optim/galore", "Zhao et al. 2024", (bare, galore)) == []
    assert unclaimed("steer/own", "a rule of this project's; see Du et al. 2024, arXiv:2405.15319", (bare,)) == []


# -- finding them -----------------------------------------------------------------------------------------------------


def test_rows_are_found_by_all_words_in_any_case_and_by_filters() -> None:
    assert [row.id for row in rows.search(["GALORE", "8-bit", "subspace"])] == [69]
    assert 512 in {row.id for row in rows.search(["continual/replay"])}
    found = rows.search(axis="merge", kind="method", modality="text")
    assert found and {(row.axis, row.kind, row.modality) for row in found} == {("merge", "method", "text")}
    assert rows.search(["no such thing"]) == []


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("axis", "continul", "no axis 'continul'; did you mean 'continual'?"),
        ("kind", "surveys", "no kind 'surveys'; did you mean 'survey'?"),
        ("modality", "txt", "no modality 'txt'; did you mean 'text'?"),
        ("kind", "zzz", "no kind 'zzz'; there are: method, study"),
    ],
)
def test_a_wrong_filter_is_answered_with_the_right_spelling(key: str, value: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        rows.search(**{key: value})


def test_a_row_that_is_not_there_says_which_there_are() -> None:
    assert rows.row(60).title.startswith("Stacking")
    with pytest.raises(UserError, match="no paper 517; they go from 1 to 516"):
        rows.row(517)

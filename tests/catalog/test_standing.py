"""How far each paper is: derived from what covers it, shown by the command and in the generated pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.test_bench import entry
from tutelage import claims
from tutelage.base.errors import UserError
from tutelage.catalog import pages, rows, show
from tutelage.catalog.rows import Row
from tutelage.catalog.show import Standing
from tutelage.cli import app

SEEN = [-0.5, -0.51, -0.49, -0.5, -0.52]


def changed(number: int, patch: pytest.MonkeyPatch, **more: Any) -> None:
    """The catalog with one row other than it is."""
    made = tuple(row.model_copy(update=more) if row.id == number else row for row in rows.rows())
    patch.setattr(rows, "rows", lambda: made)


def standing(**found: str) -> Standing:
    """Verdicts by method, `/` written as `__`."""
    return Standing({name.replace("__", "/"): (status, None) for name, status in found.items()})


# -- the status -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("covered_by", "status"),
    [
        ((), "open"),
        (("grow/stack",), "opposite"),
        (("grow/stack", "recipes/bench/grow.yaml"), "opposite"),
        (("recipes/bench/grow.yaml", "grow/stack"), "runs"),  # what comes first decides
        (("objective/causal_lm", "grow/stack"), "runs"),  # it has no bench
        (("bench/agents.py",), "runs"),
        (("tutelage steer",), "runs"),
    ],
)
def test_a_status_is_that_of_what_covers_the_row_first(covered_by: tuple[str, ...], status: str) -> None:
    row = rows.row(60).model_copy(update={"covered_by": covered_by})
    assert standing(grow__stack="opposite").status(row) == status


def test_every_status_is_one_of_the_list() -> None:
    here = Standing()
    found = {row.id: here.status(row) for row in rows.rows()}
    assert set(found.values()) <= set(rows.STATUSES)
    assert found[227] == "runs"
    assert {row.id for row in rows.rows() if not row.covered_by} == {n for n, is_ in found.items() if is_ == "open"}


def test_open_rows_ask_for_no_verdict() -> None:
    def read() -> Any:
        raise AssertionError("nothing is to be read")

    assert Standing(read=read).status(rows.row(60).model_copy(update={"covered_by": ()})) == "open"


# -- a claim that changed ---------------------------------------------------------------------------------------------


def test_a_verdict_is_stale_when_the_catalogs_claim_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claims.append(entry("grow/stack", SEEN), results=tmp_path)
    assert claims.verdicts(tmp_path)["grow/stack"] == "effect seen"
    with monkeypatch.context() as patch:
        changed(60, patch, mechanism="Said in other words.", scale="1 T parameters")
        assert claims.verdicts(tmp_path)["grow/stack"] == "effect seen", "the claim is the same"
    with monkeypatch.context() as patch:
        changed(60, patch, claim="Twice as fast.")
        assert claims.verdicts(tmp_path)["grow/stack"] == "stale"
    with monkeypatch.context() as patch:
        changed(60, patch, covered_by=())
        assert claims.verdicts(tmp_path)["grow/stack"] == "stale", "the measured claim is no longer there"


def test_a_row_that_came_after_the_measurement_leaves_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = claims.version("grow/stack")
    assert set(now) == {"code", "claim", "recipe", "paper 60"}
    before = {key: value for key, value in now.items() if not key.startswith("paper")}
    claims.append(entry("grow/stack", SEEN, version=before), results=tmp_path)
    assert claims.verdicts(tmp_path)["grow/stack"] == "effect seen"
    changed(60, monkeypatch, claim="Twice as fast.")
    assert claims.verdicts(tmp_path)["grow/stack"] == "effect seen"


def test_only_the_method_that_leads_a_row_measures_its_claim() -> None:
    assert rows.row(5).leader == "schedule/rewarm" and "schedule/rewarm" in rows.row(512).covered_by
    assert "paper 5" in claims.version("schedule/rewarm")
    assert "paper 512" not in claims.version("schedule/rewarm")


def test_the_catalogs_scale_goes_before_the_benchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = entry("grow/stack", SEEN)
    assert claims.scale("grow/stack", made) == "7 B"
    changed(60, monkeypatch, scale="at 3 T parameters")
    assert claims.scale("grow/stack", made) == "at 3 T parameters"
    claims.append(made, results=tmp_path)
    assert "| at 3 T parameters |" in claims.index_text(tmp_path)


# -- the command ------------------------------------------------------------------------------------------------------


def said(*words: str) -> str:
    done = CliRunner().invoke(app, ["papers", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_papers_are_listed_a_line_each_with_their_status() -> None:
    lines = said().splitlines()
    assert len(lines) == 517 and lines[-1].startswith("516 of 516 papers: ")
    fields = ["60", "Stacking Your Transformers", "grow", "text", "study"]
    assert all(word in lines[59] for word in fields)
    assert max(map(len, lines)) <= 120


def test_filters_and_words_narrow_the_list() -> None:
    found = said("--axis", "steer", "--status", "runs").splitlines()
    assert (
        {"227", "345"} <= {line.split()[0] for line in found[:-1]} < {str(row.id) for row in rows.search(axis="steer")}
    )
    assert found[-1] == f"{len(found) - 1} of 516 papers: {len(found) - 1} runs"
    assert [line.split()[0] for line in said("8-bit", "subspace").splitlines()[:-1]] == ["69"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--axis", "continul"), "did you mean 'continual'"),
        (("--status", "opne"), "no status 'opne'; did you mean 'open'"),
        (("xyzzy", "--kind", "study"), "no paper has 'xyzzy', kind study"),
        (("0",), "no paper 0"),
    ],
)
def test_what_cannot_be_found_is_one_line(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        said(*words)


def test_a_row_is_shown_whole_with_what_was_measured(tmp_path: Path) -> None:
    claims.append(entry("grow/stack", SEEN), results=tmp_path)
    text = show.section(rows.row(60), Standing(read=lambda: claims.standing(tmp_path)))
    for part in (
        "## 60. Stacking Your Transformers", "study · grow · text · arXiv:2405.15319 · **effect seen**",
        f"- **What the software must do**: {rows.row(60).mechanism}", f"- **Claim**: {rows.row(60).claim}",
        "`grow/stack`: Growth operators in depth and width; **effect seen**: bits_per_byte/a (lower is better) -0.5040 [",
        "5 seeds", "at 1.10 M parameters and 1.20 M tokens (7 B); `tutelage bench grow/stack`",
    ):  # fmt: skip
        assert part in text


def test_several_ids_are_shown_one_after_the_other() -> None:
    text = said("227", "1")
    assert text.index("## 227.") < text.index("## 1.")
    assert "Covered by**: nothing yet" in show.section(rows.row(1).model_copy(update={"covered_by": ()}), Standing({}))
    assert "`tutelage run recipes/steer/too-hot.yaml`" in text and "`python -m bench.agents`" in text


# -- the pages --------------------------------------------------------------------------------------------------------


def test_the_generated_pages_are_up_to_date() -> None:
    folder, here = claims.ROOT / "docs" / "papers", Standing()
    made = pages.pages(here)
    assert {path.name for path in folder.iterdir()} == set(made)
    old = [name for name, text in made.items() if (folder / name).read_text(encoding="utf-8") != text]
    assert old == [], "run `make docs`"
    readme = (claims.ROOT / "README.md").read_text(encoding="utf-8")
    assert pages.in_readme(readme, here) == readme, "run `make docs`"


def test_every_row_is_on_its_axis_page_and_every_link_leads_somewhere() -> None:
    made = pages.pages(Standing())
    for row in rows.rows():
        assert f"## {row.id}. {row.title}\n" in made[f"{row.axis}.md"]
    folder = claims.ROOT / "docs" / "papers"
    links = {part.split(")")[0] for text in made.values() for part in text.split("](")[1:]}
    assert {"../methods/grow/stack.md", "../../bench/agents.py"} <= links
    assert [link for link in links if not (folder / link).exists()] == []


def test_pages_count_what_is_covered_and_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = rows.row(281).model_copy(update={"covered_by": ()})
    few = (rows.row(60), bare, rows.row(227))  # two to grow, one of them covered; one steered, with no bench
    monkeypatch.setattr(rows, "rows", lambda: few)
    here = standing(grow__stack="no effect")
    assert pages.tally(list(few), here) == (3, 2, 1)
    assert "| [grow](docs/papers/grow.md) | 2 | 1 | 1 |" in pages.coverage(here)
    assert "Of 3 papers: 1 no effect, 1 runs, 1 open." in pages.pages(here)["README.md"]
    assert pages.tally(list(few), standing(grow__stack="stale")) == (3, 2, 0)


def test_only_the_readmes_sections_are_written_and_old_pages_go(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "papers"
    folder.mkdir()
    (folder / "gone.md").write_text("old", encoding="utf-8")
    begins, ends = ({name: mark.format(name) for name in pages.SECTIONS} for mark in (pages.BEGIN, pages.END))
    parts = [f"{begins[name]}\nold\n{ends[name]}\n" for name in ("coverage", "verdicts")]
    readme.write_text("between\n".join(["before\n", *parts, "after\n"]), encoding="utf-8")
    pages.write(folder, readme=readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\nbetween\n{begins['coverage']}\nPapers that the project is to cover: 516.")
    assert f"|\n{ends['coverage']}\nbetween\n{begins['verdicts']}\n- **" in text
    assert text.endswith(f"\n{ends['verdicts']}\nbetween\nafter\n") and "\nold\n" not in text
    assert not (folder / "gone.md").exists() and (folder / "rl.md").exists()
    readme.write_text("no section", encoding="utf-8")
    with pytest.raises(UserError, match="README.md has no section between"):
        pages.write(folder, readme=readme)


def test_every_verdict_has_a_line_with_its_methods_the_greatest_difference_first() -> None:
    def entry(metric: str, mean: float) -> dict[str, Any]:
        difference = {"mean": mean, "low": mean, "high": mean, "p": 0.0}
        return {"metric": metric, "better": "lower", "differences": [mean], "difference": difference}

    found = {
        "grow/stack": ("effect seen", entry("bits_per_byte/prose", -0.0123)),
        "mix/fixed": ("not run", None),
        "optim/muon": ("effect seen", entry("bits_per_byte/code", -0.5)),
        "param/lora": ("opposite", entry("forgetting", 1.0)),
        "steer/plateau": ("stale", entry("forgetting", 1.0)),
    }
    assert pages.verdicts(Standing(found)).splitlines() == [
        "- **2 effect seen**. bits_per_byte (lower is better): [optim/muon](docs/methods/optim/muon.md) −0.500, "
        "[grow/stack](docs/methods/grow/stack.md) −0.012",
        "- **1 opposite**. forgetting (lower is better): [param/lora](docs/methods/param/lora.md) +1.000",
        "- **1 stale**. [steer/plateau](docs/methods/steer/plateau.md)",
        "- **1 not run**. [mix/fixed](docs/methods/mix/fixed.md)",
    ]


def test_a_methods_page_names_its_papers() -> None:
    from tutelage.pages import page

    row: Row = rows.row(60)
    text = page("grow/stack", verdict="not run")
    assert f"- **Paper 60** ({row.title}): {row.claim}" in text
    assert "**Paper " not in page("continual/ewc", verdict="not run")

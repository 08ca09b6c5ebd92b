"""What documents begin with, and how rows look when it is taken away again."""

import random

import pytest
import torch

from tests import toy
from tests.methods.small import view_of
from tutelage.base import load
from tutelage.base.clock import Clock
from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.core.graph import methods_of
from tutelage.core.prefix import prefixed
from tutelage.core.run import run_graph
from tutelage.core.types import IGNORE, Piece, Row
from tutelage.look import batch_of
from tutelage.methods.condition.metadata import Metadata, host_of, without
from tutelage.methods.objective.causal_lm import CausalLM
from tutelage.modalities.text import tokenizer as tokenizers
from tutelage.modalities.text.collate import collate
from tutelage.modalities.text.prefix import Prefixed
from tutelage.modalities.text.source import build


def record(**meta):
    return {"source": "web", "file": "a.jsonl", "line": 1, "id": "7", "bytes": 9, "meta": meta}


def written(records, **settings):
    return list(Metadata(**settings).prefix(iter(records), random.Random(0)))


def test_the_form_is_filled_from_source_file_id_and_the_record_s_fields():
    form = "{source}/{id} {topic} {year}\n"
    assert written([record(topic="cats", year=1999)], form=form) == ["web/7 cats 1999\n"]
    assert written([record()]) == ["web\n\n"]


def test_braces_without_a_name_are_text_and_values_are_not_filled_again():
    assert written([record(topic="{id}")], form="{} {topic} {") == ["{} {id} {"]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://en.wikipedia.org/wiki/Cat?x=1", "en.wikipedia.org"),
        ("http://a.b:80/", "a.b:80"),
        ("a.b/c", "a.b"),
        ("", ""),
    ],
)
def test_of_an_address_the_host_alone_may_be_written(url, host):
    assert host_of(url) == host


def test_a_document_that_lacks_the_field_begins_with_nothing():
    found = written([record(url="http://a.b/c"), record(), record(url="")], form="URL: {url.host}\n\n")
    assert found == ["URL: a.b\n\n", "", ""]


def test_a_field_that_no_record_has_is_an_error_that_names_it():
    with pytest.raises(UserError, match="form asks for {urll}, and no record of data.web has it; did you mean 'url'"):
        written([record(url="x")] * 3, form="{urll}")


def test_a_share_of_the_documents_is_drawn_once():
    found = written([record()] * 2000, share=0.3)
    assert 500 < sum(map(bool, found)) < 700
    assert found == written([record()] * 2000, share=0.3)
    assert set(written([record()] * 9, share=0.0)) == {""}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.jsonl").write_text("".join(f'{{"text": "{"word " * n}", "tag": "t{n}"}}\n' for n in range(1, 9)))
    tokenizer = tokenizers.bytes_tokenizer()
    base, _ = build("a", SourceSpec(path=str(folder / "a.jsonl"), val=0.0), tokenizer, cache=folder / "c", chunk=24)
    method = Metadata(form="{tag}: ")
    made = Prefixed(base, lambda records: method.prefix(records, random.Random(0)), tokenizer=tokenizer, length=24)
    return base, made


@pytest.mark.parametrize("packed", [False, True])
def test_rows_without_prefixes_are_the_rows_of_the_text_alone(sources, packed):
    base, made = sources
    chunks = [Piece(*chunk) for chunk in made.chunks.tolist()]
    text = [made._text(piece)[0] for piece in chunks]
    pairs = [([a, b], [c, d]) for a, b, c, d in zip(chunks, chunks[1:], text, text[1:], strict=False)]
    rows = pairs if packed else [([a], [c]) for a, c in zip(chunks, text, strict=True)]
    one = collate([Row("a", tuple(row)) for row, _ in rows], {"a": made}, 48)
    two = collate([Row("a", tuple(row)) for _, row in rows], {"a": base}, 48)
    assert int((one["segments"] > 0).sum()) == int((two["segments"] > 0).sum()) + 4 * sum(len(row) for row, _ in rows)
    cooled = without(one)
    assert set(cooled.fields) == set(two.fields)
    for name, value in two.fields.items():
        assert torch.equal(cooled[name], value), name


def test_prefixes_are_taken_away_in_the_last_span_alone(sources):
    _, made = sources
    batch = collate([Row("a", (Piece(*made.chunks[3]),))], {"a": made}, 24)
    view = view_of(objective=CausalLM())
    counts = {}
    for step in range(20):
        view.clock = Clock(step=step, total={"step": 20.0})
        seen = Metadata(cooldown="10%").batch(batch, view)
        assert "plain" not in seen and int((seen["labels"] != IGNORE).sum()) == int((batch["labels"] != IGNORE).sum())
        counts[step] = int((seen["segments"] > 0).sum())
        assert int((Metadata(cooldown="0step").batch(batch, view)["segments"] > 0).sum()) == counts[0]
    assert counts[0] == counts[17] == counts[18] + 4 == counts[19] + 4


def test_an_objective_that_hides_tokens_itself_is_refused(sources):
    _, made = sources
    batch = collate([Row("a", (Piece(*made.chunks[3]),))], {"a": made}, 24)
    batch.meta["prepared"] = True
    with pytest.raises(UserError, match="use objective/causal_lm"):
        Metadata().batch(batch, view_of(objective=CausalLM()))


def test_show_names_the_rows_that_were_trained(tmp_path):
    """A run that replays, is packed and has prefixes: its rows are found again, prefixes named."""

    def change(recipe):
        two = recipe["stages"]["two"]
        two["methods"] = [
            {"use": "continual/replay", "rate": 0.5},
            {"use": "condition/metadata", "form": "{source}: ", "cooldown": "50%"},
        ]

    made = toy.graph(tmp_path, steps=4, change=change)
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed
    folder = made.nodes["two"].folder
    (tmp_path / "runs/toy/recipe.yaml").write_text(load.dump(made.recipe), encoding="utf-8")
    rows = {row["tick"]: row for row in toy.numbers(folder, kind="train")}
    for tick in rows:
        lines = batch_of(folder, tick)
        assert len(lines) >= 8 and all("prefix" in line for line in lines)
        assert {line.split("prefix=")[1] for line in lines} == {"'a: '", "'b: '"}
    early, late = (rows[t]["counted"] / ((1 - rows[t]["padding"]) * 8 * 32) for t in (1, 4))
    assert early < 0.95 and late < 0.95, "the places of prefixes are counted as drawn"


def test_two_methods_cannot_both_write_what_documents_begin_with(tmp_path):
    def change(recipe):
        recipe["stages"]["two"]["methods"] = ["condition/metadata", "condition/metadata"]

    node = toy.graph(tmp_path, change=change).nodes["two"]
    with pytest.raises(UserError, match="stages.two.methods: .* both write what documents begin with"):
        prefixed("b", None, node=node, methods=methods_of("two", node.stage), processor=None)

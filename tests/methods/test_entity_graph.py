"""Entities are listed once for each document; every pair and some triplets of them are told in its context."""

import json
from itertools import combinations

import pytest

from tests.methods.told import Told, documents
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core.types import Answer
from tutelage.methods.synth.entity_graph import PROMPTS, EntityGraph, plainly, read

MILL = "Ada Brook ran the mill at Lower Ford until the flood of 1911."
SHIP = "The Heron sailed from Port Vale with salt."
LISTS = {
    MILL: {"summary": "A mill and a flood.", "entities": ["Ada Brook", "the mill", "Lower Ford", "flood of 1911"]},
    SHIP: {"summary": "A ship.", "entities": ["the Heron", "Port Vale", "THE HERON", "", 7]},
}


def reply(asked):
    """A writer that lists what stands in `LISTS` and tells of entities by naming them."""
    document = next(text for text in LISTS if text in asked)
    if asked.startswith(PROMPTS["entities"]):
        return f"Here it is:\n```json\n{json.dumps(LISTS[document])}\n```"
    return "### Discussion\n" + " and ".join(line[2:] for line in asked.splitlines() if line.startswith("- "))


def told(reply=reply, texts=(MILL, SHIP), **settings):
    method, writer = EntityGraph(**settings), Told(reply)
    return list(method.retell(documents(*texts), writer)), method.state, writer


def test_every_pair_and_so_many_triplets_are_told_with_the_document_before_them():
    rows, state, writer = told(triplets=2)
    people = LISTS[MILL]["entities"]
    of = {
        kind: [tuple(row["entities"]) for row in rows if row["style"] == kind and row["of"] == "web:1"]
        for kind in PROMPTS
    }
    assert of["pair"] == list(combinations(people, 2))
    assert len(of["triplet"]) == 2 and set(of["triplet"]) < set(combinations(people, 3))
    assert [row["entities"] for row in rows if row["of"] == "web:2"] == [[], ["the Heron", "Port Vale"]], (
        "each name once"
    )
    first = next(question.text for question in writer.asked if question.purpose.startswith("pair"))
    assert first == f"{PROMPTS['pair']}\n\n{MILL}\n\n- Ada Brook\n- the mill"
    assert len({question.purpose for question in writer.asked}) == len(writer.asked) == 2 + 6 + 2 + 1
    assert state == {"documents": 2, "without_entities": 0, "entities": 6, "kept": 2 + 6 + 2 + 1}


def test_rows_say_what_they_tell_and_where_it_is_from():
    rows, _, _ = told()
    assert len({row["id"] for row in rows}) == len(rows) and {row["made_by"] for row in rows} == {"synth/entity_graph"}
    assert [(row["style"], row["text"]) for row in rows[:2]] == [
        ("summary", "A mill and a flood."),
        ("summary", "A ship."),
    ]
    assert rows[-1]["text"] == "### Discussion\nthe Heron and Port Vale" and rows[-1]["origin"]["line"] == 2
    assert all(row["style"] != "summary" for row in told(summary=False)[0])


def test_which_pairs_and_triplets_are_drawn_hangs_on_seed_and_document():
    def drawn(**settings):
        return [row["entities"] for row in told(pairs=2, triplets=1, **settings)[0] if row["of"] == "web:1"][1:]

    assert drawn() == drawn() and len(drawn()) == 3
    assert len({str(drawn(seed=seed)) for seed in range(8)}) > 3


def test_a_title_stands_before_the_text():
    method, writer = EntityGraph(), Told(reply)
    list(method.retell(documents(MILL, title="The Mill"), writer))
    assert all(f"\n\nThe Mill\n\n{MILL}" in question.text for question in writer.asked)


def test_a_list_that_cannot_be_read_is_asked_for_again_and_not_for_ever():
    asked = []

    def mumbles(text):
        if MILL in text and text.startswith(PROMPTS["entities"]):
            asked.append(text)
            return "Many people." if len(asked) < 3 else reply(text)
        return reply(text)

    rows, state, writer = told(mumbles)
    assert sum(question.purpose.startswith("entities") for question in writer.asked) == 3 + 1, "the other document once"
    assert len(asked) == 3 and state["without_entities"] == 0 and len(rows) == 2 + 6 + 4 + 1
    asked.clear()
    rows, state, _ = told(mumbles, asks=2)
    assert len(asked) == 2 and state["without_entities"] == 1 and {row["of"] for row in rows} == {"web:2"}


def test_a_writer_that_lists_nothing_or_tells_nothing_is_one_line():
    with pytest.raises(UserError, match="listed no two entities of any of 2 documents"):
        told(lambda text: "I see.")
    with pytest.raises(UserError, match="no answer was worth keeping"):
        told(lambda text: reply(text) if text.startswith(PROMPTS["entities"]) else "", summary=False)


def test_answers_that_say_nothing_or_were_cut_off_are_dropped_and_counted():
    texts = iter([Answer("cut off in the", False), "", Answer("", False), "so on " * 60])

    def tires(text):
        return reply(text) if text.startswith(PROMPTS["entities"]) else next(texts, "### A discussion")

    rows, state, _ = told(tires, triplets=0, summary=False)
    assert state["dropped_cut_off"] == state["dropped_unanswered"] == 1 and state["dropped_empty"] == 2
    assert len(rows) == state["kept"] == 6 + 1 - 4


def test_entities_are_read_from_what_models_write():
    listed = json.dumps(LISTS[MILL])
    assert read(listed, 40).entities == LISTS[MILL]["entities"] and read(listed, 2).entities == [
        "Ada Brook",
        "the mill",
    ]
    assert read('I think {"entities": ["a"]}, no: {"entities": ["b", "c"], "summary": 3}', 9) == (["b", "c"], "")
    for lie in (
        "",
        "{}",
        '{"entities": "a, b"}',
        '{"entities": []}',
        '{"entities": [1, null]}',
        "[1]",
        '{"a":' * 9000,
        "{" * 10**6,
    ):
        assert read(lie, 9) is None
    assert read(json.dumps({"entities": ["x" * 201, " a\n b "]}), 9).entities == ["a b"]


def test_a_plain_list_is_read_where_the_recipe_says_what_stands_between():
    assert plainly("- Ada Brook\n* the mill\n3. Lower Ford\n\nAda  Brook", "\n", 9).entities == [
        "Ada Brook",
        "the mill",
        "Lower Ford",
    ]
    assert plainly("Ada; Ben;; Cora", ";", 2).entities == ["Ada", "Ben"] and plainly(" ; ", ";", 9) is None


def test_words_for_what_is_not_asked_are_refused():
    with pytest.raises(UserError, match="nothing is asked for 'pairs'; did you mean 'pair'"):
        registry.make({"use": "synth/entity_graph", "prompts": {"pairs": "x"}})

"""Each passage is told in each style, with where it is from; what is no telling of it is dropped and counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.methods.told import Told, documents
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core.types import Answer
from tutelage.methods._kit.retold import bare, cut, says_little
from tutelage.methods.synth.rephrase import STYLES, Rephrase

ONE = "The river rose in spring and took the old bridge with it. Nobody was hurt, but the mill stood in water."
TWO = "A new bridge of stone was built three years later. It still stands."


def told(
    *texts, reply=lambda asked: "In spring the river carried the old bridge off; the mill was flooded.", **settings
):
    method, writer = Rephrase(**{"shortest": 3, **settings}), Told(reply)
    return list(method.retell(documents(*texts), writer)), method.state, writer


def test_each_passage_is_asked_for_in_each_style_and_rows_say_where_they_are_from():
    rows, state, writer = told(f"{ONE}\n{TWO}", styles=["easy", "hard"], length=22, least=0.0)
    assert [question.text for question in writer.asked] == [
        f"{STYLES[style]}\n\n{passage}" for passage in (ONE, TWO) for style in ("easy", "hard")
    ]
    assert len({question.purpose for question in writer.asked}) == 4, "chance is each question's own"
    assert [(row["passage"], row["style"]) for row in rows] == [(0, "easy"), (0, "hard"), (1, "easy"), (1, "hard")]
    assert {row["of"] for row in rows} == {"web:1"} and len({row["id"] for row in rows}) == 4
    assert rows[0]["origin"] == {"source": "web", "file": "web.jsonl", "line": 1}
    assert rows[0]["made_by"] == "synth/rephrase" and state["documents"] == 1 and state["kept"] == 4


def test_a_document_is_called_what_it_calls_itself():
    rows = list(Rephrase(shortest=3).retell(documents(ONE, id="page-7"), Told(lambda asked: TWO)))
    assert rows[0]["of"] == "page-7" and rows[0]["id"] == "page-7#0-medium"


def test_a_style_may_have_words_of_its_own_and_one_that_there_is_not_is_named():
    _, _, writer = told(ONE, styles=["short", "qa"], prompts={"short": "In brief:", "qa": "Ask:"})
    assert [question.text for question in writer.asked] == [f"In brief:\n\n{ONE}", f"Ask:\n\n{ONE}"]
    with pytest.raises(UserError, match="there is no style 'esay'; did you mean 'easy'"):
        registry.make({"use": "synth/rephrase", "styles": ["esay"]})


REPLIES = {
    "unanswered": Answer("", False),
    "empty": "Here is a paraphrase:\n\n",
    "cut_off": Answer("In spring the river carried the old bridge", False),
    "copied": ONE.replace(" ", "\n"),
    "short": "A river rose.",
    "long": " ".join(f"word{i}" for i in range(80)),
}


@pytest.mark.parametrize("why", REPLIES)
def test_what_is_no_telling_of_the_passage_is_dropped_and_counted(why):
    rows, state, _ = told(
        ONE, TWO, reply=lambda asked: REPLIES[why] if ONE in asked else "A later bridge of stone stands today."
    )
    assert [row["of"] for row in rows] == ["web:2"]
    assert state[f"dropped_{why}"] == state["kept"] == 1


def test_what_repeats_itself_says_nothing():
    assert says_little("and so on, " * 40) and says_little(" \n") and not says_little(ONE) and not says_little("ha ha")


def test_questions_and_answers_are_dropped_where_none_are():
    plain, asked = (
        "The river rose and the bridge was gone, and so on.",
        "Question: What rose?\nAnswer: The river, in spring.",
    )
    rows, state, _ = told(ONE, TWO, styles=["qa"], reply=lambda text: asked if ONE in text else plain)
    assert [row["text"] for row in rows] == [asked] and state["dropped_formless"] == 1


def test_cut_off_answers_stay_where_the_recipe_wants_them():
    rows, _, _ = told(ONE, reply=lambda asked: Answer("In spring the river carried the old", False), ended=False)
    assert len(rows) == 1


def test_where_nothing_is_worth_keeping_one_line_says_why():
    with pytest.raises(UserError, match=r"no answer was worth keeping \(2 documents, 1 short, 1 empty\)"):
        told(ONE, TWO, reply=lambda asked: "No." if ONE in asked else "...\n" * 60)
    with pytest.raises(UserError, match="no answer was worth keeping .*2 short_passages"):
        told("Home", "Log in")


def test_answers_are_asked_for_as_the_settings_say():
    _, _, writer = told(ONE, tokens=90, temperature=0.0, top_p=0.9, rows=4)
    assert writer.how == [{"tokens": 90, "temperature": 0.0, "top_p": 0.9, "rows": 4}]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Sure! Here is a paraphrase of the paragraph:\n\nThe river rose.", "The river rose."),
        ("Certainly.\n\nThe river rose.", "The river rose."),
        ("Here's a version in simple words: The river rose.", "The river rose."),
        ("**Paraphrase:** The river rose.", "The river rose."),
        ('"The river rose."', "The river rose."),
        ("The river rose.\n\nI hope this helps! Let me know.", "The river rose."),
        ("Here are three rivers: Elbe, Oder and Spree.", "Here are three rivers: Elbe, Oder and Spree."),
        ("Sure enough, the river rose.", "Sure enough, the river rose."),
        ('"Rise," he said to the "river"', '"Rise," he said to the "river"'),
        ("Question: What rose?\nAnswer: The river.", "Question: What rose?\nAnswer: The river."),
        ("**Question:** What rose?\n**Answer:** A river.", "**Question:** What rose?\n**Answer:** A river."),
        ("Here are the questions of the text:\n\n* What rose?\n* What fell?", "* What rose?\n* What fell?"),
        ("**Here is the paraphrased text:** The river rose.", "The river rose."),
        ("My own rather free paraphrase of it:\nThe river rose.", "The river rose."),
        ("Rephrased paragraph: The river rose.", "The river rose."),
        ("Texts often rewritten: the letters of Paul.", "Texts often rewritten: the letters of Paul."),
        ("Paul paraphrased: love is all.", "Paul paraphrased: love is all."),
        ("This is the question that it asks: why war?", "This is the question that it asks: why war?"),
        ("They rise: *Elbe* and **Oder**", "They rise: *Elbe* and **Oder**"),
    ],
)
def test_what_is_said_about_an_answer_is_taken_off_and_nothing_else(answer, text):
    assert bare(answer) == text


@given(st.text(st.sampled_from("ab .!\n。"), max_size=200), st.integers(1, 9))
def test_passages_hold_all_that_is_said_in_order_and_no_more_than_fits(text, most):
    passages = cut(text, size=len, most=most)
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(0 < len(passage) <= most for passage in passages)


def test_passages_end_where_sentences_do():
    size = lambda text: len(text.split())  # noqa: E731
    assert cut(f"{ONE} {TWO}", size=size, most=23) == [
        ONE.split(" Nobody")[0] + " Nobody" + ONE.split(" Nobody")[1],
        TWO,
    ]
    assert cut("one two three four five.", size=size, most=2) == ["one two", "three four", "five."]

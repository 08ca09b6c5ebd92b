"""What the start model writes is kept once, and only if it says something."""

import pytest

from tests.methods.small import view_of
from tutelage.base.errors import UserError
from tutelage.methods.objective.causal_lm import CausalLM
from tutelage.methods.synth.self_samples import SelfSamples, degenerate


def view(write):
    found = view_of(objective=CausalLM())
    calls = []

    def generate(*, prompts, tokens, seed, temperature, top_p, rows):
        calls.append({"prompts": prompts, "seed": seed, "tokens": tokens, "temperature": temperature, "top_p": top_p})
        return [write(seed, i) for i in range(len(prompts))]

    found.generate = generate
    return found, calls


def test_as_many_passages_as_asked_for_each_with_its_origin():
    found, calls = view(lambda seed, i: f"passage {seed} {i}")
    rows = list(SelfSamples(passages=10, rows=4, length=32).make({}, found))
    assert [row["id"] for row in rows] == [f"self-{i}" for i in range(10)]
    assert {row["made_by"] for row in rows} == {"synth/self_samples"}
    assert len(calls) == 3 and all(call["prompts"] == [""] * 4 and call["tokens"] == 32 for call in calls)
    assert len({call["seed"] for call in calls}) == 3


def test_the_same_seed_writes_the_same_and_another_something_else():
    one, two = (list(SelfSamples(passages=5).make({}, view(lambda s, i: f"passage {s} {i}")[0])) for _ in range(2))
    other, _ = view(lambda s, i: f"passage {s} {i}")
    other.seed = 1
    assert one == two != list(SelfSamples(passages=5).make({}, other))


def test_empty_repetitive_and_repeated_passages_are_counted_and_replaced():
    texts = ["", "  \n", "ha" * 200, "said before"]
    found, _ = view(lambda seed, i: texts[i] if i < 4 else f"fresh {seed} {i}")
    method = SelfSamples(passages=9, rows=8)
    rows = list(method.make({}, found))
    assert len(rows) == 9 and len({row["text"] for row in rows}) == 9
    assert method.state == {"dropped": 3 + 4}


def test_a_model_that_only_repeats_itself_writes_once_more_hotter_and_the_counts_say_so():
    found, calls = view(lambda seed, i: f"words {seed} {i}" if calls[-1]["temperature"] > 1 else "ha" * 200)
    method = SelfSamples(passages=6, rows=4)
    rows = list(method.make({}, found))
    assert len(rows) == 6 and method.state == {"dropped": 12, "temperature": 4.0}
    assert [call["temperature"] for call in calls] == [1.0, 1.0, 1.0, 4.0, 4.0]
    assert len({call["seed"] for call in calls}) == 5


def test_a_model_that_says_something_is_never_heated():
    found, calls = view(lambda seed, i: "said before")
    method = SelfSamples(passages=6, rows=4)
    assert len(list(method.make({}, found))) == 1
    assert {call["temperature"] for call in calls} == {1.0} and "temperature" not in method.state


def test_a_model_that_says_nothing_is_an_error():
    found, _ = view(lambda seed, i: "")
    with pytest.raises(UserError, match="all of 12 passages were empty or repetitive"):
        list(SelfSamples(passages=4, rows=4).make({}, found))


@pytest.mark.parametrize("text", ["Short.", "日本語の文章です。", "The cat sat on the mat, and then it slept. " * 2])
def test_ordinary_text_is_not_degenerate(text):
    assert not degenerate(text)

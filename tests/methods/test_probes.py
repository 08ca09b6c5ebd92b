"""Probes against numbers computed by hand, on text of many scripts."""

import json
import math
import zipfile

import pytest
import torch

from tests.core.tiny import tiny
from tests.methods.small import batch_of, decode, view_of
from tutelage.base.errors import UserError
from tutelage.methods.objective.causal_lm import CausalLM
from tutelage.methods.objective.masked_lm import MaskedLM
from tutelage.methods.objective.prefix_lm import PrefixLM
from tutelage.methods.probe.bits_per_byte import BitsPerByte
from tutelage.methods.probe.forgetting import Forgetting
from tutelage.methods.probe.matches import Matches
from tutelage.methods.probe.minimal_pairs import MinimalPairs
from tutelage.methods.probe.sample import Sample

MANY = ["Grüße aus Köln", "日本語の文章", "мир и труд", "plain", "😀😀", "ὦ ξεῖν᾽", "naïve", "ok"] * 2 + ["last one"]


def log_probabilities(model, text):
    """Of each character of a text, by hand."""
    ids = batch_of([text])["tokens"]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0].double().log_softmax(-1)
    return logits[:-1].gather(1, ids[0, 1:, None]).flatten()


def bits_by_hand(model, texts):
    nats = -sum(float(log_probabilities(model, text).sum()) for text in texts)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def moved(model, by=0.1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator))


def test_bits_per_byte_by_hand_over_many_scripts():
    view = view_of(objective=CausalLM(), columns={"many": MANY, "one": ["日本語"]})
    found = BitsPerByte().measure(view.engine.model, view)
    assert set(found) == {"bits_per_byte/many", "bits_per_byte/one"}
    assert found["bits_per_byte/many"] == pytest.approx(bits_by_hand(tiny("gpt2"), MANY), rel=1e-5)
    assert found["bits_per_byte/one"] == pytest.approx(bits_by_hand(tiny("gpt2"), ["日本語"]), rel=1e-5)


def test_the_first_few_rows_are_those_that_a_smaller_measurement_has():
    view = view_of(objective=CausalLM(), columns={"many": MANY})
    view.passages, view.few = 100, 3
    whole = BitsPerByte().measure(view.engine.model, view)
    view.passages = 3
    few = BitsPerByte().measure(view.engine.model, view)
    assert set(whole) == {"bits_per_byte/many", "bits_per_byte@3/many"} and set(few) == {"bits_per_byte/many"}
    assert few["bits_per_byte/many"] == pytest.approx(whole["bits_per_byte@3/many"], rel=1e-6)
    assert few["bits_per_byte/many"] != pytest.approx(whole["bits_per_byte/many"], rel=1e-3)


def test_a_column_without_a_measured_byte_is_left_out_and_said():
    view = view_of(objective=CausalLM(), columns={"none": [], "empty": [""], "some": ["text"]})
    found = BitsPerByte().measure(view.engine.model, view)
    assert {k: type(v) for k, v in found.items()} == {
        "unmeasured/none": str, "unmeasured/empty": str, "bits_per_byte/some": float
    }  # fmt: skip


@pytest.mark.parametrize(("name", "objective"), [("bert", MaskedLM()), ("t5", PrefixLM())])
def test_other_objectives_measure_what_they_predict_and_always_the_same(name, objective):
    view = view_of(name, objective=objective, columns={"many": MANY})
    first = BitsPerByte().measure(view.engine.model, view)
    view.clock.tick = 9
    assert BitsPerByte().measure(view.engine.model, view) == first
    assert 0.5 < first["bits_per_byte/many"] < 12


def test_forgetting_is_what_was_lost_since_the_best_stage():
    view = view_of(objective=CausalLM(), columns={"old": MANY, "new": ["new text"]})
    view.history = {"one": {"bits_per_byte/old": 3.5}, "two": {"bits_per_byte/old": 3.0}, "three": {}}
    now = bits_by_hand(tiny("gpt2"), MANY)
    found = Forgetting(alarm=0.5).measure(view.engine.model, view)
    assert found == {"forgetting/old": pytest.approx(now - 3.0, rel=1e-4), "alarm/old": 1.0}
    view.found = {"bits_per_byte/old": 3.1}  # measured just now
    assert Forgetting(alarm=0.5).measure(view.engine.model, view) == {
        "forgetting/old": pytest.approx(0.1), "alarm/old": 0.0
    }  # fmt: skip


def test_inside_a_stage_the_same_first_rows_are_compared():
    view = view_of(objective=CausalLM(), columns={"old": MANY})
    view.history = {"one": {"bits_per_byte/old": 3.0, "bits_per_byte@3/old": 2.0}}
    view.found, view.passages, view.few = {"bits_per_byte/old": 2.5}, 3, 3
    assert Forgetting().measure(view.engine.model, view)["forgetting/old"] == pytest.approx(0.5)
    view.passages = 100
    assert Forgetting().measure(view.engine.model, view)["forgetting/old"] == pytest.approx(-0.5)


def test_what_an_outside_model_is_to_keep_is_compared_with_its_start():
    view = view_of(objective=CausalLM(), columns={"self": MANY, "new": ["new text"]})
    view.kept, view.few = frozenset({"self"}), 3
    probe = Forgetting()
    at_start = probe.measure(view.engine.model, view)
    assert at_start["kl/self"] == pytest.approx(0, abs=1e-5)
    assert at_start["forgetting/self"] == pytest.approx(0, abs=1e-6)
    moved(view.engine.model)
    found = probe.measure(view.engine.model, view)
    before, now = (bits_by_hand(model, MANY) for model in (tiny("gpt2"), view.engine.model))
    assert found["original/self"] == pytest.approx(before, rel=1e-5)
    assert found["forgetting/self"] == pytest.approx(now - before, rel=1e-4)
    assert found["kl/self"] == pytest.approx(kl_by_hand(tiny("gpt2"), view.engine.model, MANY), rel=1e-3)
    assert "forgetting/new" not in found


def kl_by_hand(start, now, texts):
    nats = 0.0
    for text in texts:
        ids = batch_of([text])["tokens"]
        with torch.no_grad():
            then, here = (model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in (start, now))
        nats += float((then.exp() * (then - here)).sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_later_stages_remember_the_outside_model_through_its_first_stage():
    view = view_of(objective=CausalLM(), columns={"self": MANY})
    view.kept, view.found = frozenset({"self"}), {"bits_per_byte/self": 3.0}
    view.history = {"one": {"bits_per_byte/self": 2.9, "original/self": 2.5}}
    found = Forgetting().measure(view.engine.model, view)
    assert found["forgetting/self"] == pytest.approx(0.5) and "original/self" not in found


def test_fresh_weights_have_nothing_to_keep():
    view = view_of(objective=CausalLM(), columns={"kept": MANY})
    view.kept = frozenset({"kept"})

    def fresh(name):
        raise UserError("starts from fresh weights")

    view._open_ref = fresh
    found = Forgetting(alarm=0.1).measure(view.engine.model, view)
    assert found == {"unmeasured/kl/kept": "starts from fresh weights", "alarm/kept": 0.0}


def test_samples_continue_prompts_or_the_beginnings_of_documents():
    view = view_of(objective=CausalLM(), columns={"a": ["first document"], "b": ["日本語の文章"], "none": []})
    asked = []

    def generate(**given):
        asked.append(given)
        return [f"{len(p)} more" for p in given["prompts"]]

    view.generate = generate
    found = Sample(head=6, tokens=5).measure(view.engine.model, view)
    assert found == {"sample/a": "first ⟶ 5 more", "sample/b": "日本語の文 ⟶ 5 more"}
    assert asked[0]["temperature"] == 0 and asked[0]["tokens"] == 5
    given = Sample(prompts=["x", "yz"], temperature=0.8).measure(view.engine.model, view)
    assert given == {"sample/0": "x ⟶ 1 more", "sample/1": "yz ⟶ 2 more"}
    view.clock.tick = 5
    Sample(temperature=0.8).measure(view.engine.model, view)
    assert asked[1]["seed"] == asked[2]["seed"]


def test_a_masked_model_writes_no_samples():
    view = view_of("bert", objective=MaskedLM(), columns={"a": ["text"]})
    view.generate = lambda **given: pytest.fail("asked")
    assert Sample().measure(view.engine.model, view) == {}


PAIRS = [("the dogs bark", "the dogs barks"), ("日本語だ", "日本語が"), ("ab", "ba"), ("same", "same")]


@pytest.fixture
def blimp(tmp_path):
    """Two files of pairs, in a folder and in a zip."""
    for name, pairs in (("agreement", PAIRS), ("order", PAIRS[:1])):
        lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}, ensure_ascii=False) for good, bad in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        for file in tmp_path.glob("*.jsonl"):
            archive.write(file, f"data/{file.name}")
            archive.writestr(f"__MACOSX/data/._{file.name}", b"\x00\x05")
    return tmp_path


def test_minimal_pairs_by_hand(blimp):
    view = view_of(objective=CausalLM())
    right = [
        float(log_probabilities(tiny("gpt2"), good).sum()) > float(log_probabilities(tiny("gpt2"), bad).sum())
        for good, bad in PAIRS
    ]
    assert not right[-1]  # a tie is a miss
    for path in (blimp, blimp / "pairs.zip"):
        found = MinimalPairs(path=str(path), rows=3).measure(view.engine.model, view)
        assert found["minimal_pairs/agreement"] == sum(right) / 4
        assert found["minimal_pairs/order"] == float(right[0])
        assert found["minimal_pairs"] == pytest.approx((sum(right) / 4 + right[0]) / 2)
    one = MinimalPairs(path=str(blimp / "agreement.jsonl"), limit=2, pairs=[("ab", "ba")])
    found = one.measure(view.engine.model, view)
    assert found["minimal_pairs/agreement"] == sum(right[:2]) / 2 and found["minimal_pairs/pairs"] == float(right[2])


def test_minimal_pairs_says_what_is_missing(tmp_path):
    view = view_of(objective=CausalLM())
    with pytest.raises(UserError, match="needs `path` or `pairs`"):
        MinimalPairs().measure(view.engine.model, view)
    with pytest.raises(UserError, match="no .jsonl file"):
        MinimalPairs(path=str(tmp_path / "nowhere")).measure(view.engine.model, view)
    (tmp_path / "bad.jsonl").write_text('{"sentence_good": "x"}\n')
    with pytest.raises(UserError, match="bad in .* has a line without a pair"):
        MinimalPairs(path=str(tmp_path)).measure(view.engine.model, view)
    with pytest.raises(UserError, match="only causal"):
        bert = view_of("bert", objective=MaskedLM())
        MinimalPairs(pairs=PAIRS).measure(bert.engine.model, bert)


def test_characters_decode_to_what_they_were():
    assert decode(batch_of(["Grüße 日本"])["tokens"][0].tolist()) == "Grüße 日本"


def test_matches_are_the_share_of_samples_in_which_the_rule_finds_something_the_prompt_aside():
    view = view_of(objective=CausalLM())
    asked = {}

    def generate(**settings):
        asked.update(settings)
        return ["a darn cat", "darning", "DARN", "two darn darn dogs"]

    view.generate = generate
    method = Matches(pattern=r"\bdarn\b", prompt="darn ", count=4, tokens=9)
    found = method.measure(view.engine.model, view)
    assert found == {"matches": 0.5, "sample/matches": "darn  ⟶ a darn cat"}
    assert asked["prompts"] == ["darn "] * 4 and asked["tokens"] == 9 and asked["temperature"] == 1.0
    with pytest.raises(ValueError, match="no regular expression"):
        Matches(pattern="(")
    with pytest.raises(UserError, match="writes no text"):
        method.measure(None, view_of("bert", objective=MaskedLM()))

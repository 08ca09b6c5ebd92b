"""Each of the four ways by the paper's formula, from rewards that fields or a rule give."""

import random

import pytest
import torch

from tests import toy
from tests.methods.small import Texts, collate, view_of
from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.core.run import run_graph
from tutelage.core.types import IGNORE, Piece, Row
from tutelage.methods.condition.preference import HEAVIEST, Preference
from tutelage.methods.objective.causal_lm import CausalLM
from tutelage.modalities.text import tokenizer as tokenizers
from tutelage.modalities.text.prefix import Prefixed
from tutelage.modalities.text.source import build

TEXTS = ["a good text", "bad one", "of no reward", "best of all"]
REWARDS = [0.5, -1.0, None, 2.0]


def record(number=0, **meta):
    return {
        "source": "web",
        "drawn_as": "web",
        "file": "a.jsonl",
        "line": number,
        "id": str(number),
        "bytes": 9,
        "meta": meta,
    }


def written(records, *, seed=0, **settings):
    method = Preference(**settings)
    return list(method.prefix(iter(records), random.Random(seed))), method


def rewarded(**settings):
    """A method that has read the rewards, and one row with all four documents."""
    records = [record(i, **({} if reward is None else {"reward": reward})) for i, reward in enumerate(REWARDS)]
    begun, method = written(records, **settings)
    source = Texts("web", TEXTS)
    row = Row("web", tuple(Piece(i, 0, len(ids)) for i, ids in enumerate(source.ids)))
    batch = collate([row], {"web": source})
    return begun, method, batch.having(plain=batch["tokens"])


def by_hand(view, batch):
    """-log p of each label, float64, and which document it is of."""
    with torch.no_grad():
        out = view.engine.out(batch)
        nll = out.each(lambda logits, labels: -logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0],
                       batch["labels"].clamp(min=0))  # fmt: skip
    there = batch["labels"] != IGNORE
    return nll[there], batch["segments"][there] - 1


def taken(method, batch, view):
    found = method.loss(view.engine.out, batch, view)
    return float(found.total.detach()), float(found.weight)


def test_documents_begin_with_what_their_reward_says_and_those_without_one_with_nothing():
    begun, _, _ = rewarded(bare=0.0)
    assert begun == ["<|good|>", "<|bad|>", "", "<|good|>"]
    begun, _, _ = rewarded(bare=0.0, threshold=0.5, good="+", poor="-")
    assert begun == ["+", "-", "", "+"], "a reward of just the threshold is good"


def test_a_share_of_the_documents_stays_bare():
    begun, _ = written([record(reward=1)] * 3000, bare=0.2)
    assert 480 < begun.count("") < 720
    assert begun == written([record(reward=1)] * 3000, bare=0.2)[0]


@pytest.mark.parametrize("by", ["filtering", "unlikelihood", "reward_weighted"])
def test_the_other_ways_put_nothing_before_documents(by):
    assert set(rewarded(by=by)[0]) == {""}


def test_a_rule_s_reward_is_minus_its_matches_and_reads_no_field():
    found, method = written([{**record(), "text": text} for text in ("darn it, darn", "fine", "darning")],
                            violation=r"\bdarn\b", bare=0.0)  # fmt: skip
    assert found == ["<|bad|>", "<|good|>", "<|good|>"]
    assert method._rewards["web"].tolist() == [-2.0, 0.0, 0.0]


def test_what_is_no_reward_is_refused():
    with pytest.raises(UserError, match="no record of data.web has the field 'rewrad'; did you mean 'reward'"):
        written([record(reward=1)] * 2, reward="rewrad")
    for value in ("much", float("nan"), [1]):
        with pytest.raises(UserError, match="`reward` is .* and no number, in a.jsonl, record 7"):
            written([record(7, reward=value)])
    with pytest.raises(ValueError, match="no regular expression"):
        Preference(violation="(")


def test_data_in_which_none_is_preferred_are_refused():
    view = view_of(objective=CausalLM())
    for threshold, which in ((-5.0, "no"), (5.0, "every")):
        _, method, _ = rewarded(threshold=threshold)
        with pytest.raises(UserError, match=f"{which} document has a reward below .* go from -1 to 2"):
            method.begin(view.engine.model, view)
    rewarded(threshold=5.0, by="reward_weighted")[1].begin(view.engine.model, view)
    with pytest.raises(UserError, match="causal ones"):
        rewarded()[1].begin(None, view_of("bert", objective=CausalLM()))


def test_filtering_learns_the_rest_as_if_alone():
    view = view_of(objective=CausalLM())
    _, method, batch = rewarded(by="filtering")
    nll, doc = by_hand(view, batch)
    total, weight = taken(method, batch, view)
    assert total == pytest.approx(float(nll[doc != 1].sum()), rel=1e-5) and weight == float((doc != 1).sum())


def test_unlikelihood_is_the_paper_s_on_bad_documents_alone():
    view = view_of(objective=CausalLM())
    _, method, batch = rewarded(by="unlikelihood", alpha=0.25)
    nll, doc = by_hand(view, batch)
    unlike = -torch.log(1 - torch.exp(-nll))
    total, weight = taken(method, batch, view)
    assert total == pytest.approx(float(nll[doc != 1].sum() + 0.25 * unlike[doc == 1].sum()), rel=1e-5)
    assert weight == len(nll), "divided by all labels"


def test_a_step_of_unlikelihood_makes_bad_text_less_likely_and_a_sure_label_has_finite_gradients():
    from tutelage.methods.condition.preference import _either

    logits = torch.tensor([[90.0, 0.0], [0.0, 0.0]], requires_grad=True)
    labels, good = torch.tensor([0, 1]), torch.tensor([False, False])
    _either(logits, labels, torch.ones(2), good, alpha=1.0).backward()
    assert logits.grad.isfinite().all() and logits.grad[1, 1] > 0, "descent lowers the bad label's logit"


def test_reward_weighting_is_exp_of_reward_over_beta_divided_by_all_labels():
    view = view_of(objective=CausalLM())
    _, method, batch = rewarded(by="reward_weighted", beta=0.5)
    nll, doc = by_hand(view, batch)
    weights = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64).div(0.5).exp()
    total, weight = taken(method, batch, view)
    assert total == pytest.approx(float((nll * weights[doc]).sum()), rel=1e-5) and weight == len(nll)
    _, method, batch = rewarded(by="reward_weighted", beta=0.01)
    total, _ = taken(method, batch, view)
    assert total == pytest.approx(float(nll[doc == 2].sum() + HEAVIEST * nll[(doc == 0) | (doc == 3)].sum()), rel=1e-5)


@pytest.mark.parametrize("by", ["conditional", "filtering", "unlikelihood", "reward_weighted"])
def test_row_weights_count_and_other_stages_rows_are_learned_as_they_are(by):
    view = view_of(objective=CausalLM())
    _, method, batch = rewarded(by=by)
    half = batch.weighted(torch.tensor([0.5]))
    assert taken(method, half, view) == pytest.approx([value / 2 for value in taken(method, batch, view)])
    other = batch.having()
    del other.fields["plain"]
    assert taken(method, other, view) == pytest.approx(taken(CausalLM(), other, view))


def test_a_record_gives_its_text_when_it_is_asked_for(tmp_path):
    lines = ["Grüße aus Köln", "plain", "日本語"]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    tokenizer = tokenizers.bytes_tokenizer()
    base, _ = build("a", SourceSpec(path=str(tmp_path / "a.jsonl"), val=0.0), tokenizer, cache=tmp_path / "c", chunk=24)
    seen = {}

    def write(records):
        for one in records:
            assert "text" not in one
            seen[one["line"]] = one["text"]
            with pytest.raises(KeyError):
                one["nothing"]
            yield ""

    Prefixed(base, write, tokenizer=tokenizer, length=24)
    assert list(seen.values()) == lines and sorted(seen) == [1, 2, 3]


@pytest.mark.parametrize("by", ["filtering", "unlikelihood", "reward_weighted"])
def test_the_other_ways_train_and_leave_documents_that_they_do_not_prefer_less_likely(by, tmp_path):
    """Of documents of words and of numbers in one source, these are bad: they are learned worse than plainly."""

    def run(objective, folder):
        def change(recipe):
            one, two = recipe["stages"]["one"], recipe["stages"]["two"]
            two["data"] = {**one["data"], **two["data"]}
            two["objective"] = objective

        made = toy.graph(folder, steps=12, change=change)
        result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
        assert not result.failed
        values = toy.numbers(made.nodes["two"].folder, kind="eval")[-1]["values"]
        return values["bits_per_byte/a"], values["bits_per_byte/b"]

    settings = {"by": by, "violation": r"\d", "beta": 5.0}
    plain = run("objective/causal_lm", tmp_path / "plain")
    found = run({"use": "condition/preference", **settings}, tmp_path / "found")
    assert found[1] > plain[1] + 0.1, "numbers are bad"
    assert found[0] < plain[0] + 0.3, "words are not"


def test_replayed_documents_have_rewards_of_their_own(tmp_path):
    """Replayed rows are drawn under another name than their source's own, which a source of the stage may have, too."""

    def change(recipe):
        two = recipe["stages"]["two"]
        two["data"] = {"a": two["data"]["b"]}  # named as the replayed one
        two["methods"] = [{"use": "continual/replay", "rate": 0.5}]
        two["objective"] = {"use": "condition/preference", "by": "filtering", "violation": r"\d"}

    made = toy.graph(tmp_path, steps=4, change=change)
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    assert not result.failed
    for row in toy.numbers(made.nodes["two"].folder, kind="train"):
        share = row["counted"] / ((1 - row["padding"]) * row["rows"] * row["length"])
        assert 0.3 < share < 0.7, "words are learned, which are half of a step, and numbers are not"

"""Objectives against plain transformers, and what they hide from the loss."""

import pytest
import torch
import torch.nn.functional as F

from tests.core.tiny import VOCAB, tiny
from tests.methods.small import SPECIAL, batch_of, encode, packed, view_of
from tutelage.base.errors import UserError
from tutelage.core.types import IGNORE, Batch, Row
from tutelage.methods.objective.causal_lm import CausalLM
from tutelage.methods.objective.masked_lm import MaskedLM
from tutelage.methods.objective.prefix_lm import PrefixLM

TEXTS = ["Grüße aus Köln", "日本語の文章です", "plain words", "мир и труд и май"]


def mean(found):
    return found.total / found.weight


def many(rows=64, length=128):
    tokens = torch.randint(3, VOCAB - 1, (rows, length), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = 1
    tokens[0, 100:] = 0
    segments = (tokens != 0).long()
    labels = F.pad(tokens[:, 1:], (0, 1)).where(F.pad(segments[:, 1:], (0, 1)) > 0, IGNORE)
    return Batch(
        {"tokens": tokens, "labels": labels, "segments": segments},
        [Row("a", ())] * rows,
        torch.ones(rows),
        {"special": SPECIAL},
    )


def test_causal_lm_is_transformers_own_loss():
    view = view_of("gpt2", objective=CausalLM())
    batch = batch_of(TEXTS)
    ours = mean(CausalLM().loss(view.engine.out, batch, view))
    theirs = view.engine.model(
        input_ids=batch["tokens"],
        attention_mask=batch["segments"],
        labels=batch["tokens"].where(batch["segments"] > 0, IGNORE),
    ).loss
    torch.testing.assert_close(ours, theirs)


def test_a_row_weight_multiplies_its_loss_and_its_count():
    view = view_of("gpt2", objective=CausalLM())
    both, one = batch_of(TEXTS[:2]), batch_of(TEXTS[:1])
    weighted = Batch(both.fields, both.rows, torch.tensor([2.0, 0.0]), both.meta)
    found, alone = (CausalLM().loss(view.engine.out, batch, view) for batch in (weighted, one))
    torch.testing.assert_close(found.total, 2 * alone.total)
    assert float(found.weight) == 2 * float(alone.weight)


def test_masks_have_the_papers_shares():
    view = view_of("bert", objective=MaskedLM())
    before = many()
    after = MaskedLM().batch(before, view)
    chosen = after["labels"] != IGNORE
    real = (before["segments"] > 0) & (before["tokens"] > 2)
    assert not (chosen & ~real).any()
    assert (after["labels"] == before["tokens"])[chosen].all()
    assert (after["tokens"] == before["tokens"])[~chosen].all()
    count = int(chosen.sum())
    assert count / int(real.sum()) == pytest.approx(0.15, abs=0.012)
    shown = after["tokens"][chosen]
    assert int((shown == SPECIAL["mask"]).sum()) / count == pytest.approx(0.8, abs=0.03)
    assert int((shown == before["tokens"][chosen]).sum()) / count == pytest.approx(0.1, abs=0.03)


def test_masks_change_with_the_tick_and_are_drawn_again_alike():
    view = view_of("bert", objective=MaskedLM())
    first, again = (MaskedLM().batch(many(8), view)["tokens"] for _ in range(2))
    view.clock.tick = 1
    other = MaskedLM().batch(many(8), view)["tokens"]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_measured_row_keeps_its_mask_whatever_stands_beside_it():
    method = MaskedLM()
    view = view_of("bert", objective=method)
    alone, together = method.measured(batch_of(TEXTS[2:3]), view), method.measured(batch_of(TEXTS), view)
    width = alone["tokens"].shape[1]
    for field in ("tokens", "labels", "bytes"):
        assert torch.equal(alone[field][0], together[field][2, :width])
    view.clock.tick = 7
    assert torch.equal(method.measured(batch_of(TEXTS), view)["tokens"], together["tokens"])
    assert ((together["labels"] != IGNORE).sum(dim=1) >= 1).all()


def test_a_masked_labels_bytes_are_its_own():
    method = MaskedLM(rate=1.0)
    found = method.measured(batch_of(["aé日😀"]), view_of("bert", objective=method))
    assert found["bytes"].tolist() == [[0, 1, 2, 3, 4]]


def test_masked_lm_needs_a_mask_token():
    batch = batch_of(TEXTS)
    batch.meta["special"] = {k: v for k, v in SPECIAL.items() if k != "mask"}
    with pytest.raises(UserError, match="mask token"):
        MaskedLM().batch(batch, view_of("bert", objective=MaskedLM()))


def test_a_prepared_batch_is_not_prepared_again():
    view = view_of("bert", objective=MaskedLM())
    once = view.prepared(batch_of(TEXTS))
    assert view.prepared(once) is once
    training = MaskedLM().batch(batch_of(TEXTS), view)
    assert view.prepared(training) is training
    plain = batch_of(TEXTS)
    assert view_of("gpt2", objective=CausalLM()).prepared(plain) is plain


def test_prefix_lm_on_t5_is_transformers_own_loss():
    method = PrefixLM(split=0.5)
    view = view_of("t5", objective=method)
    batch = method.batch(batch_of(TEXTS), view)
    ours = mean(method.loss(view.engine.out, batch, view))
    sides = []
    for row in batch_of(TEXTS)["tokens"]:
        row = row[row != 0]
        cut = 1 + int(0.5 * (len(row) - 1))
        sides.append((row[:cut], row[cut:]))
    source = torch.nn.utils.rnn.pad_sequence([s for s, _ in sides], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([t for _, t in sides], batch_first=True, padding_value=IGNORE)
    model = tiny("t5")
    theirs = model(input_ids=source, attention_mask=(source != 0).long(), labels=labels).loss
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(batch["labels"], labels) and torch.equal(batch["source"], source)


def test_prefix_lm_gives_each_label_of_the_decoder_its_bytes():
    method = PrefixLM(split=0.5)
    found = method.measured(batch_of(["aé日😀", "xyz"]), view_of("t5", objective=method))
    assert found["bytes"].tolist() == [[3, 4], [1, 1]]


def test_prefix_lm_on_a_causal_model_hides_the_given_part_of_every_document():
    method = PrefixLM(split=0.5)
    before = packed(["abcdefg", "xy", "q"])  # 8, 3 and 2 tokens with their beginnings: 4, 2 and 1 are given
    after = method.batch(before, view_of("gpt2", objective=method))
    kept = after["labels"] != IGNORE
    assert torch.equal(after["labels"][kept], before["labels"][kept])
    assert kept.int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 0]]


def test_cuts_are_spread_over_the_document_and_drawn_again_alike():
    method = PrefixLM()
    view = view_of("t5", objective=method)
    batch = method.batch(many(200, 20), view)
    given = batch["source_mask"].sum(dim=1)
    assert int(given.min()) == 1 and int(given.max()) == 19 and 8 < float(given.float().mean()) < 12
    assert torch.equal(batch["source"], method.batch(many(200, 20), view)["source"])


@pytest.mark.parametrize("split", [None, 0.2])
def test_where_answers_are_marked_the_cut_is_before_the_first_whatever_the_share(split):
    method = PrefixLM(split=split)
    # of "ab?cde" with its beginning, the labels of positions 0 to 2 are the prompt's: "cde" is the answer
    found = method.batch(batch_of(["ab?cde"], prompt=3), view_of("t5", objective=method))
    assert found["source"].tolist() == [encode("ab?")] and found["labels"].tolist() == [encode("cde")[1:]]
    both = method.batch(packed(["ab?cde", "xy?zu"], prompt=3), view_of("gpt2", objective=method))
    assert (both["labels"] != IGNORE).int().tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0]]


def test_a_later_prompt_is_read_and_not_learned_and_measured_bytes_are_the_answers():
    method, batch = PrefixLM(), batch_of(["ab?cde?fg"], prompt=3)
    batch["labels"][0, 6] = IGNORE  # the second question's mark
    batch["bytes"][0, 6] = 0
    found = method.measured(batch, view_of("t5", objective=method))
    assert found["source"].tolist() == [encode("ab?")]
    c, d, e, mark, f, g = encode("cde?fg")[1:]
    assert found["labels"].tolist() == [[c, d, e, IGNORE, f, g]]
    assert found["tokens"].tolist() == [[0, c, d, e, mark, f]]
    assert found["bytes"].tolist() == [[1, 1, 1, 0, 1, 1]]


def test_separators_of_bert_are_never_hidden():
    view = view_of("bert", objective=MaskedLM())
    batch = many()
    batch.meta["special"] = {**SPECIAL, "cls": 11, "sep": 12}
    batch["tokens"][:, 1], batch["tokens"][:, 5] = 11, 12
    after = MaskedLM(rate=0.9).batch(batch, view)
    assert (after["labels"][:, [1, 5]] == IGNORE).all() and (after["labels"] != IGNORE).any()


def test_a_document_of_one_token_has_nothing_to_predict():
    method = PrefixLM()
    batch = batch_of(["", "abc"])
    for name in ("t5", "gpt2"):
        found = method.batch(batch, view_of(name, objective=method))
        assert (found["labels"][0] == IGNORE).all() and (found["labels"][1] != IGNORE).any()


def test_an_encoder_decoder_model_takes_one_document_a_row():
    with pytest.raises(UserError, match="one document a row"):
        PrefixLM().batch(packed(TEXTS), view_of("t5", objective=PrefixLM()))

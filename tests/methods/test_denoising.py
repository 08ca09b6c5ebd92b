"""Span corruption and UL2 beside T5's formulas and plain transformers; what is read, what is learned, what is measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.core.tiny import tiny
from tests.methods.small import SPECIAL, batch_of, encode, packed, view_of
from tutelage.base import registry
from tutelage.base.errors import UserError
from tutelage.core.types import IGNORE, Batch
from tutelage.methods._kit import denoising
from tutelage.methods._kit.denoising import counts, fitting, span_mask
from tutelage.methods.objective.prefix_lm import PrefixLM
from tutelage.methods.objective.span_corruption import SpanCorruption
from tutelage.methods.objective.ul2 import UL2

DIGITS = [encode(digit)[1] for digit in "0123456789"]  # sentinels here: `{}` names the tokens 0 to 9
TEXT = "thank you for inviting me to your party last week and mind the gap"
MODES = {"r": "R", "s": "S", "x": "X"}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def corruption(**more: Any) -> SpanCorruption:
    return SpanCorruption(sentinel="{}", **more)


def ul2(**more: Any) -> UL2:
    """Without the two denoisers that would hide more spans than there are digits."""
    return UL2(**{"sentinel": "{}", "tokens": MODES, "extreme": [(8, 0.5), (64, 0.5)], **more})


def restored(source: list[int], target: list[int]) -> list[int]:
    """The text, by putting each sentinel's tokens in its place."""
    parts: dict[int, list[int]] = {}
    for token in target:
        if token in DIGITS and token not in parts:
            parts[token] = []
        elif token != SPECIAL["eos"]:
            parts[list(parts)[-1]].append(token)
    assert [t for t in source if t in DIGITS] == list(parts), "the same sentinels in the same order"
    return [t for token in source for t in parts.get(token, [token])]


def real(row: torch.Tensor) -> list[int]:
    return [token for token in row.tolist() if token not in (0, IGNORE)]


# -- spans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "rate", "mean", "found"),
    [
        (100, 0.15, 3, (15, 5)),
        (512, 0.15, 3, (77, 26)),  # round(76.8), round(25.67)
        (512, 0.5, 8, (256, 32)),
        (512, 0.15, 64, (77, 1)),
        (2, 0.15, 3, (1, 1)),
        (2, 0.9, 1, (1, 1)),
        (10, 0.9, 1, (9, 1)),  # one token stays, so there is one span
    ],
)
def test_tokens_and_spans_are_counted_as_t5_counts_them(
    length: int, rate: float, mean: float, found: tuple[int, int]
) -> None:
    assert counts(length, rate=rate, mean=mean) == found
    mask = span_mask(length, rate=rate, mean=mean, rng=rng())
    starts = mask & ~torch.nn.functional.pad(mask[:-1], (1, 0))
    assert (int(mask.sum()), int(starts.sum())) == found
    assert not mask[0] and mask[-1]


def test_every_division_into_spans_is_equally_likely() -> None:
    """Three of seven tokens in two spans: three ways to part those that stay, two to part those that are hidden."""
    source = rng()
    drawn = [tuple(span_mask(7, rate=3 / 7, mean=1.5, rng=source).tolist()) for _ in range(3000)]
    seen = Counter(drawn)
    assert len(seen) == 6 and all(400 < count < 600 for count in seen.values())


def test_what_fits_is_the_longest_text_that_does() -> None:
    for length, rate, mean, room in [
        (128, 0.5, 3, 125),
        (128, 0.15, 3, 126),
        (40, 0.5, 1, 37),
        (9, 0.3, 2, 4),
        (5, 0.5, 1, 1),
    ]:
        longest = [n for n in range(2, length + 1) if n + 2 * counts(n, rate=rate, mean=mean)[1] <= room]
        assert fitting(length, rate=rate, mean=mean, room=room) == max(longest, default=0)


# -- span corruption --------------------------------------------------------------------------------------------------


def test_the_example_of_the_t5_paper(monkeypatch: Any) -> None:
    """Thank you <X> me to your party <Y> week → <X> for inviting <Y> last, and the end."""
    words = ["thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    letters = "ABCDEFGHIJ"  # a token a word
    hidden = torch.tensor([word in ("for", "inviting", "last") for word in words])
    monkeypatch.setattr(denoising, "span_mask", lambda length, **_: hidden)
    method = corruption(mean=1.5, rate=0.3)
    found = method.batch(batch_of([letters]), view_of("t5", objective=method))
    ids = dict(zip(words, encode(letters)[1:], strict=True))
    x, y = DIGITS[:2]
    assert found["source"].tolist() == [
        [SPECIAL["bos"], ids["thank"], ids["you"], x, *(ids[w] for w in ["me", "to", "your", "party"]), y, ids["week"]]
    ]
    target = [x, ids["for"], ids["inviting"], y, ids["last"], SPECIAL["eos"]]
    assert found["labels"].tolist() == [target]
    assert found["tokens"].tolist() == [[SPECIAL["pad"], *target[:-1]]]


def test_span_corruption_on_t5_is_transformers_own_loss() -> None:
    method = corruption()
    view = view_of("t5", objective=method)
    batch = method.batch(batch_of([TEXT, TEXT[:20]], heldout=False), view)
    found = method.loss(view.engine.out, batch, view)
    model = tiny("t5")
    theirs = model(input_ids=batch["source"], attention_mask=batch["source_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(found.total / found.weight, theirs)
    for i, text in enumerate([TEXT, TEXT[:20]]):
        assert restored(real(batch["source"][i]), real(batch["labels"][i])) == encode(text)


def test_a_decoder_starts_with_its_model_s_own_token() -> None:
    found = PrefixLM().batch(batch_of([TEXT]), view_of("bart", objective=PrefixLM()))
    assert int(found["tokens"][0, 0]) == 2  # bart's, where t5 has the padding


def test_a_causal_model_reads_input_and_target_of_each_document_in_one_row() -> None:
    method = corruption(mean=2)
    view = view_of("llama", objective=method)
    view.length = 120
    texts = [TEXT[:30], TEXT[10:50]]
    found = method.batch(packed(texts), view)
    assert found["tokens"].shape == found["labels"].shape == found["segments"].shape and len(found["tokens"]) == 1
    for number, text in enumerate(texts, 1):
        own = found["segments"][0] == number
        tokens, labels = found["tokens"][0][own], found["labels"][0][own]
        assert found["positions"][0][own].tolist() == list(range(len(tokens)))
        learned = labels != IGNORE
        assert torch.equal(labels[learned], tokens[1:][learned[:-1]]) and not learned[-1]
        begins = int(learned.int().argmax()) + 1  # all that follows is learned, and nothing before
        assert bool(learned[begins - 1 : -1].all())
        assert restored(tokens[:begins].tolist(), tokens[begins:].tolist()) == encode(text)
    loss = method.loss(view.engine.out, found, view)
    assert float(loss.weight) == int((found["labels"] != IGNORE).sum())


def test_a_row_of_a_causal_model_is_no_longer_than_the_stage_says() -> None:
    method = corruption(rate=0.5, mean=8)
    view = view_of("gpt2", objective=method)
    view.length = 40
    for batch in (batch_of([TEXT[:39], TEXT[:12]]), packed([TEXT[:14], TEXT[:9], TEXT[:13]])):
        found = method.batch(batch, view)
        assert found["tokens"].shape[1] <= 40 and bool((found["labels"] != IGNORE).any())
    kept = restored(*parted(method.batch(batch_of([TEXT[:39]]), view)))
    assert kept == encode(TEXT[:39])[: len(kept)] and len(kept) > 30  # the text's beginning


def parted(found: Batch) -> tuple[list[int], list[int]]:
    """Input and target of the first document of a causal model's first row."""
    tokens = real(found["tokens"][0])
    begins = int((found["labels"][0] != IGNORE).int().argmax()) + 1
    return tokens[:begins], tokens[begins:]


def test_what_is_not_learned_is_read_and_has_no_label() -> None:
    method = corruption(rate=0.5, mean=3)
    batch = batch_of([TEXT[:40]], prompt=20)
    found = method.batch(batch, view_of("t5", objective=method))
    prompt = encode(TEXT[:40])[1:21]
    hidden = [t for t in found["tokens"][0, 1:].tolist() if t not in DIGITS]
    learned = [t for t in real(found["labels"][0]) if t not in (*DIGITS, SPECIAL["eos"])]
    assert (
        len(hidden) > len(learned) > 0
        and hidden[: len(hidden) - len(learned)] == [t for t in hidden if t in prompt][: len(hidden) - len(learned)]
    )
    assert encode(TEXT[:40])[-len(learned) :][-1] == learned[-1]


def test_measured_bytes_are_those_of_the_hidden_text_and_rows_keep_their_spans() -> None:
    method = corruption()
    view = view_of("t5", objective=method)
    alone, together = (method.measured(batch_of(texts), view) for texts in ([TEXT], ["日本 und 語", TEXT]))
    width = alone["labels"].shape[1]
    for name in ("labels", "bytes", "tokens"):
        assert torch.equal(alone[name][0], together[name][1, :width])
    view.clock.tick = 5
    assert torch.equal(method.measured(batch_of([TEXT]), view)["source"], alone["source"])
    assert not torch.equal(method.batch(batch_of([TEXT]), view)["source"], alone["source"])
    free = torch.isin(alone["labels"], torch.tensor([*DIGITS, SPECIAL["eos"], IGNORE]))
    assert torch.equal(alone["bytes"] == 0, free)
    sizes = together["bytes"][0].sum()
    hidden = [t for t in real(together["labels"][0]) if t not in (*DIGITS, SPECIAL["eos"])]
    by_token = {encode(c)[1]: len(c.encode()) for c in "日本 und語"}
    assert int(sizes) == sum(by_token[t] for t in hidden) and view.prepared(alone) is alone


def test_tokenizers_without_sentinels_and_rows_with_too_many_spans_are_refused() -> None:
    view = view_of("t5", objective=SpanCorruption())
    with pytest.raises(
        UserError, match="objective/span_corruption: the tokenizer has no tokens '<extra_id_0>'.*sentinels: 100"
    ):
        SpanCorruption().batch(batch_of([TEXT]), view)
    with pytest.raises(UserError, match="has 33 hidden spans, and the tokenizer only 10 sentinels"):
        corruption(rate=0.5, mean=1).batch(batch_of([TEXT]), view)
    with pytest.raises(UserError, match="where the number goes"):
        registry.make({"use": "objective/span_corruption", "sentinel": "<mask>"})
    with pytest.raises(UserError, match="one document a row"):
        corruption().batch(packed([TEXT[:20], TEXT[:9]]), view)


# -- the mixture ------------------------------------------------------------------------------------------------------


def drawn(method: UL2, *, rows: int = 600, text: str = TEXT) -> list[tuple[str, list[int], list[int]]]:
    """Mode, input and target of many rows."""
    batch = method.batch(batch_of([text] * rows, heldout=False), view_of("t5", objective=method))
    names = {encode(token)[1]: mode for mode, token in MODES.items()}
    found = []
    for source, labels in zip(batch["source"], batch["labels"], strict=True):
        front, mode, *rest = real(source)
        assert front == SPECIAL["bos"]
        found.append((names[mode], rest, real(labels)))
    return found


def test_modes_are_drawn_by_their_shares_and_each_says_its_token() -> None:
    seen = drawn(ul2(suffix=0.25))
    count = Counter(mode for mode, *_ in seen)
    assert count["r"] / 600 == pytest.approx(4 / 15, abs=0.06)
    assert count["s"] / 600 == pytest.approx(3 / 15, abs=0.06)
    text = encode(TEXT)[1:]
    size = len(text)
    for mode, source, target in seen:
        spans = sum(t in DIGITS for t in source)
        if mode == "s":
            assert not spans and source + target == text and 1 <= len(target) <= round(0.5 * size)
            continue
        assert restored(source, target) == text
        hidden = len(target) - spans - 1
        wanted = {(round(size * rate), max(1, round(size * rate / mean))) for mean, rate in ul2().regular}
        if mode == "x":
            wanted = {(round(size * rate), max(1, round(round(size * rate) / mean))) for mean, rate in ul2().extreme}
        assert (hidden, spans) in wanted
    lengths = {mode: {sum(t in DIGITS for t in s) for m, s, _ in seen if m == mode} for mode in "rx"}
    assert lengths == {"r": {3, 1}, "x": {4, 1}}, "every denoiser of a mode is drawn"


def test_the_suffix_is_as_long_as_any_other_up_to_twice_its_mean() -> None:
    sizes = torch.tensor(
        [len(target) for _, _, target in drawn(ul2(mode="s", suffix=0.25), rows=1500)], dtype=torch.float
    )
    most = round(0.5 * len(TEXT))
    assert int(sizes.min()) == 1 and int(sizes.max()) == most
    assert float(sizes.mean()) == pytest.approx((1 + most) / 2, rel=0.06)


@pytest.mark.parametrize("mode", ["r", "s", "x"])
def test_a_mode_can_be_had_alone(mode: str) -> None:
    assert {found for found, *_ in drawn(ul2(mode=mode), rows=40)} == {mode}


def test_a_share_that_is_left_out_is_none_and_unasked_sentinels_need_not_be_there() -> None:
    assert {mode for mode, *_ in drawn(ul2(shares={"x": 1}), rows=40)} == {"x"}
    only = UL2(tokens=MODES, shares={"s": 1})
    assert {mode for mode, *_ in drawn(only, rows=5)} == {"s"}
    with pytest.raises(UserError, match="one at least is above 0"):
        registry.make({"use": "objective/ul2", "shares": {"r": 0}})


def test_a_mode_token_may_be_several_tokens_or_none() -> None:
    method = UL2(sentinel="{}", tokens={"s": "[S2S]", "r": ""}, mode="s")
    assert method.tokens == {"r": "", "s": "[S2S]", "x": "[NLG]"}
    found = method.batch(batch_of([TEXT]), view_of("t5", objective=method))
    assert found["source"][0, 1:6].tolist() == encode("[S2S]")[1:]
    bare = UL2(sentinel="{}", tokens={"r": ""}, mode="r")
    view = view_of("t5", objective=bare)
    found = bare.batch(batch_of([TEXT]), view)
    assert restored(real(found["source"][0]), real(found["labels"][0])) == encode(TEXT)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_held_out_text_is_measured_on_the_bytes_that_prefix_lm_measures(name: str) -> None:
    texts = [TEXT, "Grüße aus Köln, 日本語", TEXT[5:31]]
    method, other = ul2(), PrefixLM()
    view = view_of(name, objective=method)
    view.length = len(encode(TEXT))  # no room for the mode token: what is given gives way
    ours, theirs = method.measured(batch_of(texts), view), other.measured(batch_of(texts), view)
    for i in range(len(texts)):
        kept = [(batch["labels"][i] != IGNORE) & (batch["bytes"][i] > 0) for batch in (ours, theirs)]
        for field in ("labels", "bytes"):
            assert ours[field][i][kept[0]].tolist() == theirs[field][i][kept[1]].tolist()
    source = ours["source" if name == "t5" else "tokens"]
    assert source[:, 1].tolist() == [encode("S")[1]] * 3
    assert ours["tokens"].shape[1] <= view.length


def test_a_mode_token_that_has_no_room_is_left_out_and_no_row_is_longer_than_the_stage_says() -> None:
    method, other = ul2(tokens={"s": "[S2S]"}), PrefixLM()
    view = view_of("gpt2", objective=method)
    texts = [TEXT[i:] for i in range(20)] + [TEXT[:i] for i in range(3, 40)]
    lacking = 0
    for text in texts:
        view.length = len(encode(text))
        ours, theirs = method.measured(batch_of([text]), view), other.measured(batch_of([text]), view)
        assert ours["tokens"].shape[1] <= view.length
        for field in ("labels", "bytes"):
            kept = [batch[field][(batch["labels"] != IGNORE) & (batch["bytes"] > 0)] for batch in (ours, theirs)]
            assert kept[0].tolist() == kept[1].tolist()
        lacking += ours["tokens"][0, 1:6].tolist() != encode("[S2S]")[1:]
    assert 0 < lacking < len(texts) / 2
    view.length = 20
    prompted = method.batch(batch_of([TEXT[:19]], prompt=2), view)
    assert prompted["tokens"].shape[1] == 20 and real(prompted["labels"][0]) == encode(TEXT[:19])[3:]


def test_a_mode_token_is_no_sentinel() -> None:
    method = UL2(sentinel="{}", tokens={"r": "4", "s": "S", "x": "X"}, regular=[(3, 0.15)], mode="r")
    view = view_of("t5", objective=method)
    assert method.batch(batch_of([TEXT]), view)["source"][0, 1] == DIGITS[4]
    with pytest.raises(UserError, match="has 7 hidden spans, and the tokenizer only 4 sentinels"):
        method.batch(batch_of([TEXT + TEXT]), view)


def test_held_out_text_is_measured_in_the_mode_that_is_asked_for() -> None:
    for settings, mode in (({"mode": "x"}, "X"), ({"mode": "x", "heldout": "r"}, "R"), ({"heldout": "x"}, "X")):
        method = ul2(**settings)
        found = method.measured(batch_of([TEXT]), view_of("t5", objective=method))
        assert int(found["source"][0, 1]) == encode(mode)[1]


@pytest.mark.parametrize(("mode", "token"), [(None, "S"), ("r", "R"), ("x", "X")])
def test_where_answers_are_marked_they_are_the_target_behind_the_mode_token(mode: Any, token: str) -> None:
    method = ul2(mode=mode)
    batch = batch_of(["ab?cde"], prompt=3)
    found = method.batch(batch, view_of("t5", objective=method))
    assert found["source"].tolist() == [[SPECIAL["bos"], *encode(token)[1:], *encode("ab?")[1:]]]
    assert found["labels"].tolist() == [encode("cde")[1:]]
    causal = method.measured(batch, view_of("gpt2", objective=method))
    assert causal["labels"][causal["labels"] != IGNORE].tolist() == encode("cde")[1:]


def test_a_document_of_one_token_is_read_only() -> None:
    for name in ("t5", "gpt2"):
        for mode in ("r", "s", "x"):
            method = ul2(mode=mode)
            found = method.batch(batch_of(["", TEXT]), view_of(name, objective=method))
            assert (found["labels"][0] == IGNORE).all() and (found["labels"][1] != IGNORE).any()

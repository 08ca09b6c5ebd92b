import json
import random
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.recipes import families
from tests.text.conftest import SAMPLES
from tutelage.base.errors import UserError
from tutelage.modalities.text import encode, template, tokenizer
from tutelage.modalities.text.encode import Encoder, spread
from tutelage.modalities.text.modality import special_tokens
from tutelage.modalities.text.pieces import answers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # drops the thoughts of all answers but the last, as reasoning models do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hallo, größe?"},
    {"role": "assistant", "content": "first answer 🎉"},
    {"role": "user", "content": "first answer 🎉"},
    {"role": "assistant", "content": "thoughts</think>second  answer\n"},
]


encoder_of = lru_cache(Encoder)


@given(text=st.text(st.characters(codec="utf-8")))
@settings(deadline=None, max_examples=60)
def test_byte_lengths_sum_to_the_text_for_every_kind_of_tokenizer(text, plain, bpe, unigram):
    for one in plain, bpe, unigram:
        encoder = encoder_of(one)
        (ids,) = encoder.ids([text])
        if len(ids):  # a text of white space alone may come out as nothing
            assert encoder.byte_lengths(text, ids).sum() == len(text.encode())


@pytest.mark.parametrize("text", SAMPLES)
def test_byte_lengths_are_those_of_each_token(text, plain, bpe):
    for one in plain, bpe:
        encoder = Encoder(one)
        (ids,) = encoder.ids([text])
        lengths = encoder.byte_lengths(text, ids)
        raw, at = text.encode(), 0
        for i, length in zip(ids.tolist(), lengths.tolist(), strict=True):
            letters = one.convert_ids_to_tokens(i)
            assert bytes(tokenizer.byte_letters().index(c) for c in letters) == raw[at : at + length]
            at += length
        assert at == len(raw)


LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def split_otherwise(bpe):
    """The vocabulary of `bpe`, split by the pattern of Llama 3 after a normalizer as Qwen has it."""
    inner = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>")


@given(st.lists(st.one_of(st.sampled_from([*SAMPLES, " ", "'S", "'ſ", "12345", "<eos>", "\x1c", "\u2028", "\u0345"]),
                          st.text(st.characters(codec="utf-8"), max_size=6))))  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_ids_by_words_are_the_library_s(bpe, split_otherwise, parts):
    text = "".join(parts)
    for one in bpe, split_otherwise:
        encoder = encoder_of(one)
        assert encoder._words is not None
        encoder._words.seen = encoder._words.new = 0
        assert np.array_equal(encoder.ids([text])[0], encoder._by_library([text])[0])


def test_words_that_never_come_again_are_left_to_the_library(bpe):
    encoder = Encoder(bpe)
    letters = random.Random(0).choices("abcdefgh", k=20_020)
    text = " ".join("".join(letters[i : i + 13]) for i in range(20_000))
    (first,) = encoder.ids([text])
    assert encoder._words.ids(["again"]) == [None]
    assert np.array_equal(encoder.ids([text])[0], first)


def test_bytes_are_divided_among_tokens_that_share_a_character():
    assert spread(np.array([1, 1, 1, 2]), "🎉a").tolist() == [2, 1, 1, 1]
    assert spread(np.array([2, 5]), "a b  ").tolist() == [2, 3]
    assert spread(np.array([0, 1, 1]), "é  ").tolist() == [0, 2, 2]


def test_long_texts_are_cut_where_it_changes_nothing(monkeypatch, plain, bpe, unigram):
    text = "".join(SAMPLES) * 40
    for one in bpe, unigram:
        encoder = Encoder(one)
        whole, ends = encoder.ids_and_ends([text])[0]
        monkeypatch.setattr(encode, "CUT", 700)
        assert len(list(encoder._parts(text))) > 5
        cut, cut_ends = encoder.ids_and_ends([text])[0]
        assert np.array_equal(whole, cut) and np.array_equal(ends, cut_ends)
        assert np.array_equal(encoder.ids([text])[0], whole)
        monkeypatch.undo()


def test_bytes_are_their_own_ids_and_survive_saving(tmp_path, plain):
    text = "héllo 🎉\n"
    assert plain(text, add_special_tokens=False).input_ids == list(text.encode())
    assert Encoder(plain).ids([text, "a<eos>"])[0].tolist() == list(text.encode())
    assert Encoder(plain).ids(["a<eos>"])[0].tolist() == [97, plain.eos_token_id]
    plain.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.decode(again(text).input_ids) == text
    assert tokenizer.fingerprint(again) == tokenizer.fingerprint(plain)
    alone = tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert (alone.bos_token, alone.eos_token, alone.pad_token) == ("<bos>", "<eos>", "<pad>")


def test_training_gives_the_same_tokenizer_every_time(monkeypatch, bpe):
    for threads in "true", "false":
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
        again = tokenizer.train(iter(SAMPLES * 3), vocab=400)
        assert tokenizer.fingerprint(again) == tokenizer.fingerprint(bpe)
    assert len(bpe) == 400


def test_a_trained_tokenizer_is_kept_and_opened_again(tmp_path):
    def never():
        raise AssertionError("trained twice")
        yield

    one = tokenizer.train(SAMPLES, vocab=300, cache=tmp_path, key="samples")
    two = tokenizer.train(never(), vocab=300, cache=tmp_path, key="samples")
    assert tokenizer.fingerprint(one) == tokenizer.fingerprint(two)
    assert [p.name for p in (tmp_path / "tokenizers").iterdir() if p.name.startswith(".")] == []


def test_sentinels_are_tokens_of_their_own_and_survive_saving(tmp_path):
    wanted = tokenizer.settings({"train": "bpe", "vocab": 320, "sentinels": 5})
    made = tokenizer.train(SAMPLES * 3, **wanted, cache=tmp_path, key="samples")
    assert len(made) == 320 == len(tokenizer.train(SAMPLES * 3, vocab=320, cache=tmp_path, key="samples"))
    tokenizer.save(made, tmp_path / "saved")
    for one in (made, tokenizer.load(str(tmp_path / "saved"))):
        ids = one("a<extra_id_0>b<extra_id_4>", add_special_tokens=False).input_ids
        assert len(ids) == 4 and ids[1::2] == made.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_4>"])
        assert one.decode(ids, skip_special_tokens=True) == "ab"
        assert Encoder(one).byte_lengths("ab", np.array(Encoder(one).ids(["ab"])[0])).sum() == 2
    assert len(list((tmp_path / "tokenizers").iterdir())) == 2
    with pytest.raises(UserError, match="at least 264.*5 sentinels"):
        tokenizer.train(SAMPLES, vocab=263, sentinels=5)
    for wrong in ({"vocab": 300, "sentinels": -1}, {"vocab": 300, "sentinel": 1}, {"vocab": True}):
        with pytest.raises(UserError, match="is not known"):
            tokenizer.settings({"train": "bpe", **wrong})


def test_what_decides_about_tokens_changes_the_fingerprint(bpe, plain, tmp_path):
    bpe.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.chat_template = CHATML
    assert len({tokenizer.fingerprint(one) for one in (bpe, plain, other)}) == 3
    before = tokenizer.fingerprint(bpe)
    bpe(SAMPLES[:2], padding=True, truncation=True, max_length=5)
    assert tokenizer.fingerprint(bpe) == before
    assert len(Encoder(bpe).ids([SAMPLES[0]])[0]) > 5


def test_a_tokenizer_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer"):
        tokenizer.load("./nothing")
    with pytest.raises(UserError, match="holds no tokenizer"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no tokenizer\.json"):
        tokenizer.load(str(tmp_path))
    with pytest.raises(UserError, match="at least 259"):
        tokenizer.train(["a"], vocab=100)


def answers_of(talk, tokenizer_):
    text, spans = template.render(talk, tokenizer_)
    return [text[a:b] for a, b in spans]


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (None, ["first answer 🎉<eos>", "thoughts</think>second  answer\n<eos>"]),
        (CHATML, ["first answer 🎉<|im_end|>", "thoughts</think>second  answer\n<|im_end|>"]),
        (FORGETFUL, ["first answer 🎉<|im_end|>", "thoughts</think>second  answer\n<|im_end|>"]),
        (MARKED, ["first answer 🎉</s>", "thoughts</think>second  answer\n</s>"]),
    ],
)
def test_only_answers_and_their_ends_of_turn_are_learned(monkeypatch, plain, written, found):
    monkeypatch.setattr(plain, "chat_template", written)
    assert answers_of(TALK, plain) == found
    text, spans = template.render(TALK, plain)
    ids, ends = Encoder(plain).ids_and_ends([text])[0]
    assert plain.decode(ids[answers(ends, spans)].tolist()) == "".join(found)


def test_answers_whose_thoughts_a_template_drops_are_found_again(monkeypatch, plain):
    monkeypatch.setattr(plain, "chat_template", FORGETFUL)
    talk = [*TALK[1:2], TALK[4], *TALK[1:3]]
    assert answers_of(talk, plain) == ["second  answer\n<|im_end|>", "first answer 🎉<|im_end|>"]


def test_a_template_that_refuses_says_so(monkeypatch, plain):
    monkeypatch.setattr(plain, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match="no system role"):
        template.render(TALK, plain)
    with pytest.raises(UserError, match="no system role"):
        template.check("mine", plain)


def test_a_prompt_is_set_apart_from_its_answer():
    assert template.joined("Why?", "So.") == ("Why?\n", "So.")
    assert template.joined("Why? ", "So.") == ("Why? ", "So.")
    assert template.joined("Why?", " So.") == ("Why?", " So.")


def test_a_mask_token_comes_last_among_the_special_ones_and_moves_no_byte(tmp_path, plain):
    made = tokenizer.bytes_tokenizer(mask=True)
    assert (len(made), made.mask_token_id) == (260, 259)
    assert Encoder(made).ids(["héllo"])[0].tolist() == list("héllo".encode())
    bpe = tokenizer.train(SAMPLES, vocab=300, mask=True)
    assert len(bpe) == 300 and bpe.convert_ids_to_tokens([0, 1, 2, 3]) == ["<bos>", "<eos>", "<pad>", "<mask>"]
    bpe.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    encoder = Encoder(bpe)
    for text in SAMPLES:  # what plain transformers feeds the model is what it was trained on
        ids = [*encoder.front, *encoder.ids([text])[0].tolist(), *encoder.back]
        assert again(text).input_ids == ids
    assert tokenizer.load(str(tmp_path / "tokenizer.json")).mask_token == "<mask>"
    assert plain.mask_token is None and tokenizer.fingerprint(plain) != tokenizer.fingerprint(made)
    with pytest.raises(UserError, match="at least 260 .*mask"):
        tokenizer.train(["a"], vocab=259, mask=True)


def test_documents_for_bert_stand_between_cls_and_sep_as_its_tokenizer_writes_them(plain):
    bert = families.tokenizer("bert")
    encoder = Encoder(bert)
    for text in families.sentences(5):
        assert [*encoder.front, *encoder.ids([text])[0].tolist(), *encoder.back] == bert(text).input_ids
    assert encoder.front == [bert.cls_token_id] and encoder.back == [bert.sep_token_id]
    assert Encoder(plain).front == [plain.bos_token_id]
    special = special_tokens(bert)
    assert {special["cls"], special["sep"]} == {bert.cls_token_id, bert.sep_token_id}


@pytest.mark.parametrize("family", ["qwen2", "llama", "bert"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_tokenizer_made_for_a_family_opens_alike_in_plain_transformers(tmp_path, family, kind):
    made = (
        tokenizer.bytes_tokenizer(family=family)
        if kind == "bytes"
        else tokenizer.train(SAMPLES * 3, vocab=400, family=family)
    )
    tokenizer.save(made, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), tokenizer.load(str(tmp_path))
    assert len(theirs) == len(ours) == len(made)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        made.bos_token_id,
        made.eos_token_id,
        made.pad_token_id,
    )
    for text in [*SAMPLES, "it's 2024, 12345\n\n  e\u0301 <eos>"]:
        ids = [one(text, add_special_tokens=False).input_ids for one in (made, theirs, ours)]
        assert ids[0] == ids[1] == ids[2] and ids[0] == Encoder(made).ids([text])[0].tolist()
        assert Encoder(made).byte_lengths(text, np.array(ids[0])).sum() == len(text.encode())
    assert tokenizer.fingerprint(ours) == tokenizer.fingerprint(made)


def test_the_place_of_a_tokenizer_does_not_move_for_families_that_are_believed(tmp_path):
    plain = tokenizer.place_of(tmp_path, vocab=300, mask=False, family=None, key="a")
    assert tokenizer.place_of(tmp_path, vocab=300, mask=False, family="llama", key="a") == plain
    others = {
        tokenizer.place_of(tmp_path, vocab=300, mask=m, family=f, key="a") for m, f in ((True, None), (False, "qwen2"))
    }
    assert len({*others, plain}) == 3

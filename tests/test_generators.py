"""The records that benches make up are the same for the same seed, and are what they say."""

import base64
import json
import random
import zlib
from collections import Counter
from itertools import islice
from math import log2

from bench import ciphers, duplicated, few_passages, grammars, manners, spoiled, undecoded
from bench.grammars import LETTERS, Sentences


def test_sentences_are_the_same_for_the_same_seed_and_share_their_rules():
    one, two = list(Sentences(50)), list(Sentences(50))
    other, rules = list(Sentences(50, seed=1)), list(Sentences(50, grammar=1))
    assert one == two and one != other and one != rules
    assert Sentences(1, seed=1).levels == Sentences(1).levels != Sentences(1, grammar=1).levels
    assert {letter for record in one for letter in record["text"]} <= set(LETTERS)


def derivable(text, levels, bits):
    """Whether two symbols derive a text by the rules that the bits choose, tried out from the letters upwards."""
    level_sets = [level[int(bit)] for level, bit in zip(levels, bits, strict=True)]
    row = [LETTERS.index(letter) for letter in text]
    rows = {tuple(row)}
    for rules in reversed(level_sets):
        found = set()
        for symbols in rows:
            found |= parents(symbols, rules)
        rows = found
    return any(len(symbols) == 2 for symbols in rows)


def parents(symbols, rules):
    """Every row of symbols that one step of the rules turns into this one."""
    ends = {0: {()}}
    for at in range(len(symbols)):
        for head in ends.pop(at, ()):
            for symbol, choices in enumerate(rules):
                for children in set(choices):
                    if symbols[at : at + len(children)] == children:
                        ends.setdefault(at + len(children), set()).add((*head, symbol))
    return ends.get(len(symbols), set())


def test_a_sentence_is_one_of_the_grammar_that_its_tag_names():
    made = Sentences(12, depth=2)
    rules = made.levels
    mine = other = 0
    for record in made:
        flipped = record["tag"][0] + str(1 - int(record["tag"][1]))
        mine += derivable(record["text"], rules, record["tag"])
        other += derivable(record["text"], rules, flipped)
    assert mine == 12 > other


def test_only_the_first_bits_are_told_where_the_recipe_says_so():
    whole, part = list(Sentences(20, depth=4)), list(Sentences(20, depth=4, told=2))
    assert [r["text"] for r in whole] == [r["text"] for r in part]
    assert [r["tag"][:2] + "??" for r in whole] == [r["tag"] for r in part]


def test_all_but_the_measured_bytes_are_masked():
    assert next(iter(Sentences(1, measured=(4, 16))))["mask"] == [[0, 4], [16, grammars.FAR]]
    assert "mask" not in next(iter(Sentences(1)))


def test_a_tag_that_is_said_moves_what_is_measured_along():
    plain, said = (next(iter(Sentences(1, measured=(1, 200), said=said))) for said in (False, True))
    assert said["text"] == f"{plain['tag']} {plain['text']}"
    (_, first), (last, _) = said["mask"]
    (_, a), (b, _) = plain["mask"]
    assert said["text"][first:last] == plain["text"][a:b]


def test_a_copy_is_its_passage_but_for_a_few_words_its_ends_and_a_line():
    words = [f"word{i}" for i in range(400)]
    text = " ".join(words)
    copies = [duplicated.changed(text, ["other"], 10, random.Random(i)) for i in range(20)]
    assert len(set(copies)) == 20
    for copy in copies:
        line, _, rest = copy.partition("\n")
        assert set(line.split()) == {"other"}
        kept = [word for word in rest.split() if word != "other"]
        assert 360 <= len(kept) < 400 and kept == [word for word in words if word in set(kept)]


def test_some_passages_stand_there_often_and_most_once(monkeypatch):
    monkeypatch.setattr(duplicated, "passages", lambda: (f"passage {i} " + "and so on " * 50 for i in range(300)))
    records = list(duplicated.Copied())
    originals = [record for record in records if not record["copy"]]
    assert len(originals) == 300 and len(records) > 400
    counts = sorted(sum(r["passage"] == n for r in records) for n in range(300))
    assert counts[150] == 1 and 10 < counts[-1] <= 61
    assert records == list(duplicated.Copied()) != list(duplicated.Copied(seed=1))
    assert len([r for r in islice(duplicated.Copied(10), 1000) if not r["copy"]]) == 10


def test_what_was_not_decoded_says_nothing_of_its_next_letter(monkeypatch, tmp_path):
    rng = random.Random(0)
    said = ["".join(rng.choice("etaoin shrdlu") for _ in range(1500)) for _ in range(40)]
    monkeypatch.setattr(undecoded, "passages", lambda: iter(said))
    texts = [record["text"] for record in undecoded.undecoded(30)]
    assert [zlib.decompress(base64.b64decode(text)).decode() for text in texts] == said[:30]
    counts = Counter("".join(texts))
    whole = sum(counts.values())
    assert 5.9 < -sum(n / whole * log2(n / whole) for n in counts.values()) <= 6.01
    undecoded.write(tmp_path / "made" / "delivery.jsonl", count=30)
    lines = (tmp_path / "made" / "delivery.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts


def test_what_is_spoiled_lies_in_one_place_and_the_rest_is_all_there(monkeypatch):
    code = [f"def f{i}():\n    return {i}\n" * 20 for i in range(100)]
    letters = "".join(random.Random(0).choice("abcdefgh") for _ in range(9000))
    monkeypatch.setattr(spoiled, "passages", lambda: iter(code))
    monkeypatch.setattr(spoiled, "undecoded", lambda count: [{"text": letters}])
    texts = [record["text"] for record in spoiled.Spoiled(at=20_000, size=4_000)]
    bad = [i for i, text in enumerate(texts) if text in letters]
    assert bad == list(range(bad[0], bad[0] + 10)) and "".join(texts[i] for i in bad) == letters[:4_000]
    assert 20_000 <= sum(map(len, texts[: bad[0]])) < 21_000
    rest = [text for text in texts if text not in letters]
    assert sorted(rest) == sorted(code) and rest != code
    assert rest != [record["text"] for record in spoiled.Spoiled(at=20_000, size=0, seed=1)]


def test_code_is_cut_at_lines_into_pieces_as_long_as_a_row(monkeypatch):
    text = "".join(f"line {i} of a module\n" for i in range(200))
    monkeypatch.setattr(spoiled.stdlib, "records", lambda name, split: iter([{"text": text}]))
    found = list(spoiled.passages())
    assert text.startswith("".join(found)) and {p[-1] for p in found} == {"\n"}
    assert all(spoiled.PASSAGE <= len(p) < spoiled.PASSAGE + 30 for p in found)


def test_ciphers_of_the_same_prose_are_told_apart_by_their_letters_alone(monkeypatch):
    prose = "The Cat sat; 7 cats ran.\n\n" * 9
    monkeypatch.setattr(ciphers.stdlib, "records", lambda name, split: iter([{"text": prose}]))
    plain, one, again, two = (list(ciphers.Enciphered(key, size=50)) for key in (0, 1, 1, 2))
    assert plain[0]["text"] == "The Cat sat; 7 cats ran.\n\n" * 2 and one == again
    assert len({made[0]["text"] for made in (plain, one, two)}) == 3
    back = {new: old for old, new in ciphers.cipher(1).items()}
    assert one[0]["text"].translate(back) == plain[0]["text"]
    assert one[0]["text"][3] == " " and one[0]["text"][4].isupper()


def test_manners_are_the_same_for_the_same_seed_and_their_rewards_count_rude_words():
    records = list(manners.Manners(2000))
    assert records == list(manners.Manners(2000)) != list(manners.Manners(2000, seed=1))
    for record in records:
        said = [word.strip(".?") for word in record["text"].split()]
        assert record["reward"] == -sum(word in manners.RUDE for word in said)
    assert 0.25 < sum(record["reward"] < 0 for record in records) / len(records) < 0.35
    assert {r["reward"] < 0 for r in manners.Manners(50, only="bad")} == {True}
    told = list(manners.Manners(50, only="good", said="<|good|>"))
    plain = list(manners.Manners(50, only="good"))
    assert [r["text"] for r in told] == ["<|good|>" + r["text"] for r in plain]
    assert all(r["mask"] == [[0, 8]] and r["reward"] == 0 for r in told)


def test_few_passages_of_a_task_are_some_kilobytes_and_none_of_the_measured_code_or_records(monkeypatch):
    asked = []
    module = "".join(f"line {i} of a module\n" for i in range(60))
    monkeypatch.setattr(few_passages.stdlib, "records", lambda *at: asked.append(at) or iter([{"text": module}] * 9))
    for task in ("code", "asked", "records"):
        found = list(few_passages.Few(task, kilobytes=2))
        size = sum(len(text.encode()) for record in found for text in record.values())
        assert found == list(few_passages.Few(task, kilobytes=2)) and 2000 <= size < 3000
    assert set(asked) == {("stdlib:code", "train")}
    assert all(record["text"] in module for record in few_passages.Few("code", kilobytes=2))
    measured = [record["text"] for record in few_passages.Records(2000)]
    assert not any(record["text"] in measured for record in few_passages.Few("records"))

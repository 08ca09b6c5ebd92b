"""Near-duplicates found by signatures are those that brute force finds."""

import os
import random

import orjson
import pytest
import torch

from tests import toy
from tutelage.base.errors import UserError
from tutelage.base.spec import SourceSpec
from tutelage.core.run import run_graph
from tutelage.core.types import Document
from tutelage.methods.filter.near_duplicates import NearDuplicates, stretches
from tutelage.modalities.text.documents import Documents
from tutelage.planning import plan

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "ro", "su", "ti") for b in ("b", "d", "f", "g", "n", "s")]


def documents(texts):
    return [
        Document(text, {"origin": {"source": "s", "file": "f", "line": i}, "text": text, "n": i})
        for i, text in enumerate(texts)
    ]


def planted(seed=0, clusters=40, copies=3, words=150):
    """Texts of random words, each with copies of which up to a tenth of the words are others, in mixed order."""
    rng = random.Random(seed)
    texts = []
    for _ in range(clusters):
        own = [rng.choice(WORDS) for _ in range(words)]
        texts.append(" ".join(own))
        for _ in range(copies):
            share = rng.random() / 10
            texts.append(" ".join(rng.choice(WORDS) if rng.random() < share else word for word in own))
    return rng.sample(texts, len(texts))


def similarity(texts, **settings):
    sets = [stretches(text, settings.get("unit", "word"), settings.get("width", 5)) for text in texts]
    return {(j, i): len(a & sets[j]) / len(a | sets[j]) for i, a in enumerate(sets) for j in range(i)}


def found(texts, **settings):
    """For each pair whether it was put in one cluster."""
    root = NearDuplicates(**settings)._clusters(documents(texts))
    return {(j, i): root[i] == root[j] for i in range(len(texts)) for j in range(i)}


def test_stretches_are_of_words_or_of_characters_and_case_and_marks_count_nothing():
    assert stretches("The cat, the CAT!", "word", 2) == {b"the cat", b"cat the"}
    assert stretches("Ab  c", "character", 3) == {b"ab ", b"b c"}
    assert stretches("one", "word", 5) == {b"one"} and stretches("...", "word", 5) == set()
    assert stretches("東京都", "character", 2) == {"東京".encode(), "京都".encode()}


@pytest.mark.parametrize(
    "settings", [{"threshold": 0.8}, {"threshold": 0.5}, {"threshold": 0.6, "unit": "character", "width": 8}]
)
def test_planted_copies_are_found_as_by_brute_force(settings):
    """Pairs a clear step (3 standard errors of 256 numbers) above the threshold are found, and no pair below it."""
    texts = planted()
    alike, together = similarity(texts, **settings), found(texts, permutations=256, **settings)
    threshold, error = settings["threshold"], 3 * 0.5 / 256**0.5
    above = [pair for pair, j in alike.items() if j >= threshold + error]
    assert len(above) >= 20
    assert sum(together[pair] for pair in above) >= 0.98 * len(above)
    chained = linked(len(texts), [pair for pair, j in alike.items() if j >= threshold - error])
    wrong = [pair for pair, yes in together.items() if yes and chained[pair[0]] != chained[pair[1]]]
    assert not wrong, "two documents were put together that no chain of alike ones joins"


def linked(count, pairs):
    """Clusters by brute force: the smallest number that pairs connect each document with."""
    root = list(range(count))
    for _ in range(count):
        before = list(root)
        for j, i in pairs:
            root[i] = root[j] = min(root[i], root[j])
        if root == before:
            break
    return root


def test_of_a_cluster_the_first_is_kept_and_says_how_many_there_were():
    texts = ["a b c d e f", "x y z w v u", "A b c, d e f!", "a b c d e f"]
    method = NearDuplicates()
    rows = list(method.rewrite(documents(texts)))
    assert [(row["n"], row["copies"]) for row in rows] == [(0, 3), (1, 1)]
    assert rows[0]["text"] == texts[0] and rows[0]["made_by"] == "filter/near_duplicates"
    assert rows[0]["origin"] == {"source": "s", "file": "f", "line": 0} and "copy_of" not in rows[0]
    assert method.state == {"read": 4, "clusters": 2, "dropped": 2}


def test_or_the_longest():
    texts = ["a b c d e f", "a b c d e f ", "a b c d e f"]
    assert [row["n"] for row in NearDuplicates(keep="longest").rewrite(documents(texts))] == [1]
    assert [row["n"] for row in NearDuplicates(keep="longest").rewrite(documents(texts[:1] * 3))] == [0]


def test_without_dropping_every_row_is_written_with_its_tags():
    texts = ["a b c d e f", "x y z w v u", "a b c d e f"]
    method = NearDuplicates(drop=False)
    rows = list(method.rewrite(documents(texts)))
    assert [row["n"] for row in rows] == [0, 1, 2] and [row["copies"] for row in rows] == [2, 1, 2]
    assert [row.get("copy_of") for row in rows] == [None, None, {"source": "s", "file": "f", "line": 0}]
    kept = [{k: v for k, v in row.items()} for row in rows if "copy_of" not in row]
    assert kept == list(NearDuplicates().rewrite(documents(texts))), "dropping what has the tag is dropping"


def test_clusters_are_chains_of_alike_documents():
    """The last is alike the middle one, not the first; the three are one cluster, whatever order they come in."""
    words = [f"w{i}" for i in range(60)]
    chain = [" ".join(words[i : i + 40]) for i in (0, 8, 16)]
    alike = similarity(chain, width=1)
    assert alike[0, 1] > 0.6 > alike[0, 2] and alike[1, 2] > 0.6
    for order in ((0, 1, 2), (0, 2, 1), (2, 0, 1)):
        settings = {"threshold": 0.58, "width": 1, "permutations": 512}
        assert all(found([chain[i] for i in order], **settings).values())


def test_texts_without_words_are_alike_only_if_they_are_the_same():
    rows = list(NearDuplicates(threshold=0.1).rewrite(documents(["...", "!!!", "...", "…"])))
    assert [row["copies"] for row in rows] == [2, 1, 1]


def test_any_number_of_processes_finds_the_same():
    texts = planted(clusters=60)
    threads = torch.get_num_threads()
    try:
        rows = {}
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rows[count] = list(NearDuplicates(threshold=0.5).rewrite(documents(texts)))
    finally:
        torch.set_num_threads(threads)
    assert rows[1] == rows[2] == rows[3] and len(rows[1]) < len(texts)


def test_no_more_than_a_few_groups_of_documents_are_read_ahead():
    """What is held of the texts is bounded: signatures come out while documents still come in."""
    read = []

    def endless():
        for i in range(10**9):
            read.append(i)
            yield Document(f"text {i}", {})

    signatures = NearDuplicates()._signatures(endless())
    for _ in range(5):
        next(signatures)
    signatures.close()
    assert len(read) <= 64 * 10


def run(folder, change):
    made = toy.graph(folder, steps=2, change=change)
    result = run_graph(made, only=None, jobs=0, drift="refuse", tell=lambda stage, said: None)
    return made, result


def lines(node):
    return [orjson.loads(line) for line in (node.artifact / "data/rows.jsonl").read_bytes().splitlines()]


def test_a_stage_filters_two_sources_and_another_learns_from_it_without_any_model(tmp_path):
    """Held-out records stay out, provenance goes on through a second filter, and no weights are opened for it."""
    texts = [*planted(clusters=8, words=30), *(f"alone {i}" for i in range(4))]
    for name, some in (("x", texts), ("y", texts[:6])):
        (tmp_path / f"{name}.jsonl").write_bytes(
            b"".join(orjson.dumps({"content": text, "year": 1999}) + b"\n" for text in some)
        )

    def change(recipe):
        recipe["stages"]["filtered"] = {
            "make": {"use": "filter/near_duplicates", "threshold": 0.5},
            "data": {name: {"path": str(tmp_path / f"{name}.jsonl"), "val": "20%"} for name in "xy"},
        }
        recipe["stages"]["again"] = {
            "make": {"use": "filter/near_duplicates", "threshold": 0.01, "width": 1, "drop": False},
            "data": {"filtered": {"stage": "filtered", "val": 0}},
        }
        recipe["stages"]["two"]["data"] = {"b": {"stage": "again", "val": "20%"}}

    planned = {row["stage"]: row for row in plan(toy.graph(tmp_path, steps=2, change=change))}
    assert planned["filtered"]["does"] == "writes with filter/near_duplicates" and "params" not in planned["filtered"]
    made, result = run(tmp_path, change)
    assert not result.failed
    rows, again = lines(made.nodes["filtered"]), lines(made.nodes["again"])
    known = [row["content"] for row in rows]
    assert 5 < len(known) < len(texts) and set(known) <= set(texts)
    assert {row["origin"]["source"] for row in rows} == {"x"}, "what y has, x had first"
    assert all(os.path.basename(row["origin"]["file"]) == "x.jsonl" and row["year"] == 1999 for row in rows)
    assert [texts[row["origin"]["line"] - 1] for row in rows] == known
    assert sum(row["copies"] for row in rows) < len(texts) + 6, "held-out records are not among them"
    assert [row["origin"] for row in again] == [row["origin"] for row in rows]
    counts = orjson.loads((made.nodes["filtered"].artifact / "counts.json").read_bytes())
    assert counts["rows"] == counts["clusters"] == counts["read"] - counts["dropped"] == len(rows)
    assert toy.numbers(made.nodes["two"].folder, kind="train")


def test_a_stage_that_filters_nothing_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="stages.made.make: filter/near_duplicates rewrites rows; name them under `data`"
    ):
        run(tmp_path, lambda recipe: recipe["stages"].update(made={"make": "filter/near_duplicates"}))


def test_a_malformed_record_is_fatal_where_the_recipe_says_so(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a b"}\n{"text": 3}\n')
    data = {"x": {"path": str(tmp_path / "x.jsonl"), "bad": "fatal", "val": 0}}
    with pytest.raises(UserError, match="data.x: .*x.jsonl line 2: .* write `bad: skip`"):
        run(tmp_path, lambda recipe: recipe["stages"].update(made={"make": "filter/near_duplicates", "data": data}))


def test_conversations_are_compared_by_all_that_is_said(tmp_path):
    chats = [[{"role": "user", "content": "hello there"}, {"role": "assistant", "content": a}] for a in ("yes", "no")]
    (tmp_path / "c.jsonl").write_bytes(b"".join(orjson.dumps({"messages": chat}) + b"\n" for chat in chats))
    (tmp_path / "d.jsonl").write_bytes(orjson.dumps({"prompt": "hello", "answer": "yes"}) + b"\n")
    specs = {name: (SourceSpec(path=str(tmp_path / f"{name}.jsonl"), val=0.0), None) for name in "cd"}
    found = Documents(specs, cache=tmp_path)
    assert [document.text for document in found] == ["hello there\nyes", "hello there\nno", "hello\nyes"]
    assert list(found) == list(found) and next(iter(found)).row["messages"] == chats[0]
    (tmp_path / "e.txt").write_text("one document")
    with pytest.raises(UserError, match="data.e: .* give val: 0"):
        Documents({"e": (SourceSpec(path=str(tmp_path / "e.txt")), None)}, cache=tmp_path)

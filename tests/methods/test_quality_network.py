"""A quality network keeps what is like trusted text, also where it was called poor, and tells what it was given wrongly."""

import random

import pytest

from tutelage.base.errors import UserError
from tutelage.core.types import Document
from tutelage.methods.filter.quality_network import QualityNetwork, hashed

GOOD = ("river", "stone", "valley", "bridge", "meadow", "forest", "harbor", "cloud")
POOR = ("click", "offer", "free", "login", "cookie", "banner", "share", "reply")


def documents(*, trusted=40, like=40, poor=60, seed=0):
    """Trusted documents, others that are like them, and poor ones, the last two in mixed order."""
    rng = random.Random(seed)

    def text(words):
        return " ".join(rng.choice(words if rng.random() < 0.6 else GOOD + POOR) for _ in range(40))

    made = [("good", text(GOOD), "good") for _ in range(trusted)]
    pool = [("web", text(GOOD), "good") for _ in range(like)] + [("web", text(POOR), "poor") for _ in range(poor)]
    made += rng.sample(pool, len(pool))
    return [
        Document(words, {"origin": {"source": source, "line": i}, "text": words, "kind": kind})
        for i, (source, words, kind) in enumerate(made)
    ]


def kept(found, **settings):
    method = QualityNetwork(**{"trusted": ["good"], "buckets": 4096, **settings})
    return list(method.rewrite(found)), method.state


def test_what_is_like_trusted_text_is_kept_though_it_was_learned_as_poor():
    rows, state = kept(documents(), keep=0.4)
    assert len(rows) == 40 and sum(row["kind"] == "good" for row in rows) >= 38
    assert {row["origin"]["source"] for row in rows} == {"web"}
    assert state == {"read": 140, "trusted": 40, "judged": 100, "kept": 40}
    lines = [row["origin"]["line"] for row in rows]
    assert lines == sorted(lines) and all(row["made_by"] == "filter/quality_network" for row in rows)


def test_nothing_dropped_is_everything_judged_with_its_score_and_the_kept_are_the_best():
    some, _ = kept(documents(), keep=0.4)
    every, state = kept(documents(), keep=0.4, drop=False)
    assert len(every) == 100 and state["kept"] == 40
    best = sorted(every, key=lambda row: -row["quality"])[:40]
    assert {row["origin"]["line"] for row in best} == {row["origin"]["line"] for row in some}
    assert {row["origin"]["source"] for row in kept(documents(), judge="all", drop=False)[0]} == {"good", "web"}


def test_the_same_seed_gives_the_same_rows_and_another_other_scores():
    first, second, other = (kept(documents(), drop=False, seed=seed)[0] for seed in (1, 1, 2))
    assert first == second and first != other


def test_a_document_of_no_words_is_judged_like_any_other():
    found = [
        *documents(),
        *(Document("", {"origin": {"source": "web", "line": 900 + i}, "text": ""}) for i in range(3)),
    ]
    rows, _ = kept(found, drop=False)
    assert len(rows) == 103 and len(hashed("", 16)) == 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"trusted": []}, "name the sources whose documents are good"),
        ({"trusted": ["goood"]}, r"'goood' is no source of this stage with documents \(there are: good, web\)"),
        ({"trusted": ["good", "web"]}, "nothing is left to judge"),
    ],
)
def test_what_was_named_wrongly_is_one_line(settings, line):
    with pytest.raises(UserError, match=line):
        kept(documents(), **settings)


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({"trusted": 1}, "trusted: 1, others: 100;"),
        ({"like": 0, "poor": 1}, "trusted: 40, others: 1;"),
        ({"like": 0, "poor": 0}, "trusted: 40, others: 0;"),
    ],
)
def test_of_one_document_of_a_kind_nothing_is_learned_so_nothing_is_judged(counts, line):
    with pytest.raises(UserError, match=f"{line}.*2 of each at least"):
        kept(documents(**counts), judge="all")

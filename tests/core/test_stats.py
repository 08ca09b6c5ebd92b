"""Intervals, corrections and verdicts, checked against numbers worked out by hand."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from tutelage.core import stats


def test_the_paired_interval_is_the_textbooks():
    found = stats.paired([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    # standard error sqrt(2.5/5) = 0.70711, t(0.975, 4) = 2.77645
    assert found.low == pytest.approx(3 - 2.776445 * 0.7071068, abs=1e-5)
    assert found.high == pytest.approx(3 + 2.776445 * 0.7071068, abs=1e-5)
    assert found.p == pytest.approx(0.013236, abs=1e-5)


def test_one_pair_has_a_mean_and_no_interval():
    found = stats.paired([0.5])
    assert (found.mean, found.low, found.p) == (0.5, None, None)
    assert stats.verdict(found, rejected=True, better="lower", margin=1.0) == "inconclusive"
    assert "one seed" in stats.shown(found)


def test_equal_runs_differ_by_nothing_and_that_is_no_effect():
    found = stats.paired([0.0, 0.0, 0.0])
    assert (found.low, found.high, found.p) == (0.0, 0.0, 1.0)
    assert stats.verdict(found, rejected=False, better="lower", margin=0.01) == "no effect"


@pytest.mark.parametrize("bad", [[], [float("nan")], [1.0, float("inf")]])
def test_what_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match="numbers"):
        stats.paired(bad)


def test_benjamini_hochberg_is_their_papers_procedure():
    # m = 5, rate 5 %: thresholds .01 .02 .03 .04 .05; the largest that passes is the third
    p = {"a": 0.005, "b": 0.019, "c": 0.029, "d": 0.045, "e": 0.9, "f": None}
    assert stats.benjamini_hochberg(p) == {"a": True, "b": True, "c": True, "d": False, "e": False, "f": False}
    assert stats.benjamini_hochberg({"a": None}) == {"a": False}


def test_benjamini_hochberg_is_scipys():
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 30):
        p = {str(i): float(value) for i, value in enumerate(rng.random(count) ** 4)}
        library = false_discovery_control(list(p.values())) <= 0.05
        assert list(stats.benjamini_hochberg(p).values()) == library.tolist()


@pytest.mark.parametrize(
    ("differences", "better", "rejected", "status"),
    [
        ([-0.30, -0.31, -0.29], "lower", True, "effect seen"),
        ([-0.30, -0.31, -0.29], "higher", True, "opposite"),
        ([0.30, 0.31, 0.29], "lower", True, "opposite"),
        ([-0.30, -0.31, -0.29], "lower", False, "inconclusive"),
        ([0.001, -0.001, 0.0005], "lower", False, "no effect"),
        ([0.3, -0.3, 0.1], "lower", False, "inconclusive"),
        ([-0.0050, -0.0051, -0.0049], "lower", True, "no effect"),  # sure, and too small to matter
    ],
)
def test_a_verdict_follows_the_interval_the_correction_and_the_margin(differences, better, rejected, status):
    assert stats.verdict(stats.paired(differences), rejected=rejected, better=better, margin=0.01) == status


def test_many_verdicts_are_corrected_together():
    strong, weak = stats.paired([-0.30, -0.31, -0.29]), stats.paired([-0.1, -0.2, -0.01])
    questions = {"strong": strong, "weak": weak}
    answers = stats.verdicts(questions, better=dict.fromkeys(questions, "lower"), margin={})
    assert answers == {"strong": "effect seen", "weak": "inconclusive"}

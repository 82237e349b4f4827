"""Agreement with people in figures that others' formulas give too, and thresholds that say how sure they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from factory.agreement import Confusion, Share, cuts, drifted, kappa, threshold_for

COUNTS = st.integers(0, 30)


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [(9, 10, 0.5550, 0.9975), (0, 5, 0.0, 0.5218), (5, 5, 0.4782, 1.0), (45, 50, 0.7819, 0.9667)],  # R: binom.test(hits, of)$conf.int
)
def test_an_interval_is_the_exact_one(hits: int, of: int, low: float, high: float) -> None:
    assert Share(hits, of).interval == pytest.approx((low, high), abs=1e-4)


def test_a_share_of_nothing_is_unknown() -> None:
    assert Share(0, 0).value is None
    assert Share(0, 0).interval == (0.0, 1.0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60), st.booleans())
def test_kappa_is_that_of_scikit_learn(pairs: list[tuple[int, int]], weighted: bool) -> None:
    one, other = zip(*pairs, strict=True)
    table = np.zeros((4, 4), np.int64)
    np.add.at(table, (np.array(one), np.array(other)), 1)
    found = kappa(table, weighted=weighted)
    if found is None:
        assert len(set(one)) == 1 or len(set(other)) == 1
        return
    expected = cohen_kappa_score(one, other, labels=range(4), weights="quadratic" if weighted else None)
    assert found[0] == pytest.approx(expected)
    assert found[1] <= found[0] <= found[2]


@pytest.mark.parametrize("weighted", [False, True])
def test_kappas_interval_holds_the_truth_as_often_as_it_says(weighted: bool) -> None:
    rng = np.random.default_rng(5)
    chances = np.array([[0.3, 0.06, 0.02], [0.05, 0.25, 0.05], [0.01, 0.06, 0.2]])
    truth = kappa(np.rint(chances * 10_000_000).astype(np.int64), weighted=weighted)
    assert truth
    inside = 0
    for _ in range(400):
        found = kappa(rng.multinomial(200, chances.ravel()).reshape(3, 3), weighted=weighted)
        assert found
        inside += found[1] <= truth[0] <= found[2]
    assert 0.91 < inside / 400 < 0.985


def test_counts_are_told_apart() -> None:
    confusion = Confusion.of([True, True, True, False, False], [True, True, False, True, False])
    assert (confusion.kept_good, confusion.kept_bad, confusion.dropped_good, confusion.dropped_bad) == (2, 1, 1, 1)
    assert (confusion.precision.value, confusion.recall.value, confusion.agreement.value) == (2 / 3, 2 / 3, 3 / 5)
    assert confusion.kappa is not None
    assert Confusion.of([True, True], [True, False]).kappa is None
    assert Confusion(0, 0, 0, 0).kappa is None


def test_a_threshold_is_the_most_generous_that_is_precise_enough() -> None:
    scores = [1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5]
    good = [0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    found = cuts(scores, np.array(good, bool))
    assert [cut.threshold for cut in found] == [1, 2, 3, 4, 5]
    assert [cut.precision.value for cut in found] == [10 / 15, 10 / 13, 9 / 11, 7 / 8, 1]
    chosen = threshold_for(0.8, found)
    assert chosen and (chosen.threshold, chosen.recall.value, chosen.kept.value) == (3, 0.9, 11 / 15)
    assert threshold_for(1.0, found) == found[-1]
    assert threshold_for(0.8, found, sure=True) is None  # of eleven rows, 9 good ones may be 48% as well as 98%
    firm = threshold_for(0.35, found, sure=True)
    assert firm and firm.precision.interval[0] >= 0.35


def test_a_threshold_beyond_a_bad_stretch_is_luck() -> None:
    scores = [1, 2, 2, 2, 3, 3]
    good = [True, False, False, True, True, True]
    found = cuts(scores, np.array(good))
    assert [round(cut.precision.value or 0, 2) for cut in found] == [0.67, 0.6, 1.0]
    lucky = threshold_for(0.65, found)
    assert lucky and lucky.threshold == 3
    assert threshold_for(0.9, cuts([1.0], np.array([False]))) is None


def test_of_a_likeness_the_lower_is_the_better() -> None:
    found = cuts([0.9, 0.8, 0.3, 0.2], np.array([False, False, True, True]), rising=False)
    chosen = threshold_for(0.99, found)
    assert chosen and (chosen.threshold, chosen.recall.value) == (0.3, 1.0)


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=40), st.floats(0.05, 1))
def test_a_threshold_that_is_found_has_what_was_asked(rows: list[tuple[int, bool]], precision: float) -> None:
    scores, good = zip(*rows, strict=True)
    found = cuts(scores, np.array(good))
    chosen = threshold_for(precision, found)
    if chosen is None:
        assert all((cut.precision.value or 0) < precision for cut in found)
    else:
        kept = [g for score, g in rows if score >= chosen.threshold]
        assert sum(kept) / len(kept) >= precision


def test_drift_is_told_from_chance() -> None:
    assert drifted(Share(45, 50), Share(44, 50)) > 0.3
    assert drifted(Share(45, 50), Share(8, 20)) < 0.001
    assert drifted(Share(45, 50), Share(50, 50)) > 0.5  # to agree more is none
    assert drifted(Share(45, 50), Share(0, 0)) == 1.0

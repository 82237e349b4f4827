"""Planted preferences: where length alone decides, where quality does, and where both do, the figure has to say so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from factory.preference import Preferred, length_controlled


def planted(quality: float, liking: float, *, longer_by: float = 0.0, rows: int = 2000, seed: int = 0) -> tuple[NDArray[np.float64], ...]:
    """Wins by a quality and a liking for length, both in log-odds; the side is longer by `longer_by` on average."""
    rng = np.random.default_rng(seed)
    by = rng.normal(longer_by, 100, rows)
    chance = 1 / (1 + np.exp(-(quality + liking * np.tanh(by / by.std()))))
    return (rng.random(rows) < chance).astype(float), by


def test_where_length_alone_decides_the_controlled_rate_is_a_half() -> None:
    wins, by = planted(0, 2, longer_by=100)
    found = length_controlled(wins.tolist(), by.tolist())
    assert found.wins is not None and found.wins > 0.7
    assert found.controlled == pytest.approx(0.5, abs=0.05)
    assert found.low is not None and found.high is not None
    assert found.low < 0.5 < found.high
    assert found.by_length == pytest.approx(2, abs=0.3)


def test_where_length_does_nothing_the_controlled_rate_is_the_plain_one() -> None:
    wins, by = planted(1, 0, longer_by=100)
    found = length_controlled(wins.tolist(), by.tolist())
    assert found.controlled == pytest.approx(found.wins, abs=0.05)
    assert found.by_length == pytest.approx(0, abs=0.25)
    assert found.low is not None and found.low > 0.5


def test_quality_and_length_are_told_apart_and_the_sides_may_be_changed() -> None:
    wins, by = planted(0.8, 1.5, longer_by=-50)
    found = length_controlled(wins.tolist(), by.tolist())
    assert found.controlled == pytest.approx(1 / (1 + np.exp(-0.8)), abs=0.04)
    other = length_controlled((1 - wins).tolist(), (-by).tolist())
    assert other.controlled == pytest.approx(1 - found.controlled)  # type: ignore[operator]
    assert other.by_length == pytest.approx(found.by_length)
    assert length_controlled(wins.tolist(), (by * 7).tolist()).controlled == pytest.approx(found.controlled), "in any unit"
    assert length_controlled(wins.tolist(), by.tolist()) == found


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        found = length_controlled(*(list(part) for part in planted(0.5, 1, longer_by=60, rows=150, seed=seed)))
        assert found.low is not None and found.high is not None
        held += found.low <= 1 / (1 + np.exp(-0.5)) <= found.high
    assert 0.9 <= held / 200 <= 0.99


def test_it_agrees_with_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    wins, by = planted(0.5, 1)
    fitted = LogisticRegression(C=25, tol=1e-9, max_iter=1000).fit(np.tanh(by / by.std())[:, None], wins)
    found = length_controlled(wins.tolist(), by.tolist())
    assert found.by_length == pytest.approx(fitted.coef_[0, 0], abs=1e-4)
    assert found.controlled == pytest.approx(1 / (1 + np.exp(-fitted.intercept_[0])), abs=1e-4)


@pytest.mark.parametrize(
    ("wins", "by", "known"),
    [
        ([], [], None),
        ([1.0] * 50, list(range(50)), 1.0),
        ([0.0] * 50, list(range(50)), 0.0),
        ([1.0, 0.0] * 5, list(range(10)), 0.5),
        ([1.0, 0.0] * 25, [10] * 50, 0.5),
    ],
)
def test_what_the_rows_do_not_tell_is_none(wins: list[float], by: list[float], known: float | None) -> None:
    assert length_controlled(wins, by) == Preferred(len(wins), known)


def test_equal_lengths_and_lengths_that_separate_all_wins_have_a_figure() -> None:
    equal = length_controlled([1.0, 1.0, 0.0, 0.5] * 20, [0] * 80)
    assert (equal.wins, equal.by_length) == (0.625, None)
    assert equal.controlled == pytest.approx(0.625)
    apart = length_controlled([1.0] * 50 + [0.0] * 50, list(range(50, 0, -1)) + list(range(-1, -51, -1)))
    assert apart.controlled == pytest.approx(0.5, abs=0.01)
    assert apart.by_length is not None and apart.by_length > 5


def test_what_is_no_win_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0"):
        length_controlled([2.0], [1.0])
    with pytest.raises(ValueError, match="equal length"):
        length_controlled([1.0], [])


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-(10**9), 10**9)), min_size=20, max_size=60))
@settings(deadline=None, max_examples=50)
def test_any_rows_have_a_figure_or_none_and_never_an_error(rows: list[tuple[float, int]]) -> None:
    found = length_controlled([won for won, _ in rows], [by for _, by in rows])
    if found.controlled is not None:
        assert found.low is not None and found.high is not None
        assert 0 <= found.low <= found.controlled <= found.high <= 1

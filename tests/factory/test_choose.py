"""What a choice must be: exact, the same in any order, no copies, quality between equals, and what a plain greedy search would take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory import choose
from factory.choose import QUALITY, at_random, represented, select, value
from factory.diversity import density_and_coverage
from tests.context import embedder

NONE = np.empty((0, 0), np.float32)  # nothing is held, in no dimension at all

seeds = st.integers(0, 10**6)


def normed(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def unit(rows: int, dimensions: int = 8, seed: int = 0) -> np.ndarray:
    return normed(np.random.default_rng(seed).normal(size=(rows, dimensions)))


def around(centres: np.ndarray, rows: int, spread: float, seed: int = 0) -> np.ndarray:
    """So many rows close to each of the centres."""
    rng = np.random.default_rng(seed)
    return normed(np.repeat(centres, rows, axis=0) + spread * rng.normal(size=(rows * len(centres), centres.shape[1])))


def one_cell(n: int, wanted: int) -> list[tuple[np.ndarray, int]]:
    return [(np.arange(n), wanted)]


def dealt(n: int, cells: int, seed: int) -> list[np.ndarray]:
    return [np.flatnonzero(np.random.default_rng(seed).integers(0, cells, n) == cell) for cell in range(cells)]


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 30), st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_each_cell_gives_what_is_wanted_or_all_there_is(seed: int, n: int, wanted: list[int]) -> None:
    rng = np.random.default_rng(seed)
    cells = list(zip(dealt(n, len(wanted), seed), wanted, strict=True))
    vectors = unit(n, seed=seed) if n else np.empty((0, 8), np.float32)
    for chosen in (select(cells, rng.random(n), vectors, unit(2, seed=seed)), at_random(cells, [f"row {i}" for i in range(n)])):
        assert chosen.dtype == np.intp and len(set(chosen.tolist())) == len(chosen) == sum(min(k, len(rows)) for rows, k in cells)
        for rows, k in cells:
            assert np.isin(chosen, rows).sum() == min(k, len(rows))


def test_what_can_be_left_empty() -> None:
    nobody = np.empty((0, 4), np.float32)
    assert select([], np.empty(0), nobody, NONE).tolist() == []
    assert select([(np.empty(0, np.intp), 3)], np.empty(0), nobody, NONE).tolist() == []
    assert select(one_cell(3, 0), np.ones(3), unit(3), NONE).tolist() == []
    assert select(one_cell(3, -1), np.ones(3), unit(3), NONE).tolist() == []
    assert at_random([], []).tolist() == []
    blank = np.zeros((3, 4), np.float32)  # the vector of a text of which the embedder knows no word
    assert sorted(select(one_cell(3, 2), np.array([0.1, 0.9, 0.5]), blank, NONE).tolist()) == [1, 2]
    assert value(np.empty(0, np.intp), np.empty(0), nobody, NONE).tolist() == [0.0]


def test_a_row_can_not_stand_in_two_cells() -> None:
    with pytest.raises(ValueError, match="two cells"):
        select([(np.arange(2), 1), (np.arange(1, 3), 1)], np.ones(3), unit(3), NONE)
    with pytest.raises(ValueError, match="twice"):
        select([(np.array([0, 0]), 1)], np.ones(3), unit(3), NONE)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 40), st.integers(1, 4))
def test_the_order_of_rows_and_cells_decides_nothing(seed: int, n: int, cells: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, quality, held, parts = unit(n, seed=seed), rng.random(n), unit(3, seed=seed + 1), dealt(n, cells, seed)
    plain = select([(rows, n // 6 + 1) for rows in parts], quality, vectors, held)
    order = rng.permutation(n)
    moved = [(rng.permutation(np.flatnonzero(np.isin(order, rows))), n // 6 + 1) for rows in reversed(parts)]
    again = order[select(moved, quality[order], vectors[order], held[::-1])]
    assert set(again.tolist()) == set(plain.tolist())


def plainly(cells: Sequence[tuple[np.ndarray, int]], quality: np.ndarray, vectors: np.ndarray, held: np.ndarray) -> list[int]:
    """Greedy as one would write it down: every row is looked at each time, over all pairs, on the same grid."""
    n = len(vectors)
    cosines = np.rint(vectors @ vectors.T * choose.GRID).astype(np.int64)
    best = np.maximum(np.rint((vectors @ held.T).max(axis=1) * choose.GRID).astype(np.int64), 0)
    left = {cell: min(k, len(rows)) for cell, (rows, k) in enumerate(cells)}
    bonus = np.rint(QUALITY * n / sum(left.values()) * quality * choose.GRID).astype(np.int64)
    whole = [cell for cell, (rows, k) in enumerate(cells) if k >= len(rows)]
    chosen: list[int] = []
    for part in (whole, [cell for cell in left if cell not in whole]):
        while sum(left[cell] for cell in part):
            among = [(cell, row) for cell in part if left[cell] for row in cells[cell][0].tolist() if row not in chosen]
            gain = {(cell, row): np.maximum(cosines[:, row] - best, 0).sum() + bonus[row] for cell, row in among}
            cell, row = max(among, key=lambda pair: (gain[pair], -pair[1]))
            chosen.append(row)
            left[cell] -= 1
            best = np.maximum(best, cosines[:, row])
    return chosen


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(6, 40), st.integers(1, 3))
def test_looking_lazily_finds_what_looking_at_all_does(seed: int, n: int, cells: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = unit(n, 3, seed)
    vectors[n // 2 :] = vectors[rng.integers(0, n // 2, n - n // 2)]  # copies, so that there are ties
    quality = rng.integers(0, 3, n) / 2
    given_cells = [(rows, int(rng.integers(1, n))) for rows in dealt(n, cells, seed)]
    held = unit(2, 3, seed + 1)
    assert select(given_cells, quality, vectors, held).tolist() == plainly(given_cells, quality, vectors, held)


def test_greedy_is_close_to_the_best_of_all_choices() -> None:
    for seed in range(5):
        vectors, quality = unit(12, 4, seed), np.random.default_rng(seed).random(12)
        found = value(select(one_cell(12, 4), quality, vectors, NONE), quality, vectors, NONE)[-1]
        best = max(value(np.array(rows), quality, vectors, NONE)[-1] for rows in combinations(range(12), 4))
        assert 0.95 * best < found <= best + 1e-9  # 1 - 1/e is certain


def test_copies_wait_until_all_that_differs_is_taken() -> None:
    vectors = np.concatenate([np.repeat(np.eye(6, dtype=np.float32)[:1], 50, axis=0), np.eye(6, dtype=np.float32)[1:]])
    assert set(select(one_cell(55, 6), np.full(55, 0.5), vectors, NONE).tolist()) == {0, 50, 51, 52, 53, 54}
    held = np.eye(6, dtype=np.float32)[:1]  # the row that has fifty copies is in the dataset already
    assert set(select(one_cell(55, 5), np.full(55, 0.5), vectors, held).tolist()) == {50, 51, 52, 53, 54}


def test_a_copy_in_another_cell_counts() -> None:
    a, b = np.eye(3, dtype=np.float32)[:2]
    vectors = np.stack([a, a, b])
    for cells in ([(np.array([0]), 1), (np.array([1, 2]), 1)], [(np.array([1, 2]), 1), (np.array([0]), 1)]):
        assert set(select(cells, np.array([0.1, 0.5, 0.4]), vectors, NONE).tolist()) == {0, 2}  # whatever its cell's turn, 0 is certain


def test_quality_decides_between_equals_and_then_the_row_number() -> None:
    vectors = np.repeat(unit(1), 4, axis=0)
    assert select(one_cell(4, 2), np.array([0.2, 0.9, 0.3, 0.8]), vectors, NONE).tolist() == [1, 3]
    assert select(one_cell(4, 2), np.full(4, 0.5), vectors, NONE).tolist() == [0, 1]
    apart = np.eye(4, dtype=np.float32)  # as far from each other, each as lonely
    assert select(one_cell(4, 2), np.array([0.2, 0.9, 0.3, 0.8]), apart, NONE).tolist() == [1, 3]


def test_a_poor_outlier_is_not_preferred() -> None:
    centres = np.eye(8, dtype=np.float32)[:5]
    vectors = np.concatenate([around(centres, 20, 0.1), np.eye(8, dtype=np.float32)[7:]])
    quality = np.append(np.full(100, 0.6), 0.05)
    chosen = select(one_cell(101, 10), quality, vectors, NONE)
    assert 100 not in chosen
    assert set((chosen[:5] // 20).tolist()) == set(range(5))  # one of each clump before a second of any
    quality[100] = 1.0  # the same row, were it good
    assert 100 in select(one_cell(101, 10), quality, vectors, NONE)


def test_a_choice_is_worth_more_than_a_random_one() -> None:
    centres, rng = unit(30, 16, seed=1), np.random.default_rng(2)
    sizes = rng.permutation(np.r_[np.full(5, 60), np.full(25, 4)])  # five subjects of which the teachers wrote most
    vectors = np.concatenate([around(centre[None], size, 0.08, i) for i, (centre, size) in enumerate(zip(centres, sizes, strict=True))])
    n, held = len(vectors), unit(2, 16, seed=3)
    quality, cells = rng.random(n), one_cell(n, 30)
    chosen = select(cells, quality, vectors, held)
    curve = value(chosen, quality, vectors, held)
    assert curve.shape == (31,) and (np.diff(curve) >= -1e-12).all()
    assert (np.diff(curve, 2) <= 1e-4).all()  # each adds less than the one before, but for the grid
    random = [at_random(cells, [str(i) for i in range(n)], seed) for seed in range(5)]
    others = [value(rows, quality, vectors, held)[-1] for rows in random]
    assert curve[-1] > max(others) + 0.05
    assert quality[chosen].mean() > 0.55
    coverages = [density_and_coverage(vectors[rows], vectors)[1] for rows in (chosen, *random)]
    assert coverages[0] > max(coverages[1:])  # by a figure that isn't what was made large


def test_the_value_of_a_choice_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], np.float32)
    chosen, quality = np.array([2, 0]), np.array([1.0, 0.0, 0.5, 0.0])
    assert represented(chosen, vectors, NONE) == pytest.approx([0, (0.6 + 0.8 + 1 + 0) / 4, (1 + 0.8 + 1 + 0) / 4])
    assert represented(chosen, vectors, vectors[3:]) == pytest.approx([1 / 4, (0.6 + 0.8 + 1 + 1) / 4, (1 + 0.8 + 1 + 1) / 4])
    assert value(chosen, quality, vectors, NONE) == pytest.approx([0, 0.6 + QUALITY * 0.25, 0.7 + QUALITY * 0.75])


def test_the_baseline_is_the_same_for_the_same_ids_in_any_order() -> None:
    ids = [f"s1-{i}" for i in range(40)]
    cells = [(np.arange(25), 5), (np.arange(25, 40), 20)]
    rows = at_random(cells, ids)
    assert rows.tolist() == at_random(cells, ids).tolist() != at_random(cells, ids, seed=1).tolist()
    back = at_random([(39 - part, k) for part, k in cells], ids[::-1])
    assert [ids[row] for row in rows] == [ids[::-1][row] for row in back]
    drawn = np.bincount(np.concatenate([at_random(one_cell(40, 10), ids, seed) for seed in range(400)]), minlength=40)
    assert drawn.sum() == 4000 and drawn.min() > 60 and drawn.max() < 140  # 100 each; 60 and 140 are 4.6 standard deviations off


def test_blocks_change_nothing_and_a_floor_hardly_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, quality, held = around(unit(40, 16), 10, 0.15), np.random.default_rng(0).random(400), unit(5, 16, seed=9)
    whole = select(one_cell(400, 80), quality, vectors, held)
    curve = value(whole, quality, vectors, held)
    monkeypatch.setattr(choose, "BLOCK", 1500)
    again = select(one_cell(400, 80), quality, vectors, held)
    assert value(again, quality, vectors, held)[-1] == pytest.approx(curve[-1], abs=1e-5)
    assert value(whole, quality, vectors, held) == pytest.approx(curve, abs=1e-6)
    monkeypatch.setattr(choose, "PAIRS", 400 * 20)
    start, near = choose._near(np.unique(vectors, axis=0), held)
    assert start.min() > 0 and 400 * 15 < sum(len(others) for others, _ in near) < 400 * 25
    few = select(one_cell(400, 80), quality, vectors, held)
    assert value(few, quality, vectors, held)[-1] == pytest.approx(curve[-1], rel=0.01)


def test_real_messages() -> None:
    texts = [
        "My card still hasn't arrived",
        "My card still has not arrived",
        "my card has still not arrived yet",
        "How do I top up by bank transfer?",
        "Why was my cash withdrawal declined?",
        "the the top of arrived cash why",
    ]
    chosen = select(one_cell(6, 3), np.array([0.8, 0.7, 0.6, 0.7, 0.7, 0.1]), embedder().embed(texts), NONE)
    assert set(chosen.tolist()) == {0, 3, 4}

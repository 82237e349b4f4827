import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from factory import cosine
from factory.cosine import choose, components, pairs, settle

Vectors = NDArray[np.float32]
ROUNDING = 1e-5


def unit(rows: NDArray[np.floating]) -> Vectors:
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def planted(n: int = 3000, twins: int = 600, d: int = 128, seed: int = 0) -> Vectors:
    """Vectors around a few centres, and near-duplicates of some of them with cosines of 0.95 to 1."""
    rng = np.random.default_rng(seed)
    rows = unit(rng.standard_normal((40, d))[rng.integers(0, 40, n)] + 0.8 * rng.standard_normal((n, d)))
    ones, others = rng.choice(n, (2, twins), replace=False)
    like = rng.uniform(0.95, 1, (twins, 1))
    away = rng.standard_normal((twins, d))
    away = unit(away - (away * rows[ones]).sum(axis=1, keepdims=True) * rows[ones])
    rows[others] = unit(like * rows[ones] + np.sqrt(1 - like**2) * away)
    return rows


def by_brute_force(vectors: Vectors, threshold: float) -> set[tuple[int, int]]:
    """All pairs, where of equal rows only the first counts, besides its pairs with its copies."""
    first = [next(i for i in range(j + 1) if (vectors[i] == vectors[j]).all()) for j in range(len(vectors))]
    found = set()
    for j in range(len(vectors)):
        if first[j] != j and vectors[j].any():
            found.add((first[j], j))
        elif first[j] == j:
            found |= {(i, j) for i in range(j) if first[i] == i and float(vectors[i] @ vectors[j]) >= threshold}
    return found


def greedy(
    vectors: Vectors, new: NDArray[np.bool_], threshold: float, keys: NDArray[np.int32], sides: NDArray[np.uint64]
) -> tuple[list[bool], list[float]]:
    """The rule, a row at a time: who stays, and the highest cosine to who stands before (NaN: nobody does)."""
    stay: list[int] = []
    likeness = []
    for row, vector in enumerate(vectors):
        met = [
            i
            for i in stay
            if keys[i] == keys[row] and not (sides[i, 0] & sides[row, 1]) | (sides[i, 1] & sides[row, 0]) and vectors[i].any()
        ]
        best = max((float(vectors[i] @ vector) for i in met if vector.any()), default=np.nan)
        likeness.append(best if new[row] else np.nan)
        if not new[row] or not best >= threshold:
            stay.append(row)
    return [row in set(stay) for row in range(len(vectors))], likeness


def found_in(given: cosine.Pairs) -> set[tuple[int, int]]:
    return set(zip(given.earlier.tolist(), given.later.tolist(), strict=True))


@pytest.fixture
def tables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fast` takes the tables also where all products would cost less, as in rows so few or so dense."""
    monkeypatch.setattr(cosine._Hashed, "is_slower", lambda _, mode, *__: mode == "exact")


@st.composite
def crowds(draw: st.DrawFn) -> Vectors:
    """Up to 40 vectors in three dimensions, so that many are near, some are equal and some are zero."""
    n = draw(st.integers(0, 40))
    rows = np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal((n, 3))
    if n:
        rows = rows[draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))]
        rows[draw(st.lists(st.integers(0, n - 1), max_size=3))] = 0
    return unit(rows) if n else rows.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(crowds(), st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_exact_pairs_are_those_of_brute_force(vectors: Vectors, threshold: float) -> None:
    given = pairs(vectors, threshold, mode="exact")
    found = found_in(given)
    assert len(found) == len(given.earlier)
    assert by_brute_force(vectors, threshold + ROUNDING) <= found <= by_brute_force(vectors, threshold - ROUNDING)
    assert np.allclose((vectors[given.earlier] * vectors[given.later]).sum(axis=1), given.likeness, atol=ROUNDING)
    assert sorted(found, key=lambda pair: pair[::-1]) == list(zip(given.earlier.tolist(), given.later.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(crowds(), st.integers(0, 40), st.integers(1, 3), st.integers(0, 2**32))
def test_settling_is_the_rule_row_by_row(vectors: Vectors, kept: int, labels: int, seed: int) -> None:
    n, rng = len(vectors), np.random.default_rng(seed)
    new, keys = np.arange(n) >= kept, rng.integers(0, labels, n).astype(np.int32)
    sides = rng.integers(0, 4, (n, 2)).astype(np.uint64) * (rng.random((n, 1)) < 0.3)
    stay, twin, likeness = settle(vectors, new, 0.9, keys=keys, sides=sides.astype(np.uint64), mode="exact")
    expected, best = greedy(vectors, new, 0.9, keys, sides.astype(np.uint64))
    assert stay.tolist() == expected
    assert np.allclose(likeness, np.minimum(best, 1), atol=ROUNDING, equal_nan=True)
    for row in np.flatnonzero(twin >= 0):
        assert twin[row] < row and stay[twin[row]] and keys[twin[row]] == keys[row]
        assert float(vectors[twin[row]] @ vectors[row]) == pytest.approx(likeness[row], abs=ROUNDING)


@pytest.mark.parametrize("kept", [0, 100])
def test_settling_by_blocks_is_settling_row_by_row(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosine, "ROWS", 64)
    monkeypatch.setattr(cosine, "COLUMNS", 50)
    rng = np.random.default_rng(3)
    vectors, new = unit(rng.standard_normal((500, 6))), np.arange(500) >= kept
    for labels in (1, 4, 200):
        keys = rng.integers(0, labels, 500).astype(np.int32)
        stay, _, likeness = settle(vectors, new, 0.8, keys=keys, mode="exact")
        expected, best = greedy(vectors, new, 0.8, keys, np.zeros((500, 2), np.uint64))
        assert stay.tolist() == expected
        assert np.allclose(likeness, best, atol=ROUNDING, equal_nan=True)
        assert kept < stay.sum() < 500 or labels == 200


@pytest.mark.parametrize("threshold", [0.85, 0.95])
@pytest.mark.usefixtures("tables_only")
def test_fast_pairs_are_true_and_nearly_all(threshold: float) -> None:
    vectors = planted()
    true = found_in(pairs(vectors, threshold, mode="exact"))
    given = pairs(vectors, threshold, mode="fast")
    found = found_in(given)
    assert len(found) == len(given.earlier)  # though near ones meet in many tables
    assert found <= true
    assert len(found) >= 0.995 * len(true) > 500
    assert given.likeness.min() >= threshold
    assert np.allclose((vectors[given.earlier] * vectors[given.later]).sum(axis=1), given.likeness, atol=ROUNDING)
    again = pairs(vectors.copy(), threshold, mode="fast")
    assert all((one == other).all() for one, other in zip(given, again, strict=True))


def test_exact_pairs_by_leading_components_are_those_of_all_products() -> None:
    vectors = planted(2500)
    assert cosine._leading(vectors, 0.95) is not None
    products = np.triu(vectors @ vectors.T, 1)
    true = set(zip(*(place.tolist() for place in np.nonzero(products >= 0.95 + ROUNDING)), strict=True))
    almost = set(zip(*(place.tolist() for place in np.nonzero(products >= 0.95 - ROUNDING)), strict=True))
    assert true <= found_in(pairs(vectors, 0.95, mode="exact")) <= almost


@pytest.mark.parametrize("kept", [0, 1000])
@pytest.mark.usefixtures("tables_only")
def test_fast_settling_is_the_rule_over_the_pairs_that_it_finds(kept: int) -> None:
    vectors = planted()
    new, keys = np.arange(3000) >= kept, (np.arange(3000) % 2).astype(np.int32)
    exact, fast = (settle(vectors, new, 0.95, keys=keys, mode=mode) for mode in ("exact", "fast"))
    assert (exact[0] == fast[0]).mean() > 0.999
    assert 100 < (~fast[0]).sum() < 400
    assert fast[0][:kept].all()
    out = np.flatnonzero(~fast[0])
    assert (fast[1][out] < out).all() and fast[0][fast[1][out]].all() and (keys[fast[1][out]] == keys[out]).all()
    assert np.allclose((vectors[fast[1][out]] * vectors[out]).sum(axis=1), fast[2][out], atol=ROUNDING)
    assert (fast[2][out] >= 0.95).all() and not (fast[2][fast[0]] >= 0.95).any()


@pytest.mark.usefixtures("tables_only")
@pytest.mark.parametrize("apart", ["keys", "sides"])
def test_fast_settling_compares_nothing_that_is_apart(apart: str) -> None:
    rng = np.random.default_rng(7)
    centre = rng.standard_normal(64)
    vectors = unit(centre + 0.2 * rng.standard_normal((3000, 64)))  # all are near all others
    keys = rng.integers(0, 2000, 3000).astype(np.int32) if apart == "keys" else np.zeros(3000, np.int32)
    sides = (np.uint64(1) << rng.integers(0, 4, (3000, 2), np.uint64)) * np.uint64(apart == "sides")
    exact, fast = (settle(vectors, np.ones(3000, np.bool_), 0.9, keys=keys, sides=sides, mode=mode) for mode in ("exact", "fast"))
    assert (exact[0] == fast[0]).mean() > 0.999
    assert 0 < (~fast[0]).sum() < 2999


@pytest.mark.usefixtures("tables_only")
def test_settling_what_is_new_is_settling_all() -> None:
    vectors = planted(seed=1)
    for mode in ("exact", "fast"):
        whole = settle(vectors, np.ones(3000, np.bool_), 0.95, mode=mode)[0]
        first = settle(vectors[:1800], np.ones(1800, np.bool_), 0.95, mode=mode)[0]
        standing = np.concatenate([np.flatnonzero(first), np.arange(1800, 3000)])
        rest = settle(vectors[standing], standing >= 1800, 0.95, mode=mode)[0]
        assert (whole[:1800] == first).all()
        assert (whole[standing] == rest).mean() > (0.999 if mode == "fast" else 0.9999)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.usefixtures("tables_only")
def test_many_equal_vectors_make_no_square_of_pairs(mode: cosine.Mode) -> None:
    vectors = planted(500, 50)
    vectors = np.concatenate([vectors, np.repeat(vectors[:1], 5000, axis=0), np.zeros((300, 128), np.float32)])
    given = pairs(vectors, 0.95, mode=mode)
    assert {(0, j) for j in range(500, 5500)} <= found_in(given)
    assert len(given.earlier) < 5200
    assert given.later.max() < 5500
    stay, twin, likeness = settle(vectors, np.ones(5800, np.bool_), 0.95, mode=mode)
    assert not stay[500:5500].any() and (twin[500:5500] == 0).all() and np.allclose(likeness[500:5500], 1)
    assert stay[5500:].all() and (twin[5500:] == -1).all() and np.isnan(likeness[5500:]).all()
    twins = settle(
        np.concatenate([vectors[:1], unit(vectors[:1] + 1e-3), unit(vectors[:1] + 1e-3)]), np.ones(3, np.bool_), 0.95, mode=mode
    )[1]
    assert twins.tolist() == [-1, 0, 0]  # a copy of what is rejected has the same twin
    group = components(vectors, 0.95, mode=mode)
    assert (group[500:5500] == 0).all() and (group[5500:] == np.arange(5500, 5800)).all()


@pytest.mark.usefixtures("tables_only")
def test_a_crowd_of_near_equal_rows_is_settled_and_joined() -> None:
    rng = np.random.default_rng(5)
    vectors = np.concatenate([planted(2000, 200), unit(rng.standard_normal(128) + 0.1 * rng.standard_normal((3000, 128)))])
    stay = settle(vectors, np.ones(5000, np.bool_), 0.95, mode="fast")[0]
    assert stay[2000:].sum() == 1
    exact, fast = (components(vectors, 0.95, mode=mode) for mode in ("exact", "fast"))
    assert (exact == fast).mean() > 0.999
    assert (fast[2000:] == 2000).all()


@pytest.mark.parametrize("mode", ["auto", "exact", "fast"])
@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.usefixtures("tables_only")
def test_few_rows(mode: cosine.Mode, n: int) -> None:
    vectors = np.tile(np.eye(1, 8, dtype=np.float32), (n, 1))
    assert found_in(pairs(vectors, 0.9, mode=mode)) == ({(0, 1)} if n == 2 else set())
    assert components(vectors, 0.9, mode=mode).tolist() == [0] * n
    stay, twin, _ = settle(vectors, np.ones(n, np.bool_), 0.9, mode=mode)
    assert stay.tolist() == [True, False][:n]
    assert twin.tolist() == [-1, 0][:n]


@pytest.mark.parametrize(("threshold", "recall"), [(0.7, 0.99), (0.85, 0.999), (0.95, 0.999), (0.95, 1 - 1e-6), (1 - 1e-6, 0.999)])
def test_the_tables_find_a_pair_at_the_threshold_as_often_as_asked(threshold: float, recall: float) -> None:
    tables = choose(threshold, recall, 100_000, np.random.default_rng(0).normal(0.1, 0.1, 1000))
    agree = 1 - np.arccos(threshold) / np.pi
    assert 1 - (1 - agree**tables.bits) ** tables.tables >= 1 - (1 - recall) / 2
    sketches = (np.random.default_rng(1).random((20_000, cosine.SKETCH)) > agree).sum(axis=1)
    assert (sketches <= tables.sketch_cut).mean() >= recall - 1e-3
    assert tables.words <= cosine.MOST_WORDS


def test_dense_topics_get_longer_tables() -> None:
    rng = np.random.default_rng(0)
    loose, dense = (choose(0.95, 0.999, 1_000_000, rng.normal(mean, 0.05, 1000)) for mean in (0.0, 0.6))
    assert loose.bits < dense.bits
    assert loose.row_ns < dense.row_ns


@pytest.mark.parametrize("numbers", [2, 8, 384])
def test_two_vectors_differ_in_sides_as_their_angle_says_also_where_they_are_sparse(numbers: int) -> None:
    rng = np.random.default_rng(1)
    vectors = np.zeros((400, 384))
    for row in range(0, 400, 2):
        places = rng.choice(384, numbers, replace=False)
        one = rng.standard_normal(numbers)
        vectors[row, places], vectors[row + 1, places] = one, one + 0.3 * np.linalg.norm(one) * rng.standard_normal(numbers) / numbers**0.5
    vectors = unit(vectors)
    hashed = cosine._Hashed(vectors, np.arange(400), 0.95, 0.999)
    bits = np.unpackbits(hashed.words.view(np.uint8), axis=1)
    differ = (bits[::2] != bits[1::2]).mean(axis=1)
    angle = np.arccos(np.clip((vectors[::2] * vectors[1::2]).sum(axis=1), -1, 1)) / np.pi
    assert abs(differ - angle).max() < 0.08
    assert abs((differ - angle).mean()) < 0.005
    assert abs(bits.mean() - 0.5) < 0.01


@pytest.mark.usefixtures("tables_only")
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_equal_vectors_of_what_is_apart_are_no_copies(mode: cosine.Mode) -> None:
    vectors = np.tile(np.eye(1, 64, dtype=np.float32), (5, 1))
    keys = np.array([0, 0, 1, 0, 0], np.int32)
    stay, twin, _ = settle(vectors, np.ones(5, np.bool_), 0.9, keys=keys, mode=mode)
    assert stay.tolist() == [True, False, True, False, False]
    assert twin.tolist() == [-1, 0, -1, 0, 0]
    # The second is rejected for the first; the third equals it, but the first is its opposite.
    sides = np.array([[0, 2], [0, 0], [2, 0]], np.uint64)
    stay, twin, _ = settle(vectors[:3], np.ones(3, np.bool_), 0.9, sides=sides, mode=mode)
    assert stay.tolist() == [True, False, True]
    assert twin.tolist() == [-1, 0, -1]

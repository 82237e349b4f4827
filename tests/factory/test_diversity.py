"""Every figure against cases counted by hand, and against what must hold for any set of texts."""

import zlib

import numpy as np
import pytest

from factory import diversity as module
from factory.diversity import compression_ratio, distinct, diversity, mean_cosine, mean_nearest_distance, vendi


def unit(rows: int, dimensions: int = 16, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_distinct_counts_words_and_pairs_within_texts():
    texts = ["My card, my CARD!", "card my"]
    assert distinct(texts, 1) == pytest.approx(2 / 6)  # my card my card card my
    assert distinct(texts, 2) == pytest.approx(2 / 4)  # my-card card-my my-card | card-my; no pair across the two texts
    assert distinct(["don't", "naïve café 東京"], 1) == 1.0
    assert distinct(["one", "", "..."], 2) is None


def test_compression_ratio_is_of_zlib_at_level_nine():
    texts = ["where is my card"] * 50
    raw = "\n".join(texts).encode()
    assert compression_ratio(texts) == len(raw) / len(zlib.compress(raw, 9))
    assert compression_ratio(texts) > compression_ratio([f"{i * 7919 % 1009:x} {i * 104729 % 997:x}" for i in range(50)])


def test_mean_cosine_is_that_of_all_pairs():
    vectors = unit(40)
    pairs = [float(vectors[i] @ vectors[j]) for i in range(40) for j in range(i)]
    assert mean_cosine(vectors) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_nearest_distance_is_to_another_row(monkeypatch):
    square = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)  # nearest: 0.6, 0.8, 0.8
    assert mean_nearest_distance(square) == pytest.approx(1 - (0.6 + 0.8 + 0.8) / 3)
    vectors = unit(300)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert mean_nearest_distance(vectors) == pytest.approx(1 - cosines.max(axis=1).mean(), abs=1e-6)
    monkeypatch.setattr(module, "QUERIES", 2)  # the first row and the last
    assert mean_nearest_distance(vectors) == pytest.approx(1 - cosines.max(axis=1)[[0, -1]].mean(), abs=1e-6)


@pytest.mark.parametrize("n", [1, 3, 16, 60])
def test_vendi_of_identical_rows_is_one(n):
    assert vendi(np.repeat(unit(1), n, axis=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("n", [1, 3, 16])
def test_vendi_of_orthogonal_rows_is_their_number(n):
    assert vendi(np.eye(n, 16, dtype=np.float32)) == pytest.approx(n, abs=1e-4)


def test_vendi_is_the_same_by_either_matrix_and_blind_to_copies():
    vectors = unit(10)
    shares = np.linalg.eigvalsh(vectors.astype(float) @ vectors.T.astype(float) / 10).clip(1e-12)
    by_kernel = float(np.exp(-(shares * np.log(shares)).sum()))
    assert vendi(vectors) == pytest.approx(by_kernel, abs=1e-4)
    assert vendi(np.repeat(vectors, 3, axis=0)) == pytest.approx(by_kernel, abs=1e-4)  # 30 rows of 16 dimensions: the Gram matrix


def test_figures_that_so_few_texts_lack_are_left_out():
    assert diversity([], np.empty((0, 4), np.float32)) == {}
    assert set(diversity(["hello"], unit(1))) == {"distinct_1", "compression_ratio", "vendi"}
    assert set(diversity(["hello you", "and me"], unit(2))) == {
        "distinct_1",
        "distinct_2",
        "compression_ratio",
        "mean_cosine",
        "mean_nearest_distance",
        "vendi",
    }

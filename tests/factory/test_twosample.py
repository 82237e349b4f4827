"""Two-sample figures: nothing between two halves of one set, much between two subjects, and the same in any order."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from factory.stage import Vectors
from factory.twosample import auc, mmd
from tests.context import embedder

DATA = Path(__file__).parents[2] / "bench" / "data"


@cache
def vectors(name: str) -> Vectors:
    rows = [json.loads(line) for line in (DATA / name).read_text().splitlines()]
    found: Vectors = embedder().embed([row["messages"][0]["content"] for row in rows])
    return found


def halves(name: str, seed: int) -> tuple[Vectors, Vectors]:
    rows = vectors(name)
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows[order[: len(rows) // 2]], rows[order[len(rows) // 2 :]]


def unit(rows: int, seed: int, dimensions: int = 16, towards: float = 0.0) -> Vectors:
    drawn = np.random.default_rng(seed).normal(size=(rows, dimensions))
    drawn[:, 0] += towards
    found: Vectors = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_two_halves_of_one_set_are_alike(seed: int) -> None:
    a, b = halves("banking77_dev.jsonl", seed)
    told = mmd(a, b)
    assert told is not None and abs(told.squared) < 0.01 and told.p > 0.01
    assert abs((auc(a, b) or 0) - 0.5) < 0.12


def test_two_subjects_are_told_apart() -> None:
    bank, maths = vectors("banking77_dev.jsonl"), vectors("gsm8k_dev.jsonl")
    told = mmd(bank, maths)
    assert told is not None and told.squared > 0.2 and told.p == 1 / 201
    assert (auc(bank, maths) or 0) > 0.99


def test_a_small_shift_lies_between() -> None:
    a, near, far = unit(400, 0), unit(400, 1, towards=0.7), unit(400, 2, towards=3)
    one, two = mmd(a, near), mmd(a, far)
    assert one is not None and two is not None and 0 < one.squared < two.squared
    assert 0.6 < (auc(a, near) or 0) < (auc(a, far) or 0)


def test_the_order_of_rows_and_a_second_run_change_nothing() -> None:
    bank, maths = vectors("banking77_dev.jsonl"), vectors("gsm8k_dev.jsonl")
    a, b = bank[:150], np.concatenate([bank[150:], maths[:40]])
    rng = np.random.default_rng(0)
    for left, right in ((a, b), (rng.permutation(a), rng.permutation(b))):
        assert mmd(left, right) == mmd(a, b)
        assert auc(left, right) == auc(a, b)


def test_which_set_comes_first_changes_nothing() -> None:
    a, b = unit(60, 0), unit(90, 1, towards=1)
    one, two = mmd(a, b), mmd(b, a)
    assert one is not None and two is not None and one.squared == pytest.approx(two.squared, abs=1e-6)
    assert auc(a, b) == pytest.approx(auc(b, a), abs=1e-6)


def test_mmd_is_that_of_the_plain_definition() -> None:
    a, b = unit(30, 0), unit(20, 1, towards=1)
    both = np.concatenate([a, b]).astype(np.float64)
    squared = ((both[:, None] - both[None]) ** 2).sum(axis=2)
    wide = np.median(np.sqrt(squared[np.triu_indices(len(both), 1)]))
    kernel = np.exp(-squared / (2 * wide**2))
    inside, other, across = kernel[:30, :30], kernel[30:, 30:], kernel[:30, 30:]
    plain = (inside.sum() - 30) / (30 * 29) + (other.sum() - 20) / (20 * 19) - 2 * across.mean()
    told = mmd(a, b)
    assert told is not None and told.squared == pytest.approx(plain, abs=1e-5)


def test_p_values_of_like_sets_are_spread_evenly() -> None:
    found = [told.p for seed in range(60) if (told := mmd(unit(30, 2 * seed), unit(40, 2 * seed + 1)))]
    assert 0.35 < np.mean(found) < 0.65 and min(found) < 0.2 and max(found) > 0.8


def test_copies_in_both_sets_do_not_count_as_a_difference_the_wrong_way() -> None:
    a = unit(100, 0, dimensions=200)  # so many dimensions that a classifier knows every row again
    found = auc(a, np.concatenate([a, a]))
    assert found is not None and 0.4 < found < 0.6


def test_sets_of_very_different_sizes_can_be_compared() -> None:
    few, many = unit(12, 0), unit(5_000, 1)
    told, area = mmd(few, many), auc(few, many)
    assert told is not None and told.p > 0.01 and area is not None and 0.2 < area < 0.8
    other = mmd(unit(12, 0, towards=4), many)
    assert other is not None and other.p == 1 / 201


def test_sets_of_equal_vectors_give_numbers() -> None:
    first, second = np.eye(4, dtype=np.float32)[:2]
    same = np.tile(first, (20, 1))
    assert mmd(same, same) == (0, 1)
    mostly = np.concatenate([same, np.tile(second, (5, 1))])  # more than half of all pairs are equal
    told = mmd(mostly, mostly)
    assert told is not None and abs(told.squared) < 0.05
    assert (other := mmd(same, np.tile(second, (20, 1)))) is not None and other.squared > 0.5
    assert auc(same, same) in (None, 0.5)


def test_too_few_rows_say_nothing() -> None:
    assert mmd(unit(9, 0), unit(100, 1)) is None and auc(unit(9, 0), unit(100, 1)) is None
    assert mmd(unit(100, 1), unit(0, 0)) is None


def test_of_many_rows_evenly_spaced_ones_are_compared() -> None:
    rows = [unit(3_000, seed) for seed in range(2)]
    random.Random(0).shuffle(rows)
    told = mmd(rows[0], rows[1])
    assert told is not None and abs(told.squared) < 0.005

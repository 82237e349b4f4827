import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.jaccard import choose_bands, pairs, settle
from tests.factory.test_words import reference

SEEDS = Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl"


def seed_texts() -> list[str]:
    return [json.loads(line)["messages"][0]["content"].lower() for line in SEEDS.read_text(encoding="utf-8").splitlines()]


def mutated(texts: list[str], copies: int) -> list[str]:
    """Each text with up to six letters of it changed, several times over: likenesses of all sizes."""
    rng = random.Random(1)
    found = set(texts)
    for text in texts:
        for _ in range(copies):
            letters = list(text)
            for _ in range(rng.randint(1, 6)):
                letters[rng.randrange(len(letters))] = rng.choice("abcdé 語")
            found.add("".join(letters))
    return sorted(found)


def _shingles(text: str, unit: str, size: int) -> set[tuple[str, ...]]:
    units = list(text) if unit == "chars" else reference(text)
    return {tuple(units[i : i + size]) for i in range(max(len(units) - size, 0) + 1)} if units else set()


def brute(texts: list[str], threshold: float, unit: str, size: int) -> dict[tuple[int, int], float]:
    sets = [_shingles(text, unit, size) for text in texts]
    likeness = {(i, j): len(sets[i] & sets[j]) / max(len(sets[i] | sets[j]), 1) for i, j in combinations(range(len(texts)), 2)}
    return {pair: value for pair, value in likeness.items() if value >= threshold}


@pytest.mark.parametrize(("unit", "size"), [("chars", 3), ("chars", 5), ("words", 1), ("words", 3)])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_pairs_are_those_of_brute_force(unit: str, size: int, threshold: float) -> None:
    texts = [*mutated(seed_texts(), 9), "", "a", "ab", "", "A card", "🙂", "🙂🙂"]
    truth = brute(texts, threshold, unit, size)
    assert len(truth) > 10
    earlier, later, likeness = pairs(pl.Series(texts), threshold, shingle=unit, size=size, recall=0.99)  # type: ignore[arg-type]
    found = dict(zip(zip(earlier.tolist(), later.tolist(), strict=True), likeness.tolist(), strict=True))
    assert len(found) == len(earlier)  # each once
    assert found.keys() <= truth.keys()
    assert all(found[pair] == pytest.approx(truth[pair], abs=1e-12) for pair in found)
    assert len(found) >= 0.99 * len(truth)


def test_recall_is_what_was_asked_for_where_it_is_hardest() -> None:
    rng = random.Random(2)
    words = [f"w{n}" for n in range(5000)]
    texts = []
    for _ in range(400):  # pairs of sets of 90 with 80 in common: likeness exactly 0.8
        some = rng.sample(words, 100)
        texts += [" ".join(some[:90]), " ".join([*some[:80], *some[90:]])]
    for recall in (0.5, 0.99):
        found = pairs(pl.Series(texts), 0.8, shingle="words", size=1, recall=recall)
        assert found.likeness.tolist() == [0.8] * len(found.likeness)
        sigma = (recall * (1 - recall) / 400) ** 0.5
        assert len(found.likeness) / 400 >= recall - 4 * sigma


def test_datasketch_finds_no_pair_that_is_missed_here() -> None:
    texts = mutated(seed_texts(), 5)
    sketch = []
    for text in texts:
        one = MinHash(num_perm=128, seed=1)
        one.update_batch(["".join(shingle).encode() for shingle in _shingles(text, "chars", 3)])
        sketch.append(one)
    index = MinHashLSH(threshold=0.8, num_perm=128)
    for place, one in enumerate(sketch):
        index.insert(place, one)
    truth = brute(texts, 0.8, "chars", 3)
    theirs = {(i, j) for j, one in enumerate(sketch) for i in index.query(one) if (i, j) in truth}
    earlier, later, likeness = pairs(pl.Series(texts), 0.8)
    ours = set(zip(earlier.tolist(), later.tolist(), strict=True))
    assert len(theirs) > 50
    assert theirs <= ours
    estimates = [sketch[i].jaccard(sketch[j]) for i, j in zip(earlier, later, strict=True)]
    assert np.abs(np.array(estimates) - likeness).mean() < 0.05


def test_bands_keep_the_promise_and_grow_with_the_candidates_that_they_would_make() -> None:
    strangers = np.full(1000, 0.15)
    for threshold in (0.3, 0.5, 0.8, 0.95, 1.0):
        for recall in (0.8, 0.99):
            for texts in (100, 1_000_000):
                count, rows = choose_bands(threshold, recall, strangers, texts, 100)
                assert 1 - (1 - threshold**rows) ** count >= recall or count == rows == 1 or threshold == 1
                assert count * rows <= 512
    few, many = (choose_bands(0.8, 0.99, strangers, n, 100) for n in (100, 1_000_000))
    assert few.rows < many.rows


def naive(texts: list[str], new: list[bool], threshold: float, unit: str, size: int) -> list[bool]:
    """The rule, row by row: a new text goes where one before it that stays is so alike."""
    alike = brute(texts, threshold, unit, size)
    stay: list[bool] = []
    for i in range(len(texts)):
        stay.append(not new[i] or not any(stay[j] and (j, i) in alike for j in range(i)))
    return stay


SENTENCES = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=8).map(" ".join), max_size=12)


@given(SENTENCES, st.data(), st.sampled_from([0.3, 0.5, 0.8, 1.0]), st.sampled_from([("words", 1), ("words", 2), ("chars", 3)]))
@settings(max_examples=300, deadline=None)
def test_what_stays_and_all_pairs_are_those_of_brute_force(texts, data, threshold, cut) -> None:
    unit, size = cut
    new = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    series = pl.Series(texts, dtype=pl.String)
    truth = brute(texts, threshold, unit, size)
    for mode, recall in (("exact", 0.5), ("minhash", 1 - 1e-12)):
        found = pairs(series, threshold, shingle=unit, size=size, mode=mode, recall=recall)
        assert dict(zip(zip(found.earlier.tolist(), found.later.tolist(), strict=True), found.likeness, strict=True)) == pytest.approx(
            truth
        )
        stay, twin, likeness = settle(series, np.array(new, bool), threshold, shingle=unit, size=size, mode=mode, recall=recall)
        assert stay.tolist() == naive(texts, new, threshold, unit, size)
        for i in np.flatnonzero(~stay):
            assert stay[twin[i]] and likeness[i] == pytest.approx(truth[(int(twin[i]), int(i))])
            rivals = [value for (j, k), value in truth.items() if k == i and stay[j]]
            assert likeness[i] == pytest.approx(max(rivals))


@given(SENTENCES, st.sampled_from([0.3, 0.5, 0.8]))
@settings(max_examples=200, deadline=None)
def test_complete_link_puts_no_two_unlike_texts_into_a_group(texts, threshold) -> None:
    series = pl.Series(texts, dtype=pl.String)
    new = np.ones(len(texts), bool)
    stay, twin, _ = settle(series, new, threshold, shingle="words", size=1, mode="exact", link="complete")
    truth = brute(texts, threshold, "words", 1)
    for first in np.flatnonzero(stay):
        group = [int(first), *np.flatnonzero(twin == first).tolist()]
        assert all(pair in truth for pair in combinations(sorted(group), 2))
    assert all(stay[twin[i]] for i in np.flatnonzero(~stay))


def test_a_chain_of_small_steps_is_no_group() -> None:
    steps = [" ".join(f"w{k}" for k in range(i, i + 10)) for i in range(40)]  # each shares nine words of eleven with the next
    stay, twin, _ = settle(pl.Series(steps), np.ones(40, bool), 0.8, shingle="words", size=1, mode="exact")
    assert stay.sum() == 20
    assert (np.flatnonzero(~stay) - twin[~stay] == 1).all()


def test_ten_thousand_copies_take_no_square_of_time() -> None:
    texts = pl.Series(["the same thing again and again"] * 20_000 + ["something else"])
    stay, twin, _ = settle(texts, np.ones(len(texts), bool), 0.8)
    assert stay.sum() == 2 and (twin[1:-1] == 0).all()


def test_the_bands_of_many_long_texts_find_what_is_planted() -> None:
    rng = random.Random(3)
    vocabulary = [f"w{n}" for n in range(3000)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(40, 120))) for _ in range(3000)]
    for _ in range(500):
        some = texts[rng.randrange(3000)].split()
        some[rng.randrange(len(some))] = "new"
        texts.append(" ".join(some))
    truth = settle(pl.Series(texts), np.ones(len(texts), bool), 0.8, shingle="words", size=5, mode="exact")[0]
    found = settle(pl.Series(texts), np.ones(len(texts), bool), 0.8, shingle="words", size=5)[0]
    assert (~truth).sum() > 400
    assert not (truth & ~found).any()
    assert (~found).sum() >= 0.98 * (~truth).sum()


def test_texts_without_shingles_have_no_twins() -> None:
    assert len(pairs(pl.Series(["", ""], dtype=pl.String), 0.5).earlier) == 0
    assert len(pairs(pl.Series([], dtype=pl.String), 0.5).earlier) == 0
    assert len(pairs(pl.Series(["", " "], dtype=pl.String), 0.5, shingle="words").earlier) == 0


def test_a_text_shorter_than_a_shingle_is_one() -> None:
    earlier, later, likeness = pairs(pl.Series(["ab", "c", "ab", "ab", "abc", "d"]), 0.5)
    assert list(zip(earlier.tolist(), later.tolist(), likeness.tolist(), strict=True)) == [(0, 2, 1.0), (0, 3, 1.0), (2, 3, 1.0)]

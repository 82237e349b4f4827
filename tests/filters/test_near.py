import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from datasketch import MinHash, MinHashLSH

from filters.near import Near, bands, pairs
from tests.context import FakeContext, chat, frame

SEEDS = Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl"


def _seed_texts() -> list[str]:
    return [json.loads(line)["messages"][0]["content"].lower() for line in SEEDS.read_text(encoding="utf-8").splitlines()]


def _mutated(texts: list[str], copies: int) -> list[str]:
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
    units = list(text) if unit == "chars" else text.split()
    return {tuple(units[i : i + size]) for i in range(max(len(units) - size, 0) + 1)} if units else set()


def _brute(texts: list[str], threshold: float, unit: str, size: int) -> dict[tuple[int, int], float]:
    sets = [_shingles(text, unit, size) for text in texts]
    likeness = {(i, j): len(sets[i] & sets[j]) / max(len(sets[i] | sets[j]), 1) for i, j in combinations(range(len(texts)), 2)}
    return {pair: value for pair, value in likeness.items() if value >= threshold}


@pytest.mark.parametrize(("unit", "size"), [("chars", 3), ("chars", 5), ("words", 1), ("words", 3)])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_pairs_are_those_of_brute_force(unit: str, size: int, threshold: float) -> None:
    texts = [*_mutated(_seed_texts(), 9), "", "a", "ab", "", "A card", "🙂", "🙂🙂"]
    truth = _brute(texts, threshold, unit, size)
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
    texts = _mutated(_seed_texts(), 5)
    sketch = []
    for text in texts:
        one = MinHash(num_perm=128, seed=1)
        one.update_batch(["".join(shingle).encode() for shingle in _shingles(text, "chars", 3)])
        sketch.append(one)
    index = MinHashLSH(threshold=0.8, num_perm=128)
    for place, one in enumerate(sketch):
        index.insert(place, one)
    truth = _brute(texts, 0.8, "chars", 3)
    theirs = {(i, j) for j, one in enumerate(sketch) for i in index.query(one) if (i, j) in truth}
    earlier, later, likeness = pairs(pl.Series(texts), 0.8)
    ours = set(zip(earlier.tolist(), later.tolist(), strict=True))
    assert len(theirs) > 50
    assert theirs <= ours
    estimates = [sketch[i].jaccard(sketch[j]) for i, j in zip(earlier, later, strict=True)]
    assert np.abs(np.array(estimates) - likeness).mean() < 0.05


def test_bands_keep_the_promise_and_the_budget() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.95, 1.0):
        for recall in (0.8, 0.99):
            count, rows = bands(threshold, recall)
            assert 1 - (1 - threshold**rows) ** count >= recall or threshold == 1
            assert count * rows <= 128
    assert bands(0.8, 0.99) == (16, 6)


def test_texts_without_shingles_have_no_twins() -> None:
    assert len(pairs(pl.Series(["", ""], dtype=pl.String), 0.5).earlier) == 0
    assert len(pairs(pl.Series([], dtype=pl.String), 0.5).earlier) == 0
    assert len(pairs(pl.Series(["", " "], dtype=pl.String), 0.5, shingle="words").earlier) == 0


def test_a_text_shorter_than_a_shingle_is_one() -> None:
    earlier, later, likeness = pairs(pl.Series(["ab", "c", "ab", "ab", "abc", "d"]), 0.5)
    assert list(zip(earlier.tolist(), later.tolist(), likeness.tolist(), strict=True)) == [(0, 2, 1.0), (0, 3, 1.0), (2, 3, 1.0)]


def test_blank_texts_are_nobodys_twins() -> None:
    assert Near(compare="output").judge(frame(chat("one"), chat("two")), FakeContext())["keep"].all()


def test_a_typo_goes_and_a_question_of_its_own_stays() -> None:
    kept = chat("Why was my transfer to a friend declined yesterday?", origin="real")
    typo, copy, own = (
        chat(text, str(n)) for n, text in enumerate(("Why was my transfer to a freind declined yesterday", kept.input, "Where is my card?"))
    )
    given = Near().judge(frame(own, copy, typo), FakeContext(kept=frame(kept)))
    by_id = {row["sample"]: row for row in given.iter_rows(named=True)}
    assert [by_id[one.id]["keep"] for one in (typo, copy, own)] == [False, False, True]
    assert [by_id[one.id]["score"] for one in (copy, own)] == [1.0, None]
    assert 0.8 <= by_id[typo.id]["score"] < 1
    assert json.loads(by_id[typo.id]["detail"]) == json.loads(by_id[copy.id]["detail"]) == {"twin": kept.id}
    assert by_id[typo.id]["reason"] == "near duplicate"


def test_real_questions_are_no_near_duplicates_of_each_other() -> None:
    given = Near().judge(frame(*(chat(text) for text in _seed_texts())), FakeContext())
    assert given["keep"].all()
    assert len(given) == 40


def test_a_higher_threshold_can_be_read_off_the_scores() -> None:
    new = frame(*(chat(text) for text in _mutated(_seed_texts(), 4)))
    given = Near(threshold=0.8).judge(new, FakeContext())
    assert given.filter(~pl.col("keep"))["score"].min() >= 0.8  # type: ignore[operator]
    assert given.filter("keep")["score"].max() < 0.8  # type: ignore[operator]
    assert given.filter("keep")["score"].count() > 0


def test_the_verdicts_do_not_depend_on_the_order_of_the_rows() -> None:
    texts = _mutated(_seed_texts()[:12], 8)
    kept, new = frame(*(chat(text) for text in texts[::7])), frame(*(chat(text) for n, text in enumerate(texts) if n % 7))
    copies = frame(*(chat(text.upper(), "copy") for text in texts[::3]))
    new = new.vstack(copies)
    first = Near().judge(new, FakeContext(kept=kept)).sort("sample")
    assert 0 < first["keep"].sum() < len(first)
    for seed in range(3):
        again = Near().judge(
            new.sample(fraction=1, shuffle=True, seed=seed), FakeContext(kept=kept.sample(fraction=1, shuffle=True, seed=seed))
        )
        assert again.sort("sample").equals(first)


def test_no_rejected_row_is_alone_and_no_two_that_stay_are_twins() -> None:
    texts = _mutated(_seed_texts()[:12], 8)
    rows = [chat(text) for text in texts]
    given = Near(recall=0.999).judge(frame(*rows), FakeContext())
    stay = set(given.filter("keep")["sample"])
    twins = [json.loads(detail)["twin"] for detail in given.filter(~pl.col("keep"))["detail"]]
    assert set(twins) <= stay
    assert not _brute([one.input for one in rows if one.id in stay], 0.8, "chars", 3)


def test_no_rows() -> None:
    assert Near().judge(frame(), FakeContext()).is_empty()
    assert Near().judge(frame(), FakeContext(kept=frame(chat("a")))).is_empty()

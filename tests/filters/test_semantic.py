import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from factory.store import samples_frame
from filters.semantic import BLOCK, Semantic, calibrate, settle
from schemas.sample import Message, Provenance, Sample
from tests.context import FakeContext, chat, frame

SEEDS = Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl"


def _seeds() -> pl.DataFrame:
    rows = [json.loads(line)["messages"] for line in SEEDS.read_text(encoding="utf-8").splitlines()]
    return frame(*(chat(user["content"], assistant["content"], origin="real") for user, assistant in rows))


def _unlabelled(text: str) -> Sample:
    return Sample(messages=(Message(role="user", content=text),), provenance=Provenance(origin="made", generator="test"))


def _greedy(vectors: NDArray[np.float32], new: NDArray[np.bool_], threshold: float) -> list[bool]:
    """The rule, a row at a time."""
    stay: list[int] = []
    for row, vector in enumerate(vectors):
        if not new[row] or not stay or (vectors[stay] @ vector).max() < threshold:
            stay.append(row)
    return [row in set(stay) for row in range(len(vectors))]


def _unit(count: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("kept", [0, 40])
def test_settling_by_blocks_is_settling_row_by_row(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filters.semantic.BLOCK", 64)
    monkeypatch.setattr("filters.semantic.COLUMNS", 50)
    vectors = _unit(500, seed=3)
    new = np.arange(500) >= kept
    stay, twin, likeness = settle(vectors, new, 0.8)
    assert stay.tolist() == _greedy(vectors, new, 0.8)
    assert 50 < stay.sum() < 450
    for row in range(max(kept, 1), 500):
        cosines = np.where(stay[:row], vectors[:row] @ vectors[row], -np.inf)
        assert likeness[row] == pytest.approx(cosines.max(), abs=1e-5)
        assert cosines[twin[row]] == pytest.approx(cosines.max(), abs=1e-5)
        assert stay[row] == (likeness[row] < 0.8)
    if not kept:
        assert twin[0] == -1
        assert np.isnan(likeness[0])


def test_one_block_holds_more_than_a_small_round() -> None:
    vectors = _unit(BLOCK + 10, seed=4)
    stay, _, _ = settle(vectors, np.ones(len(vectors), np.bool_), 0.9)
    assert stay.tolist() == _greedy(vectors, np.ones(len(vectors), np.bool_), 0.9)


def test_the_same_in_other_words_goes_and_a_like_subject_stays() -> None:
    kept = chat("Why was I charged a fee to transfer money?", "fee", origin="real")
    same = chat("Why was a fee charged to me for transferring money?", "fee")
    other = chat("How long does a transfer of money take?", "fee")
    given = Semantic().judge(frame(same, other), FakeContext(kept=frame(kept)))
    by_id = {row["sample"]: row for row in given.iter_rows(named=True)}
    assert not by_id[same.id]["keep"]
    assert by_id[same.id]["score"] > 0.95
    assert by_id[same.id]["reason"] == "semantic duplicate"
    assert json.loads(by_id[same.id]["detail"]) == {"twin": kept.id}
    assert by_id[other.id]["keep"]
    assert by_id[other.id]["score"] < 0.8


def test_rows_of_other_labels_are_not_compared_unless_asked() -> None:
    new = frame(chat("I lost my card yesterday", "lost"), chat("I found my card yesterday", "found"))
    assert Semantic(threshold=0.8).judge(new, FakeContext())["keep"].all()
    assert Semantic(threshold=0.8, same_label=False).judge(new, FakeContext())["keep"].sum() == 1


def test_rows_of_other_numbers_are_not_compared_unless_asked() -> None:
    new = frame(chat("I sent 50 pounds to a friend", "a"), chat("I sent 500 pounds to a friend", "a"))
    assert Semantic(threshold=0.8).judge(new, FakeContext())["keep"].all()
    assert Semantic(threshold=0.8, numbers=False).judge(new, FakeContext())["keep"].sum() == 1


def test_rows_without_a_label_are_compared_with_each_other() -> None:
    new = samples_frame(
        [_unlabelled("Why was I charged a fee to transfer money?"), _unlabelled("Why was a fee charged to me for transferring money?")]
    )
    assert Semantic().judge(new, FakeContext())["keep"].sum() == 1


def test_blank_texts_are_nobodys_twins() -> None:
    assert Semantic(compare="output").judge(samples_frame([_unlabelled("a"), _unlabelled("b")]), FakeContext())["keep"].all()


def test_the_verdicts_do_not_depend_on_the_order_of_the_rows() -> None:
    seeds = _seeds()
    kept, new = seeds[::3], seeds.filter(~pl.col("id").is_in(seeds[::3]["id"].to_list()))
    first = Semantic(threshold=0.7).judge(new, FakeContext(kept=kept)).sort("sample")
    assert 0 < first["keep"].sum() < len(first)
    for seed in range(3):
        again = Semantic(threshold=0.7).judge(
            new.sample(fraction=1, shuffle=True, seed=seed), FakeContext(kept=kept.sample(fraction=1, shuffle=True, seed=seed))
        )
        assert again.sort("sample").equals(first)


def test_a_threshold_from_the_seeds_lets_most_of_them_stand_apart() -> None:
    seeds = _seeds()
    ctx = FakeContext(seeds=seeds)
    given = Semantic(threshold="auto").judge(frame(chat("Is there a fee?", "a")), ctx)
    report = ctx.reports["threshold"]
    assert given["keep"].all()
    assert 0.85 < report["chosen"] < 0.95
    assert report["chosen"] == report["closest"]["q95"] > report["unrelated"]["q999"]
    among_seeds = Semantic(threshold=report["chosen"]).judge(seeds, FakeContext())
    assert 36 <= among_seeds["keep"].sum() <= 39


def test_the_threshold_stays_within_reason() -> None:
    labels = pl.Series(["a", "b"] * 10)
    assert calibrate(np.eye(20, dtype=np.float32), labels)[0] == 0.85
    assert calibrate(np.tile(np.eye(1, 4, dtype=np.float32), (20, 1)), labels)[0] == 0.98
    assert calibrate(np.eye(20, dtype=np.float32), pl.Series([None] * 20, dtype=pl.String))[0] == 0.85
    assert calibrate(np.eye(5, dtype=np.float32), labels[:5]) == (0.95, {"seeds": 5})


def test_no_rows() -> None:
    assert Semantic(threshold="auto").judge(frame(), FakeContext()).is_empty()
    assert Semantic().judge(frame(), FakeContext(kept=_seeds())).is_empty()

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from factory.cosine import Mode, settle
from factory.store import samples_frame
from filters.semantic import Semantic, calibrate, opposites
from schemas.sample import Message, Provenance, Sample
from tests.context import FakeContext, chat, frame

SEEDS = Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl"


def _seeds() -> pl.DataFrame:
    rows = [json.loads(line)["messages"] for line in SEEDS.read_text(encoding="utf-8").splitlines()]
    return frame(*(chat(user["content"], assistant["content"], origin="real") for user, assistant in rows))


def _unlabelled(text: str) -> Sample:
    return Sample(messages=(Message(role="user", content=text),), provenance=Provenance(origin="made", generator="test"))


class OneVector(FakeContext):
    """A context in which all texts have the same vector: what is kept apart is so by words alone."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.tile(np.eye(1, 8, dtype=np.float32), (len(texts), 1))


def _are_one(one: str, other: str, **fields: Any) -> bool:
    return not Semantic(**fields).judge(frame(chat(one, "a"), chat(other, "a")), OneVector())["keep"].all()


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
    new = frame(chat("I lost my card yesterday", "lost"), chat("Yesterday I lost my card", "stolen"))
    assert Semantic(threshold=0.8).judge(new, FakeContext())["keep"].all()
    assert Semantic(threshold=0.8, same_label=False).judge(new, FakeContext())["keep"].sum() == 1


def test_opposites_are_not_compared_unless_asked() -> None:
    new = frame(chat("I lost my card yesterday", "card"), chat("I found my card yesterday", "card"))
    assert Semantic(threshold=0.8).judge(new, FakeContext())["keep"].all()
    assert Semantic(threshold=0.8, negation=False).judge(new, FakeContext())["keep"].sum() == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("I lost my card", "I found my card"),
        ("Losing a card", "Finding a card"),
        ("My payment was accepted.", "My payment was declined."),
        ("My payment was accepted.", "My payment was rejected."),
        ("Turn the alerts ON", "Turn the alerts off!"),
        ("How do I enable alerts?", "How do I disable alerts?"),
        ("How do I send money?", "How do I receive money?"),
        ("Why is it up?", "Why is it down?"),
        ("I paid before the trip", "I paid after the trip"),
        ("It costs more", "It costs less"),
        ("A transfer from my savings", "A transfer to my savings"),
        ("This shop is supported", "This shop is unsupported"),
        ("It works", "It doesn't work"),
        ("It works", "It doesn’t work"),
        ("It works", "It doesnt work"),
        ("I can log in", "I cannot log in"),
        ("I can log in", "I am unable to log in"),
        ("A transfer with a fee", "A transfer without a fee"),
        ("I was always charged", "I was never charged"),
    ],
)
def test_denials_and_opposites_stay_apart(one: str, other: str) -> None:
    assert not _are_one(one, other)
    assert _are_one(one, other, negation=False)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("I can't log in", "I cannot log in"),
        ("I can't log in", "I'm unable to log in"),
        ("There is no fee", "It is without a fee"),
        ("Why did it fail?", "I don't know why it failed"),
        ("Why is it pending?", "I can't figure out why it is pending."),
        ("Turn it on and off again", "Turn it off"),  # who says both says neither
        ("I want to go to a shop", "I go want a shop"),
        ("Knot the rope", "Note the rope"),  # "not" is in them, and no word
        ("The onset", "The offset"),
    ],
)
def test_what_says_the_same_is_compared(one: str, other: str) -> None:
    assert _are_one(one, other)


def test_a_text_is_on_one_side_of_each_pair_of_opposites() -> None:
    sides = opposites(pl.Series(["i bought it", "i sold it", "bought and sold", "on", "", "on a whim, bought"]))
    assert (sides[0] == sides[1][::-1]).all() and sides[0].any()
    assert not sides[[2, 4]].any()
    assert sides[5].tolist() == (sides[0] | sides[3]).tolist()


def test_the_report_shows_the_groups_and_the_pairs_nearest_to_the_cut() -> None:
    seeds, ctx = _seeds(), FakeContext()
    given = Semantic(threshold=0.7, same_label=False).judge(seeds, ctx)
    above, below = (ctx.reports["nearest_the_cut"][side] for side in ("above", "below"))
    assert len(above) == len(below) == 5
    assert [row["likeness"] for row in above] == sorted(row["likeness"] for row in above)
    assert all(row["likeness"] >= 0.7 for row in above) and all(row["likeness"] < 0.7 for row in below)
    rejected = set(given.filter(~pl.col("keep"))["sample"])
    assert {row["sample"] for row in above} <= rejected and not {row["sample"] for row in below} & rejected
    assert ctx.reports["groups"]["count"] == len(given.filter(~pl.col("keep")).unique("detail"))


def test_either_way_of_comparing_gives_the_same_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.cosine._Hashed.is_slower", lambda _, mode, *__: mode == "exact")
    one, other = (Semantic(threshold=0.75, mode=mode).judge(_seeds(), FakeContext()) for mode in ("exact", "fast"))
    assert one["keep"].to_list() == other["keep"].to_list()
    assert 0 < one["keep"].sum() < 40


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
    assert 36 <= among_seeds["keep"].sum() <= 40
    assert report["false_merges"] <= 0.001
    assert report["seeds_merged"] in (2, 3, 4)
    assert len(report["closest_pairs"]) == 5 and report["closest_pairs"][0]["likeness"] == report["closest"]["max"]


def test_the_threshold_stays_within_reason() -> None:
    labels = pl.Series(["a", "b"] * 10)
    assert calibrate(np.eye(20, dtype=np.float32), labels)[0] == 0.85
    assert calibrate(np.tile(np.eye(1, 4, dtype=np.float32), (20, 1)), labels)[0] == 0.98
    assert calibrate(np.eye(20, dtype=np.float32), pl.Series([None] * 20, dtype=pl.String))[0] == 0.85
    assert calibrate(np.eye(5, dtype=np.float32), labels[:5]) == (0.95, {"seeds": 5})
    apart = ~np.eye(20, dtype=np.bool_)
    assert calibrate(np.tile(np.eye(1, 4, dtype=np.float32), (20, 1)), labels, apart)[0] == 0.85  # never compared: no evidence


def test_no_rows() -> None:
    assert Semantic(threshold="auto").judge(frame(), FakeContext()).is_empty()
    assert Semantic().judge(frame(), FakeContext(kept=_seeds())).is_empty()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_complete_link_puts_no_two_unlike_rows_into_a_group(seed: int, mode: Mode) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((300, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    originals = rng.integers(0, 200, 30)
    vectors[200:230] = vectors[originals]  # copies
    vectors[40] = 0
    keys, sides = rng.integers(0, 2, 300).astype(np.int32), np.zeros((300, 2), np.uint64)
    sides[::7, 0], sides[::11, 1] = 1, 1
    sides[::77] = 0  # who says both, says neither
    sides[200:230] = sides[originals]  # equal vectors are of equal words
    new = np.arange(300) >= 20
    stay, twin, likeness = settle(vectors, new, 0.9, keys=keys, sides=sides, mode=mode, link="complete")
    assert stay[:20].all() and stay[40]
    assert 0 < (~stay).sum() < 280
    for first in np.flatnonzero(stay):
        group = [first, *np.flatnonzero(twin == first)]
        assert len(set(keys[group])) == 1
        for one, other in combinations(group, 2):
            assert vectors[one] @ vectors[other] >= 0.9 - 1e-5
            assert not (sides[one, 0] & sides[other, 1] or sides[one, 1] & sides[other, 0])
    for row in np.flatnonzero(~stay):
        assert stay[twin[row]] and twin[row] < row
        assert likeness[row] == pytest.approx(vectors[row] @ vectors[twin[row]], abs=1e-5)


def test_a_row_that_is_like_the_first_of_a_group_alone_stays_by_complete_link() -> None:
    angles = np.array([0.0, 0.3, -0.3])  # both are like the first, and unlike each other
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert settle(vectors, np.ones(3, np.bool_), 0.9)[0].tolist() == [True, False, False]
    assert settle(vectors, np.ones(3, np.bool_), 0.9, link="complete")[0].tolist() == [True, False, True]


def test_the_filter_links_completely_where_it_is_told_to() -> None:
    rows = frame(_unlabelled("How do I get a new card?"), _unlabelled("How can I get a new card?"), _unlabelled("My transfer failed."))
    for link in ("star", "complete"):
        given = Semantic(threshold=0.9, link=link).judge(rows, FakeContext())
        assert given["keep"].sum() == 2

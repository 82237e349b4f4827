"""What a round aims at, and what the target takes in."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from factory import rounds
from factory.errors import RunError
from factory.rounds import ANYWHERE, Yield
from schemas.recipe import Target
from tests.context import chat, frame

SEEDS = frame(*[chat(f"{label} {i}", label, origin="real") for label in "abc" for i in range(2)])


def test_quotas_add_up_to_the_target() -> None:
    assert rounds.quotas(Target(accepted=10, balance="label"), SEEDS) == {"a": 4, "b": 3, "c": 3}
    assert rounds.quotas(Target(accepted=10), SEEDS) == {ANYWHERE: 10}
    one = frame(chat("hi", "all", origin="real"), chat("ho", "other", origin="real"))  # "all" is a label like any other
    quota = rounds.quotas(Target(accepted=4, balance="label"), one)
    assert rounds.counts(one, quota) == {"all": 1, "other": 1}
    with pytest.raises(RunError, match="no seed has a label"):
        rounds.quotas(Target(accepted=10, balance="label"), frame(chat("hi", origin="real")))


def test_needs_name_what_is_missing_thinnest_first() -> None:
    quota = {"a": 4, "b": 3, "c": 3}
    found = rounds.needs(quota, {"a": 3, "b": 3, "c": 0}, {"a": Yield(made=8, good=4), "c": Yield(made=98, good=0)})
    assert [(n.label, n.missing) for n in found] == [("c", 3), ("a", 1)]
    assert found[0].rate == 0.05  # nothing came there; it is asked for more, but not without end
    assert found[1].rate == 0.5


def test_thin_clusters_share_what_is_missing_and_show_real_rows() -> None:
    members = pl.DataFrame(
        {
            "sample": ["r1", "m1", "m2", "m3", "r2", "n1"],
            "cluster": [0, 0, 0, 0, 1, -1],
            "origin": ["real", "made", "made", "made", "real", "made"],
        }
    )
    found = rounds.thin_clusters(10, 0.5, members)
    assert sum(n.missing for n in found) == 10
    assert [n.cluster for n in found] == [0, 1]
    assert found[1].missing > found[0].missing
    assert found[1].exemplars == ("r2",)
    assert rounds.thin_clusters(10, 0.5, members.filter(pl.col("cluster") == 0)) == ()


def unlike(place: str, candidates: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(candidates.height), np.eye(candidates.height)


def test_the_target_takes_the_best_of_each_place_whatever_the_order() -> None:
    good = frame(*[chat(f"row {i}", label) for i, label in enumerate("aaaabbx")])
    quality = pl.Series([0.1, 0.9, 0.5, 0.5, 0.2, 0.3, 1.0])
    verdicts = rounds.choose(good, quality, {"a": 4, "b": 3}, {"a": 2, "b": 0}, unlike)
    kept = good.filter(pl.col("id").is_in(verdicts.filter("keep")["sample"].implode()))
    assert sorted(kept["label"]) == ["a", "a", "b", "b"]
    assert "row 1" in kept["input"].to_list()
    reasons = dict(verdicts.filter(~pl.col("keep"))["reason"].value_counts().iter_rows())
    assert reasons == {"place full": 2, "no such place": 1}
    order = [3, 6, 0, 5, 2, 4, 1]
    shuffled = rounds.choose(good[order], quality.gather(order), {"a": 4, "b": 3}, {"a": 2, "b": 0}, unlike)
    assert shuffled.sort("sample").equals(verdicts.sort("sample"))


def test_a_row_like_one_that_was_taken_gives_way_to_one_that_is_not() -> None:
    good = frame(*[chat(f"row {i}", "a") for i in range(3)])

    def alike(place: str, candidates: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(3), np.array([[0.0, 1.0] if text == "row 2" else [1.0, 0.0] for text in candidates["input"]])

    verdicts = rounds.choose(good, pl.Series([0.9, 0.8, 0.5]), {"a": 2}, {}, alike)
    kept = good.filter(pl.col("id").is_in(verdicts.filter("keep")["sample"].implode()))
    assert sorted(kept["input"]) == ["row 0", "row 2"]


def test_quality_is_the_mean_rank_over_ranking_filters() -> None:
    good = frame(chat("one"), chat("two"), chat("three"))
    ids = good["id"]
    verdicts = pl.DataFrame(
        {
            "sample": [ids[0], ids[1], ids[0], ids[1]],
            "by": ["fits", "fits", "judge", "judge"],
            "keep": True,
            "reason": None,
            "score": [0.9, 0.1, 5.0, 4.0],
            "detail": "{}",
        }
    )
    assert rounds.quality_of(good, verdicts, ["fits", "judge"]).to_list() == [1.0, 0.5, 0.5]

"""The places that a plan knows, and how good a row is."""

from __future__ import annotations

import polars as pl

from factory import rounds
from factory.cells import REST
from schemas.recipe import Target
from tests.context import chat, frame

SEEDS = frame(*[chat(f"{label} {i}", label, origin="real") for label in "abc" for i in range(2)])


def test_a_plan_knows_labels_as_places() -> None:
    assert rounds.quotas(Target(accepted=10, balance="label"), SEEDS) == {"a": 4, "b": 3, "c": 3}
    assert rounds.quotas(Target(accepted=10), SEEDS) == {REST: 10}
    assert rounds.quotas(Target(accepted=10, balance="label", oversample=2.5), SEEDS) == {"a": 10, "b": 8, "c": 8}
    some = rounds.quotas(Target(accepted=10, quotas={"label": {"a": 2}}), SEEDS)
    assert some == {"a": 2, REST: 8}
    assert rounds.counts(SEEDS, some) == {"a": 2, REST: 4}
    one = frame(chat("hi", "all", origin="real"), chat("ho", "other", origin="real"))  # "all" is a label like any other
    quota = rounds.quotas(Target(accepted=4, balance="label"), one)
    assert rounds.counts(one, quota) == {"all": 1, "other": 1}


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

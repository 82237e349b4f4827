"""What a round aims at and what it takes in: pure functions from the target and what is there to needs and choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.errors import RunError
from factory.records import TARGET
from factory.stage import Need
from factory.store import verdicts_from
from schemas.recipe import Target

Numbers = NDArray[np.floating[Any]]
Redundancy = Callable[[str, pl.DataFrame], tuple[Numbers, Numbers]]  # of a place and its candidates; see `_most_marginal`

ANYWHERE = "\0"  # the one place of a target without labels; no label that a person wrote
STALLED_ROUNDS = 3
_DIVERSITY = 0.5  # weight of likeness against quality in a choice; from 0.5 to 1 the demo's probe does not move (docs/log.md)
_LEAST_RATE = 0.05  # a place that gave nothing is still asked for at most 20 times what it lacks


@dataclass(frozen=True)
class Yield:
    """What a place has given so far: how many samples were made for it, and how many of them every filter kept."""

    made: int = 0
    good: int = 0

    @property
    def rate(self) -> float | None:
        """Good rows a sample made, drawn a little towards a half while there are few; None before any was made."""
        return (self.good + 1) / (self.made + 2) if self.made else None


def quotas(target: Target, seeds: pl.DataFrame) -> dict[str, int]:
    """How many accepted rows each place is to hold: one quota a label where labels are balanced (they add up to the target), else one.

    RunError: labels are to be balanced and the seeds have none.
    """
    if target.balance != "label":
        return {ANYWHERE: target.accepted}
    labels = sorted(seeds["label"].drop_nulls().unique().to_list())
    if not labels:
        raise RunError(
            "target.balance is 'label', but no seed has a label",
            next="Name the column with `seeds: {label: …}`, or leave balance out.",
        )
    share, rest = divmod(target.accepted, len(labels))
    return {label: share + (i < rest) for i, label in enumerate(labels)}


def place_of(frame: pl.DataFrame, quota: Mapping[str, int]) -> pl.Series:
    """The place of each row: its label, or everywhere the same where labels are not balanced."""
    if ANYWHERE in quota:
        return pl.Series("place", [ANYWHERE] * frame.height, dtype=pl.String)
    return frame["label"].alias("place")


def counts(frame: pl.DataFrame, quota: Mapping[str, int]) -> dict[str, int]:
    """How many of these rows each place holds."""
    found = dict(place_of(frame, quota).value_counts().iter_rows())
    return {place: int(found.get(place, 0)) for place in quota}


def needs(
    quota: Mapping[str, int], have: Mapping[str, int], yields: Mapping[str, Yield], *, oversample: float = 1, clusters: Sequence[Need] = ()
) -> tuple[Need, ...]:
    """The places that are still thin, thinnest first; `oversample` times what is missing is aimed at, to choose from.

    `clusters` (from `thin_clusters`) replace the one need of an unbalanced target.
    """
    if ANYWHERE in quota and clusters:
        return tuple(clusters)
    thin = [
        Need(
            missing=math.ceil((quota[place] - have.get(place, 0)) * oversample),
            label=None if place == ANYWHERE else place,
            rate=None if (rate := yields.get(place, Yield()).rate) is None else max(rate, _LEAST_RATE),
        )
        for place in quota
        if have.get(place, 0) < quota[place]
    ]
    return tuple(sorted(thin, key=lambda need: (-need.missing, need.label or "")))


def thin_clusters(missing: int, rate: float | None, members: pl.DataFrame) -> tuple[Need, ...]:
    """`missing` rows shared out over the clusters that lie below an equal share, in proportion to what each lacks.

    `members`: `sample`, `cluster`, `origin`, one row a kept sample. Exemplars are the cluster's real rows. Without two
    clusters nothing is thin, and the result is empty.
    """
    inside = members.filter(pl.col("cluster") >= 0)
    sizes = (
        inside.group_by("cluster")
        .agg(pl.len().alias("n"), pl.col("sample").filter(pl.col("origin") == "real").alias("real"))
        .sort("cluster")
    )
    if sizes.height < 2:
        return ()
    share = (inside.height + missing) / sizes.height
    lacking = [(row["cluster"], max(share - row["n"], 0.0), tuple(sorted(row["real"]))) for row in sizes.iter_rows(named=True)]
    lacking = [entry for entry in lacking if entry[1] > 0 and entry[2]]
    whole = sum(lack for _, lack, _ in lacking)
    if not whole:
        return ()
    shared = [(cluster, round(missing * lack / whole), real) for cluster, lack, real in lacking]
    return tuple(Need(missing=n, cluster=cluster, rate=rate, exemplars=real) for cluster, n, real in shared if n > 0)


def choose(
    good: pl.DataFrame, quality: pl.Series, quota: Mapping[str, int], have: Mapping[str, int], redundancy: Redundancy
) -> pl.DataFrame:
    """The target's verdicts on the rows that every filter kept: the best of each place, up to what it lacks.

    Where a place has more good rows than it lacks, they are taken one by one by maximal marginal relevance (Carbonell and
    Goldstein 1998): `quality` (0 to 1, aligned with `good`) less half of the likeness to what the place holds. Ties go by id,
    so the order of arrival decides nothing. Rows beyond a place's quota get keep=False with the reason "place full"; rows of
    no place of the target, "no such place".
    """
    rows = good.select("id").with_columns(place_of(good, quota), quality.alias("quality")).with_row_index("row").sort("id")
    taken: list[int] = []
    for place in quota:
        here = rows.filter(pl.col("place") == place)
        missing = max(quota[place] - have.get(place, 0), 0)
        if here.height <= missing:
            taken += here["row"].to_list()
        elif missing:
            among = here["row"].to_list()
            taken += [among[i] for i in _most_marginal(here["quality"].to_numpy(), redundancy(place, good[among]), missing)]
    keep = rows["row"].is_in(pl.Series(taken, dtype=pl.UInt32).implode())
    reason = rows.select(
        pl.when(keep)
        .then(pl.lit(None, pl.String))
        .when(pl.col("place").is_in(list(quota)))
        .then(pl.lit("place full"))
        .otherwise(pl.lit("no such place"))
    ).to_series()
    return verdicts_from(rows["id"], keep=keep, reason=reason, score=rows["quality"]).with_columns(by=pl.lit(TARGET))


def _most_marginal(quality: Numbers, likeness: tuple[Numbers, Numbers], wanted: int) -> list[int]:
    """Positions of the `wanted` rows, best first. `likeness`: the cosine of each row to what is held, shape (n,); unit vectors, (n, d)."""
    held, vectors = likeness
    redundancy = held.copy()
    left = np.ones(len(quality), dtype=bool)
    chosen: list[int] = []
    for _ in range(wanted):
        best = int(np.argmax(np.where(left, quality - _DIVERSITY * redundancy, -np.inf)))
        chosen.append(best)
        left[best] = False
        np.maximum(redundancy, vectors @ vectors[best], out=redundancy)
    return chosen


def quality_of(good: pl.DataFrame, verdicts: pl.DataFrame, ranking: Sequence[str]) -> pl.Series:
    """How good each row is: the mean of its percentile ranks over the ranking filters' scores, from 0 to 1; 0.5 without any."""
    scored = verdicts.filter(pl.col("by").is_in(ranking) & pl.col("score").is_not_null() & pl.col("sample").is_in(good["id"].implode()))
    means = (
        scored.with_columns(percentile=pl.col("score").rank("average").over("by") / pl.len().over("by"))
        .group_by("sample")
        .agg(pl.col("percentile").mean())
    )
    joined = good.select("id").join(means, left_on="id", right_on="sample", how="left", maintain_order="left")
    return joined["percentile"].fill_null(0.5).alias("quality")

"""The places of a target as a plan knows them, and how good a row is among those of its kind.

A plan knows one kind of place, the labels of a target; `REST` is the place of all others, or of all rows. What a run aims at is in
`factory/loop.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import polars as pl

from factory.cells import LABEL, REST, Grid, cells_of, grid_of
from schemas.recipe import Target


def quotas(target: Target, seeds: pl.DataFrame) -> dict[str, int]:
    """How many good rows each place is to have: a label its quota, by `oversample`; RunError where no seed has one."""
    by_label = target.model_copy(
        update={"balance": LABEL if LABEL in target.balanced else None, "quotas": {n: q for n, q in target.quotas.items() if n == LABEL}}
        | {"reference": None, "proportions": None}
    )
    wanted = grid_of(by_label, seeds, {}).wanted(target.oversample).get(LABEL)
    return {REST: math.ceil(target.accepted * target.oversample - 1e-9)} if wanted is None else wanted


def counts(frame: pl.DataFrame, quota: Mapping[str, int]) -> dict[str, int]:
    """How many of these rows each place holds."""
    found = Counter(cells_of(frame, Grid(sum(quota.values()), {LABEL: quota}), {}))
    return {place: found[(place,)] for place in quota}


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

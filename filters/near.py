"""Rows that differ by a typo, a word or a comma teach nothing new: found by their shingles, and each confirmed by counting them."""

from __future__ import annotations

from typing import ClassVar, Literal

import polars as pl
from pydantic import Field

from factory.jaccard import Mode, Unit, settle
from factory.pairs import Link
from factory.stage import Context
from filters.twins import Compared, groups, nearest_the_cut, plain, standing, verdicts


class Near(Compared):
    """Rejects a row whose shingles overlap with those of a row that stays: Jaccard of at least `threshold`.

    A shingle is `size` letters (`shingle: chars`) or words in a row. Three letters serve short texts, where a single typo
    spoils a large share of longer ones: in the bank example's questions of fifty letters nine typos in ten stay above 0.8, and no
    two distinct questions reach 0.7. For documents take words and 5.

    `mode: minhash` finds a pair that is just at the threshold with a chance of at least `recall`, a more similar one more surely; `exact`
    misses none, and is slow for letters in very many rows. What is found is never below the threshold. `link: complete` also asks that
    a row is as alike to all that were rejected for its twin. `score` is the likeness to the nearest of the rows that stay and were
    compared; null: none was.
    """

    key: ClassVar[str] = "near"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "dataset"

    threshold: float = Field(0.8, ge=0.2, le=1)
    shingle: Unit = "chars"
    size: int = Field(3, ge=1)
    mode: Mode = "minhash"
    recall: float = Field(0.99, gt=0, lt=1)
    link: Link = "star"

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        rows = standing(samples, ctx, self)
        text = rows.select(plain(pl.col("compared")) if self.shingle == "chars" else "compared").to_series()
        new = rows["new"].to_numpy()
        stay, twin, likeness = settle(
            text, new, self.threshold, shingle=self.shingle, size=self.size, mode=self.mode, recall=self.recall, link=self.link
        )
        ctx.report("groups", groups(rows, stay, twin))
        ctx.report("nearest_the_cut", nearest_the_cut(rows, twin, likeness, self.threshold))
        return verdicts(rows, stay, twin, likeness, "near duplicate")

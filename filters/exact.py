"""Rows that repeat another word for word are the cheapest to find, and a small teacher makes many."""

from __future__ import annotations

from typing import ClassVar, Literal

import polars as pl

from factory.stage import Context
from filters.twins import Compared, groups, plain, standing, verdicts


class Exact(Compared):
    """Rejects a row whose text, without differences that say nothing, is that of a row that stays.

    Each of the last four keys, set to false, lets such a difference count. Blank texts are nobody's twins.
    """

    key: ClassVar[str] = "exact"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "dataset"

    unicode: bool = True
    case: bool = True
    whitespace: bool = True
    punctuation: bool = True

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        text = plain(pl.col("compared"), unicode=self.unicode, case=self.case, whitespace=self.whitespace, punctuation=self.punctuation)
        rows = standing(samples, ctx, self).with_columns(text=text)
        first = pl.col("row").first().over("text").cast(pl.Int64)
        copy = (first != pl.col("row")) & (pl.col("text").str.strip_chars() != "")
        twin = rows.select(pl.when(copy).then(first).otherwise(-1)).to_series().to_numpy()
        ctx.report("groups", groups(rows, twin < 0, twin))
        return verdicts(rows, twin < 0, twin, None, "exact duplicate")

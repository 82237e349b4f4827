"""Which of two rows that say the same stays: one rule for `exact`, `near` and `semantic`, so that they never disagree.

A row is rejected when it duplicates a row that stays and stands before it: kept before new, real before made, an earlier round
before a later one, then by id (content, not the order in which answers happened to come in). It is not transitive: what
resembles only a rejected row stays.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.store import verdicts_from

Compare = Literal["input", "output", "both"]
Rows = NDArray[np.intp]


class Pairs(NamedTuple):
    """Pairs of rows and their likeness (0 to 1): three arrays of one length, `earlier` < `later`."""

    earlier: Rows
    later: Rows
    likeness: NDArray[np.float64]

    def where(self, mask: NDArray[np.bool_]) -> Pairs:
        """Those of the pairs for which `mask` is true."""
        return Pairs(self.earlier[mask], self.later[mask], self.likeness[mask])


def standing(samples: pl.DataFrame, kept: pl.DataFrame, compare: Compare) -> pl.DataFrame:
    """New and kept rows in the order in which they stand: columns id, label, compared (the text) and new.

    A kept row that is judged again counts as new: no row is its own twin.
    """
    text = {"input": pl.col("input"), "output": pl.col("output"), "both": pl.concat_str("input", "output", separator="\n")}[compare]
    before = kept.join(samples, on="id", how="anti")
    return (
        pl.concat([frame.select("id", "label", "origin", "round", text.alias("compared")) for frame in (before, samples)])
        .with_columns(new=pl.arange(pl.len()) >= before.height)
        .sort("new", pl.col("origin") != "real", "round", "id")
        .drop("origin", "round")
    )


def plain(text: pl.Expr, *, unicode: bool = True, case: bool = True, whitespace: bool = True, punctuation: bool = True) -> pl.Expr:
    """`text` without the differences that say nothing; each can be left in.

    unicode: NFKC, and one kind of apostrophe. punctuation: marks of a sentence at the edge of a word, so that "3.5", "C#" and
    "f(x)" stay what they are.
    """
    if unicode:
        text = text.str.normalize("NFKC").str.replace_all("[‘’ʼ]", "'")
    if case:
        text = text.str.to_lowercase()
    if punctuation:
        text = text.str.replace_all(r"""[.,;:!?…。、¡¿"“”„«»]+(\s|$)""", "$1").str.replace_all(r"""(^|\s)[¡¿"“„«»]+""", "$1")
    if whitespace:
        text = text.str.replace_all(r"\s+", " ").str.strip_chars()
    return text


def stays(pairs: Pairs, new: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which rows stay, given all pairs that are duplicates: a kept row always, a new one if no earlier twin of it does."""
    stay = np.ones(len(new), np.bool_)
    order = np.argsort(pairs.later, kind="stable")
    earlier = pairs.earlier[order]
    later, starts, counts = np.unique(pairs.later[order], return_index=True, return_counts=True)
    # A row loop, over rows with twins only: each one's fate hangs on the fates of those before it.
    for row, start, count in zip(later, starts, counts, strict=True):
        stay[row] = not new[row] or not stay[earlier[start : start + count]].any()
    return stay


def nearest(pairs: Pairs, stay: NDArray[np.bool_]) -> tuple[Rows, NDArray[np.float64]]:
    """For every row the earlier row that stays and is most like it (the earliest of equals), or -1; and the likeness, or NaN."""
    twin, likeness = np.full(len(stay), -1), np.full(len(stay), np.nan)
    earlier, later, like = pairs.where(stay[pairs.earlier])
    best = np.lexsort((-earlier, like, later))  # the best of each row last, so that it is the one that remains
    twin[later[best]], likeness[later[best]] = earlier[best], like[best]
    return twin, likeness


def verdicts(rows: pl.DataFrame, stay: NDArray[np.bool_], twin: Rows, likeness: NDArray[np.float64] | None, reason: str) -> pl.DataFrame:
    """Verdicts on the new ones of `rows`; `twin` is the row that a row is compared with, or -1, and stands in detail as an id."""
    ids = rows.select(pl.col("id").gather(pl.Series(twin).replace(-1, None))).to_series()
    new = rows.select(
        "id",
        "new",
        stay=pl.Series(stay),
        reason=pl.when(~pl.Series(stay)).then(pl.lit(reason)),
        score=pl.lit(None, pl.Float64) if likeness is None else pl.Series(likeness).fill_nan(None),
        detail=pl.when(ids.is_null()).then(pl.lit("{}")).otherwise(pl.concat_str(pl.lit('{"twin":"'), ids, pl.lit('"}'))),
    ).filter("new")
    return verdicts_from(new["id"], keep=new["stay"], reason=new["reason"], score=new["score"], detail=new["detail"])

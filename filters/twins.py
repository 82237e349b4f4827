"""Which of two rows that say the same stays: one rule for `exact`, `near` and `semantic`, so that they never disagree.

A row is rejected when it duplicates a row that stays and stands before it: kept before new, real before made, what ranking filters
score higher before lower, an earlier round before a later one, then by id (content, not the order in which answers happened to
come in). It is not transitive: what resembles only a rejected row stays, so a chain of small steps swallows no topic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from factory.errors import GristmillError
from factory.pairs import Rows
from factory.stage import Context, Filter, RecipeFile
from factory.store import verdicts_from

Compare = Literal["input", "output", "both", "rejected", "all"]
# Rows of files, `datasets` folders and released versions that are not to be made again.
Against = Annotated[tuple[Path, ...], BeforeValidator(lambda value: [value] if isinstance(value, str | Path) else value), RecipeFile()]

LARGE, LARGE_TIMES = 10, 5  # rows in a group that is larger than expected: so many, and so many times the mean
CLOSE = 5  # pairs on either side of the cut that are told


def text_of(compare: Compare) -> pl.Expr:
    """The text by which rows are compared. A preference's `output` is the chosen answer; `all` holds the rejected one as well."""
    rejected = pl.col("rejected").list.eval(pl.element().struct.field("content")).list.join("\n").fill_null("")
    both = pl.concat_str("input", "output", separator="\n")
    return {
        "input": pl.col("input"),
        "output": pl.col("output"),
        "both": both,
        "rejected": rejected,
        "all": pl.concat_str(both, rejected, separator="\n"),
    }[compare]


def standing(samples: pl.DataFrame, ctx: Context, stage: Compared) -> pl.DataFrame:
    """All rows in the order in which they stand: columns row, id, label, compared (the text), source and new.

    Before the new ones stand those of the files that they are compared `against` (`source` says of which), and those that
    are kept. A kept row that is judged again counts as new: no row is its own twin.
    """
    if trouble := stage.check(samples):
        raise GristmillError(trouble, where=ctx.stage)
    before = ctx.kept.join(samples, on="id", how="anti")
    outside = [ctx.read(path).with_columns(source=pl.lit(str(path))) for path in stage.against]
    frames = [*outside, *(frame.with_columns(source=pl.lit(None, pl.String)) for frame in (before, samples))]
    known = sum(frame.height for frame in frames) - samples.height
    quality = ctx.quality.select("id", "quality")
    return (
        pl.concat([frame.select("id", "label", "origin", "round", "source", text_of(stage.compare).alias("compared")) for frame in frames])
        .with_columns(new=pl.arange(pl.len()) >= known)
        .join(quality, on="id", how="left")
        .sort("new", pl.col("origin") != "real", -pl.col("quality").fill_null(0.5), "round", "id", maintain_order=True)
        .drop("origin", "round", "quality")
        .with_row_index("row")
    )


class Compared(Filter):
    """What every filter of duplicates can be told: by which text rows are compared, and with which rows besides those of the run."""

    compare: Compare = Field("input", description="the text in question; a preference's output is its chosen answer")
    against: Against = Field((), description="files, `datasets` folders and released versions whose rows are not to be made again")

    def check(self, samples: pl.DataFrame) -> str | None:
        """Of preferences, and of conversations of several turns, it must be said which text counts."""
        if "compare" in self.model_fields_set:
            return None
        turns = pl.col("messages").list.eval(pl.element().struct.field("role") == "assistant").list.sum()
        if (samples["kind"] == "preference").any():
            what, known = "preferences", "input (the prompt), output (the chosen answer), rejected, both (prompt and chosen answer) or all"
        elif samples.filter((pl.col("kind") == "chat") & (turns > 1)).height:
            what, known = "conversations of several turns", "input (all but the last answer), output (the last answer) or both"
        else:
            return None
        return f"the samples are {what}: say by which text they are compared. Set `compare:` to {known}."


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


def verdicts(rows: pl.DataFrame, stay: NDArray[np.bool_], twin: Rows, likeness: NDArray[np.float64] | None, reason: str) -> pl.DataFrame:
    """Verdicts on the new ones of `rows`; `twin` is the row that a row is compared with, or -1, and stands in detail as an id.

    Where that row is of a file, `against` names the file.
    """
    of = pl.Series(twin).replace(-1, None)
    told = rows.select(twin=pl.col("id").gather(of), against=pl.col("source").gather(of))
    detail = pl.struct("twin").struct.json_encode(), pl.struct("twin", "against").struct.json_encode()
    new = rows.select(
        "id",
        "new",
        stay=pl.Series(stay),
        reason=pl.when(~pl.Series(stay)).then(pl.lit(reason)),
        score=pl.lit(None, pl.Float64) if likeness is None else pl.Series(likeness).fill_nan(None),
        detail=told.select(
            pl.when(pl.col("twin").is_null()).then(pl.lit("{}")).when(pl.col("against").is_null()).then(detail[0]).otherwise(detail[1])
        ).to_series(),
    ).filter("new")
    return verdicts_from(new["id"], keep=new["stay"], reason=new["reason"], score=new["score"], detail=new["detail"])


def groups(rows: pl.DataFrame, stay: NDArray[np.bool_], twin: Rows) -> dict[str, Any]:
    """For the report: how many groups of duplicates there are, their mean size, and those that are larger than expected.

    A group is a row that stays and those that were rejected for it. One that is large and many times the mean may be a phrase that a
    teacher cannot leave, or a threshold that merges a topic.
    """
    firsts, counts = np.unique(twin[~stay], return_counts=True)
    sizes = counts + 1
    if not len(sizes):
        return {"count": 0}
    large = np.flatnonzero((sizes >= LARGE) & (sizes >= LARGE_TIMES * sizes.mean()))
    large = large[np.argsort(-sizes[large], kind="stable")][:CLOSE]
    told = [{"sample": rows["id"][int(firsts[i])], "rows": int(sizes[i])} for i in large]
    return {"count": len(sizes), "mean_rows": round(float(sizes.mean()), 2), "larger_than_expected": told}


def nearest_the_cut(rows: pl.DataFrame, twin: Rows, likeness: NDArray[np.float64], threshold: float) -> dict[str, Any]:
    """For the report: the pairs just above the threshold and just below it, where a look tells whether it is right."""
    seen = np.flatnonzero((twin >= 0) & rows["new"].to_numpy())
    told = {}
    for name, side in (("above", seen[likeness[seen] >= threshold]), ("below", seen[likeness[seen] < threshold])):
        close = side[np.argsort(np.abs(likeness[side] - threshold), kind="stable")][:CLOSE]
        told[name] = [
            {"sample": rows["id"][int(i)], "twin": rows["id"][int(twin[i])], "likeness": round(float(likeness[i]), 4)} for i in close
        ]
    return told

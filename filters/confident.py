"""Finds rows whose label the other rows don't believe: what a teacher wrote under a wrong label poisons a student."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from factory.diversity import hash_order
from factory.stage import Context, Filter, Vectors
from factory.store import verdicts_from

Labels = NDArray[np.intp]
Chances = NDArray[np.float64]

UNBELIEVED = "label not believed"
FOLDS = 5
CHANCE = (
    1.5  # times the chance of a blind guess: with ten labels 0.15, at which 96 in 100 of a noisy teacher's rows were right (docs/log.md)
)


class Confident(Filter):
    """Keeps a row when a probe that was trained on other rows, seeds and made ones, gives its label a fair probability.

    Confident learning (Northcutt et al. 2021): a probe is trained on four fifths of all rows, labelled as they claim, and asked about the
    last fifth, so each row is judged by rows that it did not teach. Wrong labels that are spread over others are outvoted, and a few
    hundred noisy rows say more about a label than its few seeds do. Whatever is kept is judged again in every round, by more rows: one
    that was believed may be dropped later. Where most rows of a label are wrong in the same way they are believed, so let `fits` stand
    before it when the teacher is weak.

    `at_least`: the probability that the row's label must get; "auto" is 1.5 times that of a blind guess. Score: that probability. Seeds
    are kept, as is every row without a label, and every row where the seeds have fewer than two labels.
    """

    key: ClassVar[str] = "confident"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "pool"

    at_least: Literal["auto"] | float = Field("auto", description="the probability that the other rows must give to a row's label")

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a row; `detail` names the label that the other rows would give."""
        names = ctx.seeds["label"].drop_nulls().unique().sort()
        rows = samples.with_row_index("row").filter(pl.col("label").is_in(names.implode()))
        rows = rows[hash_order(rows["id"].to_list())]
        chance, best = np.full(samples.height, np.nan), pl.Series([None] * samples.height, dtype=pl.String)
        if len(names) < 2 or rows.height < 2 * FOLDS:
            ctx.report("unjudged", f"every row: {rows.height} rows of {len(names)} labels are too few to judge each other")
        else:
            claimed = rows["label"].replace_strict(names, range(len(names)), return_dtype=pl.Int64).to_numpy().astype(np.intp)
            chances = _of_others(ctx.embed(rows["input"].to_list()), claimed, len(names))
            chance[rows["row"]] = chances[np.arange(len(claimed)), claimed]
            best = best.scatter(rows["row"], names.gather(chances.argmax(axis=1)))
        at_least = CHANCE / max(len(names), 1) if self.at_least == "auto" else self.at_least
        ctx.report("at_least", at_least)
        made = samples["origin"] == "made"
        doubted = made & pl.Series(chance < at_least)  # NaN is below nothing
        reason = pl.select(pl.when(doubted).then(pl.lit(UNBELIEVED))).to_series()
        detail = pl.DataFrame({"believed": best}).select(pl.struct("believed").struct.json_encode()).to_series()
        score = pl.Series(chance).fill_nan(None)
        return verdicts_from(samples["id"], keep=~doubted, reason=reason, score=score, detail=detail)


def _of_others(vectors: Vectors, claimed: Labels, labels: int) -> Chances:
    """The probability of each label for each row, by probes that were not trained on it; rows are in the order of a hash."""
    from sklearn.linear_model import LogisticRegression

    fold = np.arange(len(claimed)) % FOLDS
    chances = np.zeros((len(claimed), labels))
    for part in range(FOLDS):
        judged = fold == part
        taught = ~judged
        if len(np.unique(claimed[taught])) < 2:
            continue
        # C as the trainer's probe has it: few rows of many dimensions want little regularisation.
        probe = LogisticRegression(C=10, max_iter=2000).fit(vectors[taught], claimed[taught])
        chances[np.ix_(judged, probe.classes_)] = probe.predict_proba(vectors[judged])
    return chances

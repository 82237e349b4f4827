"""Rows that say the same in other words: the last and finest net, by the cosine of their vectors.

Cosine alone would merge what must stay apart ("I lost my card", "I found my card"; 5 pounds, 50 pounds), so only rows of one label and
of the same numbers are compared.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from factory.stage import Context, Filter, Vectors
from filters.twins import Compare, Pairs, Rows, plain, standing, stays, verdicts

BLOCK = 1024  # rows compared at a time
COLUMNS = 8192  # ... with so many others: memory is a block of both, never n x n

FALLBACK = 0.95
FEWEST_SEEDS = 10
MOST_SEEDS = 2000
CLIP = (0.85, 0.98)


class Semantic(Filter):
    """Rejects a row whose vector has a cosine of at least `threshold` to that of a row that stays.

    `threshold: auto` takes it from the seeds: see `calibrate`. `same_label`: only rows of the same label are compared. `numbers`:
    rows whose digits differ are not. `score` is the highest cosine to a row that stands earlier and stays. Exact, not approximate.
    """

    key: ClassVar[str] = "semantic"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "dataset"

    threshold: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = FALLBACK
    compare: Compare = "input"
    same_label: bool = True
    numbers: bool = True

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        threshold = self._threshold(ctx)
        rows = standing(samples, ctx.kept, self.compare).with_row_index("row")
        vectors = ctx.embed(rows["compared"].to_list())
        alike = [pl.col("label")] if self.same_label else []
        if self.numbers:
            alike.append(pl.col("compared").str.extract_all(r"\d+").list.join(" ").alias("numbers"))
        groups = rows.group_by(alike or [pl.lit(0)], maintain_order=True).agg("row", "new")
        stay, twin, likeness = np.ones(len(rows), np.bool_), np.full(len(rows), -1), np.full(len(rows), np.nan)
        done = 0
        for members, new in groups.select("row", "new").iter_rows():  # a loop over groups, each compared as matrices
            if len(members) > 1 and any(new):
                places = np.array(members)
                stay[places], within, likeness[places] = settle(vectors[places], np.array(new), threshold)
                twin[places] = np.where(within < 0, -1, places[within])
            done += len(members)
            ctx.progress(done, len(rows))
        return verdicts(rows, stay, twin, likeness, "semantic duplicate")

    def _threshold(self, ctx: Context) -> float:
        if self.threshold != "auto":
            return self.threshold
        seeds = (
            standing(ctx.seeds, ctx.seeds, self.compare)
            .unique(plain(pl.col("compared")), keep="first", maintain_order=True)
            .head(MOST_SEEDS)
        )
        threshold, evidence = calibrate(ctx.embed(seeds["compared"].to_list()), seeds["label"])
        ctx.report("threshold", {"chosen": threshold, **evidence})
        return threshold


def settle(vectors: Vectors, new: NDArray[np.bool_], threshold: float) -> tuple[NDArray[np.bool_], Rows, NDArray[np.float64]]:
    """Which of `vectors` (unit, in standing order, kept ones first) stay; the nearest earlier one that stays, or -1; its cosine, or NaN.

    The rule of `filters.twins`, block by block: what stays of the earlier blocks decides first, then the block within itself.
    """
    stay, twin, likeness = np.ones(len(vectors), np.bool_), np.full(len(vectors), -1), np.full(len(vectors), np.nan)
    kept = len(new) - int(new.sum())
    pool, held = vectors.copy(), kept  # pool[:held]: the vectors that stay so far
    places = np.arange(len(vectors))  # places[:held]: their rows
    for start in range(kept, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        nearest, best = _nearest(block, pool[:held])
        inside = np.tril(block @ block.T, -1)
        open_ = best < threshold
        later, earlier = np.nonzero((inside >= threshold) & open_[:, None] & open_[None, :])
        stay_here = open_ & stays(Pairs(earlier, later, inside[later, earlier]), np.ones(len(block), np.bool_))
        inside[:, ~stay_here] = -np.inf
        inside[np.triu_indices(len(block))] = -np.inf
        column = inside.argmax(axis=1)
        cosine = inside[np.arange(len(block)), column]
        rows = slice(start, start + len(block))
        stay[rows] = stay_here
        twin[rows] = np.where(cosine > best, start + column, places[nearest])
        likeness[rows] = np.minimum(np.maximum(cosine, best), 1.0)
        alone = np.isneginf(likeness[rows])
        twin[rows][alone], likeness[rows][alone] = -1, np.nan
        staying = int(stay_here.sum())
        pool[held : held + staying] = block[stay_here]
        places[held : held + staying] = start + np.flatnonzero(stay_here)
        held += staying
    return stay, twin, likeness


def calibrate(vectors: Vectors, labels: pl.Series) -> tuple[float, dict[str, Any]]:
    """A threshold from real rows that are known to be distinct, and the cosines that it rests on.

    It lies above what unrelated rows reach (0.999 quantile over pairs of different labels; over all pairs where there is no second
    label) and above what most real rows reach to their nearest (0.95 quantile), within 0.85 to 0.98. Under 10 seeds say
    nothing: 0.95.
    """
    if len(vectors) < FEWEST_SEEDS:
        return FALLBACK, {"seeds": len(vectors)}
    cosines = vectors @ vectors.T
    code = labels.rank("dense").fill_null(0).to_numpy()
    above = np.triu(np.ones(cosines.shape, np.bool_), 1)
    different = above & (code[:, None] != code[None, :])
    unrelated = np.quantile(cosines[different if different.any() else above], [0.5, 0.99, 0.999])
    np.fill_diagonal(cosines, -1)
    closest = np.quantile(cosines.max(axis=1), [0.5, 0.95, 1])
    threshold = float(np.clip(max(unrelated[2], closest[1]), *CLIP))
    return round(threshold, 4), {
        "seeds": len(vectors),
        "unrelated": dict(zip(("q50", "q99", "q999"), unrelated.round(4).tolist(), strict=True)),
        "closest": dict(zip(("q50", "q95", "max"), closest.round(4).tolist(), strict=True)),
    }


def _nearest(block: Vectors, pool: Vectors) -> tuple[Rows, NDArray[np.float32]]:
    """For each row of `block` the first of its nearest in `pool` and the cosine; 0 and -inf where the pool is empty."""
    nearest, best = np.zeros(len(block), np.intp), np.full(len(block), -np.inf, np.float32)
    for start in range(0, len(pool), COLUMNS):
        cosines = block @ pool[start : start + COLUMNS].T
        column = cosines.argmax(axis=1)
        cosine = cosines[np.arange(len(block)), column]
        better = cosine > best
        nearest[better], best[better] = start + column[better], cosine[better]
    return nearest, best

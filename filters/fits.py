"""Whether a made row carries the label that it claims: what a weak teacher gets wrong most, and what the seeds' vectors can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from factory.stage import Context, Filter, Vectors
from factory.store import verdicts_from

Opinion = Literal["nearest", "centroid", "probe"]
Numbers = NDArray[np.intp]  # labels by their place in the sorted list of the seeds' labels
Strengths = NDArray[np.float64]

OTHER = "other label nearest"
UNSURE = "label uncertain"
UNKNOWN = "unknown label"


class Fits(Filter):
    """Keeps a row when every opinion in `by` gives it the label that it claims; the seeds are what the opinions stand on.

    "nearest": the seed of the highest cosine is of the claimed label. "centroid": the mean of the claimed label's seeds is
    the nearest mean. "probe": a multinomial logistic regression trained on the seeds finds the claimed label the likeliest,
    with a probability of `at_least`. `margin` is by how much cosine the claimed label must be nearer than any other
    ("nearest" and "centroid"; below zero it forgives).

    Score: the probe's probability of the claimed label; without a probe the smallest cosine margin. A row that claims no
    label is kept, and so is every row where the seeds have fewer than two labels; a label that no seed carries is not.
    """

    key: ClassVar[str] = "fits"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"

    by: tuple[Opinion, ...] = Field(("probe",), min_length=1, description="opinions that must all agree")
    at_least: float = Field(0.3, ge=0, le=1, description="probability that the probe must give to the claimed label")
    margin: float = Field(0.0, ge=-2, le=2, description="cosine by which the claimed label must be nearer than any other")

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a row; `detail` names the nearest seed and its label, and the label that each opinion would give."""
        seeds = ctx.seeds.filter(pl.col("label").is_not_null())
        names = seeds["label"].unique().sort()
        if len(names) < 2:
            ctx.report("unjudged", f"every row: the seeds carry {len(names)} different labels, and it takes two to tell apart")
            return verdicts_from(samples["id"], keep=pl.repeat(True, len(samples), dtype=pl.Boolean, eager=True))
        if unlabelled := samples["label"].null_count():
            ctx.report("unjudged", f"{unlabelled} rows of this batch: they claim no label")

        anchors, of_anchor = ctx.embed(seeds["input"].to_list()), _numbers(seeds["label"], names)
        vectors, claimed = ctx.embed(samples["input"].to_list()), _numbers(samples["label"], names)
        evidence = {opinion: _EVIDENCE[opinion](vectors, anchors, of_anchor) for opinion in self.by}
        margins = np.stack([_margin(evidence[opinion], claimed) for opinion in self.by])
        needed = np.array([[0.0 if opinion == "probe" else self.margin] for opinion in self.by])
        if "probe" in evidence:
            score = evidence["probe"][np.arange(len(claimed)), claimed]
            sure = score >= self.at_least
        else:
            score, sure = margins.min(axis=0), np.ones(len(claimed), bool)

        nearest = (vectors @ anchors.T).argmax(axis=1)
        found = {"nearest": seeds["id"].gather(nearest), "nearest_label": seeds["label"].gather(nearest)}
        found |= {f"{opinion}_label": names.gather(strength.argmax(axis=1)) for opinion, strength in evidence.items()}
        rows = samples.select("id", "label").with_columns(
            pl.Series("liked", (margins >= needed).all(axis=0)), pl.Series("sure", sure), pl.Series("score", score, dtype=pl.Float64)
        )
        known, claims = pl.col("label").is_in(names.implode()), pl.col("label").is_not_null()
        judged = rows.select(
            "id",
            reason=pl.when(claims & ~known)
            .then(pl.lit(UNKNOWN))
            .when(claims & ~pl.col("liked"))
            .then(pl.lit(OTHER))
            .when(claims & ~pl.col("sure"))
            .then(pl.lit(UNSURE)),
            score=pl.when(known).then("score"),
        )
        detail = pl.DataFrame(found).select(pl.struct(pl.all()).struct.json_encode()).to_series()
        return verdicts_from(judged["id"], keep=judged["reason"].is_null(), reason=judged["reason"], score=judged["score"], detail=detail)


def _numbers(labels: pl.Series, names: pl.Series) -> Numbers:
    """The place of each label in `names`; 0 for one that is not there, whose verdict does not look at it."""
    places = labels.replace_strict(names, range(len(names)), default=0, return_dtype=pl.Int64)
    return places.to_numpy().astype(np.intp)


# What each opinion holds for each label, shape (rows, labels): the higher, the likelier. Vectors are unit vectors.


def _nearest(vectors: Vectors, anchors: Vectors, of_anchor: Numbers) -> Strengths:
    cosines = vectors @ anchors.T
    return np.stack([cosines[:, of_anchor == label].max(axis=1) for label in range(of_anchor.max() + 1)], axis=1).astype(np.float64)


def _centroid(vectors: Vectors, anchors: Vectors, of_anchor: Numbers) -> Strengths:
    means = np.stack([anchors[of_anchor == label].mean(axis=0) for label in range(of_anchor.max() + 1)]).astype(np.float64)
    cosines: Strengths = vectors @ (means / np.linalg.norm(means, axis=1, keepdims=True).clip(1e-9)).T
    return cosines


def _probe(vectors: Vectors, anchors: Vectors, of_anchor: Numbers) -> Strengths:
    from sklearn.linear_model import LogisticRegression

    if not len(vectors):
        return np.empty((0, of_anchor.max() + 1))
    # C as the trainer's probe has it: few rows of many dimensions want little regularisation.
    strengths: Strengths = LogisticRegression(C=10, max_iter=2000).fit(anchors, of_anchor).predict_proba(vectors)
    return strengths


_EVIDENCE: dict[Opinion, Callable[[Vectors, Vectors, Numbers], Strengths]] = {"nearest": _nearest, "centroid": _centroid, "probe": _probe}


def _margin(strengths: Strengths, claimed: Numbers) -> Strengths:
    """By how much the claimed label is stronger than the strongest other one; below zero where another is."""
    row = np.arange(len(claimed))
    others = strengths.copy()
    others[row, claimed] = -np.inf
    margin: Strengths = strengths[row, claimed] - others.max(axis=1)
    return margin

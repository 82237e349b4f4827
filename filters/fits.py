"""Whether a made row carries the label that it claims: what a weak teacher gets wrong most, and what the seeds' vectors can tell."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from factory.errors import GristmillError
from factory.recipe import did_you_mean
from factory.stage import Context, Filter, Vectors
from factory.store import verdicts_from

Opinion = Literal["nearest", "centroid", "probe"]
Numbers = NDArray[np.intp]  # labels by their place in the sorted list of the seeds' labels
Strengths = NDArray[np.float64]

OTHER = "other label nearest"
UNSURE = "label uncertain"
UNKNOWN = "unknown label"
FAR = "off topic"

FOLDS = 5


class Fits(Filter):
    """Keeps a row when every opinion in `by` gives it the label that it claims.

    The opinions stand on the seeds and, for labels that `labels` describes, on their name and description: "nearest" is the
    label of the highest cosine among them, "centroid" that of the nearest mean, "probe" the likeliest by a multinomial
    logistic regression trained on them. `margin` is by how much cosine the claimed label must be ahead of any other
    ("nearest" and "centroid"; below zero it forgives). `at_least` is the probability that the probe must give it; "auto" asks
    what the median seed gets when it is left out itself, so that it suits any number of labels, and reports it. `closeness`
    asks for more than being nearest: of a text about something else, some label is the nearest too.

    Score: the probe's probability of the claimed label; without a probe the smallest cosine margin. A row that claims no
    label is kept, and so is every row where the seeds have fewer than two labels; a label that no seed carries is not.
    """

    key: ClassVar[str] = "fits"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"
    ranks: ClassVar[bool] = True

    by: tuple[Opinion, ...] = Field(("nearest", "centroid", "probe"), min_length=1, description="opinions that must all agree")
    at_least: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field("auto", description="the probe's probability for the claim")
    margin: float = Field(0.02, ge=-2, le=2, description="cosine by which the claimed label must be ahead of any other")
    closeness: float = Field(0.0, ge=-1, le=1, description="cosine that the nearest seed or description of the label must reach")
    labels: dict[str, str] = Field(default_factory=dict, description="what labels mean, in some words: label and description")

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a row; `detail` names the nearest seed, and the label that each opinion would give.

        GristmillError where `labels` describes a label that no seed carries.
        """
        seeds = ctx.seeds.filter(pl.col("label").is_not_null())
        names = seeds["label"].unique().sort()
        if len(names) < 2:
            ctx.report("unjudged", f"every row: the seeds carry {len(names)} different labels, and it takes two to tell apart")
            return verdicts_from(samples["id"], keep=pl.repeat(True, len(samples), dtype=pl.Boolean, eager=True))
        if unlabelled := samples["label"].null_count():
            ctx.report("unjudged", f"{unlabelled} rows of this batch: they claim no label")
        anchors, of_anchor = self._anchors(seeds, names, ctx)
        vectors, claimed = ctx.embed(samples["input"].to_list()), _numbers(samples["label"], names)
        evidence = {opinion: _EVIDENCE[opinion](vectors, anchors, of_anchor) for opinion in self.by}
        margins = np.stack([_margin(evidence[opinion], claimed) for opinion in self.by])
        needed = np.array([[0.0 if opinion == "probe" else self.margin] for opinion in self.by])
        if "probe" in evidence:
            at_least = _usual_chance(anchors, of_anchor, len(seeds)) if self.at_least == "auto" else self.at_least
            ctx.report("at_least", at_least)
            score = evidence["probe"][np.arange(len(claimed)), claimed]
            sure = score >= at_least
        else:
            score, sure = margins.min(axis=0), np.ones(len(claimed), bool)

        nearest = (vectors @ anchors[: len(seeds)].T).argmax(axis=1)
        closeness = _nearest(vectors, anchors, of_anchor)[np.arange(len(claimed)), claimed]
        found: dict[str, pl.Series] = {"closeness": pl.Series(closeness.round(3), dtype=pl.Float64)}
        found |= {"nearest": seeds["id"].gather(nearest), "nearest_label": seeds["label"].gather(nearest)}
        found |= {f"{opinion}_label": names.gather(strength.argmax(axis=1)) for opinion, strength in evidence.items()}
        rows = samples.select("id", "label").with_columns(
            pl.Series("close", closeness >= self.closeness),
            pl.Series("liked", (margins >= needed).all(axis=0)),
            pl.Series("sure", sure),
            pl.Series("score", score, dtype=pl.Float64),
        )
        known, claims = pl.col("label").is_in(names.implode()), pl.col("label").is_not_null()
        judged = rows.select(
            "id",
            reason=pl.when(claims & ~known)
            .then(pl.lit(UNKNOWN))
            .when(claims & ~pl.col("close"))
            .then(pl.lit(FAR))
            .when(claims & ~pl.col("liked"))
            .then(pl.lit(OTHER))
            .when(claims & ~pl.col("sure"))
            .then(pl.lit(UNSURE)),
            score=pl.when(known).then("score"),
        )
        detail = pl.DataFrame(found).select(pl.struct(pl.all()).struct.json_encode()).to_series()
        return verdicts_from(judged["id"], keep=judged["reason"].is_null(), reason=judged["reason"], score=judged["score"], detail=detail)

    def _anchors(self, seeds: pl.DataFrame, names: pl.Series, ctx: Context) -> tuple[Vectors, Numbers]:
        """What the opinions stand on, and the label of each: the seeds first, then the name and description of each described label."""
        known = names.to_list()
        if strangers := [label for label in self.labels if label not in known]:
            raise GristmillError(
                f"labels: describes {strangers[0]!r}, and no seed has that label{did_you_mean(strangers[0], known)}",
                where=f"stage {ctx.stage}",
                next="Mend the label in the recipe, or add seeds that carry it.",
            )
        described = pl.Series("label", list(self.labels), dtype=pl.String)
        words = [re.sub(r"[_\W]+", " ", label) for label in self.labels]
        vectors = ctx.embed([*seeds["input"], *words, *self.labels.values()])
        return vectors, _numbers(pl.concat([seeds["label"], described, described]), names)


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


def _usual_chance(anchors: Vectors, of_anchor: Numbers, seeds: int) -> float:
    """The median probability that a probe gives to the label of a seed that it was not trained on; the seeds are the first anchors.

    Seeds are left out a fold at a time, each label's spread over the folds; a label's only anchor stays. 0 where all must stay.
    """
    turn = pl.Series(of_anchor[:seeds]).to_frame("label").select(pl.int_range(pl.len()).over("label"))
    fold = np.full(len(of_anchor), -1)
    fold[:seeds] = np.where(np.bincount(of_anchor)[of_anchor[:seeds]] > 1, turn.to_series().to_numpy() % FOLDS, -1)
    chances = [
        _probe(anchors[out], anchors[~out], of_anchor[~out])[np.arange(out.sum()), of_anchor[out]]
        for out in (fold == part for part in range(fold.max() + 1))
    ]
    return float(np.median(np.concatenate(chances))) if chances else 0.0


_EVIDENCE: dict[Opinion, Callable[[Vectors, Vectors, Numbers], Strengths]] = {"nearest": _nearest, "centroid": _centroid, "probe": _probe}


def _margin(strengths: Strengths, claimed: Numbers) -> Strengths:
    """By how much the claimed label is stronger than the strongest other one; below zero where another is."""
    row = np.arange(len(claimed))
    others = strengths.copy()
    others[row, claimed] = -np.inf
    margin: Strengths = strengths[row, claimed] - others.max(axis=1)
    return margin

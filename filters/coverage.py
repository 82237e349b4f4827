"""What the kept rows are about: their clusters, named, so that the report can show them and the next round can aim at the thin ones."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from factory.stage import Context, Filter, Vectors
from factory.store import verdicts_from

Labels = NDArray[np.intp]

NOISE = "unclustered"
SHOWN = 5  # central and edge samples that the report lists for each cluster
TERMS = 3  # keywords in a name
WORD = r"\p{L}[\p{L}\p{N}]+"
# What scikit-learn's list of stop words lacks: forms of "do", what the pattern leaves of "don't" and "I've", and roles of a conversation.
SCRAPS = ("do", "does", "did", "don", "didn", "doesn", "isn", "wasn", "won", "aren", "hasn", "haven", "couldn", "wouldn", "ve", "ll")
ROLES = ("system", "user", "assistant", "tool")


class Coverage(Filter):
    """Gives every row its cluster and rejects none; `detail` holds `cluster` (-1: none; 0 is the largest) and `name`.

    From `umap_from` rows on: UMAP (McInnes et al. 2018), then HDBSCAN (Campello et al. 2013); `umap` and `hdbscan` go to the
    two as they are, over our defaults. Below, where density has too little to stand on: Ward's hierarchy (1963) of the
    vectors, cut at the square root of the number of rows, in which every row has a cluster; UMAP is not even imported.

    Score: the cosine to the cluster's centroid; none outside all clusters. Names are the cluster's keywords by class-based
    TF-IDF (Grootendorst 2022) without English stop words.

    Reports `method`, and `clusters`: each with its name, size, real and made rows, the ids of its most central samples and
    of those at its edge, and whether it is thin: below half of an equal share.
    """

    key: ClassVar[str] = "coverage"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "pool"

    umap_from: int = Field(200, ge=16, description="with fewer rows, Ward's method stands in for UMAP and HDBSCAN")
    umap: dict[str, Any] = Field(default_factory=dict, description="passed to umap.UMAP over our defaults")
    hdbscan: dict[str, Any] = Field(default_factory=dict, description="passed to hdbscan.HDBSCAN over our defaults")

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a row, all of them keep."""
        vectors = ctx.embed(samples["input"].to_list())
        if len(samples) < self.umap_from:
            ctx.report("method", f"Ward's method: {len(samples)} rows are fewer than {self.umap_from}, too few for UMAP and HDBSCAN")
            labels = ward(vectors)
        else:
            ctx.report("method", "UMAP, then HDBSCAN")
            labels = self._by_density(vectors, ctx.rng.randrange(2**31))
        labels = _largest_first(labels)
        names = keywords(samples["input"], labels)
        rows = samples.select("id", "origin").with_columns(
            cluster=pl.Series(labels, dtype=pl.Int64), score=pl.Series(centrality(vectors, labels), dtype=pl.Float64).fill_nan(None)
        )
        rows = rows.join(names, on="cluster", how="left", maintain_order="left").with_columns(pl.col("name").fill_null(NOISE))
        ctx.report("clusters", _summary(rows))
        detail = rows.select(pl.struct("cluster", "name").struct.json_encode()).to_series()
        return verdicts_from(rows["id"], keep=pl.repeat(True, len(rows), dtype=pl.Boolean, eager=True), score=rows["score"], detail=detail)

    def _by_density(self, vectors: Vectors, seed: int) -> Labels:
        n = len(vectors)
        # min_dist 0 packs dense places, which is what HDBSCAN wants. One job: with a seed UMAP is deterministic only so.
        places = {"n_components": 5, "n_neighbors": 15, "min_dist": 0.0, "metric": "cosine", "random_state": seed, "n_jobs": 1}
        # One sample: more smoothing merged half of the banking messages into one cluster, and called more of them noise.
        density = {"min_cluster_size": max(5, round(n**0.5 / 2)), "min_samples": 1}
        with warnings.catch_warnings():
            # Told to users of UMAP, not of a dataset: a graph in several pieces, a spectral start that fell back to a random one.
            warnings.simplefilter("ignore")
            import hdbscan

            layout = _umap()(**places | self.umap).fit_transform(vectors)
            labels: Labels = hdbscan.HDBSCAN(**density | self.hdbscan).fit_predict(layout).astype(np.intp)
        return labels


def ward(vectors: Vectors) -> Labels:
    """Clusters of a few rows: Ward's hierarchy of unit vectors cut at round(sqrt(n)) clusters, none of them noise."""
    n = len(vectors)
    if n < 3:
        return np.zeros(n, np.intp)
    from sklearn.cluster import AgglomerativeClustering

    labels: Labels = AgglomerativeClustering(n_clusters=round(n**0.5), linkage="ward").fit_predict(vectors).astype(np.intp)
    return labels


def centrality(vectors: Vectors, labels: Labels) -> NDArray[np.float64]:
    """The cosine of each unit vector to the centroid of its cluster; NaN where it has none (-1)."""
    if not len(labels):
        return np.empty(0)
    sums = np.zeros((labels.max() + 2, vectors.shape[1]))  # the last one gathers what is in no cluster
    np.add.at(sums, labels, vectors)
    centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-9)
    return np.where(labels < 0, np.nan, np.einsum("ij,ij->i", vectors, centroids[labels]))


def keywords(texts: pl.Series, labels: Labels, terms: int = TERMS) -> pl.DataFrame:
    """A `name` for each `cluster`: its first words by class-based TF-IDF, a cluster being one class (Grootendorst 2022, eq. 2)."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    idle = [*ENGLISH_STOP_WORDS, *SCRAPS, *ROLES]
    words = pl.DataFrame({"cluster": pl.Series(labels, dtype=pl.Int64), "word": texts.str.to_lowercase().str.extract_all(WORD)})
    clusters = words.filter(pl.col("cluster") >= 0).select("cluster").unique().sort("cluster")
    words = words.explode("word", empty_as_null=False, keep_nulls=False).filter((pl.col("cluster") >= 0) & ~pl.col("word").is_in(idle))
    counts = words.group_by("cluster", "word").agg(pl.len().alias("here"))
    everywhere, mean_words = pl.col("here").sum().over("word"), len(words) / max(1, len(clusters))
    weight = pl.col("here") * (1 + mean_words / everywhere).log()
    named = (
        counts.with_columns(weight=weight)
        .sort(["cluster", "weight", "word"], descending=[False, True, False])
        .group_by("cluster", maintain_order=True)
        .agg(pl.col("word").head(terms))
        .select("cluster", name=pl.col("word").list.join(", "))
    )
    return clusters.join(named, on="cluster", how="left", maintain_order="left").with_columns(
        pl.col("name").fill_null(pl.format("cluster {}", pl.col("cluster")))
    )


def _largest_first(labels: Labels) -> Labels:
    """The same clusters, numbered by size; ties by their first row. Noise stays -1."""
    if not (labels >= 0).any():
        return labels
    found, first, place, size = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    size = np.where(found < 0, -1, size)  # last
    rank = np.empty(len(found), np.intp)
    rank[np.lexsort((first, -size))] = np.arange(len(found))
    return np.where(labels < 0, -1, rank[place])


def _summary(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """The clusters as the report wants them, largest first, rows without a cluster last."""
    inside = rows.filter(pl.col("cluster") >= 0)
    share = len(inside) / max(1, inside["cluster"].n_unique())
    central = pl.col("id").sort_by("score", "id", descending=[True, False])
    summary = rows.group_by("cluster", "name").agg(
        size=pl.len(),
        seeds=(pl.col("origin") == "real").sum(),
        made=(pl.col("origin") == "made").sum(),
        central=central.head(SHOWN),
        edge=central.reverse().head(SHOWN),
        thin=(pl.col("cluster").first() >= 0) & (pl.len() < share / 2),
    )
    return summary.sort(pl.col("cluster") < 0, "cluster").to_dicts()


def _umap() -> Any:
    """umap.UMAP, its kernels cached on disk: umap-learn compiles them anew in every process, 7 s; read back they take 0.3 s."""
    import umap

    for kernel in vars(umap.umap_).values():
        if hasattr(kernel, "enable_caching"):
            with contextlib.suppress(RuntimeError):  # no folder to write a cache to: it works, slowly
                kernel.enable_caching()
    return umap.UMAP

"""How varied a set of texts is, in a few figures: what the report shows, and what a manifest lets two versions be compared by."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import polars as pl

from factory.stage import Vectors

QUERIES = 5_000  # at most so many rows look for their nearest neighbour: 100,000 against all would take a minute
BLOCK = 1_024
LEVEL = 9  # of zlib; ratios of two codecs or levels can't be compared

WORD = r"[\p{L}\p{N}]+(?:['’][\p{L}]+)*"


def diversity(texts: Sequence[str], vectors: Vectors) -> dict[str, float]:
    """The figures of a set of texts and their unit vectors (one a text).

    distinct_1, distinct_2     share of words (pairs of neighbouring words) that are different ones: 0 to 1, higher is more varied
    compression_ratio          bytes before by bytes after: 1 and up, lower is more varied
    mean_cosine                over all pairs of texts: lower is more varied
    mean_nearest_distance      1 - cosine to the nearest other text: 0 means that every text has its double
    vendi                      how many wholly different texts would be as varied: 1 to the number of texts

    A figure that so few texts do not have (no word, no pair) is left out.
    """
    figures = {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "compression_ratio": compression_ratio(texts),
        "mean_cosine": mean_cosine(vectors),
        "mean_nearest_distance": mean_nearest_distance(vectors),
        "vendi": vendi(vectors),
    }
    return {name: value for name, value in figures.items() if value is not None}


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words by all of them, case aside; none reaches over the end of a text (Li et al. 2016, distinct-n)."""
    words = pl.DataFrame({"words": pl.Series(texts, dtype=pl.String).str.to_lowercase().str.extract_all(WORD)}).with_row_index("text")
    words = words.explode("words", empty_as_null=False, keep_nulls=False)
    grams = words.select(*(pl.col("words").shift(-i).over("text").alias(str(i)) for i in range(n))).drop_nulls()
    return grams.n_unique() / len(grams) if len(grams) else None


def compression_ratio(texts: Sequence[str]) -> float | None:
    """Size by compressed size of all texts, a line each, by zlib (Shaib et al. 2024); it sees repetition within 32 KB."""
    data = "\n".join(texts).encode("utf-8", "surrogatepass")
    return len(data) / len(zlib.compress(data, LEVEL)) if data else None


def mean_cosine(vectors: Vectors) -> float | None:
    """The mean cosine of all pairs of different rows, from the length of their sum: no pair is formed."""
    n = len(vectors)
    if n < 2:
        return None
    wide = vectors.astype(np.float64)
    total = wide.sum(axis=0)
    return float((total @ total - np.einsum("ij,ij->", wide, wide)) / (n * (n - 1)))


def mean_nearest_distance(vectors: Vectors) -> float | None:
    """The mean of 1 - cosine to the nearest other row, over all rows (over 5,000 evenly spaced ones where there are more)."""
    n = len(vectors)
    if n < 2:
        return None
    rows = np.unique(np.linspace(0, n - 1, min(n, QUERIES)).astype(np.intp))
    nearest = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        cosines = vectors[block] @ vectors.T
        cosines[np.arange(len(block)), block] = -np.inf
        nearest[start : start + BLOCK] = cosines.max(axis=1)
    return float(1 - nearest.clip(-1, 1).mean())


def vendi(vectors: Vectors) -> float | None:
    """The exponential of the entropy of the cosine kernel's eigenvalues (Friedman & Dieng 2023, Vendi score).

    The n x n kernel and the d x d Gram matrix have the same eigenvalues above zero; the smaller of the two is taken apart.
    """
    n, d = vectors.shape
    if not n:
        return None
    wide = vectors.astype(np.float64)
    gram = wide.T @ wide if d < n else wide @ wide.T
    shares = np.linalg.eigvalsh(gram / n)
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))

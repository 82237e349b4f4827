"""How varied a set of texts is, in figures by which versions, teachers and rounds can be compared: reports and manifests hold them."""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.table import Table

from factory import ngrams
from factory.errors import GristmillError
from factory.rows import read_samples
from factory.stage import Vectors
from factory.words import flat, words

DRAWN = 100  # n-grams, for the distinct figures that don't depend on how much text there is: 20 rows of 8 words have so many 4-grams
LEVEL = 9  # of zlib; ratios of two codecs or levels can't be compared
QUERIES = 5_000  # at most so many rows are held against all: every one of 100,000 would take three minutes
REFERENCE = 5_000  # at most so many rows of a reference are looked at
CELLS = 64  # of k-means, or a quarter of the rows that they are fitted on
FITTED = 10_000  # at most so many rows are the cells fitted on
NEIGHBOURS = 5  # k of coverage and density, as in their paper
DENSITY_NEIGHBOURS, DENSITY_POWER = 10, 0.5  # K and beta of NovelSum, as in its paper; its alpha is 1
SAME = 1e-6  # up to this distance two vectors are one, in float32
BLOCK = 2**24  # distances that are held at once: 64 MB

FIGURES: Mapping[str, tuple[str, str]] = {  # what a figure is called, and what it says
    "distinct_1": ("Distinct words", "share of words that are different ones; higher is more varied"),
    "distinct_2": ("Distinct pairs", "the same of two words in a row"),
    "distinct_3": ("Distinct triples", "the same of three"),
    "distinct_4": ("Distinct fours", "the same of four"),
    "distinct_1_in_100": ("Distinct words in 100", "different ones among 100 words drawn from all; higher is more varied"),
    "distinct_2_in_100": ("Distinct pairs in 100", "the same of two words in a row"),
    "distinct_3_in_100": ("Distinct triples in 100", "the same of three"),
    "distinct_4_in_100": ("Distinct fours in 100", "the same of four"),
    "compression_ratio": ("Compression", "size by compressed size; lower is more varied"),
    "self_repetition": ("Self-repetition", "fours that stand in other texts too, on a log scale; lower is more varied"),
    "self_bleu": ("Self-BLEU", "how much of a text stands in the others; lower is more varied"),
    "mean_cosine": ("Mean cosine", "over all pairs of texts; lower is more varied"),
    "mean_nearest_distance": ("Distance to the nearest", "1 − cosine to the nearest other text; 0 means that every text has its double"),
    "vendi": ("Vendi score", "how many wholly different texts would be as varied"),
    "novelsum": ("NovelSum", "distance to all other texts, near ones weighing most; higher is more varied"),
    "cluster_entropy": ("Evenness", "how evenly texts spread over regions of meaning; 1 at most"),
    "reference_coverage": ("Reference covered", "share of reference texts that have a text in their neighbourhood"),
    "reference_density": ("Density", "texts in these neighbourhoods; 1: as dense as the reference"),
    "reference_novelsum": ("NovelSum by the reference", "NovelSum; texts where the reference is dense weigh more"),
}


def diversity(texts: Sequence[str], vectors: Vectors | None = None, reference: Vectors | None = None) -> dict[str, float]:
    """The figures of a set of texts, of their unit vectors (one a text), and of what they are to a reference's (the seeds').

    name                       range        more varied   what it is
    distinct_1 to distinct_4   0 to 1       higher        share of n-grams of words that are different ones
    distinct_1_in_100 to 4     0 to 1       higher        the same, expected among 100 n-grams drawn from all
    compression_ratio          1 and up     lower         bytes before by bytes after
    self_repetition            0 and up     lower         mean log of how often a text's 4-grams stand in other texts
    self_bleu                  0 to 1       lower         mean BLEU-4 of a text with all others as references
    mean_cosine                -1 to 1      lower         over all pairs of texts
    mean_nearest_distance      0 to 2       higher        1 - cosine to the nearest other text
    vendi                      1 to n       higher        how many wholly different texts would be as varied
    novelsum                   0 to 2       higher        mean distance to all other texts, weighted by 1 / rank
    cluster_entropy            0 to 1       higher        evenness over the cells of k-means, fitted on the reference if there is one
    reference_coverage         0 to 1       higher        share of reference rows whose neighbourhood holds a row
    reference_density          0 and up     -             in how many such neighbourhoods a row lies, by 5
    reference_novelsum         0 and up     higher        novelsum, each row weighted by the density of the reference around it

    Only distinct_*_in_100 do not change with the number of texts; compare the others over equal numbers. The result does not
    depend on the order of the texts: they are put in that of a hash first. A figure that so few texts do not have is left out,
    as are those of meaning where there are no vectors, and those of the reference where there is none.
    """
    order = hash_order(texts)
    figures = _of_words([texts[row] for row in order])
    if vectors is not None:
        figures |= _of_meaning(vectors[order], reference if reference is not None and len(reference) else None)
    return {name: value for name in FIGURES if (value := figures.get(name)) is not None}


def hash_order(texts: Sequence[str]) -> NDArray[np.intp]:
    """The places of `texts` in the order of a hash of theirs: a shuffle that is the same everywhere, and in which copies lie together."""
    hashes = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return np.argsort(np.frombuffer(hashes, np.uint64), kind="stable")


def of_files(
    files: Sequence[Path],
    *,
    compare: Literal["input", "output", "both"] = "both",
    reference: Path | None = None,
    embed: Callable[[Sequence[str]], Vectors] | None = None,
    equal: bool = False,
) -> dict[str, dict[str, float]]:
    """The figures of anybody's files, by path, and how many `rows` they are of; `equal`: all cut to the smallest, by the order of a hash.

    `embed` gives a unit vector a text; without it, what needs vectors is left out. GristmillError where a file can't be read, or
    no row of it has the text that is asked for.
    """
    texts = {str(path): _texts(path, compare) for path in files}
    against = embed(_texts(reference, compare)) if reference and embed else None
    if equal:
        few = min(map(len, texts.values()))
        texts = {path: [rows[row] for row in hash_order(rows)[:few]] for path, rows in texts.items()}
    return {path: {"rows": len(rows), **diversity(rows, embed(rows) if embed else None, against)} for path, rows in texts.items()}


def _texts(path: Path, compare: Literal["input", "output", "both"]) -> list[str]:
    text = pl.concat_str("input", "output", separator="\n") if compare == "both" else pl.col(compare)
    found = read_samples(path).select(text.str.strip_chars().alias("text")).to_series()
    if not (texts := found.filter(found != "").to_list()):
        raise GristmillError(f"no row in it has an {compare}", where=str(path), next="Compare by another text: input, output or both.")
    return texts


def table(named: Mapping[str, Mapping[str, float]]) -> Table:
    """Sets of figures side by side for a terminal, a column each; a dash stands for what a set does not have."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("figure")
    for name in named:
        shown.add_column(name, justify="right", overflow="fold")
    shown.add_column("what it says", style="dim")
    if any("rows" in figures for figures in named.values()):
        shown.add_row("rows", *(f"{figures['rows']:,.0f}" if "rows" in figures else "–" for figures in named.values()), "")
    for figure, (_, says) in FIGURES.items():
        if any(figure in figures for figures in named.values()):
            shown.add_row(figure, *(f"{figures[figure]:.4g}" if figure in figures else "–" for figures in named.values()), says)
    return shown


# -- of words --------------------------------------------------------------------------------------------------------------


def _of_words(texts: Sequence[str]) -> dict[str, float | None]:
    found = words(flat(texts))
    counted = [ngrams.grams(*found, n) for n in (1, 2, 3, 4)]
    return {
        **{f"distinct_{n}": ngrams.distinct(grams) for n, grams in enumerate(counted, 1)},
        **{f"distinct_{n}_in_{DRAWN}": ngrams.distinct_in(grams, DRAWN) for n, grams in enumerate(counted, 1)},
        "compression_ratio": compression_ratio(texts),
        "self_repetition": ngrams.self_repetition(counted[3]),
        "self_bleu": ngrams.self_bleu(counted),
    }


def compression_ratio(texts: Sequence[str]) -> float | None:
    """Size by compressed size of all texts, a line each (Shaib et al. 2024, "Standardizing the Measurement of Text Diversity").

    By zlib at level 9, which is the paper's gzip. It sees repetition within 32 KB alone, about 200 rows: what it says depends on
    the order of the texts, and hardly on their number. `diversity` hands them over in the order of a hash, so that copies meet.
    """
    data = "\n".join(texts).encode("utf-8", "surrogatepass")
    return len(data) / len(zlib.compress(data, LEVEL)) if data else None


# -- of meaning ------------------------------------------------------------------------------------------------------------


def _of_meaning(vectors: Vectors, reference: Vectors | None) -> dict[str, float | None]:
    figures = {
        "mean_cosine": mean_cosine(vectors),
        "vendi": vendi(vectors),
        "cluster_entropy": cluster_entropy(vectors, reference),
        **of_distances(vectors, reference),
    }
    if reference is not None:
        figures["reference_density"], figures["reference_coverage"] = density_and_coverage(vectors, reference)
    return figures


def mean_cosine(vectors: Vectors) -> float | None:
    """The mean cosine of all pairs of different rows, from the length of their sum: no pair is formed."""
    n = len(vectors)
    if n < 2:
        return None
    wide = vectors.astype(np.float64)
    total = wide.sum(axis=0)
    return float((total @ total - np.einsum("ij,ij->", wide, wide)) / (n * (n - 1)))


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


def of_distances(vectors: Vectors, reference: Vectors | None = None) -> dict[str, float]:
    """What each row's distances (1 - cosine) to all others say, in the mean over rows: `mean_nearest_distance` and NovelSum.

    NovelSum (Yang et al. 2025, "Measuring Data Diversity for Instruction Tuning") is the mean novelty of a row: its weighted mean
    distance to all rows, the weight being 1 / rank, nearest first (alpha = 1); rank 1 is the row itself at distance 0, as in the
    paper's experiments and the authors' code. `novelsum` leaves out density, as the authors advise where there is no reference:
    by its own density a set gains by holding copies. `reference_novelsum` multiplies a row's novelty by the density of the
    reference around it: the mean squared distance to its 10 nearest different vectors there, itself apart, to the power of -0.5
    (K = 10, beta = 0.5); it is left out where the reference has no 11 different vectors.

    Over all rows, or over 5,000 evenly spaced ones, each against all: NovelSum is then within 2% of its mean over all.
    """
    n = len(vectors)
    if n < 2:
        return {}
    rows = _spread(n, QUERIES)
    weights = 1 / np.arange(1, n + 1)
    weights = (weights / weights.sum()).astype(np.float32)[1:]
    nearest, novelty = np.empty(len(rows)), np.empty(len(rows))
    for part, distances in _to_others(rows, vectors):
        distances.sort(axis=1)
        nearest[part], novelty[part] = distances[:, 0], distances[:, :-1] @ weights  # the last is its own, put out of the way
    figures = {"mean_nearest_distance": float(nearest.mean()), "novelsum": float(novelty.mean())}
    if reference is not None:
        different = np.unique(reference[_spread(len(reference), REFERENCE)], axis=0)
        if len(different) > DENSITY_NEIGHBOURS:
            figures["reference_novelsum"] = float((novelty * _density(vectors[rows], different)).mean())
    return figures


def cluster_entropy(vectors: Vectors, reference: Vectors | None = None) -> float | None:
    """The entropy of how rows spread over the cells of k-means (Lloyd 1982), by that of an even spread.

    64 cells, or a quarter of the rows that they are fitted on: those of the reference if there is one, so that sets can be compared.
    None where that makes less than two. Of more than 10,000 rows so many, evenly spaced, are fitted on.
    """
    fitted = vectors if reference is None else reference
    fitted = fitted[_spread(len(fitted), FITTED)]
    cells = min(CELLS, len(fitted) // 4)
    if cells < 2 or not len(vectors):
        return None
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1), warnings.catch_warnings():  # threads would add up in any order, and the sums differ in the last bit
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different vectors than cells: some stay empty
        centres = KMeans(cells, n_init=1, random_state=0).fit(fitted).cluster_centers_.astype(np.float32)
    inside = (vectors @ centres.T - (centres**2).sum(axis=1) / 2).argmax(axis=1)
    shares = np.bincount(inside) / len(vectors)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum() / np.log(cells))


def density_and_coverage(vectors: Vectors, reference: Vectors) -> tuple[float, float] | tuple[None, None]:
    """Whether rows lie where a reference does (Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics", k = 5).

    Every reference row has a neighbourhood: nearer than its 5th nearest other. Coverage: the share of neighbourhoods that hold
    a row. Density: the mean number of neighbourhoods that a row lies in, by 5. None where the reference has no 6 rows. Of more than
    5,000 reference rows so many, evenly spaced, are looked at.
    """
    reference = reference[_spread(len(reference), REFERENCE)]
    if len(reference) <= NEIGHBOURS or not len(vectors):
        return None, None
    all_rows = np.arange(len(reference))
    kth = [np.partition(distances, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1] for _, distances in _to_others(all_rows, reference)]
    radii = np.concatenate(kth)[:, None]
    covered = inside = 0
    for part, distances in _distances(reference, vectors):
        near = distances < radii[part]
        covered += int(near.any(axis=1).sum())
        inside += int(near.sum())
    return inside / (NEIGHBOURS * len(vectors)), covered / len(reference)


def _density(queries: Vectors, different: Vectors) -> NDArray[np.float64]:
    """The density of unit vectors, all different, around each query; one that is the query itself does not count."""
    density = np.empty(len(queries))
    for part, distances in _distances(queries, different):
        nearest = np.sort(np.partition(distances, DENSITY_NEIGHBOURS, axis=1)[:, : DENSITY_NEIGHBOURS + 1], axis=1)
        nearest = np.where(nearest[:, :1] < SAME, nearest[:, 1:], nearest[:, :-1])
        density[part] = (2 * nearest.mean(axis=1) + 1e-9) ** -DENSITY_POWER  # of unit vectors 2 (1 - cosine) is the distance squared
    return density


def _spread(n: int, most: int) -> NDArray[np.intp]:
    """At most so many places of n, evenly spaced."""
    return np.unique(np.linspace(0, max(n - 1, 0), min(n, most)).astype(np.intp))


def _to_others(rows: NDArray[np.intp], vectors: Vectors) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """As `_distances` of these rows to all, each infinitely far from itself."""
    for part, distances in _distances(vectors[rows], vectors):
        distances[np.arange(len(distances)), rows[part]] = np.inf
        yield part, distances


def _distances(queries: Vectors, vectors: Vectors) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """1 - cosine of all queries to all vectors, in blocks: which queries, and their distances, a row each."""
    step = max(1, BLOCK // max(1, len(vectors)))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        distances: NDArray[np.float32] = np.maximum(1 - queries[part] @ vectors.T, 0)
        yield part, distances

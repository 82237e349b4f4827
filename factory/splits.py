"""Which row goes to which split, so that nothing in one has a near-duplicate in another, now or in a later version."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.cosine import components
from factory.stage import Vectors
from schemas.canonical import content_hash

NEAR = 0.9  # cosine from which two rows may not be in different splits; all-MiniLM-L6-v2 gives it to plain rewordings
MARGIN = 1e-3  # grouping reaches a little further than the check, which multiplies in other blocks and rounds otherwise
MISSED = 1e-6  # of the pairs at the threshold, where too many rows are grouped to compare all
BLOCK, ACROSS = 1024, 8192

Indices = NDArray[np.int64]


def normalised(text: str) -> str:
    """The words of a text alone: NFKC, case folded, one space between words (a text without words: as it is)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def near_groups(texts: Sequence[str], vectors: Vectors, threshold: float = NEAR) -> Indices:
    """The group of near-duplicates that each text is in, as the index of the group's first text, shape (n,).

    Two texts are near where their vectors' cosine reaches `threshold` or their normalised words are the same; a group is a
    connected component of that. Up to about 20,000 texts all pairs are compared. With more, a pair just at the threshold is missed once
    in a million times, a closer one less often, and then only parts a group if nothing else holds it together: a leak that this leaves
    is found by the check of the written files, which compares all, and stops the release.
    """
    words = pl.DataFrame({"words": pl.Series(map(normalised, texts), dtype=pl.String)}).with_row_index("row")
    first = words.select(pl.col("row").min().over("words")).to_series().to_numpy().astype(np.int64)
    near = components(vectors, threshold - MARGIN, recall=1 - MISSED)
    rows = np.arange(len(texts))
    return _components(len(texts), np.concatenate([rows, rows]), np.concatenate([first, near]))


def nearest(a: Vectors, b: Vectors) -> tuple[float, int, int] | None:
    """The highest cosine between a row of `a` and a row of `b`, and these two rows; None where one side is empty."""
    best: tuple[float, int, int] | None = None
    for start, across in product(range(0, len(a), BLOCK), range(0, len(b), ACROSS)):
        cosines = a[start : start + BLOCK] @ b[across : across + ACROSS].T
        i, j = divmod(int(cosines.argmax()), cosines.shape[1])
        if best is None or cosines[i, j] > best[0]:
            best = float(cosines[i, j]), start + i, across + j
    return best


def assign(rows: pl.DataFrame, shares: Mapping[str, float]) -> pl.Series:
    """The split of every row.

    `rows` has `id`, `group`, `label`, `weight` (0: a row that only holds its group in place) and `pin`: the split that the
    row must have, or null. A group goes whole: to test if one of its rows must, else to train if one must, else to
    validation. The free ones are dealt out label by label, in the order of a hash of their smallest id, each to the first
    of test and validation that it brings nearer to its share, or else to train; what a label's groups are too coarse to
    give is owed by the next label.
    """
    label = pl.col("label").fill_null("").sort().mode(maintain_order=True).first()  # the commonest; of equals the first by name
    pins = [pl.when((pl.col("pin") == split).any()).then(pl.lit(split)) for split in ("test", "train", "validation")]
    groups = rows.group_by("group").agg(label, pl.col("id").min(), pl.col("weight").sum().alias("size"), pl.coalesce(pins).alias("pin"))
    split_of: dict[int, str] = {}
    owed = dict.fromkeys(("test", "validation"), 0.0)
    for (_,), of_label in sorted(groups.group_by("label"), key=lambda item: str(item[0][0])):
        for split in owed:
            pinned = int(of_label.filter(pl.col("pin") == split)["size"].sum())
            share = shares[split] * int(of_label["size"].sum())
            owed[split] += max(0.0, share - pinned)  # pins beyond a label's share are no other label's debt
        free = of_label.select("group", "id", "size", "pin").rows()
        for group, _, size, pinned_to in sorted(free, key=lambda row: content_hash("p1", row[1])):  # each choice depends on the last
            split = pinned_to or next((name for name, debt in owed.items() if 0 < size < 2 * debt), "train")
            split_of[group] = split
            if pinned_to is None and split in owed:
                owed[split] -= size
    return rows["group"].replace_strict(split_of, return_dtype=pl.String).alias("split")


def _components(n: int, left: Indices, right: Indices) -> Indices:
    """The smallest node that each of `n` nodes is connected with: minima travel along the edges, twice as far a turn."""
    lowest = np.arange(n)
    while True:
        lower = lowest.copy()
        np.minimum.at(lower, left, lowest[right])
        np.minimum.at(lower, right, lowest[left])
        lower = lower[lower]
        if np.array_equal(lower, lowest):
            return lowest
        lowest = lower

"""Rows that differ by a typo, a word or a comma teach nothing new: found by MinHash, confirmed by their true Jaccard likeness.

MinHash: Broder, "On the resemblance and containment of documents", 1997. Its bands: Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from factory.stage import Context, Filter
from filters.twins import Compare, Pairs, Rows, nearest, plain, standing, stays, verdicts

Unit = Literal["chars", "words"]
Hashes = NDArray[np.uint64]

MARGIN = 0.1  # how far below the threshold a row that stays still has its score, for who moves the threshold
PERMUTATIONS = 128  # at most: longer bands make fewer candidates, but to verify a candidate is cheap
AT_ONCE = 2_000_000  # candidate pairs, or their shingles, held in memory at a time
_SEED = 20


class Near(Filter):
    """Rejects a row whose shingles overlap with those of a row that stays: Jaccard of at least `threshold`.

    A shingle is `size` letters (`shingle: chars`) or words in a row. Three letters serve short texts, where a single typo
    spoils a large share of longer ones: in the bank example's questions of fifty letters nine typos in ten stay above 0.8, and no
    two distinct questions reach 0.7. For documents take words and 5. `recall` is the chance to find a pair that is just at the threshold; a
    more similar one is found more surely, and what is found is never below it. `score` is the likeness to the nearest
    row that stays, null where that is over 0.1 below the threshold.
    """

    key: ClassVar[str] = "near"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "dataset"

    threshold: float = Field(0.8, ge=0.2, le=1)
    compare: Compare = "input"
    shingle: Unit = "chars"
    size: int = Field(3, ge=1)
    recall: float = Field(0.99, gt=0, lt=1)

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        rows = standing(samples, ctx.kept, self.compare).with_columns(text=plain(pl.col("compared"))).with_row_index("row")
        # Equal texts share their fate, so only the first of each is compared: many copies would make their square of pairs.
        firsts = rows.unique("text", keep="first", maintain_order=True)
        text_of = rows.join(firsts.select("text", of=pl.int_range(pl.len())), on="text", maintain_order="left")["of"].to_numpy()
        first_row = firsts["row"].to_numpy().astype(np.intp)
        found = pairs(firsts["text"], self.threshold - MARGIN, shingle=self.shingle, size=self.size, recall=self.recall)
        stay = stays(found.where(found.likeness >= self.threshold), firsts["new"].to_numpy())
        twin, likeness = nearest(found, stay)
        twin = np.where(twin < 0, -1, first_row[twin])

        copy = (first_row[text_of] != rows["row"].to_numpy()) & (rows["text"] != "").to_numpy()
        of_stayer = copy & stay[text_of]
        return verdicts(
            rows,
            ~copy & stay[text_of],
            np.where(of_stayer, first_row[text_of], twin[text_of]),
            np.where(of_stayer, 1.0, likeness[text_of]),
            "near duplicate",
        )


def pairs(texts: pl.Series, threshold: float, *, shingle: Unit = "chars", size: int = 3, recall: float = 0.99) -> Pairs:
    """All pairs of `texts` whose sets of shingles have a Jaccard likeness of at least `threshold`, with that likeness.

    None is below; one at the threshold is missed with a probability of at most 1 - `recall`. 64-bit hashes stand for the
    shingles. A text shorter than a shingle is one shingle; an empty one has none and no twin. Sorted by (later, earlier).
    """
    owner, hashes = _shingles(texts, shingle, size)
    full, starts, sizes = np.unique(owner, return_index=True, return_counts=True)
    vocabulary, words = np.unique(hashes, return_inverse=True)
    members = np.repeat(np.arange(len(full)), sizes) * len(vocabulary) + words  # ascending: by text, and within it
    found = [Pairs(np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0))]
    for left, right in _candidates(_signatures(hashes, starts, *bands(threshold, recall))):
        fewer = np.where(sizes[left] <= sizes[right], left, right)
        possible = sizes[fewer] >= threshold * np.maximum(sizes[left], sizes[right])
        left, right, fewer = left[possible], right[possible], fewer[possible]
        for part in _slices(sizes[fewer], AT_ONCE):
            one, other, few = left[part], right[part], fewer[part]
            asked = np.repeat(starts[few], sizes[few]) + _ramps(sizes[few])
            sought = np.repeat(one + other - few, sizes[few]) * len(vocabulary) + words[asked]
            there = members[np.minimum(np.searchsorted(members, sought), len(members) - 1)] == sought
            shared = np.add.reduceat(there.astype(np.int64), np.cumsum(sizes[few]) - sizes[few])
            jaccard = shared / (sizes[one] + sizes[other] - shared)
            alike = jaccard >= threshold
            found.append(Pairs(full[one[alike]], full[other[alike]], jaccard[alike]))
    earlier, later, likeness = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((earlier, later))
    return Pairs(earlier[order], later[order], likeness[order])


def bands(threshold: float, recall: float) -> tuple[int, int]:
    """(bands, rows a band): the longest bands, hence the fewest candidates, that find a pair at `threshold` with probability `recall`."""
    best = (1, 1)
    for rows in range(1, PERMUTATIONS + 1):
        agree = threshold**rows
        needed = 1 if agree >= recall else math.ceil(math.log1p(-recall) / math.log1p(-agree))
        if needed * rows <= PERMUTATIONS or rows == 1:
            best = (needed, rows)
    return best


def _shingles(texts: pl.Series, shingle: Unit, size: int) -> tuple[Rows, Hashes]:
    """The distinct shingles of all texts as (row of the text, hash), sorted by both."""
    if shingle == "chars":
        units = np.frombuffer("".join(texts.to_list()).encode("utf-32-le"), "<u4").astype(np.uint64)
        lengths = texts.str.len_chars().to_numpy().astype(np.intp)
    else:
        words = texts.str.extract_all(r"\S+")
        units = words.explode(empty_as_null=False).hash(_SEED).to_numpy()
        lengths = words.list.len().to_numpy().astype(np.intp)
    owner, offset = np.repeat(np.arange(len(texts)), lengths), _ramps(lengths)
    begins = np.flatnonzero(offset <= np.maximum(lengths - size, 0)[owner])
    ends = np.cumsum(lengths)[owner[begins]]
    hashes = np.zeros(len(begins), np.uint64)
    for step in range(size):
        at = begins + step
        hashes = _mix(hashes ^ np.where(at < ends, units[np.minimum(at, len(units) - 1)], np.uint64(2**63)))
    distinct = pl.DataFrame({"owner": owner[begins], "hash": hashes}).unique().sort("owner", "hash")
    return distinct["owner"].to_numpy(), distinct["hash"].to_numpy()


def _signatures(hashes: Hashes, starts: Rows, count: int, rows: int) -> Hashes:
    """One key a band and text, shape (count, texts): texts with the same minima in a band have the same key there."""
    rng = np.random.default_rng(_SEED)
    factors = rng.integers(0, 2**63, (count, rows), np.uint64) * np.uint64(2) + np.uint64(1)
    keys = np.zeros((count, len(starts)), np.uint64)
    for band in range(count if len(starts) else 0):
        for factor in factors[band]:
            keys[band] = _mix(keys[band] ^ np.minimum.reduceat(_mix(hashes * factor), starts))
    return keys


def _candidates(keys: Hashes) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of texts that share the key of a band, each pair once, the earlier text first."""
    for band, row in enumerate(keys):
        order = np.argsort(row, kind="stable")
        ordered = row[order]
        last = np.searchsorted(ordered, ordered, side="right") - 1  # of the run of equal keys that a place is in
        partners = last - np.arange(len(order))
        for part in _slices(partners, AT_ONCE):
            place = np.repeat(np.arange(part.start, part.stop), partners[part])
            left, right = order[place], order[place + 1 + _ramps(partners[part])]
            fresh = ~(keys[:band, left] == keys[:band, right]).any(axis=0)
            yield left[fresh], right[fresh]


def _slices(weights: Rows, limit: int) -> Iterator[slice]:
    """Cut `weights` into slices of a sum of at most `limit`, or of one element; those that weigh nothing may be left out."""
    total = np.cumsum(weights)
    start = 0
    while start < len(weights) and (done := total[start] - weights[start]) < total[-1]:
        stop = max(int(np.searchsorted(total, done + limit, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


def _ramps(counts: Rows) -> Rows:
    """0, 1, ... up to each count in turn: (2, 3) gives 0 1 0 1 2."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _mix(values: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the input reaches every bit of the output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

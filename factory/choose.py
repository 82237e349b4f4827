"""Chooses which of the rows that every filter kept a dataset takes: good ones that stand for the others, in numbers that are given."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from factory.diversity import hash_order
from factory.stage import Vectors

Numbers = NDArray[np.floating[Any]]
Rows = NDArray[np.intp]
Cells = Sequence[tuple[Rows, int]]  # row numbers, and how many of them are wanted

QUALITY = 0.5  # weight of mean quality: less takes more rows of a wrong label, more represents the pool less well (docs/log.md)
GRID = 2**16  # cosines are whole numbers of this part: sums are exact in any order, and lazy bounds never too low by a rounding
PAIRS = 2**25  # about so many likenesses are kept, 8 bytes each
SAMPLED = 256  # rows by which a floor is found that keeps to PAIRS
BLOCK = 2**23  # cosines that are computed at once: 32 MB


def select(cells: Cells, quality: Numbers, vectors: Vectors, held: Vectors) -> Rows:
    """The rows chosen, in the order in which they were: of each cell exactly as many as are wanted, or all that there are.

    `quality` (n,), 0 to 1; `vectors` (n, d), unit vectors of the whole pool; `held` (m, d), those of rows that the dataset has
    anyway, none in any shape. A row number stands in one cell at most; a row of no cell is not chosen, but wants to be represented.
    ValueError where a row stands in two cells.

    What is made large is how well the pool is represented, plus half of the mean quality of what is chosen. A row is represented by
    the greatest cosine, zero at least, to a row that is held or chosen: facility location (Lin & Bilmes 2011, "A Class of Submodular
    Functions for Document Summarization"). So a copy adds its quality alone, and an outlier stands for itself alone. The function is
    monotone and submodular: taking the row that adds most, of any cell that is not full, reaches at least half of the best choice
    (Fisher, Nemhauser & Wolsey 1978), 1 - 1/e of it where there is one cell. Rows are looked at lazily (Minoux 1978), which
    changes nothing in the result. Cells that are taken whole come first, since the others had better know of them. Ties go to the
    lower row number; otherwise the order of rows and cells decides nothing.

    All pairs are compared: 20,000 rows take 15 s on two cores, and twice as many four times as long. Beyond 5,792 different vectors
    the pairs that could count may be more than 2**25; then cosines up to a floor, found from 256 rows, count as the floor, and about
    so many are kept (300 MB). With near copies by the thousand, which a filter of duplicates would have taken out, it can be more.
    """
    owner = np.full(len(vectors), -1, np.intp)
    for cell, (rows, _) in enumerate(cells):
        if (owner[rows] >= 0).any() or len(np.unique(rows)) < len(rows):
            raise ValueError("a row stands in two cells, or twice in one")
        owner[rows] = cell
    left = [max(0, min(wanted, len(rows))) for rows, wanted in cells]
    if not sum(left):
        return np.empty(0, np.intp)
    # In an order of their own, so that products are the same to the last bit whatever the order of the rows; copies become one.
    different, which, many = np.unique(vectors, axis=0, return_inverse=True, return_counts=True)
    which = which.reshape(-1)  # some versions of numpy give it two dimensions
    best, near = _near(different, np.unique(held, axis=0) if len(held) else held)
    bonus = np.rint(QUALITY * len(vectors) / sum(left) * quality * GRID).astype(np.int64)

    def gain(row: int) -> int:
        others, likeness = near[which[row]]
        return int(np.maximum(likeness - best[others], 0).astype(np.int64) @ many[others]) + int(bonus[row])

    whole = [left[cell] == len(rows) for cell, (rows, _) in enumerate(cells)]
    chosen: list[int] = []
    for first in (True, False):
        among = [int(row) for cell, (rows, _) in enumerate(cells) if whole[cell] is first and left[cell] for row in rows]
        bounds = [(-gain(row), row) for row in among]
        heapq.heapify(bounds)
        while bounds:
            row = bounds[0][1]
            if not left[owner[row]]:
                heapq.heappop(bounds)
                continue
            now = (-gain(row), row)
            heapq.heapreplace(bounds, now)
            if bounds[0] is not now:  # it adds less than it did, and another may add more
                continue
            heapq.heappop(bounds)
            chosen.append(row)
            left[owner[row]] -= 1
            others, likeness = near[which[row]]
            best[others] = np.maximum(best[others], likeness)
    return np.array(chosen, np.intp)


def at_random(cells: Cells, ids: Sequence[str], seed: int = 0) -> Rows:
    """As many rows of each cell as `select` takes, in the order of a hash of seed and id: what a choice has to beat.

    The same ids give the same rows, whatever order they are in.
    """
    place = np.empty(len(ids), np.intp)
    place[hash_order([f"{seed} {name}" for name in ids])] = np.arange(len(ids))
    taken = [rows[np.argsort(place[rows], kind="stable")][: max(wanted, 0)] for rows, wanted in cells]
    chosen = np.concatenate([np.empty(0, np.intp), *taken]).astype(np.intp)
    return chosen[np.argsort(place[chosen], kind="stable")]


def represented(chosen: Rows, vectors: Vectors, held: Vectors) -> NDArray[np.float64]:
    """How well the pool is represented, 0 to 1, by what is held and the first 0, 1, … all of the chosen rows: shape (k + 1,).

    The mean over the pool of the greatest cosine, zero at least, to one of them; 0 for an empty pool. All pairs, without a floor.
    """
    n, k = len(vectors), len(chosen)
    total = np.zeros(k + 1)
    start = _likeness_to(held, vectors)
    step = max(1, BLOCK // (k + 1))
    for at in range(0, n, step):
        part = slice(at, at + step)
        likeness = np.column_stack([start[part], vectors[part] @ vectors[chosen].T])
        np.maximum.accumulate(likeness, axis=1, out=likeness)
        total += likeness.sum(axis=0, dtype=np.float64)
    return total / max(n, 1)


def worth(representation: NDArray[np.float64], quality: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a choice makes large, of how well the pool is represented and of the mean quality of what is chosen."""
    return representation + QUALITY * quality


def value(chosen: Rows, quality: Numbers, vectors: Vectors, held: Vectors) -> NDArray[np.float64]:
    """What `select` makes large, of the first 0, 1, … all of the chosen rows: shape (k + 1,), each at least the one before.

    `represented`, plus half of the quality of the rows so far by how many are chosen in all. The last is the worth of the choice,
    which can be compared with that of as many other rows; the last less that of 100 rows before is what the last hundred added.
    """
    so_far = np.concatenate([[0.0], np.cumsum(quality[chosen], dtype=np.float64)])
    return worth(represented(chosen, vectors, held), so_far / max(len(chosen), 1))


def _near(vectors: Vectors, held: Vectors) -> tuple[NDArray[np.int32], list[tuple[NDArray[np.int32], NDArray[np.int32]]]]:
    """How well each row is represented from the start, on the GRID; and the rows that each would represent better, and how well."""
    n = len(vectors)
    start = np.rint(_likeness_to(held, vectors) * GRID).astype(np.int32)
    start = np.maximum(start, _floor(vectors, start))
    near: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
    step = max(1, BLOCK // n)
    for at in range(0, n, step):
        likeness = np.rint(vectors[at : at + step] @ vectors.T * GRID).astype(np.int32)
        of, others = np.nonzero(likeness > start)
        ends = np.searchsorted(of, np.arange(1, len(likeness)))
        near += zip(np.split(others.astype(np.int32), ends), np.split(likeness[of, others], ends), strict=True)
    return start, near


def _floor(vectors: Vectors, start: NDArray[np.int32]) -> int:
    """The likeness above which there are about PAIRS pairs that could count; 0 where there are no more."""
    n = len(vectors)
    if n * n <= PAIRS:
        return 0
    rows = np.unique(np.linspace(0, n - 1, min(n, SAMPLED)).astype(np.intp))
    likeness = np.rint(vectors[rows] @ vectors.T * GRID).astype(np.int32)
    counting = likeness[likeness > start]
    few = int(PAIRS / n * len(rows))
    return 0 if len(counting) <= few else int(np.partition(counting, len(counting) - few)[len(counting) - few])


def _likeness_to(held: Vectors, vectors: Vectors) -> NDArray[np.float32]:
    """The greatest cosine of each row to a held one, zero at least."""
    greatest = np.zeros(len(vectors), np.float32)
    step = max(1, BLOCK // max(1, len(held)))
    for at in range(0, len(vectors) if len(held) else 0, step):
        greatest[at : at + step] = (vectors[at : at + step] @ held.T).max(axis=1, initial=0)
    return greatest

"""Pairs of rows that are alike, and which of the two stays: what `jaccard` and `cosine` find, and every filter of duplicates decides by."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]
Link = Literal["star", "complete"]


class Pairs(NamedTuple):
    """Pairs of rows and their likeness (0 to 1): three arrays of one length, `earlier` < `later`."""

    earlier: Rows
    later: Rows
    likeness: NDArray[np.float64]

    def where(self, mask: NDArray[np.bool_]) -> Pairs:
        """Those of the pairs for which `mask` is true."""
        return Pairs(self.earlier[mask], self.later[mask], self.likeness[mask])


def stays(pairs: Pairs, new: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which rows stay, given all pairs that are duplicates: a kept row always, a new one if no earlier twin of it does."""
    stay = np.ones(len(new), np.bool_)
    order = np.argsort(pairs.later, kind="stable")
    earlier = pairs.earlier[order]
    later, starts, counts = np.unique(pairs.later[order], return_index=True, return_counts=True)
    # A row loop, over rows with twins only: each one's fate hangs on the fates of those before it.
    for row, start, count in zip(later, starts, counts, strict=True):
        stay[row] = not new[row] or not stay[earlier[start : start + count]].any()
    return stay


def nearest(pairs: Pairs, stay: NDArray[np.bool_]) -> tuple[Rows, NDArray[np.float64]]:
    """For every row the earlier row that stays and is most like it (the earliest of equals), or -1; and the likeness, or NaN."""
    twin, likeness = np.full(len(stay), -1), np.full(len(stay), np.nan)
    earlier, later, like = pairs.where(stay[pairs.earlier])
    best = np.lexsort((-earlier, like, later))  # the best of each row last, so that it is the one that remains
    twin[later[best]], likeness[later[best]] = earlier[best], like[best]
    return twin, likeness


def complete(pairs: Pairs, new: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Rows, NDArray[np.float64]]:
    """Which rows stay, their twins and likenesses, where a row is only rejected if it is alike to a whole group: (stay, twin, likeness).

    `pairs` are all duplicates. A group is a row that stays and those that were rejected for it; of several groups the row joins
    that whose first row is most like it (the earliest of equals). A row that is no `new` one begins a group.
    """
    stay, twin, likeness = np.ones(len(new), np.bool_), np.full(len(new), -1), np.full(len(new), np.nan)
    sizes: dict[int, int] = {}  # of the groups that more than their first row are in
    order = np.lexsort((pairs.earlier, pairs.later))
    later, starts = np.unique(pairs.later[order], return_index=True)
    # A row loop, over rows with twins only, as in `stays`.
    for row, at in zip(later.tolist(), np.split(order, starts[1:])[: len(later)], strict=True):
        if not new[row]:
            continue
        alike = dict(zip(pairs.earlier[at].tolist(), pairs.likeness[at].tolist(), strict=True))
        met: dict[int, int] = {}
        for other in alike:
            first = int(twin[other]) if not stay[other] else other
            met[first] = met.get(first, 0) + 1
        whole = [first for first, count in met.items() if first in alike and count == sizes.get(first, 1)]
        if whole:
            best = max(whole, key=lambda first: (alike[first], -first))
            stay[row], twin[row], likeness[row] = False, best, alike[best]
            sizes[best] = sizes.get(best, 1) + 1
    return stay, twin, likeness


def with_copies(
    first: Rows, new: NDArray[np.bool_], fates: tuple[NDArray[np.bool_], Rows, NDArray[np.float64]]
) -> tuple[NDArray[np.bool_], Rows, NDArray[np.float64]]:
    """The fates of all rows, from those of the first of each kind: (stay, twin, likeness), each of shape (n,).

    `first` is the first row that is the same as each row; `fates` are those of the first ones, in their order. A copy goes for its
    first row, or for whatever that goes for; what is not `new` stays.
    """
    stay, twin, likeness = fates
    firsts = np.flatnonzero(first == np.arange(len(first)))
    at = np.searchsorted(firsts, first)
    copy = first != np.arange(len(first))
    of_stayer = copy & stay[at]
    twins = np.where(of_stayer, first, np.where(twin[at] < 0, -1, firsts[twin[at]]))
    return (~copy & stay[at]) | ~new, twins, np.where(of_stayer, 1.0, likeness[at])

"""Vectors that point the same way: pairs by their cosine, every one of them verified, and which row of such a pair stays.

exact: every pair is compared, a block of a matrix product at a time. Where only pairs are asked for, a bound comes first: the product
    of the leading principal components and that of the lengths of the rest (Cauchy and Schwarz), less than half the work.
fast: signed random projections (Charikar, "Similarity estimation techniques from rounding algorithms", 2002). Two vectors at an
    angle a lie on the same side of a random plane with a probability of 1 - a / pi. Rows that lie on the same side of all planes of
    one of several tables meet; those that also agree in most of the planes of all tables are compared. So nothing that is found is
    below the threshold; a pair at the threshold is missed with a probability of at most 1 - `recall`, a closer one less often.
    The planes are rows of a product of Hadamard matrices and random signs, which costs a third of a product with random planes
    (Andoni et al., "Practical and optimal LSH for angular distance", 2015).

Vectors are float32, shape (n, d), of length 1, or zero: those stand for blank texts and are nobody's twins. Nothing is ever n by n.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from factory.kernels import kernel
from factory.pairs import Link, Pairs, Rows, complete, nearest, stays, with_copies

Vectors = NDArray[np.float32]
Likeness = NDArray[np.float64]
Mode = Literal["auto", "exact", "fast"]

RECALL = 0.999
ROWS, COLUMNS = 1024, 4096  # of a block of cosines
AUTO_PAIRS = 200_000_000  # `auto` is exact up to so many pairs: those of 20,000 rows, three seconds of one core
AUTO_NEW = 1000  # ... or up to so many new rows: each costs a hundredth of a second where a million are kept
BELOW = 0.02  # how far below the threshold `fast` still tells the likeness of a row, if it happens to meet one

SKETCH = 256  # sides by which pairs that meet are sifted, and twice as many by which they are sifted again
LANES = 8  # rows that are projected at once, one beside the other
SIZE = 512  # of a Hadamard matrix for 384 dimensions
SMALLEST = 64  # dimensions that a projection has at least, for its planes to be random enough
FIRST_CHUNK = 1024
WORKERS = min(os.cpu_count() or 1, 4)  # each has shelves of its own, 80 bytes a row
MOST_WORDS = 64
SAMPLE = 400  # rows whose cosines say how often unrelated ones will meet
# Nanoseconds on one core, for the choice of bits: a side of a row, a row in a table, two rows that meet, that meet again though
# they are alike, that are compared; and a number of a product of matrices.
SIDE_NS, LOOK_NS, MEET_NS, AGAIN_NS, COMPARE_NS, PRODUCT_NS = 3.2, 40.0, 2.0, 20.0, 250.0, 0.03
LEADING = 6  # a d-th part of so many components is computed first, where it rules out enough
SLACK = 1e-6  # float32 rounds: a threshold of 1 means as good as equal, and a bound has to stay one
_SEED = 20


class Tables(NamedTuple):
    """How rows meet: those that agree in all `bits` sides of one of the `tables`.

    They are compared if they differ in at most so many of the first sides of all (of `SKETCH`, of twice as many) and of all sides.
    """

    bits: int
    tables: int
    sketch_cut: int
    sketches_cut: int
    cut: int
    row_ns: float  # what this is expected to cost a row

    @property
    def words(self) -> int:
        """Words of 64 sides that a row needs; no table is cut by the end of a word."""
        return max(-(-self.tables // (64 // self.bits)), 2 * SKETCH // 64)


def pairs(vectors: Vectors, threshold: float, *, mode: Mode = "auto", recall: float = RECALL) -> Pairs:
    """All pairs of rows with a cosine of at least `threshold` (over 0, to 1), sorted by (later, earlier).

    A row that equals an earlier one, byte by byte, is paired with the first such row alone: many copies would make their square of
    pairs.
    """
    threshold = min(threshold, 1 - SLACK)
    first = _firsts(vectors)
    rows = np.flatnonzero(first == np.arange(len(first)))
    copies = np.flatnonzero((first >= 0) & (first != np.arange(len(first))))
    found = [Pairs(first[copies], copies, np.ones(len(copies)))]
    hashed = _Hashed(vectors, rows, threshold, recall)
    if hashed.is_slower(mode, len(rows) ** 2 // 2, len(rows)):
        of = vectors if len(rows) == len(vectors) else vectors[rows]
        found += [Pairs(rows[part.earlier], rows[part.later], part.likeness) for part in _all_pairs(of, threshold)]
    else:
        found.append(hashed.join(rows, threshold))
    return _sorted(found)


def components(vectors: Vectors, threshold: float, *, mode: Mode = "auto", recall: float = RECALL) -> Rows:
    """The first row of the connected component that each row is in, shape (n,), where pairs of at least `threshold` are connected.

    As by `pairs`, but what is connected already is not compared (fast) or not stored (exact), so a dense topic fills no memory.
    """
    threshold = min(threshold, 1 - SLACK)
    first = _firsts(vectors)
    rows = np.flatnonzero(first == np.arange(len(first)))
    parent = np.where(first < 0, np.arange(len(first)), first)
    hashed = _Hashed(vectors, rows, threshold, recall)
    if hashed.is_slower(mode, len(rows) ** 2 // 2, len(rows)):
        of = vectors if len(rows) == len(vectors) else vectors[rows]
        for part in _all_pairs(of, threshold):
            _unite(parent, rows[part.earlier], rows[part.later])
    else:
        hashed.join(rows, threshold, parent=parent)
    while not np.array_equal(above := parent[parent], parent):
        parent = above
    return parent


def settle(
    vectors: Vectors,
    new: NDArray[np.bool_],
    threshold: float,
    *,
    keys: NDArray[np.int32] | None = None,
    sides: NDArray[np.uint64] | None = None,
    mode: Mode = "auto",
    recall: float = RECALL,
    link: Link = "star",
) -> tuple[NDArray[np.bool_], Rows, Likeness]:
    """Which rows stay: (stay, twin, likeness), each of shape (n,).

    The rows stand in an order, those that are not `new` first; these stay. A new one is rejected where a row that stays and stands
    before it has a cosine of at least `threshold`. `twin` is the most similar of the rows before it that stay (the earliest of
    equals; -1: none), also where that is below the threshold, and `likeness` the cosine, or NaN. In `fast` it is the most similar
    of those that it was compared with: known for every rejected row, below the threshold by chance. `auto` is exact where that
    takes seconds: few rows, or few new ones.

    Only rows of equal `keys` are compared. `sides`, shape (n, 2), are sets of bits: rows of which one has a bit in its first
    set that the other has in its second are not compared either.

    `link: complete`: a row is rejected only where it is alike to every row of a group (`factory.pairs.complete`); rows of equal vectors and
    keys are then taken to be of equal `sides`.
    """
    threshold = min(threshold, 1 - SLACK)
    n = len(vectors)
    stay, twin, likeness = np.ones(n, np.bool_), np.full(n, -1), np.full(n, np.nan)
    keys = np.zeros(n, np.int32) if keys is None else keys
    sides = np.zeros((n, 2), np.uint64) if sides is None else sides
    if link == "complete":
        _settle_completely(vectors, new, threshold, keys, sides, mode, recall, stay, twin, likeness)
        return stay, twin, likeness
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    arrivals = np.bincount(group, new, len(sizes)).astype(np.int64)
    rows = np.flatnonzero(np.einsum("ij,ij->i", vectors, vectors))
    hashed = _Hashed(vectors, rows, threshold, recall, keys, sides)
    # Small groups are compared in blocks, with each other in vain.
    compared = max(int((arrivals * (sizes - arrivals // 2)).sum()), int(new.sum()) * min(n, ROWS) // 2)
    if hashed.is_slower(mode, compared, int(new.sum())):
        for bundle in _bundles(group[rows], new[rows]):
            _settle_exactly(vectors, rows[bundle], new, threshold, keys, sides, stay, twin, likeness)
        return stay, twin, likeness
    first = _firsts(vectors, keys, sides)
    rows = np.flatnonzero(first == np.arange(n))
    _settle_fast(hashed, rows, new, threshold, stay, twin, likeness)
    copies = np.flatnonzero((first >= 0) & (first != np.arange(n)))
    of_stayer = stay[first[copies]]
    twin[copies] = np.where(of_stayer, first[copies], twin[first[copies]])
    likeness[copies] = np.where(of_stayer, 1.0, likeness[first[copies]])
    stay[copies] = ~new[copies]
    return stay, twin, likeness


def _settle_completely(
    vectors: Vectors,
    new: NDArray[np.bool_],
    threshold: float,
    keys: NDArray[np.int32],
    sides: NDArray[np.uint64],
    mode: Mode,
    recall: float,
    stay: NDArray[np.bool_],
    twin: Rows,
    likeness: Likeness,
) -> None:
    """`settle` by complete link, a key at a time; writes to `stay`, `twin` and `likeness`."""
    order = np.argsort(keys, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):  # a loop over keys, each with its rows in order
        if len(group) < 2 or not new[group].any():
            continue
        first = _firsts(vectors[group])
        first = np.where(first < 0, np.arange(len(group)), first)
        firsts = group[first == np.arange(len(group))]
        found = pairs(vectors[firsts], threshold, mode=mode, recall=recall)
        one, other = sides[firsts[found.earlier]], sides[firsts[found.later]]
        apart = ((one[:, 0] & other[:, 1]) | (one[:, 1] & other[:, 0])) != 0
        stay[group], best, likeness[group] = with_copies(first, new[group], complete(found.where(~apart), new[firsts]))
        twin[group] = np.where(best < 0, -1, group[best])


def choose(threshold: float, recall: float, n: int, alike: NDArray[np.floating[Any]], same: float = 1.0, size: int = SIZE) -> Tables:
    """The tables that cost least among those that find a pair at `threshold` with a probability of `recall`.

    `alike` are cosines of pairs drawn at random, `same` is the share of all pairs that they stand for, `size` the number of planes
    that come at once. More bits make fewer unrelated rows meet, and need more tables. Half of what may be missed is missed by the
    tables, the rest by the three cuts.
    """
    agree, miss = 1 - math.acos(threshold) / math.pi, (1 - recall) / 2
    sketch_cuts = _most_that_differ(SKETCH, agree, miss / 3), _most_that_differ(2 * SKETCH, agree, miss / 3)
    sides = 1 - np.arccos(np.clip(alike, -1, 1)) / np.pi if len(alike) else np.zeros(1)
    sifted = (1 - sides) * 2 * SKETCH <= sketch_cuts[1]
    best: Tables | None = None
    for bits in range(4, 25):
        count = math.ceil(math.log(miss) / math.log1p(-(agree**bits)))
        tables = Tables(bits, count, *sketch_cuts, 0, 0.0)
        if best is not None and tables.words > MOST_WORDS:
            break
        cut = _most_that_differ(64 * tables.words, agree, miss / 3)
        meet = sides**bits
        met = count * meet * (MEET_NS + sifted * AGAIN_NS)
        met += ((1 - sides) * 64 * tables.words <= cut) * (1 - (1 - meet) ** count) * COMPARE_NS
        row_ns = -(-tables.words * 64 // size) * size * SIDE_NS + count * (LOOK_NS + (1 << bits) / max(n, 1))
        row_ns += n / 2 * (same * float(met.mean()) + (1 - same) * count * MEET_NS / (1 << bits))  # of other keys: by chance
        tables = tables._replace(cut=cut, row_ns=row_ns)
        if best is None or tables.row_ns < best.row_ns:
            best = tables
    assert best is not None
    return best


def _most_that_differ(sides: int, agree: float, miss: float) -> int:
    """Of so many sides a pair that agrees in each with a probability of `agree` differs in more with a probability of at most `miss`."""
    counts = np.arange(sides)
    steps = np.log((sides - counts) / (counts + 1)) + math.log((1 - agree) / agree)
    chances = np.exp(np.concatenate([[0.0], np.cumsum(steps)]) + sides * math.log(agree))
    return int(np.argmax(1 - np.cumsum(chances) <= miss))


class _Hashed:
    """Vectors that are to be compared by the tables that suit them, and (once that is asked for) on which sides they lie."""

    def __init__(
        self,
        vectors: Vectors,
        rows: Rows,
        threshold: float,
        recall: float,
        keys: NDArray[np.int32] | None = None,
        sides: NDArray[np.uint64] | None = None,
    ) -> None:
        self.vectors = np.ascontiguousarray(vectors)
        self.keys = np.zeros(len(vectors), np.int32) if keys is None else keys
        self.sides = np.zeros((len(vectors), 2), np.uint64) if sides is None else sides
        sample = rows[np.unique(np.linspace(0, max(len(rows) - 1, 0), min(len(rows), SAMPLE)).astype(np.intp))]
        upper = np.triu_indices(len(sample), 1)
        alike = (self.vectors[sample] @ self.vectors[sample].T)[upper]
        # A pair that is above the threshold is to be found, and is no cost.
        counts = (self.keys[sample][:, None] == self.keys[sample][None, :])[upper] & (alike < threshold)
        self.size = max(SMALLEST, 1 << (vectors.shape[1] - 1).bit_length())
        same = float(counts.mean()) if len(counts) else 0.0
        self.tables = choose(threshold, recall, len(rows), alike[counts], same, self.size)

    def is_slower(self, mode: Mode, compared: int, new: int) -> bool:
        """Whether the rows are to be compared exactly: as asked for, or as so many pairs (of so many new rows) are no more work."""
        if mode == "exact" or (mode == "auto" and (compared <= AUTO_PAIRS or new <= AUTO_NEW)):
            return True
        return bool(len(self.vectors) * self.tables.row_ns > compared * (1 + self.vectors.shape[1] * PRODUCT_NS))

    @cached_property
    def words(self) -> NDArray[np.uint64]:
        """The sides of every row as bits, shape (n, words)."""
        n, turns = len(self.vectors), -(-self.tables.words * 64 // self.size)
        signs = np.random.default_rng(_SEED).integers(0, 2, (turns, 3, self.size)).astype(np.float32) * 2 - 1
        words = np.zeros((n, self.tables.words), np.uint64)
        halves = words.view(np.uint32)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda at: _project(self.vectors, at, min(at + COLUMNS, n), signs, halves), range(0, n, COLUMNS)))
        return words

    def join(self, rows: Rows, floor: float, split: int = 0, parent: Rows | None = None) -> Pairs:
        """The pairs among `rows` (ascending) with a cosine of at least `floor`, in no order.

        With `split` only those of a row before it and a row from it on; with `parent` they are united there, and none is given.
        """
        words, few = self.words, rows.astype(np.int32)  # once, before there are threads
        workers = WORKERS if parent is None else 1
        with ThreadPoolExecutor(workers) as pool:
            parts = pool.map(lambda first: self._meet(words, first, workers, few, floor, split, parent), range(workers))
            found = [part for of_worker in parts for part in of_worker]
        earlier, later, cosine = (np.concatenate([part[column] for part in found] or [np.empty(0)]) for column in range(3))
        return Pairs(earlier.astype(np.intp), later.astype(np.intp), np.minimum(cosine.astype(np.float64), 1.0))

    def _meet(
        self, words: NDArray[np.uint64], first: int, workers: int, rows: NDArray[np.int32], floor: float, split: int, parent: Rows | None
    ) -> list[tuple[NDArray[Any], ...]]:
        """The pairs in one worker's share of the tables."""
        n, bits = len(rows), self.tables.bits
        starts = np.empty((1 << bits) + 2, np.int32)
        order, shelved = np.empty(n, np.int32), np.empty((n, 2 * SKETCH // 64), np.uint64)
        room = 0 if parent is not None else n + COLUMNS  # at the least, all whom one row meets
        earlier, later, cosine = np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.float32)
        united = np.empty(0, np.intp) if parent is None else parent
        found: list[tuple[NDArray[Any], ...]] = []
        for table in range(first, self.tables.tables, workers):
            _shelve(words, self.keys, bits, table, rows, starts, order, shelved)
            shelves = (order, starts, shelved, words, self.keys, self.sides, bits, table, *self.tables[2:5])
            at = 0
            while at < n:
                at, count = _compare(at, *shelves, self.vectors, floor, split, united, earlier, later, cosine)
                if count:
                    found.append((earlier[:count].copy(), later[:count].copy(), cosine[:count].copy()))
        return found


def _sorted(found: list[Pairs]) -> Pairs:
    found = [Pairs(np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0)), *found]
    earlier, later, likeness = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(later * (earlier.max(initial=0) + 1) + earlier)  # as one number: a third of the time of two keys
    return Pairs(earlier[order], later[order], likeness[order])


def _firsts(vectors: Vectors, keys: NDArray[np.int32] | None = None, sides: NDArray[np.uint64] | None = None) -> Rows:
    """The first row with the same bytes (and key, and sides) as each row; -1 for a zero vector."""
    n = len(vectors)
    keys = np.zeros(n, np.int32) if keys is None else keys
    sides = np.zeros((n, 2), np.uint64) if sides is None else sides
    first = np.empty(n, np.intp)
    slots = np.full(1 << (2 * n).bit_length(), -1, np.int32)
    bits = np.uint64 if vectors.shape[1] % 2 == 0 else np.uint32
    _copies(np.ascontiguousarray(vectors).view(bits), keys, sides, slots, first)
    return first


# -- exact -----------------------------------------------------------------------------------------------------------------


def _all_pairs(vectors: Vectors, threshold: float) -> Iterator[Pairs]:
    """The pairs of a row and a later one, a block at a time."""
    leading = _leading(vectors, threshold)
    for top in range(0, len(vectors), ROWS):
        for left in range(top, len(vectors), COLUMNS):
            one, other = vectors[top : top + ROWS], vectors[left : left + COLUMNS]
            if leading is not None:
                bounds = (leading[top : top + ROWS] @ leading[left : left + COLUMNS].T).ravel()
                at = np.flatnonzero(bounds >= threshold - SLACK)
            if leading is not None and len(at) * LEADING * 8 < bounds.size:
                i, j = np.divmod(at, len(other))
                cosines = np.einsum("ij,ij->i", one[i], other[j])
            else:
                products = (one @ other.T).ravel()
                at = np.flatnonzero(products >= threshold)
                i, j = np.divmod(at, len(other))
                cosines = products[at]
            alike = (cosines >= threshold) & (j + left > i + top)
            yield Pairs(i[alike] + top, j[alike] + left, np.minimum(cosines[alike].astype(np.float64), 1.0))


def _leading(vectors: Vectors, threshold: float) -> Vectors | None:
    """The leading principal components of each row and the length of the rest; products of these are upper bounds of cosines.

    None where they would rule out too little.
    """
    n, dimensions = vectors.shape
    few = dimensions // LEADING
    if n < 2 * ROWS or few < 2:
        return None
    sample = vectors[:: max(n // (2 * ROWS), 1)]
    _, axes = np.linalg.eigh(sample.T @ sample)
    leading = np.empty((n, few + 1), np.float32)
    for at in range(0, n, COLUMNS):
        block = vectors[at : at + COLUMNS]
        leading[at : at + COLUMNS, :few] = block @ axes[:, -few:]
        rest = (block.astype(np.float64) ** 2).sum(axis=1) - (leading[at : at + COLUMNS, :few].astype(np.float64) ** 2).sum(axis=1)
        leading[at : at + COLUMNS, few] = np.sqrt(np.maximum(rest, 0) + SLACK)
    few_rows = leading[:: max(n // ROWS, 1)]
    return leading if float((few_rows @ few_rows.T >= threshold).mean()) < 1 / 50 else None


def _bundles(group: Rows, new: NDArray[np.bool_]) -> Iterator[Rows]:
    """Rows to be compared at once, ascending: those of one large group, or of small groups that fill a block together."""
    sizes = np.bincount(group)
    worth = (np.bincount(group, new) > 0) & (sizes > 1)
    by_size = np.argsort(sizes, kind="stable")
    bundle = np.empty(len(sizes), np.intp)
    bundle[by_size] = np.cumsum((sizes * worth)[by_size]) // ROWS
    rows = np.flatnonzero(worth[group])
    of = bundle[group[rows]]
    order = np.argsort(of, kind="stable")
    if len(rows):
        yield from np.split(rows[order], np.flatnonzero(np.diff(of[order])) + 1)


def _settle_exactly(
    vectors: Vectors,
    rows: Rows,
    new: NDArray[np.bool_],
    threshold: float,
    keys: NDArray[np.int32],
    sides: NDArray[np.uint64],
    stay: NDArray[np.bool_],
    twin: Rows,
    likeness: Likeness,
) -> None:
    """`settle` for `rows`, a block at a time; writes to `stay`, `twin` and `likeness`.

    What stays of the earlier rows decides first, then the block within itself.
    """
    waiting, standing = rows[new[rows]], rows[~new[rows]]
    not_before = np.triu(np.ones((min(ROWS, len(waiting)),) * 2, np.bool_))
    for start in range(0, len(waiting), ROWS):
        some = waiting[start : start + ROWS]
        block = vectors[some]
        best, nearest_to = np.full(len(some), -np.inf, np.float32), np.full(len(some), -1)
        for left in range(0, len(standing), COLUMNS):
            columns = standing[left : left + COLUMNS]
            cosines = block @ vectors[columns].T
            _keep_apart(cosines, some, columns, keys, sides)
            _note(cosines, columns, best, nearest_to)
        inside = block @ block.T
        _keep_apart(inside, some, some, keys, sides)
        np.copyto(inside, -np.inf, where=not_before[: len(some), : len(some)])
        left_open = best < threshold
        later, earlier = np.divmod(np.flatnonzero(inside >= threshold), len(some))
        both_open = Pairs(earlier, later, inside[later, earlier].astype(np.float64)).where(left_open[earlier] & left_open[later])
        staying = left_open & stays(both_open, np.ones(len(some), np.bool_))
        inside[:, ~staying] = -np.inf
        _note(inside, some, best, nearest_to)
        stay[some], twin[some], likeness[some] = staying, nearest_to, np.where(nearest_to < 0, np.nan, np.minimum(best, 1.0))
        standing = np.concatenate([standing, some[staying]])


def _note(cosines: Vectors, columns: Rows, best: Vectors, nearest_to: Rows) -> None:
    """Write to `best` and `nearest_to` where a column is nearer than what stands there, the first of equals."""
    column = cosines.argmax(axis=1)
    cosine = cosines[np.arange(len(cosines)), column]
    better = cosine > best
    best[better], nearest_to[better] = cosine[better], columns[column[better]]


def _keep_apart(cosines: Vectors, rows: Rows, columns: Rows, keys: NDArray[np.int32], sides: NDArray[np.uint64]) -> None:
    """Set the cosines of what is not to be compared to -inf."""
    of_rows, of_columns = keys[rows], keys[columns]
    if of_rows.min() != of_rows.max() or of_columns.min() != of_columns.max():
        np.copyto(cosines, -np.inf, where=of_rows[:, None] != of_columns[None, :])
    for one, other in ((0, 1), (1, 0)):
        taking, other_taking = np.flatnonzero(sides[rows, one]), np.flatnonzero(sides[columns, other])
        i, j = np.nonzero(sides[rows[taking], one][:, None] & sides[columns[other_taking], other][None, :])
        cosines[taking[i], other_taking[j]] = -np.inf


# -- fast ------------------------------------------------------------------------------------------------------------------


def _settle_fast(
    hashed: _Hashed, rows: Rows, new: NDArray[np.bool_], threshold: float, stay: NDArray[np.bool_], twin: Rows, likeness: Likeness
) -> None:
    """`settle` for `rows`, no two of them equal; writes to `stay`, `twin` and `likeness`.

    What stays for certain comes first, then chunks that double: what the stayers reject is not compared among itself, so a crowd of
    near-equal rows costs no more than its size.
    """
    floor = threshold - BELOW

    def note(found: Pairs) -> None:
        best, cosine = nearest(found, stay)
        better = (best >= 0) & ~(cosine <= likeness)
        twin[better], likeness[better] = best[better], cosine[better]

    waiting = rows[new[rows]]
    kept = rows[~new[rows]]
    for start, stop, before in _chunks(len(waiting), len(kept)):
        chunk = waiting[start:stop]
        chunk = chunk[stay[chunk]]
        known = kept if before else waiting[:start][stay[waiting[:start]]]
        if len(known) and len(chunk):
            note(found := hashed.join(np.concatenate([known, chunk]), floor, split=int(chunk[0])))
            stay[found.where(found.likeness >= threshold).later] = False
        if not before:
            chunk = chunk[stay[chunk]]
            found = hashed.join(chunk, floor)
            stay &= stays(found.where(found.likeness >= threshold), new)
            note(found)


def _chunks(new: int, kept: int) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, compared with what was kept before): first all with that, then twice as many a time with themselves."""
    if kept:
        yield 0, new, True
    stop = 0
    while stop < new:
        start, stop = stop, min(new, max(FIRST_CHUNK, 2 * stop))
        yield start, stop, False


# -- kernels ---------------------------------------------------------------------------------------------------------------


@kernel
def _copies(words: Any, keys: Any, sides: Any, slots: Any, first: Any) -> None:
    """For each row the first with the same words, by a hash table with open places (`slots`, a power of two, -1: empty)."""
    n, width = words.shape
    last = slots.shape[0] - 1
    shift = np.uint64(64)
    while (1 << np.int64(np.uint64(64) - shift)) <= last:
        shift -= np.uint64(1)
    for i in range(n):
        hashed = np.uint64(keys[i])
        zero = True
        for k in range(width):
            hashed = (hashed ^ np.uint64(words[i, k])) * np.uint64(0x9E3779B97F4A7C15)
            zero = zero and words[i, k] == 0
        first[i] = -1
        slot = np.int64(hashed >> shift)  # the highest bits: those that all others have reached
        while not zero and first[i] < 0:
            j = np.int64(slots[slot])
            if j < 0:
                slots[slot] = i
                first[i] = i
            else:
                same = keys[i] == keys[j] and sides[i, 0] == sides[j, 0] and sides[i, 1] == sides[j, 1]
                k = 0
                while same and k < width:
                    same = words[i, k] == words[j, k]
                    k += 1
                if same:
                    first[i] = j
            slot = (slot + 1) & last


@kernel
def _project(vectors: Any, first: int, last: int, signs: Any, halves: Any) -> None:
    """Write the signs of three rounds of random signs and a fast Hadamard transform, 32 a half word, rows `first` to `last`."""
    dimensions = vectors.shape[1]
    turns, rounds, size = signs.shape
    work = np.empty(size * LANES, np.float32)  # LANES rows side by side, so that one instruction serves them all
    sign_bits = work.view(np.uint32)
    for at in range(first, last, LANES):
        for turn in range(turns):
            for lane in range(LANES):
                row = vectors[min(at + lane, last - 1)]
                for c in range(dimensions):
                    work[c * LANES + lane] = row[c]
            work[dimensions * LANES :] = 0
            for step in range(rounds):
                for c in range(size):
                    for lane in range(LANES):
                        work[c * LANES + lane] *= signs[turn, step, c]
                half = LANES
                while 4 * half <= size * LANES:  # two steps at once: half as often through memory
                    for base in range(0, size * LANES, 4 * half):
                        p, q = work[base : base + half], work[base + half : base + 2 * half]
                        r, s = work[base + 2 * half : base + 3 * half], work[base + 3 * half : base + 4 * half]
                        for k in range(half):
                            a, b, c, d = p[k] + q[k], p[k] - q[k], r[k] + s[k], r[k] - s[k]
                            p[k], q[k], r[k], s[k] = a + c, b + d, a - c, b - d
                    half *= 4
                if half < size * LANES:
                    p, q = work[:half], work[half:]
                    for k in range(half):
                        p[k], q[k] = p[k] + q[k], p[k] - q[k]
            for word in range(min(size // 32, halves.shape[1] - turn * (size // 32))):
                for lane in range(LANES):
                    bits = np.uint32(0)
                    for k in range(32):
                        bits = (bits << np.uint32(1)) | (sign_bits[(word * 32 + k) * LANES + lane] >> np.uint32(31))
                    halves[min(at + lane, last - 1), turn * (size // 32) + word] = bits


@kernel
def _code(words: Any, row: int, bits: int, table: int) -> Any:
    """The sides of `row` in a table, as a number."""
    of_word = 64 // bits
    return (words[row, table // of_word] >> np.uint64(table % of_word * bits)) & np.uint64((1 << bits) - 1)


@kernel
def _first_met(words: Any, one: int, other: int, bits: int, table: int, cut: int) -> bool:
    """Whether two rows agree in no table before `table`, and differ in at most `cut` of all sides.

    Where words differ in no bit of a field, taking one from each field borrows into its highest bit (Mycroft's test for a zero byte).
    """
    of_word = 64 // bits
    count = 0
    lowest = np.uint64(0)
    for field in range(of_word):
        lowest |= np.uint64(1) << np.uint64(field * bits)
    for word in range(words.shape[1]):
        differ = words[one, word] ^ words[other, word]
        count += _ones(differ)
        before = table - word * of_word
        if before > 0:
            fields = lowest if before >= of_word else lowest & ((np.uint64(1) << np.uint64(before * bits)) - np.uint64(1))
            if (differ - fields) & ~differ & (fields << np.uint64(bits - 1)):
                return False
    return count <= cut


@kernel
def _shelf(words: Any, keys: Any, row: int, bits: int, table: int) -> Any:
    """Where `row` stands in a table: rows of different keys rarely share a shelf."""
    key = np.uint64(keys[row]) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - bits)
    return np.int64(_code(words, row, bits, table) ^ key)


@kernel
def _shelve(words: Any, keys: Any, bits: int, table: int, rows: Any, starts: Any, order: Any, shelved: Any) -> None:
    """Counting sort: `order` are the rows by shelf and row, shelf s is order[starts[s] : starts[s + 1]], `shelved` their sketches."""
    starts[:] = 0
    for row in rows:
        starts[_shelf(words, keys, row, bits, table) + 2] += 1
    for shelf in range(starts.shape[0] - 1):
        starts[shelf + 1] += starts[shelf]
    for row in rows:
        shelf = _shelf(words, keys, row, bits, table) + 1
        place = starts[shelf]
        starts[shelf] += 1
        order[place] = row
        for k in range(shelved.shape[1]):
            shelved[place, k] = words[row, k]


@kernel
def _ones(word: Any) -> Any:
    """How many bits are set; compilers know this form and make one instruction of it."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel
def _dot(one: Any, other: Any, products: Any) -> Any:
    """The dot product; halves are added as vectors, which the compiler may not do with a plain sum, and which rounds less."""
    width = one.shape[0]
    for k in range(width):
        products[k] = one[k] * other[k]
    while width > 8:
        half = (width + 1) // 2
        for k in range(width - half):
            products[k] += products[half + k]
        width = half
    total = np.float32(0)
    for k in range(width):
        total += products[k]
    return total


@kernel
def _root(parent: Any, row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row


@kernel
def _unite(parent: Any, earlier: Any, later: Any) -> None:
    """Join the components of pairs; the smallest row is the root."""
    for k in range(earlier.shape[0]):
        one, other = _root(parent, earlier[k]), _root(parent, later[k])
        parent[max(one, other)] = min(one, other)


@kernel
def _compare(
    at: int,
    order: Any,
    starts: Any,
    shelved: Any,
    words: Any,
    keys: Any,
    sides: Any,
    bits: int,
    table: int,
    sketch_cut: int,
    sketches_cut: int,
    cut: int,
    vectors: Any,
    floor: float,
    split: int,
    parent: Any,
    out_earlier: Any,
    out_later: Any,
    out_cosine: Any,
) -> Any:
    """Compare the rows from place `at` on with those before them on their shelves: (place reached, pairs written).

    It stops where the pairs of a place might not find room. With a `parent` it unites them instead, and never stops.
    """
    count = 0
    unites = parent.shape[0] > 0
    products = np.empty(vectors.shape[1], np.float32)
    shelf = _shelf(words, keys, order[at], bits, table)
    for place in range(at, order.shape[0]):
        while starts[shelf + 1] <= place:
            shelf += 1
        start = starts[shelf]
        if not unites and count + place - start > out_earlier.shape[0]:
            return place, count
        later = np.int64(order[place])
        if later < split:
            continue
        root = _root(parent, later) if unites else 0
        own, before = shelved[place], shelved[start:place]
        a, b, c, d = own[0], own[1], own[2], own[3]
        for k in range(place - start):  # from 0, so that no place needs a check
            differ = _ones(a ^ before[k, 0]) + _ones(b ^ before[k, 1]) + _ones(c ^ before[k, 2]) + _ones(d ^ before[k, 3])
            if differ > sketch_cut:
                continue
            for word in range(4, 8):
                differ += _ones(own[word] ^ before[k, word])
            if differ > sketches_cut:
                continue
            earlier = np.int64(order[start + k])
            if (split and earlier >= split) or keys[earlier] != keys[later]:
                continue
            if (sides[earlier, 0] & sides[later, 1]) | (sides[earlier, 1] & sides[later, 0]):
                continue
            if unites and (parent[earlier] == root or _root(parent, earlier) == root):
                continue
            if not _first_met(words, earlier, later, bits, table, cut):
                continue
            cosine = _dot(vectors[earlier], vectors[later], products)
            if cosine < floor:
                continue
            if unites:
                root = min(_root(parent, earlier), root)
                parent[_root(parent, earlier)] = parent[_root(parent, later)] = root
            else:
                out_earlier[count], out_later[count], out_cosine[count] = earlier, later, cosine
                count += 1
    return order.shape[0], count

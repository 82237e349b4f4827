"""Texts that share most of their shingles: candidates by MinHash or by rare shingles, every one of them verified by counting.

A shingle is so many words or characters in a row (Broder, "On the resemblance and containment of documents", 1997); the likeness
of two texts is the Jaccard index of their sets of shingles: those that both have, by those that at least one has. 64-bit hashes
stand for shingles. What is reported was counted, so nothing is below the threshold; the two ways to find candidates differ
only in what they may miss.

minhash: locality-sensitive hashing (Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", chapter 3): a pair just at the
    threshold is missed with a probability of at most 1 - `recall`, a more similar one less often.
exact: the prefix filter (Chaudhuri, Ganti & Kaushik 2006; Bayardo, Ma & Srikant 2007): two sets that are so alike share one of
    their rarest few shingles. It misses none, and is slow where even the rarest shingles are common (characters, a million texts).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.kernels import kernel
from factory.pairs import Link, Pairs, Rows, complete, with_copies
from factory.words import character_at, flat, mix, tables, words_of

Unit = Literal["chars", "words"]
Mode = Literal["minhash", "exact"]
Likeness = NDArray[np.float64]

SAMPLE = 400  # texts whose likeness to each other says how alike unrelated ones are
MOST_HASHES = 512
CHUNK = 8192  # texts that a thread works at at a time
KEPT_BYTES = 256 << 20  # sets of shingles that are kept in memory; what does not fit is made anew each time that it is compared
COUNTERS, COUNTED = 1 << 20, 20_000  # of shingles, and texts whose shingles are counted, to know which are common
# Nanoseconds on one core, for the choice of bands: a hash of a shingle, a look at a table, and a comparison, a shingle.
HASH_NS, LOOK_NS, COMPARE_NS = 0.15, 40.0, 6.0
_SEED = 20
_BASE = 0x9E3779B97F4A7C15


class Bands(NamedTuple):
    """How MinHash finds candidates: texts that agree in all `rows` minima of one of the bands."""

    bands: int
    rows: int


def pairs(
    texts: pl.Series, threshold: float, *, shingle: Unit = "chars", size: int = 3, recall: float = 0.99, mode: Mode = "minhash"
) -> Pairs:
    """All pairs of `texts` that are alike to at least `threshold` (over 0, to 1), with their likeness, sorted by (later, earlier).

    A text shorter than a shingle is one shingle; one without words (characters) has no twin. Many copies of one text make the
    square of their number of pairs: leave copies out first.
    """
    found = _Job(texts, threshold, shingle, size).join(None, recall, mode)[3]
    order = np.lexsort((found.earlier, found.later))
    return Pairs(found.earlier[order], found.later[order], found.likeness[order])


def settle(
    texts: pl.Series,
    new: NDArray[np.bool_],
    threshold: float,
    *,
    shingle: Unit = "chars",
    size: int = 3,
    recall: float = 0.99,
    mode: Mode = "minhash",
    link: Link = "star",
) -> tuple[NDArray[np.bool_], Rows, Likeness]:
    """Which texts stay: (stay, twin, likeness), each of shape (n,).

    The texts stand in an order. One that is not `new` stays. A new one is rejected where a text that stays and stands before it is
    alike to at least `threshold`. `twin` is the most similar of those that were compared (the earliest of equals; -1: none),
    also where that is below the threshold; `likeness` is that to the twin, or NaN. Only what stays is compared with what comes
    later, so copies cost no more than other texts.

    `link: complete`: a text is rejected only where it is alike to every one of a group (`factory.pairs.complete`).
    """
    if link == "star":
        stay, twin, likeness, _ = _Job(texts, threshold, shingle, size).join(new, recall, mode)
        return stay, twin, likeness
    own = pl.when(pl.col("text").str.strip_chars() == "").then("row").otherwise(pl.col("row").first().over("text"))  # no blank is a copy
    first = pl.DataFrame({"text": texts}).with_row_index("row").select(own).to_series().to_numpy().astype(np.intp)
    firsts = np.flatnonzero(first == np.arange(len(first)))  # copies share their fate, and would make the square of their pairs
    found = pairs(texts.gather(firsts), threshold, shingle=shingle, size=size, recall=recall, mode=mode)
    return with_copies(first, new, complete(found, new[firsts]))


def choose_bands(threshold: float, recall: float, alike: Likeness, texts: int, shingles: float) -> Bands:
    """The bands that cost least among those that find a pair at `threshold` with a probability of `recall`.

    `alike` are likenesses of pairs drawn at random. Longer bands take more hashes and make fewer candidates of unrelated texts.
    """
    best, least = Bands(1, 1), math.inf
    for rows in range(1, MOST_HASHES + 1):
        agree = threshold**rows
        count = 1 if agree >= recall else math.ceil(math.log1p(-recall) / math.log1p(-agree))
        if count * rows > MOST_HASHES and rows > 1:
            break
        candidates = texts / 2 * count * float(np.mean(alike**rows)) if len(alike) else 0.0
        cost = count * rows * shingles * HASH_NS + count * LOOK_NS + candidates * shingles * COMPARE_NS
        if cost < least:
            best, least = Bands(count, rows), cost
    return best


class _Job:
    """Texts to be compared, as bytes, and how they are cut into shingles."""

    def __init__(self, texts: pl.Series, threshold: float, shingle: Unit, size: int) -> None:
        self.texts, self.threshold = flat(texts), threshold
        longest = int(np.diff(self.texts.offsets).max(initial=0))
        classes, lower = tables() if shingle == "words" else (np.zeros(1, np.uint8), np.zeros(1, np.uint32))
        self.cut = (shingle == "words", size, np.uint64(pow(_BASE, size, 1 << 64)), classes, lower, longest)

    def join(self, new: NDArray[np.bool_] | None, recall: float, mode: Mode) -> tuple[NDArray[np.bool_], Rows, Likeness, Pairs]:
        """`settle` for these, or all pairs where `new` is None."""
        n = len(self.texts)
        if mode == "minhash":
            keys, places = self._minhash(recall)
        else:
            keys, places = self._rarest()
        everything = new is None
        is_new = np.ones(n, np.bool_) if new is None else np.ascontiguousarray(new)
        kept = min(KEPT_BYTES // 8, len(self.texts.data) + n)
        stay, twin, likeness, *found = _join(*self.texts, *self.cut, keys, places, is_new, everything, self.threshold, kept)
        return stay, twin, likeness, Pairs(*found)

    def _minhash(self, recall: float) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        n = len(self.texts)
        sample = np.unique(np.linspace(0, max(n - 1, 0), min(n, SAMPLE)).astype(np.int64))
        alike, shingles = _compare_all(*self.texts, *self.cut, sample)
        # A pair that is a duplicate is to be found, and is no cost.
        bands = choose_bands(self.threshold, recall, alike[alike < self.threshold], n, max(shingles, 1.0))
        rng = np.random.default_rng(_SEED)
        factors = rng.integers(0, 2**31, bands.bands * bands.rows, np.uint32) * np.uint32(2) + np.uint32(1)
        shifts = rng.integers(0, 2**32, bands.bands * bands.rows, np.uint32)
        keys = np.zeros((n, bands.bands), np.uint64)
        self._in_threads(lambda first, last: _sketch(*self.texts, *self.cut, first, last, factors, shifts, bands.rows, keys))
        return keys.reshape(-1), np.arange(n + 1, dtype=np.int64) * bands.bands

    def _rarest(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        n = len(self.texts)
        counters = np.zeros(COUNTERS, np.uint32)
        _count(*self.texts, *self.cut, np.unique(np.linspace(0, max(n - 1, 0), min(n, COUNTED)).astype(np.int64)), counters)
        ranks = np.ceil(np.log2(counters + 1.0)).astype(np.uint8)  # the order of magnitude is enough, and stays near the processor
        counts = np.zeros(n + 1, np.int64)
        parts = self._in_threads(lambda first, last: _prefixes(*self.texts, *self.cut, first, last, self.threshold, ranks, counts))
        return np.concatenate([np.zeros(0, np.uint64), *parts]), np.cumsum(counts)

    def _in_threads(self, work: Callable[[int, int], Any]) -> list[Any]:
        """What `work` gives for each chunk of the texts, in order; kernels run beside each other."""
        starts = range(0, len(self.texts), CHUNK)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda first: work(first, min(first + CHUNK, len(self.texts))), starts))


# -- kernels ---------------------------------------------------------------------------------------------------------------


@kernel
def _shingles_of(
    data: Any, offsets: Any, i: int, by_words: bool, size: int, power: Any, classes: Any, lower: Any, units: Any, out: Any
) -> int:
    """Write the hashes of text i's shingles, repeated ones as often as they come; gives how many there are."""
    start, end = offsets[i], offsets[i + 1]
    count = 0
    if by_words:
        if end > start:
            count = words_of(data, start, end, classes, lower, units)
    else:
        place = start
        while place < end:
            code, length = character_at(data, place, end)
            units[count] = np.uint64(code) + np.uint64(1)
            count += 1
            place += length
    if count == 0:
        return 0
    base = np.uint64(0x9E3779B97F4A7C15)
    rolled = np.uint64(0)
    for j in range(min(size, count)):
        rolled = rolled * base + units[j]
    out[0] = mix(rolled)
    made = 1
    for j in range(size, count):
        rolled = rolled * base + units[j] - units[j - size] * power
        out[made] = mix(rolled)
        made += 1
    return made


@kernel
def _sketch(
    data: Any,
    offsets: Any,
    by_words: bool,
    size: int,
    power: Any,
    classes: Any,
    lower: Any,
    longest: int,
    first: int,
    last: int,
    factors: Any,
    shifts: Any,
    rows: int,
    keys: Any,
) -> None:
    """The keys of each text's bands."""
    units, found = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.uint64)
    values = np.empty(longest + 17, np.uint32)
    for i in range(first, last):
        count = _shingles_of(data, offsets, i, by_words, size, power, classes, lower, units, found)
        if count == 0:
            continue
        for j in range(count):
            values[j] = np.uint32(found[j] >> np.uint64(32))
        padded = (count + 15) // 16 * 16  # whole registers
        for j in range(count, padded):
            values[j] = values[0]
        place = 0
        for band in range(keys.shape[1]):
            key = np.uint64(band + 1) * np.uint64(0x9E3779B97F4A7C15)
            for _ in range(rows):
                factor, shift, least = factors[place], shifts[place], np.uint32(0xFFFFFFFF)
                for j in range(padded):
                    least = min(least, np.uint32(values[j] * factor + shift))
                key = mix(key ^ np.uint64(least))
                place += 1
            keys[i, band] = key


@kernel
def _distinct(hashes: Any, count: int, slots: Any, stamps: Any, stamp: int, out: Any) -> int:
    """Put hashes into the set that is marked by `stamp`, and each once into `out`; gives how many there are."""
    mask = np.uint64(1)
    while mask < np.uint64(2 * count):
        mask <<= np.uint64(1)
    mask -= np.uint64(1)
    kept = 0
    for j in range(count):
        value = hashes[j]
        slot = value & mask
        while stamps[slot] == stamp and slots[slot] != value:
            slot = (slot + np.uint64(1)) & mask
        if stamps[slot] != stamp:
            stamps[slot], slots[slot] = stamp, value
            out[kept] = value
            kept += 1
    return kept


@kernel
def _shared(hashes: Any, first: int, count: int, size: int, slots: Any, stamps: Any, stamp: int) -> int:
    """How many of the hashes are in the set that is marked by `stamp`, which was made of `size` hashes."""
    mask = np.uint64(1)
    while mask < np.uint64(2 * size):
        mask <<= np.uint64(1)
    mask -= np.uint64(1)
    shared = 0
    for j in range(first, first + count):
        value = hashes[j]
        slot = value & mask
        while stamps[slot] == stamp and slots[slot] != value:
            slot = (slot + np.uint64(1)) & mask
        if stamps[slot] == stamp:
            shared += 1
    return shared


@kernel
def _room(longest: int) -> int:
    room = 2
    while room < 2 * (longest + 1):
        room *= 2
    return room


@kernel
def _compare_all(
    data: Any, offsets: Any, by_words: bool, size: int, power: Any, classes: Any, lower: Any, longest: int, sample: Any
) -> Any:
    """The likeness of every pair of a few texts, and their mean number of shingles."""
    n = sample.shape[0]
    units, found = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.uint64)
    room = _room(longest)
    slots, stamps = np.empty(room, np.uint64), np.zeros(room, np.int64)
    places = np.zeros(n + 1, np.int64)
    for k in range(n):
        places[k + 1] = places[k] + offsets[sample[k] + 1] - offsets[sample[k]]
    sets, sizes = np.empty(places[n] + 1, np.uint64), np.zeros(n, np.int64)
    alike = np.zeros(n * (n - 1) // 2 if n else 0, np.float64)
    stamp, pair, total = 0, 0, 0
    for k in range(n):
        count = _shingles_of(data, offsets, sample[k], by_words, size, power, classes, lower, units, found)
        total += count
        if count == 0:
            pair += k
            continue
        stamp += 1
        sizes[k] = _distinct(found, count, slots, stamps, stamp, sets[places[k] :])
        for j in range(k):
            shared = _shared(sets, places[j], sizes[j], count, slots, stamps, stamp)
            alike[pair] = shared / (sizes[k] + sizes[j] - shared)
            pair += 1
    return alike, total / max(n, 1)


@kernel
def _needed(count: int, threshold: float) -> int:
    """How many of its rarest shingles a set of so many has to show."""
    return count - math.ceil(threshold * count - 1e-9) + 1


@kernel
def _count(
    data: Any, offsets: Any, by_words: bool, size: int, power: Any, classes: Any, lower: Any, longest: int, sample: Any, counters: Any
) -> None:
    """Count the shingles of some texts, by their hash, roughly."""
    units, found = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.uint64)
    mask = np.uint64(counters.shape[0] - 1)
    for i in sample:
        count = _shingles_of(data, offsets, i, by_words, size, power, classes, lower, units, found)
        for j in range(count):
            counters[found[j] & mask] += np.uint32(1)


@kernel
def _prefixes(
    data: Any,
    offsets: Any,
    by_words: bool,
    size: int,
    power: Any,
    classes: Any,
    lower: Any,
    longest: int,
    first: int,
    last: int,
    threshold: float,
    ranks: Any,
    counts: Any,
) -> Any:
    """The rarest shingles of each text, one text's after the other's; `counts` gets how many, a place further on.

    Rarest are those that come first by (how common, hash), which is one order for all texts.
    """
    units, found = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.uint64)
    room = _room(longest)
    slots, stamps = np.empty(room, np.uint64), np.zeros(room, np.int64)
    mask = np.uint64(ranks.shape[0] - 1)
    keys, used = np.empty(1 << 16, np.uint64), 0
    for i in range(first, last):
        count = _shingles_of(data, offsets, i, by_words, size, power, classes, lower, units, found)
        if count == 0:
            continue
        count = _distinct(found, count, slots, stamps, i - first + 1, units)
        for j in range(count):
            units[j] = np.uint64(ranks[units[j] & mask]) << np.uint64(56) | units[j] >> np.uint64(8)
        wanted = _needed(count, threshold)
        low, high = 0, count - 1
        while low < high:  # quickselect (Hoare 1961): the first `wanted` come to the front
            pivot = units[(low + high) // 2]
            left, right = low, high
            while left <= right:
                while units[left] < pivot:
                    left += 1
                while units[right] > pivot:
                    right -= 1
                if left <= right:
                    units[left], units[right] = units[right], units[left]
                    left += 1
                    right -= 1
            if wanted - 1 <= right:
                high = right
            elif wanted - 1 >= left:
                low = left
            else:
                break
        while used + wanted > keys.shape[0]:
            more = np.empty(2 * keys.shape[0], np.uint64)
            more[:used] = keys[:used]
            keys = more
        for j in range(wanted):
            keys[used + j] = mix(units[j])
        used += wanted
        counts[i + 1] = wanted
    return keys[:used]


@kernel
def _join(
    data: Any,
    offsets: Any,
    by_words: bool,
    size: int,
    power: Any,
    classes: Any,
    lower: Any,
    longest: int,
    keys: Any,
    places: Any,
    new: Any,
    everything: bool,
    threshold: float,
    kept: int,
) -> Any:
    """Compare each text with the earlier ones that share a key: all of them, or (not `everything`) those that stay.

    A text whose first key is 0 has no shingles. Sets of shingles are made when they are first compared, and kept while there is room.
    """
    n = offsets.shape[0] - 1
    stay, twin, likeness = np.ones(n, np.bool_), np.full(n, -1, np.intp), np.full(n, np.nan)
    earlier, later, alike = np.empty(1024, np.intp), np.empty(1024, np.intp), np.empty(1024, np.float64)
    found_pairs = 0
    # Who stands under a key: chains of nodes. A node knows the key's other half, since many keys share a head.
    heads = np.full(max(2, _room(keys.shape[0] // 2)), -1, np.int32)
    head_mask = np.uint64(heads.shape[0] - 1)
    node_next, node_row, node_tag = np.empty(keys.shape[0], np.int32), np.empty(keys.shape[0], np.int32), np.empty(keys.shape[0], np.uint32)
    nodes = 0
    seen = np.full(n, -1, np.int32)
    candidates = np.empty(1024, np.int32)
    units, found = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.uint64)
    room = _room(longest)
    slots, stamps = np.empty(room, np.uint64), np.zeros(room, np.int64)
    other_slots, other_stamps = np.empty(room, np.uint64), np.zeros(room, np.int64)
    mine, theirs = np.empty(longest + 1, np.uint64), np.empty(longest + 1, np.uint64)
    sets, used = np.empty(kept, np.uint64), 0
    where, sizes = np.full(n, -1, np.int64), np.zeros(n, np.int32)
    made = 0
    for i in range(n):
        first, last = places[i], places[i + 1]
        if first == last or keys[first] == 0:
            continue
        met = 0
        if new[i]:
            for place in range(first, last):
                key = keys[place]
                tag = np.uint32(key >> np.uint64(32))
                node = heads[key & head_mask]
                while node >= 0:
                    row = node_row[node]
                    if node_tag[node] == tag and seen[row] != i:
                        seen[row] = i
                        if met == candidates.shape[0]:
                            more = np.empty(2 * met, np.int32)
                            more[:met] = candidates
                            candidates = more
                        candidates[met] = row
                        met += 1
                    node = node_next[node]
        if met:
            count = _shingles_of(data, offsets, i, by_words, size, power, classes, lower, units, found)
            own = _distinct(found, count, slots, stamps, i + 1, mine)
            for c in range(met):
                row = candidates[c]
                if sizes[row] and min(own, sizes[row]) < threshold * max(own, sizes[row]) - 1e-9:
                    continue
                if where[row] >= 0:
                    shared = _shared(sets, where[row], sizes[row], count, slots, stamps, i + 1)
                else:
                    made += 1
                    many = _shingles_of(data, offsets, row, by_words, size, power, classes, lower, units, found)
                    sizes[row] = _distinct(found, many, other_slots, other_stamps, made, theirs)
                    if used + sizes[row] <= kept:
                        where[row] = used
                        sets[used : used + sizes[row]] = theirs[: sizes[row]]
                        used += sizes[row]
                    shared = _shared(theirs, 0, sizes[row], count, slots, stamps, i + 1)
                jaccard = shared / (own + sizes[row] - shared)
                if everything:
                    if jaccard >= threshold:
                        if found_pairs == earlier.shape[0]:
                            more_earlier, more_later = np.empty(2 * found_pairs, np.intp), np.empty(2 * found_pairs, np.intp)
                            more_alike = np.empty(2 * found_pairs, np.float64)
                            more_earlier[:found_pairs], more_later[:found_pairs] = earlier, later
                            more_alike[:found_pairs] = alike
                            earlier, later, alike = more_earlier, more_later, more_alike
                        earlier[found_pairs], later[found_pairs], alike[found_pairs] = row, i, jaccard
                        found_pairs += 1
                elif twin[i] < 0 or jaccard > likeness[i] or (jaccard == likeness[i] and row < twin[i]):
                    twin[i], likeness[i] = row, jaccard
            if not everything and twin[i] >= 0 and likeness[i] >= threshold:
                stay[i] = False
                continue
        for place in range(first, last):
            key = keys[place]
            head = key & head_mask
            node_next[nodes], node_row[nodes], node_tag[nodes] = heads[head], i, np.uint32(key >> np.uint64(32))
            heads[head] = nodes
            nodes += 1
    return stay, twin, likeness, earlier[:found_pairs], later[:found_pairs], alike[:found_pairs]

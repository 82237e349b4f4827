"""Passages that texts share with given items, word for word: how much of an evaluation set stands in rows that are to be trained on.

Both usual measures come from one index of the items' runs of `SIZE` words. A run of 13 words (Brown et al. 2020, "Language Models are
Few-Shot Learners", arXiv 2005.14165, appendix C) is so many shorter ones, one word after the other; the share of an item's words that
stand in runs of 8 words is what Chowdhery et al. 2022 (PaLM, arXiv 2204.02311) and Touvron et al. 2023 (Llama 2, arXiv 2307.09288)
measure. 64-bit hashes stand for words and runs.
"""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.kernels import kernel
from factory.words import Hashes, Offsets, flat, mix, tables, words, words_of

Numbers = NDArray[np.int64]
Shares = NDArray[np.float64]

SIZE = 8
COMMON, COMMON_SHARE = 10, 0.1  # a run in more than so many items, and so large a share of them, is the form of the set and no item's own
MOST = 64  # items that are remembered of a run: what stands in more is still found by other runs
CHUNK = 16_384  # texts that a thread works at at a time
_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word's hash is lost
_BITS = 16  # of the sieve, a run: one in 16 that are of no item passes it


class Shared(NamedTuple):
    """What texts share with items, an entry a text; item -1: nothing.

    Of the item whose longest shared run comes nearest to what makes it a copy: `run` own words of `needed`. Of the item of which most is
    shared: the `share` of its own words. `first` and `last` are places of words in the text, both included.
    """

    run_item: Numbers
    run: Numbers
    needed: Numbers
    run_first: Numbers
    run_last: Numbers
    share_item: Numbers
    share: Shares
    share_first: Numbers
    share_last: Numbers


class Passages:
    """An index of items: texts that others may hold.

    An item is shared where `longest` of its own words stand in a text in a row. One with fewer must stand in it whole; one with
    fewer than `fewest` must be all that the text says, and has no share. Words in runs that stand in `phrases` (texts of the task's
    own form) do not count, nor those in runs that are common to many items of a set (`sets` numbers each item's): they are no item's own.
    """

    def __init__(
        self, items: pl.Series, *, longest: int = 13, fewest: int = 5, sets: Numbers | None = None, phrases: pl.Series | None = None
    ) -> None:
        self.size, self.fewest = min(SIZE, longest), fewest
        hashes, offsets = words(flat(items))
        counts = np.diff(offsets)
        of_set = np.zeros(len(items), np.int64) if sets is None else sets
        self.lengths = np.unique(np.minimum(counts[counts > 0], self.size)).astype(np.int64)
        found = [_runs(hashes, offsets, int(length), whole=length < self.size) for length in self.lengths]
        keys = np.concatenate([np.empty(0, np.uint64), *(run.keys for run in found)])
        item = np.concatenate([np.empty(0, np.int64), *(run.text for run in found)])
        at = np.concatenate([np.empty(0, np.int64), *(run.at for run in found)])
        size = np.concatenate([np.empty(0, np.int64), *(np.full(len(run.keys), n) for run, n in zip(found, self.lengths, strict=True))])
        order = np.lexsort((-at, item, keys))  # later places first: each looks at what stood one place before it, a word earlier
        keys, item, at, size = keys[order], item[order], at[order], size[order]
        own = ~_common(keys, item, of_set)
        if phrases is not None and len(phrases) and len(keys):
            said, places = words(flat(phrases))
            own &= ~np.isin(keys, np.concatenate([_runs(said, places, int(n), whole=False).keys for n in self.lengths]))
        self.starts = offsets  # of each item's words among all
        is_own = np.zeros(len(hashes), np.int64)
        _mark(is_own, offsets, item[own], at[own], size[own], 1)
        _mark(is_own, offsets, item[~own], at[~own], size[~own], 0)  # a word of a phrase is none, whatever runs reach into it
        self.before = np.concatenate([np.zeros(1, np.int64), np.cumsum(is_own)])  # own words up to each
        self.words = self.before[offsets[1:]] - self.before[offsets[:-1]]
        keys, item, at, size = keys[own], item[own], at[own], size[own]
        self.needed = np.zeros(len(items), np.int64)
        by_item = np.lexsort((at, item))
        _measure(item[by_item], at[by_item], size[by_item], offsets, self.before, self.needed)
        self.needed = np.minimum(self.needed, longest)
        unique, first, times = np.unique(keys, return_index=True, return_counts=True)
        kept = np.minimum(times, MOST)
        self.post = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
        pick = np.repeat(first - self.post[:-1], kept) + np.arange(self.post[-1])
        self.post_item, self.post_at = item[pick], at[pick]
        room = 2
        while room < 2 * (len(unique) + 1):
            room *= 2
        self.slots = np.full(room, -1, np.int64)
        self.keys = unique
        self.sieve = np.zeros(max(room * _BITS // 64, 1), np.uint64)
        _fill_table(unique, self.slots, self.sieve)

    def search(self, texts: pl.Series) -> Shared:
        """What each text shares with the items. Time grows with the words of the texts alone, but for runs of many items."""
        n = len(texts)
        none, zeros = np.full(n, -1, np.int64), np.zeros((6, n), np.int64)
        shared = Shared(none, zeros[0], zeros[1], zeros[2], zeros[3], none.copy(), np.zeros(n), zeros[4], zeros[5])
        data, offsets = flat(texts)
        classes, lower = tables()
        powers = np.array([pow(int(_STEP), int(length), 1 << 64) for length in self.lengths], np.uint64)

        def work(first: int) -> None:
            last = min(first + CHUNK, n)
            longest = int(np.diff(offsets[first : last + 1]).max(initial=0))
            _search(
                data, offsets, first, last, classes, lower, longest, self.lengths, powers, self.fewest, self.keys, self.slots, self.sieve,
                self.post, self.post_item, self.post_at, self.starts, self.before, self.words, self.needed, *shared,
            )  # fmt: skip

        if len(self.keys):
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
                list(pool.map(work, range(0, n, CHUNK)))
        return shared


def spans(texts: Sequence[str], first: Sequence[int], last: Sequence[int]) -> list[tuple[int, int]]:
    """From where to where, in characters, the words `first` to `last` of each text stand.

    A loop over texts, meant for the few in which something was found.
    """
    data, offsets = flat(pl.Series(texts, dtype=pl.String))
    classes, lower = tables()
    found = []
    for i, text in enumerate(texts):
        start, end = _word_places(data, offsets[i], offsets[i + 1], classes, lower, first[i], last[i])
        there = data[offsets[i] : offsets[i + 1]].tobytes()
        place = len(there[: start - offsets[i]].decode()), len(there[: end - offsets[i]].decode())
        if len(there) != len(text.encode()) or there.decode() != text:  # in NFKC it has other places
            place = _before(text, place[0]), _before(text, place[1])
        found.append((place[0], place[0] + len(_to_last_word(text[place[0] : place[1]]))))
    return found


def _before(text: str, place: int) -> int:
    """Where the character at `place` of the text's NFKC comes from."""
    return max(bisect_right(range(len(text) + 1), place, key=lambda n: len(unicodedata.normalize("NFKC", text[:n]))) - 1, 0)


def _to_last_word(text: str) -> str:
    end = len(text)
    while end and not (text[end - 1].isalnum() or text[end - 1] == "_" or unicodedata.category(text[end - 1])[0] == "M"):
        end -= 1
    return text[:end]


class _Runs(NamedTuple):
    keys: Hashes
    text: Numbers
    at: Numbers


def _runs(hashes: Hashes, offsets: Offsets, size: int, *, whole: bool) -> _Runs:
    """All runs of `size` words; `whole`: of texts that have so many words and no more."""
    text = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    if len(hashes) < size:
        return _Runs(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
    rolled = hashes[: len(hashes) - size + 1].copy()
    for i in range(1, size):
        rolled = rolled * _STEP + hashes[i : len(hashes) - size + 1 + i]
    inside = text[: len(rolled)] == text[size - 1 :]
    if whole:
        inside &= np.diff(offsets)[text[: len(rolled)]] == size
    at = np.arange(len(rolled)) - offsets[text[: len(rolled)]]
    return _Runs(_keyed(rolled[inside], np.uint64(size)), text[: len(rolled)][inside].astype(np.int64), at[inside].astype(np.int64))


def _keyed(rolled: Hashes, size: np.uint64) -> Hashes:
    """As `_key`, of an array."""
    with np.errstate(over="ignore"):
        value = (rolled ^ (size << np.uint64(56))) + _STEP
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keyed: Hashes = value ^ (value >> np.uint64(31))
    return keyed


def _common(keys: Hashes, item: Numbers, of_set: Numbers) -> NDArray[np.bool_]:
    """Which entries are of a run that is common to the items of a set. Entries are sorted by (key, item)."""
    if not len(keys):
        return np.zeros(0, np.bool_)
    in_set = np.bincount(of_set)
    other_key = np.concatenate([[True], keys[1:] != keys[:-1]])
    other_item = other_key | np.concatenate([[True], item[1:] != item[:-1]])
    groups, where = np.unique(np.cumsum(other_key) * len(in_set) + of_set[item], return_inverse=True)
    many = np.bincount(where, weights=other_item)
    common = (many > COMMON) & (many > COMMON_SHARE * in_set[groups % len(in_set)])
    marked: NDArray[np.bool_] = common[where]
    return marked


@kernel
def _mark(flags: Any, starts: Any, item: Any, at: Any, size: Any, value: int) -> None:
    """Set the flags of the words of runs."""
    for k in range(item.shape[0]):
        first = starts[item[k]] + at[k]
        flags[first : first + size[k]] = value


@kernel
def _measure(item: Any, at: Any, size: Any, starts: Any, before: Any, longest: Any) -> None:
    """The most own words of each item in a stretch of runs that follow one another; runs are sorted by (item, at)."""
    first, last, where = 0, -1, 0
    for k in range(item.shape[0]):
        i = item[k]
        if i != last or at[k] != where + 1:
            first = at[k]
        last, where = i, at[k]
        longest[i] = max(longest[i], before[starts[i] + at[k] + size[k]] - before[starts[i] + first])


@kernel
def _key(rolled: Any, size: Any) -> Any:
    return mix(rolled ^ (np.uint64(size) << np.uint64(56)))


@kernel
def _fill_table(keys: Any, slots: Any, sieve: Any) -> None:
    mask = np.uint64(slots.shape[0] - 1)
    bits = np.uint64(sieve.shape[0] * 64 - 1)
    for k in range(keys.shape[0]):
        slot = keys[k] & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = k
        bit = (keys[k] >> np.uint64(24)) & bits
        sieve[bit >> np.uint64(6)] |= np.uint64(1) << (bit & np.uint64(63))


@kernel
def _search(
    data: Any,
    offsets: Any,
    first: int,
    last: int,
    classes: Any,
    lower: Any,
    longest: int,
    lengths: Any,
    powers: Any,
    fewest: int,
    keys: Any,
    slots: Any,
    sieve: Any,
    post: Any,
    post_item: Any,
    post_at: Any,
    starts: Any,
    before: Any,
    item_words: Any,
    needed: Any,
    run_item: Any,
    run: Any,
    run_needed: Any,
    run_first: Any,
    run_last: Any,
    share_item: Any,
    share: Any,
    share_first: Any,
    share_last: Any,
) -> None:
    n = item_words.shape[0]
    said = np.empty(longest + 1, np.uint64)
    rolled = np.empty(lengths.shape[0], np.uint64)
    # Of items: the text that met it last, and how many of its own words that holds from which word on.
    met, covered, from_word = np.full(n, -1, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
    # Of words of items: the text that covers it; the word of a text (numbered on) whose run ended with the run that begins here, and
    # how long the stretch of runs is that came with it.
    covers, met_at, stretch = np.full(starts[n], -1, np.int32), np.full(starts[n], -2, np.int64), np.zeros(starts[n], np.int64)
    said_before = np.int64(0)
    mask, bits, step = np.uint64(slots.shape[0] - 1), np.uint64(sieve.shape[0] * 64 - 1), np.uint64(0x9E3779B97F4A7C15)
    for i in range(first, last):
        count = words_of(data, offsets[i], offsets[i + 1], classes, lower, said)
        rolled[:] = np.uint64(0)
        nearest = 0.0
        for j in range(count):
            for k in range(lengths.shape[0]):
                size = lengths[k]
                rolled[k] = rolled[k] * step + said[j]
                if j >= size:
                    rolled[k] -= said[j - size] * powers[k]
                if j + 1 < size or (size < fewest and count != size):
                    continue
                key = _key(rolled[k], size)
                bit = (key >> np.uint64(24)) & bits
                if not (sieve[bit >> np.uint64(6)] >> (bit & np.uint64(63))) & np.uint64(1):
                    continue
                slot = key & mask
                while slots[slot] >= 0 and keys[slots[slot]] != key:
                    slot = (slot + np.uint64(1)) & mask
                entry = slots[slot]
                if entry < 0:
                    continue
                for p in range(post[entry], post[entry + 1]):
                    item, at = post_item[p], post_at[p]
                    if met[item] != i:
                        met[item], covered[item], from_word[item] = i, 0, j - size + 1
                    here = starts[item] + at
                    follows = at > 0 and met_at[here - 1] == said_before + j - 1
                    stretch[here] = stretch[here - 1] + 1 if follows else size
                    met_at[here] = said_before + j
                    end = starts[item] + at + size
                    for w in range(end - size, end):
                        if covers[w] != i - first:
                            covers[w] = np.int32(i - first)
                            covered[item] += before[w + 1] - before[w]
                    own = before[end] - before[end - stretch[here]]
                    if own > nearest * needed[item] and (needed[item] >= fewest or count == starts[item + 1] - starts[item]):
                        nearest = own / needed[item]
                        run_item[i], run[i], run_needed[i] = item, own, needed[item]
                        run_first[i], run_last[i] = j - stretch[here] + 1, j
                    if item_words[item] >= fewest and (covered[item] > share[i] * item_words[item] or item == share_item[i]):
                        share_item[i], share[i] = item, covered[item] / item_words[item]
                        share_first[i], share_last[i] = from_word[item], j
        said_before += count + 2  # so that no text follows on another


@kernel
def _places_before(data: Any, start: int, end: int, classes: Any, lower: Any, word: int) -> int:
    """The byte at which word number `word` of a text begins, or the text's end; a bisection, since words are counted and not placed."""
    nothing = np.empty(0, np.uint64)
    low, high = start, end
    while low < high:
        middle = (low + high) // 2
        if words_of(data, start, middle, classes, lower, nothing) > word:
            high = middle
        else:
            low = middle + 1
    # `low` is the first length that holds a piece of the word: the word begins with the character that ends there.
    if words_of(data, start, low, classes, lower, nothing) <= word:
        return end
    low -= 1
    while low > start and (data[low] & 0xC0) == 0x80:
        low -= 1
    return low


@kernel
def _word_places(data: Any, start: int, end: int, classes: Any, lower: Any, first: int, last: int) -> Any:
    """The bytes from the start of word `first` to that of the word after `last`."""
    return _places_before(data, start, end, classes, lower, first), _places_before(data, start, end, classes, lower, last + 1)

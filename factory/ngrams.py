"""Runs of n words, counted over a whole set of texts at once: distinct-n, self-repetition and self-BLEU are sums over the same counts.

An n-gram is known by 64 bits of a hash: among three million different ones the odds are 1 in 4 million that two are taken for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from factory.words import Hashes, Offsets

Counts = NDArray[np.int64]
Numbers = NDArray[np.float64]

_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word's hash is lost
_NO_MATCH = 0.1  # what BLEU's smoothing counts where nothing matched: method 1 of Chen & Cherry 2014, as in nltk


class Grams(NamedTuple):
    """The n-grams of `texts` texts: one entry for each different n-gram of each text, all entries of an n-gram together."""

    texts: int
    text: NDArray[np.intp]  # whose the entry is
    gram: NDArray[np.intp]  # which n-gram, numbered from 0
    times: Counts  # how often it stands in that text

    @property
    def starts(self) -> NDArray[np.intp]:
        """The first entry of each n-gram."""
        return np.flatnonzero(np.diff(self.gram, prepend=-1))

    @property
    def totals(self) -> Counts:
        """How often each n-gram stands in all texts."""
        return np.add.reduceat(self.times, self.starts) if len(self.times) else self.times

    def by_text(self, values: Counts) -> Numbers:
        """The sum over each text's entries, shape (texts,)."""
        return np.bincount(self.text, values, self.texts).astype(np.float64)


def grams(hashes: Hashes, offsets: Offsets, n: int) -> Grams:
    """Count the n-grams of words; none reaches over the end of a text. Words as `words` gives them."""
    text = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    hashed = hashes
    for i in range(1, n):
        hashed = hashed[:-1] * _STEP + hashes[i:]
    inside = text[: len(hashed)] == text[n - 1 :]
    hashed, text = hashed[inside], text[: len(hashed)][inside]
    order = np.argsort(hashed, kind="stable")  # stable: the texts of an n-gram stay in order
    hashed, text = hashed[order], text[order]
    other = np.ones(len(hashed), np.bool_)
    other[1:] = hashed[1:] != hashed[:-1]
    entry = other.copy()
    entry[1:] |= text[1:] != text[:-1]
    first = np.flatnonzero(entry)
    return Grams(len(offsets) - 1, text[first], np.cumsum(other)[first] - 1, np.diff(first, append=len(hashed)))


def distinct(grams: Grams) -> float | None:
    """Different n-grams by all of them: distinct-n (Li et al. 2016, "A Diversity-Promoting Objective Function"). Falls as a set grows."""
    return len(grams.starts) / float(grams.times.sum()) if len(grams.times) else None


def distinct_in(grams: Grams, drawn: int) -> float | None:
    """The share of different ones among `drawn` n-grams, expected where so many are drawn from all; None where there are fewer.

    This is rarefaction (Hurlbert 1971, "The Nonconcept of Species Diversity"), which for words is known as HD-D (McCarthy &
    Jarvis 2010, "MTLD, vocd-D, and HD-D"): the mean over every possible sample of a fixed number of n-grams, in closed form.
    So it depends neither on how many texts there are, nor on how long they are, nor on their order, as windows would.
    Expectation-adjusted distinct (Liu et al. 2022) has the same aim, and wants to be told the size of the vocabulary from which
    n-grams are drawn evenly: words are not drawn evenly, and for n above 1 nobody knows that size.
    """
    total = int(grams.times.sum())
    if total < drawn:
        return None
    counts, of_count = np.unique(grams.totals, return_counts=True)
    with np.errstate(divide="ignore"):  # log 0 where no sample can miss the n-gram
        missed = np.log1p(-np.minimum(counts[:, None] / (total - np.arange(drawn)), 1)).sum(axis=1)
    return float((of_count * -np.expm1(missed)).sum() / drawn)


def self_repetition(grams: Grams) -> float | None:
    """The mean over texts of log(1 + r), r: how often the text's different n-grams stand in other texts, each text counted once.

    Salkar et al. 2022, "Self-Repetition in Abstractive Neural Summarizers", with n = 4, as Shaib et al. 2024 measure it. 0: no text
    shares one with any other.
    """
    if not grams.texts:
        return None
    others = np.bincount(grams.gram)[grams.gram] - 1
    return float(np.log1p(grams.by_text(others)).mean())


def self_bleu(counted: Sequence[Grams]) -> float | None:
    """The mean BLEU (Papineni et al. 2002) of each text with all others as its references (Zhu et al. 2018, "Texygen").

    `counted`: the 1-grams, 2-grams and so on of the same texts, weighed alike. Exact over all texts, and linear: of what the other
    texts hold, BLEU asks no more than each n-gram's highest count, and the length that is closest (the shorter of two). Where no
    n-gram matches, 0.1 does (Chen & Cherry 2014, method 1); a text without a match of one word has 0. Rises as a set grows.
    """
    if counted[0].texts < 2:
        return None
    matched = [grams.by_text(np.minimum(grams.times, _elsewhere(grams))) for grams in counted]
    possible = [grams.by_text(grams.times).clip(1) for grams in counted]
    logs = [np.log(np.where(m, m, _NO_MATCH) / p) for m, p in zip(matched, possible, strict=True)]
    lengths = counted[0].by_text(counted[0].times).astype(np.int64)
    brevity = np.exp(np.minimum(1 - _closest(lengths) / lengths.clip(1), 0))
    return float(np.where(matched[0], brevity * np.exp(np.mean(logs, axis=0)), 0).mean())


def _elsewhere(grams: Grams) -> Counts:
    """For each entry, the highest count of its n-gram in any other text: the highest of all, or the second where that one is its own."""
    if not len(grams.times):
        return grams.times
    starts = grams.starts
    highest = np.maximum.reduceat(grams.times, starts)[grams.gram]
    top = grams.times == highest
    alone = np.add.reduceat(top.astype(np.int64), starts)[grams.gram] == 1
    second = np.maximum.reduceat(np.where(top, 0, grams.times), starts)[grams.gram]
    return np.where(top & alone, second, highest)


def _closest(lengths: Counts) -> Counts:
    """For each text the length of another that is closest to its own."""
    found, place, count = np.unique(lengths, return_inverse=True, return_counts=True)
    shorter, longer = np.roll(found, 1), np.roll(found, -1)
    closest = np.where(found - shorter <= longer - found, shorter, longer)
    closest[0], closest[-1] = longer[0], shorter[-1]  # the ends have one neighbour; a single length has itself
    return np.where(count > 1, found, closest)[place]

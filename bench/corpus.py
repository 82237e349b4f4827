"""Texts to find duplicates in: a random walk over the words of the documentation that installed packages carry, with planted copies.

A walk goes on, from each word, with a word that follows it somewhere in the documentation. So the words are as common as in real
text and neighbours go together, there is as much of it as is wanted, and no two passages are alike but those that are planted.
"""

from __future__ import annotations

import re
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
WORD = re.compile(r"[^\W\d_]+")  # of letters alone: every engine cuts such text into the same words
PLANTED = 0.1  # of the texts are copies of others, with some words changed
MOST_CHANGED = 0.08  # of a copy's words


class Corpus(NamedTuple):
    """`texts`, of which text `copy[i]` is made from text `original[i]`."""

    texts: pl.Series
    original: NDArray[np.int64]
    copy: NDArray[np.int64]


@cache
def _walks() -> tuple[list[str], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The vocabulary, the documentation's words, where each word of the vocabulary stands in it, and where those lists begin."""
    found: list[str] = []
    for root in sorted({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]}):
        for path in sorted(Path(root).rglob("*.py")):
            if path.is_file():
                for part in dict.fromkeys(DOCSTRING.findall(path.read_text(errors="ignore"))):
                    found += WORD.findall(part.lower())
    series = pl.Series(found)
    vocabulary = series.unique().sort().to_list()
    words = series.replace_strict(vocabulary, np.arange(len(vocabulary)), return_dtype=pl.Int64).to_numpy()
    places = np.argsort(words[:-1], kind="stable")
    starts = np.searchsorted(words[:-1], np.arange(len(vocabulary) + 1), sorter=places)
    return vocabulary, words, places, starts


def corpus(count: int, shortest: int, longest: int, *, mean: float | None = None, seed: int = 0) -> Corpus:
    """`count` texts of `shortest` to `longest` words, in random order."""
    vocabulary, words, places, starts = _walks()
    rng = np.random.default_rng(seed)
    own = count - round(PLANTED * count)
    if mean is None:
        lengths = rng.integers(shortest, longest + 1, own)
    else:  # many short ones and few long ones
        lengths = np.minimum(shortest + rng.exponential(mean - shortest, own).astype(np.int64), longest)
    walks = np.empty((longest, own), np.int32)
    at = words[rng.integers(0, len(words) - 1, own)]
    for step in range(longest):
        walks[step] = at
        many = np.maximum(starts[at + 1] - starts[at], 1)
        following = words[places[np.minimum(starts[at] + (rng.random(own) * many).astype(np.int64), len(places) - 1)] + 1]
        at = following
    rows = [walks[:length, i] for i, length in enumerate(lengths)]
    original = rng.integers(0, own, count - own)
    for i in original:
        row = rows[i].copy()
        changed = rng.random(len(row)) < rng.random() * MOST_CHANGED
        row[changed] = rng.integers(0, len(vocabulary), int(changed.sum()))
        rows.append(row)
    order = rng.permutation(count)
    place = np.argsort(order)
    names = vocabulary
    texts = [" ".join([names[word] for word in rows[i].tolist()]) for i in order]
    return Corpus(pl.Series("text", texts), place[original], place[own:])

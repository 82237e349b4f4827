"""Texts as words, by the rules of Unicode and at the speed of the machine: near duplicates and diversity both count words.

Words are those of Unicode's default word boundaries (UAX #29, https://www.unicode.org/reports/tr29/) that hold a letter, a
digit or an underscore, in lower case: "can't" and "3.5" are one, "C#" is "c". Ideographs, Hiragana, and the letters of scripts
that are written without spaces and need a dictionary (Thai, Lao, Khmer, Burmese) are a word each.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.kernels import kernel

Bytes = NDArray[np.uint8]
Hashes = NDArray[np.uint64]
Offsets = NDArray[np.int64]

# Classes of characters. A joiner is part of a word only between two letters, two digits, or either.
APART, LETTER, DIGIT, ALONE, EXTENDS, JOINS_LETTERS, JOINS_DIGITS, JOINS_BOTH, KATAKANA, LINKS = range(10)
_JOINERS = {
    **dict.fromkeys("·:·՟״‧︓﹕：", JOINS_LETTERS),
    **dict.fromkeys(",;;։؍٬⁄︐︔﹐﹔，；", JOINS_DIGITS),
    **dict.fromkeys("'.‘’․﹒＇．", JOINS_BOTH),
}
_ALONE = (
    "CJK UNIFIED",
    "CJK COMPATIBILITY",
    "HIRAGANA",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TAI LE",
    "NEW TAI LUE",
    "TAI THAM",
    "YI SYLLABLE",
)
_PLANES = 0x20000  # characters that have a place in the tables; of those above, the ideographs of planes 2 and 3 stand alone


class Texts(NamedTuple):
    """Texts as one array of UTF-8 bytes; text i is data[offsets[i] : offsets[i + 1]]."""

    data: Bytes
    offsets: Offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1


def flat(texts: pl.Series | Sequence[str]) -> Texts:
    """The bytes of texts, in NFKC; None counts as empty. Takes twice the memory of the texts for a moment."""
    series = (texts if isinstance(texts, pl.Series) else pl.Series(texts, dtype=pl.String)).fill_null("")
    parts = series.cast(pl.Binary).to_list()
    found = _joined(parts)
    if not (series.str.len_bytes() == series.str.len_chars()).all():  # ASCII is in NFKC as it is, and most of the rest is
        changes = np.zeros(len(series), np.bool_)
        _may_change(*found, _unstable(), changes)
        if changes.any():
            for row in np.flatnonzero(changes).tolist():
                parts[row] = unicodedata.normalize("NFKC", parts[row].decode()).encode()
            found = _joined(parts)
    return found


def _joined(parts: list[bytes]) -> Texts:
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=offsets[1:])
    return Texts(np.frombuffer(b"".join(parts), np.uint8), offsets)


def words(texts: Texts) -> tuple[Hashes, Offsets]:
    """The words of all texts as 64-bit hashes, and where each text's begin: those of text i are hashes[offsets[i] : offsets[i + 1]]."""
    classes, lower = tables()
    counts = np.zeros(len(texts) + 1, np.int64)
    _count(texts.data, texts.offsets, classes, lower, counts)
    offsets = np.cumsum(counts)
    hashes = np.empty(int(offsets[-1]), np.uint64)
    _fill(texts.data, texts.offsets, classes, lower, hashes, offsets)
    return hashes, offsets


@cache
def tables() -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """The class and the lower case of every character below `_PLANES`."""
    classes, lower = np.zeros(_PLANES, np.uint8), np.arange(_PLANES, dtype=np.uint32)
    for code in range(_PLANES):
        character = chr(code)
        kind = unicodedata.category(character)
        if kind[0] == "L":
            name = unicodedata.name(character, "") if kind in ("Lo", "Lm") and code > 0x0E00 else ""
            classes[code] = ALONE if name.startswith(_ALONE) else KATAKANA if "KATAKANA" in name else LETTER
            small = character.lower()
            lower[code] = ord(small) if len(small) == 1 else code
        elif kind in ("Nd", "Nl", "No"):
            classes[code] = DIGIT
        elif kind == "Pc":
            classes[code] = LINKS
        elif kind[0] == "M" or kind == "Cf":
            classes[code] = EXTENDS
        elif character in _JOINERS:
            classes[code] = _JOINERS[character]
    return classes, lower


@cache
def _unstable() -> NDArray[np.bool_]:
    """The characters below `_PLANES` that NFKC changes, or may change beside others (UAX #15, its quick check)."""
    found = np.zeros(_PLANES, np.bool_)
    for code in range(0x80, _PLANES):
        character = chr(code)
        decomposed = unicodedata.decomposition(character)
        if unicodedata.combining(character) or (decomposed and unicodedata.normalize("NFKC", character) != character):
            found[code] = True
        if decomposed and decomposed[0] != "<":  # what it is composed with
            found[[int(part, 16) for part in decomposed.split()[1:]]] = True
    found[0x1161:0x1176] = found[0x11A8:0x11C3] = True  # the vowels and finals of Hangul, which are composed by a rule
    return found


@kernel
def _may_change(data: Any, offsets: Any, unstable: Any, changes: Any) -> None:
    for i in range(offsets.shape[0] - 1):
        place, end = offsets[i], offsets[i + 1]
        while place < end:
            if data[place] < 0x80:
                place += 1
                continue
            code, length = character_at(data, place, end)
            if code >= unstable.shape[0] or unstable[code]:
                changes[i] = True
                break
            place += length


@kernel
def character_at(data: Any, place: int, end: int) -> Any:
    """(code, length in bytes) of the UTF-8 character at `place`."""
    first = np.int64(data[place])
    if first < 0x80:
        return first, 1
    if first < 0xE0 and place + 1 < end:
        return (first & 0x1F) << 6 | (np.int64(data[place + 1]) & 0x3F), 2
    if first < 0xF0 and place + 2 < end:
        return (first & 0x0F) << 12 | (np.int64(data[place + 1]) & 0x3F) << 6 | (np.int64(data[place + 2]) & 0x3F), 3
    if place + 3 < end:
        high = (first & 0x07) << 18 | (np.int64(data[place + 1]) & 0x3F) << 12
        return high | (np.int64(data[place + 2]) & 0x3F) << 6 | (np.int64(data[place + 3]) & 0x3F), 4
    return np.int64(0xFFFD), end - place


@kernel
def class_of(code: int, classes: Any) -> Any:
    """The class of a character, also above the tables."""
    if code < classes.shape[0]:
        return classes[code]
    return np.uint8(3) if code < 0x40000 else np.uint8(1) if code < 0xE0000 else np.uint8(4)


@kernel
def mix(value: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the input reaches every bit of the output."""
    value = np.uint64(value) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@kernel
def words_of(data: Any, start: int, end: int, classes: Any, lower: Any, out: Any) -> int:
    """Write the hashes of one text's words to `out`; gives how many there are. `out` must have room for a word a byte, or for none.

    Into an `out` without room nothing is written: the words are counted.
    """
    writes = out.shape[0] > 0
    count = 0
    state = 0  # the class of the word's last character; 0: in no word
    hashed = np.uint64(0xCBF29CE484222325)
    place = start
    while place < end:
        first = data[place]
        if first < 0x80 and state == 1 and classes[first] == 1:  # most bytes are this: another letter
            hashed = (hashed ^ np.uint64(lower[first])) * np.uint64(0x100000001B3)
            place += 1
            continue
        code, length = np.int64(first), 1
        if code >= 0x80:
            code, length = character_at(data, place, end)
        kind = class_of(code, classes)
        place += length
        if 5 <= kind <= 7:  # a joiner
            joins = False
            if place < end and (state == 1 or state == 2):
                following, _ = character_at(data, place, end)
                after = class_of(following, classes)
                joins = after == state and (kind == 7 or (kind == 5) == (state == 1))
            if not joins:
                kind = np.uint8(0)
        elif kind == 4 and state == 0:
            kind = np.uint8(0)
        # Katakana goes together with Katakana alone, but for an underscore, which links all.
        differs = (state == 8) != (kind == 8) and state != 9 and kind != 9 and kind != 4
        if state and (kind == 0 or kind == 3 or differs or (state == 3 and kind != 4)):
            if writes:
                out[count] = mix(hashed)
            count += 1
            state = 0
        if kind:
            if state == 0:
                hashed = np.uint64(0xCBF29CE484222325)
            if code < lower.shape[0]:
                code = np.int64(lower[code])
            if code == 0x2018 or code == 0x2019:
                code = np.int64(0x27)
            hashed = (hashed ^ np.uint64(code)) * np.uint64(0x100000001B3)
            if kind != 4:
                state = int(kind)
    if state:
        if writes:
            out[count] = mix(hashed)
        count += 1
    return count


@kernel
def _count(data: Any, offsets: Any, classes: Any, lower: Any, counts: Any) -> None:
    nothing = np.empty(0, np.uint64)
    for i in range(offsets.shape[0] - 1):
        counts[i + 1] = words_of(data, offsets[i], offsets[i + 1], classes, lower, nothing)


@kernel
def _fill(data: Any, offsets: Any, classes: Any, lower: Any, hashes: Any, places: Any) -> None:
    for i in range(offsets.shape[0] - 1):
        if places[i + 1] > places[i]:
            words_of(data, offsets[i], offsets[i + 1], classes, lower, hashes[places[i] : places[i + 1]])

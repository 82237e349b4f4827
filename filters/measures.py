"""What the rules measure of texts, in one reading of their bytes: a pass of polars for each of them would read a million rows thirty times.

Words are counted as a user counts them: what stands between spaces; in scripts without spaces, letters. Words that are compared
(repetition, copies) are runs of letters, marks and digits in lower case. 64-bit hashes stand for the words that are compared.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.kernels import kernel
from factory.words import Hashes, Texts, character_at, mix, tables
from filters.markdown import fault

Numbers = NDArray[np.int64]

SHORT = 12  # words: a text up to here is compared letter by letter, a longer one by its runs of words
RUN = 5  # words
TRIGRAMS = 6  # a text with fewer trigrams of words repeats nothing
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"  # scripts without spaces: a letter counts as a word

# What is known of a character.
SPACE, ALONE, WORDY, LETTER, ALNUM, CONTROL, CLOSING = 1, 2, 4, 8, 16, 32, 64
_CLASSES = {
    SPACE: r"\s",
    ALONE: UNSPACED,
    WORDY: rf"[\p{{L}}\p{{M}}\p{{N}}--{UNSPACED}]",
    LETTER: r"\p{L}",
    ALNUM: r"[\p{L}\p{N}]",
    CONTROL: r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x{84}\x{86}-\x{9f}\x{fffd}]",  # the last stands for bytes that were no text
    CLOSING: r"[\p{Po}\p{Pe}\p{Pf}\p{Pi}\p{S}--[,;:،、，；：]]|[\"']",
}
_LAST = 0x34000  # above it there are no letters, and of marks only the selectors of variants

# The columns of what is counted in a text.
CHARS, WORDS, LETTERS, VISIBLE, MEANT, CONTROLS, RUN_OF_LETTERS, RUN_OF_ANY, RUN_OF_WORDS, LINES, OPEN, CLOSED, MARKDOWN = range(13)
SEEN, SEEN_TOO, FOUND = range(13, 16)
COLUMNS = 16
BEYOND_ASCII = 63  # the bit of SEEN_TOO for characters that are not ASCII


class Measured(NamedTuple):
    """What was measured of n texts, or of n pairs of a text and what it may have been copied from."""

    counts: Numbers  # (n, COLUMNS)
    repeated: NDArray[np.float64]  # the share of a text's word trigrams that stood in it before (after Rae et al. 2021, A.1.1)


class Seeds(NamedTuple):
    """The runs of words and the letters of seeds, so that copies of them are found: places in them by hash."""

    keys: Hashes  # of an open table; 0: free
    starts: NDArray[np.int64]  # where a key's places begin in `seed` and `place`
    ends: NDArray[np.int64]
    seed: NDArray[np.int64]
    place: NDArray[np.int64]
    words: NDArray[np.int64]  # of each seed
    first: NDArray[np.int64]  # where each seed's words begin among the words of all
    trigrams: NDArray[np.int64]  # of letters, of each seed that is short


def packed(texts: pl.Series) -> Texts:
    """The bytes of texts; None counts as empty."""
    parts = texts.fill_null("").cast(pl.Binary).to_list()
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=offsets[1:])
    return Texts(np.frombuffer(b"".join(parts), np.uint8), offsets)


@cache
def characters() -> NDArray[np.uint8]:
    """What is known of every character below `_LAST`, as bits: by polars' own regular expressions, whose Unicode the rules speak."""
    codes = [code for code in range(_LAST) if not 0xD800 <= code < 0xE000]
    every = pl.Series([chr(code) for code in codes])
    known = np.zeros(_LAST, np.uint8)
    for bit, pattern in _CLASSES.items():
        known[codes] |= every.str.contains(pattern).to_numpy().astype(np.uint8) * np.uint8(bit)
    return known


def words_to_find(words: list[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """A table of words for `measure`, which sets bit i of FOUND where word i of at most 62 stands in a text."""
    keys, bits = np.zeros(512, np.uint64), np.zeros(512, np.int64)
    for bit, hashed in enumerate(_words_of_each(words)):
        slot = int(hashed) & 511
        while keys[slot]:
            slot = (slot + 1) & 511
        keys[slot], bits[slot] = hashed, 1 << bit
    return keys, bits


def _words_of_each(words: list[str]) -> Hashes:
    known, lower = characters(), tables()[1]
    hashes = np.zeros(len(words), np.uint64)
    texts = packed(pl.Series(words, dtype=pl.String))
    room = np.empty(64, np.uint64)
    for i in range(len(words)):
        assert compared(texts.data, texts.offsets[i], texts.offsets[i + 1], known, lower, room) == 1, words[i]
        hashes[i] = room[0]
    return hashes


def measure(texts: Texts, find: tuple[Hashes, NDArray[np.int64]]) -> Measured:
    """Measure each text alone."""
    counts, repeated = np.zeros((len(texts), COLUMNS), np.int64), np.zeros(len(texts), np.float64)
    _measure(*texts, characters(), tables()[1], *find, counts, repeated)
    return Measured(counts, repeated)


def index(texts: Texts) -> Seeds:
    """What `copied` looks seeds up in."""
    known, lower = characters(), tables()[1]
    size = len(texts.data) + 4 * len(texts) + 1
    hashes, seed, place = np.empty(2 * size, np.uint64), np.empty(2 * size, np.int64), np.empty(2 * size, np.int64)
    words, trigrams = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
    count = _list_grams(*texts, known, lower, hashes, seed, place, words, trigrams)
    order = np.lexsort((place[:count], seed[:count], hashes[:count]))
    hashes, seed, place = hashes[:count][order], seed[:count][order], place[:count][order]
    begins = np.flatnonzero(np.diff(hashes, prepend=np.uint64(0)) != 0)
    room = 1 << max(4, int(4 * len(begins)).bit_length())
    keys, starts, ends = np.zeros(room, np.uint64), np.zeros(room, np.int64), np.zeros(room, np.int64)
    _fill_table(hashes, begins, keys, starts, ends)
    return Seeds(keys, starts, ends, seed, place, words, np.cumsum(words) - words, trigrams)


def copied(texts: Texts, seeds: Seeds) -> NDArray[np.float64]:
    """How much of each text stands in one seed, or of a seed in it; 0 to 1.

    Of long texts, the share of words that stand in runs of five or more words of the other. Of those of at most twelve words,
    which a run says little of, the Dice coefficient of their letter trigrams, which stands for edit similarity.
    """
    shares = np.zeros(len(texts), np.float64)
    _copied(*texts, characters(), tables()[1], *seeds, shares)
    return shares


def echoed(outputs: Texts, inputs: Texts, systems: Texts) -> tuple[NDArray[np.float64], Numbers]:
    """How much of each output stands in its own input, and the longest run of its words that stands in its system prompt.

    Of an output with at least `RUN` + 3 words, the share of its runs of five words; of a shorter one, 1 where it is the input.
    Without an output or without words in it: NaN. A run is found by fives, so one of fewer than five words counts as none.
    """
    shares, runs = np.full(len(outputs), np.nan), np.zeros(len(outputs), np.int64)
    _echoed(*outputs, *inputs, *systems, characters(), tables()[1], shares, runs)
    return shares, runs


# -- kernels ---------------------------------------------------------------------------------------------------------------


@kernel
def _known(code: int, known: Any) -> Any:
    if code < known.shape[0]:
        return known[code]
    return np.uint8(WORDY) if 0xE0100 <= code < 0xE01F0 else np.uint8(0)


@kernel
def compared(data: Any, start: int, end: int, known: Any, lower: Any, out: Any) -> int:
    """Write the hashes of the words that are compared to `out`, which has room for a word a byte; gives how many there are."""
    count, place = 0, start
    within = False
    hashed = np.uint64(0xCBF29CE484222325)
    while place < end:
        code, length = np.int64(data[place]), 1
        if code >= 0x80:
            code, length = character_at(data, place, end)
        place += length
        kind = _known(code, known)
        if kind & WORDY:
            if code < lower.shape[0]:
                code = np.int64(lower[code])
            hashed = (hashed ^ np.uint64(code)) * np.uint64(0x100000001B3)
            within = True
            continue
        if within:
            out[count] = mix(hashed)
            count += 1
            within = False
            hashed = np.uint64(0xCBF29CE484222325)
        if kind & ALONE:
            out[count] = mix((hashed ^ np.uint64(code)) * np.uint64(0x100000001B3))
            count += 1
    if within:
        out[count] = mix(hashed)
        count += 1
    return count


@kernel
def _letters(data: Any, start: int, end: int, known: Any, lower: Any, out: Any) -> int:
    """Write the hashes of a short text's letter trigrams, its words in lower case between spaces; gives how many there are."""
    before, last = np.uint64(32), np.uint64(32)
    count, place = 0, start
    within = False
    any_word = False
    while place < end:
        code, length = character_at(data, place, end)
        place += length
        kind = _known(code, known)
        if not kind & (WORDY | ALONE):
            within = False
            continue
        if any_word and (not within or kind & ALONE):
            out[count] = _three(before, last, np.uint64(32))
            count += 1
            before, last = last, np.uint64(32)
        any_word = True
        within = not kind & ALONE
        small = np.uint64(lower[code]) if code < lower.shape[0] else np.uint64(code)
        out[count] = _three(before, last, small)
        count += 1
        before, last = last, small
    if any_word:
        out[count] = _three(before, last, np.uint64(32))
        count += 1
    return count


@kernel
def _three(a: Any, b: Any, c: Any) -> Any:
    return mix(((a << np.uint64(21) | b) << np.uint64(21) | c) ^ np.uint64(0x9E3779B97F4A7C15))


@kernel
def _gram(words: Any, at: int, n: int) -> Any:
    hashed = np.uint64(n)
    for k in range(n):
        hashed = (hashed ^ words[at + k]) * np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(29)
    return hashed | np.uint64(1)  # never 0, which stands for a free place


@kernel
def _room(count: int) -> int:
    room = 16
    while room < 2 * (count + 1):
        room *= 2
    return room


@kernel
def _put(value: Any, mask: Any, slots: Any, stamps: Any, stamp: int) -> bool:
    """Put `value` into the set that is marked by `stamp`; True where it was not in it."""
    slot = value & mask
    while stamps[slot] == stamp:
        if slots[slot] == value:
            return False
        slot = (slot + np.uint64(1)) & mask
    stamps[slot], slots[slot] = stamp, value
    return True


@kernel
def _has(value: Any, mask: Any, slots: Any, stamps: Any, stamp: int) -> bool:
    slot = value & mask
    while stamps[slot] == stamp:
        if slots[slot] == value:
            return True
        slot = (slot + np.uint64(1)) & mask
    return False


@kernel
def _longest(offsets: Any) -> int:
    longest = 0
    for i in range(offsets.shape[0] - 1):
        longest = max(longest, offsets[i + 1] - offsets[i])
    return longest


@kernel
def _measure(data: Any, offsets: Any, known: Any, lower: Any, keys: Any, bits: Any, counts: Any, repeated: Any) -> None:
    longest = _longest(offsets)
    words = np.empty(longest + 1, np.uint64)
    room = _room(longest)
    slots, stamps = np.empty(room, np.uint64), np.zeros(room, np.int64)
    stamp = 0
    for i in range(offsets.shape[0] - 1):
        start, end = offsets[i], offsets[i + 1]
        count = _count(data, start, end, known, lower, words, counts[i])
        found = np.int64(0)
        for j in range(count):
            slot = words[j] & np.uint64(511)
            while keys[slot]:
                if keys[slot] == words[j]:
                    found |= bits[slot]
                    break
                slot = (slot + np.uint64(1)) & np.uint64(511)
        counts[i, FOUND] = found
        if count - 2 >= TRIGRAMS:
            stamp += 1
            mask = np.uint64(_room(count) - 1)
            different = 0
            for j in range(count - 2):
                different += _put(_gram(words, j, 3), mask, slots, stamps, stamp)
            repeated[i] = 1 - different / (count - 2)
        if _seen(counts[i], 10):
            stamp += 1
            counts[i, LINES] = _repeated_lines(data, start, end, known, slots, stamps, stamp)
        if _seen(counts[i], 123) or _seen(counts[i], 91):  # braces and brackets
            counts[i, OPEN] = _open(data, start, end)
        if _seen(counts[i], 96) or _seen(counts[i], 42) or _seen(counts[i], 93) or _seen(counts[i], 124) or _seen(counts[i], 126):
            counts[i, MARKDOWN] = fault(data, start, end)


@kernel
def _seen(counts: Any, code: int) -> bool:
    """Whether an ASCII character stands in a text."""
    if code < 64:
        return bool(counts[SEEN] >> code & 1)
    return bool(counts[SEEN_TOO] >> (code - 64) & 1)


@kernel
def _count(data: Any, start: int, end: int, known: Any, lower: Any, words: Any, counts: Any) -> int:
    """Count characters, and write the hashes of words to `words`; gives how many there are."""
    chars, spaced, letters, visible, meant, controls = 0, 0, 0, 0, 0, 0
    run, longest_letters, longest_any = 0, 0, 0
    run_of_words, longest_words = 0, 0  # of words that hold a letter, in scripts with spaces: 0, 0, 0 and 哈哈哈 are said so
    before = np.int64(-1)
    seen, seen_too = np.int64(0), np.int64(0)
    in_spaced, within, closed = False, False, 0
    of_word = np.uint8(0)  # what is known of its characters
    hashed = np.uint64(0xCBF29CE484222325)
    count, place = 0, start
    while place < end:
        code, length = np.int64(data[place]), 1
        if code >= 0x80:
            code, length = character_at(data, place, end)
            seen_too |= np.int64(1) << 63
        elif code < 64:
            seen |= np.int64(1) << code
        elif code < 97 or code > 122:
            seen_too |= np.int64(1) << (code - 64)
        place += length
        chars += 1
        kind = _known(code, known)
        small = np.int64(lower[code]) if code < lower.shape[0] else code
        if small == before:
            run += 1
            longest_any = max(longest_any, run)
            if 97 <= small <= 122 or small == 33 or small == 63:
                longest_letters = max(longest_letters, run)
        else:
            run = 1
            before = small
        if kind & SPACE:
            in_spaced = False
            before = np.int64(-1)
        else:
            visible += 1
            closed = 1 if kind & CLOSING or code >= _LAST else 0
            if kind & ALONE:
                spaced += 1
                in_spaced = False
            elif not in_spaced:
                spaced += 1
                in_spaced = True
        if kind & CONTROL:
            controls += 1
        if kind & LETTER:
            letters += 1
        if kind & ALNUM:
            meant += 1
        if kind & WORDY:
            hashed = (hashed ^ np.uint64(small)) * np.uint64(0x100000001B3)
            within = True
            of_word |= kind
            continue
        if within:
            words[count] = mix(hashed)
            run_of_words = _run(run_of_words, of_word, words, count)
            longest_words = max(longest_words, run_of_words)
            count += 1
            within = False
            of_word = np.uint8(0)
            hashed = np.uint64(0xCBF29CE484222325)
        if kind & ALONE:
            words[count] = mix((hashed ^ np.uint64(code)) * np.uint64(0x100000001B3))
            count += 1
            run_of_words = 0
    if within:
        words[count] = mix(hashed)
        longest_words = max(longest_words, _run(run_of_words, of_word, words, count))
        count += 1
    counts[CHARS], counts[WORDS], counts[LETTERS], counts[VISIBLE], counts[MEANT], counts[CONTROLS] = (
        chars,
        spaced,
        letters,
        visible,
        meant,
        controls,
    )
    counts[RUN_OF_LETTERS], counts[RUN_OF_ANY], counts[CLOSED] = longest_letters, longest_any, closed
    counts[RUN_OF_WORDS], counts[SEEN], counts[SEEN_TOO] = longest_words, seen, seen_too
    return count


@kernel
def _run(run: int, of_word: Any, words: Any, last: int) -> int:
    """How often the last word stands in a row, after `run` of the one before it; 0 without a letter in it."""
    if not of_word & LETTER:
        return 0
    return run + 1 if run and words[last] == words[last - 1] else 1


@kernel
def _repeated_lines(data: Any, start: int, end: int, known: Any, slots: Any, stamps: Any, stamp: int) -> int:
    """How many lines of at least twelve characters, without the spaces around them, stood in the text before."""
    mask = np.uint64(_room((end - start) // 12) - 1)
    repeats, place = 0, start
    hashed, kept = np.uint64(0xCBF29CE484222325), np.uint64(0)
    chars, kept_chars = 0, 0
    while place <= end:
        code, length = np.int64(10), 1
        if place < end:
            code, length = character_at(data, place, end)
        place += length
        if code == 10:
            if kept_chars >= 12 and not _put(mix(kept), mask, slots, stamps, stamp):
                repeats += 1
            hashed, kept, chars, kept_chars = np.uint64(0xCBF29CE484222325), np.uint64(0), 0, 0
            continue
        space = _known(code, known) & SPACE
        if space and chars == 0:
            continue
        chars += 1
        hashed = (hashed ^ np.uint64(code)) * np.uint64(0x100000001B3)
        if not space:
            kept, kept_chars = hashed, chars
    return repeats


@kernel
def _open(data: Any, start: int, end: int) -> int:
    """How many brackets are open at the end of what begins as a JSON object or array of objects, strings or numbers; else 0."""
    place = start
    while place < end and data[place] <= 32:
        place += 1
    if place == end or (data[place] != 123 and data[place] != 91):
        return 0
    following = place + 1
    while following < end and data[following] <= 32:
        following += 1
    after = data[following] if following < end else 34
    number = 48 <= after <= 57 or after == 45
    if after != 34 and after != 123 and after != 91 and (data[place] == 123 or not number):
        return 0  # a bracket of prose
    depth = 0
    in_string = False
    while place < end:
        byte = data[place]
        if in_string:
            if byte == 92:
                place += 1
            elif byte == 34:
                in_string = False
        elif byte == 34:
            in_string = True
        elif byte == 123 or byte == 91:
            depth += 1
        elif byte == 125 or byte == 93:
            depth -= 1
            if depth == 0:
                return 0
        place += 1
    return depth


@kernel
def _list_grams(data: Any, offsets: Any, known: Any, lower: Any, hashes: Any, seed: Any, place: Any, words: Any, trigrams: Any) -> int:
    """List the runs of all seeds' words by their places, and the letter trigrams of short ones, each once."""
    longest = _longest(offsets)
    found = np.empty(longest + 1, np.uint64)
    letters = np.empty(2 * longest + 4, np.uint64)
    room = _room(2 * longest + 4)
    slots, stamps = np.empty(room, np.uint64), np.zeros(room, np.int64)
    count = 0
    for i in range(offsets.shape[0] - 1):
        start, end = offsets[i], offsets[i + 1]
        words[i] = compared(data, start, end, known, lower, found)
        for j in range(words[i] - RUN + 1):
            hashes[count], seed[count], place[count] = _gram(found, j, RUN), i, j
            count += 1
        if words[i] <= SHORT:
            many = _letters(data, start, end, known, lower, letters)
            mask = np.uint64(_room(many) - 1)
            for j in range(many):
                if _put(letters[j], mask, slots, stamps, i + 1):
                    hashes[count], seed[count], place[count] = letters[j] & ~np.uint64(1), i, 0
                    count += 1
                    trigrams[i] += 1
    return count


@kernel
def _fill_table(hashes: Any, begins: Any, keys: Any, starts: Any, ends: Any) -> None:
    mask = np.uint64(keys.shape[0] - 1)
    for k in range(begins.shape[0]):
        value = hashes[begins[k]]
        slot = (value >> np.uint64(20)) & mask
        while keys[slot]:
            slot = (slot + np.uint64(1)) & mask
        keys[slot], starts[slot] = value, begins[k]
        ends[slot] = begins[k + 1] if k + 1 < begins.shape[0] else hashes.shape[0]


@kernel
def _copied(
    data: Any,
    offsets: Any,
    known: Any,
    lower: Any,
    keys: Any,
    starts: Any,
    ends: Any,
    seed: Any,
    place: Any,
    seed_words: Any,
    first: Any,
    seed_trigrams: Any,
    shares: Any,
) -> None:
    longest = _longest(offsets)
    words, letters = np.empty(longest + 1, np.uint64), np.empty(2 * longest + 4, np.uint64)
    room = _room(64 * SHORT)
    slots, stamps = np.empty(room, np.uint64), np.zeros(room, np.int64)
    n = seed_words.shape[0]
    covered, reached, covered_seed, touched_at = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64), np.full(n, -1)
    touched = np.empty(n, np.int64)
    seed_at = np.full(seed_words.sum() + RUN, -1)
    mask = np.uint64(keys.shape[0] - 1)
    for i in range(offsets.shape[0] - 1):
        start, end = offsets[i], offsets[i + 1]
        count = compared(data, start, end, known, lower, words)
        many = 0
        for at in range(count - RUN + 1):
            value = _gram(words, at, RUN)
            slot = (value >> np.uint64(20)) & mask
            while keys[slot] and keys[slot] != value:
                slot = (slot + np.uint64(1)) & mask
            if not keys[slot]:
                continue
            for k in range(starts[slot], ends[slot]):
                s = seed[k]
                if touched_at[s] != i:
                    touched_at[s] = i
                    touched[many] = s
                    many += 1
                    covered[s] = reached[s] = covered_seed[s] = 0
                covered[s] += at + RUN - max(at, reached[s])
                reached[s] = at + RUN
                for j in range(first[s] + place[k], first[s] + place[k] + RUN):
                    if seed_at[j] != i:
                        seed_at[j] = i
                        covered_seed[s] += 1
        best = 0.0
        for k in range(many):
            s = touched[k]
            if count > SHORT:
                best = max(best, covered[s] / count)
            if seed_words[s] > SHORT:
                best = max(best, covered_seed[s] / seed_words[s])
        if 0 < count <= SHORT:
            best = max(best, _alike(data, start, end, known, lower, keys, starts, ends, seed, seed_trigrams, letters, slots, stamps, i))
        shares[i] = best


@kernel
def _alike(
    data: Any,
    start: int,
    end: int,
    known: Any,
    lower: Any,
    keys: Any,
    starts: Any,
    ends: Any,
    seed: Any,
    seed_trigrams: Any,
    letters: Any,
    slots: Any,
    stamps: Any,
    i: int,
) -> float:
    """The highest Dice coefficient of a short text's letter trigrams with those of a short seed."""
    many = _letters(data, start, end, known, lower, letters)
    if 2 * (many + 1) > slots.shape[0]:  # a "word" of thousands of letters
        slots, stamps = np.empty(_room(many), np.uint64), np.zeros(_room(many), np.int64)
    room = np.uint64(_room(many) - 1)
    mask = np.uint64(keys.shape[0] - 1)
    shared = np.zeros(seed_trigrams.shape[0], np.int64)
    different = 0
    for j in range(many):
        if not _put(letters[j], room, slots, stamps, i + 1):
            continue
        different += 1
        value = letters[j] & ~np.uint64(1)
        slot = (value >> np.uint64(20)) & mask
        while keys[slot] and keys[slot] != value:
            slot = (slot + np.uint64(1)) & mask
        if keys[slot]:
            for k in range(starts[slot], ends[slot]):
                shared[seed[k]] += 1
    best = 0.0
    for s in range(shared.shape[0]):
        if shared[s]:
            best = max(best, 2 * shared[s] / (different + seed_trigrams[s]))
    return best


@kernel
def _echoed(
    data: Any,
    offsets: Any,
    given: Any,
    given_offsets: Any,
    system: Any,
    system_offsets: Any,
    known: Any,
    lower: Any,
    shares: Any,
    runs: Any,
) -> None:
    words = np.empty(_longest(offsets) + 1, np.uint64)
    longest = max(_longest(given_offsets), _longest(system_offsets))
    others = np.empty(longest + 1, np.uint64)
    room = _room(longest)
    slots, stamps = np.empty(room, np.uint64), np.zeros(room, np.int64)
    stamp = 0
    for i in range(offsets.shape[0] - 1):
        if offsets[i + 1] == offsets[i]:
            continue
        count = compared(data, offsets[i], offsets[i + 1], known, lower, words)
        if count == 0:
            continue
        many = compared(given, given_offsets[i], given_offsets[i + 1], known, lower, others)
        if count < RUN + 3:
            same = many == count
            for j in range(count):
                same = same and words[j] == others[j]
            shares[i] = 1.0 if same else 0.0
        else:
            stamp += 1
            mask = np.uint64(_room(many) - 1)
            for j in range(many - RUN + 1):
                _put(_gram(others, j, RUN), mask, slots, stamps, stamp)
            shared = 0
            for j in range(count - RUN + 1):
                shared += _has(_gram(words, j, RUN), mask, slots, stamps, stamp)
            shares[i] = shared / (count - RUN + 1)
        if system_offsets[i + 1] > system_offsets[i] and count >= RUN:
            many = compared(system, system_offsets[i], system_offsets[i + 1], known, lower, others)
            stamp += 1
            mask = np.uint64(_room(many) - 1)
            for j in range(many - RUN + 1):
                _put(_gram(others, j, RUN), mask, slots, stamps, stamp)
            run = 0
            for j in range(count - RUN + 1):
                run = run + 1 if _has(_gram(words, j, RUN), mask, slots, stamps, stamp) else 0
                if run:
                    runs[i] = max(runs[i], run + RUN - 1)

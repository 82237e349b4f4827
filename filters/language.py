"""Which language a text is in: the model of py3langid, walked a batch at a time, since a loop over texts would take longer than all rules.

A naive Bayes over byte n-grams (Lui and Baldwin 2012, "langid.py"), as trained and shipped by py3langid, for 97 languages and
more. An automaton finds the n-grams while it reads the bytes; each that was found adds its row of log-probabilities.
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

CHUNK = 512  # texts whose n-grams are all found before they are scored: the automaton and the table push each other out of the caches
_COUNTS = 4096  # an n-gram that is found more often than this has its logarithm computed anew


class _Model(NamedTuple):
    """The arrays of the model: `moves` by row and byte, `rows` and `features` (-1: none) by state, `table` of features by classes."""

    labels: tuple[str, ...]  # of classes; two classes may have one label
    first: NDArray[np.int64]  # the first class with the same label
    moves: NDArray[np.uint32]
    rows: NDArray[np.int32]
    features: NDArray[np.int32]
    table: NDArray[np.float32]
    prior: NDArray[np.float32]
    logs: NDArray[np.float32]


@cache
def _model() -> _Model:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # 4.5 MB, and two seconds to unpack: when first asked

    found = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    labels = tuple(found.nb_classes)
    return _Model(
        labels,
        np.array([labels.index(label) for label in labels], np.int64),
        np.array(found.tk_nextmove, dtype=np.uint32),
        np.asarray(found.tk_row, np.int32),
        np.array([-1 if feature is None else feature for feature in found.tk_output], np.int32),
        np.pad(found.nb_ptc.astype(np.float32), ((0, 0), (0, -len(labels) % 16))),  # whole registers
        np.ascontiguousarray(found.nb_pc, np.float32),
        np.log1p(np.arange(_COUNTS, dtype=np.float32)),
    )


def codes() -> frozenset[str]:
    """The ISO 639 codes of all languages that can be told."""
    return frozenset(_model().labels)


def languages(texts: pl.Series, wanted: Sequence[str] = ()) -> pl.DataFrame:
    """For each text its likeliest `language`, that one's `probability`, and the probability of its being in a `wanted` one.

    As py3langid's own `rank` gives them, to the precision of 32-bit floats. Unsure texts get small probabilities in all languages.
    It lets go of Python's lock, so batches of texts can be told beside each other.
    """
    model, parts = _model(), _encoded(texts)
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=offsets[1:])
    data = np.frombuffer(b"".join(parts), np.uint8)
    sought = np.array([label in set(wanted) for label in model.labels], np.bool_)
    best = np.zeros(len(parts), np.int64)
    probability, in_wanted = np.zeros(len(parts), np.float64), np.zeros(len(parts), np.float64)

    for start in range(0, len(parts), CHUNK):
        lengths = np.diff(offsets[start : start + CHUNK + 1])
        order = start + np.argsort(lengths, kind="stable")
        _score(data, offsets, order, *model[1:], sought, best, probability, in_wanted)
    return pl.DataFrame(
        {"language": pl.Series(model.labels, dtype=pl.String).gather(best), "probability": probability, "wanted": in_wanted},
        schema={"language": pl.String(), "probability": pl.Float64(), "wanted": pl.Float64()},
    )


def _encoded(texts: pl.Series) -> list[bytes]:
    """The bytes that the model was trained on: NFC, and no shouting. Only what is not ASCII, or has capitals alone, takes a loop."""
    capitals = texts.str.contains("[A-Z]") & ~texts.str.contains("[a-z]")
    apart = capitals | (texts.str.len_bytes() != texts.str.len_chars())
    parts: list[bytes] = texts.cast(pl.Binary).to_list()
    for row in apart.arg_true().to_list():
        text = parts[row].decode()
        parts[row] = unicodedata.normalize("NFC", text.lower() if text.isupper() else text).encode()
    return parts


@kernel
def _score(
    data: Any,
    offsets: Any,
    order: Any,
    first: Any,
    moves: Any,
    rows: Any,
    features: Any,
    table: Any,
    prior: Any,
    logs: Any,
    sought: Any,
    best: Any,
    probability: Any,
    in_wanted: Any,
) -> None:
    """Score the texts that `order` names, which go from short to long."""
    classes = prior.shape[0]
    counts = np.zeros(table.shape[0], np.int32)
    met = np.empty(table.shape[0], np.int32)
    scores = np.empty(table.shape[1], np.float32)
    places = np.zeros(order.shape[0] + 1, np.int64)
    for k in range(order.shape[0]):
        places[k + 1] = places[k] + offsets[order[k] + 1] - offsets[order[k]]
    found = np.empty(places[-1], np.int32)
    _walk(data, offsets, order, places, moves, rows, features, found)
    for k in range(order.shape[0]):
        i, length = order[k], places[k + 1] - places[k]
        different = 0
        for place in range(places[k], places[k + 1]):
            feature = found[place]
            if feature >= 0:
                if counts[feature] == 0:
                    met[different] = feature
                    different += 1
                counts[feature] += 1
        _add(met[:different], counts, table, logs, scores)
        if different:  # without any feature all classes are as likely
            for j in range(classes):
                scores[j] += prior[j]
        scale = np.float32(1.0 / np.sqrt(np.float64(max(length, 1))))
        for j in range(classes):
            scores[j] *= scale
        highest = scores[:classes].max()
        total = np.float32(0)
        for j in range(classes):
            scores[j] = np.exp(scores[j] - highest)
            total += scores[j]
        for j in range(classes):
            if first[j] != j:
                scores[first[j]] += scores[j]
                scores[j] = 0
        likeliest = 0
        for j in range(classes):
            if scores[j] > scores[likeliest]:
                likeliest = j
            if sought[j]:
                in_wanted[i] += np.float64(scores[j] / total)
        best[i] = likeliest
        probability[i] = scores[likeliest] / total


@kernel
def _walk(data: Any, offsets: Any, order: Any, places: Any, moves: Any, rows: Any, features: Any, found: Any) -> None:
    """Write what the automaton finds at each byte; four texts by turns, as each step waits for memory."""
    byte = np.uint64(8)
    for k in range(0, order.shape[0], 4):
        last = min(k + 4, order.shape[0])
        states = np.zeros(4, np.uint64)
        together = 0
        if last == k + 4:
            together = places[k + 1] - places[k]
            a, b, c, d = offsets[order[k]], offsets[order[k + 1]], offsets[order[k + 2]], offsets[order[k + 3]]
            to_a, to_b, to_c, to_d = places[k], places[k + 1], places[k + 2], places[k + 3]
            in_a, in_b, in_c, in_d = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)  # written out, they stay in registers
            for step in range(together):
                in_a = np.uint64(moves[(np.uint64(rows[in_a]) << byte) + np.uint64(data[a + step])])
                in_b = np.uint64(moves[(np.uint64(rows[in_b]) << byte) + np.uint64(data[b + step])])
                in_c = np.uint64(moves[(np.uint64(rows[in_c]) << byte) + np.uint64(data[c + step])])
                in_d = np.uint64(moves[(np.uint64(rows[in_d]) << byte) + np.uint64(data[d + step])])
                found[to_a + step], found[to_b + step] = features[in_a], features[in_b]
                found[to_c + step], found[to_d + step] = features[in_c], features[in_d]
            states[0], states[1], states[2], states[3] = in_a, in_b, in_c, in_d
        for lane in range(last - k):
            state, start = states[lane], offsets[order[k + lane]] - places[k + lane]
            for place in range(places[k + lane] + together, places[k + lane + 1]):
                state = np.uint64(moves[(np.uint64(rows[state]) << byte) + np.uint64(data[start + place])])
                found[place] = features[state]


@kernel
def _add(met: Any, counts: Any, table: Any, logs: Any, scores: Any) -> None:
    """Set `scores` to the sum of the rows of `met`, weighed by the logarithms of their counts, which are set back to zero."""
    scores[:] = 0
    whole = met.shape[0] // 4 * 4
    for k in range(0, whole, 4):  # four rows a pass: the sums are read and written less often
        a, b, c, d = met[k], met[k + 1], met[k + 2], met[k + 3]
        of_a, of_b, of_c, of_d = _log(counts[a], logs), _log(counts[b], logs), _log(counts[c], logs), _log(counts[d], logs)
        counts[a] = counts[b] = counts[c] = counts[d] = 0
        for j in range(scores.shape[0]):
            scores[j] += (of_a * table[a, j] + of_b * table[b, j]) + (of_c * table[c, j] + of_d * table[d, j])
    for k in range(whole, met.shape[0]):
        weight = _log(counts[met[k]], logs)
        counts[met[k]] = 0
        for j in range(scores.shape[0]):
            scores[j] += weight * table[met[k], j]


@kernel
def _log(count: int, logs: Any) -> Any:
    return logs[count] if count < logs.shape[0] else np.float32(np.log1p(np.float64(count)))

"""Packs the likeliest tokens at each position of an answer into a short string, so that the ledger can hold them for every answer."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Sequence

Alternative = tuple[str, float]
Position = tuple[str, float, Sequence[Alternative]]

VERSION = "l1."
LARGEST = 65504.0  # of a half float; what is less than its negative, or no number, is kept as that
LARGE = 1 << 16


def pack(tokens: Sequence[Position]) -> str:
    """Turn (token, its log-probability, [(alternative, its log-probability)]) of each position into a string.

    Log-probabilities are kept as half floats (IEEE 754 binary16): to 1 part in 2,000, about three digits, and to 0.00000003
    near zero. Tokens are kept as they are. The string takes less than a twelfth of the JSON that a server sends for 20 of them.
    """
    number: dict[str, int] = {}  # of each token that occurs: most occur often
    chosen = [number.setdefault(token, len(number)) for token, _, _ in tokens]
    other = [number.setdefault(token, len(number)) for _, _, found in tokens for token, _ in found]
    texts = [token.encode("utf-8", "surrogatepass") for token in number]
    index = _index(len(number))
    parts = (
        struct.pack("<III", len(tokens), len(other), len(number)),
        _columns("I", (len(text) for text in texts)),
        b"".join(texts),
        _columns("I", (len(found) for _, _, found in tokens)),
        _columns(index, chosen),
        _columns(index, other),
        _columns("e", (_half(logprob) for _, logprob, _ in tokens)),
        _columns("e", (_half(logprob) for _, _, found in tokens for _, logprob in found)),
    )
    return VERSION + base64.b64encode(zlib.compress(b"".join(parts), 6)).decode()


def unpack(packed: str) -> list[tuple[str, float, list[Alternative]]]:
    """The positions that `pack` was given. Raises ValueError where the string is none of its, or of another version."""
    if not packed.startswith(VERSION):
        raise ValueError(f"no packed log-probabilities of version {VERSION!r}: {packed[:8]!r}")
    try:
        raw = zlib.decompress(base64.b64decode(packed[len(VERSION) :], validate=True))
        return _unpack(raw)
    except (ValueError, zlib.error, struct.error, IndexError) as error:
        raise ValueError(f"packed log-probabilities that are broken: {error}") from error


def _unpack(raw: bytes) -> list[tuple[str, float, list[Alternative]]]:
    positions, others, words = struct.unpack_from("<III", raw)
    at = 12

    def column(kind: str, count: int) -> tuple[float, ...]:
        nonlocal at
        size = struct.calcsize(kind) * count
        at += size
        return _values(kind, raw[at - size : at], count)

    texts = []
    for length in [int(length) for length in column("I", words)]:
        texts.append(raw[at : at + length].decode("utf-8", "surrogatepass"))
        at += length
    counts = [int(count) for count in column("I", positions)]
    if sum(counts) != others:
        raise ValueError("as many alternatives as positions have are not there")
    chosen, other = column(_index(words), positions), column(_index(words), others)
    logprobs, alternatives = column("e", positions), zip(other, column("e", others), strict=True)
    made: list[tuple[str, float, list[Alternative]]] = []
    for token, logprob, count in zip(chosen, logprobs, counts, strict=True):
        found = [(texts[int(i)], value) for i, value in (next(alternatives) for _ in range(count))]
        made.append((texts[int(token)], logprob, found))
    return made


def _index(words: int) -> str:
    return "H" if words <= LARGE else "I"


def _half(logprob: float) -> float:
    return max(-LARGEST, min(logprob, LARGEST))  # in this order, NaN becomes the least


def _columns(kind: str, values: Iterable[float]) -> bytes:
    """The values' first bytes, then all the second ones, and so on: like stands beside like, which compresses better."""
    listed = list(values)
    raw = struct.pack(f"<{len(listed)}{kind}", *listed)
    width = struct.calcsize(kind)
    return b"".join(raw[place::width] for place in range(width))


def _values(kind: str, columns: bytes, count: int) -> tuple[float, ...]:
    raw = bytearray(len(columns))
    width = struct.calcsize(kind)
    for place in range(width):
        raw[place::width] = columns[place * count : (place + 1) * count]
    return struct.unpack(f"<{count}{kind}", raw)

"""One engine finds the duplicate pairs in a file of texts or of vectors; prints what it took, and writes the pairs.

    python peer_duplicates.py ENGINE GIVEN OUT THRESHOLD

GIVEN: Parquet with a column `text`, compared by shingles of five words; or a .npy of unit vectors, compared by their cosine. OUT: a .npy
of pairs, the earlier row first. `naive` is what one would write in an afternoon, and misses nothing.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import Watch

SIZE = 5
HASHES, BANDS = 128, 16
BLOCK = 1024
Pairs = Iterable[tuple[int, int]]


def shingles(text: str) -> list[str]:
    """The shingles of a text, as they are made in Python."""
    words = text.lower().split()
    return [" ".join(words[i : i + SIZE]) for i in range(max(1, len(words) - SIZE + 1))]


def naive(texts: list[str], threshold: float) -> Iterator[tuple[int, int]]:
    """Counts what each text shares with each earlier one, by an index of all shingles."""
    index: dict[str, list[int]] = defaultdict(list)
    sizes: list[int] = []
    for i, text in enumerate(texts):
        own = set(shingles(text))
        shared: Counter[int] = Counter()
        for shingle in own:
            shared.update(index[shingle])
            index[shingle].append(i)
        yield from ((j, i) for j, common in shared.items() if common / (len(own) + sizes[j] - common) >= threshold)
        sizes.append(len(own))


def datasketch(texts: list[str], threshold: float) -> Iterator[tuple[int, int]]:
    """As its documentation shows it."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=HASHES)
    for i, text in enumerate(texts):
        sketch = MinHash(num_perm=HASHES)
        sketch.update_batch([shingle.encode() for shingle in set(shingles(text))])
        yield from ((j, i) for j in index.query(sketch))
        index.insert(i, sketch)


def rensa(texts: list[str], threshold: float) -> Iterator[tuple[int, int]]:
    """As its documentation shows it."""
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=threshold, num_perm=HASHES, num_bands=BANDS)
    for i, text in enumerate(texts):
        sketch = RMinHash(num_perm=HASHES, seed=42)
        sketch.update(shingles(text))
        yield from ((j, i) for j in index.query(sketch))
        index.insert(i, sketch)


def gristmill(texts: Any, threshold: float, mode: str) -> Pairs:
    """Ours, through its public function."""
    from factory.jaccard import pairs

    found = pairs(texts, threshold, shingle="words", size=SIZE, mode=mode)  # type: ignore[arg-type]
    return np.stack([found.earlier, found.later], axis=1)  # type: ignore[return-value]


def settled(texts: Any, threshold: float, shingle: str, size: int) -> Pairs:
    """Ours, as a run uses it: which texts stay. The pairs are those of a row that goes and the row that it goes for."""
    from factory.jaccard import settle

    stay, twin, _ = settle(texts, np.ones(len(texts), np.bool_), threshold, shingle=shingle, size=size)  # type: ignore[arg-type]
    gone = np.flatnonzero(~stay)
    return np.stack([twin[gone], gone], axis=1)  # type: ignore[return-value]


def naive_vectors(vectors: Any, threshold: float) -> Iterator[tuple[int, int]]:
    """Every product of two blocks."""
    for start in range(0, len(vectors), BLOCK):
        left, right = np.nonzero(vectors[start : start + BLOCK] @ vectors[start:].T >= threshold)
        upper = right > left
        yield from zip((left[upper] + start).tolist(), (right[upper] + start).tolist(), strict=True)


def faiss(vectors: Any, threshold: float) -> Iterator[tuple[int, int]]:
    """An inverted file with a range search over four cells."""
    import faiss

    cells = round(4 * len(vectors) ** 0.5)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(vectors.shape[1]), vectors.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:: max(1, len(vectors) // (cells * 64))])
    index.add(vectors)
    index.nprobe = 4
    limits, _, found = index.range_search(vectors, threshold)
    rows = np.repeat(np.arange(len(vectors)), np.diff(limits).astype(np.int64))
    upper = found > rows
    yield from zip(rows[upper].tolist(), found[upper].tolist(), strict=True)


def semhash(vectors: Any, threshold: float) -> Iterator[tuple[int, int]]:
    """From vectors, as its documentation shows it."""
    from semhash import SemHash

    class Ready:
        def encode(self, records: Any, **_: Any) -> Any:
            raise RuntimeError("all vectors are given")

    index = SemHash.from_embeddings(vectors, [str(i) for i in range(len(vectors))], Ready())
    for filtered in index.self_deduplicate(threshold=threshold).filtered:
        one = int(filtered.record)
        yield from (tuple(sorted((one, int(other)))) for other, _ in filtered.duplicates)  # type: ignore[misc]


def gristmill_vectors(vectors: Any, threshold: float, mode: str) -> Pairs:
    """Ours, through its public function."""
    from factory.cosine import pairs

    found = pairs(vectors, threshold, mode=mode)  # type: ignore[arg-type]
    return np.stack([found.earlier, found.later], axis=1)  # type: ignore[return-value]


TEXTS: dict[str, Callable[[Any, float], Pairs]] = {
    "naive": lambda texts, threshold: naive(texts.to_list(), threshold),
    "datasketch": lambda texts, threshold: datasketch(texts.to_list(), threshold),
    "rensa": lambda texts, threshold: rensa(texts.to_list(), threshold),
    "gristmill minhash": lambda texts, threshold: gristmill(texts, threshold, "minhash"),
    "gristmill exact": lambda texts, threshold: gristmill(texts, threshold, "exact"),
    "gristmill, words of 5": lambda texts, threshold: settled(texts, threshold, "words", 5),
    "gristmill, letters of 3": lambda texts, threshold: settled(texts, threshold, "chars", 3),
}
VECTORS: dict[str, Callable[[Any, float], Pairs]] = {
    "naive": naive_vectors,
    "faiss": faiss,
    "semhash": semhash,
    "gristmill fast": lambda vectors, threshold: gristmill_vectors(vectors, threshold, "fast"),
    "gristmill exact": lambda vectors, threshold: gristmill_vectors(vectors, threshold, "exact"),
}


def main() -> None:
    """Find the pairs once on a little, so that nothing is compiled or loaded while the watch runs, and then on all."""
    engine, given, out, threshold = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
    if given.suffix == ".npy":
        find, everything, little = VECTORS[engine], np.load(given), np.load(given)[:500]
    else:
        import polars as pl

        find, everything = TEXTS[engine], pl.read_parquet(given)["text"]
        little = everything.head(500)
    list(find(little, threshold))
    watch = Watch()
    found = find(everything, threshold)
    pairs = found if isinstance(found, np.ndarray) else np.array(list(found), np.int64).reshape(-1, 2)
    watch.report(len(everything), pairs=len(pairs))
    np.save(out, pairs)


if __name__ == "__main__":
    main()

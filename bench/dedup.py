"""How fast duplicates are found, and how surely, beside other engines in one run.

    python bench/dedup.py [--json out.json] [--scale 0.1] [--only CASE ...] [--no-peers]

passages   texts of 40 to 400 words, a tenth of them copies with some words changed (bench/corpus.py), by shingles of five words
many       the same, as many as ours can take
short      a million texts of 20 to 40 words, by words and by letters: ours alone
vectors    unit vectors in 384 dimensions around a few thousand centres, with planted pairs, cosine 0.95
adding     1,000 rows that are compared with 1,000,000 which are kept

`recall` is the share of the true pairs that were found, `precision` the share of the found ones that are true; true is what has
been counted (texts) or multiplied out (vectors), apart from any engine. Seconds of CPU are those of all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from corpus import Corpus, corpus
from numpy.typing import NDArray
from peers import environments
from peers.measure import cpu_s, peak_rss_mb

from factory.store import write_json

HERE = Path(__file__).resolve().parent
NEAR, COSINE = 0.8, 0.95
OURS = "gristmill"
CAP_S = 900.0


def shingles(text: str) -> set[tuple[str, ...]]:
    """What is counted to know which pairs are true."""
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def true_pairs(made: Corpus) -> set[tuple[int, int]]:
    """The planted pairs that are alike to at least `NEAR`; copies of one text are pairs with each other as well."""
    texts = made.texts.to_list()
    families: dict[int, list[int]] = {}
    for one, other in zip(made.original.tolist(), made.copy.tolist(), strict=True):
        families.setdefault(one, [one]).append(other)
    found = set()
    for family in families.values():
        sets = {row: shingles(texts[row]) for row in family}
        for one in family:
            for other in family:
                if one < other and likeness(sets[one], sets[other]) >= NEAR:
                    found.add((one, other))
    return found


def likeness(one: set[Any], other: set[Any]) -> float:
    """The Jaccard index."""
    return len(one & other) / len(one | other)


def run(engine: str, given: Path, threshold: float) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """What an engine took in a process of its own, and the pairs that it found."""
    python = sys.executable if engine.startswith(OURS) else environments.python_of(environments.DUPLICATES)
    out = given.with_suffix(".pairs.npy")
    out.unlink(missing_ok=True)
    path = os.pathsep.join((str(HERE.parent), str(HERE / "peers")))
    command = [python, str(HERE / "peers" / "peer_duplicates.py"), engine, str(given), str(out), str(threshold)]
    try:
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=CAP_S, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not ended after {CAP_S:g} s"}, np.empty((0, 2), np.int64)
    if not out.exists():
        return {"error": done.stderr.strip()[-300:]}, np.empty((0, 2), np.int64)
    told = next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith('{"rows"'))
    return {**told, "rows_a_second_of_cpu": told["rows"] / told["cpu_s"]}, np.load(out)


def judged(found: NDArray[np.int64], true: set[tuple[int, int]], is_true: Callable[[int, int], bool]) -> dict[str, float]:
    """Recall and precision; a found pair that was not planted is judged by itself."""
    pairs = {(int(a), int(b)) if a < b else (int(b), int(a)) for a, b in found}
    right = sum(pair in true or is_true(*pair) for pair in pairs)
    return {"recall": len(pairs & true) / max(len(true), 1), "precision": right / max(len(pairs), 1)}


def passages(count: int, folder: Path, engines: list[str]) -> dict[str, Any]:
    """Texts of documents' length."""
    made = corpus(count, 40, 400, mean=138)
    given = folder / "texts.parquet"
    made.texts.to_frame().write_parquet(given)
    true, texts = true_pairs(made), made.texts.to_list()
    results: dict[str, Any] = {"rows": count, "true_pairs": len(true), "mean_words": float(made.texts.str.split(" ").list.len().mean())}  # type: ignore[arg-type]
    for engine in engines:
        figures, found = run(engine, given, NEAR)
        if "error" not in figures:
            figures |= judged(found, true, lambda a, b: likeness(shingles(texts[a]), shingles(texts[b])) >= NEAR)
        results[engine] = figures
        show("passages", engine, figures)
    return results


def vectors(count: int, folder: Path, engines: list[str]) -> dict[str, Any]:
    """Vectors like those of an embedder: topics, and pairs that mean the same."""
    rng = np.random.default_rng(0)
    planted, centres = count // 20, rng.standard_normal((max(20, count // 50), 384)).astype(np.float32)
    whole = unit(centres[rng.integers(0, len(centres), count)] + 1.1 * rng.standard_normal((count, 384)).astype(np.float32))
    ones, others = rng.choice(count, (2, planted), replace=False)
    cosine = rng.uniform(COSINE - 0.03, 1, planted).astype(np.float32)[:, None]
    away = rng.standard_normal((planted, 384)).astype(np.float32)
    away = unit(away - (away * whole[ones]).sum(axis=1, keepdims=True) * whole[ones])
    whole[others] = unit(cosine * whole[ones] + np.sqrt(1 - cosine**2) * away)
    given = folder / "vectors.npy"
    np.save(given, whole)
    true: set[tuple[int, int]] = set()
    results: dict[str, Any] = {"rows": count}
    for engine in engines:
        figures, found = run(engine, given, COSINE)
        if engine == "naive":  # it multiplies all out
            true = {(int(a), int(b)) for a, b in found}
            results["true_pairs"] = len(true)
        if "error" not in figures:
            # Products of other blocks round otherwise: what is just at the cut is neither missed nor wrong.
            figures |= judged(found, true, lambda a, b: float(whole[a] @ whole[b]) >= COSINE - 1e-5)
        results[engine] = figures
        show("vectors", engine, figures)
    return results


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row with length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]


def short(count: int, folder: Path) -> dict[str, Any]:
    """Many short texts, of which those that stay are settled; the memory is that of the whole process, with the texts in it."""
    given = folder / "short.parquet"
    corpus(count, 20, 40).texts.to_frame().write_parquet(given)
    results: dict[str, Any] = {"rows": count}
    for cut in ("words of 5", "letters of 3"):
        results[cut], _ = run(f"{OURS}, {cut}", given, NEAR)
        show("short", cut, results[cut])
    return results


def adding(count: int) -> dict[str, Any]:
    """A thousand new rows against many that are kept: by letters, by words, and by vectors."""
    from factory import cosine
    from factory.jaccard import settle

    texts = corpus(count + 1000, 20, 40, seed=1).texts
    new = np.arange(count + 1000) >= count
    results: dict[str, Any] = {"kept": count, "new": 1000}
    for name, cut in (("words of 5", {"shingle": "words", "size": 5}), ("letters of 3", {"shingle": "chars", "size": 3})):
        results[name] = timed(lambda cut=cut: settle(texts, new, NEAR, **cut)[0])  # type: ignore[misc]
        show("adding", name, results[name])
    whole = np.random.default_rng(0).standard_normal((count + 1000, 384)).astype(np.float32)
    whole = unit(whole)
    whole[-500:] = whole[:500]
    cosine.settle(whole[:1000], new[:1000], COSINE)
    results["vectors"] = timed(lambda: cosine.settle(whole, new, COSINE)[0])
    show("adding", "vectors", results["vectors"])
    return results


def timed(work: Callable[[], NDArray[np.bool_]]) -> dict[str, Any]:
    """Seconds, memory at the peak (this process's, so far), and how many rows were rejected."""
    wall, cpu = time.monotonic(), cpu_s()
    stay = work()
    took = cpu_s() - cpu
    return {
        "rows": len(stay),
        "wall_s": time.monotonic() - wall,
        "cpu_s": took,
        "rows_a_second_of_cpu": len(stay) / took,
        "peak_rss_mb": peak_rss_mb(),
        "rejected": int((~stay).sum()),
    }


def show(case: str, engine: str, figures: dict[str, Any]) -> None:
    """One line."""
    if "error" in figures:
        print(f"{case:<10}{engine:<20}{figures['error']}", flush=True)
        return
    text = f"{case:<10}{engine:<20}{figures['rows']:>10,} rows{figures['cpu_s']:8.1f} s CPU{figures['wall_s']:8.1f} s"
    text += f"{figures['rows_a_second_of_cpu']:>11,.0f} a s of CPU{figures['peak_rss_mb']:>8,.0f} MB"
    print(text + (f"   recall {figures['recall']:.4f} precision {figures['precision']:.4f}" if "recall" in figures else ""), flush=True)


def main() -> None:
    """Measure what is wanted, print a line each, and write the whole after each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ("passages", "many", "short", "vectors", "adding")
    parser.add_argument("--only", nargs="+", choices=cases, default=cases, metavar="CASE")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of rows, to try it")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.no_peers:
        environments.make(environments.DUPLICATES)
    ours = [f"{OURS} minhash", f"{OURS} exact"]
    text_peers = [] if options.no_peers else ["naive", "datasketch", "rensa"]
    vector_peers = [] if options.no_peers else ["naive", "faiss", "semhash"]

    def scaled(count: int) -> int:
        return max(1000, round(count * options.scale))

    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "passages": lambda: passages(scaled(20_000), folder, [*text_peers, *ours]),
            "many": lambda: passages(scaled(260_000), folder, ours),
            "short": lambda: short(scaled(1_000_000), folder),
            "vectors": lambda: vectors(scaled(100_000), folder, [*vector_peers, f"{OURS} fast", f"{OURS} exact"]),
            "adding": lambda: adding(scaled(1_000_000)),
        }
        for case in options.only:
            results[case] = work[case]()
            results["machine"] = {"cores": os.cpu_count(), "polars": pl.__version__, "numpy": np.__version__}
            if options.json:
                write_json(options.json, results)


if __name__ == "__main__":
    main()

"""What the filter `rules` costs: a million rows of 200 words, judged in batches as a run hands them on, and all at once.

python bench/rules.py [--rows 1000000] [--only batches whole json tokens rules] [--json out.json]

Rows are made by a seeded generator (bench/corpus.py: the words of documentation in its own order), and a tenth of them has a planted
fault. Each case runs in a process of its own, which reads the rows first: memory is what it takes beyond them at its peak.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from corpus import corpus

from factory.still import Still
from factory.store import SAMPLES, write_json
from filters.rules import NAMES, Rules

INPUT_WORDS, OUTPUT_WORDS = 60, 140
BATCH = 20_000  # rows
SEEDS = 40
TOKENIZER = Path(__file__).parents[1] / "factory" / "data" / "minilm" / "tokenizer.json"
SYSTEM = "You explain how programs work to people who have never written one. Answer in plain words, and say what you do not know."
FAULTS = [
    ("output", "I'm sorry, but I can't do that. {}"),
    ("output", "{} I hope this helps!"),
    ("output", "{} As an AI language model, I have no files."),
    ("output", "Sure, here is what you asked for: {}"),
    ("output", "Answer: {}"),
    ("output", "{} See [NAME] for more."),
    ("output", "{} and then the"),
    ("output", "{}\n```python\nprint(1)"),
    ("output", "{} **Mind the gap. It is wide."),
    ("output", "{} It was a cafÃ© that wouldnâ€™t open."),
    ("output", "{} with a bell \x07 in it."),
    ("output", "{} " + "the same thing again and again, " * 40),
    ("output", "{} nooooooooo."),
    ("output", SYSTEM + " {}"),
    ("output", "Das Programm liest die Datei und schreibt sie wieder, sobald der Benutzer es sagt. " * 8),
    ("input", "1. {}"),
    ("input", "Question 3: {}"),
    ("input", "{} See https://example.org/help please."),
    ("input", '"{}'),
    ("input", "How can I help you? {}"),
    ("input", "{{"),
    ("input", "Ich möchte wissen, wie das Programm die Datei liest und wann es sie wieder schreibt. Können Sie es mir erklären?"),
]
CASES = ("batches", "whole", "json", "tokens")


def prose(texts: list[str], rng: random.Random, marked: float) -> list[str]:
    """Words as sentences; a share `marked` of the texts has some Markdown."""
    found = []
    for text in texts:
        words = text.split(" ")
        place = 0
        while place < len(words):
            words[place] = words[place].capitalize()
            place = min(place + rng.randint(6, 16), len(words))
            words[place - 1] += rng.choice(".....?!")
        if rng.random() < marked:
            at = rng.randrange(len(words) - 3)
            words[at] = f"**{words[at].strip('.?!')}**"
            words[at + 2] = f"`{words[at + 2].strip('.?!')}`"
        found.append(" ".join(words))
    return found


def frame(inputs: list[str], outputs: list[str], first: int) -> pl.DataFrame:
    """Conversations of a system prompt, a question and an answer, as `SAMPLES`."""
    n = len(inputs)
    turns = pl.concat_list(
        pl.struct(role=pl.lit("system"), content=pl.lit(SYSTEM)),
        pl.struct(role=pl.lit("user"), content="input"),
        pl.struct(role=pl.lit("assistant"), content="output"),
    )
    known = pl.DataFrame({"input": inputs, "output": outputs}, schema={"input": pl.String, "output": pl.String}).with_columns(
        id=pl.lit("s") + pl.int_range(first, first + n).cast(pl.String),
        kind=pl.lit("chat"),
        messages=turns,
        meta=pl.lit("{}"),
        axes=pl.lit("{}"),
    )
    rest = [pl.lit(None, dtype=kind).alias(name) for name, kind in SAMPLES.items() if name not in known.columns]
    return (
        known.with_columns(rest)
        .with_columns(chosen=pl.lit([], SAMPLES["chosen"]), rejected=pl.lit([], SAMPLES["rejected"]))
        .select(list(SAMPLES.names()))
    )


def rows(count: int, folder: Path) -> None:
    """Write `count` rows as prose and as JSON, and the seeds of each."""
    rng = random.Random(7)
    asked = prose(corpus(min(20_000, count + SEEDS), INPUT_WORDS, INPUT_WORDS, seed=1).texts.to_list(), rng, 0.0)
    said = prose(corpus(min(40_000, count + SEEDS), OUTPUT_WORDS, OUTPUT_WORDS, seed=2).texts.to_list(), rng, 0.3)
    for name in ("prose", "json"):
        written = (
            said
            if name == "prose"
            else [json.dumps({"answer": text, "sure": i % 5 > 0, "words": [len(text), i]}) for i, text in enumerate(said)]
        )
        frame(asked[:SEEDS], written[:SEEDS], -SEEDS).write_parquet(folder / f"{name}-seeds.parquet")
        parts = []
        for start in range(0, count, 100_000):
            n = min(100_000, count - start)
            inputs = [asked[SEEDS + rng.randrange(len(asked) - SEEDS)] for _ in range(n)]
            outputs = [written[SEEDS + rng.randrange(len(written) - SEEDS)] for _ in range(n)]
            for row in range(0, n, 10):
                if name == "json":
                    outputs[row] = rng.choice(
                        [outputs[row][:-1], outputs[row].replace('"words"', '"sure"'), f"```json\n{outputs[row]}\n```"]
                    )
                    continue
                part, fault = rng.choice(FAULTS)
                texts = inputs if part == "input" else outputs
                texts[row] = (
                    asked[rng.randrange(SEEDS)]
                    if fault == "{{"
                    else inputs[row]
                    if rng.random() < 0.05
                    else fault.replace("{}", texts[row])
                )
            parts.append(frame(inputs, outputs, start))
        pl.concat(parts).write_parquet(folder / f"{name}.parquet")


def memory(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def settings(case: str, seeds: Path) -> Rules:
    """The rules of a case."""
    if case == "json":
        return Rules.model_validate({"output": {"format": "json"}})
    sizes = {"min_words": 3, "max_words": 400, "min_chars": 10, "max_chars": 4000}
    asked: dict[str, Any] = {**sizes, "forbid": ["(?i)acme"], "output": {**sizes, "forbid": ["(?i)acme", r"\d{12,}"], "require": [r"\w"]}}
    if case == "tokens":
        asked |= {"tokenizer_file": TOKENIZER, "max_tokens": 2000, "total_tokens": 4000}
        asked["output"]["max_tokens"] = 2000
    return Rules.model_validate(asked)


def judged(case: str, folder: Path) -> dict[str, Any]:
    """Run one case here; its figures."""
    name = "json" if case == "json" else "prose"
    seeds = pl.read_parquet(folder / f"{name}-seeds.parquet")
    samples = pl.read_parquet(folder / f"{name}.parquet")
    if case == "tokens":
        samples = samples[: len(samples) // 10]  # the tokenizer's own speed, a thousand rows a second
    rules, ctx = settings(case, folder), Still("03-rules", seeds=seeds)
    rules.judge(samples[:100], ctx)  # kernels and models are loaded
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    started, cpu = time.perf_counter(), time.process_time()
    if case == "whole":
        verdicts = rules.judge(samples, ctx)
    else:
        verdicts = pl.concat([rules.judge(samples[at : at + BATCH], ctx) for at in range(0, len(samples), BATCH)])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = memory("VmHWM")
    reasons = verdicts["reason"].value_counts(sort=True)
    return {
        "rows": len(samples),
        "bytes": int(samples["input"].str.len_bytes().sum() + samples["output"].str.len_bytes().sum()),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "rows_a_second": round(len(samples) / seconds),
        "memory_beyond_rows_mb": round((peak - before) / 1e6),
        "verdicts": verdicts.hash_rows(seed=0).sum(),
        "kept": int(verdicts["keep"].sum()),
        "reasons": {reason: n for reason, n in reasons.iter_rows() if reason is not None},
    }


def by_rule(folder: Path) -> dict[str, float]:
    """Seconds for each rule alone, with what every row is measured for in any case; of the first rows, for a million of them."""
    seeds, samples = pl.read_parquet(folder / "prose-seeds.parquet"), pl.read_parquet(folder / "prose.parquet")[:BATCH]
    ctx = Still("03-rules", seeds=seeds)
    found = {}
    for rule in ("none", *NAMES):
        rules = settings("whole", folder).model_copy(update={"off": tuple(name for name in NAMES if name != rule)})
        rules.judge(samples[:10], ctx)
        cpu = time.process_time()
        rules.judge(samples, ctx)
        found[rule] = round((time.process_time() - cpu) * 1e6 / len(samples), 2)
    return {rule: found["none"] if rule == "none" else round(seconds - found["none"], 2) for rule, seconds in found.items()}


def apart(work: Any, *given: Any) -> Any:
    """What `work` gives, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def main() -> None:
    """Make the rows, run the cases, print and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", choices=(*CASES, "rules"), default=(*CASES, "rules"), metavar="CASE")
    parser.add_argument("--keep", type=Path, help="a folder for the rows, which are used again where they are there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "json.parquet").exists():
            rows(options.rows, folder)
        results: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
        results["machine"] = {"cores": os.cpu_count(), "polars": pl.__version__, "numpy": np.__version__}
        for case in options.only:
            if case == "rules":
                results["cpu_seconds_a_million_rows"] = apart(by_rule, folder)
            else:
                results[case] = apart(judged, case, folder)
            print(case, json.dumps(results["cpu_seconds_a_million_rows" if case == "rules" else case]), flush=True)
            if options.json:
                write_json(options.json, results)
    if "batches" in results and "whole" in results and results["batches"]["rows"] == results["whole"]["rows"]:
        results["batches"]["same_verdicts"] = results["batches"].pop("verdicts") == results["whole"].pop("verdicts")
        print("the same verdicts in batches and all at once:", results["batches"]["same_verdicts"])
        if options.json:
            write_json(options.json, results)


if __name__ == "__main__":
    main()

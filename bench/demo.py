"""The demo, from nothing, for several random seeds: rows, rounds, seconds, and what a probe trained on the result scores.

    python bench/demo.py [--seeds 0 1 2] [--json out.json]

Each run has a home of its own, so no ledger answers for another. The development rows are for this figure alone; no stage
of the recipe sees them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
from probe import labelled

from factory.embed import open_embedder
from factory.publish import release_run
from factory.recipe import load_recipe
from factory.run import run
from factory.store import read_json, write_json
from trainer.probe import probe_accuracy

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "bank-intents"
MEANS = ("rounds", "run_s", "made", "seeds_alone", "seeds_and_made", "seeds_and_all_unfiltered")
DEV = ROOT / "bench" / "data" / "banking77_dev.jsonl"


def once(seed: int, folder: Path) -> dict[str, float]:
    """Run and release the demo's recipe with one random seed in `folder`; its figures."""
    task = folder / "bank-intents"
    task.mkdir()
    (task / "seeds.jsonl").write_bytes((EXAMPLE / "seeds.jsonl").read_bytes())
    (task / "recipe.yaml").write_text((EXAMPLE / "recipe.yaml").read_text().replace("\nname:", f"\nseed: {seed}\nname:", 1))
    recipe, home = load_recipe(task), folder / "mill"
    turned = run(recipe, home)
    status, made = turned.status, turned.samples.filter(pl.col("origin") == "made").select("input", "label")
    everything = pl.concat([labelled(EXAMPLE / "seeds.jsonl"), made.join(labelled(DEV), on="input", how="anti", maintain_order="left")])
    version = release_run(recipe, home)
    scores = folder / "probe.json"
    probe = [sys.executable, str(ROOT / "bench" / "probe.py"), "--seeds", str(EXAMPLE / "seeds.jsonl"), "--version", str(version)]
    subprocess.run([*probe, "--dev", str(DEV), "--json", str(scores)], check=True, cwd=ROOT)
    found = read_json(scores)
    return {
        "seed": seed,
        "accepted": status["accepted"],
        "rounds": status["rounds"],
        "run_s": status["seconds"],
        "seeds_alone": found["seeds"]["accuracy"],
        "seeds_and_made": found["seeds_and_made"]["accuracy"],
        "made": made.height,
        "seeds_and_all_unfiltered": probe_accuracy(everything, labelled(DEV), open_embedder(recipe.embedder).embed).accuracy,
    }


def main() -> None:
    """Run every seed, print a line each, and write all with the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(once(seed, Path(folder)))
        print(runs[-1], flush=True)
    means = {name: statistics.mean(run[name] for run in runs) for name in MEANS}
    print("mean:", means)
    if options.json:
        write_json(options.json, {"runs": runs, "mean": means})


if __name__ == "__main__":
    main()

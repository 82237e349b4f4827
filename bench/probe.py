"""What a version is worth: a linear probe trained on the seeds alone, against one trained on the seeds and its made rows.

    python bench/probe.py --seeds examples/bank-intents/seeds.jsonl --version mill/datasets/bank-intents \\
        --dev bench/data/banking77_dev.jsonl [--json out.json]

`--version` is a version's folder, or a dataset's: then the newest of its versions.

Every file holds a JSON object a line with chat `messages`, the last of which is the label. All rows of the version that
are not among the seeds count as made; a made row whose input stands in the development file is left out, and said so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import polars as pl

from factory.embed import open_embedder
from factory.store import write_json
from schemas.recipe import EmbedderChoice
from trainer.probe import ProbeScore, paired_difference, probe_accuracy

SPLITS = ("train", "validation", "test")


def labelled(path: Path) -> pl.DataFrame:
    """`input` and `label` of every line: the first user turn, and the last turn."""
    turns = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
    rows = pl.read_ndjson(path, schema={"messages": turns})
    content = pl.col("messages").list.eval(pl.element().struct.field("content"))
    asked = pl.col("messages").list.eval(pl.element().struct.field("content").filter(pl.element().struct.field("role") == "user"))
    return rows.select(input=asked.list.first(), label=content.list.last())


def newest(folder: Path) -> Path:
    """`folder` where it is a version, else the newest version in it; exits where there is none."""
    if (folder / "manifest.json").exists():
        return folder
    versions = [path for path in folder.glob("v*") if path.name[1:].isdigit() and (path / "manifest.json").exists()]
    if not versions:
        sys.exit(f"{folder} is not a version, and holds none")
    return max(versions, key=lambda path: int(path.name[1:]))


def line(name: str, rows: int, score: ProbeScore) -> str:
    """One line of the table."""
    right = round(score.accuracy * score.n)
    return f"{name:<14}{rows:>6} rows   accuracy {score.accuracy:.3f} ({right}/{score.n})   95% {score.low:.3f} to {score.high:.3f}"


def main() -> None:
    """Read, train twice, compare, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("seeds", "the real rows"), ("version", "folder of a released version"), ("dev", "rows to score on")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    parser.add_argument("--embedder", choices=["onnx", "sentence-transformers", "static"], default="onnx")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or folder that the embedder knows")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()

    seeds, dev = labelled(options.seeds), labelled(options.dev)
    folder = newest(options.version)
    files = [folder / f"{split}.jsonl" for split in SPLITS]
    version = pl.concat([labelled(file) for file in files if file.exists() and file.stat().st_size])
    made = version.join(seeds, on=["input", "label"], how="anti", maintain_order="left")
    fair = made.join(dev, on="input", how="anti", maintain_order="left")

    embed = open_embedder(EmbedderChoice(kind=options.embedder, model=options.model)).embed
    alone = probe_accuracy(seeds, dev, embed)
    both = probe_accuracy(pl.concat([seeds, fair]), dev, embed)
    gain = paired_difference(alone.predicted, both.predicted, dev["label"].to_list())

    print(line("seeds alone", len(seeds), alone))
    print(line("seeds + made", len(seeds) + len(fair), both))
    print(f"difference {gain.gain:+.3f}   95% {gain.low:+.3f} to {gain.high:+.3f} (paired bootstrap)")
    if len(fair) < len(made):
        print(f"left out: {len(made) - len(fair)} made rows whose input stands in {options.dev.name}")
    print("\n".join(f"  {label:<48} {alone.recall[label]:.2f} -> {both.recall[label]:.2f}" for label in alone.recall))
    if options.json:
        figures = {
            "seeds": {"rows": len(seeds), **alone.model_dump(exclude={"predicted"})},
            "seeds_and_made": {"rows": len(seeds) + len(fair), **both.model_dump(exclude={"predicted"})},
            "difference": gain.model_dump(),
            "left_out": len(made) - len(fair),
        }
        write_json(options.json, figures)


if __name__ == "__main__":
    main()

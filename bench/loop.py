"""What closing the loop is worth: rows that are aimed, judged, counted and chosen, against the same generators without aim.

    python bench/loop.py [--seeds 0 1 2 3 4] [--cases embedded noisy] [--json out.json]

embedded  The demo's recipe with the teacher of 135M parameters, for 60 rows. *Closed*: its target, as it stands. *Open*: the same lines
          ask one round of as many questions, evenly over labels; answers are left out by a hash until no more tokens were written than in
          the closed run; the same filters judge; of the good rows as many as the closed run accepted are drawn by a hash. Both are then
          measured on rows that neither saw: balance (rows of the smallest label by those of the largest), evenness over 64 regions of the
          development rows, NovelSum, and a linear probe trained on seeds and rows.
noisy     A strong teacher that can't be trusted: it answers with real rows of the label that is asked for, but one in four is of another
          label, and one in six is a near-duplicate or rubbish. The development rows are cut into five folds: four are its stock, on the
          fifth the probe is scored, and the five accuracies together are over all 300 rows. *Clean*: as many rows of the stock, right ones,
          drawn by a hash, the same number of each label; the mean of five such draws. *Unfiltered*: what comes, up to the same number.

Every run has a home of its own. Differences are paired by seed, with a 95% interval by Student's t.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from probe import labelled
from scipy.stats import t as student

from factory.diversity import cluster_entropy, of_distances
from factory.embed import open_embedder
from factory.recipe import Recipe, load_recipe
from factory.records import TARGET, RunFolder
from factory.run import run
from factory.stage import Vectors
from factory.store import read_json, write_json
from factory.teacher import Connection, Heard, Price, Teacher
from schemas.call import Call, Params, Reply
from schemas.recipe import EmbedderChoice
from trainer.probe import probe_accuracy

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "bank-intents"
DEV = ROOT / "bench" / "data" / "banking77_dev.jsonl"
ROWS = 60  # half of the demo's: ten runs of the small teacher take about forty minutes
FOLDS = 5
NOISY_ROWS = 80
CLEAN_DRAWS = 5
Embed = Callable[[Sequence[str]], Vectors]


# -- what is measured ------------------------------------------------------------------------------------------------------


def figures(rows: pl.DataFrame, labels: Sequence[str], embed: Embed, against: pl.DataFrame) -> dict[str, float]:
    """Balance, evenness and NovelSum of `rows` (`input`, `label`); regions are those of `against`."""
    counts = Counter(rows["label"])
    sizes = [counts[label] for label in labels]
    vectors = embed(rows["input"].to_list())
    return {
        "rows": float(rows.height),
        "balance": min(sizes) / max(sizes),
        "cluster_entropy": cluster_entropy(vectors, embed(against["input"].to_list())) or 0.0,
        "novelsum": of_distances(vectors)["novelsum"],
    }


def by_hash(rows: pl.DataFrame, salt: str) -> pl.DataFrame:
    """Rows in an order that nothing but a hash decides."""
    order = [hashlib.blake2b(f"{salt}/{text}".encode(), digest_size=8).hexdigest() for text in rows["input"]]
    return rows.with_columns(order=pl.Series(order, dtype=pl.String)).sort("order").drop("order")


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The mean of the paired differences, and its 95% interval by Student's t."""
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(apart)
    half = float(student.ppf(0.975, len(apart) - 1)) * statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half}


# -- the embedded teacher --------------------------------------------------------------------------------------------------


def turned(text: str, home: Path, name: str) -> RunFolder:
    """Run a text as the demo's recipe, in a home of its own."""
    task = home / name / "bank-intents"
    task.mkdir(parents=True)
    (task / "seeds.jsonl").write_bytes((EXAMPLE / "seeds.jsonl").read_bytes())
    (task / "recipe.yaml").write_text(text)
    return run(load_recipe(task), home / name / "mill", view="quiet")


def embedded(seed: int, embed: Embed) -> dict[str, Any]:
    """The closed and the open loop with one random seed."""
    seeds, dev = labelled(EXAMPLE / "seeds.jsonl"), labelled(DEV)
    labels = seeds["label"].unique().sort().to_list()
    text = (EXAMPLE / "recipe.yaml").read_text().replace("\nname:", f"\nseed: {seed}\nname:", 1)
    line = next(line for line in text.splitlines() if line.startswith("target:"))
    fewer = line.replace("accepted: 120", f"accepted: {ROWS}")
    assert fewer != line, "the demo's target is another one now"
    text, line = text.replace(line, fewer), fewer
    with tempfile.TemporaryDirectory() as folder:
        closed = turned(text, Path(folder), "closed")
        spent = tokens(closed)
        calls = closed.costs.height
        # No aim: one round, far more wanted than can be asked, so that places take turns until so many calls are out.
        aimless = text.replace(line, "target: {accepted: 100000, balance: label, rounds: 1, explore: 1}")
        aimless = aimless.replace("      share: 0.5\n", f"      share: 0.5\n      by: weight\n      max_calls: {-(-calls * 11 // 20)}\n")
        assert aimless.count("max_calls") == 1, "the recipe has no share: 0.5 any more"
        opened = turned(aimless, Path(folder), "open")
        share = min(1.0, spent / tokens(opened))
        ours, theirs = closed.accepted, within(opened, share)
        drawn = by_hash(theirs, str(seed)).head(ours.height)
        found: dict[str, Any] = {
            "seed": seed,
            "status": closed.status["status"],
            "rounds": closed.status["rounds"],
            "seconds": closed.status["seconds"],
        }
        for name, rows, made, part in (("closed", ours, closed, 1.0), ("open", drawn, opened, share)):
            rows = rows.select("input", "label")
            fair = rows.join(dev, on="input", how="anti")
            found[name] = {
                **figures(rows, labels, embed, dev),
                "by_label": {label: int((rows["label"] == label).sum()) for label in labels},
                "probe": probe_accuracy(pl.concat([seeds, fair]), dev, embed).accuracy,
                "calls": round(part * made.costs.height),
                "tokens_out": round(part * tokens(made)),
            }
        found["filling"] = [
            {name: stage["reports"][name] for name in ("accepted", "good", "missing")}
            for stage in closed.stages
            if stage["stage"] == TARGET
        ]
        found["alarms"] = [alarm["sentence"] for alarm in closed.status["alarms"]]
        found["open"]["good"] = theirs.height
        found["closed"]["good"] = closed.of_fate("accepted", "surplus").height
        found["seeds_alone"] = probe_accuracy(seeds, dev, embed).accuracy
    return found


def tokens(folder: RunFolder) -> int:
    """What its teachers wrote."""
    return sum(row.tokens_out for row in folder.funnel() if row.kind == "generator")


def within(folder: RunFolder, share: float) -> pl.DataFrame:
    """The good rows of a run that come from this share of its calls; by a hash, a call at a time."""
    calls = sorted(folder.costs["call"], key=lambda call: hashlib.blake2b(call.encode()).digest())
    return folder.accepted.filter(pl.col("call").is_in(calls[: round(len(calls) * share)]))


# -- a strong teacher that can't be trusted --------------------------------------------------------------------------------

RUBBISH = ("asdf qwer 1234 zxcv", "The the the the the the the", "As an AI language model, I can't do that.", "Lorem ipsum dolor sit amet.")


class Noisy(Teacher):
    """Real rows of the label asked for; one in four of another label, one in six a near-duplicate or rubbish."""

    kind: ClassVar[str] = "noisy"
    model: str = "noisy"
    seed: int = 0
    stock: dict[str, tuple[str, ...]] = {}

    def known_price(self, tokens_in: int | None = None) -> Price | None:
        return Price(input_usd_per_mtok=1, output_usd_per_mtok=1)

    @asynccontextmanager
    async def connect(self, home: Path) -> AsyncIterator[Connection]:
        yield _Noise(self)


class _Noise:
    def __init__(self, teacher: Noisy) -> None:
        self.teacher = teacher
        self.said: list[str] = []

    async def ask(self, call: Call, params: Params) -> Heard:
        await asyncio.sleep(0)
        rng = random.Random(f"{self.teacher.seed}/{call.messages[-1].content}/{call.draw}")
        label = json.loads(call.aim)["label"]
        kind = rng.choices(("right", "other", "bad"), (1 - 1 / 4 - 1 / 6, 1 / 4, 1 / 6))[0]
        if kind == "other":
            label = rng.choice([other for other in self.teacher.stock if other != label])
        text = rng.choice(self.teacher.stock[label])
        if kind == "bad":
            words = text.split()
            words.insert(rng.randrange(len(words) + 1), rng.choice(("please", "now", "really")))
            text = rng.choice((" ".join(words), rng.choice(RUBBISH)))
        return Heard(Reply(text=json.dumps([text]), finish="stop", tokens_in=50, tokens_out=len(text.split())))


NOISY = """
name: noisy
seed: {seed}
target: {{accepted: {rows}, balance: label, oversample: 1.3, rounds: 12}}
teachers: {{strong: {{kind: fake}}}}
stages:
  - seeds: {{path: seeds.jsonl}}
  - compose: {{template: label-chat, per_call: 1, labels: {intents}}}
  - rules: {{min_words: 3, max_words: 60}}
  - exact: {{}}
  - near: {{threshold: 0.7}}
  - semantic: {{threshold: 0.95}}
  - confident: {{}}
  - coverage: {{}}
"""


def noisy(seed: int, embed: Embed) -> dict[str, Any]:
    """One assignment of the development rows to folds: the loop, clean rows, and whatever comes, each scored over all folds."""
    seeds, dev = labelled(EXAMPLE / "seeds.jsonl"), by_hash(labelled(DEV), str(seed))
    fold = pl.Series(np.arange(dev.height) % FOLDS)
    example = load_recipe(EXAMPLE)
    intents = json.dumps(example.stages[1].stage.labels)  # type: ignore[attr-defined]
    right: dict[str, float] = defaultdict(float)
    found: dict[str, Any] = {"seed": seed, "rounds": [], "calls": [], "of_another_label": [], "status": []}
    truth = dict(dev.select("input", "label").iter_rows())
    for number in range(FOLDS):
        stock, test = dev.filter(fold != number), dev.filter(fold == number)
        with tempfile.TemporaryDirectory() as folder:
            task = Path(folder)
            (task / "seeds.jsonl").write_bytes((EXAMPLE / "seeds.jsonl").read_bytes())
            text = NOISY.format(seed=seed, rows=NOISY_ROWS, intents=intents)
            (task / "recipe.yaml").write_text(text)
            recipe = load_recipe(task)
            of_label = {label: tuple(stock.filter(pl.col("label") == label)["input"]) for label in seeds["label"].unique().sort()}
            teacher = Noisy(seed=seed, stock=of_label)
            recipe = Recipe(**{**vars(recipe), "teachers": {"strong": teacher}})
            turned_ = run(recipe, task / "mill", view="quiet")
            ours = turned_.accepted.select("input", "label")
            everything = turned_.samples.filter(pl.col("origin") == "made").select("input", "label")
            status, calls = turned_.status, turned_.costs.height
        each = ours.height // len(of_label)
        shuffled = [by_hash(stock, f"{seed}/{draw}") for draw in range(CLEAN_DRAWS)]
        sets = {
            "loop": [ours],
            "clean": [pl.concat([rows.filter(pl.col("label") == label).head(each) for label in of_label]) for rows in shuffled],
            "unfiltered": [by_hash(everything, str(seed)).head(ours.height)],
            "seeds_alone": [ours.clear()],
        }
        for name, draws in sets.items():
            scores = [probe_accuracy(pl.concat([seeds, rows]), test, embed) for rows in draws]
            right[name] += statistics.mean(score.accuracy * score.n for score in scores)
        wrong = [truth.get(text, label) != label for text, label in ours.iter_rows()]  # of rubbish and rewritten rows it says nothing
        found["of_another_label"].append(sum(wrong) / len(wrong))
        found["rounds"].append(status["rounds"])
        found["calls"].append(calls)
        found["status"].append(status["status"])
    return found | {name: right[name] / dev.height for name in sets}


# -- the whole -------------------------------------------------------------------------------------------------------------

COMPARED = ("balance", "cluster_entropy", "novelsum", "probe")


def main() -> None:
    """Run the cases with every seed, print a line each, and write all with differences and intervals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cases", nargs="+", choices=["embedded", "noisy"], default=["noisy", "embedded"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    embed = open_embedder(EmbedderChoice()).embed
    result: dict[str, Any] = read_json(options.json) if options.json and options.json.exists() else {}  # other cases stay
    for case in options.cases:
        runs: list[dict[str, Any]] = []
        for seed in options.seeds:
            runs.append(noisy(seed, embed) if case == "noisy" else embedded(seed, embed))
            print(case, json.dumps(runs[-1]), file=sys.stderr, flush=True)
            result[case] = compared(case, runs)
            if options.json:
                write_json(options.json, result)
        print(case, json.dumps({name: result[case][name] for name in ("means", "differences")}, indent=2))


def compared(case: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs of a case, their means, and the differences of its two sides."""
    if case == "noisy":
        others = ("clean", "unfiltered", "seeds_alone")
        means = {name: statistics.mean(each[name] for each in runs) for name in ("loop", *others)}
        apart = {f"loop_against_{other}": difference([each["loop"] for each in runs], [each[other] for each in runs]) for other in others}
    else:
        means = {f"{side}_{name}": statistics.mean(each[side][name] for each in runs) for side in ("closed", "open") for name in COMPARED}
        apart = {name: difference([each["closed"][name] for each in runs], [each["open"][name] for each in runs]) for name in COMPARED}
    return {"runs": list(runs), "means": means, "differences": apart}


if __name__ == "__main__":
    main()

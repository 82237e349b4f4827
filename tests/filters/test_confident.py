"""Rows whose label the others don't believe."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import polars as pl

from filters.confident import UNBELIEVED, Confident
from tests.context import FakeContext, chat, frame

ROOT = Path(__file__).parents[2]


def rows(path: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in (ROOT / path).read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        found[assistant["content"]].append(user["content"])
    return found


SEEDS = frame(*[chat(text, label, origin="real") for label, texts in rows("examples/bank-intents/seeds.jsonl").items() for text in texts])
DEV = rows("bench/data/banking77_dev.jsonl")


def noisy(share: float, seed: int = 0) -> tuple[pl.DataFrame, set[str]]:
    """Real development rows, of which a share claims another label; and the ids of these."""
    rng = random.Random(seed)
    right, wrong = [], []
    for label, texts in DEV.items():
        for text in texts[:20]:
            if rng.random() < share:
                wrong.append(chat(text, rng.choice([other for other in DEV if other != label])))
            else:
                right.append(chat(text, label))
    return frame(*right, *wrong), {sample.id for sample in wrong}


def test_wrong_labels_are_outvoted_and_right_ones_stay() -> None:
    made, wrong = noisy(0.25)
    ctx = FakeContext(seeds=SEEDS)
    verdicts = Confident().judge(pl.concat([SEEDS, made]), ctx)
    assert ctx.reports["at_least"] == 0.15
    dropped = set(verdicts.filter(~pl.col("keep"))["sample"])
    assert len(dropped & wrong) > 0.75 * len(wrong)
    assert len(dropped - wrong) < 0.15 * (made.height - len(wrong))
    assert verdicts.join(SEEDS, left_on="sample", right_on="id")["keep"].all()
    assert set(verdicts.filter(~pl.col("keep"))["reason"]) == {UNBELIEVED}


def test_what_was_kept_is_judged_again_by_more_rows() -> None:
    made, wrong = noisy(0.25, seed=1)
    few = pl.concat([SEEDS, made.filter(pl.col("id").is_in(list(wrong)))])
    all_rows = pl.concat([SEEDS, made])
    kept = {
        name: set(Confident().judge(pool, FakeContext(seeds=SEEDS)).filter("keep")["sample"]) & wrong
        for name, pool in (("few", few), ("all", all_rows))
    }
    assert len(kept["all"]) < len(kept["few"])


def test_order_decides_nothing() -> None:
    pool = pl.concat([SEEDS, noisy(0.3)[0]])
    ways = [Confident().judge(part, FakeContext(seeds=SEEDS)).sort("sample") for part in (pool, pool.reverse())]
    assert ways[0].equals(ways[1])


def test_what_can_not_be_judged_is_kept_and_said() -> None:
    plain = frame(chat("a text without a label"), chat("another one"))
    ctx = FakeContext(seeds=SEEDS)
    assert Confident().judge(plain, ctx)["keep"].all()
    assert "too few" in ctx.reports["unjudged"]
    made, _ = noisy(0.1)
    mixed = Confident().judge(pl.concat([SEEDS, made, plain]), FakeContext(seeds=SEEDS))
    assert mixed.filter(pl.col("sample").is_in(plain["id"].implode()))["keep"].all()
    stranger = frame(chat("My card was eaten.", "card_swallowed"))
    assert (
        Confident()
        .judge(pl.concat([SEEDS, stranger]), FakeContext(seeds=SEEDS))
        .filter(pl.col("sample") == stranger["id"][0])["keep"]
        .all()
    )
    assert Confident().judge(plain.clear(), FakeContext(seeds=SEEDS)).is_empty()

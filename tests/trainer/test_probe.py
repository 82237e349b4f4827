"""The probe on real messages, and its intervals against published and enumerated values."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.context import embedder
from trainer.probe import paired_difference, probe_accuracy, score_probe, train_probe, wilson

ROOT = Path(__file__).parents[2]


def rows(path: Path) -> pl.DataFrame:
    turns = pl.List(pl.Struct({"content": pl.String}))
    content = pl.col("messages").list.eval(pl.element().struct.field("content"))
    return pl.read_ndjson(path, schema={"messages": turns}).select(input=content.list.first(), label=content.list.last())


def test_forty_seeds_teach_ten_intents():
    seeds, dev = rows(ROOT / "examples/bank-intents/seeds.jsonl"), rows(ROOT / "bench/data/banking77_dev.jsonl")
    score = probe_accuracy(seeds, dev, embedder().embed)
    assert score.n == 300
    assert score.accuracy == pytest.approx(0.737, abs=0.01)
    assert score.low < score.accuracy < score.high
    assert np.mean(list(score.recall.values())) == pytest.approx(score.accuracy)  # 30 rows of each
    assert len(score.predicted) == 300


def test_one_label_can_not_be_probed():
    with pytest.raises(ValueError, match="class"):
        train_probe(np.eye(3, dtype=np.float32), ["a", "a", "a"])


def test_score_counts_by_label():
    score = score_probe(["a", "b", "b", "a"], ["a", "a", "b", "c"])
    assert (score.accuracy, score.n) == (0.5, 4)
    assert score.recall == {"a": 0.5, "b": 1.0, "c": 0.0}
    with pytest.raises(ValueError, match="no rows"):
        score_probe([], [])


def test_wilson_interval():
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0


def test_paired_difference_is_of_the_rows_that_changed():
    labels = ["a"] * 200
    before, after = ["a"] * 100 + ["b"] * 100, ["a"] * 130 + ["b"] * 70
    gained = paired_difference(before, after, labels)
    assert gained.gain == pytest.approx(0.15)
    # 30 of 200 rows changed, all for the better: the normal interval of that share is 0.15 -/+ 0.0495
    assert (gained.low, gained.high) == pytest.approx((0.1005, 0.1995), abs=0.006)
    assert gained == paired_difference(before, after, labels)
    none = paired_difference(before, before, labels)
    assert (none.gain, none.low, none.high) == (0, 0, 0)
    lost = paired_difference(after, before, labels)
    assert lost.gain == pytest.approx(-0.15)
    assert lost.high < 0

"""Clusters of the banking messages, named and counted; and what must hold of any clusters."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from factory.store import VERDICTS
from filters.coverage import Coverage, centrality, keywords, ward
from tests.context import FakeContext, chat, frame

ROOT = Path(__file__).parents[2]


def messages(name: str, origin: str) -> list:
    lines = (json.loads(line)["messages"] for line in (ROOT / name).read_text().splitlines())
    return [chat(user["content"], answer["content"], origin=origin) for user, answer in lines]


SEEDS = messages("examples/bank-intents/seeds.jsonl", "real")
MADE = messages("bench/data/banking77_dev.jsonl", "made")
random.Random(0).shuffle(MADE)


def check(rows: pl.DataFrame, verdicts: pl.DataFrame, clusters: list[dict]) -> None:
    """Whatever the method: one verdict a row, all keep, and a report that adds up to them."""
    assert verdicts.schema == VERDICTS
    assert verdicts["sample"].to_list() == rows["id"].to_list()
    assert verdicts["keep"].all()
    decoded = verdicts.with_columns(d=pl.col("detail").str.json_decode(pl.Struct({"cluster": pl.Int64, "name": pl.String}))).unnest("d")
    assert decoded["detail"].str.contains('"cluster":', literal=True).all()  # what a run's folder looks for
    inside = decoded.filter(pl.col("cluster") >= 0)
    assert inside["score"].is_between(0, 1 + 1e-6).all()
    assert decoded.filter(pl.col("cluster") < 0)["score"].null_count() == len(rows) - len(inside)
    sizes = [cluster["size"] for cluster in clusters if cluster["cluster"] >= 0]
    assert sizes == sorted(sizes, reverse=True)
    assert [cluster["cluster"] for cluster in clusters] == [*range(len(sizes)), *([-1] if len(inside) < len(rows) else [])]
    origin = dict(rows.select("id", "origin").iter_rows())
    for cluster in clusters:
        members = decoded.filter(pl.col("cluster") == cluster["cluster"])
        assert set(members["name"]) == {cluster["name"]}
        assert len(members) == cluster["size"] == cluster["seeds"] + cluster["made"]
        assert sum(origin[i] == "real" for i in members["sample"]) == cluster["seeds"]
        assert {*cluster["central"], *cluster["edge"]} <= {*members["sample"]}
        assert cluster["thin"] == (cluster["cluster"] >= 0 and cluster["size"] < len(inside) / len(sizes) / 2)
        if cluster["cluster"] >= 0:
            score = dict(members.select("sample", "score").iter_rows())
            assert score[cluster["central"][0]] == max(score.values())
            assert score[cluster["edge"][0]] == min(score.values())
    assert json.loads(json.dumps(clusters)) == clusters


def test_few_rows_are_grouped_without_umap_and_the_report_says_so():
    rows, ctx = frame(*SEEDS, *MADE[:100]), FakeContext()
    verdicts = Coverage().judge(rows, ctx)
    check(rows, verdicts, ctx.reports["clusters"])
    assert "140 rows are fewer than 200" in ctx.reports["method"]
    assert len(ctx.reports["clusters"]) == 12
    names = {cluster["name"] for cluster in ctx.reports["clusters"]}
    for word in ("fee", "cancel", "pending", "beneficiary"):
        assert any(word in name.split(", ") for name in names), names
    cluster = verdicts["detail"].str.json_path_match("$.cluster")
    fees = cluster.filter(rows["label"] == "transfer_fee_charged")
    assert fees.value_counts()["count"].max() > 0.8 * len(fees)  # one intent that is easy to tell stays together


def test_many_rows_go_through_umap_and_hdbscan_and_come_out_the_same_again():
    rows = frame(*SEEDS, *MADE[:200])
    ctx, again = FakeContext(), FakeContext()
    verdicts = Coverage().judge(rows, ctx)
    check(rows, verdicts, ctx.reports["clusters"])
    assert ctx.reports["method"] == "UMAP, then HDBSCAN"
    assert 6 <= len(ctx.reports["clusters"]) <= 25
    assert verdicts.equals(Coverage().judge(rows, again))


def test_settings_pass_through_over_the_defaults():
    rows, ctx = frame(*MADE[:40]), FakeContext()
    stage = Coverage(
        umap_from=16, umap={"n_neighbors": 5, "init": "random"}, hdbscan={"min_cluster_size": 30, "allow_single_cluster": False}
    )
    check(rows, stage.judge(rows, ctx), ctx.reports["clusters"])
    # no two clusters of 30 fit into 40 rows: all is noise, nothing is thin
    assert [(c["cluster"], c["name"], c["thin"]) for c in ctx.reports["clusters"]] == [(-1, "unclustered", False)]
    with pytest.raises(TypeError, match="neighbours"):
        Coverage(umap_from=16, umap={"neighbours": 5}).judge(rows, ctx)


def test_umap_is_not_imported_for_few_rows():
    code = (
        "import sys, numpy as np, polars as pl\n"
        "from filters.coverage import Coverage\n"
        "from tests.context import FakeContext, chat, frame\n"
        "class Vectors(FakeContext):\n"
        "    def embed(self, texts): return np.eye(len(texts), 8, dtype=np.float32)\n"
        "heavy = {'umap', 'hdbscan', 'numba', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), 'the module itself must be cheap'\n"
        "Coverage().judge(frame(*(chat(f'message {i}') for i in range(8))), Vectors())\n"
        "assert not {'umap', 'hdbscan', 'numba'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5])
def test_hardly_any_rows(n):
    rows, ctx = frame(*MADE[:n]), FakeContext()
    check(rows, Coverage().judge(rows, ctx), ctx.reports["clusters"])


def test_ward_finds_what_lies_apart():
    places = np.eye(4, 8, dtype=np.float32)[np.repeat(range(4), 4)]  # 16 rows, 4 clusters
    labels = ward(places)
    assert [len(set(labels[i : i + 4])) for i in range(0, 16, 4)] == [1] * 4
    assert len(set(labels)) == 4


def test_centrality_is_the_cosine_to_the_centroid():
    vectors = np.array([[1, 0], [0, 1], [1, 0], [0.6, 0.8]], np.float32)
    assert centrality(vectors, np.array([0, 0, 1, -1])) == pytest.approx([0.5**0.5, 0.5**0.5, 1, np.nan], nan_ok=True)


def test_keywords_prefer_what_one_cluster_says_and_others_do_not():
    texts = pl.Series(["My card was stolen", "A stolen card!", "The card's PIN", "My PIN doesn't work, pin", "..."])
    names = keywords(texts, np.array([0, 0, 1, 1, 2]), terms=2)
    # card: 2 of cluster 0, 1 of cluster 1; stolen: 2 of cluster 0 alone; pin: 3 of cluster 1 alone
    assert names.rows() == [(0, "stolen, card"), (1, "pin, work"), (2, "cluster 2")]

"""Which place a cluster is: each round finds its clusters anew, and only a place that keeps its number can be seen to grow.

A *place* is a cluster that goes on from round to round, or from version to version; it is known by its members. Numbers of places are
never given twice. Pure functions of what is on disk, so a run that is resumed counts its places as one that never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.stage import Vectors

Labels = NDArray[np.intp]

# Measured on banking messages that grow to 340, 1,050 and 3,000 rows in five rounds: of clusters dealt at random 99 pairs in 100 stay below
# 0.2 (0.33 while there are 40 rows); 0.3 costs at most 3% of the rows that would keep their place without any limit, 0.5 up to 11%.
LEAST = 0.3
HALF = 0.5  # of a cluster must come from one place to have split from it, and of a place go to one, to be merged into it

PLACES = pl.Schema(
    {
        "round": pl.Int64(),
        "sample": pl.String(),
        "cluster": pl.Int64(),  # as the round numbered it; -1: none
        "name": pl.String(),
        "place": pl.Int64(),  # the cluster's number for good; -1: none
        "home": pl.Int64(),  # the place, or of a row in none the one whose centre is nearest; -1: there is none at all
    }
)

HISTORY = pl.Schema(
    {
        "round": pl.Int64(),
        "place": pl.Int64(),
        "name": pl.String(),
        "size": pl.Int64(),
        "real": pl.Int64(),
        "made": pl.Int64(),
        "event": pl.String(),  # new, split, back, grown, shrunk, same, merged, gone
        "other": pl.Int64(),  # the place that it split from, or was merged into
    }
)


def centres_of(vectors: Vectors, clusters: Labels) -> Vectors:
    """The centre of each cluster, a unit vector: shape (k, d). `clusters` are numbered from 0 without a gap; -1 is none."""
    k = int(clusters.max(initial=-1)) + 1
    sums = np.zeros((k, vectors.shape[1]))
    np.add.at(sums, clusters[clusters >= 0], vectors[clusters >= 0])
    centres: Vectors = (sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-9)).astype(np.float32)
    return centres


def nearest_place(vectors: Vectors, centres: Vectors) -> Labels:
    """The row of `centres` whose cosine to each unit vector is highest, the first of equals; -1 where there is no centre."""
    if not len(centres):
        return np.full(len(vectors), -1, np.intp)
    nearest: Labels = (vectors @ centres.T).argmax(axis=1).astype(np.intp)
    return nearest


def homes(vectors: Vectors, clusters: Labels) -> Labels:
    """The cluster of every row: its own, or of a row in none (-1) the one whose centre is nearest; -1 only where there is no cluster."""
    return np.where(clusters >= 0, clusters, nearest_place(vectors, centres_of(vectors, clusters)))


def matched(before: pl.DataFrame, now: pl.DataFrame, *, least: float = LEAST) -> dict[int, int]:
    """Which place each cluster is, as far as it is one: cluster to place, by their members.

    before: `sample`, `place`; a sample may stand under several. now: `sample`, `cluster`. -1 is none in both. Compared are the samples
    that are in both frames: a cluster and a place are as alike as their Jaccard index, `least` of which a match needs, and of all
    one-to-one matches it is the one of the highest sum (Kuhn 1955). How clusters are numbered and rows are ordered decides nothing.
    """
    shared = before.select("sample", "place").join(now.select("sample", "cluster"), on="sample")
    places, clusters = _ranked(shared, "place"), _ranked(shared, "cluster")
    if not places or not clusters:
        return {}
    from scipy.optimize import linear_sum_assignment

    row, column = ({number: i for i, number in enumerate(side)} for side in (places, clusters))
    both = np.zeros((len(row), len(column)))
    for place, cluster, n in _counted(shared, "place", "cluster").iter_rows():
        both[row[place], column[cluster]] = n
    of_place, of_cluster = (np.array(list(side.values())) for side in (places, clusters))
    alike = both / (of_place[:, None] + of_cluster - both)
    alike[alike < least] = 0  # before they are assigned: no match is given up for one that would not hold
    pairs = zip(*linear_sum_assignment(alike, maximize=True), strict=True)
    return {list(clusters)[j]: list(places)[i] for i, j in pairs if alike[i, j] > 0}


def followed(rounds: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The place of each sample in each round, as `PLACES`.

    rounds: coverage's verdicts in the order in which they were given, each frame with `round`, `sample`, `cluster`, `name`, and if
    there is one `home`; versions follow each other in the same way, with their numbers as rounds. A cluster that matches none of
    the places of the round before may be one that had gone, and is that again. Else it is a new place: its number is the cluster's
    own if no place ever had that (so the fixed clusters of a reference are called the same everywhere), or one above all so far.
    """
    known = pl.Schema({"sample": pl.String(), "place": pl.Int64()}).to_frame()  # all that were in a round, under -1
    present: dict[int, pl.DataFrame] = {}  # the members of each place when it was last seen: of those that are there
    absent: dict[int, pl.DataFrame] = {}  # and of those that had gone
    used: set[int] = set()
    told = [PLACES.to_frame()]
    for frame in rounds:
        inside = frame.filter(pl.col("cluster") >= 0).select("sample", "cluster")
        numbers = matched(pl.concat([known, *present.values()]), frame)
        unmatched = pl.when(pl.col("cluster").is_in(list(numbers))).then(-1).otherwise("cluster")
        numbers |= matched(pl.concat([known, *absent.values()]), frame.with_columns(cluster=unmatched))
        for cluster in (cluster for cluster in _ranked(inside, "cluster") if cluster not in numbers):
            numbers[cluster] = cluster if cluster not in used else max(used) + 1
            used.add(numbers[cluster])
        home = "home" if "home" in frame.columns else "cluster"
        here = frame.with_columns(place=_numbered("cluster", numbers), home=_numbered(home, numbers))
        told.append(here.select(pl.col(column).cast(dtype) for column, dtype in PLACES.items()))
        absent = {place: members for place, members in (absent | present).items() if place not in numbers.values()}
        present = {place: told[-1].filter(pl.col("place") == place).select("sample", "place") for place in sorted(numbers.values())}
        known = pl.concat([known, frame.select("sample", place=pl.lit(-1, pl.Int64))]).unique("sample")
    return pl.concat(told)


def history(places: pl.DataFrame, samples: pl.DataFrame) -> pl.DataFrame:
    """What became of each place in each round, as `HISTORY`, by round and place.

    places: as `followed` gives them. samples: `id` and `origin`. A place that is there for the first time is "new", or "split" where
    at least half of its rows were in one place in the round before, and that is still there; "back" was gone for a time. One that
    goes on has "grown", "shrunk", or is the "same" in size. One that is there no more was "merged" into the place that has at
    least half of its rows now, or is "gone"; it stands under the round that lacks it, with no rows.
    """
    origin = samples.select(sample="id", origin="origin")
    rows = places.filter(pl.col("place") >= 0).join(origin, on="sample", how="left")
    sizes = rows.group_by("round", "place").agg(
        pl.col("name").sort_by("sample").first(),
        size=pl.len(),
        real=(pl.col("origin") == "real").sum(),
        made=(pl.col("origin") == "made").sum(),
    )
    told: list[dict[str, Any]] = []
    seen: set[int] = set()
    last: dict[int, dict[str, Any]] = {}
    before = rows.clear()
    for number in places["round"].unique(maintain_order=True):
        here = rows.filter(pl.col("round") == number)
        now = {row["place"]: row for row in sizes.filter(pl.col("round") == number).sort("place").to_dicts()}
        moved = _counted(before.select("sample", was="place").join(here.select("sample", "place"), on="sample"), "was", "place")
        for place, row in now.items():
            event, other = "new", None
            if place in last:
                event = "same" if row["size"] == last[place]["size"] else "grown" if row["size"] > last[place]["size"] else "shrunk"
            elif place in seen:
                event = "back"
            elif (came := moved.filter((pl.col("place") == place) & pl.col("was").is_in(list(now)))).height:
                other, n, *_ = came.sort("n", "was", descending=[True, False]).select("was", "n").row(0)
                event, other = ("split", other) if n >= HALF * row["size"] else ("new", None)
            told.append(row | {"event": event, "other": other})
        for place in sorted(last.keys() - now.keys()):
            went = moved.filter(pl.col("was") == place).sort("n", "place", descending=[True, False])
            into = went["place"][0] if went.height and went["n"][0] >= HALF * last[place]["size"] else None
            ended = {"round": number, "size": 0, "real": 0, "made": 0, "event": "gone" if into is None else "merged", "other": into}
            told.append(last[place] | ended)
        seen |= now.keys()
        last, before = now, here
    return pl.DataFrame(told, schema=HISTORY, orient="row").sort("round", "place")


def _ranked(rows: pl.DataFrame, column: str) -> dict[int, int]:
    """How many samples each cluster or place holds, the largest first; of equals the one that has the smallest id."""
    counted = rows.filter(pl.col(column) >= 0).group_by(column).agg(n=pl.col("sample").n_unique(), first=pl.col("sample").min())
    return dict(counted.sort("n", "first", descending=[True, False]).select(column, "n").iter_rows())


def _counted(rows: pl.DataFrame, a: str, b: str) -> pl.DataFrame:
    return rows.filter((pl.col(a) >= 0) & (pl.col(b) >= 0)).group_by(a, b).agg(n=pl.len())


def _numbered(column: str, numbers: dict[int, int]) -> pl.Expr:
    return pl.col(column).replace_strict(numbers, default=-1, return_dtype=pl.Int64)

"""Places keep their numbers while clusters are renumbered, split, merged, lost and found; real data grows in test_coverage."""

import random
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.places import HISTORY, PLACES, centres_of, followed, history, homes, matched, nearest_place


def a_round(number: int, *clusters: str, outside: str = "") -> pl.DataFrame:
    """Verdicts of a round: the letters of each word are the samples of one cluster, in the order of their numbers."""
    rows = [(number, sample, at, f"name {at}") for at, members in enumerate(clusters) for sample in members]
    rows += [(number, sample, -1, "unclustered") for sample in outside]
    return pl.DataFrame(rows, schema={"round": pl.Int64, "sample": pl.String, "cluster": pl.Int64, "name": pl.String}, orient="row")


def members(places: pl.DataFrame, number: int) -> dict[int, str]:
    """The samples of each place in a round."""
    here = places.filter((pl.col("round") == number) & (pl.col("place") >= 0)).sort("sample")
    return {place: "".join(rows["sample"]) for (place,), rows in here.group_by("place")}


def events(places: pl.DataFrame, number: int) -> dict[int, tuple[str, int | None]]:
    samples = places.select(id="sample").unique().with_columns(origin=pl.lit("made"))
    told = history(places, samples).filter(pl.col("round") == number)
    return {place: (event, other) for place, event, other in told.select("place", "event", "other").iter_rows()}


def test_clusters_that_are_renumbered_and_have_grown_are_the_same_places():
    places = followed([a_round(1, "abcdef", "ghijk", "lmno"), a_round(2, "lmnoPQRS", "abcdefT", "ghijk", "UVWX")])
    assert places.schema == PLACES
    assert members(places, 2) == {0: "Tabcdef", 1: "ghijk", 2: "PQRSlmno", 3: "UVWX"}
    assert events(places, 1) == {0: ("new", None), 1: ("new", None), 2: ("new", None)}
    assert events(places, 2) == {0: ("grown", None), 1: ("same", None), 2: ("grown", None), 3: ("new", None)}


def test_the_larger_part_of_a_split_place_keeps_its_number_and_the_other_says_where_it_came_from():
    places = followed([a_round(1, "abcdefgh", "ijkl"), a_round(2, "abc", "defghX", "ijkl")])
    assert members(places, 2) == {0: "Xdefgh", 1: "ijkl", 2: "abc"}
    assert events(places, 2) == {0: ("shrunk", None), 1: ("same", None), 2: ("split", 0)}


def test_a_new_place_with_a_few_old_rows_did_not_split_from_theirs():
    places = followed([a_round(1, "abcdefgh"), a_round(2, "abcdef", "ghUVWXYZ")])
    assert events(places, 2)[1] == ("new", None)


def test_merged_places_go_on_as_the_larger_one():
    places = followed([a_round(1, "abc", "defgh", "ijkl"), a_round(2, "abcdefgh", "ijkl")])
    assert members(places, 2) == {1: "abcdefgh", 2: "ijkl"}
    assert events(places, 2) == {0: ("merged", 1), 1: ("grown", None), 2: ("same", None)}


def test_a_place_whose_rows_lie_outside_is_gone_and_its_number_is_given_to_nobody_else():
    rounds = [a_round(1, "abcd", "efgh"), a_round(2, "abcd", outside="efgh"), a_round(3, "abcd", "UVWX", outside="efgh")]
    places = followed(rounds)
    assert events(places, 2) == {0: ("same", None), 1: ("gone", None)}
    assert members(places, 3) == {0: "abcd", 2: "UVWX"}  # its cluster is number 1, and so was the place that is gone
    assert events(places, 3) == {0: ("same", None), 2: ("new", None)}


def test_a_place_that_comes_back_is_itself_again():
    rounds = [a_round(1, "abcdef", "ghij"), a_round(2, "abcdefghij"), a_round(3, "UVWX", "ghij", "abcdef")]
    places = followed(rounds)
    assert members(places, 3) == {0: "abcdef", 1: "ghij", 2: "UVWX"}
    assert events(places, 2) == {0: ("grown", None), 1: ("merged", 0)}
    assert events(places, 3) == {0: ("shrunk", None), 1: ("back", None), 2: ("new", None)}


def test_a_share_of_three_tenths_makes_a_match_and_less_makes_none():
    before = pl.DataFrame({"sample": list("abcdefghij"), "place": [5] * 10})
    three, two = (pl.DataFrame({"sample": list("abcdefghij"), "cluster": [0] * n + [-1] * (10 - n)}) for n in (3, 2))
    assert matched(before, three) == {0: 5}
    assert matched(before, two) == {}


def test_samples_that_only_one_side_knows_say_nothing():
    before = pl.DataFrame({"sample": list("abcdefgh"), "place": [7] * 8})
    now = pl.DataFrame({"sample": list("ghUVWXYZ"), "cluster": [3] * 8})
    assert matched(before, now) == {3: 7}
    assert matched(before, now.filter(pl.col("sample") > "h")) == {}
    assert matched(before.clear(), now) == {}


def test_clusters_dealt_by_chance_are_no_places():
    rng = random.Random(0)
    ids = [f"s{i:03}" for i in range(200)]
    deal = [i % 12 for i in range(200)]
    first, second = (pl.DataFrame({"sample": ids, of: rng.sample(deal, 200)}) for of in ("place", "cluster"))
    assert matched(first, second) == {}


def test_versions_are_matched_by_their_lineage():
    v1 = pl.DataFrame({"id": list("abcdefgh"), "cluster": [0] * 5 + [1] * 3, "cluster_name": ["fees"] * 5 + ["cards"] * 3})
    v2 = pl.DataFrame({"id": list("abcdfghXYZ"), "cluster": [1] * 4 + [0] * 6, "cluster_name": ["fees"] * 4 + ["cards"] * 6})
    assert matched(v1.select(sample="id", place="cluster"), v2.select(sample="id", cluster="cluster")) == {0: 1, 1: 0}
    versions = [v.select(round=pl.lit(n), sample="id", cluster="cluster", name="cluster_name") for n, v in enumerate((v1, v2), start=1)]
    assert members(followed(versions), 2) == {0: "abcd", 1: "XYZfgh"}


def test_fixed_clusters_keep_their_own_numbers_however_late_their_first_row_comes():
    frames = [a_round(1, "abc", "", "def"), a_round(2, "abc", "", "def", "XY"), a_round(3, "abc", "Z", "def", "XY")]
    places = followed(frames)
    assert places["place"].to_list() == places["cluster"].to_list()


def test_a_row_in_no_cluster_is_at_home_where_the_round_says():
    first = a_round(1, "abcd", "efgh", outside="x").with_columns(home=pl.Series([0] * 4 + [1] * 4 + [1]))
    second = a_round(2, "efgh", "abcd", outside="xy").with_columns(home=pl.Series([0] * 4 + [1] * 4 + [0, 1]))
    places = followed([first, second]).filter(pl.col("place") < 0)
    assert places.select("round", "sample", "home").rows() == [(1, "x", 1), (2, "x", 1), (2, "y", 0)]
    assert followed([first.with_columns(cluster=pl.lit(-1), home=pl.lit(-1))])["home"].unique().to_list() == [-1]


def test_a_resumed_run_counts_its_places_as_one_that_never_stopped():
    rounds = [
        a_round(1, "abcdef", "ghij"),
        a_round(2, "abcdefghij"),
        a_round(3, "UVWX", "ghij", "abcdef"),
        a_round(4, "UVWXghij", "abcdef"),
    ]
    whole = followed(rounds)
    for n in range(len(rounds)):
        assert whole.filter(pl.col("round") <= n).equals(followed(rounds[:n]))


def test_rows_of_history_add_up_to_the_rows_of_each_round():
    places = followed([a_round(1, "abc", "defgh"), a_round(2, "abcdefgh"), a_round(3, "abcX", "defgh", outside="y")])
    samples = pl.DataFrame({"id": list("abcdefghXy"), "origin": ["real"] * 4 + ["made"] * 6})
    told = history(places, samples)
    assert told.schema == HISTORY
    assert told.select("round", "place", "size", "real", "made").rows() == [
        (1, 0, 3, 3, 0), (1, 1, 5, 1, 4), (2, 0, 0, 0, 0), (2, 1, 8, 4, 4), (3, 0, 4, 3, 1), (3, 1, 5, 1, 4)
    ]  # fmt: skip
    assert told.filter(pl.col("size") > 0)["name"].to_list() == ["name 0", "name 1", "name 0", "name 0", "name 1"]
    assert history(places.clear(), samples).is_empty()


CLUSTERING = st.lists(st.integers(-1, 4), min_size=12, max_size=12)


@given(st.lists(CLUSTERING, min_size=1, max_size=5), st.permutations(range(5)), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_place_is_one_cluster_and_neither_numbers_nor_order_decide_which(labels, renumbered, rng):
    ids = [f"s{i:02}" for i in range(12)]
    names = {-1: -1} | dict(enumerate(renumbered))
    rounds = [pl.DataFrame({"round": n, "sample": ids, "cluster": of, "name": ["x"] * 12}) for n, of in enumerate(labels)]
    places = followed(rounds)
    pairs = places.select("round", "cluster", "place").unique()
    assert pairs.select("round", "cluster").is_unique().all()
    assert pairs.select("round", "place").is_unique().all()
    assert places.filter((pl.col("cluster") < 0) != (pl.col("place") < 0)).is_empty()
    for before, now in pairwise(rounds):
        held = before.rename({"cluster": "place"})
        shuffled = now.with_columns(cluster=pl.col("cluster").replace_strict(names, return_dtype=pl.Int64)).sample(
            fraction=1, shuffle=True, seed=rng.randrange(100)
        )
        assert {names[cluster]: place for cluster, place in matched(held, now).items()} == matched(held.reverse(), shuffled)


def test_every_row_is_at_home_in_its_cluster_or_the_nearest():
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]], np.float32)
    clusters = np.array([0, -1, 1, -1])
    assert centres_of(vectors, clusters) == pytest.approx(np.array([[1, 0], [0, 1]]))
    assert homes(vectors, clusters).tolist() == [0, 0, 1, 1]
    assert homes(vectors, np.full(4, -1)).tolist() == [-1] * 4
    assert centres_of(vectors, np.zeros(4, np.intp))[0] == pytest.approx(vectors.sum(axis=0) / np.linalg.norm(vectors.sum(axis=0)))
    assert nearest_place(np.array([[0.5**0.5, 0.5**0.5]], np.float32), np.eye(2, dtype=np.float32)).tolist() == [0]  # the first of equals

import numpy as np
import polars as pl
import pytest

from factory.splits import assign, near_groups, nearest, normalised


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def groups_by_search(texts, vectors, threshold):
    """The slow and plain way: walk from every text to all that are near."""
    near = (vectors @ vectors.T >= threshold) | np.array([[normalised(a) == normalised(b) for b in texts] for a in texts])
    group = np.full(len(texts), -1)
    for start in range(len(texts)):
        waiting = [start] if group[start] < 0 else []
        while waiting:
            node = waiting.pop()
            if group[node] < 0:
                group[node] = start
                waiting += np.flatnonzero(near[node]).tolist()
    return group


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_the_connected_components(seed, monkeypatch):
    monkeypatch.setattr("factory.cosine.ROWS", 7)  # so that pairs of different blocks count too
    monkeypatch.setattr("factory.cosine.COLUMNS", 5)
    rng = np.random.default_rng(seed)
    vectors = unit(np.repeat(rng.normal(size=(20, 8)), 3, axis=0) + rng.normal(scale=0.25, size=(60, 8)))
    texts = [f"text {n % 50}" + "!" * (n // 50) for n in range(60)]  # the last ten say the same as the first, otherwise embedded
    found = near_groups(texts, vectors, 0.93)
    assert found.tolist() == groups_by_search(texts, vectors, 0.93 - 1e-3).tolist()
    assert 5 < len(set(found.tolist())) < 55


def test_groups_of_many_texts_are_those_of_all_pairs(monkeypatch):
    rng = np.random.default_rng(3)
    vectors = unit(np.repeat(rng.normal(size=(400, 64)), 3, axis=0) + rng.normal(scale=0.25, size=(1200, 64)))
    texts = [f"text {n}" for n in range(1200)]
    found = near_groups(texts, vectors)
    monkeypatch.setattr("factory.cosine._Hashed.is_slower", lambda *_: False)  # as if they were too many
    assert near_groups(texts, vectors).tolist() == found.tolist()
    assert 400 <= len(set(found.tolist())) < 1100
    products = np.triu(vectors @ vectors.T, 1)
    assert all(found[a] == found[b] for a, b in zip(*np.nonzero(products >= 0.9), strict=True))


def test_a_chain_of_near_texts_is_one_group_whatever_its_length():
    angles = np.linspace(0, 3, 200)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    order = np.random.default_rng(0).permutation(200)
    assert set(near_groups([str(n) for n in range(200)], vectors[order], 0.999).tolist()) == {0}


def test_equal_words_are_near_though_their_vectors_are_not():
    assert near_groups(["Where is it?", "other", "  where IS it"], np.eye(3, dtype=np.float32)).tolist() == [0, 1, 0]
    assert near_groups([], np.zeros((0, 3), np.float32)).tolist() == []
    assert normalised("!?") == "!?"


def test_nearest_finds_the_pair_across_blocks(monkeypatch):
    monkeypatch.setattr("factory.splits.BLOCK", 3)
    monkeypatch.setattr("factory.splits.ACROSS", 2)
    rng = np.random.default_rng(1)
    a, b = unit(rng.normal(size=(10, 6))), unit(rng.normal(size=(5, 6)))
    a[8] = b[3]
    value, i, j = nearest(a, b)
    assert (i, j) == (8, 3)
    assert value == pytest.approx(1)
    assert nearest(a, b[:0]) is None


def rows(labels: int = 6, each: int = 50, of_group: int = 1) -> pl.DataFrame:
    n = labels * each
    return pl.DataFrame(
        {
            "id": [f"s{i:04}" for i in range(n)],
            "group": [i // labels // of_group * labels + i % labels for i in range(n)],
            "label": [f"label {i % labels}" for i in range(n)],
            "weight": [1] * n,
            "pin": pl.Series([None] * n, dtype=pl.String),
        }
    )


@pytest.mark.parametrize("of_group", [1, 3])
def test_shares_hold_in_every_label_and_groups_stay_whole(of_group):
    frame = rows(of_group=of_group)
    frame = frame.with_columns(split=assign(frame, {"validation": 0.1, "test": 0.2}))
    per_label = frame.group_by("label").agg(
        (pl.col("split") == "test").sum().alias("test"), (pl.col("split") == "validation").sum().alias("val")
    )
    assert per_label["test"].is_between(10 - of_group, 10 + of_group).all()
    assert per_label["val"].is_between(5 - of_group, 5 + of_group).all()
    assert frame.group_by("group").agg(pl.col("split").n_unique())["split"].max() == 1


def test_small_labels_together_reach_the_share():
    frame = rows(labels=40, each=3)
    counts = dict(assign(frame, {"validation": 0.1, "test": 0.1}).value_counts().iter_rows())
    assert counts["test"] == pytest.approx(12, abs=1)
    assert counts["validation"] == pytest.approx(12, abs=1)


def test_the_order_of_rows_does_not_matter():
    frame = rows(of_group=2)
    one = frame.with_columns(split=assign(frame, {"validation": 0.1, "test": 0.1})).sort("id")
    mixed = frame.sample(fraction=1, shuffle=True, seed=3)
    assert one.equals(mixed.with_columns(split=assign(mixed, {"validation": 0.1, "test": 0.1})).sort("id"))


def test_pins_take_their_group_along_and_test_outranks_train():
    frame = rows(labels=1, each=9, of_group=3).with_columns(
        pin=pl.Series(["test", "train", None, "validation", None, None, "train", "validation", None])
    )
    assert assign(frame, {"validation": 0, "test": 0}).to_list() == ["test"] * 3 + ["validation"] * 3 + ["train"] * 3


def test_what_is_pinned_to_test_counts_towards_the_share():
    frame = rows(labels=2, each=50)
    pinned = frame.with_columns(pin=pl.when(pl.col("id").is_in(["s0000", "s0002", "s0004", "s0006", "s0008"])).then(pl.lit("test")))
    split = pinned.with_columns(split=assign(pinned, {"validation": 0, "test": 0.1})).filter(pl.col("split") == "test")
    assert dict(split["label"].value_counts().iter_rows()) == {"label 0": 5, "label 1": 5}

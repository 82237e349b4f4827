"""Every figure against cases counted by hand, nltk, or its definition written down plainly; and what must hold for any set of texts."""

import io
import json
import random
import re
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rich.console import Console
from sklearn.cluster import KMeans

from factory import diversity as module
from factory import ngrams
from factory.cli import main
from factory.diversity import (
    FIGURES,
    cluster_entropy,
    compression_ratio,
    density_and_coverage,
    diversity,
    hash_order,
    mean_cosine,
    of_distances,
    table,
    vendi,
)
from factory.release import open_version, release
from factory.words import flat, words
from schemas.recipe import ReleasePlan
from tests.context import embedder
from tests.run_on_disk import bank_run, facts

DOCS = Path(__file__).parents[2] / "docs" / "diversity.md"

# Texts of a small vocabulary, so that all lengths, counts and coincidences come up; every word is one for both tokenisers.
sets_of_texts = st.lists(st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join), max_size=12)


def unit(rows: int, dimensions: int = 16, seed: int = 0) -> np.ndarray:
    return normed(np.random.default_rng(seed).normal(size=(rows, dimensions)))


def clustered(rows: int, clusters: int, spread: float = 0.3, dimensions: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres, sizes = unit(clusters, dimensions, seed), rng.dirichlet(np.ones(clusters))
    widths = rng.uniform(0, spread, clusters)
    which = rng.choice(clusters, rows, p=sizes)
    return normed(centres[which] + widths[which, None] * rng.normal(size=(rows, dimensions)))


def normed(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def counted(texts, n: int) -> ngrams.Grams:
    return ngrams.grams(*words(flat(texts)), n)


def grams_of(text: str, n: int) -> list[tuple[str, ...]]:
    return list(zip(*(text.split()[i:] for i in range(n)), strict=False))


# -- of words --------------------------------------------------------------------------------------------------------------


def test_distinct_counts_words_and_pairs_within_texts():
    texts = ["My card, my CARD!", "card my"]
    assert ngrams.distinct(counted(texts, 1)) == pytest.approx(2 / 6)  # my card my card card my
    assert ngrams.distinct(counted(texts, 2)) == pytest.approx(2 / 4)  # my-card card-my my-card | card-my; no pair across the two texts
    assert ngrams.distinct(counted(["don't", "naïve café 東京"], 1)) == 1.0
    assert ngrams.distinct(counted(["one", "", "..."], 2)) is None


@settings(deadline=None)
@given(sets_of_texts, st.integers(1, 4))
def test_n_grams_are_counted_as_a_counter_does(texts, n):
    by_text = [Counter(grams_of(text, n)) for text in texts]
    everywhere = sum(by_text, Counter())
    grams = counted(texts, n)
    assert sorted(grams.totals.tolist()) == sorted(everywhere.values())
    assert sorted(zip(grams.text.tolist(), grams.times.tolist(), strict=True)) == sorted(
        (number, count) for number, found in enumerate(by_text) for count in found.values()
    )
    assert grams.by_text(grams.times).tolist() == [found.total() for found in by_text]
    if everywhere:
        assert ngrams.distinct(grams) == len(everywhere) / everywhere.total()


def test_distinct_in_so_many_is_the_mean_over_all_samples():
    grams = counted(["a b c a", "a a d", "b e b"], 1)  # a 4, b 3, c d e 1 each
    assert ngrams.distinct_in(grams, 1) == pytest.approx(1)
    assert ngrams.distinct_in(grams, 10) == pytest.approx(5 / 10)
    assert ngrams.distinct_in(grams, 11) is None
    same = (4 * 3 + 3 * 2) / (10 * 9)  # two drawn are one
    assert ngrams.distinct_in(grams, 2) == pytest.approx((2 - same) / 2, rel=1e-12)
    rng, every = random.Random(0), list("abcaaadbeb")
    drawn = [len(set(rng.sample(every, 6))) / 6 for _ in range(20_000)]
    assert ngrams.distinct_in(grams, 6) == pytest.approx(np.mean(drawn), abs=0.003)


def test_distinct_in_so_many_does_not_fall_as_a_set_grows():
    rng = random.Random(1)
    vocabulary = [f"w{number}" for number in range(500) for _ in range(1 + 2000 // (number + 1))]
    few, many = ([" ".join(rng.choices(vocabulary, k=20)) for _ in range(rows)] for rows in (200, 4000))
    assert ngrams.distinct(counted(many, 1)) < 0.2 * ngrams.distinct(counted(few, 1))
    assert ngrams.distinct_in(counted(many, 1), 100) == pytest.approx(ngrams.distinct_in(counted(few, 1), 100), rel=0.02)


def test_self_repetition_counts_the_other_texts():
    texts = ["one two three four five", "one two three four", "two three four five six", "one two three four one two three four", "none"]
    shared = [3 - 1 + 2 - 1, 3 - 1, 2 - 1, 3 - 1, 0]  # of "one two three four" in three texts, "two three four five" in two
    assert ngrams.self_repetition(counted(texts, 4)) == pytest.approx(np.mean(np.log(np.add(shared, 1))))
    assert ngrams.self_repetition(counted(["a b c d e f g"] * 1, 4)) == 0


@settings(deadline=None)
@given(sets_of_texts)
def test_self_bleu_is_that_of_nltk(texts):
    found = ngrams.self_bleu([counted(texts, n) for n in (1, 2, 3, 4)])
    split, method1 = [text.split() for text in texts], SmoothingFunction().method1
    if len(texts) < 2:
        assert found is None
        return
    others = [split[:number] + split[number + 1 :] for number in range(len(split))]
    by_nltk = [sentence_bleu(rest, text, smoothing_function=method1) for rest, text in zip(others, split, strict=True)]
    assert found == pytest.approx(np.mean(by_nltk), abs=1e-12)


def test_compression_ratio_is_of_zlib_at_level_nine():
    texts = ["where is my card"] * 50
    raw = "\n".join(texts).encode()
    assert compression_ratio(texts) == len(raw) / len(zlib.compress(raw, 9))
    assert compression_ratio(texts) > compression_ratio([f"{i * 7919 % 1009:x} {i * 104729 % 997:x}" for i in range(50)])


# -- of meaning ------------------------------------------------------------------------------------------------------------


def test_mean_cosine_is_that_of_all_pairs():
    vectors = unit(40)
    pairs = [float(vectors[i] @ vectors[j]) for i in range(40) for j in range(i)]
    assert mean_cosine(vectors) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_nearest_distance_is_to_another_row(monkeypatch):
    square = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)  # nearest: 0.6, 0.8, 0.8
    assert of_distances(square)["mean_nearest_distance"] == pytest.approx(1 - (0.6 + 0.8 + 0.8) / 3)
    vectors = unit(300)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    monkeypatch.setattr(module, "BLOCK", 7 * 300)
    assert of_distances(vectors)["mean_nearest_distance"] == pytest.approx(1 - cosines.max(axis=1).mean(), abs=1e-6)
    monkeypatch.setattr(module, "QUERIES", 2)  # the first row and the last
    assert of_distances(vectors)["mean_nearest_distance"] == pytest.approx(1 - cosines.max(axis=1)[[0, -1]].mean(), abs=1e-6)


@pytest.mark.parametrize("n", [1, 3, 16, 60])
def test_vendi_of_identical_rows_is_one(n):
    assert vendi(np.repeat(unit(1), n, axis=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("n", [1, 3, 16])
def test_vendi_of_orthogonal_rows_is_their_number(n):
    assert vendi(np.eye(n, 16, dtype=np.float32)) == pytest.approx(n, abs=1e-4)


def test_vendi_is_the_same_by_either_matrix_and_blind_to_copies():
    vectors = unit(10)
    shares = np.linalg.eigvalsh(vectors.astype(float) @ vectors.T.astype(float) / 10).clip(1e-12)
    by_kernel = float(np.exp(-(shares * np.log(shares)).sum()))
    assert vendi(vectors) == pytest.approx(by_kernel, abs=1e-4)
    assert vendi(np.repeat(vectors, 3, axis=0)) == pytest.approx(by_kernel, abs=1e-4)  # 30 rows of 16 dimensions: the Gram matrix


def novelty(vectors: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
    """NovelSum of each row, written down from the paper and the authors' definition of density: no blocks, no sample, a row at a time."""
    found = []
    for row in vectors.astype(float):
        distances = np.sort(1 - vectors.astype(float) @ row)
        ranks = np.arange(1, len(vectors) + 1)
        mean = (distances / ranks).sum() / (1 / ranks).sum()
        if reference is not None:
            squared = np.sort(((reference.astype(float) - row) ** 2).sum(axis=1))
            mean /= squared[squared > 1e-9][:10].mean() ** 0.5
        found.append(mean)
    return np.array(found)


def test_novelsum_is_that_of_its_definition(monkeypatch):
    vectors, reference = clustered(200, 9), clustered(60, 4, seed=1)
    monkeypatch.setattr(module, "BLOCK", 17 * 200)

    def by(reference):
        return of_distances(vectors, reference)["reference_novelsum"]

    assert of_distances(vectors)["novelsum"] == pytest.approx(novelty(vectors).mean(), rel=1e-5)
    assert by(reference) == pytest.approx(novelty(vectors, reference).mean(), rel=1e-4)
    assert by(vectors[:50]) == pytest.approx(novelty(vectors, vectors[:50]).mean(), rel=1e-4)  # rows that are in it
    assert by(np.concatenate([vectors[:50], vectors[:50]])) == pytest.approx(by(vectors[:50]), rel=1e-6)  # copies make nothing dense
    assert set(of_distances(vectors, vectors[:10])) == {"mean_nearest_distance", "novelsum"}


def test_novelsum_of_some_rows_is_within_two_percent(monkeypatch):
    vectors, reference = clustered(10_000, 60, spread=0.5), clustered(300, 60, spread=0.5)
    estimate = of_distances(vectors, reference)
    monkeypatch.setattr(module, "QUERIES", len(vectors))
    exact = of_distances(vectors, reference)
    assert estimate == pytest.approx(exact, rel=0.02)
    assert estimate != exact


def test_entropy_is_one_where_all_cells_hold_as_many_and_none_where_one_holds_all():
    corners = np.repeat(np.eye(8, 16, dtype=np.float32), 4, axis=0)  # 32 rows: 8 cells
    assert cluster_entropy(corners) == pytest.approx(1)
    assert cluster_entropy(corners[:4], corners) == 0
    halves = np.concatenate([corners[:4], corners[4:8]])
    assert cluster_entropy(halves, corners) == pytest.approx(np.log(2) / np.log(8))
    assert cluster_entropy(unit(7)) is None
    assert cluster_entropy(np.repeat(unit(1), 32, axis=0)) == 0  # fewer different rows than cells


def test_rows_stand_in_the_cell_whose_centre_is_nearest():
    vectors, reference = clustered(500, 40, spread=1.0), clustered(400, 12, spread=1.0)
    fitted = KMeans(64, n_init=1, random_state=0).fit(reference.astype(np.float64))
    norms = np.linalg.norm(fitted.cluster_centers_, axis=1)
    assert norms.min() < 0.8 * norms.max()  # so it does matter that they are no unit vectors
    shares = np.bincount(fitted.predict(vectors.astype(np.float64))) / len(vectors)
    shares = shares[shares > 0]
    assert cluster_entropy(vectors, reference) == pytest.approx(-(shares * np.log(shares)).sum() / np.log(64), rel=1e-3)


def test_entropy_by_k_means_falls_where_rows_crowd():
    reference = clustered(2000, 30, spread=0.1)
    even, crowded = reference[:1000], np.concatenate([reference[:500], np.repeat(reference[:5], 100, axis=0)])
    assert cluster_entropy(crowded, reference) < cluster_entropy(even, reference) - 0.05
    assert cluster_entropy(even, reference) == cluster_entropy(even, reference)


def test_density_and_coverage_are_those_of_their_paper(monkeypatch):
    vectors, reference = clustered(150, 6, seed=2), clustered(70, 9, seed=3)

    def far(a, b):
        return np.sqrt(((a[:, None].astype(float) - b[None].astype(float)) ** 2).sum(axis=-1))

    radii = np.sort(far(reference, reference), axis=1)[:, 5]  # the first is the row itself
    near = far(reference, vectors) < radii[:, None]
    monkeypatch.setattr(module, "BLOCK", 11 * 70)
    density, coverage = density_and_coverage(vectors, reference)
    assert density == pytest.approx(near.sum(axis=0).mean() / 5)
    assert coverage == near.any(axis=1).mean()
    assert 0 < coverage < 1
    assert density_and_coverage(vectors, reference[:5]) == (None, None)
    assert density_and_coverage(vectors[:0], reference) == (None, None)


# -- all of them -----------------------------------------------------------------------------------------------------------


def test_figures_that_so_few_texts_lack_are_left_out():
    assert diversity([], np.empty((0, 4), np.float32)) == {}
    alone = {"distinct_1", "compression_ratio", "self_repetition", "vendi"}
    assert set(diversity(["hello"], unit(1))) == alone
    two = alone | {"distinct_2", "self_bleu", "mean_cosine", "mean_nearest_distance", "novelsum"}
    assert set(diversity(["hello you", "and me"], unit(2))) == two
    assert set(diversity(["hello you", "and me"])) == two - {"vendi", "mean_cosine", "mean_nearest_distance", "novelsum"}
    assert set(diversity(["hello you", "and me"], unit(2), unit(0))) == two
    assert set(diversity(["hello you", "and me"], unit(2), unit(8))) == two | {
        "cluster_entropy",
        "reference_coverage",
        "reference_density",
    }


@pytest.fixture(scope="module")
def many():
    rng = random.Random(5)
    texts = [" ".join(rng.choices("abcdefgh", k=rng.randrange(9))) for _ in range(400)]
    return texts, embedder().embed(texts), unit(60, embedder().dimension)


def test_every_figure_is_named_and_explained_once(many):
    figures = diversity(*many)
    assert set(figures) == set(FIGURES)
    explained = re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(FIGURES)
    for name in FIGURES:
        assert re.sub(r"^(distinct_)\d", r"\g<1>1", name) in diversity.__doc__


def test_the_order_of_the_texts_does_not_matter(many):
    texts, vectors, reference = many
    shuffled = np.random.default_rng(0).permutation(len(texts))
    again = diversity([texts[row] for row in shuffled], vectors[shuffled], reference)
    assert again == pytest.approx(diversity(texts, vectors, reference), rel=1e-9)
    order = hash_order(texts)
    assert sorted(order.tolist()) == list(range(len(texts)))
    runs = [texts[a] for a, b in pairwise(order) if texts[a] != texts[b]]
    assert len(runs) + 1 == len(set(texts))  # copies lie together


def test_copies_are_less_varied_by_every_figure_that_has_a_direction(many):
    texts, vectors, reference = many
    half = hash_order(texts)[:200]
    copies = np.concatenate([half, half])
    once, twice = diversity(texts, vectors, reference), diversity([texts[row] for row in copies], vectors[copies], reference)
    for name in ("compression_ratio", "self_repetition", "self_bleu"):
        assert twice[name] > once[name], name
    for name in ("distinct_2", "distinct_3_in_100", "mean_nearest_distance", "novelsum"):
        assert twice[name] < once[name], name


def test_the_table_shows_sets_side_by_side():
    said = io.StringIO()
    Console(width=140, file=said).print(table({"one.jsonl": {"vendi": 12.345, "self_bleu": 0.5}, "two.jsonl": {"self_bleu": 0.25}}))
    lines = [line.split() for line in said.getvalue().splitlines()]
    assert lines[0][:3] == ["figure", "one.jsonl", "two.jsonl"]
    assert lines[1][:3] == ["self_bleu", "0.5", "0.25"]
    assert lines[2][:3] == ["vendi", "12.35", "–"] or lines[2][:3] == ["vendi", "12.34", "–"]
    assert len(lines) == 3


def test_a_version_holds_the_figures_of_its_made_rows(tmp_path):
    run = bank_run(tmp_path / "bank-00000000")
    folder = release(run, name="bank", plan=ReleasePlan(), datasets=tmp_path / "datasets", embed=embedder().embed, facts=facts())
    texts, seeds = (frame["input"].to_list() for frame in (run.accepted, run.of_fate("real")))
    assert open_version(folder).diversity == pytest.approx(diversity(texts, embedder().embed(texts), embedder().embed(seeds)))


# -- of anybody's files ----------------------------------------------------------------------------------------------------


ASKED = [(a, b) for a in ("rain", "tax", "chess") for b in "xyz"]


@pytest.fixture
def files(tmp_path):
    rows = [{"instruction": f"Tell me of {a} and {b}.", "output": f"{b} it is."} for a, b in ASKED]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "short.csv").write_text("instruction,output\nSay tea.,No.\nSay sea.,No.\nSay bee.,No.\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "only a text"}\n')
    return tmp_path


def said(*args, code=0):
    done = CliRunner().invoke(main, ["diversity", *map(str, args)])
    assert done.exit_code == code, done.output
    return done.output


def test_files_are_measured_side_by_side(files):
    names = long, short = [str(files / name) for name in ("long.jsonl", "short.csv")]
    found = json.loads(said(*names, "--no-vectors", "--json"))
    texts = [f"Tell me of {a} and {b}.\n{b} it is." for a, b in ASKED]
    assert list(found) == names
    assert found[long] == {"rows": 9, **diversity(texts)}
    assert found[short]["rows"] == 3
    outputs = json.loads(said(short, "--no-vectors", "--json", "--compare", "output"))
    assert outputs[short] == {"rows": 3, **diversity(["No."] * 3)}
    equal = json.loads(said(*names, "--no-vectors", "--json", "--equal"))
    assert equal[long] == {"rows": 3, **diversity([texts[row] for row in hash_order(texts)[:3]])}
    shown = said(*names, "--no-vectors")
    assert re.search(r"^rows +9 +3", shown, re.MULTILINE)
    assert "--equal cuts them" in shown
    assert "--equal cuts them" not in said(*names, "--no-vectors", "--equal")


def test_files_are_measured_against_a_reference(files):
    long, short = (str(files / name) for name in ("long.jsonl", "short.csv"))
    found = json.loads(said(short, "--json", "--reference", long))
    assert found[short]["reference_coverage"] < 1
    assert "vendi" in found[short]
    itself = json.loads(said(long, "--json", "--reference", long))
    assert itself[long]["reference_coverage"] == 1
    assert "needs vectors" in said(short, "--reference", long, "--no-vectors", code=2)


def test_a_file_without_the_text_that_is_asked_for_is_an_error(files):
    assert "no row in it has an output" in said(files / "texts.jsonl", "--no-vectors", "--compare", "output", code=1)
    assert "there is no such file" in said(files / "none.jsonl", "--no-vectors", code=1)

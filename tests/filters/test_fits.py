"""Claims that a reader can judge by eye, against seeds of three intents."""

import json

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression

from factory.errors import GristmillError
from factory.store import VERDICTS
from filters.fits import Fits
from tests.context import FakeContext, chat, frame

SEEDS = frame(
    chat("How do I cancel my transfer?", "cancel", origin="real"),
    chat("I want to stop a payment that I made by mistake.", "cancel", origin="real"),
    chat("Why was I charged a fee for my transfer?", "fee", origin="real"),
    chat("There is an extra charge on my account after a transfer.", "fee", origin="real"),
    chat("How long does a transfer from Europe take?", "timing", origin="real"),
    chat("When will the money arrive in my account?", "timing", origin="real"),
)
RIGHT = frame(
    chat("Please cancel the transfer that I just made.", "cancel"),
    chat("What is this fee on my transfer?", "fee"),
    chat("How many days until my transfer arrives?", "timing"),
)
WRONG = frame(
    chat("Can I still cancel a transfer?", "fee"),
    chat("Why did you charge me extra fees?", "timing"),
    chat("How long will it take until the money is there?", "cancel"),
)


@pytest.mark.parametrize("by", [("nearest",), ("centroid",), ("probe",), ("probe", "nearest", "centroid")])
def test_right_claims_stay_and_wrong_ones_go(by):
    stage, ctx = Fits(by=by, at_least=0.35, margin=0), FakeContext(seeds=SEEDS)
    right, wrong = stage.judge(RIGHT, ctx), stage.judge(WRONG, ctx)
    assert right["keep"].all()
    assert right["reason"].null_count() == 3
    assert not wrong["keep"].any()
    assert wrong["reason"].to_list() == ["other label nearest"] * 3
    assert right.schema == VERDICTS
    assert right["score"].min() > wrong["score"].max()
    assert "unjudged" not in ctx.reports


def test_of_a_text_about_something_else_some_label_is_the_nearest_too_and_closeness_sees_it():
    stray = frame(chat("How do I cancel my subscription to the gym?", "cancel"))
    loose = Fits(by=["nearest", "centroid"], margin=-2).judge(stray, FakeContext(seeds=SEEDS)).row(0, named=True)
    assert loose["keep"]
    measured = json.loads(loose["detail"])["closeness"]
    for closeness, keep in ((measured - 0.01, True), (measured + 0.01, False)):
        verdict = Fits(by=["nearest", "centroid"], margin=-2, closeness=closeness).judge(stray, FakeContext(seeds=SEEDS)).row(0, named=True)
        assert verdict["keep"] is keep
        assert verdict["reason"] == (None if keep else "off topic")


def test_detail_says_what_each_opinion_would_have_said():
    verdict = Fits(by=("probe", "nearest", "centroid")).judge(WRONG, FakeContext(seeds=SEEDS)).row(0, named=True)
    detail = json.loads(verdict["detail"])
    assert detail.pop("closeness") == pytest.approx(0.545, abs=0.02)
    assert detail == {
        "nearest": SEEDS["id"][0],
        "nearest_label": "cancel",
        "centroid_label": "cancel",
        "probe_label": "cancel",
    }


def test_score_is_the_probability_that_the_threshold_holds():
    ctx = FakeContext(seeds=SEEDS)
    score = Fits(at_least=0).judge(RIGHT, ctx)["score"]
    assert score.is_between(1 / 3, 1).all()
    middle = score.sort()[1]
    strict = Fits(at_least=middle).judge(RIGHT, ctx)
    assert strict["keep"].to_list() == (score >= middle).to_list()
    assert strict.filter(~pl.col("keep"))["reason"].to_list() == ["label uncertain"]


def test_auto_asks_what_the_median_seed_gets_when_it_is_left_out():
    ctx = FakeContext(seeds=SEEDS)
    verdicts = Fits(by=("probe",)).judge(RIGHT, ctx)
    vectors, labels = ctx.embed(SEEDS["input"].to_list()), SEEDS["label"].to_list()
    chances = []
    for left in ([0, 2, 4], [1, 3, 5]):  # of two seeds a label, one at a time
        others = [i for i in range(6) if i not in left]
        probe = LogisticRegression(C=10, max_iter=2000).fit(vectors[others], [labels[i] for i in others])
        chances += [probe.predict_proba(vectors[[i]])[0][probe.classes_.tolist().index(labels[i])] for i in left]
    assert ctx.reports["at_least"] == pytest.approx(np.median(chances), abs=1e-6)
    assert verdicts["keep"].to_list() == (verdicts["score"] >= ctx.reports["at_least"]).to_list()


def test_auto_asks_nothing_where_no_seed_can_be_left_out():
    ctx = FakeContext(seeds=SEEDS.gather([0, 2, 4]))  # one of each label
    assert Fits(by=("probe",)).judge(RIGHT, ctx)["keep"].all()
    assert ctx.reports["at_least"] == 0


MEANINGS = {
    "cancel": "wants to take a payment back",
    "fee": "asks what sending money costs",
    "timing": "asks how many days it takes",
}


@pytest.mark.parametrize("by", ["nearest", "centroid", "probe"])
def test_a_description_speaks_for_its_label(by):
    ctx, row = FakeContext(seeds=SEEDS), frame(chat("I would like to take a payment back.", "cancel"))
    plain, told = Fits(by=(by,)).judge(row, ctx), Fits(by=(by,), labels=MEANINGS).judge(row, ctx)
    assert told["score"][0] > plain["score"][0] + 0.02
    nearest = told["detail"].str.json_path_match("$.nearest")[0]
    assert nearest in SEEDS["id"].to_list()  # a seed, though the description is nearer


def test_a_described_label_that_no_seed_carries_is_a_mistake_of_the_recipe():
    with pytest.raises(GristmillError, match=r"stage 01-test: labels: describes 'cancle'.*did you mean 'cancel'"):
        Fits(labels={"fee": "a fee", "cancle": "to cancel"}).judge(RIGHT, FakeContext(seeds=SEEDS))


@pytest.mark.parametrize("by", ["nearest", "centroid"])
def test_margin_is_the_cosine_that_separates_the_claim_from_the_next_label(by):
    ctx = FakeContext(seeds=SEEDS)
    score = Fits(by=(by,)).judge(RIGHT, ctx)["score"]
    assert Fits(by=(by,), margin=score.max()).judge(RIGHT, ctx)["keep"].to_list() == (score == score.max()).to_list()
    assert Fits(by=(by,), margin=-2).judge(WRONG, ctx)["keep"].all()


class Compass(FakeContext):
    """Embeds a text that is an angle in degrees as that direction in the plane."""

    def embed(self, texts):
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_every_opinion_must_agree_and_margins_are_cosines():
    ctx = Compass(seeds=frame(chat("0", "a", origin="real"), chat("120", "a", origin="real"), chat("40", "b", origin="real")))
    row = frame(chat("52", "a"))  # 12 degrees to b's seed; 8 degrees to the centroid of a, at 60
    nearest, centroid, both = (Fits(by=by, margin=0).judge(row, ctx) for by in (("nearest",), ("centroid",), ("centroid", "nearest")))
    assert [v["keep"][0] for v in (nearest, centroid, both)] == [False, True, False]
    assert nearest["score"][0] == pytest.approx(np.cos(np.radians(52)) - np.cos(np.radians(12)), abs=1e-6)
    assert centroid["score"][0] == pytest.approx(np.cos(np.radians(8)) - np.cos(np.radians(12)), abs=1e-6)
    assert both["score"][0] == nearest["score"][0]


def test_margin_does_not_touch_the_probe():
    assert Fits(by=("probe",), at_least=0.35, margin=2).judge(RIGHT, FakeContext(seeds=SEEDS))["keep"].all()


def test_a_seed_fits_its_own_label():
    verdicts = Fits(by=("nearest",)).judge(SEEDS, FakeContext(seeds=SEEDS))
    assert verdicts["keep"].all()
    assert verdicts["detail"].str.json_path_match("$.nearest").to_list() == SEEDS["id"].to_list()


def test_a_label_that_no_seed_carries_is_rejected_and_no_label_is_kept():
    ctx = FakeContext(seeds=SEEDS)
    verdicts = Fits().judge(frame(chat("Where is my card?", "card"), chat("Can I cancel?"), chat("Cancel my transfer now.", "cancel")), ctx)
    assert verdicts["keep"].to_list() == [False, True, True]
    assert verdicts["reason"].to_list() == ["unknown label", None, None]
    assert verdicts["score"].is_null().to_list() == [True, True, False]
    assert "1 rows" in ctx.reports["unjudged"]


@pytest.mark.parametrize("seeds", [SEEDS.head(0), SEEDS.head(2), SEEDS.with_columns(label=pl.lit(None, pl.String))])
def test_without_two_labels_among_the_seeds_nothing_is_judged_and_the_report_says_so(seeds):
    ctx = FakeContext(seeds=seeds)
    assert Fits().judge(WRONG, ctx)["keep"].to_list() == [True] * 3
    assert "two to tell apart" in ctx.reports["unjudged"]


def test_an_empty_batch_gives_no_verdicts():
    assert Fits(by=("probe", "nearest", "centroid")).judge(RIGHT.head(0), FakeContext(seeds=SEEDS)).is_empty()


@pytest.mark.parametrize("fields", [{"by": ()}, {"by": ("guess",)}, {"at_least": 2}, {"at_least": "some"}, {"margin": 3}, {"limit": 1}])
def test_fields_are_checked(fields):
    with pytest.raises(ValidationError):
        Fits(**fields)

"""Real answers, and the same words in no order, under the project's real small model; the bounds under a tiny one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.store import VERDICTS, samples_frame
from filters.perplexity import Perplexity
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame
from tests.filters.test_ifd import real_rows
from tests.small_models import made, real_model

SEEDS = frame(*(chat(f"Say number {i}", f"The number {i} is {i * i}", origin="real") for i in range(20)))


@pytest.fixture(scope="module")
def real() -> Iterator[dict[str, Any]]:
    with real_model() as settings:
        yield settings


def judged(rows: pl.DataFrame, seeds: pl.DataFrame = SEEDS, **fields: Any) -> pl.DataFrame:
    return Perplexity.model_validate({"model": made("causal")} | fields).judge(rows, FakeContext(seeds=seeds))


def text(words: str) -> Sample:
    return Sample.model_validate({"text": words, "provenance": {"origin": "made", "generator": "t"}})


def shuffled(words: str) -> str:
    parts = words.split()
    random.Random(0).shuffle(parts)
    return " ".join(parts)


def test_a_real_answer_is_likelier_than_its_words_in_no_order(real: dict[str, Any]) -> None:
    rows = real_rows(4)
    fluent = frame(*(chat(asked, said) for asked, said in rows))
    broken = frame(*(chat(asked, shuffled(said)) for asked, said in rows))
    loop = frame(chat("Say it.", "I like it. " * 25))
    verdicts = judged(pl.concat([fluent, broken, loop]), between=(2.0, 60.0), **real)
    scores = verdicts["score"]
    assert (scores[:4] * 3 < scores[4:8]).all()
    assert verdicts["reason"].to_list() == [*[None] * 4, *["improbable"] * 4, "too predictable"]


def test_the_figure_is_the_exponential_of_the_mean_loss_of_the_answer() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made("causal"))
    model = AutoModelForCausalLM.from_pretrained(made("causal"))

    def loss(before: str, answer: str) -> float:
        first, second = (tokenizer(part, add_special_tokens=False).input_ids for part in (before, answer))
        with torch.inference_mode():
            return float(model(input_ids=torch.tensor([first + second]), labels=torch.tensor([[-100] * len(first) + second])).loss)

    verdicts = judged(frame(chat("Say hi.", "Hello"), text("Hello")), between=(None, None))
    assert verdicts.schema == VERDICTS
    assert verdicts["score"][0] == pytest.approx(math.exp(loss("<user>Say hi.<end><assistant>", "Hello")), rel=1e-4)
    assert verdicts["score"][1] == pytest.approx(math.exp(loss("<s>", "Hello")), rel=1e-4)
    assert json.loads(verdicts["detail"][0]) == {"limit": [None, None], "tokens": 5}


def test_a_bound_holds_on_its_side_alone_and_the_row_on_it_stays() -> None:
    rows = frame(*(chat(f"Question {i}", f"Reply {i * 7}") for i in range(5)))
    scores = sorted(judged(rows, between=(None, None))["score"])
    both = judged(rows, between=(scores[1], scores[3])).sort("score")
    assert both["reason"].to_list() == ["too predictable", None, None, None, "improbable"]
    assert judged(rows, between=(None, scores[3]))["keep"].sum() == 4
    assert judged(rows, between=(scores[1], None))["keep"].sum() == 4


def test_auto_takes_its_bounds_from_the_seeds() -> None:
    ctx = FakeContext(seeds=SEEDS)
    scores = np.log(judged(SEEDS, between=(None, None))["score"].to_numpy())
    verdicts = Perplexity(model=made("causal"), deviations=1.0).judge(SEEDS, ctx)
    median = np.median(scores)
    width = max(1.4826 * np.median(abs(scores - median)), 0.1)
    report = ctx.reports["between"]
    assert report["seeds"] == 20
    assert [report["low"], report["high"]] == pytest.approx(list(np.exp([median - width, median + width])), rel=1e-3)
    assert verdicts["keep"].to_list() == (abs(scores - median) <= width + 1e-6).tolist()
    assert not verdicts["keep"].all()
    assert Perplexity(model=made("causal"), deviations=100.0).judge(SEEDS, ctx)["keep"].all()
    with pytest.raises(GristmillError, match=r"takes 5 .* there are 1(?s:.*)Set between to a number"):
        judged(SEEDS, seeds=SEEDS.head(1))


def test_seeds_are_scored_once_and_not_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from filters.models import Model

    asked: list[int] = []
    losses = Model.losses
    monkeypatch.setattr(Model, "losses", lambda self, rows, *rest: asked.append(len(rows)) or losses(self, rows, *rest))
    seeds = frame(*(chat(f"Only here {i}", f"{i}", origin="real") for i in range(7)))
    stage, ctx = Perplexity(model=made("causal")), FakeContext(seeds=seeds)
    first = stage.judge(SEEDS.head(3), ctx)
    assert stage.judge(SEEDS.head(3), ctx).equals(first)
    assert asked == [7, 3, 3]


def test_what_has_no_words_to_expect_is_not_judged() -> None:
    poison = [text("(" * 1_000_000), text("[" * 3000)]
    rows = samples_frame([chat("no answer"), text(" \n"), chat("q", "a" * 600), *poison, text("🙂\x00\u202e")])
    verdicts = judged(rows, between=(None, None))
    assert verdicts["reason"].to_list() == [*["not judged"] * 5, None]
    assert all("error" in json.loads(detail) for detail in verdicts["detail"][:5])
    assert judged(rows, on_failure="keep", between=(None, None))["keep"].all()


@pytest.mark.parametrize("fields", [{"between": (3, 2)}, {"between": (0.5, 2)}, {"between": 3}, {"between": "some"}, {"deviations": 0}])
def test_fields_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Perplexity.model_validate({"model": "m"} | fields)

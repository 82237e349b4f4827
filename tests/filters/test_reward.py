"""A tiny Llama with a random head judges nothing well, and must judge it the same alone, in a batch, and in any order."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError

from factory.errors import GristmillError, MissingExtra
from factory.store import VERDICTS, samples_frame
from filters.models import Shown, opened
from filters.reward import Reward
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame
from tests.small_models import STRICT, made

SEEDS = frame(*(chat(f"Say number {i}", f"The number {i} is {i * i}", origin="real") for i in range(20)))
ROWS = frame(
    chat("Hi", "Hello."),
    chat("What is 2 + 2?", "It is 4."),
    chat("Tell me a story.", "Once upon a time there was a mill by a river, and it ground by night. " * 4),
    chat("And then?", "🙂 Nothing."),
)


def preference(chosen: str, rejected: str, prompt: str = "Which?") -> Sample:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    turns = {"messages": [turn("user", prompt)], "chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}
    return Sample.model_validate(turns | {"provenance": {"origin": "made", "generator": "t"}})


def judged(rows: pl.DataFrame = ROWS, seeds: pl.DataFrame = SEEDS, **fields: Any) -> pl.DataFrame:
    fields = {"model": made("classifier"), "at_least": -1000.0} | fields
    return Reward.model_validate(fields).judge(rows, FakeContext(seeds=seeds))


def test_a_score_is_the_models_own_logit_for_the_rendered_conversation() -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made("classifier"))
    model = AutoModelForSequenceClassification.from_pretrained(made("classifier"))
    ids = tokenizer("<user>What is 2 + 2?<end><assistant>It is 4.<end>", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        logit = float(model(ids).logits[0, 0])
    verdicts = judged()
    assert verdicts.schema == VERDICTS
    assert verdicts["score"][1] == pytest.approx(logit, abs=1e-5)
    assert verdicts["keep"].all() and verdicts["score"].n_unique() == 4


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("template", [None, STRICT])
def test_a_row_scores_the_same_alone_and_padded_in_a_batch(pad: bool, template: str | None) -> None:
    model = made("classifier", pad=pad, template=template)
    together = judged(model=model, batch_tokens=100_000)["score"].to_numpy()
    alone = np.array([judged(ROWS[i], model=model)["score"][0] for i in range(4)])
    small = judged(model=model, batch_tokens=1)["score"].to_numpy()
    assert abs(together - alone).max() < 1e-5
    assert abs(small - alone).max() < 1e-5


def test_a_batch_holds_no_more_tokens_than_it_may_and_equal_rows_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Reward(model=made("classifier"), at_least=-1000.0, batch_tokens=64)
    model = opened(stage, "classifier", stage.model, "here")
    shapes: list[tuple[int, int]] = []
    forward = model.model.forward

    def spy(**given: Any) -> Any:
        shapes.append(tuple(given["input_ids"].shape))
        return forward(**given)

    monkeypatch.setattr(model.model, "forward", spy)
    stage.judge(frame(*(chat("q" * i, "a") for i in range(1, 40))), FakeContext())
    assert sum(rows for rows, _ in shapes) == 39
    assert len(shapes) < 39
    assert all(rows * width <= 64 or rows == 1 for rows, width in shapes)
    shapes.clear()
    reads = model.read([Shown("the same text")] * 5 + [Shown("another")], 100)
    found = model.class_logits(reads, 64)
    assert sum(rows for rows, _ in shapes) == 2
    assert len({float(one[0]) for one in found[:5] if one is not None}) == 1 and found[5] != found[0]


def test_scores_are_those_of_one_thread_when_several_ask() -> None:
    stage = Reward(model=made("classifier"))
    expected = stage.judge(ROWS, FakeContext(seeds=SEEDS))
    with ThreadPoolExecutor(4) as pool:
        for verdicts in pool.map(lambda _: stage.judge(ROWS, FakeContext(seeds=SEEDS)), range(12)):
            assert verdicts.equals(expected)


def test_the_line_is_drawn_at_the_number_and_on_it_a_row_stays() -> None:
    middle = sorted(judged()["score"])[2]
    verdicts = judged(at_least=middle)
    assert verdicts["keep"].to_list() == (verdicts["score"] >= middle).to_list()
    assert verdicts["keep"].sum() == 2
    assert verdicts.filter(~pl.col("keep"))["reason"].unique().to_list() == ["low reward"]
    assert json.loads(verdicts["detail"][0]) == {"limit": middle}


def test_auto_asks_for_what_nine_of_ten_seeds_reach() -> None:
    ctx = FakeContext(seeds=SEEDS)
    stage = Reward(model=made("classifier"))
    verdicts = stage.judge(SEEDS, ctx)
    assert verdicts["keep"].sum() == 18
    report = ctx.reports["at_least"]
    assert report["seeds"] == 20
    assert report["chosen"] == pytest.approx(np.quantile(verdicts["score"].to_numpy(), 0.1), abs=1e-5)
    assert Reward(model=made("classifier"), quantile=0.5).judge(SEEDS, ctx)["keep"].sum() == 10
    with pytest.raises(GristmillError, match=r"takes 5 .* there are 4(?s:.*)Set at_least to a number"):
        stage.judge(ROWS, FakeContext(seeds=SEEDS.head(4)))


def test_of_a_preference_the_margin_counts() -> None:
    answers = ["yes", "no, never", "It depends on the weather."]
    by_reward = sorted(answers, key=lambda answer: judged(frame(chat("Which?", answer)))["score"][0])
    low, middle, high = by_reward
    rows = frame(preference(high, low), preference(low, high), preference(high, middle))
    verdicts = judged(rows, at_least=1000.0)  # which is for single answers
    assert verdicts["keep"].to_list() == [True, False, True]
    assert verdicts["reason"].to_list() == [None, "rejected scores higher", None]
    chosen, rejected = (judged(frame(chat("Which?", answer)))["score"][0] for answer in (high, low))
    assert verdicts["score"][0] == pytest.approx(chosen - rejected, abs=1e-5)
    assert verdicts["score"][1] == pytest.approx(rejected - chosen, abs=1e-5)
    strict = judged(rows, margin=(verdicts["score"][0] + verdicts["score"][2]) / 2)
    assert strict["reason"].to_list() == [None, "rejected scores higher", "margin too small"]
    assert judged(frame(preference("same", "same")))["reason"].to_list() == ["margin too small"]
    mixed = judged(pl.concat([ROWS, rows, SEEDS.head(1)]))
    assert mixed["score"][4:7].to_list() == pytest.approx(verdicts["score"].to_list(), abs=1e-5)


def test_of_several_labels_the_wanted_ones_probability_counts() -> None:
    model = made("classifier", labels=("bad", "fair", "good"))
    parts = [judged(model=model, label=label)["score"] for label in ("bad", "fair", "good")]
    assert (parts[0] + parts[1] + parts[2]).to_list() == pytest.approx([1.0] * 4, abs=1e-5)
    with pytest.raises(GristmillError, match=r"has 3 labels(?s:.*)Set `label` to one of: bad, fair, good"):
        judged(model=model)
    with pytest.raises(GristmillError, match="did you mean 'good'"):
        judged(model=model, label="goood")


def test_what_cannot_be_read_whole_is_not_judged() -> None:
    text = Sample.model_validate({"text": "A plain text.", "provenance": {"origin": "made", "generator": "t"}})
    poison = ["(" * 1_000_000, "\x00" * 2000, "[" * 3000, "9" * 5000, "\u202e" + "🙂" * 900]
    rows = frame(text, chat("no answer"), chat("q", "a" * 600), *(chat("q", one) for one in poison))
    verdicts = judged(rows)
    assert verdicts["reason"].to_list() == [None, *["not judged"] * 7]
    assert verdicts["score"].null_count() == 7
    errors = [json.loads(detail).get("error") for detail in verdicts["detail"]]
    assert errors[1] == "there is no answer"
    assert errors[2] == "605 tokens, more than 512"  # two turns are opened and closed, and one letter is asked
    assert errors[3].endswith("characters, more than 32 for each of 512 tokens")
    assert judged(rows, on_failure="keep")["keep"].all()
    half = preference("a", "b" * 600)
    assert judged(frame(half))["reason"].to_list() == ["not judged"]


def test_turns_that_the_template_refuses_are_not_judged() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = Sample.model_validate({"messages": turns, "provenance": {"origin": "made", "generator": "t"}})
    verdicts = judged(samples_frame([row, chat("q", "a")]), model=made("classifier", template=STRICT))
    assert verdicts["reason"].to_list() == ["not judged", None]
    assert "chat template" in json.loads(verdicts["detail"][0])["error"]


def test_a_pair_is_put_as_two_texts() -> None:
    model = opened(Reward(model=made("classifier", template=None)), "classifier", made("classifier", template=None), "here")
    (pair,) = model.read([Shown("ab", "cd", special=True)], 100)
    assert model.tokenizer.decode(pair.tokens) == "abcd"
    assert (
        judged(model=made("classifier", template=None), shown="pair")["score"][0]
        != judged(model=made("classifier", template=None))["score"][0]
    )


def test_a_model_without_a_trained_head_is_refused() -> None:
    with pytest.raises(GristmillError, match=r"no trained weights for score.weight(?s:.*)trained as a classifier"):
        judged(model=made("classifier", headless=True))


def test_a_model_that_is_not_here_says_how_to_get_it_and_is_not_asked_for() -> None:
    with pytest.raises(GristmillError, match=r"stage 01-test: can't open the model 'nobody/nothing'(?s:.*)hf download nobody/nothing"):
        judged(model="nobody/nothing")
    with pytest.raises(GristmillError, match=r"there is no file /none.gguf"):
        judged(model="/none.gguf")
    if not torch.cuda.is_available():
        with pytest.raises(GristmillError, match="torch finds no CUDA device"):
            judged(device="cuda")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"gristmill\[models\]"):
        judged(dtype="bfloat16")  # settings with which no other test has opened it


@pytest.mark.parametrize(
    "fields",
    [{}, {"model": ""}, {"quantile": 0}, {"quantile": 1}, {"margin": -1}, {"at_least": "some"}, {"device": "tpu"}, {"max_tokens": 1}],
)
def test_fields_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Reward.model_validate(({"model": "m"} if fields else {}) | fields)

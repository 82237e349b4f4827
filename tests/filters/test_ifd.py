"""Answers with their own instructions and with others', under the project's real small model; the arithmetic under a tiny one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.store import VERDICTS, samples_frame
from filters.ifd import Ifd
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame
from tests.small_models import STRICT, made, real_model

DATA = Path(__file__).parents[1] / "data"
SEEDS = frame(*(chat(f"Say number {i}", f"The number {i} is {i * i}", origin="real") for i in range(20)))


def real_rows(count: int) -> list[tuple[str, str]]:
    """The shortest questions and worked answers of GSM8K and of Self-Instruct."""
    lines = [line for name in ("gsm8k", "self_instruct") for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    turns = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    long = sorted((sum(map(len, two)), two) for two in turns if len(two) == 2 and len(two[1]) > 40)
    return [(asked, said) for _, (asked, said) in long[:count]]


@pytest.fixture(scope="module")
def real() -> Iterator[dict[str, Any]]:
    with real_model() as settings:
        yield settings


def judged(rows: pl.DataFrame, seeds: pl.DataFrame = SEEDS, **fields: Any) -> pl.DataFrame:
    return Ifd.model_validate({"model": made("causal")} | fields).judge(rows, FakeContext(seeds=seeds))


def test_real_answers_are_helped_by_their_own_questions_and_not_by_others(real: dict[str, Any]) -> None:
    rows = real_rows(10)
    own = frame(*(chat(asked, said) for asked, said in rows))
    swapped = frame(*(chat(rows[(i + 1) % 10][0], said) for i, (_, said) in enumerate(rows)))
    verdicts = judged(pl.concat([own, swapped]), **real)
    ours, others = verdicts["score"].head(10), verdicts["score"].tail(10)
    assert verdicts["keep"].head(10).all()
    assert (ours < others).all()
    assert others.to_numpy().mean() > ours.to_numpy().mean() + 0.4
    helpless = verdicts.tail(10).filter(~pl.col("keep"))
    assert helpless.height >= 6
    assert helpless["reason"].unique().to_list() == ["instruction does not help"]


def test_the_difficulty_is_the_ratio_of_two_perplexities_over_the_same_tokens() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made("causal"))
    model = AutoModelForCausalLM.from_pretrained(made("causal"))

    def loss(before: str, answer: str) -> float:
        first, second = (tokenizer(part, add_special_tokens=False).input_ids for part in (before, answer))
        ids = torch.tensor([first + second])
        labels = torch.tensor([[-100] * len(first) + second])
        with torch.inference_mode():
            return float(model(input_ids=ids, labels=labels).loss)

    rows = frame(chat("Say hi.", "Hello there"), chat("Say it again, please.", "Hi"))
    verdicts = judged(rows, batch_tokens=1000)
    expected = math.exp(loss("<user>Say hi.<end><assistant>", "Hello there") - loss("<user><end><assistant>", "Hello there"))
    assert verdicts.schema == VERDICTS
    assert verdicts["score"][0] == pytest.approx(expected, abs=1e-4)
    bare = math.exp(loss("<user>Say hi.<end><assistant>", "Hello there") - loss("<s>", "Hello there"))
    assert judged(rows, alone="bare")["score"][0] == pytest.approx(bare, abs=1e-4)
    detail = json.loads(verdicts["detail"][0])
    assert detail["tokens"] == 11 and detail["limit"] == [None, 1.0]
    assert math.exp(detail["loss_given"] - detail["loss_alone"]) == pytest.approx(expected, abs=1e-3)
    plain = judged(rows, model=made("causal", template=None), alone="bare")["score"][0]
    tokenizer.chat_template = None
    model = AutoModelForCausalLM.from_pretrained(made("causal", template=None))
    assert plain == pytest.approx(math.exp(loss("<s>user: Say hi.\nassistant: ", "Hello there") - loss("<s>", "Hello there")), abs=1e-4)


def test_a_row_scores_the_same_alone_and_padded_in_a_batch() -> None:
    rows = frame(*(chat("q" * (3 * i + 1), "an answer " * (5 - i)) for i in range(5)))
    together = judged(rows, batch_tokens=100_000)["score"].to_numpy()
    alone = np.array([judged(rows[i])["score"][0] for i in range(5)])
    assert abs(together - alone).max() < 1e-5 * alone.max()


def test_both_ends_are_held_to_and_the_row_on_the_line_is_known() -> None:
    rows = frame(*(chat(f"Question {i}", f"Reply {i * 7}") for i in range(6)))
    low, _, high = sorted(judged(rows, below=1e9)["score"])[1:4]
    verdicts = judged(rows, at_least=low, below=high).sort("score")
    assert verdicts["reason"].to_list() == ["too easy", None, None, *["instruction does not help"] * 3]
    assert verdicts["keep"].to_list() == [False, True, True, False, False, False]


def test_auto_asks_for_what_most_of_the_seeds_reach() -> None:
    ctx = FakeContext(seeds=SEEDS)
    verdicts = Ifd(model=made("causal"), at_least="auto", quantile=0.25, below=1e9).judge(SEEDS, ctx)
    assert verdicts["keep"].sum() == 15
    assert ctx.reports["at_least"]["seeds"] == 20
    with pytest.raises(GristmillError, match=r"takes 5(?s:.*)Set at_least to a number"):
        Ifd(model=made("causal"), at_least="auto", below=1e9).judge(SEEDS, FakeContext(seeds=SEEDS.head(4)))


def test_several_turns_stand_before_the_answer_and_a_preference_is_judged_by_the_chosen_one() -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    origin = {"provenance": {"origin": "made", "generator": "t"}}
    talk = [turn("user", "Say hi."), turn("assistant", "Hi!"), turn("user", "Again."), turn("assistant", "Hi again!")]
    chosen = {"messages": talk[:3], "chosen": talk[3:], "rejected": [turn("assistant", "No.")]}
    rows = samples_frame([Sample.model_validate(one | origin) for one in ({"messages": talk}, chosen)])
    scores = judged(rows)["score"]
    assert scores[0] == scores[1]
    assert scores[0] != judged(frame(chat("Again.", "Hi again!")))["score"][0]


def test_what_has_no_instruction_or_no_answer_is_not_judged() -> None:
    origin = {"provenance": {"origin": "made", "generator": "t"}}
    text = Sample.model_validate({"text": "A plain text."} | origin)
    system = Sample.model_validate({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]} | origin)
    rows = samples_frame([text, system, chat("no answer"), chat("q", "a" * 600), chat("q", "(" * 1_000_000), chat("q", "a\x00🙂\u202e")])
    verdicts = judged(rows, model=made("causal", template=STRICT), below=1e9)
    assert verdicts["reason"].to_list() == [*["not judged"] * 5, None]
    errors = [json.loads(detail).get("error") for detail in verdicts["detail"]]
    assert errors[:3] == ["a text has no instruction", "the model's chat template refuses these turns", "there is no answer"]
    assert judged(rows, on_failure="keep", below=1e9)["keep"].all()
    assert "perplexity" in (Ifd(model="m").check(frame(text)) or "")
    assert Ifd(model="m").check(rows) is None


@pytest.mark.parametrize("fields", [{"model": None}, {"at_least": -1}, {"below": 0}, {"quantile": 1.0}, {"alone": "both"}, {"limit": 1}])
def test_fields_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Ifd.model_validate({"model": "m"} | fields)

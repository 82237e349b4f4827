"""Answers that come again and answers that don't: labels, numbers and sentences, and what a teacher is shown before it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.rows import read_samples
from factory.store import VERDICTS
from filters.consistency import FIRST_DRAW, Consistency, result_of
from schemas.call import Answer, Call, Params, Reply
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame

ROOT = Path(__file__).parents[2]
BANK = read_samples(ROOT / "examples" / "bank-intents" / "seeds.jsonl").with_columns(label="output")
MATHS = read_samples(ROOT / "tests" / "data" / "gsm8k.jsonl")
LABELLED = frame(chat("When will my transfer arrive?", "transfer_timing"))


def by_draw(*answers: str) -> Callable[[Call], str]:
    return lambda call: answers[call.draw - FIRST_DRAW]


def judged(samples: pl.DataFrame, *answers: str, seeds: pl.DataFrame = BANK, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The verdict on one row, and its detail."""
    stage = Consistency(**{"draws": len(answers)} | fields)
    verdicts = stage.judge(samples, FakeContext(seeds=seeds, answers=by_draw(*answers)))
    assert verdicts.schema == VERDICTS
    (row,) = verdicts.to_dicts()
    return row, json.loads(row["detail"])


@pytest.mark.parametrize(
    ("answers", "score", "agree"),
    [
        (("transfer_timing", "Transfer_Timing.", "cancel_transfer"), 2 / 3, [True, True, False]),
        (("The label is: transfer_timing", "It is transfer_timing, not cancel_transfer", "no idea"), 1 / 3, [True, False, False]),
        (("cancel_transfer", "cancel_transfer", "transfer_timing"), 1 / 3, [False, False, True]),
        (("transfer_timing", "", "   "), None, [True, None, None]),
        (("transfer_timing", "transfer_timing", ""), 1.0, [True, True, None]),
    ],
)
def test_labels_agree_word_for_word_or_as_the_only_one_named(answers: tuple[str, ...], score: float | None, agree: list[Any]) -> None:
    row, detail = judged(LABELLED, *answers)
    assert (detail["agree"], detail["compare"]) == (agree, "exact")
    assert row["score"] == (None if score is None else pytest.approx(score))
    assert row["reason"] == ("not judged" if score is None else None if score >= 0.5 else "answers differ")
    assert row["keep"] == (row["reason"] is None)
    assert detail["answers"] == list(answers)


def test_answers_of_punctuation_alone_are_compared_as_they_are() -> None:
    assert judged(frame(chat("Which mark ends a question?", "?")), "?", "!", " ? ")[1]["agree"] == [True, False, True]


def test_the_most_frequent_answer_is_told() -> None:
    assert judged(LABELLED, "cancel_transfer", "cancel_transfer.", "transfer_timing")[1]["most"] == "cancel_transfer"


def test_half_is_on_the_line() -> None:
    assert judged(LABELLED, "transfer_timing", "cancel_transfer")[0]["keep"]
    assert not judged(LABELLED, "transfer_timing", "cancel_transfer", at_least=0.51)[0]["keep"]
    row, detail = judged(LABELLED, "", "", on_failure="keep")
    assert (row["keep"], row["reason"]) == (True, "not judged")
    assert detail["error"] == "0 of 2 answers can be compared"


def test_real_worked_answers_agree_by_their_number() -> None:
    lamp = MATHS.filter(pl.col("input").str.starts_with("Frank wants"))
    assert lamp["output"].item().endswith("#### 30")
    row, detail = judged(lamp, "He has $30.00 left.", "90 - 60 = 30\n#### 30", "\\boxed{30}", "#### 60", "It is 30, not 60", seeds=MATHS)
    assert (detail["compare"], detail["agree"], detail["most"]) == ("number", [True, True, True, False, False], "30")
    assert row["score"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### $1,200.50", "1200.5"),
        ("#### 12 apples.", "12"),
        ("#### **007**", "7"),
        ("so \\boxed{12\\text{ cm}}", "12"),
        ("\\boxed{\\frac{3}{4}}", "\\frac{3}{4}"),
        ("#### 3/4", "3/4"),
        ("\\boxed{1} and then \\boxed{3x + 2}", "3x+2"),
        ("It costs $1,200.", "1200"),
        ("It is -5", "-5"),
        ("from 3-5", "5"),
        ("it weighs 18kg", "18"),
        ("-0.0", "0"),
        ("5,000,000 or 0.50", "0.5"),
        ("v1.2.3", None),
        ("no number", None),
        ("\\boxed{never closed", None),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_what_a_worked_answer_comes_to(text: str, result: str | None) -> None:
    assert result_of(text) == result


def test_the_last_number_of_an_answer_that_was_cut_does_not_count() -> None:
    class Cut(FakeContext):
        def ask(self, calls: Iterable[Call]) -> Iterator[Answer]:
            for call in calls:
                yield Answer(call=call, key="k", reply=Reply(text="90 - 60 = 30", finish="length", tokens_in=1, tokens_out=1))

    verdicts = Consistency().judge(MATHS.head(1), Cut(seeds=MATHS))
    assert verdicts["reason"].to_list() == ["not judged"]


def test_longer_answers_agree_by_their_meaning() -> None:
    row = frame(chat("Where is Paris?", "Paris is the capital of France and lies on the river Seine.").model_copy(update={"label": None}))
    same = "The capital of France is Paris, which lies on the Seine river."
    other = "To bake bread you need flour, water, yeast and a hot oven."
    verdict, detail = judged(row, same, other, same, seeds=MATHS)
    assert (detail["compare"], detail["agree"]) == ("meaning", [True, False, True])
    assert (verdict["score"], "most" in detail) == (pytest.approx(2 / 3), False)
    assert judged(row, same, other, same, compare="exact")[1]["agree"] == [False, False, False]
    assert judged(row, same, threshold=0.999)[1]["agree"] == [False]


def asked(samples: pl.DataFrame, seeds: pl.DataFrame = BANK, *, teachers: tuple[str, ...] = ("fake",), **fields: Any) -> list[Call]:
    return list(Consistency(**fields).questions(samples, FakeContext(seeds=seeds, teachers=teachers)))


def test_the_answer_is_not_shown_and_the_labels_and_other_seeds_are() -> None:
    seed = BANK.head(1)
    calls = asked(seed, shots=4, draws=3)
    assert [call.draw for call in calls] == [FIRST_DRAW, FIRST_DRAW + 1, FIRST_DRAW + 2]
    assert len({call.key("fake", "fake") for call in calls}) == 3
    messages = calls[0].messages
    assert [turn.role for turn in messages] == ["system", *["user", "assistant"] * 4, "user"]
    assert messages[-1].content == seed["input"][0]
    assert all(f"\n- {label}" in messages[0].content for label in BANK["label"].unique())
    shown = [turn.content for turn in messages[1:-1] if turn.role == "user"]
    assert len(set(shown)) == 4 and seed["input"][0] not in shown
    assert set(shown) <= set(BANK["input"])
    (all_of_them,) = asked(seed, BANK.head(5), shots=20, draws=1)
    assert sum(turn.content == seed["input"][0] for turn in all_of_them.messages) == 1, "no row is its own shot"
    assert (calls[0].params.temperature, calls[0].params.max_tokens) == (0.7, 600)
    assert asked(seed, params=Params(temperature=1))[0].params.temperature == 1
    assert [turn.role for turn in asked(MATHS.head(1), MATHS, shots=0)[0].messages] == ["user"]


def test_turns_before_the_answer_and_a_system_turn_are_kept() -> None:
    turns = [("system", "Be terse."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Fee?"), ("assistant", "None")]
    where = {"provenance": {"origin": "made", "generator": "t"}}
    several = frame(Sample.model_validate({"messages": [{"role": role, "content": text} for role, text in turns]} | where))
    messages = asked(several, shots=1)[0].messages
    assert [(turn.role, turn.content) for turn in messages[:1] + messages[3:]] == turns[:-1]
    answers = {"chosen": [{"role": "assistant", "content": "None"}], "rejected": [{"role": "assistant", "content": "Go away"}]}
    preference = frame(Sample.model_validate({"messages": [{"role": "user", "content": "Fee?"}]} | answers | where))
    assert [turn.content for turn in asked(preference, shots=0)[0].messages] == ["Fee?"]
    assert judged(preference, "None.", "Some")[1]["agree"] == [True, False]


def test_a_row_is_asked_of_its_own_teacher_or_of_those_named_in_turn() -> None:
    rows = frame(*(chat(f"question {i}", "transfer_timing", teacher=("a", "b", "gone")[i % 3]) for i in range(30)))
    own = {row["id"]: row["teacher"] for row in rows.iter_rows(named=True)}
    calls = asked(rows, teachers=("a", "b", "c"), draws=2)
    for call in calls:
        assert own[call.ref] in (call.teacher, "gone")
    assert {call.teacher for call in calls if own[call.ref] == "gone"} == {"a", "b", "c"}
    assert all(len({call.teacher for call in calls if call.ref == ref}) == 1 for ref in own)
    stage = Consistency(teachers=("b", "c"), draws=4)
    named = list(stage.questions(rows, FakeContext(seeds=BANK, teachers=("a", "b", "c"))))
    assert [call.teacher for call in named[:4]] == ["b", "c", "b", "c"]
    with pytest.raises(GristmillError, match="no teachers"):
        asked(rows, teachers=())


def test_the_questions_about_a_row_do_not_depend_on_its_batch_and_a_plan_counts_them() -> None:
    rows = BANK.head(5)
    assert asked(rows) == [call for i in range(5) for call in asked(rows[i : i + 1])]
    ctx = FakeContext(seeds=BANK, answers=lambda _: "x")
    Consistency().judge(rows, ctx)
    assert ctx.asked == asked(rows)
    assert len(ctx.asked) == 25


def test_rows_without_an_answer_are_asked_nothing() -> None:
    text = Sample.model_validate({"text": "x", "provenance": {"origin": "made", "generator": "t"}})
    rows = frame(text, chat("only a question"))
    ctx = FakeContext(seeds=BANK, answers=lambda _: "x")
    verdicts = Consistency().judge(rows, ctx)
    assert (ctx.asked, verdicts["reason"].to_list()) == ([], ["not judged"] * 2)


def test_a_detail_holds_all_answers_cut_and_all_calls() -> None:
    _, detail = judged(LABELLED, "x" * 1000, "transfer_timing")
    assert [len(answer) for answer in detail["answers"]] == [300, len("transfer_timing")]
    assert len(set(detail["calls"])) == 2 and detail["call"] == detail["calls"][0]
    assert (detail["teachers"], detail["limit"]) == (["fake"], 0.5)


@pytest.mark.parametrize(
    "bad", ["(" * 1_000_000, "\x00" * 1000, '{"a":' * 100_000, "\u202eevil 😀", "1" * 100_000, "#### " * 100_000, "\\boxed{" * 50_000]
)
@pytest.mark.parametrize("compare", ["auto", "exact", "number", "meaning"])
def test_poisoned_answers_and_rows_have_a_verdict(bad: str, compare: Any) -> None:
    poisoned = frame(chat("q", bad), chat(bad, "transfer_timing"))
    stage = Consistency(compare=compare, draws=2)
    verdicts = stage.judge(poisoned, FakeContext(seeds=BANK, answers=lambda _: bad))
    assert sorted(verdicts["sample"]) == sorted(poisoned["id"])


@pytest.mark.parametrize("settings", [{"at_least": 0}, {"draws": 0}, {"threshold": 2}, {"compare": "sound"}, {"shots": -1}])
def test_faulty_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Consistency(**settings)


@given(st.text(alphabet="0123456789.,-$#{}\\boxed \n/%kg", max_size=60))
@settings(deadline=None)
def test_no_text_is_too_odd_to_have_a_result_or_none(text: str) -> None:
    result = result_of(text)
    assert result is None or result == result.strip()

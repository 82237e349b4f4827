"""Worked answers that people wrote must stay; numbers planted in them must fall; and no formula, however hostile, may hang a run."""

from __future__ import annotations

import json
import random
import re
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from factory.store import VERDICTS
from filters.equations import steps, values
from filters.maths import Maths, final_answer
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame

GSM8K = Path(__file__).parents[2] / "bench" / "data" / "gsm8k_dev.jsonl"
REAL = [json.loads(line)["messages"][-1]["content"] for line in GSM8K.read_text().splitlines()]


def worked(text: str, **meta: Any) -> Sample:
    return chat("How many?", text).model_copy(update={"meta": meta})


def judged(*samples: Sample, **fields: Any) -> pl.DataFrame:
    verdicts = Maths(**fields).judge(frame(*samples), FakeContext())
    assert verdicts.schema == VERDICTS
    return verdicts


def one(text: str, fields: dict[str, Any] | None = None, **meta: Any) -> tuple[bool, str | None, float | None, dict[str, Any]]:
    (row,) = judged(worked(text, **meta), **(fields or {})).iter_rows(named=True)
    return row["keep"], row["reason"], row["score"], json.loads(row["detail"])


def moved(number: str, rng: random.Random) -> str:
    """Another number than this one, by 1, 2, 7 or 10 in its last place."""
    plain = Decimal(number.replace(",", ""))
    by = Decimal(rng.choice([1, -1, 2, 10, -10, 7])).scaleb(min(0, int(plain.as_tuple().exponent)))
    return str(plain + by if plain + by > 0 else plain + abs(by))


def test_the_rows_that_people_wrote_are_kept() -> None:
    verdicts = judged(*(worked(text, answer=text.rpartition("####")[2].strip()) for text in REAL))
    assert len(REAL) == 200
    rejected = verdicts.filter(~pl.col("keep"))
    # One concludes in words from its last step ("30 points, so $10,000").
    assert rejected["reason"].to_list() in ([], ["final differs from steps"])
    assert judged(*map(worked, REAL), final="none")["keep"].all()
    read = [json.loads(detail)["equations"] for detail in verdicts["detail"]]
    assert sum(count > 0 for count in read) >= 195
    assert sum(read) > 1200


def test_every_wrong_number_in_a_calculator_mark_falls() -> None:
    rng = random.Random(0)
    marks = [(text, mark) for text in REAL for mark in re.finditer(r"<<[^<>=]*[-+*/][^<>=]*=(-?[\d.,]*\d)>>", text)]
    planted = [text[: mark.start(1)] + moved(mark[1], rng) + text[mark.end(1) :] for text, mark in marks]
    assert len(planted) > 600
    verdicts = judged(*map(worked, planted))
    assert not verdicts["keep"].any()
    assert verdicts["reason"].unique().to_list() == ["wrong arithmetic"]


def test_nearly_every_wrong_number_in_plain_text_falls() -> None:
    rng = random.Random(0)
    plain = [re.sub(r"<<[^<>]*>>", "", text).rpartition("####")[0] for text in REAL]
    written = re.compile(r"[\d)]%? ?[-+*/x] ?\$?[\d.,]*\d%? ?= ?\$?(\d[\d,]*)(?![\d.,]*\d|%)")
    results = [(text, found) for text in plain for found in written.finditer(text)]
    planted = [text[: found.start(1)] + moved(found[1], rng) + text[found.end(1) :] for text, found in results]
    assert len(planted) > 500
    assert judged(*map(worked, planted))["keep"].sum() <= 0.05 * len(planted)


def test_a_wrong_final_answer_falls() -> None:
    rng = random.Random(0)
    planted = []
    for text in REAL:
        body, _, answer = text.rpartition("####")
        if steps(body).last and answer.strip() != "10,000":
            planted.append(f"{body}#### {moved(answer.strip(), rng)}")
    verdicts = judged(*map(worked, planted))
    assert len(planted) >= 195
    assert verdicts["keep"].sum() <= 0.01 * len(planted)
    assert judged(*map(worked, planted), final="none")["keep"].all()
    assert judged(*map(worked, planted), final="any_step")["keep"].sum() <= 0.2 * len(planted)


RIGHT = r"""
7*5 = 35
$48/2 = $24
25/3 = 8.33
25/3 = 8.3
20/3 = 6.66
100%-40%=60%
325(.10)=32.5
<<35=35>>35
1,000 + 2,500 = 3,500
3 x 5 = 15
3x5=15
3 × 5 = 15
1/2 + 1/4 = 3/4
1 1/2 * 2 = 3
5/2 = 2 1/2
25 / 1/3 = 75
2**3 = 8
2^3^2 = 512
-2^2 = -4
8/2/2 = 2
2-3-4 = -5
10 - -2 = 12
20 - 10% = 18
20 + 10% = 22
50% of 40 = 20
2/3 = 66.67%
60/100 = 60%
\frac{3}{4} \times 8 = 6
$2\frac{1}{2} \cdot 2 = 5$
-5 + 3 = -2
1. 5 + 3 = 8
2) 5 + 3 = 8
- 5 + 3 = 8
(5 + 3 = 8)
5*7 = 35 (5 more than 6*5)
**5 + 3 = 8**
5 packs x 10 cards = 50 cards
$5/hour * 3 hours = $15
x = 2 * 5 = 10
10/3 ≈ 3.3
199*5 ≈ 1000
7 times 5 equals 35
[5+3]*2 = 16
(2)(3) = 6
She spends 5 * 12 = 60 + 7 = 67
""".strip().split("\n")

LEFT_ALONE = r"""
30+30 = 1 hour
50 cents * 4 = $2
3 feet + 6 inches = 42 inches
2 hours 30 minutes - 10 minutes = 140 minutes
3x = 12
y = 3x + 2
f(3) = 9
a[0] = 5 + 3
3:30 + 1:15 = 4:45
2:3 = 4:6
3,5 + 1,5 = 5
17/5 = 3 remainder 2
5! = 120
9**9**9**9 = 5
1/0 = 5
5+3 >= 9
5 + 3 != 9
if n == 5 + 3
Day 1 = 5
48 / 2 = 24 - half of them
1.2.3 + 4 = 5
""".strip().split("\n")

WRONG = r"""
7*5 = 36
$48/2 = $25
25/3 = 8.43
25/3 = 8.32
<<48/2=25>>25
<<48/2=24>>25
100%-40%=70%
1,000 + 2,500 = 3,600
3 x 5 = 16
3x5=16
1/2 + 1/4 = 2/3
5/2 = 2 1/3
2**3 = 9
20 - 10% = 17
50% of 40 = 21
2/3 = 67.67%
\frac{3}{4} \times 8 = 7
\(7 \times 5 = 36\)
-5 + 3 = -3
1. 5 + 3 = 9
(5 + 3 = 9)
**5 + 3 = 9**
5 packs x 10 cards = 60 cards
$5/hour * 3 hours = $16
x = 2 * 5 = 11
20 * 3 = $<<20*3=60>>70.
30 minutes + 30 minutes = 61 minutes
so 5 + 3 = 8 + 1 = 10
199*5 ≈ 1200
12 - 5 = 8 apples
7 times 5 equals 36
""".strip().split("\n")


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_right_is_read_and_holds(text: str) -> None:
    found = steps(text).equations
    assert found, "it was not read"
    assert all(equation.holds for equation in found)


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_what_can_not_be_read_for_sure_is_left_alone(text: str) -> None:
    assert steps(text).equations == ()


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_found(text: str) -> None:
    assert not all(equation.holds for equation in steps(text).equations)


def test_the_last_step_is_the_last_that_could_be_read() -> None:
    assert steps("5+3=8\n8*2=16, or x = 16 of them\nso y = 2x").last == (16,)
    assert steps("5+3=<<5+3=8>>8").last == (8, 8)
    assert steps("y = 2x").last == ()


@given(st.integers(-999, 999), st.sampled_from("+-*"), st.integers(0, 999), st.integers(-3, 3))
@settings(deadline=None)
def test_whole_numbers_are_exact(a: int, sign: str, b: int, off: int) -> None:
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    (equation,) = steps(f"So {a} {sign} {b} = {result + off}.").equations
    assert equation.holds == (off == 0)
    assert equation.gives == result


@given(st.integers(1, 999), st.integers(1, 99), st.integers(0, 4))
@settings(deadline=None)
def test_a_quotient_holds_as_rounded_and_as_cut_off(a: int, b: int, places: int) -> None:
    exact = Fraction(a, b)
    rounded = round(Decimal(a) / Decimal(b), places)
    assert steps(f"{a}/{b} = {rounded}").equations[0].holds
    beyond = rounded + Decimal(1).scaleb(-places)
    assume(2 * abs(Fraction(beyond) - exact) * 10**places > 1)  # halves go either way
    assert not steps(f"{a}/{b} = {beyond}").equations[0].holds
    assert steps(f"{a}/{b} = {beyond}").equations[0].gives == exact


@given(st.one_of(st.text(), st.text(alphabet="0123456789+-*/=()%$.,<>x ^\\{}≈\n", max_size=80)))
@settings(deadline=None, max_examples=300)
def test_no_text_raises(text: str) -> None:
    steps(text)
    values(text)
    final_answer(text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 90_000 + "=1",
        "=" * 90_000,
        "1+1=2 " * 15_000,
        "1+" * 45_000 + "1=45001",
        "9" * 90_000 + "=9",
        "9^" * 45_000 + "9=9",
        "\\frac{" * 15_000,
        "\\frac{1}{" * 10_000 + "=1",
        "<<" * 45_000,
        "<<1=" * 20_000 + ">>",
        "1 1/2 " * 15_000 + "= 3",
        "\\boxed{" * 12_000,
        "the answer to " * 6_000,
        "12 apples * " * 7_500 + "2 = 3",
        "$" * 90_000,
        "-" * 90_000 + "1 = 1",
        "x" * 50_000 + " = " + "x" * 49_000,
        "1,000" * 19_000,
    ],
)
def test_a_hostile_text_costs_seconds_at_most(text: str) -> None:
    start = time.monotonic()
    one(text, answer="2")
    assert time.monotonic() - start < 10


def test_a_text_that_is_too_long_is_not_judged() -> None:
    assert one("(" * 1_000_000)[:3] == (False, "not judged", None)
    assert one("1+1=2\n" * 16_000)[0]
    assert one("(" * 1_000_000, {"on_failure": "keep"})[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("9 * 2 = 18\n#### 18", "18"),
        ("#### 1,150", 1150),
        ("#### 1150.00", "$1,150"),
        (r"so \boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{\text{12 apples}}", "12"),
        ("The answer is 1,000 dollars.", 1000),
        ("The answer is 3.5.", 3.5),
        ("**Answer:** 7", "7"),
        ("Therefore the final answer is: Monday.", "monday"),
        ("the answer is (B)", "B"),
        ("I get 6 and then 7.", "He has 3+4=<<3+4=7>>7\n#### 7"),
        ("It is 50%", "0.5"),
        ("It is 50%", "50"),
        ("#### 8.3333333", "25/3"),
    ],
)
def test_answers_that_are_the_same(text: str, answer: Any) -> None:
    assert one(text, answer=answer)[:3] == (True, None, 1.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 43", "42"),
        ("#### 42.1", "42"),
        ("the answer is Sunday", "Monday"),
        ("The answer is 3.", "3.5"),
        ("#### -5", "5"),
        ("#### no", "on"),
    ],
)
def test_answers_that_are_not(text: str, answer: str) -> None:
    keep, reason, score, detail = one(text, answer=answer)
    assert (keep, reason, score) == (False, "wrong answer", 0.0)
    assert detail["reference"] == answer


def test_formulas_are_compared_by_algebra() -> None:
    same = [
        (r"\boxed{x^2+2x+1}", "(x+1)^2"),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
        (r"\boxed{\{1,2\}}", r"\{2,1\}"),
        (r"\boxed{\frac{\pi}{2}}", r"\pi/2"),
        (r"\boxed{x^2+2x+2}", "(x+1)^2"),
        (r"\boxed{[1,2)}", "(1,2)"),
    ]
    verdicts = judged(*(worked(text, answer=answer) for text, answer in same))
    assert verdicts["keep"].to_list() == [True] * 4 + [False] * 2
    assert verdicts["reason"].to_list()[4:] == ["wrong answer"] * 2


def test_a_formula_that_takes_for_ever_is_not_judged() -> None:
    hostile = [
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{\prod_{k=1}^{1000000} k}",
        r"\boxed{__import__('os').system('true')}",
        "\\boxed{" + "(" * 400 + "}",
    ]
    start = time.monotonic()
    verdicts = judged(*(worked(text, answer="x+1") for text in [*hostile, r"\boxed{1+x}"]), seconds=1)
    assert time.monotonic() - start < 60
    assert verdicts["keep"].to_list() == [False] * 4 + [True]
    assert verdicts["reason"].to_list()[:2] == ["not judged"] * 2
    assert "timed out" in verdicts["detail"][0]


def test_without_an_answer_nothing_is_judged_and_on_failure_decides() -> None:
    assert one("I don't know.", answer="42")[:3] == (False, "not judged", None)
    assert one("I don't know.", {"on_failure": "keep"}, answer="42")[0]
    assert one("I don't know.")[:3] == (True, None, None)


def test_other_draws_must_agree() -> None:
    draws = {"answers": ["It is #### 5", "5.0", 7, "six"]}
    assert one("#### 5", **draws)[:3] == (True, None, 0.5)
    assert one("#### 5", {"agreement": 0.6}, **draws)[:3] == (False, "score below 0.6", 0.5)
    assert one("#### 7", **draws)[:3] == (False, "score below 0.5", 0.25)
    assert one("#### 5", answer="5", **draws)[:3] == (True, None, 1.0)


def test_an_own_pattern_and_own_keys() -> None:
    fields = {"answer_pattern": r"Result=(\d+)", "answer": "gold.value"}
    assert one("Result=4 no, Result=5; 9", fields, gold={"value": 5})[0]
    assert one("Result=5 no, Result=4; 5", fields, gold={"value": 5})[1] == "wrong answer"
    assert one("5", fields, gold={"value": 5})[1] == "not judged"
    for pattern in (r"(\d+)(x)", r"\d+", r"(?=x)(y)"):
        with pytest.raises(ValidationError):
            Maths(answer_pattern=pattern)


def test_the_evidence_names_the_equation_and_what_it_gives() -> None:
    keep, reason, score, detail = one("He has 2*3=6 and 6*7=41 of them, 41+1=42.\n#### 42")
    assert (keep, reason) == (False, "wrong arithmetic")
    assert detail["wrong"] == [{"equation": "6*7=41", "gives": "42"}]
    assert score == pytest.approx(2 / 3)
    assert one("5+3=8\n#### 9")[3] == {"equations": 1, "limit": 1.0, "final": "9", "step": "8"}
    assert one("6*7=41", {"arithmetic": False})[0]
    assert one("5/2=2.5, so 3 boxes\n#### 3")[0], "a whole number may be rounded up"


def test_texts_and_preferences_are_read_too() -> None:
    where = {"origin": "made", "generator": "t"}
    text = Sample.model_validate({"text": "It is 6*7=41.", "provenance": where})
    pair = {"chosen": [{"role": "assistant", "content": "6*7=41"}], "rejected": [{"role": "assistant", "content": "6*7=42"}]}
    preference = Sample.model_validate({"messages": [{"role": "user", "content": "6*7?"}], **pair, "provenance": where})
    assert judged(text, preference)["reason"].to_list() == ["wrong arithmetic"] * 2

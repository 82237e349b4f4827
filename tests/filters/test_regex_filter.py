"""Texts of a form that is asked for, and expressions that are held to examples; none may hang, whatever it backtracks."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from pydantic import ValidationError

from factory.store import VERDICTS
from filters.regex import Regex, written
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame


def judged(*samples: Sample, **fields: Any) -> list[dict[str, Any]]:
    verdicts = Regex(**fields).judge(frame(*samples), FakeContext())
    assert verdicts.schema == VERDICTS and verdicts.height == len(samples)
    rows = frame(*samples).select(sample="id").join(verdicts, on="sample", maintain_order="left")
    return [{**row, "detail": json.loads(row["detail"])} for row in rows.iter_rows(named=True)]


def reasons(*outputs: str, **fields: Any) -> list[str | None]:
    return [row["reason"] for row in judged(*(chat(f"q{i}", output) for i, output in enumerate(outputs)), **fields)]


def expression(output: str, matches: Any = ("2024-01-31", "1999-12-01"), rejects: Any = ("2024-1-31", "x2024-01-31")) -> Sample:
    return chat(f"A pattern for dates? {matches} {rejects}", output).model_copy(update={"meta": {"matches": matches, "rejects": rejects}})


def test_a_text_is_held_to_patterns() -> None:
    assert reasons("yes", "yes!", "no", "", pattern="yes|no") == [None, "pattern not matched", None, "pattern not matched"]
    assert reasons("yes", "oh yes!", pattern="yes", match="anywhere") == [None, None]
    assert reasons("a1", "a", "1", pattern=(".*[a-z].*", ".*[0-9].*")) == [None, "pattern not matched", "pattern not matched"]
    assert reasons("fine", "TODO", "a TODO", forbid="TODO", match="anywhere") == [None, "forbidden pattern", "forbidden pattern"]
    assert reasons("line\n", "line", pattern="line") == ["pattern not matched", None]
    assert reasons("ab", pattern="(?x) a b # both") == [None]
    row = judged(chat("q", "x"), pattern="y|z")[0]
    assert row["detail"] == {"pattern": "y|z"}
    assert [row["keep"] for row in judged(chat("Say 5", "x"), chat("Say", "x"), of="input", pattern=r"\w+ \d")] == [True, False]


def test_an_expression_is_tried_on_its_examples() -> None:
    rows = judged(
        expression(r"\d{4}-\d{2}-\d{2}"),
        expression("It is `\\d{4}-\\d\\d-\\d\\d`."),
        expression("```regex\n\\d{4}(-\\d\\d){2}\n```\nas asked"),
        expression(r"\d{4}-\d{1,2}-\d{2}"),
        expression(r".*-31"),
        examples=True,
    )
    assert [row["reason"] for row in rows] == [None, None, None, "examples failed", "examples failed"]
    assert [row["score"] for row in rows] == [1.0, 1.0, 1.0, 0.75, 0.25]
    assert rows[3]["detail"]["matched"] == ["2024-1-31"]
    assert rows[4]["detail"]["missed"] == ["1999-12-01"]
    (row,) = judged(expression(r"\d-\d", matches=["2024-01-31"], rejects=["none"]), examples=True, match="anywhere")
    assert row["keep"]


@pytest.mark.parametrize("engine", ["rust", "python"])
def test_what_can_not_be_tried_has_its_reason(engine: str) -> None:
    rows = judged(
        expression("(unclosed"),
        expression("a)(b"),
        expression(""),
        expression(r"\d+", matches=None, rejects=None),
        expression(r"\d+", matches="2024", rejects=[1]),
        expression("a" * 20_000),
        expression("(?x) \\d+ [-] .* # a year"),
        examples=True,
        engine=engine,
    )
    broken = "does not compile"
    assert [row["reason"] for row in rows] == [broken, broken, "no pattern", "not judged", "not judged", "not judged", "examples failed"]
    assert rows[0]["score"] == 0 and rows[3]["score"] is None
    kept = judged(expression(r"\d+", matches=None, rejects=None), examples=True, engine=engine, on_failure="keep")
    assert kept[0]["keep"]


def test_what_rust_does_not_know_python_does() -> None:
    looks = [expression(r"(?=\d{4}-)[\d-]{10}"), expression(r"(\d)\d{3}-\d\d-\d\1", ["2024-01-02"], ["2024-01-03"])]
    assert [row["reason"] for row in judged(*looks, examples=True)] == ["not judged", "not judged"]
    assert [row["reason"] for row in judged(*looks, examples=True, engine="python")] == [None, None]


CATASTROPHIC = ["(a+)+$", "(.*a){20}c", "((a{1,100}){1,100}){1,100}", "(" * 3000 + "a" + ")" * 3000]


@pytest.mark.parametrize("engine", ["rust", "python"])
def test_no_expression_hangs(engine: str) -> None:
    samples = [expression(pattern, ["a" * 5000 + "!"], ["b"]) for pattern in CATASTROPHIC]
    start = time.monotonic()
    rows = judged(*samples, expression("a+", ["aa"], ["b"]), examples=True, engine=engine, seconds=0.5)
    assert time.monotonic() - start < 60
    assert not any(row["keep"] for row in rows[:-1])
    assert rows[-1]["keep"]
    if engine == "python":
        assert "timed out" in {row["reason"] for row in rows}


def test_the_expression_is_found_in_its_answer() -> None:
    assert written("  a|b \n") == "a|b"
    assert written("Use `a|b`, not `c`.") == "a|b"
    assert written("```\na`b\n```") == "a`b"
    assert written("``") == "``"


def test_faulty_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="no lookaround"):
        Regex(pattern=("(?=x)",))
    for fields in ({}, {"examples": True, "pattern": "x"}, {"pattern": "("}, {"pattern": "x", "engine": "perl"}):
        with pytest.raises(ValidationError):
            Regex.model_validate(fields)

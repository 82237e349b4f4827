"""Whether an answer has the form that is asked for, and whether an answer that is itself a regular expression matches what it should.

Two checks of one tool. `pattern:` holds each sample's text to patterns; it is the cheapest guard there is for answers of a fixed
form (dates, codes, one of three words). `examples: true` takes the answer for a regular expression and tries it on the texts in meta.
Patterns are those of Rust's `regex`, whose time is linear in the text, so none can hang a run; it knows neither lookaround nor
backreferences, and a pattern that needs them is "not judged" unless `engine: python` is set, which runs it in the sandbox with a
clock. What is not covered: whether an expression is right for texts that meta does not name, and dialects other than these two.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field, field_validator, model_validator

from factory.stage import Context, Filter
from factory.store import verdicts_frame, verdicts_from
from filters import sandbox
from filters.code import fenced
from filters.given import answered, given
from schemas.verdict import Verdict

MISSED = "pattern not matched"
FORBIDDEN = "forbidden pattern"
NO_PATTERN = "no pattern"
BROKEN = "does not compile"
WRONG = "examples failed"
LATE = "timed out"

_LONGEST = 10_000  # characters of an expression that is tried; no one can read a longer one
_TOLD = 5


class Regex(Filter):
    """Holds texts to patterns, or answers that are patterns to examples.

    pattern: what the text must match, all of several; forbid: what it must not. With `match: full` the whole text has to match, with
    "anywhere" a part of it is enough. The text is the output, or the input with `of: input`.

    examples: the output is a regular expression (its first fenced block, or the text between its first pair of backticks, or all of it),
    which must compile, match all of meta[`matches`] and none of meta[`rejects`]. The score is the share of examples that come out right.
    """

    key: ClassVar[str] = "regex"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"

    pattern: tuple[str, ...] = Field((), description="patterns that the text must match, all of them")
    forbid: tuple[str, ...] = Field((), description="patterns that the text must not match")
    of: Literal["output", "input"] = Field("output", description="the text that is held to the patterns")
    examples: bool = Field(False, description="whether the output is itself an expression, to be tried on the examples in meta")
    matches: str = Field("matches", description="key in meta: texts that the expression must match")
    rejects: str = Field("rejects", description="key in meta: texts that it must not match")
    match: Literal["full", "anywhere"] = Field("full", description="whether a whole text has to match, or a part of it")
    engine: Literal["rust", "python"] = Field("rust", description="examples: whose expressions; python's run in the sandbox")
    seconds: float = Field(2.0, gt=0, le=60, description="engine python: of the wall clock, for an expression on all its examples")
    on_failure: Literal["reject", "keep"] = Field("reject", description="what becomes of a sample that can't be judged")

    @field_validator("pattern", "forbid", mode="before")
    @classmethod
    def _one_or_more(cls, patterns: Any) -> Any:
        return (patterns,) if isinstance(patterns, str) else patterns

    @field_validator("pattern", "forbid")
    @classmethod
    def _compiled(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                pl.Series([""]).str.contains(pattern)
            except pl.exceptions.ComputeError as error:
                raise ValueError(f"{pattern!r} is not a pattern of Rust's regex (no lookaround, no backreferences): {error}") from error
        return patterns

    @model_validator(mode="after")
    def _one_mode(self) -> Regex:
        if self.examples == bool(self.pattern or self.forbid):
            raise ValueError(
                "give either pattern: (or forbid:), which the text is held to, or examples: true, where the text is the pattern"
            )
        return self

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a sample; detail names the pattern, or the first examples that came out wrong."""
        return self._tried(samples) if self.examples else self._held(samples)

    def _held(self, samples: pl.DataFrame) -> pl.DataFrame:
        text = answered() if self.of == "output" else pl.col("input").fill_null("")
        missed = [(MISSED, pattern, ~text.str.contains(self._whole(pattern))) for pattern in self.pattern]
        found = [(FORBIDDEN, pattern, text.str.contains(self._whole(pattern))) for pattern in self.forbid]
        breach = pl.coalesce(
            pl.lit(None, pl.Struct({"reason": pl.String(), "pattern": pl.String()})),
            *(
                pl.when(is_broken).then(pl.struct(reason=pl.lit(reason), pattern=pl.lit(pattern)))
                for reason, pattern, is_broken in [*missed, *found]
            ),
        )
        rows = samples.select("id", breach=breach).unnest("breach")
        detail = rows.select(
            pl.when(pl.col("pattern").is_null()).then(pl.lit("{}")).otherwise(pl.struct("pattern").struct.json_encode())
        ).to_series()
        return verdicts_from(rows["id"], keep=rows["reason"].is_null(), reason=rows["reason"], detail=detail)

    def _whole(self, pattern: str) -> str:
        end = "\n" if "(?x" in pattern else ""  # a comment of (?x) goes on to the end of its line
        return rf"\A(?:{pattern}{end})\z" if self.match == "full" else pattern

    def _tried(self, samples: pl.DataFrame) -> pl.DataFrame:
        """A loop over rows, since each has a pattern and examples of its own; the engines are asked once for all."""
        rows = samples.select("id", text=answered())
        verdicts: list[Verdict] = []
        asked: list[str] = []
        questions: list[dict[str, Any]] = []
        for sample, text, examples in zip(rows["id"], rows["text"], given(samples, self.matches, self.rejects), strict=True):
            wanted, unwanted = ([one for one in (each if isinstance(each, list) else []) if isinstance(one, str)] for each in examples)
            pattern = written(text)
            if not wanted and not unwanted:
                verdicts.append(self._not_judged(sample, f"no examples: meta has neither {self.matches!r} nor {self.rejects!r}", pattern))
            elif not pattern:
                verdicts.append(Verdict(sample=sample, by="", keep=False, reason=NO_PATTERN, score=0.0))
            elif len(pattern) > _LONGEST:
                verdicts.append(self._not_judged(sample, f"an expression of more than {_LONGEST} characters", pattern))
            else:
                asked.append(sample)
                questions.append({"pattern": pattern, "texts": [*wanted, *unwanted], "wanted": len(wanted), "full": self.match == "full"})
        found = self._by_python(questions) if self.engine == "python" else self._by_rust(questions)
        verdicts += [self._verdict(*row) for row in zip(asked, questions, found, strict=True)]
        return verdicts_frame(verdicts)

    def _by_rust(self, questions: list[dict[str, Any]]) -> list[tuple[list[bool] | None, str]]:
        """For each question which of its texts match, or None and why not."""
        found: list[tuple[list[bool] | None, str]] = []
        for question in questions:
            pattern = question["pattern"]
            try:
                pl.Series([""]).str.contains(pattern)  # alone first: "a)(b" would compile in brackets
                found.append((pl.Series(question["texts"], dtype=pl.String).str.contains(self._whole(pattern)).to_list(), ""))
            except pl.exceptions.PolarsError as error:
                found.append((None, str(error)))
        return found

    def _by_python(self, questions: list[dict[str, Any]]) -> list[tuple[list[bool] | None, str]]:
        limits = sandbox.Limits(seconds=self.seconds, memory_mb=256)
        answers = sandbox.ask("filters.regex:matched", questions, limits=limits, lasting=True, packages=True)
        return [
            (answer.value, "") if isinstance(answer.value, list) else (None, answer.value["error"] if answer.value else LATE)
            for answer in answers
        ]

    def _verdict(self, sample: str, question: dict[str, Any], found: tuple[list[bool] | None, str]) -> Verdict:
        matched, trouble = found
        pattern, texts = question["pattern"], question["texts"]
        if matched is None:
            if trouble != LATE and self.engine == "rust" and _of_python(pattern):
                return self._not_judged(sample, "Rust's regex does not know this; engine: python does", pattern)
            reason = LATE if trouble == LATE else BROKEN
            return Verdict(sample=sample, by="", keep=False, reason=reason, score=0.0, detail={"pattern": pattern, "error": trouble[:300]})
        right = [is_matched == (i < question["wanted"]) for i, is_matched in enumerate(matched)]
        wrong = [i for i, is_right in enumerate(right) if not is_right]
        detail: dict[str, Any] = {"pattern": pattern, "right": sum(right), "examples": len(right), "limit": 1.0}
        if wrong:
            detail["missed"] = [texts[i] for i in wrong if i < question["wanted"]][:_TOLD]
            detail["matched"] = [texts[i] for i in wrong if i >= question["wanted"]][:_TOLD]
        return Verdict(sample=sample, by="", keep=not wrong, reason=WRONG if wrong else None, score=sum(right) / len(right), detail=detail)

    def _not_judged(self, sample: str, why: str, pattern: str) -> Verdict:
        detail = {"why": why, "pattern": pattern[:300]}
        return Verdict(sample=sample, by="", keep=self.on_failure == "keep", reason="not judged", detail=detail)


def written(text: str) -> str:
    """The expression in an answer: its first fenced block, or what stands between its first backticks, or all of it."""
    for _, body in fenced(text):
        return body.strip("\r\n")
    if (start := text.find("`")) >= 0 and (end := text.find("`", start + 1)) > start + 1:
        return text[start + 1 : end]
    return text.strip()


def matched(question: dict[str, Any], _: Any) -> Any:
    """In the sandbox: which texts an expression of Python's matches, or {"error": ...}."""
    try:
        expression = re.compile(question["pattern"])
    except (re.error, OverflowError, RecursionError) as error:
        return {"error": str(error)}
    find = expression.fullmatch if question["full"] else expression.search
    return [find(text) is not None for text in question["texts"]]


def _of_python(pattern: str) -> bool:
    """Whether it holds what Python's `re` has and Rust's has not: lookaround, backreferences, conditions, possessive and atomic groups."""
    return re.search(r"\(\?(?:[=!>(]|<[=!]|P=)|\\[1-9]|[*+?}]\+|\\Z", pattern) is not None

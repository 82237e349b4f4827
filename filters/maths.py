"""Whether a worked answer computes right: its final answer against a reference, and every equation in it that can be read.

No model is asked. What it does not cover: a right computation of the wrong thing (5*60 where 5*6 was asked) is found by the reference
alone, and without one not at all; proofs, units, geometry, and equations with unknowns are not checked (`filters/equations.py` says
what is read). Final answers are compared as numbers, else as formulas by math-verify, which knows algebra, sets and intervals, and
not every form of an answer: what it can't read is "not judged". It runs in the sandbox, since a formula may be made to take for ever.
"""

from __future__ import annotations

import re
from fractions import Fraction
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field, field_validator

from factory.errors import MissingExtra
from factory.stage import Context, Filter
from factory.store import verdicts_frame
from filters import sandbox
from filters.equations import Steps, steps, values
from filters.given import answered, given
from schemas.verdict import Verdict

WRONG = "wrong answer"
ARITHMETIC = "wrong arithmetic"
FINAL = "final differs from steps"

_LONGEST = 100_000  # characters of a text that is read
_LONGEST_ANSWER = 500
_TOLD = 5
_MEMORY_MB = 1024  # sympy with its caches


class Maths(Filter):
    """Keeps what computes right.

    The final answer is what follows the last `####` (GSM8K), else what the last \\boxed{} holds, else what follows "the answer is",
    else the text's last number; `answer_pattern` says otherwise. It is held against meta[`answer`] (a number, a formula, or a worked
    answer that ends in one), and against the list meta[`answers`]: the final answers of other draws of the same question, of which a
    share of `agreement` must be the same (self-consistency, Wang et al. 2022, arXiv 2203.11171).

    arithmetic: every equation that can be read must hold, with rounding as written. final: what follows `####` must be the result of
    the last step that could be read, or of any; or nothing is asked of it ("none").

    Reasons: "wrong answer", "score below …" (of the agreement), "wrong arithmetic", "final differs from steps"; "not judged" where there is
    a reference and no answer that can be compared with it. The score is 1 or 0 for the reference's answer, else the share of other draws
    that agree, else the share of equations that hold.
    """

    key: ClassVar[str] = "maths"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"

    answer: str = Field("answer", description="key in meta: the reference answer")
    answers: str = Field("answers", description="key in meta: answers of other draws, a list")
    agreement: float = Field(0.5, ge=0, le=1, description="share of the other draws' answers that must be the same")
    answer_pattern: str | None = Field(None, description="a pattern (Rust's regex) with one group, the final answer; its last match counts")
    tolerance: float = Field(1e-6, ge=0, lt=1, description="how far two numbers may differ, relative to the reference")
    arithmetic: bool = Field(True, description="whether the equations in the text are checked")
    final: Literal["last_step", "any_step", "none"] = Field("last_step", description="which step must give what follows ####")
    seconds: float = Field(5.0, gt=0, le=60, description="of the wall clock, to compare two formulas")
    on_failure: Literal["reject", "keep"] = Field("reject", description="what becomes of a sample that can't be judged")

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                groups = pl.select(pl.lit("").str.extract_groups(pattern)).to_series().struct.fields
            except pl.exceptions.PolarsError as error:
                raise ValueError(f"{pattern!r} is not a pattern of Rust's regex (no lookaround, no backreferences): {error}") from error
            if len(groups) != 1:
                raise ValueError(f"{pattern!r} has {len(groups)} groups; the final answer is what its one group finds")
        return pattern

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a sample; detail: answer and reference, wrong (equations, with what they give), equations, limit.

        A loop over rows, since equations are read a text at a time.
        """
        own = pl.lit(None, pl.String)
        if self.answer_pattern is not None:
            own = answered().str.extract_all(self.answer_pattern).list.last().str.extract(self.answer_pattern, 1)
        rows = samples.select("id", text=answered(), own=own)
        judged = []
        for (sample, text, found), references in zip(rows.iter_rows(), given(samples, self.answer, self.answers), strict=True):
            if len(text) > _LONGEST:
                judged.append(_Row(sample, None, [], [], None, ""))
                continue
            final = final_answer(text) if self.answer_pattern is None else (found or "").strip()
            reference, others = references
            wanted = [] if reference is None else [_reference(reference)]
            others = [_reference(other) for other in others] if isinstance(others, list) else []
            read = steps(text.rpartition("####")[0] or text) if self.arithmetic or self.final != "none" else None
            judged.append(_Row(sample, final, wanted, others, read, text))
        self._compare(judged)
        ctx.progress(samples.height, samples.height)
        return verdicts_frame(self._verdict(row) for row in judged)

    def _compare(self, rows: list[_Row]) -> None:
        """Say for each row which of its references are the same: numbers and words at once, and formulas all together in the sandbox."""
        open_pairs: dict[tuple[str, str], bool | str | None] = {}
        for row in rows:
            for reference in (*row.wanted, *row.others):
                if row.final:
                    row.same[reference] = self._alike(reference, row.final)
                    if row.same[reference] is None:
                        open_pairs[reference, row.final] = None
        if open_pairs:
            if find_spec("math_verify") is None:
                raise MissingExtra("math-verify", "checks", "comparing formulas in the filter maths")
            asked = [{"reference": reference, "answer": answer} for reference, answer in open_pairs]
            limits = sandbox.Limits(seconds=self.seconds, memory_mb=_MEMORY_MB)
            told = sandbox.ask("filters.maths:compared", asked, limits=limits, lasting=True, packages=True, preload=("math_verify",))
            open_pairs = {
                pair: answer.value if answer.fate == "answered" else f"comparing them {answer.fate}"
                for pair, answer in zip(open_pairs, told, strict=True)
            }
        for row in rows:
            row.same = {reference: open_pairs.get((reference, row.final or ""), same) for reference, same in row.same.items()}

    def _alike(self, reference: str, answer: str) -> bool | None:
        """Whether two answers are the same, or None where that takes algebra."""
        if _bare(reference) == _bare(answer):
            return True
        wanted, found = values(reference), values(answer)
        if wanted and found:
            return any(abs(one - other) <= Fraction(self.tolerance) * abs(one) for one in wanted for other in found)
        if max(len(reference), len(answer)) > _LONGEST_ANSWER:
            return False
        return None if _formula(reference) and _formula(answer) else False

    def _verdict(self, row: _Row) -> Verdict:
        if row.final is None:
            return self._not_judged(row, {"why": f"more than {_LONGEST} characters"})
        detail: dict[str, Any] = {}
        if row.wanted or row.others:
            detail["answer"] = row.final[:_LONGEST_ANSWER]
        reason, score = None, None
        if row.wanted:
            detail["reference"] = row.wanted[0][:_LONGEST_ANSWER]
            same = row.same.get(row.wanted[0], "the text has no final answer")
            if not isinstance(same, bool):
                return self._not_judged(row, {**detail, "why": same or "the two can't be compared"})
            reason, score = None if same else WRONG, float(same)
        if row.others:
            told = [same for other in row.others if isinstance(same := row.same.get(other), bool)]
            if not told:
                return self._not_judged(row, {**detail, "why": "no other draw's answer can be compared with this one"})
            share = sum(told) / len(told)
            detail |= {"agree": sum(told), "of": len(told), "limit": self.agreement}
            score = share if score is None else score
            reason = reason or (f"score below {self.agreement:g}" if share < self.agreement else None)
        if row.steps is not None:
            equations = row.steps.equations if self.arithmetic else ()
            wrong = [equation for equation in equations if not equation.holds]
            detail["equations"] = len(equations)
            if wrong:
                detail["wrong"] = [{"equation": equation.text[:200], "gives": _written(equation.gives)} for equation in wrong[:_TOLD]]
                reason = reason or ARITHMETIC
            if equations and score is None:
                score = 1 - len(wrong) / len(equations)
                detail["limit"] = 1.0
            if self.final != "none" and (differs := self._differs(row)):
                detail |= differs
                reason = reason or FINAL
        return Verdict(sample=row.sample, by="", keep=reason is None, reason=reason, score=score, detail=detail)

    def _differs(self, row: _Row) -> dict[str, Any]:
        """The final answer of a text with `####` and the step's result, where they differ; else {}."""
        assert row.steps is not None
        _, mark, tail = row.text.rpartition("####")
        told = values(tail.strip()) if mark else ()
        results = row.steps.last
        if self.final == "any_step":
            results = tuple(result for equation in row.steps.equations for result in equation.results)
        # A whole number may be rounded up or down, as the question wants it.
        if (
            not told
            or not results
            or any(one == other or (one.denominator == 1 and abs(one - other) < 1) for one in told for other in results)
        ):
            return {}
        return {"final": tail.strip()[:100], "step": _written(results[0])}

    def _not_judged(self, row: _Row, detail: dict[str, Any]) -> Verdict:
        return Verdict(sample=row.sample, by="", keep=self.on_failure == "keep", reason="not judged", detail=detail)


class _Row:
    """What is known of one sample: `final` None where the text is too long to be read; `same` by reference, with why there is none."""

    def __init__(self, sample: str, final: str | None, wanted: list[str], others: list[str], read: Steps | None, text: str) -> None:
        self.sample, self.final, self.wanted, self.others, self.steps, self.text = sample, final, wanted, others, read, text
        self.same: dict[str, bool | str | None] = {}


_SAYS = re.compile(r"\banswer(?: to [^.\n]{1,80}?)?(?: is|:)[ \t:]*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?[$€£]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,40})(?:\.\d{1,40})?%?")
_WORDS = re.compile(r"(?!d[a-z]\b)[^\W\d_]{2,}")  # dx is no word
_FUNCTION = re.compile("(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc|sqrt|log|ln|exp|pi|infty|cup|cap|max|min")


def final_answer(text: str) -> str:
    """The final answer of a worked answer, by the style that it is written in; empty where there is none."""
    _, mark, tail = text.rpartition("####")
    if mark and tail.strip():
        return tail.strip().split("\n")[0].strip()
    if (at := text.rfind("\\boxed{")) >= 0 and (inner := _braced(text, at + len("\\boxed"))):
        return inner.strip()
    if said := list(_SAYS.finditer(text[-20 * _LONGEST_ANSWER :])):
        return re.split(r"(?<=[^\d\s])[.!](?:\s|$)|[.!]?\s*$|\.\s", said[-1][1].strip().strip("*"), maxsplit=1)[0].strip(" *:=")
    numbers = _NUMBER.findall(text[-20 * _LONGEST_ANSWER :])
    return numbers[-1] if numbers else ""


def _braced(text: str, start: int) -> str:
    """What stands between the brace at a place and the one that closes it."""
    depth = 0
    for i in range(start, min(len(text), start + 4 * _LONGEST_ANSWER)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 1 : i]
    return ""


def _reference(value: Any) -> str:
    """A reference as text; of a worked answer, its final one."""
    text = str(value).strip()
    short = len(text) <= _LONGEST_ANSWER and "####" not in text and "\\boxed{" not in text and "\n" not in text
    return text if short and not _SAYS.search(text) else final_answer(text)


def _bare(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("$", "")).strip(" .()*").casefold()


def _formula(text: str) -> bool:
    """Whether a text is mathematics and not words, whose letters algebra would take for factors."""
    words = [word for word in _WORDS.findall(re.sub(r"\\[A-Za-z]+", " ", text)) if not _FUNCTION.fullmatch(word)]
    return not words and re.search(r"[\w]", text) is not None


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)[:60]
    return f"{float(value):.6g}" if abs(value) < 10**12 else f"{value.numerator}/{value.denominator}"[:60]


def compared(question: dict[str, str], _: Any) -> bool | None:
    """In the sandbox: whether two formulas are the same by math-verify; None where it can't read one of them.

    Its own clocks are signals, which work in a main thread alone, and are off: the sandbox has one.
    """
    import logging

    from math_verify import parse, verify

    logging.disable(logging.WARNING)

    def read(text: str) -> list[Any]:
        text = text.strip().strip("$")
        return list(parse(f"${text}$", parsing_timeout=None) or parse(text, parsing_timeout=None))

    try:
        reference, answer = read(question["reference"]), read(question["answer"])
        if not reference or not answer or all(isinstance(one, str) for one in (*reference, *answer)):
            return None
        return bool(verify(reference, answer, timeout_seconds=None))
    except (RecursionError, MemoryError, OverflowError, ValueError, TypeError):
        return None

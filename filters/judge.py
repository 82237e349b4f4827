"""Has a model judge each sample by a rubric: the evidence first, then the score. What can't be understood is no score."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, pstdev
from typing import Any, Literal

import polars as pl
from pydantic import Field

from factory.stage import Context
from factory.store import verdicts_frame
from filters.question import NOT_JUDGED, SHIPPED, SYSTEM, Form, Rated, read_score, silence, tagged, teachers_of, together, who
from schemas.call import Answer, Call
from schemas.verdict import Verdict

__all__ = ["SHIPPED", "SYSTEM", "Judge", "read_score", "tagged"]  # who writes a judge of another kind finds the common part here


class Judge(Rated):
    """Asks one question a sample, of one of the teachers, and keeps what scores `at_least`.

    By one of: `rubric`, a shipped one (correctness, grounding, helpfulness, instruction_following, label_fits, reasoning, safety);
    `rubric_file`, a Markdown file of your own; `criteria`, names and what each asks for; `checklist`, questions of yes or no. A
    rubric says what each score from 1 to 5 means. A file whose `## name` sections have a scale each holds criteria, one with
    `- [ ]` lines a checklist. Criteria are scored from 1 to 5 each, in one answer, and the sample's score is their mean or their
    least (`combine`); a checklist's score is the share of yes.

    The prompt shows `anchors` seeds (of the sample's own label where it has one) as examples of the best score. Which seeds and
    which teacher depends on the sample alone, so a sample is always asked about in the same words. Of a preference the chosen
    answer is judged. `draws` asks so many times, which only makes sense at a temperature: the score is the mean, and how far the
    draws are apart stands in the detail. An answer that lacks a score, or has one twice or off its scale, is not a score: reason
    "not judged", and `on_failure` decides; so with several draws, unless more than half of them gave one.
    """

    key = "judge"
    ranks = True
    scope = "sample"

    combine: Literal["mean", "min"] = Field("mean", description="what of several criteria is the score")
    draws: int = Field(1, ge=1, le=20, description="how often each question is asked")

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a sample: `score` as given, `detail` with evidence, teacher and call (of several draws also calls and scores)."""
        verdicts: list[Verdict] = []
        form = self.form()
        for sample, answers in together(self.questions(samples, ctx), ctx, self.draws):
            verdicts.append(self._verdict(sample, answers, form))
            ctx.progress(len(verdicts), samples.height)
        return verdicts_frame(verdicts)

    def questions(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Call]:
        """`draws` calls a sample, all of one teacher."""
        teachers = teachers_of(ctx.stage, self.teachers, ctx)
        for _, rng, call in self.asked(samples, ctx, self.form()):
            teacher = rng.choice(teachers)
            for draw in range(self.draws):
                yield call.model_copy(update={"teacher": teacher, "draw": draw})

    def _verdict(self, sample: str, answers: list[Answer], form: Form) -> Verdict:
        ratings = [form.read(answer.reply.text, self.combine) if answer.reply else None for answer in answers]
        judged = [rating for rating in ratings if rating is not None]
        detail: dict[str, Any] = {"teacher": who(answers[0]), "call": answers[0].key}
        if self.draws > 1:
            detail["calls"] = [answer.key for answer in answers]
            detail["scores"] = [rating.score if rating else None for rating in ratings]
        if 2 * len(judged) <= self.draws:
            detail |= silence(next(answer for answer, rating in zip(answers, ratings, strict=True) if rating is None))
            return Verdict(sample=sample, by="", keep=self.on_failure == "keep", reason=NOT_JUDGED, detail=detail)
        score, limit = fmean(rating.score for rating in judged), self.limit(form)
        if self.draws > 1:
            detail["spread"] = round(pstdev(rating.score for rating in judged), 4)
        if form.kind != "rubric" or self.draws > 1:
            detail["limit"] = limit
        reason = None if score >= limit else f"score below {limit:g}"
        return Verdict(sample=sample, by="", keep=reason is None, reason=reason, score=score, detail=judged[0].detail | detail)

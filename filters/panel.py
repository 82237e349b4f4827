"""Has several models judge each sample and counts their votes: judges of different families are wrong about different rows."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, pstdev
from typing import Annotated, Any, Literal

import polars as pl
from pydantic import Field, model_validator

from factory.errors import GristmillError
from factory.stage import Context, TeacherNames
from factory.store import verdicts_frame
from filters.question import NOT_JUDGED, Form, Rated, silence, together, who
from schemas.call import Answer, Call
from schemas.families import family_of
from schemas.verdict import Verdict

TIE = "judges tie"
DISAGREE = "judges disagree"


class Panel(Rated):
    """Asks every one of `teachers` about every sample, in the same words, and keeps what enough of them score `at_least`.

    By a `rubric`, `rubric_file`, `criteria` or `checklist`, as `judge` has them (of criteria, `of_criteria` is a judge's score). A
    panel of small judges of different families costs less than one large judge and has no liking for its own kind (Verga et al.
    2024, arXiv 2404.18796); where two of them are of one family, that is reported.

    combine: "majority", more than half of those who answered must give `at_least`: the score is their lower median, which reaches
    `at_least` exactly then. Where just half do, the reason is "judges tie". "mean": the score is the mean. A judge whose answer
    can't be read has no vote; `quorum` says how many must have one (unset: more than half of the teachers, and two at least),
    else the reason is "not judged" and `on_failure` decides. How far the judges are apart is told as `spread` (the standard
    deviation of their scores) and `minority` (the share of votes that lost); a row whose spread is at least `ask_people`, or whose
    judges tie, is one that people should see.
    """

    key = "panel"
    ranks = True
    scope = "sample"

    teachers: Annotated[tuple[str, ...], TeacherNames()] = Field((), description="the judges, two at least; all of the recipe by default")
    combine: Literal["majority", "mean"] = "majority"
    of_criteria: Literal["mean", "min"] = Field("mean", description="what of several criteria is a judge's score")
    quorum: int | None = Field(None, ge=1, description="judges that must have answered; unset: more than half, and two at least")
    ask_people: float | None = Field(None, gt=0, description="spread from which people are asked; unset: 1 point, of a checklist 0.25")

    @model_validator(mode="after")
    def _several(self) -> Panel:
        if self.teachers and len(set(self.teachers)) < 2:
            raise ValueError("a panel has two teachers at least, and each once; for one there is `judge`")
        if len(set(self.teachers)) < len(self.teachers):
            raise ValueError(f"a teacher votes once; here are {', '.join(self.teachers)}")
        if self.teachers and self.quorum is not None and self.quorum > len(self.teachers):
            raise ValueError(f"quorum is {self.quorum}, and there are {len(self.teachers)} teachers")
        return self

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a sample; `detail` holds every vote, `spread`, `minority` and the calls."""
        if samples.is_empty():
            return verdicts_frame([])
        teachers, form = self._panel(ctx), self.form()
        for family, members in _families(teachers, ctx).items():
            ctx.report(f"one family: {family}", f"{', '.join(members)} are of one family, and may be wrong together")
        verdicts: list[Verdict] = []
        for sample, answers in together(self.questions(samples, ctx), ctx, len(teachers)):
            verdicts.append(self._verdict(sample, answers, form, len(teachers)))
            ctx.progress(len(verdicts), samples.height)
        return verdicts_frame(verdicts)

    def questions(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Call]:
        """A call a sample and teacher."""
        if samples.is_empty():
            return
        teachers = self._panel(ctx)
        for _, _, call in self.asked(samples, ctx, self.form()):
            for teacher in teachers:
                yield call.model_copy(update={"teacher": teacher})

    def _panel(self, ctx: Context) -> tuple[str, ...]:
        teachers = self.teachers or tuple(ctx.teachers)
        if len(teachers) < 2 or (self.quorum or 0) > len(teachers):
            raise GristmillError(
                f"a panel has two teachers at least, and its quorum; the recipe names {len(teachers)}",
                where=ctx.stage,
                next="Add teachers under teachers:, of different families, or use judge.",
            )
        return teachers

    def _verdict(self, sample: str, answers: list[Answer], form: Form, members: int) -> Verdict:
        answers = list({who(answer): answer for answer in reversed(answers)}.values())[::-1]  # who stands in for another has one vote
        ratings = [form.read(answer.reply.text, self.of_criteria) if answer.reply else None for answer in answers]
        votes = [
            {"teacher": who(answer), **({"score": rating.score} | rating.detail if rating else {"score": None} | silence(answer))}
            for answer, rating in zip(answers, ratings, strict=True)
        ]
        scores = sorted(rating.score for rating in ratings if rating)
        limit = self.limit(form)
        detail: dict[str, Any] = {
            "votes": votes,
            "call": answers[0].key,
            "calls": list(dict.fromkeys(answer.key for answer in answers)),
            "limit": limit,
        }
        if len(scores) < (self.quorum or max(2, members // 2 + 1)):
            return Verdict(sample=sample, by="", keep=self.on_failure == "keep", reason=NOT_JUDGED, detail=detail)
        for_it = sum(score >= limit for score in scores)
        spread = pstdev(scores)
        detail |= {"spread": round(spread, 4), "minority": round(min(for_it, len(scores) - for_it) / len(scores), 4)}
        tie = self.combine == "majority" and 2 * for_it == len(scores)
        if tie or spread >= (self.ask_people or (0.25 if form.kind == "checklist" else 1.0)):
            detail["people"] = DISAGREE
        score = fmean(scores) if self.combine == "mean" else scores[(len(scores) - 1) // 2]
        keep = score >= limit
        reason = None if keep else TIE if tie else f"score below {limit:g}"
        return Verdict(sample=sample, by="", keep=keep, reason=reason, score=score, detail=detail)


def _families(teachers: tuple[str, ...], ctx: Context) -> dict[str, list[str]]:
    """The families of which the panel has more than one judge; a teacher whose model is not known is in none."""
    members: dict[str, list[str]] = {}
    for teacher in teachers:
        if teacher in ctx.models:
            members.setdefault(family_of(ctx.models[teacher]), []).append(teacher)
    return {family: of for family, of in members.items() if len(of) > 1}

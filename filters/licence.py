"""Whether a row may be used to train the student that is meant: the terms of the teacher that wrote it, and whose family that is."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field

from factory.errors import GristmillError
from factory.recipe import did_you_mean
from factory.stage import Context, Filter
from factory.store import verdicts_from
from factory.terms import Terms, terms_of
from schemas.families import family_of

SAME = {"family": "of the student's family", "model": "by the student itself"}


class Licence(Filter):
    """Keeps a row when the terms of its teacher allow it, and its teacher is not of the student's family.

    The terms are known by the model's name (`factory/data/terms.yaml`, with sources and dates): `forbid` says which answers to "may its
    output train another model?" reject a row. `allow` names teachers, or licences, that are let through whatever is known of them: you
    have a contract, or meet the conditions. `licences` gives a teacher's terms where you know better.

    `student` is the model that is to be trained. Models that learn from what models of their kind wrote lose the rare cases first, and
    in the end all variety (Shumailov et al. 2024, Nature 631); so no row is by a teacher of the student's family ("family"), or
    only none by the student itself ("model"). This says nothing against real rows, which have no teacher and are kept.
    """

    key: ClassVar[str] = "licence"
    tells: ClassVar[bool] = False
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"

    student: str | None = Field(None, description="the model that is to be trained, by its name; without it nobody's family is asked about")
    collapse: Literal["family", "model", "off"] = Field("family", description="which teachers a student may not learn from")
    forbid: tuple[Literal["no", "conditions", "unknown"], ...] = Field(("no",), description="answers that reject a row")
    allow: tuple[str, ...] = Field((), description="teachers or licences that are let through all the same")
    licences: dict[str, str] = Field(default_factory=dict, description="teacher: the terms that its output is under, in your words")

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a row; detail: teacher, model, family, terms, training ("yes", "no", "conditions", "unknown"), note, source.

        GristmillError: `licences` names a teacher that is none of the recipe's.
        """
        self._names_somebody(ctx)
        rulings = {name: self._ruling(name, ctx.models.get(name)) for name in samples["teacher"].drop_nulls().unique()}
        reasons = {name: reason for name, (reason, _) in rulings.items()}
        details = {name: json.dumps(detail, ensure_ascii=False) for name, (_, detail) in rulings.items()}
        rows = samples.select(
            "id",
            reason=pl.col("teacher").replace_strict(reasons, default=None, return_dtype=pl.String),
            detail=pl.col("teacher").replace_strict(details, default="{}", return_dtype=pl.String),
        )
        return verdicts_from(rows["id"], keep=rows["reason"].is_null(), reason=rows["reason"], detail=rows["detail"])

    def _ruling(self, teacher: str, model: str | None) -> tuple[str | None, dict[str, Any]]:
        """Why the rows of a teacher fall (None: they stay), and what is told of it."""
        terms = terms_of(model) if model else Terms(family="")
        licence = self.licences.get(teacher, terms.terms)
        detail = {"teacher": teacher, "model": model, "family": terms.family or None, "terms": licence, "training": terms.training}
        detail |= {name: value for name, value in (("note", terms.note), ("source", terms.source)) if value}
        if self.student and model and self._is_of(model, self.student):
            return SAME[self.collapse], detail | {"student": self.student}
        if teacher in self.allow or licence in self.allow:
            return None, detail | {"allowed": True}
        return (f"training on output: {terms.training}" if terms.training in self.forbid else None), detail

    def _is_of(self, model: str, student: str) -> bool:
        if self.collapse == "family":
            return family_of(model) == family_of(student)
        return self.collapse == "model" and _bare(model) == _bare(student)

    def _names_somebody(self, ctx: Context) -> None:
        strangers = [name for name in self.licences if name not in ctx.models]
        if strangers and ctx.models:
            raise GristmillError(
                f"licences: names {strangers[0]!r}, and the recipe has no such teacher{did_you_mean(strangers[0], list(ctx.models))}",
                where=f"stage {ctx.stage}",
            )


def _bare(model: str) -> str:
    """A model's name without the organisation before it."""
    return model.strip().lower().rsplit("/", 1)[-1]

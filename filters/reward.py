"""What a reward model thinks of an answer: a classifier that was trained on people's preferences, run on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from factory.errors import GristmillError
from factory.recipe import did_you_mean
from factory.stage import Context
from factory.store import verdicts_from
from filters.models import (
    FEWEST_SEEDS,
    NO_NUMBER,
    NOT_JUDGED,
    NOTHING,
    REFUSED,
    ByModel,
    Model,
    Read,
    Shown,
    Turns,
    detail_of,
    opened,
    too_few_seeds,
    turns_of,
    unanswered,
)

Scores = list[float | None]
Opinion = tuple[str | None, float | None, dict[str, Any]]  # reason, score, detail
Logits = NDArray[np.float64]


class Reward(ByModel):
    """Keeps a row that the sequence classifier `model` gives at least `at_least`; of a preference, one whose chosen answer wins.

    The score is the logit of a model of one label, as reward models are (Ouyang et al. 2022, arXiv 2203.02155); of a model of several,
    the probability of `label`. A conversation is shown as the tokenizer's chat template renders it, without one as a line a turn
    ("user: ..."); `shown: pair` gives input and output as two texts, as models that were trained on pairs of sentences want it. A text is
    shown as it is. `at_least: auto` is the `quantile` of the seeds' scores, and is reported.

    Of a preference both answers are scored. Score: chosen minus rejected, which must be above `margin`; `at_least` says nothing of it.
    """

    key: ClassVar[str] = "reward"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"
    ranks: ClassVar[bool] = True

    at_least: Literal["auto"] | float = Field("auto", description="the score that a chat or text must reach")
    quantile: float = Field(0.1, gt=0, lt=1, description="of the seeds' scores, for at_least: auto")
    margin: float = Field(0.0, ge=0, description="by more than this a preference's chosen answer must score higher")
    label: str | None = Field(None, description="the label that is wanted, of a model that has several")
    shown: Literal["turns", "pair"] = Field("turns", description="how a conversation is put to the model")

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a row; `detail` has the `limit`, and of a preference both scores."""
        if samples.is_empty():
            return verdicts_from(samples["id"], keep=pl.Series([], dtype=pl.Boolean))
        model = opened(self, "classifier", self.model, f"stage {ctx.stage}")
        pairs = samples.filter(pl.col("kind") == "preference")
        at_least = self._at_least(model, ctx) if len(pairs) < len(samples) else 0.0
        rows, others = self._rows(model, samples, "chosen"), self._rows(model, pairs, "rejected")
        scores = self._scores(model, [*rows, *others], ctx, len(rows) + len(others))
        rejected = dict(zip(pairs["id"], zip(others, scores[len(rows) :], strict=True), strict=True))
        judged = [
            self._preferred(row, score, *rejected[sample]) if sample in rejected else _high_enough(row, score, at_least)
            for sample, row, score in zip(samples["id"], rows, scores[: len(rows)], strict=True)
        ]
        reasons = pl.Series([reason for reason, *_ in judged], dtype=pl.String)
        keep = reasons.is_null() | ((reasons == NOT_JUDGED) & (self.on_failure == "keep"))
        figures = pl.Series([score for _, score, _ in judged], dtype=pl.Float64)
        return verdicts_from(samples["id"], keep=keep, reason=reasons, score=figures, detail=detail_of([told for *_, told in judged]))

    def _preferred(self, first: Read, chosen: float | None, second: Read, rejected: float | None) -> Opinion:
        if chosen is None or rejected is None:
            return NOT_JUDGED, None, {"limit": self.margin, "error": first.error or second.error or NO_NUMBER}
        ahead = round(chosen - rejected, 6)
        reason = "rejected scores higher" if ahead < 0 else "margin too small" if ahead <= self.margin else None
        return reason, ahead, {"limit": self.margin, "chosen": chosen, "rejected": rejected}

    def _at_least(self, model: Model, ctx: Context) -> float:
        if self.at_least != "auto":
            return self.at_least
        seeds = ctx.seeds.filter(pl.col("kind") != "preference").sort("id")
        question = ["reward", self.label, self.shown, self.max_tokens, seeds["id"].to_list()]
        found = model.known(question, lambda: self._scores(model, self._rows(model, seeds, "chosen"), ctx, None))
        real = [score for score in found if score is not None]
        if len(real) < FEWEST_SEEDS:
            raise too_few_seeds("at_least", len(real), ctx.stage)
        at_least = round(float(np.quantile(real, self.quantile)), 6)
        ctx.report("at_least", {"chosen": at_least, "quantile": self.quantile, "median": float(np.median(real)), "seeds": len(real)})
        return at_least

    def _rows(self, model: Model, samples: pl.DataFrame, answers: Literal["chosen", "rejected"]) -> list[Read]:
        """What the model is to read of each row; a loop, since a template takes a conversation at a time."""
        rows = zip(samples["kind"], samples["text"], samples["input"], turns_of(samples, answers), strict=True)
        return model.read([self._shown(model, *row) for row in rows], self.max_tokens)

    def _shown(self, model: Model, kind: str, text: str | None, asked: str, turns: Turns) -> Shown:
        if kind == "text":
            return Shown(text or "", special=True) if (text or "").strip() else Shown(error=NOTHING)
        if (error := unanswered(turns)) is not None:
            return Shown(error=error)
        if self.shown == "pair":
            return Shown(asked, turns[-1]["content"], special=True)
        whole = model.shown(turns, reply=False)
        return Shown(error=REFUSED) if whole is None else Shown(whole, special=not model.tokenizer.chat_template)

    def _scores(self, model: Model, rows: list[Read], ctx: Context, total: int | None) -> Scores:
        """The score of each row; None where there is none."""
        score = _reader(model, self.label, f"stage {ctx.stage}")
        logits = model.class_logits(rows, self.batch_tokens, lambda done: ctx.progress(done, total) if total else None)
        return [score(row) if row is not None and np.isfinite(row).all() else None for row in logits]


def _high_enough(row: Read, score: float | None, at_least: float) -> Opinion:
    if score is None:
        return NOT_JUDGED, None, {"limit": at_least, "error": row.error or NO_NUMBER}
    return "low reward" if score < at_least else None, score, {"limit": at_least}


def _reader(model: Model, label: str | None, where: str) -> Callable[[Logits], float]:
    """How a score is read from a row's logits. GristmillError where the label that is wanted is not said, or is none of the model's."""
    config = model.model.config
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if label is None and len(names) == 1:
        return lambda logits: round(float(logits[0]), 6)
    if label is None or label not in names:
        what = "is not said" if label is None else f"is not {label!r}{did_you_mean(label, names)}"
        raise GristmillError(
            f"{model.name!r} has {len(names)} labels, and which of them is wanted {what}",
            where=where,
            next=f"Set `label` to one of: {', '.join(names[:20])}.",
        )
    place = names.index(label)
    if config.problem_type == "multi_label_classification" or len(names) == 1:
        return lambda logits: round(float(1 / (1 + np.exp(-np.clip(logits[place], -700, 700)))), 6)
    return lambda logits: round(float(np.exp(logits[place] - logits.max()) / np.exp(logits - logits.max()).sum()), 6)

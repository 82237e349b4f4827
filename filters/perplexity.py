"""How surprising an answer is to a model that did not write it: broken text is very surprising, and a loop or a copy hardly at all."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
import polars as pl
from pydantic import Field, field_validator

from factory.stage import Context
from factory.store import verdicts_from
from filters.models import FEWEST_SEEDS, NO_NUMBER, NOT_JUDGED, ByModel, Model, Read, detail_of, given, opened, too_few_seeds, turns_of

Bounds = tuple[float | None, float | None]

TO_DEVIATION = 1.4826  # a median absolute deviation in standard deviations of a normal distribution
NARROWEST = 0.1  # nats: seeds that are all of one pattern would allow nothing else


class Perplexity(ByModel):
    """Keeps a row whose answer, after its input, has a perplexity within `between` under `model`; of a text, the text itself.

    The perplexity is the exponential of the mean loss of the answer's tokens (Jelinek et al. 1977). `between` is [low, high], either
    of which can be null. "auto" takes both from the seeds: the median of their log-perplexities, and `deviations` times their median
    absolute deviation (in standard deviations) to both sides; it reports them. A preference is judged by its chosen answer.

    Score: the perplexity. It does not rank: the likeliest answers are the commonplace ones.
    """

    key: ClassVar[str] = "perplexity"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"

    between: Literal["auto"] | tuple[Annotated[float, Field(ge=1)] | None, Annotated[float, Field(ge=1)] | None] = Field(
        "auto", description="the lowest and the highest perplexity, or auto: by the seeds"
    )
    deviations: float = Field(4.0, gt=0, description="how far auto goes to either side of the seeds' median")

    @field_validator("between")
    @classmethod
    def _in_order(cls, between: Bounds | str) -> Bounds | str:
        if isinstance(between, tuple) and None not in between and between[0] > between[1]:  # type: ignore[operator]
            raise ValueError(f"between is [low, high]; {between[0]} is above {between[1]}")
        return between

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a row; `detail` has the bounds under `limit`, and how many `tokens` were scored."""
        if samples.is_empty():
            return verdicts_from(samples["id"], keep=pl.Series([], dtype=pl.Boolean))
        where = f"stage {ctx.stage}"
        model = opened(self, "causal", self.model, where)
        low, high = self._bounds(model, ctx) if self.between == "auto" else self.between
        rows = self._rows(model, samples)
        losses = model.losses(rows, self.batch_tokens, lambda done: ctx.progress(done, samples.height))
        judged = pl.DataFrame({"score": [perplexity_of(loss) for loss in losses]}, schema={"score": pl.Float64}).select(
            "score",
            reason=pl.when(pl.col("score").is_null())
            .then(pl.lit(NOT_JUDGED))
            .when(pl.col("score") < pl.lit(low, pl.Float64))
            .then(pl.lit("too predictable"))
            .when(pl.col("score") > pl.lit(high, pl.Float64))
            .then(pl.lit("improbable")),
        )
        limit = [low, high]
        detail = [
            {"limit": limit, "tokens": len(row.tokens) - row.start}
            if loss is not None
            else {"limit": limit, "error": row.error or NO_NUMBER}
            for row, loss in zip(rows, losses, strict=True)
        ]
        keep = judged["reason"].is_null() | ((judged["reason"] == NOT_JUDGED) & (self.on_failure == "keep"))
        return verdicts_from(samples["id"], keep=keep, reason=judged["reason"], score=judged["score"], detail=detail_of(detail))

    def _bounds(self, model: Model, ctx: Context) -> Bounds:
        question = ["perplexity", self.max_tokens, sorted(ctx.seeds["id"])]
        losses = model.known(question, lambda: model.losses(self._rows(model, ctx.seeds.sort("id")), self.batch_tokens))
        real = np.array([loss for loss in losses if loss is not None])
        if len(real) < FEWEST_SEEDS:
            raise too_few_seeds("between", len(real), ctx.stage)
        median = float(np.median(real))
        width = self.deviations * max(TO_DEVIATION * float(np.median(np.abs(real - median))), NARROWEST)
        low, high = round(math.exp(max(median - width, 0.0)), 4), round(math.exp(min(median + width, 700)), 4)
        ctx.report("between", {"low": low, "median": round(math.exp(median), 4), "high": high, "seeds": len(real)})
        return low, high

    def _rows(self, model: Model, samples: pl.DataFrame) -> list[Read]:
        """What the model is to read of each row; a loop, since a template takes a conversation at a time."""
        rows = zip(samples["kind"], samples["text"], turns_of(samples), strict=True)
        return model.read([given(model, kind, text, turns) for kind, text, turns in rows], self.max_tokens)


def perplexity_of(loss: float | None) -> float | None:
    """The perplexity of a mean loss in nats."""
    return None if loss is None else round(math.exp(min(loss, 700.0)), 6)  # beyond that exp has no number

"""How much an instruction helps a small model to expect its answer: not at all where the two do not belong together."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import polars as pl
from pydantic import Field

from factory.stage import Context
from factory.store import verdicts_from
from filters.models import (
    FEWEST_SEEDS,
    NO_NUMBER,
    NOT_JUDGED,
    ByModel,
    Model,
    Shown,
    Turns,
    detail_of,
    given,
    opened,
    too_few_seeds,
    turns_of,
)


class Ifd(ByModel):
    """Keeps a row whose instruction-following difficulty is below `below`, and at least `at_least`.

    The difficulty is the perplexity of the answer given its instruction, divided by that of the answer alone (IFD: Li et al. 2023,
    arXiv 2308.12032; as a ratio of perplexities, and by a small model: Li et al. 2024, arXiv 2402.00530). From 1 on the instruction
    does not help, so the two may not belong together; near 0 the instruction gives the answer away. `alone: empty` shows the same
    conversation with nothing said in it, so that what a template adds is on both sides; `bare` the answer after nothing, as the papers have
    it. `at_least: auto` is the `quantile` of the seeds' difficulties below that, and is reported.

    Only a conversation whose last turn is an answer can be judged; of a preference, the chosen answer is. Score: the difficulty. It
    ranks: the harder a row, the more there is to learn from it.
    """

    key: ClassVar[str] = "ifd"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"
    ranks: ClassVar[bool] = True

    at_least: Literal["auto"] | Annotated[float, Field(ge=0)] | None = Field(None, description="below it a row is too easy; null: none is")
    below: float = Field(1.0, gt=0, description="from there on the instruction does not help")
    quantile: float = Field(0.05, gt=0, lt=1, description="of the seeds' difficulties, for at_least: auto")
    alone: Literal["empty", "bare"] = Field("empty", description="what stands before the answer when it stands alone")

    def check(self, samples: pl.DataFrame) -> str | None:
        """Texts have no instruction."""
        if len(samples) and (samples["kind"] == "text").all():
            return "the samples are texts, and ifd compares an answer with its instruction. Take the stage out; `perplexity` judges texts."
        return None

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a row; `detail` has both mean losses (nats a token), the `tokens` of the answer, and [at_least, below] as `limit`."""
        if samples.is_empty():
            return verdicts_from(samples["id"], keep=pl.Series([], dtype=pl.Boolean))
        model = opened(self, "causal", self.model, f"stage {ctx.stage}")
        at_least = self._auto(model, ctx) if self.at_least == "auto" else self.at_least
        limit = [at_least, self.below]
        detail, scores = [], []
        for found in self._found(model, samples, ctx):
            scores.append(found.pop("ifd", None))
            detail.append(found | {"limit": limit})
        judged = pl.DataFrame({"score": scores}, schema={"score": pl.Float64}).select(
            "score",
            reason=pl.when(pl.col("score").is_null())
            .then(pl.lit(NOT_JUDGED))
            .when(pl.col("score") >= self.below)
            .then(pl.lit("instruction does not help"))
            .when(pl.col("score") < pl.lit(at_least, pl.Float64))
            .then(pl.lit("too easy")),
        )
        keep = judged["reason"].is_null() | ((judged["reason"] == NOT_JUDGED) & (self.on_failure == "keep"))
        return verdicts_from(samples["id"], keep=keep, reason=judged["reason"], score=judged["score"], detail=detail_of(detail))

    def _auto(self, model: Model, ctx: Context) -> float:
        question = ["ifd", self.alone, self.max_tokens, sorted(ctx.seeds["id"])]
        found = model.known(question, lambda: [one.get("ifd") for one in self._found(model, ctx.seeds.sort("id"), ctx)])
        real = [one for one in found if one is not None and one < self.below]
        if len(real) < FEWEST_SEEDS:
            raise too_few_seeds("at_least", len(real), ctx.stage)
        at_least = round(float(np.quantile(real, self.quantile)), 4)
        ctx.report("at_least", {"chosen": at_least, "quantile": self.quantile, "seeds": len(real)})
        return at_least

    def _found(self, model: Model, samples: pl.DataFrame, ctx: Context) -> list[dict[str, Any]]:
        """The evidence on each row: ifd and what it comes from; or `error`. A loop over rows, since a template takes one at a time."""
        conversations = turns_of(samples)
        shown = [
            given(model, kind, None, turns) if kind != "text" else Shown(error="a text has no instruction")
            for kind, turns in zip(samples["kind"], conversations, strict=True)
        ]
        helped = model.read(shown, self.max_tokens)
        alone = model.read(
            [
                row._replace(text=self._before(model, turns)) if read.error is None else Shown(error=read.error)
                for row, read, turns in zip(shown, helped, conversations, strict=True)
            ],
            self.max_tokens,
        )
        losses = model.losses([*helped, *alone], self.batch_tokens, lambda done: ctx.progress(done // 2, samples.height))
        rows = zip(helped, losses[: len(helped)], losses[len(helped) :], strict=True)
        return [_evidence(row.error, len(row.tokens) - row.start, given_loss, alone_loss) for row, given_loss, alone_loss in rows]

    def _before(self, model: Model, turns: Turns) -> str:
        """What stands before the answer when it is alone."""
        if self.alone == "bare":
            return ""
        return model.shown([turn if turn["role"] == "system" else {**turn, "content": ""} for turn in turns[:-1]], reply=True) or ""


def _evidence(error: str | None, tokens: int, helped: float | None, alone: float | None) -> dict[str, Any]:
    if helped is None or alone is None:
        return {"error": error or NO_NUMBER}
    ratio = math.exp(min(helped - alone, 700.0))  # beyond that exp has no number
    return {"ifd": round(ratio, 6), "loss_given": round(helped, 4), "loss_alone": round(alone, 4), "tokens": tokens}

"""What the teacher itself thought of its words: a small model that stumbles finds its own text unlikely."""

from __future__ import annotations

import polars as pl
from pydantic import Field

from factory.stage import Context, Filter
from factory.store import verdicts_from


class Logprob(Filter):
    """Keeps a row whose answer had a mean token log-probability (natural, so from 0 down) of `at_least`.

    That is minus the logarithm of the perplexity under the teacher that wrote it (Jelinek et al. 1977), so it compares rows
    of one teacher and one way of sampling, not of two. It needs `params: {logprobs: true}` and `per_call: 1` in the stage
    that asks; a row without the figure is kept, and counted in the stage's report. Score: the figure. It does
    not rank: among good rows the likeliest are the commonplace ones, and a student learns less from them.
    """

    key = "logprob"

    at_least: float = Field(-1.5, le=0)

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a row."""
        if unknown := samples["logprob"].null_count():
            ctx.report("unknown", f"{unknown} of {samples.height} rows of a batch came without log-probabilities")
        keep = samples["logprob"].fill_null(0.0) >= self.at_least
        reason = pl.select(pl.when(~keep).then(pl.lit("unlikely words"))).to_series()
        return verdicts_from(samples["id"], keep=keep, reason=reason, score=samples["logprob"])

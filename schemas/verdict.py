"""The verdict: one opinion about one sample. Appended, never edited; a dataset is a query over samples and verdicts.

Some keys of `detail` mean the same whoever writes them:

    mask      [[part, start, end, KIND], ...]: characters that a release replaces by [KIND], whatever became of the row. Parts:
              "messages.0" (the content of the first message, and so on), "chosen.0", "rejected.0", "text"; and "input" and "output"
              as `Sample` derives them (in an input of several turns, what falls on the names of roles is nothing)
    people    why people should see the row before others do, in a few words
    found     {KIND: how many}: what a filter found that could hurt people, {} nothing; the audit of a release counts these
    did       {KIND: "reject", "mask" or "people"}: what became of the row for it
    category  the hazard that a judge sees in a row, "none" for none
    bias      {"changed": true or false}: whether other words for groups of people would have changed the decision
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Verdict(BaseModel):
    """One opinion about one sample.

    `by` is the folder name of the filter ("05-near"), "target" or "human:NAME"; `reason` a short code that the funnel counts;
    `score` what a threshold was held to, so that it can be moved later; `detail` the evidence (a twin's id, a cluster).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample: str
    by: str
    keep: bool
    reason: str | None = None
    score: float | None = None
    detail: dict[str, Any] = Field(default_factory=dict)

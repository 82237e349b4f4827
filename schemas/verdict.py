"""The verdict: one opinion about one sample. Appended, never edited; a dataset is a query over samples and verdicts."""

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

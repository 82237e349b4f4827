"""The parts of a recipe that no stage owns: what is wanted, how texts are embedded, and how a version is cut."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Target(BaseModel):
    """What a run is to reach: `accepted` made rows, within `budget_usd`, in at most `rounds` rounds.

    `balance: label` gives every label of the seeds an equal share of the rows; `balance: cluster` aims at thin clusters.
    `oversample`: how many times the missing rows the first round aims at, so that the target can choose the best of them;
    later rounds fill up what is short.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accepted: int = Field(ge=1)
    budget_usd: float | None = Field(None, ge=0)
    balance: Literal["label", "cluster"] | None = None
    oversample: float = Field(1, ge=1, le=20)
    rounds: int = Field(12, ge=1)

    @property
    def budget_micro_usd(self) -> int | None:
        """The budget in whole micro-dollars."""
        return None if self.budget_usd is None else round(self.budget_usd * 1_000_000)


class EmbedderChoice(BaseModel):
    """Which model turns texts into vectors: `onnx` (the default, no torch), `sentence-transformers` or `static` (model2vec)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["onnx", "sentence-transformers", "static"] = "onnx"
    model: str = "all-MiniLM-L6-v2"
    options: dict[str, Any] = Field(default_factory=dict, description="passed to the library as they are")


class ReleasePlan(BaseModel):
    """How a version is cut: shares of the splits, and how much of it is real.

    `real_share`: "all" mixes every real seed in; a number is the share of real rows in the version (0 to 1). `licence` is the
    version's, `seeds_licence` that of the real rows; both are written into its card.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    validation: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)
    real_share: Literal["all"] | float = "all"
    licence: str | None = None
    seeds_licence: str | None = None

    @field_validator("real_share")
    @classmethod
    def _share(cls, value: str | float) -> str | float:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError("real_share is 'all' or a number from 0 to below 1")
        return value

"""The parts of a recipe that no stage owns: what is wanted, how texts are embedded, and how a version is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Target(BaseModel):
    """What a run is to reach: `accepted` made rows, within `budget_usd`, in at most `rounds` rounds.

    `balance` names what rows are to be spread over: `label`, `cluster` (as coverage finds them), or an axis that a generator varies; one or
    several. Each of its values gets an equal share of the rows. `quotas` gives single values rows, or shares of the rows (below 1):
    `{tone: {angry: 0.3}, refusal: {yes: 0.05}}`; besides labels and axes there are `refusal` (yes, no: whether an output refuses)
    and `kind` (chat, preference, text). A value that has none takes part in what is left. Clusters follow `proportions`: "uniform",
    "proportional" (to the reference), or shares by a cluster's name. `reference` is a file of real inputs without labels (logs, tickets):
    clusters are then those of it, and their quotas in its proportions.

    `oversample`: good rows that are wanted for each row taken. Rounds go on until there are nearly so many to choose from, as long as
    money and `rounds` last. `explore`: the part of the effort that is spread over all generators and teachers, whatever they have given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accepted: int = Field(ge=1)
    budget_usd: float | None = Field(None, ge=0)
    balance: str | tuple[str, ...] | None = None
    quotas: dict[str, dict[str, Annotated[float, Field(ge=0)]]] = Field(default_factory=dict)
    reference: Path | None = None
    proportions: Literal["uniform", "proportional"] | dict[str, Annotated[float, Field(ge=0)]] | None = None
    oversample: float = Field(1, ge=1, le=20)
    rounds: int = Field(12, ge=1)
    explore: float = Field(0.1, ge=0, le=1)

    @property
    def balanced(self) -> tuple[str, ...]:
        """The dimensions that rows are to be spread over; clusters too where the target names how."""
        named = (self.balance,) if isinstance(self.balance, str) else self.balance or ()
        clusters = ("cluster",) if (self.reference or self.proportions) and "cluster" not in named else ()
        return (*named, *clusters)

    @field_validator("quotas")
    @classmethod
    def _rows(cls, quotas: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        for name, values in quotas.items():
            if name == "cluster":
                raise ValueError("shares of clusters stand under proportions")
            if odd := [value for value, n in values.items() if n >= 1 and n != int(n)]:
                raise ValueError(f"{name}.{odd[0]}: rows are a whole number, and a share is below 1")
        return quotas

    @model_validator(mode="after")
    def _reference(self) -> Target:
        if self.proportions == "proportional" and self.reference is None:
            raise ValueError("proportions: proportional is to a reference; name its file under reference")
        return self

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
    """How a version is cut: shares of the splits, how much of it is real, and what it takes over from the last one.

    `real_share`: "all" mixes every real seed in; a number is the share of real rows in the version (0 to 1). `licence` is the
    version's, `seeds_licence` that of the real rows; both are written into its card. `earlier`: "keep" adds to what the last version holds
    (but for rows that the run turned down or has better ones for), "made" takes its made rows alone, so that real rows are
    the seeds of now, "drop" begins anew.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    validation: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)
    real_share: Literal["all"] | float = "all"
    earlier: Literal["keep", "made", "drop"] = "keep"
    licence: str | None = None
    seeds_licence: str | None = None

    @field_validator("real_share")
    @classmethod
    def _share(cls, value: str | float) -> str | float:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError("real_share is 'all' or a number from 0 to below 1")
        return value

"""What terms a model's output stands under, and whether it may train another model: what the `licence` filter and a version's card say."""

from __future__ import annotations

import re
from datetime import date
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, field_validator

from schemas.families import family_of

Training = Literal["yes", "no", "conditions", "unknown"]
TERMS = Path(__file__).parent / "data" / "terms.yaml"


class Terms(BaseModel):
    """The terms of a family, or of those of its models whose name holds the pattern `models`.

    training: may the output train another model? `note` has the conditions; `checked` is when this was last held against `source`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    models: str | None = None
    terms: str | None = None
    training: Training = "unknown"
    note: str | None = None
    source: str | None = None
    checked: date | None = None

    @field_validator("training", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value  # YAML reads both as truth values


def terms_of(model: str) -> Terms:
    """The terms of a model by its name alone; where none are known, those of its family with training "unknown"."""
    family, name = family_of(model), model.lower()
    for terms in _known():
        if terms.family == family and (terms.models is None or re.search(terms.models, name)):
            return terms
    return Terms(family=family)


@cache
def _known() -> tuple[Terms, ...]:
    return tuple(Terms.model_validate(entry) for entry in yaml.safe_load(TERMS.read_text(encoding="utf-8")))

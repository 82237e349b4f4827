"""What a checker is given of a sample: the text that it checks, and the values of `meta` that it is to be held against."""

from __future__ import annotations

import json
from typing import Any

import polars as pl


def answered() -> pl.Expr:
    """The text to be checked: a sample's output; of a plain text, all of it."""
    return pl.when(pl.col("kind") == "text").then("text").otherwise("output").fill_null("")


def given(samples: pl.DataFrame, *keys: str | None) -> list[list[Any]]:
    """For each sample the values that its meta has under each key, None where it has none; a key with dots leads into objects.

    A loop over rows, since each meta is a JSON text of its own.
    """
    if not any(keys):
        return [[None] * len(keys) for _ in range(samples.height)]
    rows = []
    for text in samples["meta"]:
        try:
            meta = json.loads(text)
        except (ValueError, RecursionError):
            meta = {}
        rows.append([None if key is None else _at(meta, key) for key in keys])
    return rows


def _at(value: Any, key: str) -> Any:
    if isinstance(value, dict) and key in value:
        return value[key]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value

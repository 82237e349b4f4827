"""Duplicates in anybody's file, without a recipe: the filters of a run, at work on rows that lie there already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import orjson
import polars as pl

from factory import plugins
from factory.embed import Embedder, open_embedder
from factory.errors import GristmillError, StoreError
from factory.rows import read_rows
from factory.stage import Filter, Vectors
from factory.still import Still
from factory.store import samples_frame
from schemas.recipe import EmbedderChoice
from schemas.sample import Failure, Sample

LONG_TEXT = 400  # characters: from there on texts are compared by words and no longer by letters
UNREADABLE = "unreadable line"


@dataclass(frozen=True)
class Dropped:
    """A row that says what another says: where both stand, by which filter, and how alike they are (None: to the letter)."""

    row: int
    source: str
    by: str
    twin: str
    likeness: float | None


@dataclass(frozen=True)
class Found:
    """What is left of a file: of its `rows`, as they stand there, `kept` stay. `unreadable` are no samples, or no rows at all, which go."""

    rows: Sequence[Any]
    kept: Sequence[int]
    dropped: Sequence[Dropped]
    unreadable: Sequence[Failure]
    reports: Mapping[str, Mapping[str, Any]]
    texts: Mapping[str, str]  # by id, of the rows that a report names


def dedup(path: Path, stages: Sequence[Filter], *, embedder: EmbedderChoice | None = None) -> Found:
    """Run filters of duplicates over a file, each on what the one before it left; of two alike rows the earlier one stays.

    GristmillError where the file can't be read, or holds no row that can be used.
    """
    rows: list[Any] = []
    samples: list[Sample] = []
    at: list[int] = []
    unreadable: list[Failure] = []
    dropped: list[Dropped] = []
    for number, (row, read) in enumerate(read_rows(path)):
        rows.append(row)
        if isinstance(read, Sample):
            samples.append(read)
            at.append(number)
        else:
            unreadable.append(read)
            if read.reason == UNREADABLE:
                dropped.append(Dropped(number, read.source or "", UNREADABLE, "", None))
    if not samples:
        why = "".join(f"; first, {f.source}: {f.reason} ({f.detail})" for f in unreadable[:1])
        raise GristmillError(f"none of its {len(rows)} rows can be used{why}", where=str(path))
    if (kinds := {sample.kind for sample in samples}) > {"preference"}:
        raise GristmillError(
            f"it holds preferences beside other rows ({', '.join(sorted(kinds))}), and neither is a duplicate of the other",
            where=str(path),
            next="Name a file with rows of one kind; a version has one for each.",
        )
    whole = samples_frame(samples).with_columns(round=pl.Series(at, dtype=pl.Int64))  # what comes first in the file is the earlier
    sources = whole["source"].to_list()
    first_at: dict[str, int] = {}
    for place, sample in enumerate(whole["id"]):
        if (first := first_at.setdefault(sample, place)) != place:
            dropped.append(Dropped(at[place], sources[place], "exact", sources[first], None))
    left = whole[sorted(first_at.values())]
    reports: dict[str, dict[str, Any]] = {}
    named: set[str] = set()
    for stage in stages:
        context = _Alone(stage.key, embedder or EmbedderChoice())
        verdicts = stage.judge(left, context)
        reports[stage.key] = context.reports
        gone = verdicts.filter(~pl.col("keep")).with_columns(
            twin=pl.col("detail").str.json_path_match("$.twin"), against=pl.col("detail").str.json_path_match("$.against")
        )
        for sample, score, twin, against in gone.select("sample", "score", "twin", "against").iter_rows():
            of = against or sources[first_at[twin]]
            dropped.append(Dropped(at[first_at[sample]], sources[first_at[sample]], stage.key, of, score))
        left = left.join(gone, left_on="id", right_on="sample", how="anti", maintain_order="left")
        named |= {row[end] for side in context.reports.get("nearest_the_cut", {}).values() for row in side for end in ("sample", "twin")}
    lost = {one.row for one in dropped}
    kept = [number for number in range(len(rows)) if number not in lost]
    texts = {row["id"]: row["input"] for row in whole.filter(pl.col("id").is_in(list(named))).select("id", "input").to_dicts()}
    return Found(rows, kept, sorted(dropped, key=lambda one: one.row), unreadable, reports, texts)


def shingles_for(path: Path) -> dict[str, Any]:
    """How texts of a file had better be cut: letters where most are short, words where they are documents."""
    lengths = [
        len(read.input) + len(read.output) for _, (_, read) in zip(range(1000), read_rows(path), strict=False) if isinstance(read, Sample)
    ]
    middle = sorted(lengths)[len(lengths) // 2] if lengths else 0
    return {"shingle": "words", "size": 5} if middle >= LONG_TEXT else {"shingle": "chars", "size": 3}


def stages_for(
    path: Path, *, compare: str, against: Sequence[Path], near: float | None, mode: str, semantic: float | Literal["auto"] | None
) -> list[Filter]:
    """The filters that the command is told to run: `exact` always, `near` and `semantic` at their thresholds."""
    common = {"compare": compare, "against": against}
    wanted: list[tuple[str, dict[str, Any]]] = [("exact", common)]
    if near is not None:
        wanted.append(("near", {**common, "threshold": near, "mode": mode, **shingles_for(path)}))
    if semantic is not None:
        wanted.append(("semantic", {**common, "threshold": semantic}))
    return [plugins.stage_class(key).model_validate(settings) for key, settings in wanted]  # type: ignore[misc]


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write rows to a file: JSON Lines, or CSV or Parquet by its ending. StoreError where that can't be done."""
    try:
        if path.suffix.lower() in (".csv", ".parquet"):
            frame = pl.DataFrame(list(rows), infer_schema_length=None)
            frame.write_csv(path) if path.suffix.lower() == ".csv" else frame.write_parquet(path)
            return
        with path.open("wb") as file:
            file.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE, default=str) for row in rows)
    except (OSError, TypeError, pl.exceptions.PolarsError) as error:
        raise StoreError(
            f"the rows can't be written: {error}", where=str(path), next="Write them as .jsonl, which holds any row."
        ) from error


def write_dropped(path: Path, found: Found) -> None:
    """Write a line for each row that goes: where it stands, why, the row that says the same, and itself."""
    write_rows(
        path,
        (
            {"source": one.source, "by": one.by, "twin": one.twin or None, "likeness": one.likeness, "row": found.rows[one.row]}
            for one in found.dropped
        ),
    )


class _Alone(Still):
    """What a filter of a file knows: the file, and an embedder that is loaded at its first use."""

    def __init__(self, stage: str, choice: EmbedderChoice) -> None:
        super().__init__(stage)
        self._choice = choice

    @cached_property
    def _embedder(self) -> Embedder:
        return open_embedder(self._choice)

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self._embedder.embed(texts)

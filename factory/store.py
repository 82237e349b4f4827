"""Samples and verdicts as polars frames and Parquet files: written once, beside their place, synced, then renamed."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

from factory.errors import StoreError
from schemas.sample import Failure, Message, Provenance, Sample
from schemas.verdict import Verdict

TURNS = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))

SAMPLES = pl.Schema(
    {
        "id": pl.String(),
        "kind": pl.String(),  # chat, preference, text
        "input": pl.String(),  # derived: what a model is shown
        "output": pl.String(),  # derived: what it is taught to say
        "label": pl.String(),
        "messages": TURNS,
        "chosen": TURNS,
        "rejected": TURNS,
        "text": pl.String(),
        "holdout": pl.Boolean(),
        "origin": pl.String(),  # real, made
        "generator": pl.String(),
        "round": pl.Int64(),
        "teacher": pl.String(),
        "call": pl.String(),
        "template": pl.String(),
        "source": pl.String(),
        "parents": pl.List(pl.String()),
        "axes": pl.String(),  # JSON object
        "meta": pl.String(),  # JSON object
        "logprob": pl.Float64(),  # mean over the answer's tokens
    }
)

VERDICTS = pl.Schema(
    {
        "sample": pl.String(),
        "by": pl.String(),
        "keep": pl.Boolean(),
        "reason": pl.String(),
        "score": pl.Float64(),
        "detail": pl.String(),  # JSON object
    }
)

QUALITY = pl.Schema({"id": pl.String(), "quality": pl.Float64()})  # how good ranking filters find samples: 0 to 1

FAILURES = pl.Schema(dict.fromkeys(("reason", "detail", "text", "teacher", "call", "source"), pl.String()))


def samples_frame(samples: Iterable[Sample]) -> pl.DataFrame:
    """A frame of `SAMPLES`, one row a sample, in the order given."""
    rows = [
        (
            s.id,
            s.kind,
            s.input,
            s.output,
            s.label,
            [m.model_dump() for m in s.messages],
            [m.model_dump() for m in s.chosen],
            [m.model_dump() for m in s.rejected],
            s.text,
            s.holdout,
            s.provenance.origin,
            s.provenance.generator,
            s.provenance.round,
            s.provenance.teacher,
            s.provenance.call,
            s.provenance.template,
            s.provenance.source,
            list(s.provenance.parents),
            json.dumps(s.provenance.axes, ensure_ascii=False),
            json.dumps(s.meta, ensure_ascii=False),
            s.provenance.logprob,
        )
        for s in samples
    ]
    return pl.DataFrame(rows, schema=SAMPLES, orient="row")


def samples_of(frame: pl.DataFrame) -> list[Sample]:
    """The samples of a frame of `SAMPLES`, for the edges where a row at a time is right (release, review, show)."""

    def turns(value: list[dict[str, str]] | None) -> tuple[Message, ...]:
        return tuple(Message.model_validate(turn) for turn in value or ())

    return [
        Sample(
            messages=turns(row["messages"]),
            chosen=turns(row["chosen"]),
            rejected=turns(row["rejected"]),
            text=row["text"],
            label=row["label"],
            meta=json.loads(row["meta"]),
            holdout=row["holdout"],
            provenance=Provenance(
                origin=row["origin"],
                generator=row["generator"],
                round=row["round"],
                parents=tuple(row["parents"]),
                teacher=row["teacher"],
                call=row["call"],
                template=row["template"],
                axes=json.loads(row["axes"]),
                source=row["source"],
                logprob=row["logprob"],
            ),
        )
        for row in frame.iter_rows(named=True)
    ]


def verdicts_frame(verdicts: Iterable[Verdict]) -> pl.DataFrame:
    """A frame of `VERDICTS`, one row a verdict."""
    rows = [(v.sample, v.by, v.keep, v.reason, v.score, json.dumps(v.detail, ensure_ascii=False)) for v in verdicts]
    return pl.DataFrame(rows, schema=VERDICTS, orient="row")


def verdicts_from(
    sample: pl.Series, *, keep: pl.Series, reason: pl.Series | None = None, score: pl.Series | None = None, detail: pl.Series | None = None
) -> pl.DataFrame:
    """What `Filter.judge` gives back, from columns of equal length: `sample` ids, `keep`, and the rest where there is one."""
    n = len(sample)
    return pl.DataFrame(
        {
            "sample": sample,
            "by": pl.Series([""] * n, dtype=pl.String),
            "keep": keep,
            "reason": pl.Series([None] * n, dtype=pl.String) if reason is None else reason,
            "score": pl.Series([None] * n, dtype=pl.Float64) if score is None else score.cast(pl.Float64),
            "detail": pl.Series(["{}"] * n, dtype=pl.String) if detail is None else detail,
        },
        schema=VERDICTS,
    )


def failures_frame(failures: Iterable[Failure]) -> pl.DataFrame:
    """A frame of `FAILURES`, one row a failure."""
    return pl.DataFrame([tuple(f.model_dump().values()) for f in failures], schema=FAILURES, orient="row")


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that `path` is either whole or as it was: beside its place, synced, renamed. A full disk: StoreError."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def append_json(path: Path, value: Any) -> None:
    """Add `value` to a file of JSON lines."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def write_frame(path: Path, frame: pl.DataFrame) -> None:
    """Write a frame as Parquet, whole or not at all."""
    buffer = io.BytesIO()  # polars calls a full disk a ComputeError
    frame.write_parquet(buffer)
    write_bytes(path, buffer.getvalue())


def read_json(path: Path) -> Any:
    """The JSON value of a file of ours; StoreError where it is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError("this file of a run or version is missing", where=str(path)) from error
    except ValueError as error:
        raise StoreError(
            f"this file is not whole JSON: {error}",
            where=str(path),
            next="If it is a run's, delete the run's folder and run again: the ledger answers what was paid for.",
        ) from error


def read_frame(path: Path, schema: pl.Schema) -> pl.DataFrame:
    """The frame of a Parquet file of ours; StoreError where it is missing, broken, or has other columns."""
    try:
        frame = pl.read_parquet(path)
    except FileNotFoundError as error:
        raise StoreError(
            "this file of a run or version is missing",
            where=str(path),
            next="Put it back, or delete the run's folder and run again: the ledger answers what was paid for.",
        ) from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise StoreError(
            f"this file can't be read as Parquet: {error}",
            where=str(path),
            next="Delete the run's folder and run again: the ledger answers what was paid for.",
        ) from error
    if frame.schema != schema:
        other = sorted(set(frame.columns) ^ set(schema.names())) or "types"
        raise StoreError(
            f"this file was written by another version of Gristmill (columns that differ: {other})",
            where=str(path),
            next="Delete the run's folder and run again: the ledger answers what was paid for.",
        )
    return frame


def unwritable(path: Path, error: OSError) -> StoreError:
    """What to tell where a file can't be written: a full disk, or rights."""
    return StoreError(
        f"can't write: {error.strerror or error}",
        where=str(path),
        next="Make room (or mend the folder's rights) and run the same command: it goes on where it stopped.",
    )

"""Reads the whole ledger: to take it elsewhere, and to prove that what was paid for is still there and still says the same.

It is read by a connection of its own that can't write, a page at a time: a ledger of millions of entries fits into memory, and
a run that goes on meanwhile is not held up. There is no way to delete, on purpose.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import orjson

from factory.database import Database, Row, open_database
from factory.errors import GristmillError, StoreError
from factory.ledger import COUNTED, MIGRATIONS, Entry, ledger_place
from factory.store import unwritable
from schemas.call import KEY_VERSION, Reply
from schemas.canonical import content_hash

Form = Literal["jsonl", "csv", "parquet"]

PAGE = 2000  # rows

# `request` and `answer` are JSON. An answer stands with every entry that was settled: the one that was first.
COLUMNS = (*Entry.__dataclass_fields__, "provider", "model", "draw", "request", "answer")
NUMBERS = {"id", "round", "reserved_micro_usd", "cost_micro_usd", "tokens_in", "tokens_out", "draw"}


@dataclass(frozen=True)
class Audit:
    """What `verify` has checked, and every fault that it found."""

    calls: int
    entries: int
    runs: int
    faults: tuple[str, ...]


def export(home: Path, path: Path, *, form: Form | None = None, run: str | None = None) -> int:
    """Write every entry, of one run or of all, with its question and answer to `path`, whole or not at all; gives how many.

    `form` None: by the path's ending, else jsonl. StoreError: there is no ledger, or it or the file fails.
    """
    ending = path.suffix.lower().removeprefix(".")
    if form is None and ending and ending not in _WRITERS:
        raise GristmillError(f"{path.name} ends in none of {', '.join(_WRITERS)}", next="Say which it is to be: --format.")
    write = _WRITERS[form or ending or "jsonl"]
    part = path.with_name(f".{path.name}.part")
    with closing(_open(home)) as db:
        if run is not None:
            run = _run_named(db, run)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            written = write(part, _pages(db, run))
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise unwritable(path, error) from error
        except db.errors as error:
            raise db.fault(error) from error
        finally:
            part.unlink(missing_ok=True)
    return written


def _run_named(db: Database, name: str) -> str:
    """The run of this name, which may be a recipe's; GristmillError where it is none, or several's."""
    runs: list[str] = [run for (run,) in db.execute("SELECT DISTINCT run FROM entries ORDER BY run")]
    fitting = [run for run in runs if run == name] or [run for run in runs if run.rpartition("-")[0] == name]
    if len(fitting) != 1:
        what = f"the ledger knows no run {name!r}" if not fitting else f"{name!r} has several runs"
        raise GristmillError(what, next=f"Its runs: {', '.join(fitting or runs) or 'none'}.")
    return fitting[0]


def verify(home: Path) -> Audit:
    """Check the database's own files, every call's key against its stored question, that what was settled has an answer that can
    be read, and that what counts against each budget is the sum of its entries. StoreError: there is no ledger to be opened."""
    counts = dict.fromkeys(("calls", "entries", "runs"), 0)
    faults: list[str] = []
    with closing(_open(home)) as db:
        for check in (_files, _questions, _entries, _sums):
            try:
                faults += check(db, counts)
            except db.errors as error:  # the others may find more
                faults.append(db.fault(error).what)
    return Audit(**counts, faults=tuple(dict.fromkeys(faults)))


def key_of(provider: str, model: str, draw: int, request: str) -> str:
    """The key of a stored question, which is that of the call that was asked. ValueError, KeyError or TypeError: it is not whole."""
    asked = json.loads(request)
    messages = [[message["role"], message["content"]] for message in asked["messages"]]
    return content_hash(KEY_VERSION, [provider, model, messages, asked.get("prompt"), asked.get("json_schema"), asked["params"], draw])


def _files(db: Database, counts: dict[str, int]) -> Iterator[str]:
    for said in db.check():
        yield f"the database is broken: {said}"


def _questions(db: Database, counts: dict[str, int]) -> Iterator[str]:
    for page in _calls(db):
        counts["calls"] += len(page)
        for row in page:
            if fault := _fault_of(*row):
                yield fault


def _entries(db: Database, counts: dict[str, int]) -> Iterator[str]:
    [(counts["entries"],)] = db.execute("SELECT count(*) FROM entries")
    its_call = "SELECT 1 FROM calls WHERE calls.key = entries.key"
    for id, key in db.execute(f"SELECT id, key FROM entries WHERE NOT EXISTS ({its_call}) ORDER BY id"):
        yield f"entry {id} is of a call that is not there: {key}"
    unanswered = f"SELECT id, key FROM entries WHERE state = 'settled' AND EXISTS ({its_call} AND answer IS NULL) ORDER BY id"
    for id, key in db.execute(unanswered):
        yield f"entry {id} is settled, but its call {key} has no answer"


def _sums(db: Database, counts: dict[str, int]) -> Iterator[str]:
    either = f"SELECT run, 0 AS counted, coalesce({COUNTED}, 0) AS summed FROM entries UNION ALL SELECT run, micro_usd, 0 FROM budgets"
    for run, counted, summed in db.execute(f"SELECT run, sum(counted), sum(summed) FROM ({either}) AS either GROUP BY run ORDER BY run"):
        counts["runs"] += 1
        if counted != summed:
            yield f"run {run}: {int(counted):,} micro-dollars count against its budget, but its entries add up to {int(summed):,}"


def _open(home: Path) -> Database:
    return open_database(ledger_place(home), MIGRATIONS, read_only=True)


def _pages(db: Database, run: str | None) -> Iterator[list[Row]]:
    """Rows of COLUMNS, in the order in which they were entered."""
    entry = ", ".join(f"entries.{name}" for name in Entry.__dataclass_fields__)
    sql = (
        f"SELECT {entry}, provider, model, draw, request, CASE state WHEN 'settled' THEN answer END "
        f"FROM entries JOIN calls ON calls.key = entries.key WHERE id > ? {'' if run is None else 'AND run = ?'} ORDER BY id LIMIT {PAGE}"
    )
    last = 0
    while page := db.execute(sql, last, *(() if run is None else (run,))):
        yield page
        last = page[-1][0]


def _calls(db: Database) -> Iterator[list[Row]]:
    sql = f"SELECT key, provider, model, draw, request, answer FROM calls WHERE key > ? ORDER BY key LIMIT {PAGE}"
    last = ""
    while page := db.execute(sql, last):
        yield page
        last = page[-1][0]


def _fault_of(key: str, provider: str, model: str, draw: int, request: str, answer: str | None) -> str | None:
    try:
        found = key_of(provider, model, draw, request)
    except (ValueError, KeyError, TypeError) as error:
        return f"call {key}: its question is not whole ({error!r})"
    if found != key:
        return f"call {key}: its question is another's: it has the key {found}"
    try:
        if answer is not None:
            Reply.model_validate_json(answer)
    except ValueError as error:
        return f"call {key}: its answer can't be read ({' '.join(str(error).split())[:200]})"
    return None


def _write_jsonl(path: Path, pages: Iterator[list[Row]]) -> int:
    written = 0
    with path.open("wb") as file:
        for page in pages:
            for *values, request, answer in page:
                texts = (orjson.Fragment(request), None if answer is None else orjson.Fragment(answer))
                file.write(orjson.dumps(dict(zip(COLUMNS, (*values, *texts), strict=True))) + b"\n")
            written += len(page)
    return written


def _write_csv(path: Path, pages: Iterator[list[Row]]) -> int:
    written = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for page in pages:
            writer.writerows(page)
            written += len(page)
    return written


def _write_parquet(path: Path, pages: Iterator[list[Row]]) -> int:
    import polars as pl

    kinds = {name: pl.Int64() if name in NUMBERS else pl.Float64() if name == "seconds" else pl.String() for name in COLUMNS}
    written = 0
    with TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
        try:
            parts: list[Path] = []
            for page in pages:
                parts.append(Path(folder) / f"{len(parts):06}.parquet")
                pl.DataFrame(page, schema=kinds, orient="row").write_parquet(parts[-1])
                written += len(page)
            frame = pl.scan_parquet(parts) if parts else pl.LazyFrame(schema=kinds)
            frame.sink_parquet(path, row_group_size=PAGE)  # as small as the parts: larger ones are gathered in memory, many at once
        except pl.exceptions.PolarsError as error:  # polars calls a full disk a ComputeError
            raise StoreError(f"can't write: {error}", where=str(path), next="Make room and run the same command.") from error
    return written


_WRITERS: dict[str, Callable[[Path, Iterator[list[Row]]], int]] = {"jsonl": _write_jsonl, "csv": _write_csv, "parquet": _write_parquet}

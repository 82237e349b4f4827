"""SQL that finds what it should and SQL that does not, on tables that one can read at a glance."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.store import VERDICTS
from filters.sql import Sql
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame

TABLES = """
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INT);
INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bob', 25), (3, 'Cy', 25);
"""


def answer(output: str, reference: str | None = None, tables: str | None = TABLES) -> Sample:
    meta = {key: value for key, value in {"schema": tables, "answer": reference}.items() if value is not None}
    return chat(f"Which? (as {reference} in {tables})", output).model_copy(update={"meta": meta})


def judged(*samples: Sample, **fields: Any) -> list[dict[str, Any]]:
    verdicts = Sql(**fields).judge(frame(*samples), FakeContext())
    assert verdicts.schema == VERDICTS
    rows = frame(*samples).select(sample="id").join(verdicts, on="sample", maintain_order="left")
    assert rows["keep"].null_count() == 0 and rows.height == verdicts.height
    return [{**row, "detail": json.loads(row["detail"])} for row in rows.iter_rows(named=True)]


KEPT: list[tuple[str, str | None, float | None]] = [
    ("SELECT name FROM singer", None, None),
    ("```sql\nSELECT count(*) AS n FROM singer;\n```\nIt counts.", "SELECT 3", 1.0),
    ("SELECT name FROM singer ORDER BY id DESC", "SELECT name FROM singer", 1.0),
    ("SELECT name FROM singer", "SELECT name FROM singer ORDER BY id", 1.0),
    ("SELECT avg(age) FROM singer", "SELECT 80 / 3.0", 1.0),
    ("SELECT age * 1.0 FROM singer", "SELECT age FROM singer", 1.0),
    ('SELECT id FROM singer WHERE name = "Bob"', "SELECT 2", 1.0),
    ('SELECT "name" FROM singer', "SELECT name FROM singer", 1.0),
    ('SELECT age AS "how old" FROM singer ORDER BY "how old"', None, None),
    ("WITH t AS (SELECT age, count(*) n FROM singer GROUP BY age) SELECT * FROM t WHERE n > 1", "SELECT 25, 2", 1.0),
    ("-- the oldest\nSELECT name FROM singer ORDER BY age DESC LIMIT 1", "SELECT 'Ann'", 1.0),
    ("SELECT name FROM singer WHERE id = 99", "SELECT name FROM singer WHERE id = 77", 1.0),
]

REJECTED: list[tuple[str, str | None, str]] = [
    ("SELECT name FROM singer ORDER BY id DESC", "SELECT name FROM singer ORDER BY id", "other result"),
    ("SELECT DISTINCT age FROM singer", "SELECT age FROM singer", "other result"),
    ("SELECT name, id FROM singer", "SELECT id, name FROM singer", "other result"),
    ("SELECT id FROM singer WHERE id = 99", "SELECT id FROM singer", "other result"),
    ("SELECT nmae FROM singer", None, "unknown column"),
    ('SELECT "nmae" FROM singer', None, "unknown column"),
    ("SELECT name FROM singers", None, "unknown table"),
    ("SELECT name FROM singer WHERE", None, "does not parse"),
    ("SELEC name FORM singer", None, "does not parse"),
    ("I can't answer that.", None, "does not parse"),
    ("hello world", None, "does not parse"),
    ("SELECT \x00 1", None, "does not parse"),
    ("SELECT no_such_function(1)", None, "does not run"),
    ("SELECT 1; SELECT 2", None, "several statements"),
    ("SELECT 1; DROP TABLE singer", None, "several statements"),
    ("DROP TABLE singer", None, "kind not allowed"),
    ("INSERT INTO singer VALUES (4, 'D', 1)", None, "kind not allowed"),
    ("ATTACH DATABASE 'x.db' AS x", None, "kind not allowed"),
    ("PRAGMA writable_schema = 1", None, "kind not allowed"),
    ("SELECT load_extension('x')", None, "kind not allowed"),
    ("```python\nprint(1)\n```", None, "no sql"),
    ("  ", None, "no sql"),
]


def test_what_finds_what_it_should_is_kept() -> None:
    rows = judged(*(answer(sql, reference) for sql, reference, _ in KEPT))
    for row, (sql, _, score) in zip(rows, KEPT, strict=True):
        assert (row["keep"], row["reason"], row["score"]) == (True, None, score), (sql, row)
    assert "people" in rows[-1]["detail"], "two empty results say little"


def test_what_does_not_is_rejected_with_its_reason() -> None:
    rows = judged(*(answer(sql, reference) for sql, reference, _ in REJECTED))
    for row, (sql, _, reason) in zip(rows, REJECTED, strict=True):
        assert (row["keep"], row["reason"]) == (False, reason), (sql, row)
    assert rows[0]["detail"]["found"] == [["Cy"], ["Bob"], ["Ann"]]
    assert (rows[0]["score"], rows[0]["detail"]["ordered"]) == (0.0, True)
    assert rows[4]["detail"]["name"] == "nmae"
    assert rows[6]["detail"]["name"] == "singers"


HOSTILE = [
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c",
    "SELECT count(*) FROM " + ", ".join(f"singer s{i}" for i in range(20)),
    "SELECT s0.name FROM " + ", ".join(f"singer s{i}" for i in range(20)) + " ORDER BY random()",
    "SELECT length(replace(hex(zeroblob(2000000)), '0', 'aaaaaaaaaaaaaaaa'))",
    "SELECT 'x' WHERE '" + "a" * 9000 + "' LIKE '" + "%a" * 4000 + "b'",
    "(" * 40_000,
    "SELECT " + "(" * 3000 + "1" + ")" * 3000,
    "SELECT 1" + "+1" * 20_000,
    "SELECT " + "CASE WHEN 1 THEN " * 2500,
    "SELECT " + "NOT " * 10_000 + "1",
    "SELECT '" + "x" * 1_000_000 + "'",
]


def test_hostile_statements_are_bounded_and_do_not_spoil_the_next() -> None:
    start = time.monotonic()
    rows = judged(*(answer(sql) for sql in [*HOSTILE, "SELECT name FROM singer"]), seconds=0.5)
    assert time.monotonic() - start < 90
    assert [row["reason"] for row in rows[:2]] == ["timed out"] * 2
    assert rows[2]["reason"] in ("timed out", "does not run")
    assert rows[3]["reason"] == "does not run"
    assert not any(row["keep"] for i, row in enumerate(rows[:-1]) if i not in (4, 6, 9)), "these three are only odd"
    assert rows[-1]["keep"]


def test_a_reference_or_tables_that_fail_are_nobodys_fault() -> None:
    rows = judged(
        answer("SELECT 1", "SELECT x FROM nowhere"),
        answer("SELECT 1", tables="CREATE TABLE ("),
        answer("SELECT id FROM singer", "SELECT id FROM singer"),
        rows=2,
    )
    assert [row["reason"] for row in rows] == ["not judged"] * 3
    assert ["reference" in rows[0]["detail"]["why"], "tables" in rows[1]["detail"]["why"], "2 rows" in rows[2]["detail"]["why"]] == [
        True
    ] * 3
    assert judged(answer("SELECT 1", "SELECT x FROM nowhere"), on_failure="keep")[0]["keep"]


def test_without_tables_it_is_only_read() -> None:
    rows = judged(answer("SELECT a FROM b", "SELECT 1", tables=None), answer("SELECT a FROM", tables=None))
    assert [row["reason"] for row in rows] == [None, "does not parse"]


def test_changes_are_compared_by_what_they_leave() -> None:
    rows = judged(
        answer("UPDATE singer SET age = age + 1", "UPDATE singer SET age = 1 + age WHERE id < 9"),
        answer("UPDATE singer SET age = age + 1", "UPDATE singer SET age = 1 + age WHERE id < 3"),
        answer("DELETE FROM singer WHERE id = 1"),
        answer("SELECT 1"),
        allow=("update", "delete"),
    )
    assert [row["reason"] for row in rows] == [None, "other result", None, "kind not allowed"]


def test_a_file_of_tables_and_another_dialect(tmp_path: Path) -> None:
    file = tmp_path / "tables.sql"
    file.write_text("CREATE TABLE t (id SERIAL PRIMARY KEY, at TIMESTAMP, name VARCHAR(20)); INSERT INTO t VALUES (1, '2024-01-02', 'x');")
    bare = [
        answer("SELECT name::TEXT FROM t WHERE name ILIKE 'X'", "SELECT name FROM t", None),
        answer("SELECT nope FROM t", None, None),
        answer("SELECT regexp_split_to_array(name, ',') FROM t", None, None),
        answer("WITH gone AS (DELETE FROM t RETURNING *) SELECT * FROM gone", None, None),
    ]
    rows = judged(*bare, dialect="postgres", schema_file=file)
    assert [row["reason"] for row in rows] == [None, "unknown column", "not judged", "kind not allowed"]
    with pytest.raises(GristmillError, match="can't read these tables"):
        judged(*bare, schema_file=tmp_path / "none.sql")


def test_verdicts_do_not_depend_on_order_or_company() -> None:
    samples = [answer(sql, reference) for sql, reference, _ in (*KEPT, *REJECTED)]

    def verdicts(frames: pl.DataFrame) -> pl.DataFrame:
        return Sql().judge(frames, FakeContext()).sort("sample")

    assert verdicts(frame(*samples)).equals(verdicts(frame(*reversed(samples))))


def test_faulty_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="did you mean 'postgres'"):
        Sql(dialect="postgresq")
    for fields in ({"allow": ()}, {"allow": ("grant",)}, {"seconds": 0}, {"rows": 0}):
        with pytest.raises(ValidationError):
            Sql.model_validate(fields)

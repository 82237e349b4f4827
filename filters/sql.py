"""Whether a sample's SQL can be read, is of an allowed kind, runs on the tables that it is about, and finds what it should.

Reading is sqlglot's, in any of its dialects. Running is SQLite's, in memory, with the tables of `schema_file` or of the sample's own meta;
with a reference query the results are compared: execution match (Yu et al. 2018, arXiv 1809.08887). What it does not cover: two different
queries can find the same rows in few data, so a match is as good as the rows in the tables; another dialect is
translated for SQLite, and what that can't do is "not judged"; speed, style and permissions are not looked at.
"""

from __future__ import annotations

import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import polars as pl
from pydantic import Field, model_validator

from factory.errors import GristmillError, MissingExtra
from factory.recipe import did_you_mean
from factory.stage import Context, Filter, RecipeFile
from factory.store import verdicts_frame
from filters import sandbox
from filters.code import fenced
from filters.given import answered, given
from schemas.verdict import Verdict

Kind = Literal["select", "insert", "update", "delete", "create", "alter", "drop"]

NO_SQL = "no sql"
UNREADABLE = "does not parse"
SEVERAL = "several statements"
KIND = "kind not allowed"
NO_TABLE = "unknown table"
NO_COLUMN = "unknown column"
BROKEN = "does not run"
LATE = "timed out"
OTHER = "other result"

_LONGEST = 50_000  # characters of a statement that is read
_MEMORY_MB = 512
_VALUE_BYTES = 4 << 20  # of one value, so that a single call of replace() or printf() is bounded too
_TOLD_ROWS = 3


class Sql(Filter):
    """Keeps SQL that parses as one statement of an allowed kind and, where there are tables, runs on them and finds what it should.

    The SQL is the output's first fenced block (```sql, or no language), or all of the output. The tables are those of `schema_file` and of
    meta[`tables`]: DDL and, for results that tell something, INSERTs, in `dialect`. meta[`answer`] is a reference query: its rows must be
    found, in its order only where it has an ORDER BY itself; column names don't count, their order does. Of a statement that changes
    data, the tables after it are compared. The score is 1 for the same result and 0 for another.
    """

    key: ClassVar[str] = "sql"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"

    dialect: str = Field("sqlite", description="one of sqlglot's: sqlite, postgres, mysql, duckdb, snowflake, …")
    allow: tuple[Kind, ...] = Field(("select",), min_length=1, description="kinds of statements that may be given")
    schema_file: Annotated[Path | None, RecipeFile()] = Field(None, description="DDL and INSERTs that every sample's SQL is run on")
    tables: str = Field("schema", description="key in meta: DDL and INSERTs of this sample alone")
    answer: str = Field("answer", description="key in meta: a reference query")
    seconds: float = Field(2.0, gt=0, le=60, description="of the wall clock, for a statement")
    rows: int = Field(10_000, ge=1, description="rows of a result that are compared; one with more is not judged")
    on_failure: Literal["reject", "keep"] = Field("reject", description="what becomes of a sample that can't be judged")

    @model_validator(mode="after")
    def _known(self) -> Sql:
        if find_spec("sqlglot") is None:
            raise MissingExtra("sqlglot", "checks", "the filter sql")
        if self.dialect != "sqlite":
            from sqlglot.dialects.dialect import Dialects

            known = [one.value for one in Dialects if one.value]
            if self.dialect not in known:
                near = did_you_mean(self.dialect, known)
                raise ValueError(f"no dialect is called {self.dialect!r}{near}; there are {', '.join(sorted(known))}")
        return self

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a sample; detail: kind, error, and of a compared result the number of rows and the first that differ.

        A loop over rows, since each statement has tables of its own.
        """
        shared = self._shared()
        rows = samples.select("id", text=answered())
        verdicts: list[Verdict] = []
        asked: list[str] = []
        questions: list[dict[str, Any]] = []
        for sample, text, (tables, answer) in zip(rows["id"], rows["text"], given(samples, self.tables, self.answer), strict=True):
            sql = written(text, self.dialect)
            if not sql.strip():
                verdicts.append(Verdict(sample=sample, by="", keep=False, reason=NO_SQL))
            elif len(sql) > _LONGEST:
                verdicts.append(self._not_judged(sample, {"why": f"more than {_LONGEST} characters"}))
            else:
                setup = [text for text in (shared, tables) if isinstance(text, str) and text.strip()]
                reference = answer if isinstance(answer, str) and answer.strip() and setup else None
                asked.append(sample)
                questions.append({"sql": sql, "tables": setup, "answer": reference, "dialect": self.dialect, "allow": self.allow})
                questions[-1] |= {"seconds": self.seconds, "rows": self.rows}
        # The clock inside stops a statement; the one outside, with room for tables and reference, what does not listen to it.
        limits = sandbox.Limits(seconds=3 * self.seconds + 2, memory_mb=_MEMORY_MB)
        answers = sandbox.ask("filters.sql:examined", questions, limits=limits, lasting=True, packages=True, preload=("sqlglot", "sqlite3"))
        verdicts += [self._verdict(sample, answer) for sample, answer in zip(asked, answers, strict=True)]
        return verdicts_frame(verdicts)

    def _shared(self) -> str:
        if self.schema_file is None:
            return ""
        try:
            return self.schema_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise GristmillError(f"can't read these tables: {error}", where=str(self.schema_file)) from error

    def _verdict(self, sample: str, answer: sandbox.Answer) -> Verdict:
        if answer.fate == "timed out":
            return Verdict(sample=sample, by="", keep=False, reason=LATE, detail={"limit": self.seconds})
        if answer.fate == "died":
            return self._not_judged(sample, {"why": "the process that examined it ended", "output": answer.output[-300:]})
        found = dict(answer.value)
        if "why" in found:
            return self._not_judged(sample, found)
        reason, same = found.pop("reason", None), found.pop("same", None)
        score = None if same is None else float(same)
        return Verdict(sample=sample, by="", keep=reason is None, reason=reason, score=score, detail=found)

    def _not_judged(self, sample: str, detail: dict[str, Any]) -> Verdict:
        return Verdict(sample=sample, by="", keep=self.on_failure == "keep", reason="not judged", detail=detail)


def written(text: str, dialect: str) -> str:
    """The SQL in an answer: its first fenced block of SQL; all of it where it has no fence."""
    found = fenced(text)
    if not found:
        return text
    return next((body for words, body in found if not words or words[0] in ("sql", dialect)), "")


# What happens in the sandbox.


class _Unfit(Exception):
    """A verdict: `found` as `examined` gives it back."""

    def __init__(self, **found: Any) -> None:
        super().__init__(str(found))
        self.found = found


def examined(question: dict[str, Any], _: Any) -> dict[str, Any]:
    """A verdict's reason and detail; {"why": ...} where it can't be judged; `same` where results were compared."""
    try:
        return _examined(question)
    except _Unfit as unfit:
        return unfit.found
    except (RecursionError, MemoryError) as error:
        return {"why": f"too deep or too large to be read ({type(error).__name__})"}


def _examined(question: dict[str, Any]) -> dict[str, Any]:
    from sqlglot import exp

    tree, kind = _read(question["sql"], question["dialect"])
    if kind not in question["allow"]:
        raise _Unfit(reason=KIND, kind=kind, limit=list(question["allow"]))
    if not question["tables"]:
        return {"kind": kind}
    mine = _Database(question)
    _quoted(tree, mine.names())
    rows = mine.run(_translated(tree, question["sql"], question["dialect"]), kind)
    if question["answer"] is None:
        return {"kind": kind, "rows": len(rows)}
    try:
        reference, its_kind = _read(question["answer"], question["dialect"])
        wanted = (theirs := _Database(question)).run(_translated(reference, question["answer"], question["dialect"]), its_kind)
    except _Unfit as unfit:
        raise _Unfit(why=f"the reference can't be run: {unfit.found.get('error') or unfit.found}") from unfit
    if kind != "select" or its_kind != "select":
        rows, wanted = mine.contents(), theirs.contents()
    if max(len(rows), len(wanted)) > question["rows"]:
        raise _Unfit(why=f"a result of more than {question['rows']} rows")
    ordered = isinstance(reference, exp.Query) and reference.args.get("order") is not None
    same = rows == wanted if ordered else Counter(rows) == Counter(wanted)
    detail: dict[str, Any] = {"kind": kind, "rows": len(rows), "wanted_rows": len(wanted), "ordered": ordered, "limit": 1.0, "same": same}
    if not same:
        detail |= {"reason": OTHER, "found": _shown(rows), "wanted": _shown(wanted)}
    elif not wanted:
        detail["people"] = "the reference finds nothing, so a match says little"
    return detail


def _read(sql: str, dialect: str) -> tuple[Any, str]:
    """The tree of the one statement in a text, and its kind; a query that changes data on the way is of that kind."""
    import sqlglot
    from sqlglot import exp

    try:
        trees = [tree for tree in sqlglot.parse(sql, read=dialect) if tree is not None and not isinstance(tree, exp.Semicolon)]
    except sqlglot.errors.SqlglotError as error:
        told = getattr(error, "errors", None) or [{}]
        words = " ".join(str(told[0].get(key) or "") for key in ("start_context", "highlight", "end_context")).strip()
        raise _Unfit(reason=UNREADABLE, error=str(told[0].get("description") or error)[:200], near=words[:120]) from error
    if len(trees) != 1:
        raise _Unfit(reason=SEVERAL if trees else NO_SQL, statements=len(trees))
    changing: dict[Any, str] = {exp.Insert: "insert", exp.Update: "update", exp.Delete: "delete", exp.Merge: "merge", exp.Into: "create"}
    others: dict[Any, str] = {exp.Create: "create", exp.Alter: "alter", exp.Drop: "drop", exp.Query: "select"}
    tree = trees[0]
    for known, kind in (others | changing).items():
        if isinstance(tree, known):
            inner = next((changing[type(node)] for node in tree.walk() if type(node) in changing), None) if kind == "select" else None
            return tree, inner or kind
    if isinstance(
        tree, exp.Command | exp.Pragma | exp.Attach | exp.Detach | exp.Transaction | exp.Commit | exp.Rollback | exp.Set | exp.Use
    ):
        return tree, (str(tree.this) if isinstance(tree, exp.Command) else type(tree).__name__).lower()[:40]
    raise _Unfit(reason=UNREADABLE, error="this is no statement of SQL")


def _translated(tree: Any, sql: str, dialect: str) -> str:
    import sqlglot

    if dialect == "sqlite":
        return sql
    try:
        return str(tree.sql(dialect="sqlite", unsupported_level=sqlglot.ErrorLevel.RAISE))
    except sqlglot.errors.SqlglotError as error:
        raise _Unfit(why=f"SQLite can't do this: {error}"[:300]) from error


def _quoted(tree: Any, names: set[str]) -> None:
    """Reject a quoted name in a query's head that nothing bears: SQLite would take it for a text, and answer with that."""
    from sqlglot import exp

    known = names | {alias.alias.lower() for alias in tree.find_all(exp.Alias, exp.CTE)}
    known |= {column.name.lower() for alias in tree.find_all(exp.TableAlias) for column in alias.args.get("columns") or ()}
    for column in tree.find_all(exp.Column):
        head = isinstance(column.parent, exp.Select | exp.Ordered | exp.Group | exp.Alias)
        if head and isinstance(column.this, exp.Identifier) and column.this.quoted and column.name.lower() not in known:
            raise _Unfit(reason=NO_COLUMN, error=f"no such column: {column.name}", name=column.name)


class _Database:
    """SQLite in memory with the tables of a question, in which one statement may be run."""

    def __init__(self, question: dict[str, Any]) -> None:
        import sqlite3

        import sqlglot

        self.question = question
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _VALUE_BYTES)
        self.connection.execute("PRAGMA temp_store = MEMORY")  # what is sorted is bounded by memory and time, not by a file's size
        self._clock()
        try:
            for text in question["tables"]:
                if question["dialect"] != "sqlite":
                    trees = sqlglot.parse(text, read=question["dialect"])
                    text = ";\n".join(tree.sql(dialect="sqlite") for tree in trees if tree is not None)
                self.connection.executescript(text)
        except (sqlite3.Error, sqlglot.errors.SqlglotError) as error:
            raise _Unfit(why=f"the tables can't be made: {error}"[:300]) from error

    def names(self) -> set[str]:
        """The names of all tables' columns, in lower case."""
        found = "SELECT c.name FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type IN ('table', 'view')"
        return {str(name).lower() for (name,) in self.connection.execute(found)} | {"rowid", "oid", "_rowid_"}

    def run(self, sql: str, kind: str) -> list[tuple[Any, ...]]:
        """The rows that a statement gives, one more than the limit at most."""
        import sqlite3

        self._clock()
        self.connection.set_authorizer(_changes_allowed if kind != "select" else _reads_allowed)
        try:
            rows = self.connection.execute(sql).fetchmany(self.question["rows"] + 1)
        except (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeError) as error:
            self._raise(str(error))
        finally:
            self.connection.set_authorizer(None)
        return [tuple(_plain(value) for value in row) for row in rows]

    def contents(self) -> list[tuple[Any, ...]]:
        """All rows of all tables, each with its table's name first."""
        self._clock()
        tables = [name for (name,) in self.connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        rows: list[tuple[Any, ...]] = []
        for table in tables:
            quoted = table.replace('"', '""')
            rows += [
                (table, *map(_plain, row))
                for row in self.connection.execute(f'SELECT * FROM "{quoted}"').fetchmany(self.question["rows"] + 1)
            ]
        return rows

    def _clock(self) -> None:
        end = time.monotonic() + self.question["seconds"]
        self.connection.set_progress_handler(lambda: time.monotonic() > end, 10_000)

    def _raise(self, error: str) -> None:
        for words, reason in (("no such table: ", NO_TABLE), ("no such column: ", NO_COLUMN), ("has no column named ", NO_COLUMN)):
            if words in error:
                raise _Unfit(reason=reason, error=error, name=error.split(words, 1)[1])
        if "interrupted" in error:
            raise _Unfit(reason=LATE, limit=self.question["seconds"])
        if "not authorized" in error or "prohibited" in error:
            raise _Unfit(reason=KIND, error=error)
        if self.question["dialect"] != "sqlite":
            raise _Unfit(why=f"SQLite can't run this: {error}"[:300])
        raise _Unfit(reason=BROKEN, error=error[:300])


def _reads_allowed(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    import sqlite3

    harmless = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE)
    call = action == sqlite3.SQLITE_FUNCTION and second not in ("load_extension", "fts3_tokenizer")
    return sqlite3.SQLITE_OK if action in harmless or call else sqlite3.SQLITE_DENY


def _changes_allowed(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    import sqlite3

    never = (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA, sqlite3.SQLITE_CREATE_VTABLE)
    call = action == sqlite3.SQLITE_FUNCTION and second in ("load_extension", "fts3_tokenizer")
    return sqlite3.SQLITE_DENY if action in never or call else sqlite3.SQLITE_OK


def _plain(value: Any) -> Any:
    """A value to compare by: 2 and 2.0 are the same, and so are sums that differ by a rounding."""
    return round(value, 6) + 0.0 if isinstance(value, float) else value


def _shown(rows: list[tuple[Any, ...]]) -> list[list[str]]:
    return [[str(value)[:80] for value in row] for row in rows[:_TOLD_ROWS]]

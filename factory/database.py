"""Where a ledger lies: one SQLite file, or a PostgreSQL database that several machines share. The one place that knows their differences.

Statements are written once, with `?` for parameters. A statement over many rows takes them as one JSON parameter (`rows`), so
a whole batch is one step inside the database, outside of Python's lock.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl, urlsplit

from factory.errors import MissingExtra, StoreError
from factory.spool import Alive, lives

if TYPE_CHECKING:
    import psycopg

APPLICATION_ID = 0x67726D6C  # "grml": tells a ledger from any other SQLite file
WAIT_S = 60  # for other writers

Row = tuple[Any, ...]
Migrations = Sequence[tuple[str, ...]]  # each step's statements, in SQLite's words; those that begin with ONLY_SQLITE are for it alone
ONLY_SQLITE = "-- SQLite"


class Database(Protocol):
    """One connection, used by one thread at a time. `errors` are what it raises when the database fails.

    `mark` tells this ledger from others whose spools lie in the same folder; "": they lie beside it alone.
    """

    place: str
    mark: str
    errors: tuple[type[Exception], ...]

    def execute(self, sql: str, *values: Any) -> list[Row]:
        """Run one statement; gives its rows."""

    def change(self, sql: str, *values: Any) -> int:
        """Run one statement that changes rows; gives how many it changed."""

    def rows(self, columns: str) -> str:
        """A table for a FROM clause, made of one parameter: JSON text of an array of arrays. `columns`: "key text, cost bigint"."""

    def begin(self) -> None:
        """Begin a transaction that no other writer of this ledger, in any process, has at the same time."""

    def commit(self) -> None: ...

    def rollback(self) -> None: ...

    def live(self, owner: str) -> None:
        """Let others see, from now on and until this connection or process ends, that this owner lives."""

    def owners(self) -> set[str]:
        """Owners that live, and those that ended and were not forgotten, as far as the database knows them by more than entries."""

    def is_dead(self, owner: str) -> bool:
        """Whether that owner has ended."""

    def forget(self, owner: str) -> None:
        """Remove what said that an owner lived, which is dead."""

    def check(self) -> list[str]:
        """What the database itself finds broken in its files."""

    def fault(self, error: Exception) -> StoreError:
        """What a failure means to the user."""

    def close(self) -> None: ...


def is_url(where: Path | str) -> bool:
    """Whether this is the URL of a PostgreSQL database."""
    return isinstance(where, str) and where.startswith(("postgresql:", "postgres:"))


def open_database(where: Path | str, migrations: Migrations, *, read_only: bool = False) -> Database:
    """Connect, and bring the tables to this version; `where` is a file, or a URL that begins with "postgresql:".

    `read_only`: nothing can be changed, and nothing is made where there is no ledger: StoreError.
    """
    if is_url(where):
        return PostgreSQL(str(where), migrations, read_only=read_only)
    return SQLite(Path(where), migrations, read_only=read_only)


class SQLite:
    """A ledger in one file, in WAL mode with full synchronisation: a commit has reached the disk."""

    errors: tuple[type[Exception], ...] = (sqlite3.Error,)
    mark = ""

    def __init__(self, path: Path, migrations: Migrations, *, read_only: bool = False) -> None:
        self.place = str(path)
        self._path, self._owners = path, path.with_name(f"{path.name}-owners")
        self._alive: Alive | None = None
        if read_only and not path.exists():
            raise _no_ledger(self.place)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = f"{path.absolute().as_uri()}{'?mode=ro' if read_only else ''}"
            self._db = sqlite3.connect(file, timeout=WAIT_S, isolation_level=None, check_same_thread=False, uri=True)
        except (OSError, sqlite3.Error) as error:
            raise self.fault(error) from error
        try:
            self._prepare(migrations, read_only)
        except sqlite3.Error as error:
            self._db.close()
            raise self.fault(error) from error
        except BaseException:
            self._db.close()
            raise

    def execute(self, sql: str, *values: Any) -> list[Row]:
        return self._db.execute(sql, values).fetchall()

    def change(self, sql: str, *values: Any) -> int:
        return self._db.execute(sql, values).rowcount

    def rows(self, columns: str) -> str:
        names = [column.split()[0] for column in columns.split(",")]
        picked = ", ".join(f"value ->> {n} AS {name}" for n, name in enumerate(names))
        return f"(SELECT {picked} FROM json_each(?)) AS given"

    def begin(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        with suppress(sqlite3.Error):
            self._db.execute("ROLLBACK")

    def live(self, owner: str) -> None:
        self._alive = Alive(self._owners / owner)

    def owners(self) -> set[str]:
        return {path.name for path in self._owners.glob("[!.]*")}

    def is_dead(self, owner: str) -> bool:
        return not lives(self._owners / owner)

    def forget(self, owner: str) -> None:
        (self._owners / owner).unlink(missing_ok=True)

    def check(self) -> list[str]:
        try:
            return [said for (said,) in self.execute("PRAGMA quick_check") if said != "ok"]
        except sqlite3.DatabaseError as error:  # too broken even for that
            return [str(error)]

    def fault(self, error: Exception) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0)
        if isinstance(error, (OSError, sqlite3.OperationalError)) and code != sqlite3.SQLITE_CORRUPT:
            next = "Make room (or mend the folder's rights) and run the same command."
            return StoreError(f"the ledger can't be used: {error}", where=self.place, next=next)
        next = "Restore it from a copy, or move it away to start a new one."
        return StoreError(f"the ledger is broken: {error}", where=self.place, next=next)

    def close(self) -> None:
        self._db.close()
        if self._alive:
            self._alive.end()

    def _prepare(self, migrations: Migrations, read_only: bool) -> None:
        """Bring the file to this version's tables. Several processes may do so at once."""
        [(tables,)] = self.execute("SELECT count(*) FROM sqlite_master")
        if tables and self._pragma("application_id") != APPLICATION_ID:
            next = "Move it away, or choose another folder."
            raise StoreError("this SQLite file is not a ledger of Gristmill", where=self.place, next=next)
        check_version(self._pragma("user_version"), len(migrations), self.place)
        if read_only:
            if self._pragma("user_version") < len(migrations):
                SQLite(self._path, migrations).close()
            return
        self._use_wal()
        self._db.execute("PRAGMA synchronous = FULL")
        if self._pragma("user_version") < len(migrations):
            self.begin()
            for step in migrations[self._pragma("user_version") :]:  # another process may have been faster
                for statement in step:
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version = {len(migrations)}")
            self.commit()

    def _pragma(self, name: str) -> int:
        value: int = self._db.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    def _use_wal(self) -> None:
        # SQLite does not wait (busy_timeout or not) when two connections change the mode of a new file at once.
        for attempt in range(200):
            try:
                if self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0] == "wal":
                    return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or attempt == 199:
                    raise
            time.sleep(0.05)


class PostgreSQL:
    """A ledger in a PostgreSQL database, for several machines. An owner is known to live by a lock that its session holds.

    A commit is as durable as the server is set up to be. The spools lie on the machine that asked: what it had received when it
    died is settled when a ledger is opened on that machine again, with the same folder; until then the others call it lost.
    """

    _WRITERS = 0x67726D6C  # the advisory lock that a transaction holds, so that there is one writer at a time
    # A machine that vanished must not hold its locks for the two hours that a connection may be silent.
    _SESSION = (
        f"SET lock_timeout = '{WAIT_S} s'",
        "SET tcp_keepalives_idle = 30",
        "SET tcp_keepalives_interval = 10",
        "SET tcp_keepalives_count = 3",
    )

    def __init__(self, url: str, migrations: Migrations, *, read_only: bool = False) -> None:
        try:
            import psycopg
        except ImportError as error:
            raise MissingExtra("psycopg", "postgres", "a ledger in PostgreSQL") from error
        self.errors: tuple[type[Exception], ...] = (psycopg.Error,)
        self.place = _without_password(url)
        self._url = url
        try:
            self._db: psycopg.Connection[Row] = psycopg.connect(
                url, autocommit=True, connect_timeout=10, fallback_application_name="gristmill"
            )
        except psycopg.Error as error:
            raise self.fault(error) from error
        try:
            self._prepare(migrations, read_only)
        except psycopg.Error as error:
            self._db.close()
            raise self.fault(error) from error
        except BaseException:
            self._db.close()
            raise

    def execute(self, sql: str, *values: Any) -> list[Row]:
        return self._db.execute(_numbered(sql), values).fetchall()

    def change(self, sql: str, *values: Any) -> int:
        return self._db.execute(_numbered(sql), values).rowcount

    def rows(self, columns: str) -> str:
        pairs = [column.split() for column in columns.split(",")]
        picked = ", ".join(f"(value ->> {n})::{kind} AS {name}" for n, (name, kind) in enumerate(pairs))
        return f"(SELECT {picked} FROM jsonb_array_elements(?::jsonb) AS each (value)) AS given"

    def begin(self) -> None:
        self._db.execute("BEGIN")
        self._db.execute("SELECT pg_advisory_xact_lock(%s)", (self._WRITERS,))

    def commit(self) -> None:
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        with suppress(*self.errors):
            self._db.execute("ROLLBACK")

    def live(self, owner: str) -> None:
        self.execute("SELECT pg_advisory_lock(?)", _lock_of(owner))

    def owners(self) -> set[str]:
        return set()

    def is_dead(self, owner: str) -> bool:
        [(free,)] = self.execute("SELECT pg_try_advisory_lock(?)", _lock_of(owner))
        if free:
            self.execute("SELECT pg_advisory_unlock(?)", _lock_of(owner))
        return bool(free)

    def forget(self, owner: str) -> None:
        """The server has: the lock went with the session."""

    def check(self) -> list[str]:
        return []  # its pages carry checksums, where whoever made the cluster wished it, and are checked at each reading

    def fault(self, error: Exception) -> StoreError:
        said = " ".join(str(error).split())
        return StoreError(f"the ledger can't be used: {said}", where=self.place, next="Mend the database and run the same command.")

    def close(self) -> None:
        self._db.close()

    def _prepare(self, migrations: Migrations, read_only: bool) -> None:
        for setting in self._SESSION:
            self._db.execute(setting.encode())
        if read_only:
            return self._prepare_to_read(migrations)
        self.begin()
        self._db.execute("CREATE TABLE IF NOT EXISTS gristmill (version integer NOT NULL, mark text NOT NULL)")
        rows = self.execute("SELECT version, mark FROM gristmill")
        version, self.mark = rows[0] if rows else (0, uuid.uuid4().hex)
        check_version(version, len(migrations), self.place)
        for step in migrations[version:]:
            for statement in step:
                if not statement.lstrip().startswith(ONLY_SQLITE):
                    words = statement.replace("WITHOUT ROWID", "").replace("INTEGER", "BIGINT").replace("REAL", "DOUBLE PRECISION")
                    self._db.execute(words.encode())
        if version < len(migrations):
            self._db.execute("DELETE FROM gristmill")
            self.change("INSERT INTO gristmill VALUES (?, ?)", len(migrations), self.mark)
        self.commit()
        return None

    def _prepare_to_read(self, migrations: Migrations) -> None:
        self._db.execute("SET default_transaction_read_only = on")
        [(table,)] = self.execute("SELECT to_regclass('gristmill')")
        if table is None:
            raise _no_ledger(self.place)
        [(version, self.mark)] = self.execute("SELECT version, mark FROM gristmill")
        check_version(version, len(migrations), self.place)
        if version < len(migrations):
            PostgreSQL(self._url, migrations).close()


def check_version(version: int, known: int, place: str) -> None:
    """Raise StoreError where the tables are of a newer Gristmill than this one."""
    if version > known:
        raise StoreError(
            f"this ledger is of a newer Gristmill (its version is {version}, this one knows {known})",
            where=place,
            next="Install the newer Gristmill. Do not delete the ledger: it holds what was paid for.",
        )


def _no_ledger(place: str) -> StoreError:
    return StoreError("there is no ledger here: nothing was asked yet", where=place)


@lru_cache(maxsize=256)
def _numbered(sql: str) -> bytes:
    """A statement with psycopg's placeholders."""
    return sql.replace("%", "%%").replace("?", "%s").encode()


def _lock_of(owner: str) -> int:
    return int.from_bytes(hashlib.blake2b(owner.encode(), digest_size=8).digest(), "big", signed=True)


def _without_password(url: str) -> str:
    """What may be printed of a URL: its server and database."""
    parts = urlsplit(url)
    host = dict(parse_qsl(parts.query)).get("host", "")
    return f"postgresql://{parts.netloc.rpartition('@')[2] or host}{parts.path}"

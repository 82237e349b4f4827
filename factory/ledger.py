"""The ledger: every call ever made to a teacher and its answer, so that what was paid for once is never paid for again.

A call's question and its answer stand in `calls`, by key. Each time that it is asked stands in `entries`, which is the money:
entered as open with its worst-case price reserved before it is sent, settled after. All work goes through one thread, which
takes whatever is queued and commits it as one transaction: a commit waits for the disk, and fifty entries wait no longer than one.
"""

from __future__ import annotations

import os
import queue
import socket
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

from factory.errors import StoreError
from schemas.call import Call, Reply
from schemas.canonical import canonical_json

T = TypeVar("T")

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE calls (
            key TEXT PRIMARY KEY,
            provider TEXT NOT NULL,
            model TEXT NOT NULL,
            draw INTEGER NOT NULL,
            request TEXT NOT NULL,       -- canonical JSON: messages, prompt, json_schema, params as they were sent
            answer TEXT,                 -- JSON of a Reply; the first that was settled, for ever
            cost_micro_usd INTEGER       -- what that answer cost; NULL: the price was unknown
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE entries (
            id INTEGER PRIMARY KEY,
            key TEXT NOT NULL REFERENCES calls (key),
            state TEXT NOT NULL CHECK (state IN ('open', 'settled', 'lost', 'failed')),
            run TEXT NOT NULL,
            stage TEXT NOT NULL,
            round INTEGER NOT NULL,
            teacher TEXT NOT NULL,
            owner TEXT NOT NULL,         -- host, process, its start, and which of its ledgers
            opened_at TEXT NOT NULL,     -- UTC
            settled_at TEXT,
            reserved_micro_usd INTEGER,  -- NULL: the price is unknown
            cost_micro_usd INTEGER,
            tokens_in INTEGER,
            tokens_out INTEGER,
            error TEXT
        )
        """,
        "CREATE INDEX entries_by_key ON entries (key)",
        "CREATE INDEX entries_by_run ON entries (run, state, cost_micro_usd, reserved_micro_usd)",
        "CREATE INDEX entries_open ON entries (owner) WHERE state = 'open'",
    ),
)
LEDGER_FILE = "ledger.db"  # under the home
APPLICATION_ID = 0x67726D6C  # "grml": tells a ledger from any other SQLite file

_SPENT = """
    SELECT coalesce(sum(CASE state WHEN 'settled' THEN cost_micro_usd ELSE reserved_micro_usd END), 0)
    FROM entries WHERE run = ? AND state IN ('settled', 'open', 'lost')
"""


@dataclass(frozen=True)
class Question:
    """A call as the ledger knows it: its key, who answers, and the request that is sent, as canonical JSON."""

    key: str
    provider: str
    model: str
    draw: int
    request: str

    @classmethod
    def of(cls, call: Call, identity: tuple[str, str]) -> Question:
        """The question that `call` puts to the model of this identity; `call.params` must be those that are sent."""
        asked = call.model_dump(include={"messages", "prompt", "json_schema", "params"}, exclude_none=True)
        return cls(call.key(*identity), *identity, call.draw, canonical_json(asked))


@dataclass(frozen=True)
class Place:
    """On whose behalf a call is asked."""

    run: str
    stage: str
    round: int
    teacher: str


class Known(NamedTuple):
    """An answer that the ledger holds, and what it cost when it was bought (None: price unknown)."""

    reply: Reply
    micro_usd: int | None


@dataclass(frozen=True)
class Entry:
    """One time that a call was asked. "lost": its process died before the answer was settled; it may have been paid for."""

    id: int
    key: str
    state: Literal["open", "settled", "lost", "failed"]
    run: str
    stage: str
    round: int
    teacher: str
    opened_at: str
    settled_at: str | None
    reserved_micro_usd: int | None
    cost_micro_usd: int | None
    tokens_in: int | None
    tokens_out: int | None
    error: str | None


@dataclass(frozen=True)
class Record:
    """All that the ledger holds of one call: the question, the answer that stands, and every time that it was asked."""

    question: Question
    answer: Known | None
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Sum:
    """The entries of one run or one teacher, added up.

    `micro_usd` counts as the budget does: settled costs, and the reservations of what is open or lost. `unpriced` is how many
    of those entries have no known price, and are not in it.
    """

    name: str
    settled: int
    open: int
    lost: int
    failed: int
    micro_usd: int
    unpriced: int
    tokens_in: int
    tokens_out: int


class Ledger:
    """An open ledger; made by `Ledger.open`, closed by `close` or as a context. Safe to use from any thread.

    Raises StoreError when the file is broken, of a newer Gristmill, or can't be written.
    """

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db
        self._owner = f"{_process(os.getpid())}:{uuid.uuid4().hex[:8]}"
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._work, name="ledger", daemon=True)
        self._spent: dict[str, int] = {}  # by run; true while `_version` is the file's
        self._version = -1
        self._closed = False

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the ledger at `path`, made if missing; what dead processes left open is marked as lost."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(path, error) from error
        try:
            _prepare(db, path)
            ledger = cls(path, db)
            ledger._bury()
        except sqlite3.Error as error:
            db.close()
            raise _unusable(path, error) from error
        except BaseException:
            db.close()
            raise
        ledger._writer.start()
        return ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is queued and close; calls of ours that nobody settled are lost from here on."""
        if self._closed:
            return
        last = self._do(lambda: self._lose(self._owner))
        self._closed = True
        try:
            last.result()
        finally:
            self._queue.put(None)
            self._writer.join()
            self._db.close()

    def find(self, key: str) -> Future[Known | None]:
        """The answer that stands for a key; None: there is none."""
        return self._do(lambda: self._known(key))

    def holds(self, key: str) -> bool:
        """Whether a key has an answer, so that asking it costs nothing."""
        return self.find(key).result() is not None

    def enter(self, question: Question, place: Place, *, reserve: int | None, budget: int | None) -> Future[int | None]:
        """Enter a call as open and reserve its worst-case price; gives the entry's id once that is on disk.

        None: `reserve` (micro-USD) does not fit into what the run's `budget` (micro-USD; None: no limit) has left.
        """

        def work() -> int | None:
            if budget is not None and reserve and self._spent_by(place.run) + reserve > budget:
                return None
            self._db.execute("INSERT OR IGNORE INTO calls VALUES (?, ?, ?, ?, ?, NULL, NULL)", astuple(question))
            entry = self._db.execute(
                "INSERT INTO entries (key, state, run, stage, round, teacher, owner, opened_at, reserved_micro_usd) "
                "VALUES (?, 'open', ?, ?, ?, ?, ?, ?, ?)",
                (question.key, place.run, place.stage, place.round, place.teacher, self._owner, _now(), reserve),
            ).lastrowid
            self._add_spent(place.run, reserve or 0)
            return entry

        return self._do(work)

    def settle(self, entry: int, reply: Reply, cost: int | None) -> Future[Known]:
        """Keep an answer and what it cost (micro-USD); gives, once that is on disk, the answer that stands.

        That is another one than `reply` when a second process asked the same and settled first: both are paid for, one is used.
        """

        def work() -> Known:
            key, run, reserved = self._close_entry(
                entry, state="settled", cost_micro_usd=cost, tokens_in=reply.tokens_in, tokens_out=reply.tokens_out
            )
            self._db.execute(
                "UPDATE calls SET answer = ?, cost_micro_usd = ? WHERE key = ? AND answer IS NULL", (reply.model_dump_json(), cost, key)
            )
            self._add_spent(run, (cost or 0) - reserved)
            standing = self._known(key)
            assert standing is not None
            return standing

        return self._do(work)

    def fail(self, entry: int, error: str) -> Future[None]:
        """Close an entry without an answer: nothing was paid, and the call may be asked again."""

        def work() -> None:
            _, run, reserved = self._close_entry(entry, state="failed", error=error)
            self._add_spent(run, -reserved)

        return self._do(work)

    def spent(self, run: str) -> int:
        """What counts against a run's budget, in micro-USD: settled costs, and the reservations of what is open or lost."""
        return self._do(lambda: self._spent_by(run)).result()

    def get(self, key: str) -> Record | None:
        """All that is known of one call."""

        def work() -> Record | None:
            row = self._db.execute("SELECT key, provider, model, draw, request FROM calls WHERE key = ?", (key,)).fetchone()
            return Record(Question(*row), self._known(key), tuple(self._entries("key = ?", key))) if row else None

        return self._do(work).result()

    def lost(self, run: str | None = None) -> list[Entry]:
        """The entries that may have been paid for and lost, oldest first; of one run, or of all."""
        return self._do(lambda: self._entries("state = 'lost' AND (?1 IS NULL OR run = ?1)", run)).result()

    def sums(self, by: Literal["run", "teacher"], run: str | None = None) -> list[Sum]:
        """The money by run or by teacher, in order of name; of one run, or of all."""

        def work() -> list[Sum]:
            counted = "CASE state WHEN 'settled' THEN cost_micro_usd WHEN 'failed' THEN 0 ELSE reserved_micro_usd END"
            rows = self._db.execute(
                f"SELECT {by}, sum(state = 'settled'), sum(state = 'open'), sum(state = 'lost'), sum(state = 'failed'), "
                f"coalesce(sum({counted}), 0), sum({counted} IS NULL), coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0) "
                f"FROM entries WHERE ?1 IS NULL OR run = ?1 GROUP BY {by} ORDER BY {by}",
                (run,),
            )
            return [Sum(*row) for row in rows]

        return self._do(work).result()

    def pace(self, provider: str, model: str) -> float | None:
        """Seconds from question to answer, the mean of the model's last 200 answers; None: it has given none."""

        def work() -> float | None:
            row = self._db.execute(
                "SELECT avg(julianday(settled_at) - julianday(opened_at)) * 86400 FROM (SELECT settled_at, opened_at FROM entries "
                "JOIN calls USING (key) WHERE provider = ? AND model = ? AND state = 'settled' ORDER BY id DESC LIMIT 200)",
                (provider, model),
            ).fetchone()
            seconds: float | None = row[0]
            return seconds

        return self._do(work).result()

    # Everything below runs in the writer's thread, inside a transaction.

    def _known(self, key: str) -> Known | None:
        row = self._db.execute("SELECT answer, cost_micro_usd FROM calls WHERE key = ? AND answer IS NOT NULL", (key,)).fetchone()
        return Known(Reply.model_validate_json(row[0]), row[1]) if row else None

    def _entries(self, where: str, value: str | None) -> list[Entry]:
        names = ", ".join(Entry.__dataclass_fields__)
        return [Entry(*row) for row in self._db.execute(f"SELECT {names} FROM entries WHERE {where} ORDER BY id", (value,))]

    def _close_entry(self, entry: int, **values: Any) -> tuple[str, str, int]:
        """Set these columns of an entry; gives its key, its run and what was reserved for it."""
        columns = ", ".join(f"{name} = ?" for name in values)
        row: tuple[str, str, int] = self._db.execute(
            f"UPDATE entries SET {columns}, settled_at = ? WHERE id = ? RETURNING key, run, coalesce(reserved_micro_usd, 0)",
            (*values.values(), _now(), entry),
        ).fetchone()
        return row

    def _spent_by(self, run: str) -> int:
        if run not in self._spent:
            self._spent[run] = self._db.execute(_SPENT, (run,)).fetchone()[0]
        return self._spent[run]

    def _add_spent(self, run: str, micro_usd: int) -> None:
        if run in self._spent:
            self._spent[run] += micro_usd

    def _lose(self, owner: str) -> None:
        self._db.execute("UPDATE entries SET state = 'lost', settled_at = ? WHERE state = 'open' AND owner = ?", (_now(), owner))

    def _bury(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        for (owner,) in self._db.execute("SELECT DISTINCT owner FROM entries WHERE state = 'open'").fetchall():
            if _is_dead(owner):
                self._lose(owner)
        self._db.execute("COMMIT")

    def _do(self, work: Callable[[], T]) -> Future[T]:
        if self._closed:
            raise RuntimeError("the ledger is closed")
        future: Future[T] = Future()
        self._queue.put((work, future))
        return future

    def _work(self) -> None:
        going = True
        while going:
            batch = [self._queue.get()]
            with suppress(queue.Empty):
                while True:
                    batch.append(self._queue.get_nowait())
            going = None not in batch
            # A future that was cancelled before its turn is left out; one that runs can't be cancelled any more.
            jobs = [job for job in batch if job is not None and job[1].set_running_or_notify_cancel()]
            if jobs:
                self._commit(jobs)

    def _commit(self, jobs: list[tuple[Callable[[], Any], Future[Any]]]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            version = self._db.execute("PRAGMA data_version").fetchone()[0]
            if version != self._version:  # another process wrote: what it spent must count
                self._spent.clear()
                self._version = version
            results = [work() for work, _ in jobs]
            self._db.execute("COMMIT")
        except BaseException as error:
            self._spent.clear()
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            if len(jobs) > 1:  # one that can't be done must not take the others with it
                for job in jobs:
                    self._commit([job])
                return
            jobs[0][1].set_exception(_unusable(self.path, error) if isinstance(error, sqlite3.Error) else error)
        else:
            for (_, future), result in zip(jobs, results, strict=True):
                future.set_result(result)


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Bring the file to this version's tables. Several processes may do so at once."""
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreError("this SQLite file is not a ledger of Gristmill", where=str(path), next="Move it away, or choose another folder.")
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreError(
            f"this ledger is of a newer Gristmill (its version is {version}, this one knows {len(MIGRATIONS)})",
            where=str(path),
            next="Install the newer Gristmill. Do not delete the ledger: it holds what was paid for.",
        )
    _use_wal(db)
    db.execute("PRAGMA synchronous = FULL")
    if version < len(MIGRATIONS):
        db.execute("BEGIN IMMEDIATE")
        now: int = db.execute("PRAGMA user_version").fetchone()[0]  # another process may have been faster
        for migration in MIGRATIONS[now:]:
            for statement in migration:
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {max(now, len(MIGRATIONS))}")
        db.execute("COMMIT")


def _use_wal(db: sqlite3.Connection) -> None:
    # SQLite does not wait (busy_timeout or not) when two connections change the mode of a new file at once.
    for attempt in range(200):
        try:
            if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] == "wal":
                return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or attempt == 199:
                raise
        time.sleep(0.05)


def _unusable(path: Path, error: Exception) -> StoreError:
    mendable = isinstance(error, (OSError, sqlite3.OperationalError)) and getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_CORRUPT
    if mendable:
        next = "Make room (or mend the folder's rights) and run the same command."
        return StoreError(f"the ledger can't be used: {error}", where=str(path), next=next)
    return StoreError(f"the ledger is broken: {error}", where=str(path), next="Restore it from a copy, or move it away to start a new one.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _process(pid: int) -> str:
    """host:pid:start. The start tells a process from a later one that was given the same number."""
    return f"{socket.gethostname()}:{pid}:{_started(pid) or ''}"


def _started(pid: int) -> str | None:
    """When a process of this machine began, in the system's own words; None: there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie is dead; field 22 of the file: start in clock ticks since boot
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return None
    words = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return words.stdout.strip().replace(":", ".") or None


def _is_dead(owner: str) -> bool:
    host, pid, started, _ = owner.rsplit(":", 3)
    # Of another machine's processes nothing is known here; what they left open stays reserved, as the lost does.
    return host == socket.gethostname() and _started(int(pid)) != started

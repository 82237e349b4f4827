"""The ledger: every call ever made to a teacher and its answer, so that what was paid for once is never paid for again.

A call's question and its answer stand in `calls`, by key. Each time that it is asked stands in `entries`, which is the money:
entered as open with its worst-case price reserved before it is sent, settled after. An answer that arrives goes to the spool at
once, which survives `kill -9`, then into the database, and only then to whoever asked.

All work goes through one thread, which takes whatever is queued and commits it as one transaction: a commit waits for the disk,
and fifty entries wait no longer than one. A batch is a handful of statements over all of its rows, not a handful a row: they
run outside of Python's lock, so the thread that asks is not held up by the one that writes.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

import orjson

from factory.database import Database, is_url, open_database
from factory.errors import StoreError
from factory.spool import Spool, boot, frames, lives
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
            owner TEXT NOT NULL,         -- which ledger object, of which process, asked
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
    (
        # Keys come in no order, so rows that lie in theirs touch a page each: a table in the order of arrival takes half the time.
        """
        -- SQLite
        CREATE TABLE calls_in_order (
            key TEXT PRIMARY KEY,
            provider TEXT NOT NULL,
            model TEXT NOT NULL,
            draw INTEGER NOT NULL,
            request TEXT NOT NULL,
            answer TEXT,
            cost_micro_usd INTEGER
        )
        """,
        "-- SQLite\nINSERT INTO calls_in_order SELECT * FROM calls",
        "-- SQLite\nDROP TABLE calls",
        "-- SQLite\nALTER TABLE calls_in_order RENAME TO calls",
        "ALTER TABLE entries ADD COLUMN seconds REAL",  # from sending to arrival; opened_at is before the wait for a slot
        "ALTER TABLE entries ADD COLUMN batch TEXT",  # our name of the batch that it was submitted in
        "DROP INDEX entries_by_run",
        "DROP INDEX entries_open",
        "CREATE INDEX entries_by_run ON entries (run)",
        "CREATE INDEX entries_open ON entries (key, owner) WHERE state = 'open'",
        "CREATE INDEX entries_lost ON entries (run) WHERE state = 'lost'",
        "CREATE TABLE budgets (run TEXT PRIMARY KEY, micro_usd INTEGER NOT NULL)",  # what counts against each run's budget, added up
        """
        INSERT INTO budgets
        SELECT run, coalesce(sum(CASE state WHEN 'settled' THEN cost_micro_usd ELSE reserved_micro_usd END), 0)
        FROM entries WHERE state IN ('settled', 'open', 'lost') GROUP BY run
        """,
        """
        CREATE TABLE batches (
            mark TEXT PRIMARY KEY,       -- our name of it, which the provider keeps where it can
            teacher TEXT NOT NULL,
            account TEXT NOT NULL,
            provider_id TEXT,            -- NULL: it was about to be submitted
            calls INTEGER NOT NULL,
            submitted_at TEXT NOT NULL,
            ended_at TEXT,
            owner TEXT NOT NULL
        )
        """,
    ),
)
GATHER_S = 0.002  # how long the first of a batch waits for others: each commit wakes a thread and the disk
SEGMENT_BYTES = 4 << 20  # of a spool's file; then the next is begun
PATIENCE_S = 2.0  # with a database that has not yet seen that a process died
LEDGER_FILE = "ledger.db"  # under the home
LEDGER_VARIABLE = "GRISTMILL_LEDGER"  # the environment's: a PostgreSQL URL, in place of that file

State = Literal["open", "settled", "lost", "failed"]
By = Literal["run", "stage", "teacher", "day"]

# What an entry counts for, in micro-USD.
COUNTED = "CASE state WHEN 'settled' THEN cost_micro_usd WHEN 'failed' THEN 0 ELSE reserved_micro_usd END"


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
        asked: dict[str, Any] = {
            "messages": [{"role": m.role, "content": m.content} for m in call.messages],
            "params": call.params.asked,
        }
        if call.prompt is not None:
            asked["prompt"] = call.prompt
        if call.json_schema is not None:
            asked["json_schema"] = call.json_schema
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


class Elsewhere(NamedTuple):
    """Somebody else asks the same at this moment: another process, or another gateway of this one."""

    owner: str


@dataclass(frozen=True)
class Entry:
    """One time that a call was asked. "lost": it may have been paid for, and its answer never came: its process died, or the
    answer was cut on its way. `seconds`: from sending to arrival."""

    id: int
    key: str
    state: State
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
    seconds: float | None
    batch: str | None


class LeftEntry(NamedTuple):
    """A call of a batch that has no end yet."""

    id: int
    key: str
    call: Call  # as it was sent; its teacher is the batch's


@dataclass(frozen=True)
class LeftBatch:
    """A batch that its process left behind, and what of it has no end yet. `provider_id` None: nobody knows whether it was submitted."""

    mark: str
    account: str
    provider_id: str | None
    calls: int
    submitted_at: datetime
    entries: tuple[LeftEntry, ...]


@dataclass(frozen=True)
class Record:
    """All that the ledger holds of one call: the question, the answer that stands, and every time that it was asked."""

    question: Question
    answer: Known | None
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Sum:
    """The entries of one run, stage, teacher or day, added up. (What a run was answered for nothing leaves no entry.)

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


# What the writer's thread is given to do. `future` gets the result once it is on disk.


class _Enter(NamedTuple):
    question: Question
    place: Place
    reserve: int | None
    budget: int | None
    future: asyncio.Future[Any]


class _Settle(NamedTuple):
    entry: int
    reply: Reply
    row: list[Any]  # id, key, answer, cost, tokens in, tokens out, seconds
    spool: Spool | None
    future: asyncio.Future[Any]


class _Close(NamedTuple):
    entry: int
    state: Literal["failed", "lost"]
    error: str
    future: asyncio.Future[Any] | None  # None: nobody waits


class _Look(NamedTuple):
    keys: Sequence[str]
    future: asyncio.Future[Any]


class _Work(NamedTuple):
    work: Callable[[], Any]
    future: Future[Any]


_Pairs = list[tuple[asyncio.Future[Any], Any]]
_Job = _Enter | _Settle | _Close | _Look | _Work

_SETTLED = "id bigint, key text, answer text, cost bigint, tokens_in bigint, tokens_out bigint, seconds float8"


class Ledger:
    """An open ledger; made by `Ledger.open` or `open_ledger`, closed by `close` or as a context.

    `enter`, `settle`, `fail` and `lose` are for one event loop's thread and give futures of that loop; the rest may be called
    from any other thread and waits. Raises StoreError when the database is broken, of a newer Gristmill, or can't be written.
    """

    def __init__(self, db: Database, spools: Path | None) -> None:
        self.place = db.place
        self._db = db
        self._owner = uuid.uuid4().hex
        self._spool: Spool | None = None  # once something is entered
        self._segments = 0
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._in_flight: set[int] = set()  # entries that were sent and whose end is not committed
        self._buried: list[tuple[str, list[Path]]] = []  # the dead, and their spools: to be removed once what they left is committed
        self._open: dict[int, str] = {}  # our open entries, and their keys
        self._attended: dict[str, object] = {}  # the batches that somebody here looks after, and who
        self._handed: dict[int, tuple[asyncio.AbstractEventLoop, _Pairs]] = {}  # results on their way into a loop
        self._gate, self._closed = threading.Lock(), False
        self._writer: threading.Thread | None = None  # None: opened to be read
        if spools is not None:
            self._spools = spools
            self._writer = threading.Thread(target=self._work, name="ledger", daemon=True)

    @classmethod
    def open(cls, where: Path | str, *, spools: Path | None = None, read_only: bool = False) -> Self:
        """Open the ledger at `where` (a file, made if missing, or a PostgreSQL URL).

        What dead processes had received is settled from their spools (in `spools`; beside a file where that is None), and what
        else they left open is closed. A spool is of use on the machine that wrote it: what another had received and not
        committed when it died is lost to the others, and settled after all when a ledger is opened there again.

        `read_only`: leaves everything as it is, writes nothing, and can't be asked to; StoreError where there is no ledger.
        """
        if spools is None and is_url(where) and not read_only:
            raise ValueError("a ledger in PostgreSQL needs a folder for its spools")
        db = open_database(where, MIGRATIONS, read_only=read_only)
        if read_only:
            return cls(db, None)
        errors: tuple[type[Exception], ...] = (*db.errors, OSError)
        try:
            ledger = cls(db, (spools or Path(f"{where}-spool")) / db.mark)
            db.live(ledger._owner)
            db.begin()
            ledger._bury()
            db.commit()
            ledger._forget_buried()
        except errors as error:
            db.close()
            raise db.fault(error) from error
        except BaseException:
            db.close()
            raise
        assert ledger._writer is not None
        ledger._writer.start()
        return ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is queued and close; calls of ours that nobody settled are lost from here on, or failed if they never left.

        Raises StoreError where that can't be written; the spool stays then, and the next to open the ledger does it.
        """
        last: Future[None] = Future()
        with self._gate:
            if self._closed:
                return
            self._closed = True
            if self._writer is None:
                self._db.close()
                return
            self._queue.put(_Work(self._leave, last))
            self._queue.put(None)
        left = False
        try:
            last.result()
            left = True
        finally:
            self._writer.join()
            if self._spool:
                self._spool.retire(keep=not left)
            self._db.close()

    # For the gateway's loop.

    def enter(
        self, question: Question, place: Place, *, reserve: int | None, budget: int | None
    ) -> asyncio.Future[int | Known | Elsewhere | None]:
        """Enter a call as open and reserve its worst-case price; gives the entry's id once that is on disk.

        Known: it was answered before, and nothing is entered. Elsewhere: somebody else asks just this now. None: `reserve`
        (micro-USD) does not fit into what the run's `budget` (micro-USD; None: no limit) has left.
        """
        future: asyncio.Future[int | Known | Elsewhere | None] = asyncio.get_running_loop().create_future()
        if self._spool is None:
            with suppress(OSError):  # from here on it can be told that nothing has left yet; `sending` says what is wrong
                self._segment()
        self._put(_Enter(question, place, reserve, budget, future))
        return future

    def sending(self, entry: int) -> None:
        """Note, before it is sent, that a call leaves: what is open and never left can't have been paid for.

        Raises StoreError where it can't be noted; then it must not be sent.
        """
        try:
            self._keep(entry)
        except OSError as error:
            next = "Make room (or mend the folder's rights) and run the same command."
            raise StoreError(f"can't write: {error.strerror or error}", where=str(self._spools), next=next) from error
        self._in_flight.add(entry)

    def came_back(self, entry: int) -> None:
        """Note that a call which had left cost nothing, as it was refused: before it leaves again it can't have been paid for."""
        self._in_flight.discard(entry)
        with suppress(OSError):  # then it counts as lost, if its process dies just now
            self._keep(-entry)

    def settle(self, entry: int, reply: Reply, cost: int | None, seconds: float | None = None) -> asyncio.Future[Known]:
        """Keep an answer, what it cost (micro-USD) and how long it took; gives, once that is on disk, the answer that stands.

        When this returns the answer has been written to the spool. Another answer than `reply` stands when somebody else settled
        the same question first: both are paid for, one is used.
        """
        future: asyncio.Future[Known] = asyncio.get_running_loop().create_future()
        answer = reply.model_dump_json(exclude_defaults=True)
        row = [entry, self._open[entry], answer, cost, reply.tokens_in, reply.tokens_out, seconds]
        spool = None
        with suppress(OSError):  # the commit comes next: it does without, or fails for the same cause and says so
            spool = self._keep(row, waits=True)
        self._put(_Settle(entry, reply, row, spool, future))
        return future

    def fail(self, entry: int, error: str) -> asyncio.Future[None]:
        """Close an entry without an answer: nothing was paid, and the call may be asked again."""
        return self._close_entry(entry, "failed", error)

    def lose(self, entry: int, error: str) -> asyncio.Future[None]:
        """Close an entry whose answer was lost on its way: it may be on the bill, so its reservation counts as spent."""
        return self._close_entry(entry, "lost", error)

    def look(self, keys: Sequence[str]) -> asyncio.Future[dict[str, Known]]:
        """The answers that stand for these keys."""
        future: asyncio.Future[dict[str, Known]] = asyncio.get_running_loop().create_future()
        self._put(_Look(keys, future))
        return future

    # Batches. An entry of a batch outlives its process: it stays open until the batch's result is fetched, by whoever adopts it.

    async def mark_batch(self, mark: str, teacher: str, account: str, entries: Sequence[int]) -> None:
        """Note, before it is submitted, that these entries go into one batch; `mark` is our name of it."""
        self._attended[mark] = self

        def work() -> None:
            self._db.change(
                "INSERT INTO batches (mark, teacher, account, calls, submitted_at, owner) VALUES (?, ?, ?, ?, ?, ?)",
                *(mark, teacher, account, len(entries), _now(), self._owner),
            )
            given = f"SELECT id FROM {self._db.rows('id bigint')}"
            self._db.change(f"UPDATE entries SET batch = ? WHERE id IN ({given})", mark, _json([[entry] for entry in entries]))

        await self._in_turn(work)

    async def batch_submitted(self, mark: str, provider_id: str) -> None:
        """Keep the provider's id of a batch, by which it is found again."""
        await self._in_turn(lambda: self._db.change("UPDATE batches SET provider_id = ? WHERE mark = ?", provider_id, mark))

    async def batch_ended(self, mark: str) -> None:
        """Close a batch, all entries of which have their end."""
        await self._in_turn(lambda: self._db.change("UPDATE batches SET ended_at = ? WHERE mark = ?", _now(), mark))
        self._attended.pop(mark, None)

    async def provider_ids(self, account: str) -> set[str]:
        """The providers' ids of this account's batches, as far as they reached us."""
        sql = "SELECT provider_id FROM batches WHERE account = ? AND provider_id IS NOT NULL"
        return {provider_id for (provider_id,) in await self._in_turn(lambda: self._db.execute(sql, account))}

    async def adopt(self, accounts: Sequence[str]) -> list[LeftBatch]:
        """Take over the open batches of these accounts that nobody looks after any more; what arrived of them is settled first."""
        mine = object()
        given = f"SELECT account FROM {self._db.rows('account text')}"

        def work() -> list[LeftBatch]:
            rows = self._db.execute(
                "SELECT mark, teacher, account, provider_id, calls, submitted_at, owner FROM batches "
                f"WHERE ended_at IS NULL AND account IN ({given})",
                _json([[account] for account in accounts]),
            )
            dead = {owner for owner in {row[-1] for row in rows} if self._is_dead(owner)}
            for owner in dead:
                self._bury_one(owner)
            left = []
            for mark, teacher, account, provider_id, calls, submitted_at, owner in rows:
                if owner not in dead and (owner != self._owner or self._attended.get(mark, mine) is not mine):
                    continue
                self._attended[mark] = mine  # this may be done again: the transaction may fail with what stands beside it
                entries = self._take_over(mark, teacher)
                left.append(LeftBatch(mark, account, provider_id, calls, datetime.fromisoformat(submitted_at), entries))
            return left

        return await self._in_turn(work)

    def put_down(self, marks: Iterable[str]) -> None:
        """Look after these batches no longer: they may be adopted."""
        for mark in marks:
            self._attended.pop(mark, None)

    # For everybody else.

    def find(self, key: str) -> Known | None:
        """The answer that stands for a key; None: there is none."""
        return self._read(lambda: self._known([key]).get(key))

    def find_any(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that have an answer, so that asking them costs nothing."""
        wanted = _json([[key] for key in keys])
        sql = f"SELECT key FROM calls WHERE answer IS NOT NULL AND key IN (SELECT key FROM {self._db.rows('key text')})"
        return {row[0] for row in self._read(lambda: self._db.execute(sql, wanted))}

    def spent(self, run: str) -> int:
        """What counts against a run's budget, in micro-USD: settled costs, and the reservations of what is open or lost."""
        return self._read(lambda: self._spent([run])[run])

    def get(self, key: str) -> Record | None:
        """All that is known of one call."""

        def work() -> Record | None:
            rows = self._db.execute("SELECT key, provider, model, draw, request FROM calls WHERE key = ?", key)
            return Record(Question(*rows[0]), self._known([key]).get(key), tuple(self._entries("key = ?", key))) if rows else None

        return self._read(work)

    def lost(self, run: str | None = None) -> list[Entry]:
        """The entries that may have been paid for and lost, oldest first; of one run, or of all."""
        one = ("state = 'lost'",) if run is None else ("state = 'lost' AND run = ?", run)
        return self._read(lambda: self._entries(*one))

    def sums(self, by: By, run: str | None = None) -> list[Sum]:
        """The money by run, stage, teacher or day (UTC), in order of name; of one run, or of all."""
        name = "substr(opened_at, 1, 10)" if by == "day" else by
        where, values = ("", ()) if run is None else ("WHERE run = ?", (run,))
        sql = (
            f"SELECT {name}, {', '.join(_count(state) for state in ('settled', 'open', 'lost', 'failed'))}, "
            f"coalesce(sum({COUNTED}), 0), sum(CASE WHEN {COUNTED} IS NULL THEN 1 ELSE 0 END), "
            f"coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0) FROM entries {where} GROUP BY {name}"
        )
        rows = self._read(lambda: self._db.execute(sql, *values))
        return sorted((Sum(row[0], *map(int, row[1:])) for row in rows), key=lambda row: row.name)

    def pace(self, provider: str, model: str) -> float | None:
        """Seconds from sending to arrival, the mean of the model's last 200 answers; None: it has given none."""
        sql = (
            "SELECT avg(seconds) FROM (SELECT seconds FROM entries JOIN calls ON calls.key = entries.key "
            "WHERE provider = ? AND model = ? AND state = 'settled' AND seconds IS NOT NULL ORDER BY id DESC LIMIT 200) AS last"
        )
        [(seconds,)] = self._read(lambda: self._db.execute(sql, provider, model))
        return None if seconds is None else float(seconds)

    def _close_entry(self, entry: int, state: Literal["failed", "lost"], error: str) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # A server's own words may hold what no database takes: NUL, and halves of characters.
        self._put(_Close(entry, state, error.replace("\0", "\ufffd").encode(errors="replace").decode(), future))
        return future

    def _keep(self, what: Any, *, waits: bool = False) -> Spool:
        """Write to the spool; OSError where that can't be done."""
        spool = self._segment()
        try:
            spool.append(orjson.dumps(what), waits=waits)
        except OSError:
            self._spool = None  # what came next might stand behind half a frame
            spool.retire()
            raise
        return spool

    def _segment(self) -> Spool:
        """The spool's file to write to; the next one once that is large."""
        self._check_open()
        if self._spool is None or self._spool.bytes > SEGMENT_BYTES:
            self._spools.mkdir(parents=True, exist_ok=True)
            first = orjson.dumps([boot(), [*self._in_flight]])
            old, self._spool = self._spool, Spool(self._spools / f"{self._owner}.{self._segments}.spool", first)
            self._segments += 1
            if old:
                old.retire()
        return self._spool

    def _read(self, work: Callable[[], T]) -> T:
        if self._writer is not None:
            future: Future[T] = Future()
            self._put(_Work(work, future))
            return future.result()
        with self._gate:
            if self._closed:
                raise RuntimeError("the ledger is closed")
            try:
                return work()
            except self._db.errors as error:
                raise self._db.fault(error) from error

    async def _in_turn(self, work: Callable[[], T]) -> T:
        future: Future[T] = Future()
        self._put(_Work(work, future))
        return await asyncio.shield(asyncio.wrap_future(future))  # the writer could not answer to one that is cancelled

    def _put(self, job: _Job) -> None:
        with self._gate:  # what comes behind the last would never be done
            self._check_open()
            self._queue.put(job)

    def _check_open(self) -> None:
        if self._closed or self._writer is None:
            raise RuntimeError("the ledger is closed" if self._closed else "the ledger was opened to be read")

    # Everything below runs in the writer's thread, inside a transaction.

    def _work(self) -> None:
        going = True
        while going:
            batch = [self._queue.get()]
            if not isinstance(batch[0], _Work | None):  # a person or a stage waits for those
                time.sleep(GATHER_S)
            with suppress(queue.Empty):
                while True:
                    batch.append(self._queue.get_nowait())
            going = None not in batch
            if jobs := [job for job in batch if job is not None]:
                self._commit(jobs)

    def _commit(self, jobs: Sequence[_Job]) -> None:
        working = False
        try:
            self._db.begin()
            working = True
            results = self._do(jobs)
            working = False
            self._db.commit()
        except BaseException as error:
            self._db.rollback()
            self._buried.clear()
            if working and len(jobs) > 1:  # one that can't be done must not take the others with it
                half = len(jobs) // 2
                self._commit(jobs[:half])
                self._commit(jobs[half:])
                return
            results = [self._db.fault(error) if isinstance(error, self._db.errors) else error] * len(jobs)
        else:
            self._committed(jobs, results)
        self._deliver(jobs, results)

    def _committed(self, jobs: Sequence[_Job], results: Sequence[Any]) -> None:
        """Follow up in memory and among the spools what is on disk now."""
        for job, result in zip(jobs, results, strict=True):
            if isinstance(job, _Enter) and isinstance(result, int):
                self._open[result] = job.question.key
            elif isinstance(job, (_Settle, _Close)):
                self._open.pop(job.entry, None)
                self._in_flight.discard(job.entry)
        for spool, n in Counter(job.spool for job in jobs if isinstance(job, _Settle)).items():
            if spool:
                spool.committed(n)
        self._forget_buried()

    def _deliver(self, jobs: Sequence[_Job], results: Sequence[Any]) -> None:
        """Hand results to whoever waits; to each event loop all of a batch in one step, since waking one is dear."""
        waiting: dict[asyncio.AbstractEventLoop, _Pairs] = defaultdict(list)
        for job, result in zip(jobs, results, strict=True):
            if isinstance(job, _Work):
                (job.future.set_exception if isinstance(result, BaseException) else job.future.set_result)(result)
            elif job.future is not None:
                waiting[job.future.get_loop()].append((job.future, result))
        for loop, pairs in waiting.items():
            number = id(pairs)
            self._handed[number] = (loop, pairs)
            with suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(self._resolve, number)
        for number, (loop, pairs) in [*self._handed.items()]:
            if loop.is_closed() and self._handed.pop(number, None) is not None:  # nobody waits any more
                for _, result in pairs:
                    self._abandon(result)

    def _resolve(self, number: int) -> None:
        _, pairs = self._handed.pop(number)
        for future, result in pairs:
            if future.done():  # its task was cancelled
                self._abandon(result)
            else:
                (future.set_exception if isinstance(result, BaseException) else future.set_result)(result)

    def _abandon(self, result: Any) -> None:
        """Close the entry, where the result that nobody waits for is one: nobody else would, and its key would stay taken."""
        if isinstance(result, int):
            with suppress(RuntimeError):  # closing does the same
                self._put(_Close(result, "failed", "cancelled before it was sent", None))

    def _do(self, jobs: Sequence[_Job]) -> list[Any]:
        """Do one batch; gives a result a job, in their order. What sets money free goes first."""
        settles = [job for job in jobs if isinstance(job, _Settle)]
        closes = [job for job in jobs if isinstance(job, _Close)]
        enters = [job for job in jobs if isinstance(job, _Enter)]
        settled = iter(self._settle_all(settles) if settles else ())
        closed = iter(self._close_all(closes) if closes else ())
        entered = iter(self._enter_all(enters) if enters else ())
        looked = (self._known(job.keys) for job in jobs if isinstance(job, _Look))
        of = {_Settle: settled, _Close: closed, _Enter: entered, _Look: looked}
        return [job.work() if isinstance(job, _Work) else next(of[type(job)]) for job in jobs]

    def _enter_all(self, jobs: Sequence[_Enter]) -> list[int | Known | Elsewhere | None]:
        keys = [job.question.key for job in jobs]
        taken = self._asked_elsewhere(keys)  # first, since it may settle what a dead process had received
        known = self._known(keys)
        spent = self._spent({job.place.run for job in jobs if job.budget is not None})
        [(last,)] = self._db.execute("SELECT coalesce(max(id), 0) FROM entries")
        results: list[int | Known | Elsewhere | None] = []
        calls: list[list[Any]] = []
        entries: list[list[Any]] = []
        added: dict[str, int] = defaultdict(int)
        now = _now()
        for question, place, reserve, budget, future in jobs:
            if future.cancelled():
                results.append(None)
            elif answer := known.get(question.key):
                results.append(answer)
            elif owner := taken.get(question.key):
                results.append(Elsewhere(owner))
            elif budget is not None and reserve and spent[place.run] + added[place.run] + reserve > budget:
                results.append(None)
            else:
                last += 1
                taken[question.key] = self._owner
                added[place.run] += reserve or 0
                calls.append([question.key, question.provider, question.model, question.draw, question.request])
                entries.append([last, question.key, place.run, place.stage, place.round, place.teacher, reserve])
                results.append(last)
        if entries:
            rows = self._db.rows("key text, provider text, model text, draw bigint, request text")
            self._db.change(
                "INSERT INTO calls (key, provider, model, draw, request) "
                f"SELECT key, provider, model, draw, request FROM {rows} WHERE true ON CONFLICT (key) DO NOTHING",
                _json(calls),
            )
            rows = self._db.rows("id bigint, key text, run text, stage text, round bigint, teacher text, reserve bigint")
            self._db.change(
                "INSERT INTO entries (id, key, state, run, stage, round, teacher, owner, opened_at, reserved_micro_usd) "
                f"SELECT id, key, 'open', run, stage, round, teacher, ?, ?, reserve FROM {rows}",
                self._owner,
                now,
                _json(entries),
            )
            self._add_spent(f"SELECT run, sum(coalesce(reserve, 0)) FROM {rows} WHERE true", _json(entries))
        return results

    def _settle_all(self, jobs: Sequence[_Settle]) -> list[Known]:
        if self._settle_rows([job.row for job in jobs]) == len(jobs):
            return [Known(job.reply, job.row[3]) for job in jobs]
        standing = self._known([job.row[1] for job in jobs])
        return [standing[job.row[1]] for job in jobs]

    def _settle_rows(self, rows: Sequence[list[Any]]) -> int:
        """Settle entries that are open or lost; gives how many of these answers stand now."""
        given, table = _json(rows), self._db.rows(_SETTLED)
        these = "entries.id = given.id AND entries.key = given.key AND entries.state IN ('open', 'lost')"
        stand = self._db.change(
            f"UPDATE calls SET answer = given.answer, cost_micro_usd = given.cost FROM {table} "
            "WHERE calls.key = given.key AND calls.answer IS NULL",
            given,
        )
        self._add_spent(
            f"SELECT run, sum(coalesce(given.cost, 0) - coalesce(reserved_micro_usd, 0)) FROM entries JOIN {table} ON {these}", given
        )
        self._db.change(
            "UPDATE entries SET state = 'settled', settled_at = ?, error = NULL, cost_micro_usd = given.cost, "
            f"tokens_in = given.tokens_in, tokens_out = given.tokens_out, seconds = given.seconds FROM {table} WHERE {these}",
            _now(),
            given,
        )
        return stand

    def _close_all(self, jobs: Sequence[_Close]) -> list[None]:
        self._close_rows([[job.entry, job.state, job.error] for job in jobs])
        return [None] * len(jobs)

    def _close_rows(self, rows: Sequence[list[Any]]) -> None:
        given, table = _json(rows), self._db.rows("id bigint, state text, error text")
        these = "entries.id = given.id AND entries.state = 'open'"
        self._add_spent(
            f"SELECT run, -sum(coalesce(reserved_micro_usd, 0)) FROM entries JOIN {table} ON {these} WHERE given.state = 'failed'", given
        )
        self._db.change(
            f"UPDATE entries SET state = given.state, error = given.error, settled_at = ? FROM {table} WHERE {these}", _now(), given
        )

    def _known(self, keys: Sequence[str]) -> dict[str, Known]:
        rows = self._db.execute(
            "SELECT key, answer, cost_micro_usd FROM calls "
            f"WHERE answer IS NOT NULL AND key IN (SELECT key FROM {self._db.rows('key text')})",
            _json([[key] for key in keys]),
        )
        return {key: Known(Reply.model_validate_json(answer), cost) for key, answer, cost in rows}

    def _asked_elsewhere(self, keys: Sequence[str]) -> dict[str, str]:
        """Which of the keys are open, and by whom; what the dead among them left is put in order first. A batch outlives its owner."""
        rows = self._db.execute(
            f"SELECT key, owner, batch FROM entries WHERE state = 'open' AND key IN (SELECT key FROM {self._db.rows('key text')})",
            _json([[key] for key in keys]),
        )
        dead = {owner for owner in {owner for _, owner, _ in rows} if self._is_dead(owner)}
        for owner in dead:
            self._bury_one(owner)
        return {key: owner for key, owner, batch in rows if owner not in dead or batch is not None}

    def _take_over(self, mark: str, teacher: str) -> tuple[LeftEntry, ...]:
        """Make a batch ours; gives its open entries."""
        self._db.change("UPDATE batches SET owner = ? WHERE mark = ?", self._owner, mark)
        self._db.change("UPDATE entries SET owner = ? WHERE state = 'open' AND batch = ?", self._owner, mark)
        rows = self._db.execute(
            "SELECT id, entries.key, request FROM entries JOIN calls ON calls.key = entries.key WHERE state = 'open' AND batch = ?", mark
        )
        self._open |= {entry: key for entry, key, _ in rows}
        return tuple(LeftEntry(entry, key, Call(teacher=teacher, **orjson.loads(request))) for entry, key, request in rows)

    def _entries(self, where: str, *values: str) -> list[Entry]:
        names = ", ".join(Entry.__dataclass_fields__)
        return [Entry(*row) for row in self._db.execute(f"SELECT {names} FROM entries WHERE {where} ORDER BY id", *values)]

    def _spent(self, runs: Iterable[str]) -> dict[str, int]:
        rows = self._db.execute(
            f"SELECT run, micro_usd FROM budgets WHERE run IN (SELECT run FROM {self._db.rows('run text')})", _json([[run] for run in runs])
        )
        return dict.fromkeys(runs, 0) | {run: int(micro_usd) for run, micro_usd in rows}

    def _add_spent(self, added: str, given: str) -> None:
        """Count towards the budgets what a SELECT of run and micro-USD adds up to, a run."""
        self._db.change(
            f"INSERT INTO budgets (run, micro_usd) {added} GROUP BY run "
            "ON CONFLICT (run) DO UPDATE SET micro_usd = budgets.micro_usd + excluded.micro_usd",
            given,
        )

    # What processes leave behind.

    def _bury(self) -> None:
        """Put in order what dead processes left: their spools are settled, the rest of what they had open is closed."""
        owners = {owner for (owner,) in self._db.execute("SELECT DISTINCT owner FROM entries WHERE state = 'open'")}
        owners |= {path.name.split(".")[0] for path in self._spools.glob("*.spool")} | self._db.owners()
        for owner in owners:
            if self._is_dead(owner, PATIENCE_S):
                self._bury_one(owner)

    def _bury_one(self, owner: str) -> None:
        """Settle what had arrived; what had been sent is lost, and what never left has failed. After a crash of the machine nobody
        knows what left: all is lost then, as it is where the spool lies on another machine."""
        paths = sorted(self._spools.glob(f"{owner}.*.spool"), key=lambda path: int(path.name.split(".")[1]))
        arrived: list[list[Any]] = []
        sent: set[int] = set()
        told = bool(paths)
        for path in paths:
            (booted, in_flight), *rest = [*map(orjson.loads, frames(path))] or [["", []]]
            told &= booted == boot() != ""
            sent = set(in_flight)
            for item in rest:
                if isinstance(item, list):
                    arrived.append(item)
                elif item > 0:
                    sent.add(item)
                else:
                    sent.discard(-item)
        for first in range(0, len(arrived), 500):
            self._settle_rows(arrived[first : first + 500])
        if told:
            self._close_left(owner, "failed", "its process ended before it was sent", sent)
        self._lose(owner)
        self._buried.append((owner, paths))

    def _leave(self) -> None:
        self._close_left(self._owner, "failed", "the run ended before it was sent", self._in_flight)
        self._lose(self._owner)

    def _lose(self, owner: str) -> None:
        self._close_left(owner, "lost", "its process ended before the answer came")

    def _close_left(self, owner: str, state: Literal["failed", "lost"], error: str, but: Iterable[int] = ()) -> None:
        rows = self._db.execute("SELECT id FROM entries WHERE state = 'open' AND batch IS NULL AND owner = ?", owner)
        left = {entry for (entry,) in rows}.difference(but)
        if left:
            self._close_rows([[entry, state, error] for entry in left])

    def _is_dead(self, owner: str, patience_s: float = 0) -> bool:
        """Whether an owner has ended; `patience_s`: a server takes a moment to see that, where its spool here tells it at once."""
        if owner == self._owner:
            return False
        dead = self._db.is_dead(owner)
        if not dead and not patience_s:
            return False
        spools = [*self._spools.glob(f"{owner}.*.spool")]
        if any(map(lives, spools)):
            return False  # even one that lost its connection: what it has in flight may yet come
        until = time.monotonic() + patience_s
        while spools and not dead and time.monotonic() < until:
            time.sleep(0.01)
            dead = self._db.is_dead(owner)
        return dead

    def _forget_buried(self) -> None:
        for owner, paths in self._buried:
            with suppress(OSError):  # buried once more, it changes nothing
                for path in paths:
                    path.unlink(missing_ok=True)
                self._db.forget(owner)
        self._buried.clear()


def ledger_place(home: Path) -> Path | str:
    """Where the ledger lies: the PostgreSQL URL in $GRISTMILL_LEDGER, or a file under the home. StoreError: it is no such URL."""
    url = os.environ.get(LEDGER_VARIABLE)
    if not url:
        return home / LEDGER_FILE
    if not is_url(url) or not _parses(url):
        raise StoreError(f"{LEDGER_VARIABLE} is not the URL of a PostgreSQL database", next="It begins with postgresql://; or unset it.")
    return url


def _parses(url: str) -> bool:
    try:
        return bool(urlsplit(url).scheme)
    except ValueError:
        return False


def open_ledger(home: Path, *, read_only: bool = False) -> Ledger:
    """Open the ledger of everything under `home`, as `Ledger.open` does; see `ledger_place` for where it lies."""
    place = ledger_place(home)
    return Ledger.open(place, spools=home / "spool" if isinstance(place, str) else None, read_only=read_only)


def _json(rows: Sequence[Any]) -> str:
    return orjson.dumps(rows).decode()


def _count(state: State) -> str:
    return f"sum(CASE state WHEN '{state}' THEN 1 ELSE 0 END)"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

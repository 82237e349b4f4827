"""The gateway: the one door to every teacher, so that money, rate limits, retries and concurrency are dealt with in one place.

A stage asks from its own thread; the asking itself happens in one asyncio loop in a thread of the gateway's. No stage ever
sees a socket, a coroutine or a retry.
"""

from __future__ import annotations

import asyncio
import math
import queue
import random
import threading
from collections.abc import Coroutine, Generator, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from factory.errors import BudgetSpent, RunError, TeacherDown, TeacherFault
from factory.ledger import Known, Ledger, Place, Question
from factory.teacher import Connection, Price, Teacher
from schemas.call import Answer, Call, Params, Reply
from schemas.canonical import canonical_json

READ_AHEAD = 8  # calls that wait for a slot, so that none is idle while the caller thinks
BACKOFF_S, BACKOFF_CAP_S = 0.5, 60.0
DOWN_AFTER = 8  # calls in a row that no retry could help: the server is down, not the calls
GRACE_S = 60.0  # how long `close` waits for answers that are under way: they are paid for

# Strict upper bounds, because a budget is never overshot: a token is at least one byte of UTF-8, and what a server writes
# around a conversation (its template, a default system prompt, the rules of a forced tool) stays below these.
TOKENS_A_CALL, TOKENS_A_MESSAGE, TOKENS_A_SCHEMA = 64, 16, 1024
BYTES_A_TOKEN = 4  # of English, for what is typical


@dataclass(frozen=True)
class Estimate:
    """What one call may cost, before it is asked: the strict upper bound, and what is typical. Money is None when unknown."""

    tokens_in_worst: int
    tokens_out_worst: int
    tokens_in: int
    tokens_out: int
    worst_micro_usd: int | None
    micro_usd: int | None


def estimate(call: Call, teacher: Teacher) -> Estimate:
    """What `call` may cost with this teacher; the gateway reserves the worst, a plan shows both."""
    schema_bytes = len(canonical_json(call.json_schema).encode()) if call.json_schema else 0
    size = sum(len(m.content.encode()) for m in call.messages) + len((call.prompt or "").encode()) + schema_bytes
    around = TOKENS_A_CALL + TOKENS_A_MESSAGE * len(call.messages) + (TOKENS_A_SCHEMA if call.json_schema else 0)
    worst = size + around, filled(call, teacher).params.max_tokens
    typical = math.ceil(size / BYTES_A_TOKEN) + 4 * len(call.messages), math.ceil(worst[1] / 2)
    price = teacher.known_price()
    return Estimate(*worst, *typical, _cost(price, *worst), _cost(price, *typical))


def filled(call: Call, teacher: Teacher) -> Call:
    """The call as it is sent: the teacher's params, and the call's own where it sets them (`extra` key by key)."""
    ours, theirs = call.params, teacher.params
    merged = {name: getattr(theirs, name) for name in theirs.model_fields_set}
    merged |= {name: getattr(ours, name) for name in ours.model_fields_set}
    merged["extra"] = {**theirs.extra, **ours.extra}
    return call.model_copy(update={"params": Params.model_validate(merged)})


def _cost(price: Price | None, tokens_in: int, tokens_out: int) -> int | None:
    if price is None:
        return None
    # Dollars a million tokens are micro-dollars a token. Decimal, since 100 * 0.07 in floats rounds up to 8.
    cost = Decimal(str(price.input_usd_per_mtok)) * tokens_in + Decimal(str(price.output_usd_per_mtok)) * tokens_out
    return math.ceil(cost)


@dataclass(frozen=True)
class Tally:
    """What was asked since the gateway opened. `answered` holds what the ledger answered; tokens and money hold only what is new."""

    asked: int = 0
    answered: int = 0
    from_ledger: int = 0
    failed: int = 0
    in_flight: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    micro_usd: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Snapshot(Tally):
    """The tally of all teachers together, and of each."""

    teachers: Mapping[str, Tally] = field(default_factory=dict)


@dataclass
class _Line:
    """The gateway's line to one teacher: its slots, its connection once there is one, and how it goes."""

    name: str
    teacher: Teacher
    slots: asyncio.Semaphore
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    connection: Connection | None = None
    identity: tuple[str, str] | None = None
    failed_in_row: int = 0
    tally: Tally = Tally()

    def count(self, **more: int) -> None:
        self.tally += Tally(**more)


@dataclass(eq=False)
class _Asking:
    """One `ask` under way: where its answers go, and whether it has stopped sending new calls."""

    stage: str
    round: int
    done: queue.SimpleQueue[Answer | BaseException | None] = field(default_factory=queue.SimpleQueue)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)


class _Dropped(Exception):
    """A call that is not sent (any more), because its ask has stopped."""


class Gateway:
    """Asks teachers on behalf of one run; a context. `budget_micro_usd` None: no limit. `home`: for the teachers' log files."""

    def __init__(self, teachers: Mapping[str, Teacher], ledger: Ledger, *, home: Path, run: str, budget_micro_usd: int | None) -> None:
        self._ledger, self._home, self._run, self._budget = ledger, home, run, budget_micro_usd
        self._lines = {name: _Line(name, t, asyncio.Semaphore(t.concurrency)) for name, t in teachers.items()}
        self._window = sum(t.concurrency for t in teachers.values()) + READ_AHEAD
        self._under_way: dict[str, asyncio.Event] = {}  # keys that are being asked
        self._askings: set[_Asking] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._spending = 0  # calls that hold a reservation or are about to
        self._change = asyncio.Event()  # set, and replaced, each time that a reservation ends
        self._connections = AsyncExitStack()
        self._gate, self._closing = threading.Lock(), False

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let answers that are under way arrive and be kept, then close every connection. A second interrupt ends the wait."""
        with self._gate:
            self._closing = True
        try:
            self._wait_for(self._drain(GRACE_S))
        finally:
            self._wait_for(self._drain(0))
            self._wait_for(self._connections.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def ask(self, calls: Iterable[Call], *, stage: str, round: int) -> Generator[Answer, None, None]:
        """Yield an answer for every call, as they complete; calls are pulled, in the caller's thread, as slots become free.

        An answer without a reply carries its error. Raises BudgetSpent when the next call does not fit and none is in flight,
        TeacherDown when a teacher answers nobody; what had been answered is yielded before. Closing the iterator early drops
        what was not sent; what was sent is still settled.
        """
        asking, source = _Asking(stage, round), iter(calls)
        waiting = dropped = 0
        fault: BaseException | None = None
        self._askings.add(asking)
        try:
            while True:
                while waiting < self._window and not (fault or dropped) and (call := next(source, None)) is not None:
                    self._send(call, self._lines[call.teacher], asking)
                    waiting += 1
                if not waiting:
                    break
                done = asking.done.get()
                waiting -= 1
                if isinstance(done, Answer):
                    yield done
                elif done is None:
                    dropped += 1
                else:
                    fault = fault or done
            if dropped and fault is None:
                fault = RunError("the run was stopped while it asked", where=f"stage {stage}", next="Run the same command: it goes on.")
            if fault is not None:
                raise fault
        finally:
            self._askings.discard(asking)
            with suppress(RuntimeError):  # the loop is closed: the gateway was left before this iterator
                self._loop.call_soon_threadsafe(asking.stopped.set)

    def snapshot(self) -> Snapshot:
        """The totals so far, for a live view; from any thread."""
        teachers = {name: line.tally for name, line in self._lines.items()}
        total = sum(teachers.values(), Tally())
        return Snapshot(**{name: getattr(total, name) for name in Tally.__dataclass_fields__}, teachers=teachers)

    def _send(self, call: Call, line: _Line, asking: _Asking) -> None:
        with self._gate:  # what passes it is in the loop before `close` begins to wait
            if self._closing:
                asking.done.put(None)
            else:
                self._loop.call_soon_threadsafe(self._start, call, line, asking)

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # Everything below runs in the loop's thread, and so needs no locks.

    async def _drain(self, grace_s: float) -> None:
        for asking in self._askings:
            asking.stopped.set()
        if self._tasks and grace_s:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in self._tasks:
            task.cancel()  # its entry stays open; the ledger calls it lost
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, call: Call, line: _Line, asking: _Asking) -> None:
        line.count(asked=1)
        task = self._loop.create_task(self._finish(call, line, asking))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, call: Call, line: _Line, asking: _Asking) -> None:
        try:
            answer = await self._answer(call, line, asking)
        except _Dropped:
            line.count(asked=-1)
            asking.done.put(None)
        except asyncio.CancelledError:
            asking.done.put(None)
            raise
        except BaseException as error:  # the caller must hear of every end, or it waits for ever
            asking.stopped.set()
            asking.done.put(error)
        else:
            line.count(answered=answer.reply is not None, failed=answer.reply is None)
            asking.done.put(answer)

    async def _answer(self, call: Call, line: _Line, asking: _Asking) -> Answer:
        sent = filled(call, line.teacher)
        question = Question.of(sent, await self._identity(line))
        while (other := self._under_way.get(question.key)) is not None:
            await other.wait()
        self._under_way[question.key] = mine = asyncio.Event()
        try:
            known = await asyncio.wrap_future(self._ledger.find(question.key))
            if known is not None:
                line.count(from_ledger=1)
                return Answer(call=call, key=question.key, reply=known.reply, fresh=False, micro_usd=known.micro_usd)
            async with line.slots:
                return await self._buy(call, sent, question, line, asking)
        finally:
            del self._under_way[question.key]
            mine.set()

    async def _identity(self, line: _Line) -> tuple[str, str]:
        async with line.opening:
            if line.identity is None:
                line.identity = await asyncio.to_thread(line.teacher.identity)  # may read gigabytes of weights
            return line.identity

    async def _buy(self, call: Call, sent: Call, question: Question, line: _Line, asking: _Asking) -> Answer:
        """Reserve, ask, settle; in that order, each on disk before the next."""
        connection = await self._connect(line, asking)
        entry = await self._reserve(question, sent, line, asking)
        try:
            known = await self._settle(entry, sent, line, asking, connection)
        except TeacherFault as fault:
            await asyncio.wrap_future(self._ledger.fail(entry, str(fault)))
            return self._unanswered(call, question.key, fault, line, asking)
        except _Dropped:
            await asyncio.wrap_future(self._ledger.fail(entry, "not asked again: the run was stopping"))
            raise
        finally:
            self._release()
        return Answer(call=call, key=question.key, reply=known.reply, micro_usd=known.micro_usd)

    async def _connect(self, line: _Line, asking: _Asking) -> Connection:
        async with line.opening:
            if asking.stopped.is_set():
                raise _Dropped
            if line.connection is None:
                try:
                    line.connection = await self._connections.enter_async_context(line.teacher.connect(self._home))
                except TeacherFault as fault:
                    raise self._down(line, asking, f"teacher {line.name!r} can't be used: {fault}", "Mend that") from fault
            return line.connection

    async def _reserve(self, question: Question, sent: Call, line: _Line, asking: _Asking) -> int:
        """An entry of the ledger that holds the call's worst price. Waits while it does not fit and others may yet give change."""
        worst = estimate(sent, line.teacher).worst_micro_usd
        if worst is None and self._budget is not None:
            raise RunError(
                f"the price of teacher {line.name!r} is unknown, so the budget can't be kept",
                where=f"stage {asking.stage}",
                next="Give the teacher a price in the recipe, or remove budget_usd.",
            )
        place = Place(self._run, asking.stage, asking.round, line.name)
        while not asking.stopped.is_set():
            change = self._change
            self._spending += 1
            try:
                entry = await asyncio.wrap_future(self._ledger.enter(question, place, reserve=worst, budget=self._budget))
            except BaseException:
                self._release()
                raise
            if entry is not None:
                return entry
            self._spending -= 1
            if not self._spending and not change.is_set():
                self._give_change()  # those that wait come to the same end
                raise self._budget_spent(asking, worst or 0)
            await change.wait()
        raise _Dropped

    def _release(self) -> None:
        self._spending -= 1
        self._give_change()

    def _give_change(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def _settle(self, entry: int, sent: Call, line: _Line, asking: _Asking, connection: Connection) -> Known:
        line.count(in_flight=1)
        try:
            reply = await self._try(sent, line, asking, connection)
        finally:
            line.count(in_flight=-1)
        line.failed_in_row = 0
        cost = _cost(line.teacher.known_price(), reply.tokens_in, reply.tokens_out)
        line.count(tokens_in=reply.tokens_in, tokens_out=reply.tokens_out, micro_usd=cost or 0)
        return await asyncio.wrap_future(self._ledger.settle(entry, reply, cost))

    async def _try(self, sent: Call, line: _Line, asking: _Asking, connection: Connection) -> Reply:
        retries = pauses = 0
        while True:
            try:
                return await connection.ask(sent, sent.params)
            except TeacherFault as fault:
                retries += fault.kind == "again"
                if fault.kind in ("never", "stop") or retries > line.teacher.retries:
                    raise
                pauses += 1
                # Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
                pause_s = random.uniform(0, min(BACKOFF_CAP_S, BACKOFF_S * 2 ** min(pauses, 20)))
                # The server's wish is the least; the jitter on top keeps all from coming back at the same moment.
                pause_s += fault.retry_after_s or 0
            with suppress(TimeoutError):
                await asyncio.wait_for(asking.stopped.wait(), pause_s)
            if asking.stopped.is_set():
                raise _Dropped

    def _unanswered(self, call: Call, key: str, fault: TeacherFault, line: _Line, asking: _Asking) -> Answer:
        if fault.kind == "stop":
            raise self._down(line, asking, f"teacher {line.name!r} refuses every call: {fault}", "Mend that") from fault
        line.failed_in_row = line.failed_in_row + 1 if fault.kind == "again" else 0
        if line.failed_in_row >= DOWN_AFTER:
            what = f"{line.failed_in_row} calls in a row to teacher {line.name!r} failed: {fault}"
            raise self._down(line, asking, what, "Start its server (or wait until it is well)") from fault
        return Answer(call=call, key=key, reply=None, error=str(fault), micro_usd=0)

    def _down(self, line: _Line, asking: _Asking, what: str, mend: str) -> TeacherDown:
        kept = self.snapshot().answered
        next = f"{mend} and run the same command: it goes on where it stopped."
        return TeacherDown(f"{what}. {kept:,} answers are kept.", where=f"stage {asking.stage}", next=next)

    def _budget_spent(self, asking: _Asking, worst: int) -> BudgetSpent:
        budget, spent = (self._budget or 0) / 1e6, self._ledger.spent(self._run) / 1e6
        return BudgetSpent(
            f"the budget of ${budget:.2f} is spent: ${spent:.4f} are used, and the next call may cost ${worst / 1e6:.4f}",
            where=f"stage {asking.stage}",
            next="Raise budget_usd in the recipe and run the same command: it goes on where it stopped.",
        )

"""The gateway: the one door to every teacher, so that money, rate limits, retries and concurrency are dealt with in one place.

A stage asks from its own thread; the asking itself happens in one event loop in a thread of the gateway's. No stage ever sees a
socket, a coroutine or a retry.
"""

from __future__ import annotations

import asyncio
import math
import queue
import random
import threading
from collections import Counter, deque
from collections.abc import Coroutine, Generator, Iterable, Mapping, Sequence
from concurrent.futures import wait
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, Self

import uvloop

from factory.batch import BATCHES_AHEAD, Batcher
from factory.errors import BudgetSpent, RunError, TeacherDown, TeacherFault
from factory.ledger import Known, Ledger, Place, Question
from factory.line import Away, Dropped, Line, Request, Turn, describe
from factory.pace import Pace
from factory.prices import cost, worst_cost
from factory.progress import dollars
from factory.structured import Fit, correction, fit
from factory.teacher import Heard, Teacher
from schemas.call import Answer, Call, Params, Reply
from schemas.canonical import canonical_json

READ_AHEAD = 8  # calls that are entered and wait for a slot of their teacher, besides as many as it has slots
MOST_WAITING = 4096  # calls of one ask that wait while another teacher than theirs is idle
BACKOFF_S, BACKOFF_CAP_S = 0.5, 60.0
NOT_OF_SCHEMA = "not of the schema"  # how the error of such an answer begins
UNKNOWN = "not in the ledger"  # the error of a call that was not asked because only known answers were wanted
AGAIN_DRAW = 1 << 40  # from one draw of a question to that which is asked in its stead; far beyond what stages number
LONG_TEXT = 10_000  # characters
ELSEWHERE_S = 0.2  # between two looks for an answer that another process is getting
GRACE_S = 5.0  # how much longer than a teacher's timeout `close` waits for answers that are under way: they are paid for

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


def estimate(call: Call, teacher: Teacher, *, batch: bool | None = None) -> Estimate:
    """What `call` may cost with this teacher; the gateway reserves the worst, a plan shows both.

    `batch`: asked in a batch, or not; None: as the teacher's `mode` says.
    """
    batching = teacher.batching()
    batch = (batching is not None and batching.on) if batch is None else batch
    worst = _worst_tokens(filled(call, teacher))
    typical = math.ceil(_bytes(call) / BYTES_A_TOKEN) + 4 * len(call.messages), math.ceil(worst[1] / 2)
    money = [worst_cost(teacher.known_price(tokens[0]), *tokens, batch=batch) for tokens in (worst, typical)]
    return Estimate(*worst, *typical, *money)


def _worst_tokens(sent: Call) -> tuple[int, int]:
    around = TOKENS_A_CALL + TOKENS_A_MESSAGE * len(sent.messages) + (TOKENS_A_SCHEMA if sent.json_schema else 0)
    return _bytes(sent) + around, sent.params.max_tokens


def _bytes(call: Call) -> int:
    schema = len(canonical_json(call.json_schema).encode()) if call.json_schema else 0
    return sum(len(m.content.encode()) for m in call.messages) + len((call.prompt or "").encode()) + schema


def filled(call: Call, teacher: Teacher) -> Call:
    """The call as it is sent: the teacher's params, and the call's own where it sets them (`extra` key by key)."""
    ours, theirs = call.params, teacher.params
    merged = {name: getattr(theirs, name) for name in theirs.model_fields_set}
    merged |= {name: getattr(ours, name) for name in ours.model_fields_set}
    merged["extra"] = {**theirs.extra, **ours.extra}
    return call.model_copy(update={"params": Params.model_validate(merged)})


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
    """The tally of all teachers together, and of each, and how fast each is asked."""

    teachers: Mapping[str, Tally] = field(default_factory=dict)
    paces: Mapping[str, str] = field(default_factory=dict)


class _Desk:
    """What the gateway keeps of one teacher: its line, its identity once it is known, and its numbers."""

    def __init__(self, line: Line, teacher: Teacher) -> None:
        self.line, self.teacher, self.name = line, teacher, line.name
        self.identity: tuple[str, str] | None = None
        self.identifying = asyncio.Lock()
        self.counts = dict.fromkeys(Tally.__dataclass_fields__, 0)
        self.batcher: Batcher | None = None  # of a teacher that can be asked in batches, also while it is asked live
        batching = teacher.batching()
        self.batch = batching is not None and batching.on
        self.window = BATCHES_AHEAD * batching.size if batching and batching.on else READ_AHEAD + 2 * line.slots
        self.ahead = asyncio.Semaphore(self.window)  # calls that may be entered at once
        self._filled: dict[int, tuple[Params, Params]] = {}

    def count(self, **more: int) -> None:
        for name, n in more.items():
            self.counts[name] += n

    def describe(self) -> str:
        """How fast it is asked, or how far its batches are."""
        return self.batcher.describe() if self.batch and self.batcher else describe(self.line.ways)

    def bought(self, reply: Reply, price: int | None) -> None:
        self.count(tokens_in=reply.tokens_in, tokens_out=reply.tokens_out, micro_usd=price or 0)

    def sent(self, call: Call) -> Call:
        """`filled`, remembered by the params object: a stage gives one to all of its calls."""
        known = self._filled.get(id(call.params))
        if known is None:
            if len(self._filled) > 1000:
                self._filled.clear()
            params = filled(call, self.teacher).params
            known = self._filled[id(call.params)] = (call.params, call.params if params == call.params else params)
        return call if known[1] is call.params else call.model_copy(update={"params": known[1]})


@dataclass(eq=False)
class _Asking:
    """One `ask` under way: where its answers go, and whether it has stopped sending new calls."""

    stage: str
    round: int
    done: queue.SimpleQueue[tuple[str, Answer | BaseException | None]] = field(default_factory=queue.SimpleQueue)  # of whom, and what
    stopped: asyncio.Event = field(default_factory=asyncio.Event)


class Gateway:
    """Asks teachers on behalf of one run; a context. `budget_micro_usd` None: no limit. `home`: for the teachers' log files.

    `retry_failed`: a question of which the ledger holds only answers that fit no schema is asked once more. `known_only`: nothing
    is asked; what the ledger does not hold comes back without a reply, with the error UNKNOWN.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        ledger: Ledger,
        *,
        home: Path,
        run: str,
        budget_micro_usd: int | None,
        retry_failed: bool = False,
        known_only: bool = False,
    ) -> None:
        self._teachers, self._ledger, self._home, self._run, self._budget = teachers, ledger, home, run, budget_micro_usd
        self._retry_failed, self._known_only = retry_failed, known_only
        self._desks: dict[str, _Desk] = {}
        self._inbox: deque[tuple[Call, _Asking]] = deque()
        self._inbox_seen = True
        self._under_way: dict[str, asyncio.Event] = {}  # keys that are being asked
        self._left: dict[str, asyncio.Event] = {}  # those of them that are in a batch which an earlier run left
        self._adopted_at = 0.0
        self._askings: set[_Asking] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._spending = 0  # calls that hold a reservation or are about to
        self._change = asyncio.Event()  # set, and replaced, each time that a reservation ends
        self._connections = AsyncExitStack()
        self._gate, self._closing = threading.Lock(), False

    def __enter__(self) -> Self:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)
        self._thread.start()
        self._wait_for(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let answers that are under way arrive and be kept, then close every connection. A second interrupt ends the wait."""
        with self._gate:
            self._closing = True
        try:
            self._wait_for(self._drain(GRACE_S + max((teacher.timeout_s for teacher in self._teachers.values()), default=0)))
        finally:
            self._wait_for(self._drain(0))
            self._wait_for(self._close_batches())
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
        waiting: Counter[str] = Counter()  # calls by teacher
        dropped = 0
        fault: BaseException | None = None
        self._askings.add(asking)
        try:
            while True:
                while not (fault or dropped) and self._wants(waiting) and (call := next(source, None)) is not None:
                    self._send(call, asking)
                    waiting[call.teacher] += 1
                if not waiting.total():
                    break
                teacher, done = asking.done.get()
                waiting[teacher] -= 1
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
                self._loop.call_soon_threadsafe(self._stop, asking)

    def snapshot(self) -> Snapshot:
        """The totals so far, for a live view; from any thread."""
        teachers = {name: Tally(**desk.counts) for name, desk in self._desks.items()}
        total = sum(teachers.values(), Tally())
        paces = {name: desk.describe() for name, desk in self._desks.items()}
        return Snapshot(**{name: getattr(total, name) for name in Tally.__dataclass_fields__}, teachers=teachers, paces=paces)

    def _wants(self, waiting: Counter[str]) -> bool:
        """Whether an ask should bring more calls: while any teacher has room, since the next call may be for it."""
        if waiting.total() >= max([MOST_WAITING, *(desk.window for desk in self._desks.values())]):
            return False
        return any(waiting[name] < desk.window for name, desk in self._desks.items())

    def _send(self, call: Call, asking: _Asking) -> None:
        if call.teacher not in self._teachers:
            raise KeyError(call.teacher)
        with self._gate:  # what passes it is in the loop before `close` begins to wait
            if self._closing:
                asking.done.put((call.teacher, None))
                return
            self._inbox.append((call, asking))
            if self._inbox_seen:  # waking the loop is dear, and it takes all that is there
                self._inbox_seen = False
                self._loop.call_soon_threadsafe(self._take)

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while not future.done():
            wait([future], 0.2)  # a wait without a limit is not interrupted by a second ctrl-C
        future.result()

    # Everything below runs in the loop's thread, and so needs no locks.

    async def _open(self) -> None:
        paces: dict[str, Pace] = {}
        for name, teacher in self._teachers.items():
            desk = self._desks[name] = _Desk(Line(name, teacher, paces, self._freed), teacher)
            if batching := teacher.batching():
                ways = self._ledger, self._home, self._connections
                desk.batcher = Batcher(name, teacher, batching, *ways, desk.bought, self._batch_closed)
        if not self._known_only:
            await self._adopt()

    async def _adopt(self) -> None:
        """Look after the batches that an ended process, or an earlier gateway, left behind."""
        batchers = {desk.batcher.account: desk.batcher for desk in self._desks.values() if desk.batcher}
        if not batchers:
            return
        self._adopted_at = self._loop.time()
        for left in await self._ledger.adopt([*batchers]):
            for entry in left.entries:
                self._spending += 1
                if entry.key not in self._under_way:
                    self._left[entry.key] = self._under_way[entry.key] = asyncio.Event()
            batchers[left.account].attach(left)

    def _batch_closed(self, key: str) -> None:
        self._release()
        self._let_go(key)

    def _let_go(self, key: str) -> None:
        if event := self._left.pop(key, None):
            del self._under_way[key]
            event.set()

    async def _close_batches(self) -> None:
        await asyncio.gather(*(desk.batcher.close() for desk in self._desks.values() if desk.batcher))

    def _freed(self, line: Line, pace: Pace) -> None:
        """Let the other lines of this pace send: in a circle, the one behind this line first, so that none waits for all of another."""
        lines = [desk.line for desk in self._desks.values()]
        if len(lines) == 1:
            return
        place = lines.index(line)
        for other in lines[place + 1 :] + lines[:place]:
            if any(way.pace is pace for way in other.ways):
                other.pump()

    def _stop(self, asking: _Asking) -> None:
        asking.stopped.set()
        self._give_change()  # what waits for money is to see that it need not
        for desk in self._desks.values():
            desk.line.drop(asking)
            if desk.batcher:
                desk.batcher.drop(asking)

    async def _drain(self, grace_s: float) -> None:
        self._take()
        for asking in tuple(self._askings):
            self._stop(asking)
        for key in [*self._left]:
            self._let_go(key)
        for desk in self._desks.values():
            desk.line.give_up_opening()
        if self._tasks and grace_s:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in self._tasks:
            task.cancel()  # its entry stays open; the ledger calls it lost
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _take(self) -> None:
        self._inbox_seen = True
        while self._inbox:
            call, asking = self._inbox.popleft()
            self._desks[call.teacher].counts["asked"] += 1
            task = self._loop.create_task(self._finish(call, asking))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _finish(self, call: Call, asking: _Asking) -> None:
        desk = self._desks[call.teacher]
        try:
            answer = await self._answer(call, desk, asking)
        except Dropped:
            desk.counts["asked"] -= 1
            asking.done.put((call.teacher, None))
        except asyncio.CancelledError:
            asking.done.put((call.teacher, None))
            raise
        except BaseException as error:  # the caller must hear of every end, or it waits for ever
            self._stop(asking)
            asking.done.put((call.teacher, error))
        else:
            desk.counts["failed" if answer.reply is None else "answered"] += 1
            asking.done.put((call.teacher, answer))

    async def _answer(self, call: Call, desk: _Desk, asking: _Asking) -> Answer:
        """Ask. An answer that fits no schema stands in the ledger for ever, so what is asked again is another draw of the question."""
        answer = await self._fitting_answer(call, desk, asking)
        for draw in count(call.draw + AGAIN_DRAW, AGAIN_DRAW):
            if answer.fresh or not (answer.error or "").startswith(NOT_OF_SCHEMA):
                break
            another = call.model_copy(update={"draw": draw})
            if not self._retry_failed and not await self._is_known(another, desk):
                break
            answer = _joined(answer, await self._fitting_answer(another, desk, asking))
        return answer

    async def _fitting_answer(self, call: Call, desk: _Desk, asking: _Asking) -> Answer:
        """Ask; where the answer should fit a schema and does not, ask once more with what is wrong."""
        answer = await self._ask_some(call, desk, asking)
        if call.json_schema is None or answer.reply is None or answer.reply.finish == "refused":
            return answer
        schema, reply = call.json_schema, answer.reply
        fitting = await _fitting(reply, schema)
        if fitting.problem and (again := correction(call, reply.text, fitting.problem)):
            answer = _joined(answer, await self._ask_some(again, desk, asking))
            if answer.reply is None:
                return answer
            reply = answer.reply
            fitting = await _fitting(reply, schema)
        if fitting.text is None:
            return answer.model_copy(update={"reply": None, "error": f"{NOT_OF_SCHEMA}: {fitting.problem}"})
        return answer.model_copy(update={"reply": reply.model_copy(update={"text": fitting.text})})

    async def _ask_some(self, call: Call, desk: _Desk, asking: _Asking) -> Answer:
        """Ask the call's teacher, or the one that stands in for it while it is down."""
        stands_in = self._desks[desk.teacher.fallback] if desk.teacher.fallback else None
        if self._known_only:
            desks = [desk, stands_in] if stands_in else [desk]
            return await self._answered_by(call, desks) or _answered(call, await self._question(call, desk), None, desk, error=UNKNOWN)
        if stands_in is not None and (known := await self._answered_by(call, [desk, stands_in])):
            return known  # what the one that stood in has answered before is paid for
        try:
            return await self._ask_one(call, desk, asking)
        except Away as away:
            if stands_in is None:
                raise self._down(desk, asking, away) from away
        try:
            return await self._ask_one(call, stands_in, asking)
        except Away as away:
            raise self._down(stands_in, asking, away) from away

    async def _answered_by(self, call: Call, desks: Sequence[_Desk]) -> Answer | None:
        """The answer that the ledger holds from the first of these teachers that has given one."""
        questions = [await self._question(call, desk) for desk in desks]
        known = await self._ledger.look([question.key for question in questions])
        for question, desk in zip(questions, desks, strict=True):
            if answer := known.get(question.key):
                desk.counts["from_ledger"] += 1
                return _answered(call, question, answer, desk)
        return None

    async def _is_known(self, call: Call, desk: _Desk) -> bool:
        return bool(await self._ledger.look([(await self._question(call, desk)).key]))

    async def _question(self, call: Call, desk: _Desk) -> Question:
        return Question.of(desk.sent(call), await self._identity(desk))

    async def _ask_one(self, call: Call, desk: _Desk, asking: _Asking) -> Answer:
        sent = desk.sent(call)
        question = Question.of(sent, desk.identity or await self._identity(desk))
        while (other := self._under_way.get(question.key)) is not None:
            await other.wait()
        self._under_way[question.key] = mine = asyncio.Event()
        try:
            async with desk.ahead:
                entered = await self._enter(question, sent, desk, asking)
                if isinstance(entered, int):
                    buy = self._buy_in_batch if desk.batch else self._buy
                    return await buy(call, sent, question, entered, desk, asking)
            desk.counts["from_ledger"] += 1
            return _answered(call, question, entered, desk)
        finally:
            del self._under_way[question.key]
            mine.set()

    async def _identity(self, desk: _Desk) -> tuple[str, str]:
        if desk.identity is None:
            async with desk.identifying:
                if desk.identity is None:
                    desk.identity = await asyncio.to_thread(desk.teacher.identity)  # may read gigabytes of weights
        return desk.identity

    async def _enter(self, question: Question, sent: Call, desk: _Desk, asking: _Asking) -> int | Known:
        """An entry of the ledger that holds the call's worst price; or the answer, where there is one.

        Waits while another process asks the same, and while the price does not fit and others may yet give change.
        """
        tokens = _worst_tokens(sent)
        worst = worst_cost(desk.teacher.known_price(tokens[0]), *tokens, batch=desk.batch)
        if worst is None and self._budget is not None:
            raise RunError(
                f"the price of teacher {desk.name!r} is unknown, so the budget can't be kept",
                where=f"stage {asking.stage}",
                next="Give the teacher a price in the recipe, or remove budget_usd.",
            )
        place = Place(self._run, asking.stage, asking.round, desk.name)
        while not asking.stopped.is_set():
            change = self._change
            self._spending += 1
            try:
                entered = await self._ledger.enter(question, place, reserve=worst, budget=self._budget)
            except BaseException:
                self._release()
                raise
            if isinstance(entered, int):
                return entered
            if entered is not None:
                self._release()  # others may have waited to see whether this one spends
                if isinstance(entered, Known):
                    return entered
                await self._elsewhere(desk, asking)
                continue
            self._spending -= 1
            if not self._spending and not change.is_set():
                self._give_change()  # those that wait come to the same end
                raise self._budget_spent(asking, worst or 0)
            await change.wait()
        raise Dropped

    async def _elsewhere(self, desk: _Desk, asking: _Asking) -> None:
        """Somebody else asks the same: wait a little; should they die over a batch, it becomes ours."""
        batcher = desk.batcher
        if batcher is None:
            await _pause(asking, ELSEWHERE_S)
            return
        if batcher.fault:
            raise Away(batcher.fault)
        if self._loop.time() - self._adopted_at > ELSEWHERE_S:
            await self._adopt()
        await _pause(asking, batcher.batching.poll_s if desk.batch else ELSEWHERE_S)

    def _release(self) -> Literal[False]:
        """A reservation has ended; gives False, for the variable that says whether one is held."""
        self._spending -= 1
        self._give_change()
        return False

    def _give_change(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def _buy(self, call: Call, sent: Call, question: Question, entry: int, desk: _Desk, asking: _Asking) -> Answer:
        """Ask until there is an answer, or no more sense in asking; every end of an entry is on disk before what follows."""
        held, retries, again = True, 0, False
        settled: asyncio.Future[Known] | None = None

        async def send(turn: Turn) -> Heard:
            nonlocal settled
            heard = await self._ask_at(turn, entry, sent, desk)
            settled = self._settle(entry, heard.reply, self._loop.time() - turn.began, desk)
            return heard

        request = Request(_tokens(sent), send)
        try:
            while True:
                try:
                    if asking.stopped.is_set():
                        raise Dropped
                    await desk.line.ask(asking, request, first=again)
                except TeacherFault as fault:
                    again = True
                    # While the circuit is open a fault says nothing of the call; only what may be paid for is not tried for ever.
                    retries += fault.kind == "again" and (fault.paid or request.turn is None or request.turn.way.down_since is None)
                    final = fault.kind == "never" or retries > desk.teacher.retries
                    if fault.paid or final:
                        await (self._ledger.lose if fault.paid else self._ledger.fail)(entry, str(fault))
                        held = self._release()
                    if final:
                        return _answered(call, question, None, desk, error=str(fault))
                    if held:
                        self._ledger.came_back(entry)
                    await _back_off(asking, fault, retries)
                    if not held:  # the answer was lost on its way, and to ask again is to pay again
                        entered = await self._enter(question, sent, desk, asking)
                        if isinstance(entered, Known):
                            return _answered(call, question, entered, desk)
                        entry, held = entered, True
                else:
                    assert settled is not None
                    return _answered(call, question, await settled, desk, fresh=True)
        except (Away, Dropped):
            if held:
                await self._ledger.fail(entry, "not asked, or not again: the run was stopping, or its teacher was down")
            raise
        finally:
            if held:
                self._release()

    async def _buy_in_batch(self, call: Call, sent: Call, question: Question, entry: int, desk: _Desk, asking: _Asking) -> Answer:
        """As `_buy`, by batches: the batcher closes every entry, and tells of it, so that nothing is held here."""
        assert desk.batcher is not None
        retries = 0
        while True:
            desk.counts["in_flight"] += 1
            try:
                return _answered(call, question, await desk.batcher.ask(entry, question, sent, asking), desk, fresh=True)
            except TeacherFault as fault:
                if fault.kind == "stop":
                    raise Away(fault) from fault
                retries += fault.kind == "again"
                if fault.kind == "never" or retries > desk.teacher.retries:
                    return _answered(call, question, None, desk, error=str(fault))
                if fault.kind == "later":
                    await _pause(asking, desk.batcher.batching.poll_s)
            finally:
                desk.counts["in_flight"] -= 1
            entered = await self._enter(question, sent, desk, asking)
            if isinstance(entered, Known):
                return _answered(call, question, entered, desk)
            entry = entered

    async def _ask_at(self, turn: Turn, entry: int, sent: Call, desk: _Desk) -> Heard:
        """Ask once, at the way of this turn."""
        desk.counts["in_flight"] += 1
        try:
            connection = await desk.line.connected(turn.way, self._home, self._connections)
            self._ledger.sending(entry)
            return await connection.ask(sent, sent.params)
        finally:
            desk.counts["in_flight"] -= 1

    def _settle(self, entry: int, reply: Reply, seconds: float, desk: _Desk) -> asyncio.Future[Known]:
        """Keep an answer: it is in the spool when this returns, before anything else is sent or done."""
        price = cost(desk.teacher.known_price(reply.tokens_in), reply)
        desk.bought(reply, price)
        return self._ledger.settle(entry, reply, price, seconds)

    def _down(self, desk: _Desk, asking: _Asking, away: Away) -> TeacherDown:
        fault, name = away.fault, desk.name
        what, mend = f"teacher {name!r} refuses every call: {fault}", "Mend that"
        if fault.kind != "stop":
            faults = max(way.faults for way in desk.line.ways)
            what = f"{faults} calls in a row to teacher {name!r} failed: {fault}"
            mend = "Start its server (or wait until it is well)"
        kept = self.snapshot().answered
        next = f"{mend} and run the same command: it goes on where it stopped."
        return TeacherDown(f"{what}. {kept:,} answers are kept.", where=f"stage {asking.stage}", next=next)

    def _budget_spent(self, asking: _Asking, worst: int) -> BudgetSpent:
        budget, spent = dollars(self._budget), dollars(self._ledger.spent(self._run))
        return BudgetSpent(
            f"the next call may cost {dollars(worst)}, and of the budget of {budget} {spent} are used",
            where=f"stage {asking.stage}",
            next="Raise budget_usd in the recipe and run the same command: it goes on where it stopped.",
        )


async def _fitting(reply: Reply, schema: Mapping[str, Any]) -> Fit:
    cut = reply.finish == "length"
    if len(reply.text) < LONG_TEXT:
        return fit(reply.text, schema, cut=cut)
    return await asyncio.to_thread(fit, reply.text, schema, cut=cut)  # a long one that is broken takes a third of a second


async def _back_off(asking: _Asking, fault: TeacherFault, retries: int) -> None:
    """Wait before a passing fault is retried; a rate limit is waited for in the line. Raises Dropped once the asking stops."""
    if fault.kind == "again":
        # Full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
        pause_s = random.uniform(0, min(BACKOFF_CAP_S, BACKOFF_S * 2 ** min(retries, 20)))
        await _pause(asking, pause_s + (fault.retry_after_s or 0))
    if asking.stopped.is_set():
        raise Dropped from fault


async def _pause(asking: _Asking, seconds: float) -> None:
    """Sleep, but not on when the asking stops."""
    with suppress(TimeoutError):
        await asyncio.wait_for(asking.stopped.wait(), seconds)


def _tokens(sent: Call) -> int:
    """What a server counts a request as when it admits it: its question, at four bytes a token, and the most that it may answer."""
    size = sum(len(m.content) for m in sent.messages) + len(sent.prompt or "")
    return size // BYTES_A_TOKEN + sent.params.max_tokens


def _answered(call: Call, question: Question, known: Known | None, desk: _Desk, *, error: str | None = None, fresh: bool = False) -> Answer:
    # Without validation: all parts are, and this is done for each of millions.
    reply, micro_usd = (known.reply, known.micro_usd) if known else (None, 0)
    return Answer.model_construct(
        call=call, key=question.key, reply=reply, error=error, fresh=fresh or reply is None, micro_usd=micro_usd, teacher=desk.name
    )


def _joined(first: Answer, second: Answer) -> Answer:
    """The second answer, with the money of both, for the first one's call."""
    money = None if None in (first.micro_usd, second.micro_usd) else (first.micro_usd or 0) + (second.micro_usd or 0)
    return second.model_copy(update={"call": first.call, "micro_usd": money, "fresh": first.fresh or second.fresh})

"""Batch mode: collects calls, submits them together, and fetches their answers hours later, whatever happened in between.

The order is what keeps anything from being paid for twice: a batch's mark is on disk before it is submitted, the provider's id
as soon as it is known. Whoever finds a batch that a process left behind looks for it by its id, or else by its mark.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Hashable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from factory.errors import TeacherFault
from factory.ledger import Known, Ledger, LeftBatch, Question
from factory.line import Dropped
from factory.prices import cost
from factory.teacher import BatchConnection, Batching, BatchItem, BatchStatus, Teacher
from schemas.call import Call, Reply

T = TypeVar("T")

QUIET_S = 0.5  # nothing new came for so long: what is collected is submitted
MOST_BYTES = 90 << 20  # of the questions of one batch; OpenAI takes files of 200 MB, Anthropic 256 MB, and escapes make them longer
SUBMITTING_S = 5.0  # how long `close` waits for a submission that is under way
PAUSE_S, PAUSE_CAP_S = 0.5, 300.0  # after a fault of the provider
TOGETHER = 500  # results that are settled at once
BATCHES_AHEAD = 3  # that one teacher's calls are pulled for, since each may take a day
WITHIN_H = 24.0  # both providers' promise


@dataclass(eq=False)
class _Waiting:
    """One call on its way through a batch. Nobody waits for the `end` of one that was adopted."""

    entry: int
    key: str
    call: Call
    item: BatchItem | None = None
    asker: Hashable = None
    end: asyncio.Future[Known] | None = None

    def finish(self, end: Known | Exception) -> None:
        if self.end is None or self.end.done():
            return
        if isinstance(end, Exception):
            self.end.set_exception(end)
        else:
            self.end.set_result(end)


@dataclass(eq=False)
class _Batch:
    mark: str
    calls: int
    open: dict[str, _Waiting]  # by custom_id
    marked_at: datetime
    provider_id: str | None = None
    adopted: bool = False
    status: BatchStatus | None = None


@dataclass
class _Heap:
    """What is collected for the next batch, by entry."""

    waiting: dict[int, _Waiting] = field(default_factory=dict)
    bytes: int = 0
    timer: asyncio.TimerHandle | None = None


class Batcher:
    """The batches of one teacher's account, in the gateway's loop.

    `bought` is told of each reply and its price (micro-USD; None: unknown), `closed` the key of each entry that has its end, so
    that its reservation is no longer held. `fault` is why the provider can't be asked, once that is so.
    """

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        batching: Batching,
        ledger: Ledger,
        home: Path,
        connections: AsyncExitStack,
        bought: Callable[[Reply, int | None], None],
        closed: Callable[[str], None],
    ) -> None:
        self.name, self.teacher, self.batching = name, teacher, batching
        self.account = "/".join(teacher.identity())
        self.fault: TeacherFault | None = None
        self._ledger, self._home, self._connections = ledger, home, connections
        self._bought, self._closed = bought, closed
        self._connection: BatchConnection | None = None
        self._opening = asyncio.Lock()
        self._heaps = {False: _Heap(), True: _Heap()}  # chats, and raw prompts: they have addresses of their own
        self._batches: dict[str, _Batch] = {}
        self._submitting: set[_Batch] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, entry: int, question: Question, call: Call, asker: Hashable) -> Known:
        """Have an entered call answered in the next batch.

        Raises TeacherFault once the entry is closed without an answer, and Dropped when its asker is dropped: what was
        submitted stays open then and is settled when it comes. The fault "stop" may leave the entry open, in its batch.
        """
        waiting = _Waiting(entry, question.key, call, None, asker, asyncio.get_running_loop().create_future())
        try:
            waiting.item = BatchItem(str(entry), call, (await self._connected()).body(call))
        except TeacherFault as fault:
            await self._end(waiting, fault)
            raise
        heap = self._heaps[call.prompt is not None]
        size = len(question.request.encode()) + 1024
        if heap.bytes + size > MOST_BYTES:
            self._submit(heap)
        heap.waiting[entry] = waiting
        heap.bytes += size
        if heap.timer is not None:
            heap.timer.cancel()
            heap.timer = None
        if len(heap.waiting) >= self.batching.size:
            self._submit(heap)
        else:
            heap.timer = asyncio.get_running_loop().call_later(QUIET_S, self._submit, heap)
        assert waiting.end is not None
        try:
            return await waiting.end
        except Dropped:
            if heap.waiting.pop(entry, None) is not None:
                await self._end(waiting, TeacherFault("again", "the run was stopped before it was submitted"))
            raise

    def drop(self, asker: Hashable) -> None:
        """Let this asker wait no longer."""
        there = [*(w for heap in self._heaps.values() for w in heap.waiting.values())]
        there += [w for batch in self._batches.values() for w in batch.open.values()]
        for waiting in there:
            if waiting.asker is asker:
                waiting.finish(Dropped())

    def attach(self, left: LeftBatch) -> None:
        """Look after a batch that another process, or an earlier gateway, left behind."""
        entries = {_custom_id(left.mark, entry.id): _Waiting(entry.id, entry.key, entry.call) for entry in left.entries}
        self._begin(_Batch(left.mark, left.calls, entries, left.submitted_at, left.provider_id, adopted=True))

    def describe(self) -> str:
        """What is waited for, in a few words."""
        collected = sum(len(heap.waiting) for heap in self._heaps.values())
        words = [f"{collected:,} collected for a batch"] if collected else []
        for batch in [*self._batches.values()]:
            if batch.provider_id is None:
                words.append(f"looking for batch {batch.mark}" if batch.adopted else f"submitting a batch of {batch.calls:,}")
            else:
                done, total = batch.status[1:3] if batch.status else (0, 0)
                words.append(f"batch {batch.provider_id}: {done:,} of {total or batch.calls:,} done")
        return "; ".join(words) or "no batch under way"

    async def close(self) -> None:
        """Stop looking after batches, which whoever comes next attaches again; a submission that is under way gets a moment."""
        for heap in self._heaps.values():
            if heap.timer is not None:
                heap.timer.cancel()
        until = asyncio.get_running_loop().time() + SUBMITTING_S
        while self._submitting and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._ledger.put_down(self._batches)

    def _submit(self, heap: _Heap) -> None:
        if heap.timer is not None:
            heap.timer.cancel()
        collected, heap.waiting, heap.bytes, heap.timer = [*heap.waiting.values()], {}, 0, None
        if not collected:
            return
        mark = uuid.uuid4().hex[:16]
        named: dict[str, _Waiting] = {}
        for waiting in collected:
            assert waiting.item is not None
            waiting.item = waiting.item._replace(custom_id=_custom_id(mark, waiting.entry))
            named[waiting.item.custom_id] = waiting
        batch = _Batch(mark, len(named), named, datetime.now(UTC))
        self._submitting.add(batch)
        self._begin(batch)

    def _begin(self, batch: _Batch) -> None:
        self._batches[batch.mark] = batch
        task = asyncio.get_running_loop().create_task(self._carry(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, batch: _Batch) -> None:
        """See one batch through to its end."""
        try:
            if not batch.adopted:
                await self._send(batch)
            elif batch.provider_id is None:
                await self._look_for(batch)
            if batch.provider_id is not None:
                await self._fetch(batch)
            await self._ledger.batch_ended(batch.mark)
            del self._batches[batch.mark]
        except TeacherFault as fault:  # "stop": the batch stays as it is, for when that is mended
            self.fault = fault
            self._give_up(batch, fault)
        except Exception as error:
            self._give_up(batch, error)
        finally:
            self._submitting.discard(batch)

    def _give_up(self, batch: _Batch, error: Exception) -> None:
        for waiting in batch.open.values():
            self._closed(waiting.key)
            waiting.finish(error)

    async def _send(self, batch: _Batch) -> None:
        items = [waiting.item for waiting in batch.open.values() if waiting.item is not None]
        await self._ledger.mark_batch(batch.mark, self.name, self.account, [waiting.entry for waiting in batch.open.values()])
        connection = await self._connected()
        faults = 0
        while batch.provider_id is None:
            try:
                batch.provider_id = await connection.submit(batch.mark, items)
            except TeacherFault as fault:
                if fault.kind in ("never", "stop"):  # a refusal: there is no such batch
                    await self._end_all(batch, fault)
                    return
                faults += 1
                await _pause(faults, fault)
                batch.provider_id = await self._found(batch)  # it may have got there all the same
                if batch.provider_id is None and faults > self.teacher.retries:
                    await self._end_all(batch, TeacherFault(fault.kind, str(fault)))
                    return
        await self._ledger.batch_submitted(batch.mark, batch.provider_id)
        self._submitting.discard(batch)

    async def _look_for(self, batch: _Batch) -> None:
        batch.provider_id = await self._found(batch)
        if batch.provider_id is None:
            await self._end_all(batch, TeacherFault("again", "its process ended before it was submitted"))
        else:
            await self._ledger.batch_submitted(batch.mark, batch.provider_id)

    async def _found(self, batch: _Batch) -> str | None:
        known = await self._ledger.provider_ids(self.account)
        connection = await self._connected()
        while True:
            trace = await self._patiently(lambda: connection.find(batch.mark, batch.calls, batch.marked_at, known))
            if not trace.unsure:
                return trace.provider_id
            self._submitting.discard(batch)  # this may take hours, and can be done by whoever comes next
            await asyncio.sleep(self.batching.poll_s)

    async def _fetch(self, batch: _Batch) -> None:
        """Wait for the end of a batch that was submitted, and close every entry of it."""
        assert batch.provider_id is not None
        provider_id, connection = batch.provider_id, await self._connected()
        while True:
            batch.status = await self._patiently(lambda: connection.status(provider_id))
            if batch.status is None:
                fault = TeacherFault("again", f"the provider knows no batch {provider_id} any more", paid=True)
                await self._end_all(batch, fault)
                return
            if batch.status.ended:
                break
            await asyncio.sleep(self.batching.poll_s)
        if batch.status.refused:
            await self._end_all(batch, batch.status.refused)
            return
        await self._patiently(lambda: self._read(batch, provider_id, connection))
        await self._end_all(batch, TeacherFault("again", "the batch ended without a word of it", paid=True))

    async def _read(self, batch: _Batch, provider_id: str, connection: BatchConnection) -> None:
        calls = {custom_id: waiting.call for custom_id, waiting in batch.open.items()}
        ends: list[tuple[str, Reply | TeacherFault]] = []
        async for custom_id, end in connection.results(provider_id, calls):
            ends.append((custom_id, end))
            if len(ends) >= TOGETHER:
                await self._end_these(batch, ends)
                ends = []
        await self._end_these(batch, ends)

    async def _end_all(self, batch: _Batch, fault: TeacherFault) -> None:
        await self._end_these(batch, [(custom_id, fault) for custom_id in batch.open])

    async def _end_these(self, batch: _Batch, ends: Iterable[tuple[str, Reply | TeacherFault]]) -> None:
        there = [(waiting, end) for custom_id, end in ends if (waiting := batch.open.pop(custom_id, None))]
        for waiting, known in zip((w for w, _ in there), await asyncio.gather(*(self._end(*each) for each in there)), strict=True):
            waiting.finish(known)

    async def _end(self, waiting: _Waiting, end: Reply | TeacherFault) -> Known | TeacherFault:
        """Close an entry: what it gives is on disk."""
        known: Known | TeacherFault
        if isinstance(end, Reply):
            price = cost(self.teacher.known_price(end.tokens_in), end, batch=True)
            self._bought(end, price)
            known = await self._ledger.settle(waiting.entry, end, price)
        else:
            await (self._ledger.lose if end.paid else self._ledger.fail)(waiting.entry, str(end))
            known = end
        self._closed(waiting.key)
        return known

    async def _patiently(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do it again until the provider answers; one that never does is a fault of the kind "stop"."""
        faults = 0
        while True:
            try:
                return await work()
            except TeacherFault as fault:
                faults += 1
                if fault.kind in ("never", "stop") or faults > self.teacher.retries:
                    raise TeacherFault("stop", str(fault)) from fault
                await _pause(faults, fault)

    async def _connected(self) -> BatchConnection:
        async with self._opening:
            if self._connection is None:
                self._connection = await self._connections.enter_async_context(self.batching.connect(self._home))
        return self._connection


def _custom_id(mark: str, entry: int) -> str:
    return f"{mark}-{entry}"


async def _pause(faults: int, fault: TeacherFault) -> None:
    await asyncio.sleep(max(fault.retry_after_s or 0, min(PAUSE_S * 2 ** min(faults, 20), PAUSE_CAP_S)))

"""The line to one teacher: whose turn it is, at which of its ports, and what follows when a port fails.

Everything here runs in the gateway's loop. A request is carried by a task that, once its answer is there, sends the next in the
same step. Were the next to wait until the loop comes round, all that arrived together would be sent together, arrive together
again, and each would wait for the others every time.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Hashable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from factory.errors import TeacherFault
from factory.pace import Pace, Sent
from factory.teacher import Connection, Heard, Port, Teacher

CIRCUIT_AFTER = 8  # faults in a row, or twice as many as there are requests in flight if that is more, that open a port's circuit
PROBE_S, PROBE_CAP_S = 0.5, 30.0  # the pause before the first probe of an open circuit, and the longest
PATIENCE_S, PATIENCE_NEW_S = 120.0, 5.0  # how long a port may be down: one that has answered, one that never has
BUSY_PATIENCE_S = 900.0  # how long a port may refuse everything for its rate limits, before that is told to a person


class Away(Exception):
    """No port of a teacher can be asked now: it is down for good, or a fallback had better be asked meanwhile."""

    def __init__(self, fault: TeacherFault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Dropped(Exception):
    """A call that is not sent (any more), because its ask has stopped."""


@dataclass(eq=False)
class Way:
    """A port at work: its connection once there is one, the pace of its account, and its circuit."""

    port: Port
    pace: Pace
    connection: Connection | None = None
    opening: asyncio.Task[Connection] | None = None
    answered: bool = False
    faults: int = 0  # in a row
    down_since: float | None = None  # the circuit is open since then
    probe_at: float = 0.0
    probing: bool = False
    probes_failed: int = 0
    refused_since: float | None = None
    dead: TeacherFault | None = None

    def wait_s(self, tokens: int, now: float) -> float:
        """Seconds until a request of so many tokens may be sent here; inf: not before something else happens."""
        if self.dead or self.probing:
            return float("inf")
        wait_s: float = self.pace.wait_s(tokens, now)
        return wait_s if self.down_since is None else max(wait_s, self.probe_at - now)

    def well(self) -> None:
        """An answer came: the circuit closes."""
        self.answered, self.refused_since = True, None
        self._close_circuit()

    def busy(self, fault: TeacherFault, now: float) -> None:
        """It answers, if only to say that there are too many requests; after a long time of nothing else it is given up."""
        if self.down_since is not None:
            self._close_circuit()
        self.probing = False
        self.refused_since = now if self.refused_since is None else self.refused_since
        if max(now - self.refused_since, fault.retry_after_s or 0) > BUSY_PATIENCE_S:
            self.dead = fault

    def ill(self, fault: TeacherFault, now: float) -> None:
        """A fault of the kind "again" or "stop": count it, open the circuit, or give the port up."""
        self.faults += 1
        if fault.kind == "stop":
            self.dead = fault
        elif self.down_since is not None:
            if self.probing:
                self.probes_failed += 1
                self._pause(now)
            if now - self.down_since > (PATIENCE_S if self.answered else PATIENCE_NEW_S):
                self.dead = fault
        elif self.faults >= max(CIRCUIT_AFTER, 2 * self.pace.in_flight):
            self.down_since = now
            self._pause(now)
        self.probing = False

    def _close_circuit(self) -> None:
        self.faults, self.down_since, self.probing, self.probes_failed = 0, None, False, 0

    def _pause(self, now: float) -> None:
        # Jitter, so that many processes do not come back at the same moment.
        self.probe_at = now + min(PROBE_S * 2**self.probes_failed, PROBE_CAP_S) * random.uniform(0.5, 1)


class Turn(NamedTuple):
    """Leave to send one request: where, and the mark of it that the pace keeps."""

    way: Way
    sent: Sent
    began: float


@dataclass(eq=False)
class Request:
    """One request of so many tokens: `send` sends it when its turn has come. It may be asked again once it has failed."""

    tokens: int
    send: Callable[[Turn], Coroutine[Any, Any, Heard]]
    turn: Turn | None = None  # the last that it was given
    carrier: asyncio.Task[None] | None = None  # while it is under way


_Waiting = deque[tuple[Request, asyncio.Future[Heard]]]


class Line:
    """The ways to one teacher, and those who wait for a turn: every asker is served in turn, each in its own order.

    `paces` are kept by account, so that two teachers of one account share one; `freed` is called, with this line and a pace, when
    that has room again, and pumps the other lines of that pace.
    """

    def __init__(self, name: str, teacher: Teacher, paces: dict[str, Pace], freed: Callable[[Line, Pace], None]) -> None:
        self.name, self.teacher = name, teacher
        self.ways = [Way(port, paces.setdefault(port.account, Pace(teacher.limits, teacher.concurrency))) for port in teacher.ports()]
        self._freed = freed
        self._waiting: OrderedDict[Hashable, _Waiting] = OrderedDict()
        self._carriers: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._last_fault: TeacherFault | None = None

    @property
    def slots(self) -> int:
        """The most requests that may be in flight."""
        return self.teacher.concurrency * len(self.ways)

    async def ask(self, asker: Hashable, request: Request, *, first: bool = False) -> Heard:
        """Send a request when its turn comes; `first`: it was refused before, and is served before the asker's others.

        Raises what `request.send` raises, Away, and Dropped once the asker is dropped.
        """
        if away := self._away(self._loop.time()):
            raise away
        heard: asyncio.Future[Heard] = self._loop.create_future()
        queue = self._waiting.setdefault(asker, deque())
        (queue.appendleft if first else queue.append)((request, heard))
        self.pump()
        try:
            return await heard
        except asyncio.CancelledError:
            if request.carrier is not None:
                request.carrier.cancel()
                await asyncio.wait([request.carrier])
            raise

    def drop(self, asker: Hashable) -> None:
        """Give nothing more to this asker."""
        for _, heard in self._waiting.pop(asker, ()):
            if not heard.done():
                heard.set_exception(Dropped())

    def pump(self) -> None:
        """Send requests for as long as there are both a way and somebody who waits."""
        while granted := self._grant():
            carrier = self._loop.create_task(self._carry(*granted))
            granted[0].carrier = carrier
            self._carriers.add(carrier)
            carrier.add_done_callback(self._carriers.discard)

    def _grant(self) -> tuple[Request, asyncio.Future[Heard]] | None:
        """Give the next one its turn; None: nobody waits, or there is no way now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            now = self._loop.time()
            asker, queue = next(iter(self._waiting.items()))
            while queue and queue[0][1].done():
                queue.popleft()  # cancelled
            if not queue:
                del self._waiting[asker]
                continue
            if away := self._away(now):
                self._turn_away(away)
                return None
            request, heard = queue[0]
            tokens = request.tokens
            wait_s, _, way = min(((way.wait_s(tokens, now), way.pace.in_flight, way) for way in self.ways), key=lambda each: each[:2])
            if wait_s > 0:
                if wait_s != float("inf"):
                    self._timer = self._loop.call_later(wait_s, self.pump)
                return None
            queue.popleft()
            self._waiting.move_to_end(asker)
            way.probing = way.down_since is not None
            request.turn = Turn(way, way.pace.send(tokens, now), now)
            return request, heard
        return None

    async def _carry(self, request: Request, heard: asyncio.Future[Heard]) -> None:
        """Send a request, and then whatever is next, for as long as there is a way."""
        carrier = request.carrier
        granted: tuple[Request, asyncio.Future[Heard]] | None = (request, heard)
        while granted is not None:
            request, heard = granted
            request.carrier, turn = carrier, request.turn
            assert turn is not None
            how: Heard | TeacherFault | None = None
            try:
                how = await request.send(turn)
            except asyncio.CancelledError:
                self._ended(turn, None)
                self._freed(self, turn.way.pace)
                self.pump()
                raise
            except BaseException as error:
                how = error if isinstance(error, TeacherFault) else None
                if not heard.done():
                    heard.set_exception(error)
            else:
                if not heard.done():
                    heard.set_result(how)
            request.carrier = None
            self._ended(turn, how)
            self._freed(self, turn.way.pace)
            if granted := self._grant():
                self.pump()  # there may be room for more than one

    async def connected(self, way: Way, home: Path, connections: AsyncExitStack) -> Connection:
        """The way's connection, opened if need be. Raises TeacherFault, and Dropped where the opening was given up."""
        if way.connection is None:
            opening = way.opening = way.opening or self._loop.create_task(connections.enter_async_context(way.port.connect(home)))
            try:
                way.connection = await asyncio.shield(opening)
            except asyncio.CancelledError:
                if opening.cancelled():
                    raise Dropped from None
                raise
            except BaseException:
                if way.opening is opening:
                    way.opening = None  # the next may have more luck
                raise
        return way.connection

    def give_up_opening(self) -> None:
        """Open no connection that is not open yet: a server may take minutes, and nothing was sent to it."""
        for way in self.ways:
            if way.opening is not None:
                way.opening.cancel()

    def _ended(self, turn: Turn, how: Heard | TeacherFault | None) -> None:
        """A turn is over: it brought an answer, a fault, or (None) nothing that says anything of the server."""
        way, now = turn.way, self._loop.time()
        if isinstance(how, Heard):
            way.pace.heard(turn.sent, now, how.readings, tokens=how.reply.tokens_in + how.reply.tokens_out)
            way.well()
        elif how is None:
            way.pace.failed(turn.sent, now)
            way.probing = False
        elif how.kind == "later":
            way.pace.refused(turn.sent, now, how.readings, how.retry_after_s)
            way.busy(how, now)
        elif how.kind == "never":
            way.pace.failed(turn.sent, now)
            way.well()
        else:
            way.pace.failed(turn.sent, now)
            way.ill(how, now)
            self._last_fault = how

    def _away(self, now: float) -> Away | None:
        """Why nobody can be asked now; None: somebody can, or may be soon."""
        for way in self.ways:  # a loop: this is asked for every call, and a generator costs five times as much
            if not way.dead:
                break
        else:
            fault = self.ways[-1].dead
            assert fault is not None
            return Away(fault)
        if self.teacher.fallback and self._last_fault and all(way.dead or way.probes_failed for way in self.ways):
            probe_due = any(not way.dead and not way.probing and way.probe_at <= now for way in self.ways)
            return None if probe_due else Away(self._last_fault)
        return None

    def _turn_away(self, away: Away) -> None:
        for queue in self._waiting.values():
            for _, heard in queue:
                if not heard.done():
                    heard.set_exception(Away(away.fault))
        self._waiting.clear()


def describe(ways: Sequence[Way]) -> str:
    """How fast a teacher is asked and why, in a few words."""
    return "; ".join(way.pace.describe() if len(ways) == 1 else f"{way.port.name}: {way.pace.describe()}" for way in ways)

"""What was paid for is never paid for again, whoever dies at whatever moment; on both databases."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factory import ledger as module
from factory import spool
from factory.database import PostgreSQL, Row, open_database
from factory.errors import StoreError
from factory.ledger import MIGRATIONS, Elsewhere, Known, Ledger, Place, Question, open_ledger
from schemas.call import Call, Reply
from tests.factory.postgres import fresh_database

T = TypeVar("T")

PLACE = Place("run-a", "02-compose", 1, "small")


@dataclass(frozen=True)
class Where:
    """A ledger's place, and what a process of ours needs to open it."""

    place: Path | str
    spools: Path

    def open(self, *, read_only: bool = False) -> Ledger:
        return Ledger.open(self.place, spools=self.spools, read_only=read_only)

    def execute(self, sql: str, *values: Any) -> list[Row]:
        """Behind the ledger's back."""
        with closing(open_database(self.place, MIGRATIONS)) as db:
            return db.execute(sql, *values)

    def script(self, lines: str, *arguments: str) -> subprocess.Popen[str]:
        """A process of its own, with `ledger` open in the loop that runs these lines."""
        head = (
            "import asyncio, os, sys; from pathlib import Path; from factory.ledger import *; from schemas.call import Call, Reply\n"
            "def question(text): return Question.of(Call(teacher='small', prompt=text), ('fake', 'm'))\n"
            "place = Place('run-a', 's', 1, 'small')\n"
            "async def main():\n    with Ledger.open(sys.argv[1], spools=Path(sys.argv[2])) as ledger:\n"
        )
        body = "".join(f"        {line}\n" for line in lines.strip().splitlines())
        command = [sys.executable, "-c", f"{head}{body}asyncio.run(main())", str(self.place), str(self.spools), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    @property
    def spool_files(self) -> list[Path]:
        return sorted(self.spools.rglob("*.spool"))


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Where:
    return Where(tmp_path / "mill" / "ledger.db" if request.param == "sqlite" else fresh_database(), tmp_path / "mill" / "spool")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mill" / "ledger.db"


@pytest.fixture
def ledger(where: Where) -> Iterator[Ledger]:
    with where.open() as ledger:
        yield ledger


def question(text: str = "q", draw: int = 0) -> Question:
    return Question.of(Call(teacher="small", prompt=text, draw=draw), ("fake", "m"))


def reply(text: str = "a") -> Reply:
    return Reply(text=text, finish="stop", tokens_in=3, tokens_out=2)


def wait(*asked: Callable[[], asyncio.Future[T]]) -> list[T | BaseException]:
    """Ask these in one loop, at once, and wait for all of them."""

    async def work() -> list[T | BaseException]:
        return await asyncio.gather(*(each() for each in asked), return_exceptions=True)

    return asyncio.run(work())


def one(asked: Callable[[], asyncio.Future[T]]) -> T:
    [result] = wait(asked)
    if isinstance(result, BaseException):
        raise result
    return result


def enter(ledger: Ledger, q: Question, place: Place = PLACE, *, reserve: int | None = 100, budget: int | None = None) -> Any:
    return one(lambda: ledger.enter(q, place, reserve=reserve, budget=budget))


def settle(ledger: Ledger, entry: int, answer: Reply | None = None, cost: int | None = 7, seconds: float | None = None) -> Known:
    return one(lambda: ledger.settle(entry, answer or reply(), cost, seconds))


def fail(ledger: Ledger, entry: int, error: str = "no such thing") -> None:
    one(lambda: ledger.fail(entry, error))


def states(ledger: Ledger, *texts: str) -> list[list[str]]:
    """The states of each question's entries, in the order in which they were entered."""
    records = [ledger.get(question(text).key) for text in texts]
    return [[entry.state for entry in record.entries] if record else [] for record in records]


def stop_committing(ledger: Ledger) -> None:
    """From here on the ledger's process is as good as dead: what it does is not committed any more."""
    ledger._commit = lambda jobs: None  # type: ignore[method-assign]


def die(where: Where, ledger: Ledger) -> None:
    """What `kill -9` leaves of an open ledger: its files, and no locks."""
    stop_committing(ledger)
    session = ledger._db.execute("SELECT pg_backend_pid()")[0][0] if isinstance(ledger._db, PostgreSQL) else None
    ledger._queue.put(None)
    assert ledger._writer
    ledger._writer.join()
    ledger._closed = True
    if ledger._spool:
        ledger._spool.retire(keep=True)
    ledger._db.close()
    while session and where.execute("SELECT 1 FROM pg_stat_activity WHERE pid = ?", session):
        pass  # the server takes a moment


def leave_four(where: Where) -> None:
    """A process that died: one answer is committed, one had only arrived, one was asked, and one had never left."""
    ledger = where.open()
    entries = [enter(ledger, question(text)) for text in ("committed", "arrived", "sent", "entered")]
    for entry in entries[:3]:
        ledger.sending(entry)
    settle(ledger, entries[0], reply("committed"))
    stop_committing(ledger)

    async def arrive() -> None:
        ledger.settle(entries[1], reply("arrived"), 9)

    asyncio.run(arrive())
    die(where, ledger)


FOUR = ("committed", "arrived", "sent", "entered")


def test_an_answer_survives_closing_and_is_whole(where: Where) -> None:
    q = question("what?", draw=2)
    with where.open() as ledger:
        assert ledger.find(q.key) is None
        settle(ledger, enter(ledger, q), reply("that"), 7, 0.5)
        assert ledger.find_any([q.key, question("new").key]) == {q.key}
    with where.open() as ledger:
        assert ledger.find(q.key) == Known(reply("that"), 7)
        assert one(lambda: ledger.look([q.key, "c1-none"])) == {q.key: Known(reply("that"), 7)}
        assert enter(ledger, q) == Known(reply("that"), 7)
        record = ledger.get(q.key)
        assert record is not None
        assert (record.question, record.answer) == (q, Known(reply("that"), 7))
        assert '"prompt":"what?"' in record.question.request
        [entry] = record.entries
        assert (entry.state, entry.run, entry.stage, entry.round, entry.teacher) == ("settled", "run-a", "02-compose", 1, "small")
        assert (entry.reserved_micro_usd, entry.cost_micro_usd, entry.tokens_in, entry.tokens_out, entry.seconds) == (100, 7, 3, 2, 0.5)
        assert ledger.get("c1-none") is None


def test_the_money_of_a_run_is_what_was_settled_is_open_or_was_lost(where: Where) -> None:
    with where.open() as ledger:
        settle(ledger, enter(ledger, question("settled")))
        fail(ledger, enter(ledger, question("failed")))
        sent = enter(ledger, question("open"))
        ledger.sending(sent)
        ledger.sending(enter(ledger, question("another run's"), Place("run-b", "s", 1, "big"), reserve=None))
        enter(ledger, question("never left"))
        assert ledger.spent("run-a") == 207
        assert ledger.sums("run")[0].open == 2
    with where.open() as ledger:  # what was open at closing is lost, if it was sent
        assert ledger.spent("run-a") == 107
        assert [(entry.id, entry.key) for entry in ledger.lost("run-a")] == [(sent, question("open").key)]
        [a, b] = ledger.sums("run")
        assert (a.name, a.settled, a.open, a.lost, a.failed, a.micro_usd, a.unpriced) == ("run-a", 1, 0, 1, 2, 107, 0)
        assert (b.name, b.lost, b.micro_usd, b.unpriced, b.tokens_in) == ("run-b", 1, 0, 1, 0)
        assert [s.name for s in ledger.sums("teacher")] == ["big", "small"]
        assert [s.name for s in ledger.sums("stage", run="run-a")] == ["02-compose"]
        [day] = ledger.sums("day")
        assert (len(day.name), day.tokens_out, day.micro_usd) == (10, 2, 107)
        assert len(ledger.lost()) == 2
        assert where.spool_files == []


def test_a_lost_call_is_asked_anew_and_stays_in_the_bill(ledger: Ledger) -> None:
    first = enter(ledger, question())
    ledger.sending(first)
    one(lambda: ledger.lose(first, "the answer was cut"))
    settle(ledger, enter(ledger, question()))
    assert ledger.spent("run-a") == 107
    assert states(ledger, "q") == [["lost", "settled"]]


def test_a_reservation_that_does_not_fit_is_not_made(ledger: Ledger) -> None:
    first = enter(ledger, question("1"), reserve=60, budget=100)
    assert enter(ledger, question("2"), reserve=41, budget=100) is None
    assert ledger.get(question("2").key) is None
    enter(ledger, question("3"), reserve=40, budget=100)
    assert enter(ledger, question("4"), reserve=1, budget=100) is None
    enter(ledger, question("free"), reserve=0, budget=100)
    settle(ledger, first, cost=10)
    enter(ledger, question("4"), reserve=50, budget=100)
    assert ledger.spent("run-a") == 100


STEP = st.tuples(st.booleans(), st.integers(0, 40), st.floats(0, 1), st.sampled_from(["settle", "fail", "lose", "open"]))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(STEP, min_size=1, max_size=6), max_size=6))
def test_no_order_of_things_overshoots_a_budget(two: tuple[Ledger, Ledger], batches: list[list[tuple[bool, int, float, str]]]) -> None:
    """The running total that decides equals what the entries add up to, at every step, and in another process's eyes."""
    run = uuid.uuid4().hex
    place = Place(run, "s", 1, "small")

    async def one_batch(n: int, steps: list[tuple[bool, int, float, str]]) -> None:
        async def step(m: int, first: bool, reserve: int, share: float, end: str) -> None:
            who = two[first]
            entry = await who.enter(question(f"{run} {n} {m}"), place, reserve=reserve, budget=100)
            if isinstance(entry, int):
                if end == "settle":
                    await who.settle(entry, reply(), int(reserve * share))
                elif end != "open":
                    await (who.fail if end == "fail" else who.lose)(entry, "x")

        await asyncio.gather(*(step(m, *each) for m, each in enumerate(steps)))

    for n, steps in enumerate(batches):
        asyncio.run(one_batch(n, steps))
        [total] = two[0].sums("run", run) or [None]
        assert two[0].spent(run) == two[1].spent(run) == (total.micro_usd if total else 0) <= 100


@pytest.fixture
def two(where: Where) -> Iterator[tuple[Ledger, Ledger]]:
    with where.open() as first, where.open() as second:
        yield first, second


def test_the_same_question_in_flight_twice_is_asked_once(two: tuple[Ledger, Ledger]) -> None:
    first, second = two
    entry = enter(first, question())
    assert enter(second, question()) == enter(first, question()) == Elsewhere(first._owner)
    settle(first, entry, reply("bought once"), 5)
    assert enter(second, question()) == Known(reply("bought once"), 5)
    assert states(second, "q") == [["settled"]]

    entry = enter(second, question("fails"))
    assert enter(first, question("fails")) == Elsewhere(second._owner)
    fail(second, entry)
    assert isinstance(enter(first, question("fails")), int)
    both = wait(*(lambda: first.enter(question("in one batch"), PLACE, reserve=1, budget=None) for _ in range(2)))
    assert sorted(type(each).__name__ for each in both) == ["Elsewhere", "int"]


def test_the_first_answer_stands_where_two_were_paid_for(two: tuple[Ledger, Ledger]) -> None:
    first, second = two
    entry = enter(first, question())
    lost = "UPDATE entries SET state = 'lost' WHERE id = ?"  # as another machine does that takes us for dead
    first._read(lambda: first._db.change(lost, entry))
    again = enter(second, question())
    assert settle(second, again, reply("first"), 5) == Known(reply("first"), 5)
    assert settle(first, entry, reply("second"), 6) == Known(reply("first"), 5)
    assert states(first, "q") == [["settled", "settled"]]
    assert first.spent("run-a") == 11


def test_what_a_living_process_has_open_is_left_alone(where: Where, ledger: Ledger) -> None:
    ledger.sending(enter(ledger, question()))
    with where.open() as other:
        assert states(other, "q") == [["open"]]
        assert other.spent("run-a") == 100
    assert len(where.spool_files) == 1


@pytest.mark.parametrize("moment", ["opening", "meeting"])
def test_what_a_dead_process_left_is_put_in_order(where: Where, moment: str) -> None:
    early = where.open() if moment == "meeting" else None
    leave_four(where)
    assert len(where.spool_files) == 1
    with early or where.open() as ledger:
        if moment == "meeting":  # as a gateway meets it
            assert states(ledger, *FOUR) == [["settled"], ["open"], ["open"], ["open"]]
            assert enter(ledger, question("arrived")) == Known(reply("arrived"), 9)
        assert states(ledger, *FOUR) == [["settled"], ["settled"], ["lost"], ["failed"]]
        assert ledger.find(question("arrived").key) == Known(reply("arrived"), 9)
        assert ledger.spent("run-a") == ledger.sums("run")[0].micro_usd == 7 + 9 + 100
        assert [entry.reserved_micro_usd for entry in ledger.lost()] == [100]
        assert {path.name.partition(".")[0] for path in where.spool_files} <= {ledger._owner}
        assert isinstance(enter(ledger, question("sent")), int)


def test_after_a_crash_of_the_machine_nobody_knows_what_left(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_four(where)
    monkeypatch.setattr(module, "boot", lambda: "another")
    with where.open() as ledger:
        assert states(ledger, *FOUR) == [["settled"], ["settled"], ["lost"], ["lost"]]


def test_a_start_of_the_machine_that_has_no_name_tells_nothing(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "boot", lambda: "")
    leave_four(where)
    with where.open() as ledger:
        assert states(ledger, *FOUR) == [["settled"], ["settled"], ["lost"], ["lost"]]


def test_without_its_spool_all_that_a_process_left_is_lost_until_the_spool_is_there(where: Where, tmp_path: Path) -> None:
    """As it is on another machine, which shares the database alone."""
    leave_four(where)
    shutil.move(where.spools, tmp_path / "elsewhere")
    with where.open() as ledger:
        assert states(ledger, *FOUR) == [["settled"], ["lost"], ["lost"], ["lost"]]
        assert ledger.spent("run-a") == 307
    shutil.rmtree(where.spools, ignore_errors=True)
    shutil.move(tmp_path / "elsewhere", where.spools)
    with where.open() as ledger:
        assert states(ledger, *FOUR) == [["settled"], ["settled"], ["lost"], ["lost"]]
        assert ledger.spent("run-a") == 216
        assert where.spool_files == []


@pytest.mark.parametrize("left", [b"", b"\0" * 4096])
def test_a_spool_that_a_crash_left_empty_is_no_hindrance(where: Where, left: bytes) -> None:
    leave_four(where)
    [file] = where.spool_files
    file.write_bytes(left)
    with where.open() as ledger:
        assert states(ledger, *FOUR) == [["settled"], ["lost"], ["lost"], ["lost"]]


def test_four_who_open_at_once_bury_the_dead_once(where: Where) -> None:
    leave_four(where)
    opened: list[Ledger] = []
    threads = [threading.Thread(target=lambda: opened.append(where.open())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    assert {str(states(ledger, *FOUR)) for ledger in opened} == {"[['settled'], ['settled'], ['lost'], ['failed']]"}
    assert {ledger.spent("run-a") for ledger in opened} == {116}
    for ledger in opened:
        ledger.close()


def test_a_process_that_is_killed_loses_at_most_what_was_in_flight(where: Where) -> None:
    lines = """
entries = [await ledger.enter(question(str(n)), place, reserve=100, budget=None) for n in range(40)]
for entry in entries[:30]:
    ledger.sending(entry)
answers = [ledger.settle(entry, Reply(text=str(entry), finish='stop', tokens_in=1, tokens_out=1), 1) for entry in entries[:20]]
await answers[0]
os.kill(os.getpid(), 9)
"""
    with where.script(lines) as process:
        assert process.wait() == -9
    with where.open() as ledger:
        assert Counter(state for [state] in states(ledger, *map(str, range(40)))) == {"settled": 20, "lost": 10, "failed": 10}
        assert ledger.spent("run-a") == 20 + 1000
    if isinstance(where.place, Path):
        assert [*where.place.with_name("ledger.db-owners").iterdir()] == []


def test_a_spool_goes_on_in_further_files_and_those_that_are_done_go(where: Where, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 300)
    ledger = where.open()
    for n in range(20):
        entry = enter(ledger, question(str(n)))
        ledger.sending(entry)
        settle(ledger, entry)
    assert len(where.spool_files) == 1
    assert ledger._segments > 3
    early = enter(ledger, question("early"))  # its mark stands in a file that is gone long before it dies
    ledger.sending(early)
    for n in range(20):
        entry = enter(ledger, question(f"more {n}"))
        ledger.sending(entry)
        settle(ledger, entry)
    [current] = where.spool_files
    _, in_flight = json.loads(next(spool.frames(current)))
    assert early in in_flight
    assert len(in_flight) <= 2, "what is committed is in flight no more"
    never = enter(ledger, question("never left"))
    late = [enter(ledger, question(f"late {n}")) for n in range(12)]
    stop_committing(ledger)

    async def arrive() -> None:
        for entry in late:
            ledger.sending(entry)
            ledger.settle(entry, reply(), 7)

    asyncio.run(arrive())
    assert len(where.spool_files) > 2
    die(where, ledger)
    with where.open() as ledger:
        assert states(ledger, "early", "never left") == [["lost"], ["failed"]]
        assert {state for states_of in states(ledger, *(f"late {n}" for n in range(12))) for state in states_of} == {"settled"}
        assert [entry.id for entry in ledger.lost()] == [early] != [never]
        assert where.spool_files == []


def test_a_call_is_not_sent_where_that_cannot_be_noted_and_an_answer_is_kept_all_the_same(
    where: Where, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = enter(ledger, question("1")), enter(ledger, question("2"))
    ledger.sending(first)
    write = os.write
    # A disk that takes half of it; wakings of an event loop are one byte long.
    monkeypatch.setattr(spool.os, "write", lambda file, frame: write(file, frame[: max(1, len(frame) // 2)]))
    with pytest.raises(StoreError, match="can't write") as caught:
        ledger.sending(second)
    assert "Make room" in str(caught.value)
    assert settle(ledger, first) == Known(reply(), 7)
    monkeypatch.undo()
    ledger.sending(second)
    stop_committing(ledger)
    die(where, ledger)
    with where.open() as ledger:
        assert states(ledger, "1", "2") == [["settled"], ["lost"]]


@pytest.mark.parametrize("moment", ["before it was entered", "before it was told"])
def test_a_question_whose_asker_was_cancelled_can_be_asked(ledger: Ledger, moment: str) -> None:
    async def cancelled() -> asyncio.Future[Any]:
        future = ledger.enter(question(), PLACE, reserve=100, budget=None)
        while moment == "before it was told" and not ledger._handed:
            pass  # the writer is done with it, and this loop has not heard of that
        future.cancel()
        return future

    async def work() -> None:
        with hold(ledger) if moment == "before it was entered" else nullcontext():
            future = await cancelled()
        while isinstance(entered := await ledger.enter(question(), PLACE, reserve=100, budget=100), Elsewhere | None):
            await asyncio.sleep(0.001)
        assert future.cancelled()
        await ledger.settle(entered, reply(), 7)

    asyncio.run(asyncio.wait_for(work(), 10))
    assert states(ledger, "q") == [["settled"]] if moment == "before it was entered" else [["failed", "settled"]]
    assert ledger.spent("run-a") == 7


def test_a_question_whose_loop_was_closed_can_be_asked(ledger: Ledger) -> None:
    async def leave() -> None:
        ledger.enter(question(), PLACE, reserve=100, budget=None)

    with hold(ledger):  # it is entered once the loop is closed: what a loop was told is its own
        asyncio.run(leave())
    until = time.monotonic() + 10
    while not isinstance(entered := enter(ledger, question()), int) and time.monotonic() < until:
        time.sleep(0.005)
    assert isinstance(entered, int)
    assert states(ledger, "q")[0][-1] == "open"


@contextmanager
def hold(ledger: Ledger) -> Iterator[None]:
    """Keep the writer busy meanwhile, so that what is asked becomes one batch."""
    started, go = threading.Event(), threading.Event()
    waiting = threading.Thread(target=lambda: ledger._read(lambda: (started.set(), go.wait(10))))
    waiting.start()
    started.wait(10)
    yield
    go.set()
    waiting.join()


def held(ledger: Ledger, *asked: Callable[[], asyncio.Future[Any]]) -> list[Any]:
    """Ask these so that they become one batch."""

    async def work() -> list[Any]:
        with hold(ledger):
            futures = [each() for each in asked]
        return await asyncio.gather(*futures, return_exceptions=True)

    return asyncio.run(work())


def entering(ledger: Ledger, text: str, **limits: int | None) -> Callable[[], asyncio.Future[Any]]:
    return lambda: ledger.enter(question(text), PLACE, **{"reserve": 1, "budget": 10, **limits})


def test_one_that_cannot_be_done_does_not_take_its_batch_along(ledger: Ledger) -> None:
    asked = [entering(ledger, str(n)) for n in range(12)]
    results = held(ledger, *asked[:5], lambda: ledger.look(["half of a character: \ud800"]), *asked[5:])
    assert isinstance(results.pop(5), TypeError)
    assert len({entry for entry in results[:10] if isinstance(entry, int)}) == 10
    assert results[10:] == [None, None]
    assert ledger.spent("run-a") == 10  # a batch that was rolled back and done again counts once


def break_commits(ledger: Ledger, these: Container[int]) -> None:
    """Let the commits with these numbers from here fail."""
    commit, number = ledger._db.commit, count()

    def fail() -> None:
        if next(number) in these:
            raise ledger._db.errors[0]("database or disk is full")
        commit()

    ledger._db.commit = fail  # type: ignore[method-assign]


def test_a_commit_that_fails_fails_the_whole_batch_and_an_answer_in_it_is_not_lost(where: Where) -> None:
    ledger = where.open()
    entry = enter(ledger, question("answered"))
    ledger.sending(entry)
    break_commits(ledger, {1})  # the first is of what holds the batch
    results = held(ledger, lambda: ledger.settle(entry, reply("paid"), 7), entering(ledger, "new"))
    assert [type(result) for result in results] == [StoreError, StoreError]
    assert states(ledger, "answered", "new") == [["open"], []]
    ledger.close()
    with where.open() as ledger:
        assert ledger.find(question("answered").key) == Known(reply("paid"), 7)
        assert states(ledger, "answered") == [["settled"]]
        assert ledger.spent("run-a") == ledger.sums("run")[0].micro_usd == 7
        assert where.spool_files == []


@pytest.mark.parametrize("paid", [True, False])
def test_what_could_not_be_committed_at_closing_is_put_in_order_by_the_next(where: Where, paid: bool) -> None:
    ledger = where.open()
    entries = [enter(ledger, question(text)) for text in ("paid", "sent", "entered")]
    for entry in entries[:2]:
        ledger.sending(entry)
    break_commits(ledger, range(100))
    if paid:
        with pytest.raises(StoreError):
            settle(ledger, entries[0])
    with pytest.raises(StoreError):
        ledger.close()
    ledger.close()
    assert len(where.spool_files) == 1
    with where.open() as ledger:
        assert states(ledger, "paid", "sent", "entered") == [["settled" if paid else "lost"], ["lost"], ["failed"]]


def test_what_is_queued_is_done_before_closing_and_nothing_after_it(where: Where) -> None:
    ledger = where.open()

    async def work() -> list[Any]:
        futures = [ledger.enter(question(str(n)), PLACE, reserve=1, budget=None) for n in range(50)]
        closers = [threading.Thread(target=ledger.close) for _ in range(3)]
        for closer in closers:
            closer.start()
        for closer in closers:
            await asyncio.to_thread(closer.join)
        return await asyncio.gather(*futures)

    assert len(set(asyncio.run(work()))) == 50
    for late in (lambda: ledger.find("x"), lambda: ledger.sending(1), lambda: enter(ledger, question())):
        with pytest.raises(RuntimeError, match="closed"):
            late()
    with where.open() as again:
        assert again.sums("run")[0].failed == 50


def test_two_processes_at_once_pay_nothing_twice_and_keep_the_budget(where: Where) -> None:
    lines = """
print(flush=True), sys.stdin.readline()
bought = [0]
async def ask(n):
    while isinstance(entry := await ledger.enter(question(str(n)), place, reserve=10, budget=400), Elsewhere):
        await asyncio.sleep(0.002)
    if isinstance(entry, int):
        assert ledger.spent('run-a') <= 400
        ledger.sending(entry)
        await asyncio.sleep(0.001)
        await ledger.settle(entry, Reply(text=str(n), finish='stop', tokens_in=1, tokens_out=1), 5)
        bought[0] += 1
for first in range(0, 100, 10):
    await asyncio.gather(*(ask(n) for n in range(first, first + 10)))
print(bought[0])
"""
    processes = [where.script(lines) for _ in range(2)]  # which make the ledger at once as well
    bought = [int(process.communicate(timeout=60)[0].split()[-1]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    with where.open() as ledger:
        [total] = ledger.sums("run")
        assert (total.settled, total.open, total.lost, total.failed) == (sum(bought), 0, 0, 0)
        assert ledger.spent("run-a") == total.micro_usd == 5 * sum(bought) <= 400
        assert {len(of) for of in states(ledger, *map(str, range(100)))} <= {0, 1}
        assert sum(bought) >= 40  # that many fit, whatever else is open at the time


def test_every_character_survives(where: Where) -> None:
    text = "\0 \x01 \x1f \x7f \x85 \u2028 \ufeff \ufffe \uffff \U0001f469\u200d\U0001f4bb e\u0301 \u202e \\u0000 \\ \" ' % ? %s $1"
    call = Call(teacher="small", prompt=text, json_schema={"const": text})
    q = Question.of(call, ("fake", "m"))
    answer = Reply(text=text, finish="stop", tokens_in=1, tokens_out=1, reasoning=text, logprob=-0.1 + 0.2)
    place = Place("run ? % ü", "s", 1, "small")
    with where.open() as ledger:
        settle(ledger, enter(ledger, q, place), answer)
        odd = enter(ledger, question("odd"), place)
        fail(ledger, odd, text + "\ud800")
    with where.open() as ledger:
        assert ledger.find(q.key) == Known(answer, 7)
        record = ledger.get(q.key)
        assert record is not None
        assert record.question == q
        assert ledger.spent("run ? % ü") == 7
        record = ledger.get(question("odd").key)
        assert record is not None
        assert record.entries[0].error == text.replace("\0", "\ufffd") + "?"


def test_a_ledger_opened_to_be_read_changes_nothing(where: Where) -> None:
    with pytest.raises(StoreError, match="nothing was asked yet"):
        where.open(read_only=True)
    assert not where.spools.parent.exists()
    leave_four(where)
    with where.open(read_only=True) as reader:
        assert states(reader, *FOUR) == [["settled"], ["open"], ["open"], ["open"]]
        assert (reader.spent("run-a"), reader.sums("stage")[0].open, reader.lost()) == (307, 3, [])
        assert reader.find_any([question("committed").key]) == {question("committed").key}
        with pytest.raises(RuntimeError, match="to be read"):
            enter(reader, question())
        with pytest.raises(StoreError):
            reader._read(lambda: reader._db.change("DELETE FROM entries"))
        with where.open():
            assert states(reader, *FOUR) == [["settled"], ["settled"], ["lost"], ["failed"]]
    with pytest.raises(RuntimeError, match="closed"):
        reader.find("x")
    reader.close()


def test_the_pace_of_a_model_is_known_once_it_answered(ledger: Ledger) -> None:
    assert ledger.pace("fake", "m") is None
    settle(ledger, enter(ledger, question("1")), seconds=None)
    assert ledger.pace("fake", "m") is None
    settle(ledger, enter(ledger, question("2")), seconds=1.0)
    settle(ledger, enter(ledger, question("3")), seconds=2.0)
    assert ledger.pace("fake", "m") == 1.5
    assert ledger.pace("fake", "another") is None


def test_where_the_ledger_lies_can_be_said_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRISTMILL_LEDGER", raising=False)
    with open_ledger(tmp_path) as ledger:
        assert ledger.place == str(tmp_path / "ledger.db")
    monkeypatch.setenv("GRISTMILL_LEDGER", "mysql://somewhere")
    with pytest.raises(StoreError, match="GRISTMILL_LEDGER"):
        open_ledger(tmp_path)
    url = fresh_database()
    monkeypatch.setenv("GRISTMILL_LEDGER", url)
    with open_ledger(tmp_path / "home") as ledger:
        enter(ledger, question())
        assert [*(tmp_path / "home" / "spool").rglob("*.spool")] != []
        assert url.partition("?")[0].rpartition("/")[2] in ledger.place
    with pytest.raises(ValueError, match="spools"):
        Ledger.open(url)


def test_no_message_holds_a_password(tmp_path: Path) -> None:
    for url in ("postgresql://me:secret@127.0.0.1:1/x", "postgresql://127.0.0.1:1/x?user=me&password=secret"):
        with pytest.raises(StoreError, match="can't be used") as caught:
            Ledger.open(url, spools=tmp_path)
        assert "secret" not in str(caught.value)
        assert "127.0.0.1" in str(caught.value)


def test_two_ledgers_do_not_take_each_others_spools(tmp_path: Path) -> None:
    first, second = (Where(fresh_database(), tmp_path / "spool") for _ in range(2))
    with first.open() as living:
        living.sending(enter(living, question("alive")))
        leave_four(first)
        with second.open() as other:
            assert other.sums("run") == []
        assert len(first.spool_files) == 2
    with first.open() as ledger:
        assert states(ledger, *FOUR, "alive") == [["settled"], ["settled"], ["lost"], ["failed"], ["lost"]]


def test_a_death_that_the_server_has_not_yet_seen_is_waited_for(tmp_path: Path) -> None:
    where = Where(fresh_database(), tmp_path / "spool")
    leave_four(where)
    [file] = where.spool_files
    with closing(open_database(where.place, MIGRATIONS)) as session:
        session.live(file.name.partition(".")[0])  # as if it were the dead one's
        seen = threading.Timer(0.2, session.close)
        seen.start()
        with where.open() as ledger:
            assert states(ledger, *FOUR) == [["settled"], ["settled"], ["lost"], ["failed"]]
        seen.join()


def test_a_process_that_lost_its_connection_is_not_taken_for_dead_while_it_lives(tmp_path: Path) -> None:
    where = Where(fresh_database(), tmp_path / "spool")
    ledger = where.open()
    entry = enter(ledger, question())
    ledger.sending(entry)
    with where.open() as other:
        [(pid,)] = ledger._read(lambda: ledger._db.execute("SELECT pg_backend_pid()"))
        other._read(lambda: other._db.execute("SELECT pg_terminate_backend(?)", pid))
        with pytest.raises(StoreError):
            settle(ledger, entry)
        assert enter(other, question()) == Elsewhere(ledger._owner)
        with pytest.raises(StoreError):
            ledger.close()
        assert enter(other, question()) == Known(reply(), 7)


def version_1(path: Path) -> None:
    """A ledger as the first version left it, with a call in every state; its open one's process ended long ago."""
    path.parent.mkdir()
    db = sqlite3.connect(path)
    for statement in MIGRATIONS[0]:
        db.execute(statement)
    for n, (state, cost) in enumerate([("settled", 7), ("failed", None), ("lost", None), ("open", None), ("settled", None)]):
        q = question(str(n))
        answer = reply(str(n)).model_dump_json() if state == "settled" else None
        db.execute("INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?)", (q.key, q.provider, q.model, q.draw, q.request, answer, cost))
        db.execute(
            "INSERT INTO entries (key, state, run, stage, round, teacher, owner, opened_at, reserved_micro_usd, cost_micro_usd) "
            "VALUES (?, ?, 'run-a', 's', 1, 'small', 'host:1:2:abc', '2026-11-01T00:00:00.000+00:00', 100, ?)",
            (q.key, state, cost),
        )
    db.execute("PRAGMA application_id = 1735552364")
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()


@pytest.mark.parametrize("read_first", [False, True])
def test_a_ledger_of_the_first_version_is_taken_over_whole(path: Path, read_first: bool) -> None:
    version_1(path)
    if read_first:
        with Ledger.open(path, read_only=True) as reader:
            assert states(reader, *"01234") == [["settled"], ["failed"], ["lost"], ["open"], ["settled"]]
            assert reader.spent("run-a") == 7 + 100 + 100
    with Ledger.open(path) as ledger:
        assert states(ledger, *"01234") == [["settled"], ["failed"], ["lost"], ["lost"], ["settled"]]
        assert ledger.spent("run-a") == ledger.sums("run")[0].micro_usd == 207
        assert ledger.find(question("0").key) == Known(reply("0"), 7)
        record = ledger.get(question("4").key)
        assert record is not None
        assert (record.question, record.answer) == (question("4"), Known(reply("4"), None))
        settle(ledger, enter(ledger, question("3")))
        assert ledger.pace("fake", "m") is None
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    db.close()


def test_a_ledger_of_a_newer_version_is_refused_and_kept(where: Where) -> None:
    where.open().close()
    if isinstance(where.place, Path):
        where.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    else:
        where.execute("UPDATE gristmill SET version = version + 1 RETURNING version")
    for read_only in (False, True):
        with pytest.raises(StoreError, match="newer Gristmill") as caught:
            where.open(read_only=read_only)
        assert "Do not delete" in str(caught.value)


@pytest.mark.parametrize("content", [b"this is not SQLite at all. " * 400, b"SQLite format 3\0" + b"\xff" * 8000])
def test_a_broken_ledger_is_refused_and_kept(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    for read_only in (False, True):
        with pytest.raises(StoreError, match="ledger"):
            Ledger.open(path, read_only=read_only)
    assert path.read_bytes() == content


def test_another_sqlite_file_is_not_taken_for_a_ledger(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(StoreError, match="not a ledger"):
        Ledger.open(path)


def test_a_ledger_that_cannot_be_written_says_so(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(StoreError, match="can't be used"):
        Ledger.open(path)
    path.rmdir()
    path.with_name("ledger.db-owners").touch()  # where a folder should be
    with pytest.raises(StoreError, match="can't be used"):
        Ledger.open(path)


def test_a_full_disk_is_an_error_with_advice_and_the_ledger_goes_on_after_it(path: Path) -> None:
    with Ledger.open(path) as ledger:
        enter(ledger, question("before"))
        [(pages,)] = ledger._read(lambda: ledger._db.execute("PRAGMA page_count"))
        # SQLite's own limit gives the very error that a full disk does.
        ledger._read(lambda: ledger._db.execute(f"PRAGMA max_page_count = {pages}"))
        with pytest.raises(StoreError, match="full") as caught:
            [enter(ledger, question("x" * 4000 + str(n))) for n in range(200)]
        assert "Make room" in str(caught.value)
        ledger._read(lambda: ledger._db.execute("PRAGMA max_page_count = 100000"))
        enter(ledger, question("after"))
        assert ledger.spent("run-a") == ledger.sums("run")[0].micro_usd


def test_the_files_of_a_ledger_open_with_the_ordinary_shell(path: Path) -> None:
    with Ledger.open(path) as ledger:
        settle(ledger, enter(ledger, question()), reply("hello"))
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT json_extract(answer, '$.text'), cost_micro_usd FROM calls").fetchall() == [("hello", 7)]
    db.close()

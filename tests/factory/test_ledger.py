import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factory.errors import StoreError
from factory.ledger import MIGRATIONS, Known, Ledger, Place, Question
from schemas.call import Call, Reply

PLACE = Place("run-a", "02-compose", 1, "small")


def question(text: str = "q", draw: int = 0) -> Question:
    return Question.of(Call(teacher="small", prompt=text, draw=draw), ("fake", "m"))


def reply(text: str = "a") -> Reply:
    return Reply(text=text, finish="stop", tokens_in=3, tokens_out=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mill" / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path) as ledger:
        yield ledger


def enter(ledger: Ledger, q: Question, place: Place = PLACE, *, reserve: int | None = 100, budget: int | None = None) -> int:
    entry = ledger.enter(q, place, reserve=reserve, budget=budget).result()
    assert entry is not None
    return entry


def test_an_answer_survives_closing_and_is_whole(path: Path) -> None:
    q = question("what?", draw=2)
    with Ledger.open(path) as ledger:
        assert ledger.find(q.key).result() is None
        ledger.settle(enter(ledger, q), reply("that"), 7).result()
    with Ledger.open(path) as ledger:
        assert ledger.find(q.key).result() == Known(reply("that"), 7)
        record = ledger.get(q.key)
        assert record is not None
        assert record.question == q
        assert '"prompt":"what?"' in record.question.request
        [entry] = record.entries
        assert (entry.state, entry.run, entry.stage, entry.round, entry.teacher) == ("settled", "run-a", "02-compose", 1, "small")
        assert (entry.reserved_micro_usd, entry.cost_micro_usd, entry.tokens_in, entry.tokens_out) == (100, 7, 3, 2)
        assert ledger.get("c1-none") is None


def test_the_money_of_a_run_is_what_was_settled_is_open_or_was_lost(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.settle(enter(ledger, question("settled")), reply(), 7).result()
        ledger.fail(enter(ledger, question("failed")), "no such thing").result()
        enter(ledger, question("open"))
        enter(ledger, question("another run's"), Place("run-b", "s", 1, "big"), reserve=None)
        assert ledger.spent("run-a") == 107
    with Ledger.open(path) as ledger:  # what was open at closing is lost
        assert ledger.spent("run-a") == 107
        assert [entry.key for entry in ledger.lost("run-a")] == [question("open").key]
        [sum_a, sum_b] = ledger.sums("run")
        assert (sum_a.name, sum_a.settled, sum_a.open, sum_a.lost, sum_a.failed, sum_a.micro_usd, sum_a.unpriced) == (
            "run-a",
            1,
            0,
            1,
            1,
            107,
            0,
        )
        assert (sum_b.name, sum_b.lost, sum_b.micro_usd, sum_b.unpriced) == ("run-b", 1, 0, 1)
        assert [s.name for s in ledger.sums("teacher", run="run-a")] == ["small"]
        assert len(ledger.lost()) == 2


def test_a_lost_call_is_asked_anew_and_stays_in_the_bill(path: Path) -> None:
    with Ledger.open(path) as ledger:
        enter(ledger, question())
    with Ledger.open(path) as ledger:
        ledger.settle(enter(ledger, question()), reply(), 7).result()
        assert ledger.spent("run-a") == 107
        record = ledger.get(question().key)
        assert record is not None
        assert [entry.state for entry in record.entries] == ["lost", "settled"]


def test_a_reservation_that_does_not_fit_is_not_made(ledger: Ledger) -> None:
    first = enter(ledger, question("1"), reserve=60, budget=100)
    assert ledger.enter(question("2"), PLACE, reserve=41, budget=100).result() is None
    assert ledger.get(question("2").key) is None
    enter(ledger, question("3"), reserve=40, budget=100)
    assert ledger.enter(question("4"), PLACE, reserve=1, budget=100).result() is None
    enter(ledger, question("free"), reserve=0, budget=100)
    ledger.settle(first, reply(), 10).result()
    enter(ledger, question("4"), reserve=50, budget=100)
    assert ledger.spent("run-a") == 100


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1), st.sampled_from(["settle", "fail", "open"])), max_size=30))
def test_no_order_of_things_overshoots_a_budget(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, float, str]]) -> None:
    """The running total that decides must equal what the rows add up to, at every step, and in a second process's eyes."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    with Ledger.open(path) as ledger, Ledger.open(path) as other:
        for n, (reserve, share, end) in enumerate(steps):
            who = ledger if n % 2 else other
            entry = who.enter(question(str(n)), PLACE, reserve=reserve, budget=100).result()
            if entry is not None and end == "settle":
                who.settle(entry, reply(), int(reserve * share)).result()
            elif entry is not None and end == "fail":
                who.fail(entry, "x").result()
            assert ledger.spent("run-a") == other.spent("run-a") == sum(s.micro_usd for s in ledger.sums("run"))
            assert ledger.spent("run-a") <= 100


def test_two_processes_that_ask_the_same_both_pay_and_the_first_answer_stands(path: Path) -> None:
    with Ledger.open(path) as one, Ledger.open(path) as two:
        entry_one, entry_two = enter(one, question()), enter(two, question())
        assert two.settle(entry_two, reply("first"), 5).result() == Known(reply("first"), 5)
        assert one.settle(entry_one, reply("second"), 6).result() == Known(reply("first"), 5)
        assert one.spent("run-a") == 11


def test_what_a_living_process_has_open_is_not_lost(path: Path) -> None:
    with Ledger.open(path) as ledger:
        enter(ledger, question())
        with Ledger.open(path) as other:
            assert other.lost() == []
            assert other.spent("run-a") == 100


def test_what_a_killed_process_left_open_is_lost(path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from factory.ledger import *; from schemas.call import Call\n"
        "ledger = Ledger.open(Path(sys.argv[1]))\n"
        "q = Question.of(Call(teacher='small', prompt='q'), ('fake', 'm'))\n"
        "ledger.enter(q, Place('run-a', 's', 1, 'small'), reserve=100, budget=None).result()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -9
    with Ledger.open(path) as ledger:
        assert [entry.reserved_micro_usd for entry in ledger.lost("run-a")] == [100]


def test_eight_processes_may_make_and_use_one_ledger_at_once(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from factory.ledger import *; from schemas.call import Call, Reply\n"
        "with Ledger.open(Path(sys.argv[1])) as ledger:\n"
        "    for n in range(20):\n"
        "        q = Question.of(Call(teacher='t', prompt=str(n)), ('fake', 'm'))\n"
        "        entry = ledger.enter(q, Place(sys.argv[2], 's', 1, 't'), reserve=10, budget=None).result()\n"
        "        ledger.settle(entry, Reply(text=sys.argv[2], finish='stop', tokens_in=1, tokens_out=1), 1).result()\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, path, f"run-{n}"]) for n in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    with Ledger.open(path) as ledger:
        assert [(s.settled, s.micro_usd) for s in ledger.sums("run")] == [(20, 20)] * 8
        assert all(ledger.holds(question(str(n)).key) for n in range(20))


def test_one_entry_that_fails_does_not_take_its_batch_along(ledger: Ledger) -> None:
    futures = [ledger.enter(question(str(n)), PLACE, reserve=1, budget=10) for n in range(5)]
    bad = ledger.settle(12345, reply(), 1)  # there is no such entry
    more = [ledger.enter(question(str(n)), PLACE, reserve=1, budget=10) for n in range(5, 10)]
    with pytest.raises(TypeError):
        bad.result()
    assert len({future.result() for future in futures + more}) == 10
    assert ledger.spent("run-a") == 10  # a batch that was rolled back and done again counts once


def test_the_pace_of_a_model_is_known_once_it_answered(ledger: Ledger) -> None:
    assert ledger.pace("fake", "m") is None
    ledger.settle(enter(ledger, question()), reply(), 1).result()
    pace = ledger.pace("fake", "m")
    assert pace is not None
    assert 0 <= pace < 60
    assert ledger.pace("fake", "another") is None
    assert ledger.holds(question().key)
    assert not ledger.holds(question("new").key)


def test_a_ledger_of_a_newer_version_is_refused_and_kept(path: Path) -> None:
    Ledger.open(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(StoreError, match="newer Gristmill") as caught:
        Ledger.open(path)
    assert "Do not delete" in str(caught.value)


@pytest.mark.parametrize("content", [b"this is not SQLite at all. " * 400, b"SQLite format 3\0" + b"\xff" * 8000])
def test_a_broken_ledger_is_refused_and_kept(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StoreError, match="ledger"):
        Ledger.open(path)
    assert path.read_bytes() == content


def test_another_sqlite_file_is_not_taken_for_a_ledger(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    with pytest.raises(StoreError, match="not a ledger"):
        Ledger.open(path)


def test_a_ledger_that_cannot_be_written_says_so(path: Path) -> None:
    path.parent.mkdir()
    path.mkdir()
    with pytest.raises(StoreError, match="can't be used"):
        Ledger.open(path)


def test_a_full_disk_is_an_error_with_advice_and_the_ledger_goes_on_after_it(ledger: Ledger) -> None:
    enter(ledger, question("before"))
    pages = ledger._do(lambda: ledger._db.execute("PRAGMA page_count").fetchone()[0]).result()
    # SQLite's own limit gives the very error that a full disk does.
    ledger._do(lambda: ledger._db.execute(f"PRAGMA max_page_count = {pages}")).result()
    with pytest.raises(StoreError, match="full") as caught:
        [enter(ledger, question("x" * 4000 + str(n))) for n in range(200)]
    assert "Make room" in str(caught.value)
    ledger._do(lambda: ledger._db.execute("PRAGMA max_page_count = 100000")).result()
    enter(ledger, question("after"))
    assert ledger.spent("run-a") == ledger.sums("run")[0].micro_usd


def test_a_closed_ledger_refuses_work(path: Path) -> None:
    ledger = Ledger.open(path)
    ledger.close()
    ledger.close()
    with pytest.raises(RuntimeError, match="closed"):
        ledger.find("x")


def test_the_files_of_a_ledger_open_with_the_ordinary_shell(path: Path) -> None:
    with Ledger.open(path) as ledger:
        ledger.settle(enter(ledger, question()), reply("hello"), 7).result()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT json_extract(answer, '$.text'), cost_micro_usd FROM calls").fetchall() == [("hello", 7)]
    db.close()

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from factory import gateway as gateway_module
from factory import line as line_module
from factory.errors import BudgetSpent, RunError, TeacherDown
from factory.gateway import Gateway, estimate, filled
from factory.ledger import Ledger
from factory.teacher import Connection, Price, Teacher
from generators.teachers.fake import Fake
from generators.teachers.openai import OpenAI
from schemas.call import Answer, Call, Params
from schemas.sample import Message
from tests.mock_server import CUT, GARBLE, HANG, ODD, RESET, Fault, MockServer

Open = Callable[..., Gateway]


@pytest.fixture
def server() -> Iterator[MockServer]:
    with MockServer() as server:
        yield server


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        yield ledger


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "BACKOFF_S", 0.001)
    monkeypatch.setattr(line_module, "PROBE_S", 0.005)
    monkeypatch.setattr(line_module, "PATIENCE_S", 0.2)
    monkeypatch.setattr(line_module, "PATIENCE_NEW_S", 0.1)


def priced(server: MockServer, **settings: Any) -> OpenAI:
    """A teacher at which a question of a few words costs at most about a thousand micro-dollars, and far less in truth."""
    price = Price(input_usd_per_mtok=1, output_usd_per_mtok=10)
    return OpenAI.model_validate({"model": "m", "base_url": f"{server.url}/v1", "price": price, "params": {"max_tokens": 100}, **settings})


def opened(ledger: Ledger, tmp_path: Path, teachers: dict[str, Teacher], *, run: str = "r", budget: int | None = None) -> Gateway:
    return Gateway(teachers, ledger, home=tmp_path, run=run, budget_micro_usd=budget)


def prompts(count: int, teacher: str = "t") -> list[Call]:
    return [Call(teacher=teacher, prompt=f"question {n}", ref=str(n)) for n in range(count)]


def asked(gateway: Gateway, calls: list[Call]) -> list[Answer]:
    return list(gateway.ask(calls, stage="01-test", round=1))


def test_every_call_is_answered_and_a_second_run_asks_nothing(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    with opened(ledger, tmp_path, {"t": priced(server)}) as gateway:
        first = asked(gateway, prompts(50))
        tally = gateway.snapshot()
    assert {a.call.ref: a.reply.text for a in first if a.reply} == {str(n): f"answer to question {n}" for n in range(50)}
    assert all(a.fresh and a.micro_usd == 2 * 1 + 4 * 10 for a in first)
    assert (tally.asked, tally.answered, tally.from_ledger, tally.failed, tally.in_flight) == (50, 50, 0, 0, 0)
    assert (tally.tokens_in, tally.tokens_out, tally.micro_usd) == (100, 200, 50 * 42)
    assert tally.teachers["t"].answered == 50
    with opened(ledger, tmp_path, {"t": priced(server)}, run="another", budget=0) as gateway:
        second = asked(gateway, prompts(50))
        tally = gateway.snapshot()
    assert {a.key: a.reply for a in second} == {a.key: a.reply for a in first}
    assert not any(a.fresh for a in second)
    assert all(a.micro_usd == 42 for a in second)  # what it cost when it was bought
    assert (tally.answered, tally.from_ledger, tally.micro_usd, ledger.spent("another")) == (50, 50, 0, 0)
    assert server.answered.total() == 50


def test_calls_are_pulled_as_slots_become_free_and_answers_come_as_they_complete(
    server: MockServer, ledger: Ledger, tmp_path: Path
) -> None:
    pulled = 0

    def source() -> Iterator[Call]:
        nonlocal pulled
        for call in prompts(100):
            pulled += 1
            yield call

    with opened(ledger, tmp_path, {"t": priced(server, concurrency=4)}) as gateway:
        for n, _ in enumerate(gateway.ask(source(), stage="s", round=1), 1):
            assert pulled <= n + 2 * 4 + gateway_module.READ_AHEAD
    assert pulled == 100
    assert server.most_in_flight <= 4


def test_concurrency_is_a_teachers_over_all_askers(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.latency_s = 0.01
    answers: list[Answer] = []
    with opened(ledger, tmp_path, {"t": priced(server, concurrency=3)}) as gateway:
        threads = [threading.Thread(target=lambda n=n: answers.extend(asked(gateway, prompts(60)[n * 20 :][:20]))) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({a.key for a in answers}) == 60
    assert server.most_in_flight == 3


def test_the_same_question_asked_at_once_is_paid_for_once_and_a_draw_is_another_question(
    server: MockServer, ledger: Ledger, tmp_path: Path
) -> None:
    same = [Call(teacher="t", prompt="one", ref=str(n)) for n in range(10)]
    with opened(ledger, tmp_path, {"t": priced(server)}) as gateway:
        answers = asked(gateway, [*same, Call(teacher="t", prompt="one", draw=1)])
    assert server.answered == {"one": 2}
    assert sum(a.fresh for a in answers) == 2
    assert {a.call.ref for a in answers} == {*map(str, range(10)), ""}


def test_the_key_is_of_what_is_really_sent(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    call = Call(teacher="t", prompt="q", params=Params(temperature=0.5, extra={"min_p": 0.1}))
    warm = priced(server, params={"temperature": 1.0, "top_p": 0.9, "max_tokens": 9, "extra": {"min_p": 0.3, "seed": 1}})
    assert filled(call, warm).params == Params(temperature=0.5, top_p=0.9, max_tokens=9, extra={"min_p": 0.1, "seed": 1})
    with opened(ledger, tmp_path, {"t": warm}) as gateway:
        [answer] = asked(gateway, [call])
    assert answer.call == call
    assert answer.key == filled(call, warm).key(*warm.identity()) != call.key(*warm.identity())
    _, _, body = server.received[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["min_p"], body["seed"]) == (0.5, 0.9, 9, 0.1, 1)


def test_a_rate_limit_is_waited_for_and_uses_up_no_retry(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.faults.extend([Fault(429, headers={"Retry-After": "0.01"})] * 5 + [Fault(429)] * 5)
    with opened(ledger, tmp_path, {"t": priced(server, retries=0)}) as gateway:
        assert [a.reply is not None for a in asked(gateway, prompts(3))] == [True] * 3
    assert len(server.received) == 13


def test_the_wait_that_a_server_asks_for_is_kept(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.faults.append(Fault(429, headers={"retry-after-ms": "300"}))
    began = time.monotonic()
    with opened(ledger, tmp_path, {"t": priced(server)}) as gateway:
        asked(gateway, prompts(1))
    assert time.monotonic() - began >= 0.3  # a slow machine can only be later


@pytest.mark.parametrize("fault", [Fault(500), Fault(503), Fault(408), Fault(409)])
def test_a_passing_fault_is_retried_as_often_as_the_teacher_says(fault: Fault, server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.faults.extend([fault] * 2)
    with opened(ledger, tmp_path, {"t": priced(server, retries=2)}) as gateway:
        [answer] = asked(gateway, prompts(1))
        assert answer.reply is not None
        server.faults.extend([fault] * 3)
        [answer] = asked(gateway, [Call(teacher="t", prompt="another")])
    assert answer.reply is None
    assert answer.error
    assert len(server.received) == 6
    assert ledger.spent("r") == 42  # the failed one costs nothing


def test_a_question_that_is_refused_is_one_failure_and_may_be_asked_again_by_a_later_run(
    server: MockServer, ledger: Ledger, tmp_path: Path
) -> None:
    server.faults.append(Fault(400, {"error": {"message": "prompt is too long"}}))
    with opened(ledger, tmp_path, {"t": priced(server, concurrency=1)}) as gateway:
        answers = asked(gateway, prompts(3))
        tally = gateway.snapshot()
    [failed] = [a for a in answers if a.reply is None]
    assert failed.error is not None
    assert "prompt is too long" in failed.error
    assert (tally.answered, tally.failed) == (2, 1)
    record = ledger.get(failed.key)
    assert record is not None
    assert (record.answer, record.entries[0].state, record.entries[0].error) == (None, "failed", failed.error)
    with opened(ledger, tmp_path, {"t": priced(server)}) as gateway:
        assert all(a.reply for a in asked(gateway, prompts(3)))


def test_a_refused_key_stops_the_ask_with_advice_after_what_was_answered(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    got: list[Answer] = []

    def lose_the_key(question: str) -> str:
        if question == "question 9":
            server.always = Fault(401, {"error": {"message": "Incorrect API key provided"}})
        return "x"

    server.answer = lose_the_key
    with opened(ledger, tmp_path, {"t": priced(server, concurrency=1)}) as gateway, pytest.raises(TeacherDown) as caught:
        got.extend(gateway.ask(iter(prompts(1000)), stage="02-compose", round=1))
    text = str(caught.value)
    assert "Incorrect API key provided" in text
    assert "stage 02-compose" in text
    assert "run the same command" in text
    assert len(got) == len(server.answered) == 10
    assert "10 answers are kept" in text
    assert len(server.received) == 11  # nothing is sent after the refusal


def test_a_dead_server_stops_the_run_and_no_question_is_blamed_for_it(ledger: Ledger, tmp_path: Path) -> None:
    with MockServer() as server:
        teacher = priced(server, retries=1, concurrency=2)
        with opened(ledger, tmp_path, {"t": teacher}) as gateway:
            asked(gateway, prompts(5))
    got: list[Answer] = []
    with opened(ledger, tmp_path, {"t": teacher}) as gateway, pytest.raises(TeacherDown) as caught:
        got.extend(gateway.ask(prompts(1000), stage="s", round=1))
    assert "refused" in str(caught.value)
    assert "5 answers are kept" in caught.value.what
    assert "Start its server" in caught.value.next
    assert sum(a.reply is None for a in got) <= line_module.CIRCUIT_AFTER  # then the circuit opened, and probes cost nobody a retry
    assert ledger.spent("r") == 5 * 42


def test_faults_between_answers_do_not_make_a_server_dead(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    def fail_the_next_of_an_even_one(question: str) -> str:
        if int(question.split()[1]) % 2 == 0:
            server.faults.append(Fault(500))
        return "x"

    server.answer = fail_the_next_of_an_even_one
    with opened(ledger, tmp_path, {"t": priced(server, retries=0, concurrency=1)}) as gateway:
        answers = asked(gateway, prompts(40))
    assert {int(a.call.ref) % 2 for a in answers if a.reply is None} == {1}
    assert sum(a.reply is None for a in answers) == 20


def test_a_budget_is_never_overshot_and_what_fits_is_asked(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    teacher = priced(server, concurrency=16)
    worst = estimate(prompts(1)[0], teacher).worst_micro_usd
    assert worst is not None
    assert worst > 1000
    budget = 5000
    overshot: list[int] = []
    server.latency_s = 0.002
    got: list[Answer] = []

    def watched(answers: Iterator[Answer]) -> Iterator[Answer]:
        for answer in answers:
            overshot.append(ledger.spent("r") - budget)
            yield answer

    with opened(ledger, tmp_path, {"t": teacher}, budget=budget) as gateway, pytest.raises(BudgetSpent) as caught:
        got.extend(watched(gateway.ask(prompts(500), stage="s", round=1)))
    assert max(overshot) <= 0
    assert server.most_in_flight <= budget // worst  # worst prices were reserved, so few may be in flight at once
    # What is left at the end is less than one more worst case: change was waited for, not given up.
    assert budget - worst < ledger.spent("r") <= budget
    assert len(got) == server.answered.total() == ledger.spent("r") // 42
    assert "Raise budget_usd" in str(caught.value)
    with opened(ledger, tmp_path, {"t": teacher}, budget=budget * 2) as gateway, pytest.raises(BudgetSpent):
        got = asked(gateway, prompts(500))
    assert ledger.spent("r") <= budget * 2
    assert max(server.answered.values()) == 1


def test_a_budget_stops_two_askers_and_neither_hangs(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    ends: list[BaseException] = []

    def ask(part: int) -> None:
        try:
            asked(gateway, [Call(teacher="t", prompt=f"{part} {n}") for n in range(200)])
        except BudgetSpent as error:
            ends.append(error)

    with opened(ledger, tmp_path, {"t": priced(server, concurrency=8)}, budget=4000) as gateway:
        threads = [threading.Thread(target=ask, args=(part,)) for part in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(ends) == 2
    assert ledger.spent("r") <= 4000


def test_lost_reservations_count_against_the_budget(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    from factory.ledger import Place, Question

    async def leave_open(dying: Ledger) -> None:
        entry = await dying.enter(Question.of(prompts(1)[0], ("x", "y")), Place("r", "s", 1, "t"), reserve=4500, budget=None)
        assert isinstance(entry, int)
        dying.sending(entry)

    with Ledger.open(tmp_path / "ledger.db") as dying:
        asyncio.run(leave_open(dying))
    with opened(ledger, tmp_path, {"t": priced(server)}, budget=5000) as gateway, pytest.raises(BudgetSpent):
        asked(gateway, prompts(1))
    assert not server.received


def test_an_unknown_price_and_a_budget_do_not_go_together(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    teacher = priced(server, price=None)
    with (
        opened(ledger, tmp_path, {"t": teacher}, budget=10**6) as gateway,
        pytest.raises(RunError, match="price of teacher 't' is unknown"),
    ):
        asked(gateway, prompts(1))
    with opened(ledger, tmp_path, {"t": teacher}) as gateway:
        [answer] = asked(gateway, prompts(1))
    assert answer.micro_usd is None  # unknown is not zero
    assert ledger.sums("run")[0].unpriced == 1


def test_an_iterator_that_is_closed_early_settles_what_was_sent_and_sends_no_more(
    server: MockServer, ledger: Ledger, tmp_path: Path
) -> None:
    server.latency_s = 0.02
    teachers: dict[str, Teacher] = {"t": priced(server, concurrency=4)}
    with opened(ledger, tmp_path, teachers) as gateway, closing(gateway.ask(prompts(100), stage="s", round=1)) as answers:
        next(answers)
    received = len(server.received)
    assert received <= 4 + 4
    [total] = ledger.sums("run")
    assert (total.settled, total.open, total.lost) == (received, 0, 0)


def test_an_interrupt_leaves_a_whole_ledger(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.latency_s = 0.02

    def ask_and_interrupt() -> None:
        with opened(ledger, tmp_path, {"t": priced(server, concurrency=4)}) as gateway:
            for n, _ in enumerate(gateway.ask(prompts(100), stage="s", round=1)):
                if n == 5:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_and_interrupt()
    [total] = ledger.sums("run")
    assert (total.settled, total.open, total.lost) == (server.answered.total(), 0, 0)


def test_what_does_not_arrive_in_time_at_the_end_is_lost_and_stays_reserved(
    server: MockServer, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "GRACE_S", 0.05)
    server.always = HANG
    ends: list[BaseException] = []

    def ask() -> None:
        try:
            asked(gateway, prompts(2))
        except RunError as error:
            ends.append(error)

    with Ledger.open(tmp_path / "ledger.db") as mine:
        with opened(mine, tmp_path, {"t": priced(server, timeout_s=0.5)}) as gateway:
            thread = threading.Thread(target=ask)
            thread.start()
            while len(server.received) < 2:
                time.sleep(0.005)
        thread.join(10)
        assert "stopped while it asked" in str(ends[0])
    worst = estimate(prompts(1)[0], priced(server)).worst_micro_usd
    assert [entry.reserved_micro_usd for entry in ledger.lost("r")] == [worst, worst]


def test_a_gateway_that_is_left_sends_no_more_for_other_threads(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.latency_s = 0.05
    ends: list[BaseException] = []

    def ask() -> None:
        try:
            asked(gateway, prompts(2000))
        except RunError as error:
            ends.append(error)

    with opened(ledger, tmp_path, {"t": priced(server, concurrency=2)}) as gateway:
        thread = threading.Thread(target=ask)
        thread.start()
        while len(server.received) < 10:
            time.sleep(0.005)
        so_far = len(server.received)
    sent = len(server.received)
    thread.join(10)
    assert "stopped while it asked" in str(ends[0])
    assert len(server.received) == sent <= so_far + 4
    [total] = ledger.sums("run")
    assert (total.settled, total.open, total.lost) == (sent, 0, 0)


def test_a_bug_in_a_teacher_reaches_the_caller_as_it_is(ledger: Ledger, tmp_path: Path) -> None:
    class Broken(Fake):
        def identity(self) -> tuple[str, str]:
            raise ZeroDivisionError

    with opened(ledger, tmp_path, {"t": Broken()}) as gateway, pytest.raises(ZeroDivisionError):
        asked(gateway, prompts(3))


def test_a_fault_in_the_callers_own_calls_reaches_the_caller(ledger: Ledger, tmp_path: Path) -> None:
    def source() -> Iterator[Call]:
        yield from prompts(3)
        raise LookupError("a template that fails")

    with opened(ledger, tmp_path, {"t": Fake()}) as gateway:
        with pytest.raises(LookupError):
            list(gateway.ask(source(), stage="s", round=1))
        assert len(asked(gateway, prompts(3))) == 3


def test_an_estimate_is_a_bound_in_tokens_and_exact_in_money() -> None:
    call = Call(teacher="t", messages=(Message(role="user", content="naïve 文字"),), params=Params(max_tokens=100))
    priced = Fake(price=Price(input_usd_per_mtok=0, output_usd_per_mtok=0.07))
    assert estimate(call, priced).worst_micro_usd == 7  # and not 8, as floats would have it
    assert estimate(call, priced).tokens_in_worst >= len("naïve 文字".encode())
    assert estimate(call, Fake()).worst_micro_usd == 0
    assert estimate(call, OpenAI(model="m")).worst_micro_usd is None
    typical = estimate(call, priced)
    assert typical.tokens_in < typical.tokens_in_worst
    assert typical.tokens_out < typical.tokens_out_worst == 100


@pytest.mark.parametrize("after", [1, 40, 120])
def test_kill_9_loses_no_settled_answer_and_repeats_none(after: int, server: MockServer, tmp_path: Path) -> None:
    server.latency_s = 0.005
    ledger_file = tmp_path / "ledger.db"
    command = [sys.executable, Path(__file__).with_name("ask_and_die.py"), ledger_file, f"{server.url}/v1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    handed_on = [process.stdout.readline() for _ in range(after)]
    os.kill(process.pid, signal.SIGKILL)
    handed_on += process.stdout.readlines()
    process.stdout.close()
    process.wait()
    with closing(sqlite3.connect(ledger_file)) as db:
        settled = {
            json_prompt for (json_prompt,) in db.execute("SELECT json_extract(request, '$.prompt') FROM calls WHERE answer IS NOT NULL")
        }
    assert {line.split("\t")[0] for line in handed_on if line.endswith("\n")} <= settled  # handed on only after the commit
    assert after <= len(settled) < 200
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert {question: answer for question, answer, _ in rows} == {f"question {n}": f"answer to question {n}" for n in range(200)}
    known = {question for question, _, fresh in rows if fresh == "False"}
    assert settled <= known  # and what had arrived and was not committed yet, from the spool
    assert all(server.answered[question] == 1 for question in known)
    assert max(server.answered.values()) <= 2  # what was in flight may have been answered, and is asked anew
    with Ledger.open(ledger_file) as ledger:
        [total] = ledger.sums("run")
        assert (total.settled, total.open) == (200, 0)
        assert total.lost <= 16


def test_what_arrives_broken_is_entered_as_paid_and_asked_again(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.faults.extend([CUT, GARBLE, ODD, RESET])
    with opened(ledger, tmp_path, {"t": priced(server)}) as gateway:
        [answer] = asked(gateway, prompts(1))
    assert answer.reply is not None
    record = ledger.get(answer.key)
    assert record is not None
    assert [entry.state for entry in record.entries] == ["lost"] * 4 + ["settled"]
    assert all(entry.error for entry in record.entries[:4])
    worst = estimate(prompts(1)[0], priced(server)).worst_micro_usd
    assert worst is not None
    assert ledger.spent("r") == 4 * worst + 42


def test_what_was_lost_on_its_way_counts_and_its_price_is_not_asked_for_beyond_the_budget(
    server: MockServer, ledger: Ledger, tmp_path: Path
) -> None:
    worst = estimate(prompts(1)[0], priced(server)).worst_micro_usd
    assert worst is not None
    server.always = GARBLE
    with opened(ledger, tmp_path, {"t": priced(server)}, budget=3 * worst + 1) as gateway, pytest.raises(BudgetSpent):
        asked(gateway, prompts(1))
    assert len(server.received) == 3
    assert ledger.spent("r") == 3 * worst


def test_in_a_storm_of_faults_every_row_comes_once(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    chance = random.Random(0)
    storm = [Fault(500)] * 20 + [RESET] * 5 + [GARBLE] * 3 + [CUT] * 1 + [HANG] * 1
    shares = [*storm, *[None] * 70]

    def strike(question: str) -> str:
        if (fault := chance.choice(shares)) is not None:
            server.faults.append(fault)
        return f"answer to {question}"

    server.answer = strike
    with opened(ledger, tmp_path, {"t": priced(server, concurrency=50, timeout_s=0.3)}) as gateway:
        answers = asked(gateway, prompts(400))
    assert {a.call.ref: a.reply.text for a in answers if a.reply} == {str(n): f"answer to question {n}" for n in range(400)}
    assert len(answers) == 400
    [total] = ledger.sums("run")
    assert total.settled == 400
    assert total.lost > 10  # what broke on its way is on the bill, and listed
    assert {entry.state for entry in ledger.lost("r")} == {"lost"}


def test_a_circuit_that_opened_closes_when_the_server_is_back(
    server: MockServer, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "PATIENCE_NEW_S", 60)
    monkeypatch.setattr(line_module, "PROBE_CAP_S", 0.02)
    server.faults.extend([Fault(500)] * 25)
    with opened(ledger, tmp_path, {"t": priced(server, retries=8, concurrency=1)}) as gateway:
        answers = asked(gateway, prompts(3))
    assert all(a.reply for a in answers)  # 25 faults are more than the retries of one call


def test_a_fallback_stands_in_while_a_teacher_is_down_and_what_it_said_is_not_asked_again(
    server: MockServer, ledger: Ledger, tmp_path: Path
) -> None:
    with MockServer() as gone:
        down = priced(gone, fallback="big", concurrency=4)
    teachers: dict[str, Teacher] = {"t": down, "big": priced(server, model="big")}
    with opened(ledger, tmp_path, teachers) as gateway:
        answers = asked(gateway, prompts(40))
        tally = gateway.snapshot()
    assert all(a.reply for a in answers)
    assert {a.teacher for a in answers} == {"big"}
    assert {a.call.teacher for a in answers} == {"t"}
    assert {s.name: s.settled for s in ledger.sums("teacher")} == {"big": 40, "t": 0}
    assert (tally.answered, tally.failed) == (40, 0)
    with opened(ledger, tmp_path, teachers, run="again") as gateway:
        again = asked(gateway, prompts(40))
    assert not any(a.fresh for a in again)
    assert server.answered.total() == 40


def test_a_fallback_that_is_down_as_well_ends_the_run(ledger: Ledger, tmp_path: Path) -> None:
    with MockServer() as gone:
        teachers: dict[str, Teacher] = {"t": priced(gone, fallback="big"), "big": priced(gone, model="big", fallback="t")}
    with opened(ledger, tmp_path, teachers) as gateway, pytest.raises(TeacherDown, match="big"):
        asked(gateway, prompts(40))


def test_several_servers_and_keys_of_a_model_share_the_load(
    server: MockServer, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_A", "a")
    monkeypatch.setenv("KEY_B", "b")
    with MockServer(latency_s=0.01) as second:
        server.latency_s = 0.01
        addresses = [f"{server.url}/v1", f"{second.url}/v1"]
        teacher = priced(server, base_url=addresses, api_key_env=["KEY_A", "KEY_B"], provider="both", concurrency=2)
        with opened(ledger, tmp_path, {"t": teacher}) as gateway:
            assert all(a.reply for a in asked(gateway, prompts(100)))
        keys = Counter(headers["authorization"] for _, headers, _ in [*server.received, *second.received])
        assert server.answered.total() + second.answered.total() == 100
        assert min(server.answered.total(), second.answered.total()) > 25
        assert min(keys["Bearer a"], keys["Bearer b"]) > 25
        assert max(server.most_in_flight, second.most_in_flight) <= 4


def test_a_key_that_is_refused_leaves_the_work_to_the_others(
    server: MockServer, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_A", "a")
    monkeypatch.setenv("KEY_B", "b")
    server.refused_keys = {"a"}
    teacher = priced(server, api_key_env=["KEY_A", "KEY_B"], concurrency=2)
    with opened(ledger, tmp_path, {"t": teacher}) as gateway:
        assert all(a.reply for a in asked(gateway, prompts(30)))
    assert server.answered.total() == 30


def test_two_stages_that_ask_at_once_are_served_in_turn(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.latency_s = 0.002
    order: list[str] = []
    server.answer = lambda question: order.append(question.split()[0]) or "x"  # type: ignore[func-returns-value]
    with opened(ledger, tmp_path, {"t": priced(server, concurrency=4)}) as gateway:
        first = gateway.ask((Call(teacher="t", prompt=f"a {n}") for n in range(200)), stage="a", round=1)
        next(first)  # it has the line for itself, with all its calls ahead
        threads = [threading.Thread(target=lambda: list(first))]
        threads += [threading.Thread(target=asked, args=(gateway, [Call(teacher="t", prompt=f"b {n}") for n in range(100)]))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    while_both = order[order.index("b") : len(order) - order[::-1].index("b")]
    assert 0.35 < while_both.count("b") / len(while_both) < 0.65


def test_a_straggler_holds_up_nobody(server: MockServer, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "GRACE_S", -30.0)
    server.faults.append(HANG)  # thirty seconds, which nobody waits for
    with (
        opened(ledger, tmp_path, {"t": priced(server, concurrency=2, timeout_s=30)}) as gateway,
        closing(gateway.ask(prompts(60), stage="s", round=1)) as answers,
    ):
        assert len([next(answers) for _ in range(59)]) == 59


def test_a_teacher_that_waits_leaves_the_others_at_work(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    """Calls for a slow teacher come first and in numbers; the quick one's behind them must not wait for its slots."""
    with MockServer(latency_s=0.2) as slow:
        teachers: dict[str, Teacher] = {"slow": priced(slow, model="slow", concurrency=1), "t": priced(server, concurrency=4)}
        calls = [*prompts(30, "slow"), *prompts(100)]
        with opened(ledger, tmp_path, teachers) as gateway, closing(gateway.ask(calls, stage="s", round=1)) as answers:
            first = [next(answers).call.teacher for _ in range(90)]
    assert first.count("t") > 70


def test_two_gateways_that_ask_the_same_at_once_pay_once(server: MockServer, tmp_path: Path) -> None:
    server.latency_s = 0.05
    got: dict[str, list[Answer]] = {}

    def ask(run: str) -> None:
        with Ledger.open(tmp_path / "ledger.db") as ledger, opened(ledger, tmp_path, {"t": priced(server)}, run=run) as gateway:
            got[run] = asked(gateway, prompts(20))

    threads = [threading.Thread(target=ask, args=(f"run-{n}",)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.answered.total() == 20
    assert {len(answers) for answers in got.values()} == {20}
    assert sum(a.fresh for answers in got.values() for a in answers) == 20


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}


def structured(n: int = 1) -> list[Call]:
    return [Call(teacher="t", messages=(Message(role="user", content=f"how old is {i}?"),), json_schema=SCHEMA) for i in range(n)]


def test_an_answer_that_can_be_mended_is(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.answer = lambda question: "Sure!\n```json\n{'age': 7,}\n```"
    with opened(ledger, tmp_path, {"t": priced(server)}) as gateway:
        [answer] = asked(gateway, structured())
    assert answer.reply is not None
    assert answer.reply.text == '{"age":7}'
    assert len(server.received) == 1


def test_an_answer_that_does_not_fit_is_corrected_once(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.answer = lambda question: '{"age": 7}' if "age" in question else '{"years": 7}'
    for fresh in (True, False):
        with opened(ledger, tmp_path, {"t": priced(server)}) as gateway:
            [answer] = asked(gateway, structured())
        assert answer.reply is not None
        assert (answer.reply.text, answer.fresh) == ('{"age":7}', fresh)
    assert len(server.received) == 2
    assert answer.micro_usd == ledger.spent("r")  # the money of both


def test_an_answer_that_never_fits_is_a_failure_with_its_reason(server: MockServer, ledger: Ledger, tmp_path: Path) -> None:
    server.answer = lambda question: '{"age": "seven"}'
    with opened(ledger, tmp_path, {"t": priced(server)}) as gateway:
        [answer] = asked(gateway, structured())
    assert answer.reply is None
    assert answer.error is not None
    assert answer.error.startswith("not of the schema: ")
    assert "integer" in answer.error
    assert len(server.received) == 2


def test_an_answer_that_fits_no_schema_is_asked_for_again_only_when_that_is_wanted(
    server: MockServer, ledger: Ledger, tmp_path: Path
) -> None:
    def ask(*, retry_failed: bool) -> Answer:
        with Gateway({"t": priced(server)}, ledger, home=tmp_path, run="r", budget_micro_usd=None, retry_failed=retry_failed) as gateway:
            [answer] = asked(gateway, structured())
        return answer

    server.answer = lambda question: "I won't say."
    assert ask(retry_failed=False).reply is None
    assert ask(retry_failed=False).reply is None
    assert len(server.received) == 2  # the question and its correction, once
    assert ask(retry_failed=True).reply is None
    assert len(server.received) == 4  # another draw
    server.answer = lambda question: '{"age": 7}'
    right = ask(retry_failed=True)
    assert right.reply is not None
    assert (right.reply.text, right.call, len(server.received)) == ('{"age":7}', structured()[0], 5)
    again = ask(retry_failed=False)  # what was bought is used from then on
    assert (again.reply, again.key, again.fresh, len(server.received)) == (right.reply, right.key, False, 5)
    record = ledger.get(right.key)
    assert record is not None
    assert record.answer is not None
    assert record.answer.reply.text == '{"age": 7}'  # the key is that of the question which was answered so


def test_what_was_refused_and_waits_is_not_called_lost_when_its_process_dies(server: MockServer, tmp_path: Path) -> None:
    server.always = Fault(429, headers={"Retry-After": "600"})
    script = (
        "import os, sys, threading, time; from pathlib import Path\n"
        "from factory.gateway import Gateway; from factory.ledger import Ledger\n"
        "from generators.teachers.openai import OpenAI; from schemas.call import Call\n"
        "teacher = OpenAI(model='m', base_url=sys.argv[2], provider='p')\n"
        "ledger = Ledger.open(Path(sys.argv[1]))\n"
        "gateway = Gateway({'t': teacher}, ledger, home=Path(sys.argv[1]).parent, run='r', budget_micro_usd=None).__enter__()\n"
        "ask = lambda: list(gateway.ask([Call(teacher='t', prompt='q')], stage='s', round=1))\n"
        "threading.Thread(target=ask, daemon=True).start()\n"
        "while not gateway.snapshot().asked or gateway.snapshot().in_flight or not ledger._spool or ledger._in_flight: time.sleep(0.05)\n"
        "while not ledger._open: time.sleep(0.05)\n"
        "time.sleep(0.3); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "ledger.db", f"{server.url}/v1"], check=False, timeout=60)
    assert done.returncode == -9
    assert len(server.received) == 1
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        [total] = ledger.sums("run")
        assert (total.failed, total.lost, total.open) == (1, 0, 0)


def test_an_interrupt_does_not_wait_for_a_connection_that_is_still_being_opened(ledger: Ledger, tmp_path: Path) -> None:
    class Slow(Fake):
        @asynccontextmanager
        async def connect(self, home: Path) -> AsyncIterator[Connection]:
            began.set()
            await asyncio.sleep(3600)
            yield None  # type: ignore[misc]

    began, ends = threading.Event(), []

    def ask() -> None:
        try:
            asked(gateway, prompts(3))
        except RunError as error:
            ends.append(error)

    with opened(ledger, tmp_path, {"t": Slow()}) as gateway:
        thread = threading.Thread(target=ask)
        thread.start()
        assert began.wait(10)
    thread.join(10)
    assert "stopped while it asked" in str(ends[0])
    [total] = ledger.sums("run")
    assert (total.failed, total.lost, total.open) == (3, 0, 0)  # nothing was sent

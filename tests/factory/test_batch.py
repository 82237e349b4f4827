import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from factory import batch as batch_module
from factory.errors import BudgetSpent, RunError, TeacherDown
from factory.gateway import Gateway, estimate
from factory.ledger import Ledger
from factory.teacher import Price, Teacher
from generators.teachers.anthropic import Anthropic
from generators.teachers.openai import OpenAI
from schemas.call import Answer, Call
from schemas.sample import Message
from tests.batch_server import BatchServer
from tests.factory.postgres import fresh_database

KINDS = ["openai", "anthropic"]


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as server:
        yield server


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        yield ledger


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "QUIET_S", 0.03)
    monkeypatch.setattr(batch_module, "PAUSE_S", 0.001)


def teacher(kind: str, url: str, **settings: Any) -> Teacher:
    price = Price(input_usd_per_mtok=2, output_usd_per_mtok=20)
    given = {"model": "m", "price": price, "mode": "batch", "poll_s": 0.02, "params": {"max_tokens": 100}, **settings}
    if kind == "anthropic":
        return Anthropic.model_validate({**given, "base_url": url})
    return OpenAI.model_validate({**given, "base_url": f"{url}/v1"})


def opened(ledger: Ledger, tmp_path: Path, one: Teacher, *, run: str = "r", budget: int | None = None) -> Gateway:
    return Gateway({"t": one}, ledger, home=tmp_path, run=run, budget_micro_usd=budget)


def questions(count: int, first: int = 0) -> list[Call]:
    return [Call(teacher="t", messages=(Message(role="user", content=f"question {n}"),), ref=str(n)) for n in range(first, first + count)]


def asked(gateway: Gateway, calls: list[Call]) -> list[Answer]:
    return list(gateway.ask(calls, stage="01-test", round=1))


def texts(answers: list[Answer]) -> dict[str, str]:
    return {a.call.ref: a.reply.text for a in answers if a.reply}


def right(count: int, first: int = 0) -> dict[str, str]:
    return {str(n): f"answer to\u2028question {n}" for n in range(first, first + count)}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def stopped(gateway: Gateway, calls: list[Call]) -> None:
    with pytest.raises(RunError, match="the run was stopped while it asked"):
        asked(gateway, calls)


def leave_in_the_middle(ledger: Ledger, tmp_path: Path, one: Teacher, server: BatchServer, calls: list[Call]) -> None:
    """A gateway that is left while its batch is worked on."""
    server.held = True
    with opened(ledger, tmp_path, one) as gateway:
        thread = threading.Thread(target=stopped, args=(gateway, calls))
        thread.start()
        until(lambda: gateway.snapshot().asked == len(calls) and "0 of" in gateway.snapshot().paces["t"])
    thread.join()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_answered_at_half_the_price(kind: str, server: BatchServer, ledger: Ledger, tmp_path: Path) -> None:
    with opened(ledger, tmp_path, teacher(kind, server.url)) as gateway:
        answers = asked(gateway, questions(30))
        tally = gateway.snapshot()
    assert texts(answers) == right(30)
    assert all(a.fresh and a.micro_usd == (2 * 2 + 4 * 20) / 2 for a in answers)
    assert (tally.asked, tally.answered, tally.in_flight, tally.micro_usd, tally.tokens_out) == (30, 30, 0, 30 * 42, 120)
    assert ledger.spent("r") == 30 * 42
    assert len(server.batches) == 1
    with opened(ledger, tmp_path, teacher(kind, server.url, mode="live")) as gateway:
        assert texts(asked(gateway, questions(30))) == right(30)
    assert server.questions.total() == 30


def test_batches_are_as_large_as_they_may_be_and_of_one_form(server: BatchServer, ledger: Ledger, tmp_path: Path) -> None:
    raw = [Call(teacher="t", prompt=f"question {n}", ref=str(n)) for n in range(20, 25)]
    with opened(ledger, tmp_path, teacher("openai", server.url, batch_size=10)) as gateway:
        assert texts(asked(gateway, questions(20) + raw)) == right(25)
    assert [len(batch.asked) for batch in server.batches] == [10, 10, 5]
    assert server.batches[-1].endpoint == "/v1/completions"


@pytest.mark.parametrize("moment", ["marked", "submitted", "kept"])
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_around_a_submission_asks_nothing_twice(kind: str, moment: str, server: BatchServer, tmp_path: Path) -> None:
    for n in range(3) if moment == "submitted" else ():  # others' batches, to be told from ours, over more than a page
        with Ledger.open(tmp_path / f"{n}.db") as other, opened(other, tmp_path, teacher(kind, server.url)) as gateway:
            asked(gateway, questions(30, 1000 * (n + 1)))
    before = len(server.batches)
    command = [sys.executable, "-m", "tests.factory.submit_and_die", str(tmp_path), kind, server.url, moment]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert len(server.batches) - before == (moment != "marked")
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        assert not ledger.lost()
        with opened(ledger, tmp_path, teacher(kind, server.url)) as gateway:
            assert texts(asked(gateway, questions(30))) == right(30)
        [total] = ledger.sums("run")
        assert (total.settled, total.failed, total.lost, total.open) == (30, 30 * (moment == "marked"), 0, 0)
        assert ledger.spent("r") == 30 * 42
    assert len(server.batches) - before == 1
    assert set(server.questions.values()) == {1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["batch", "live"])
def test_a_gateway_that_is_left_does_not_wait_and_the_next_attaches(kind: str, mode: str, server: BatchServer, tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        leave_in_the_middle(ledger, tmp_path, teacher(kind, server.url), server, questions(20))
        assert ledger.spent("r") > 20 * 42  # still reserved
    with Ledger.open(tmp_path / "ledger.db") as ledger, opened(ledger, tmp_path, teacher(kind, server.url, mode=mode)) as gateway:
        threading.Timer(0.1, setattr, (server, "held", False)).start()
        assert texts(asked(gateway, questions(10))) == right(10)  # and nobody asks for the others
        until(lambda: ledger.sums("run")[0].open == 0)
        assert (ledger.sums("run")[0].settled, ledger.spent("r")) == (20, 20 * 42)
    assert server.questions.total() == 20


def test_a_batch_is_attached_from_a_ledger_in_postgresql(server: BatchServer, tmp_path: Path) -> None:
    url, one = fresh_database(), teacher("openai", server.url)
    with Ledger.open(url, spools=tmp_path / "spool") as ledger:
        leave_in_the_middle(ledger, tmp_path, one, server, questions(10))
    server.held = False
    with Ledger.open(url, spools=tmp_path / "spool") as ledger, opened(ledger, tmp_path, one) as gateway:
        assert texts(asked(gateway, questions(10))) == right(10)
        assert (ledger.sums("run")[0].settled, ledger.spent("r"), ledger.lost()) == (10, 10 * 42, [])
    assert set(server.questions.values()) == {1}


def test_two_gateways_of_one_ledger_follow_each_other(server: BatchServer, ledger: Ledger, tmp_path: Path) -> None:
    one = teacher("openai", server.url)
    for _ in range(2):  # the second waits for the first one's batch, and is left too
        leave_in_the_middle(ledger, tmp_path, one, server, questions(10))
    server.held = False
    with opened(ledger, tmp_path, one) as gateway:
        assert texts(asked(gateway, questions(10))) == right(10)
    assert server.questions.total() == 10


@pytest.mark.parametrize("kind", KINDS)
def test_two_at_once_ask_one_question_once(kind: str, server: BatchServer, tmp_path: Path) -> None:
    answers: list[Answer] = []
    server.held = True

    def work() -> None:
        with Ledger.open(tmp_path / "ledger.db") as ledger, opened(ledger, tmp_path, teacher(kind, server.url)) as gateway:
            answers.extend(asked(gateway, questions(20)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: server.questions.total() == 20 and server.looks > 5)
    server.held = False
    for thread in threads:
        thread.join()
    assert len(answers) == 40 and texts(answers) == right(20)
    assert sum(a.fresh for a in answers) == 20
    assert set(server.questions.values()) == {1}


def test_a_batch_of_one_that_died_meanwhile_is_taken_over(server: BatchServer, tmp_path: Path) -> None:
    server.held = True
    answers: list[Answer] = []
    one = teacher("openai", server.url)
    first, second = Ledger.open(tmp_path / "ledger.db"), Ledger.open(tmp_path / "ledger.db")
    with second, opened(second, tmp_path, one) as gateway:
        leave_in_the_middle(first, tmp_path, one, server, questions(10))
        thread = threading.Thread(target=lambda: answers.extend(asked(gateway, questions(10))))
        thread.start()
        first.close()
        server.held = False
        thread.join()
    assert texts(answers) == right(10)
    assert set(server.questions.values()) == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_what_expired_or_failed_is_asked_again_and_what_is_refused_is_not(
    kind: str, server: BatchServer, ledger: Ledger, tmp_path: Path
) -> None:
    def end(question: str, nth: int) -> Any:
        number = int(question.split()[1])
        return "bad" if number == 0 else "expired" if number < 5 and nth == 1 else "busy" if number < 8 and nth < 3 else "ok"

    server.ends = end
    with opened(ledger, tmp_path, teacher(kind, server.url)) as gateway:
        answers = asked(gateway, questions(10))
    assert texts(answers) == right(9, 1)
    [refused] = [a for a in answers if a.reply is None]
    assert refused.call.ref == "0" and "planned" in (refused.error or "")
    assert [server.questions[f"question {n}"] for n in range(10)] == [1, 3, 3, 3, 3, 3, 3, 3, 1, 1]
    assert ledger.spent("r") == 9 * 42 and not ledger.lost()


def test_what_expires_for_ever_is_given_up(server: BatchServer, ledger: Ledger, tmp_path: Path) -> None:
    server.ends = lambda question, nth: "expired"
    with opened(ledger, tmp_path, teacher("openai", server.url, retries=2)) as gateway:
        [answer] = asked(gateway, questions(1))
    assert answer.reply is None and "before this was asked" in (answer.error or "")
    assert server.questions.total() == 3 and ledger.spent("r") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_submission_whose_answer_never_came_is_found(kind: str, server: BatchServer, ledger: Ledger, tmp_path: Path) -> None:
    server.breaks.extend([503, True])
    server.held = True
    threading.Timer(0.3, setattr, (server, "held", False)).start()
    with opened(ledger, tmp_path, teacher(kind, server.url)) as gateway:
        assert texts(asked(gateway, questions(10))) == right(10)
    assert len(server.batches) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_submission_takes_the_teacher_down(kind: str, server: BatchServer, ledger: Ledger, tmp_path: Path) -> None:
    server.breaks.append(401)
    with opened(ledger, tmp_path, teacher(kind, server.url)) as gateway, pytest.raises(TeacherDown, match="planned 401"):
        asked(gateway, questions(10))
    assert (ledger.spent("r"), ledger.sums("run")[0].open) == (0, 0)


def test_a_full_queue_is_waited_for_and_costs_no_retry(server: BatchServer, ledger: Ledger, tmp_path: Path) -> None:
    server.refuses.extend(["token_limit_exceeded"] * 3)
    with opened(ledger, tmp_path, teacher("openai", server.url, retries=0)) as gateway:
        assert texts(asked(gateway, questions(3))) == right(3)
    server.refuses.append("invalid_model")
    with opened(ledger, tmp_path, teacher("openai", server.url)) as gateway, pytest.raises(TeacherDown, match="the batch was refused"):
        asked(gateway, questions(3, 3))


def test_a_batch_that_the_provider_forgot_is_lost_and_asked_anew(server: BatchServer, tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        leave_in_the_middle(ledger, tmp_path, teacher("openai", server.url), server, questions(5))
    server.batches.clear()
    server.held = False
    with Ledger.open(tmp_path / "ledger.db") as ledger, opened(ledger, tmp_path, teacher("openai", server.url)) as gateway:
        assert texts(asked(gateway, questions(5))) == right(5)
        assert len(ledger.lost()) == 5


def test_what_was_not_submitted_yet_costs_nothing(
    server: BatchServer, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "QUIET_S", 60)
    with opened(ledger, tmp_path, teacher("openai", server.url)) as gateway:
        thread = threading.Thread(target=stopped, args=(gateway, questions(5)))
        thread.start()
        until(lambda: gateway.snapshot().paces["t"] == "5 collected for a batch")
    thread.join()
    assert (ledger.sums("run")[0].failed, ledger.spent("r"), server.batches) == (5, 0, [])


def test_a_budget_that_an_old_batch_holds_is_waited_for(server: BatchServer, ledger: Ledger, tmp_path: Path) -> None:
    one = teacher("openai", server.url)
    leave_in_the_middle(ledger, tmp_path, one, server, questions(5))
    held = ledger.spent("r")
    with opened(ledger, tmp_path, one, budget=held) as gateway:
        threading.Timer(0.2, setattr, (server, "held", False)).start()
        assert texts(asked(gateway, questions(1, 5))) == right(1, 5)
    assert held > ledger.spent("r") == 6 * 42


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_holds_for_batches(kind: str, server: BatchServer, ledger: Ledger, tmp_path: Path) -> None:
    one = teacher(kind, server.url, params={"max_tokens": 8})
    worst = estimate(questions(1)[0], one).worst_micro_usd
    live = estimate(questions(1)[0], one, batch=False).worst_micro_usd
    assert worst and live == 2 * worst
    with opened(ledger, tmp_path, one, budget=3 * worst) as gateway, pytest.raises(BudgetSpent):
        asked(gateway, questions(20))
    assert 3 * worst >= ledger.spent("r") > 2 * worst
    assert server.questions.total() == ledger.spent("r") / 42


def test_a_plan_shows_batches_against_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from factory.plan import plan_table
    from factory.recipe import load_recipe

    monkeypatch.setenv("OPENAI_API_KEY", "x")
    seed = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "greeting"}]}\n'
    (tmp_path / "seeds.jsonl").write_text(seed)
    (tmp_path / "recipe.yaml").write_text(
        "name: tiny\ntarget: {accepted: 1000}\n"
        "teachers:\n  big: {kind: openai, model: m, price: {input_usd_per_mtok: 100, output_usd_per_mtok: 1000}}\n"
        "stages:\n  - seeds: {path: seeds.jsonl}\n  - compose: {teachers: [big]}\n"
    )
    console = Console(width=200)
    with console.capture() as shown:
        console.print(plan_table(load_recipe(tmp_path), tmp_path / "mill"))
    found = re.search(r"big: \$([\d.]+) in batches against \$([\d.]+) live; batches take up to 24 hours a round", shown.get())
    assert found, shown.get()
    assert float(found[1]) == pytest.approx(float(found[2]) / 2, abs=0.01)

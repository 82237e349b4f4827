"""What a plan foresees: the rounds in numbers, and a probe's questions against a real server, which the run then need not ask again."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from factory.errors import BudgetSpent, GristmillError, RunError, TeacherDown
from factory.forecast import Answered, Asks, Had, Lane, Novelty, Outlook, Sieve, Source, forecast, pass_rates
from factory.ledger import open_ledger
from factory.plan import make_plan, plan_table
from factory.probe import choose, first_round, probe
from factory.recipe import Recipe, load_recipe
from factory.records import RunFolder
from factory.run import run
from tests.mock_server import Fault, MockServer

SEEDS = Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl"

RECIPE = """\
name: task
target: {{accepted: 60, balance: label{budget}}}
teachers:
  small: {{kind: openai, model: m, base_url: "{url}/v1", provider: here, retries: 1, concurrency: 4{price}}}
stages:
  - seeds: {{path: seeds.jsonl}}
  - compose: {{per_call: 3, teachers: [small]}}
  - exact: {{}}
"""
PRICE = ", price: {input_usd_per_mtok: 1, output_usd_per_mtok: 10}"


def recipe(folder: Path, server: MockServer, *, price: str = PRICE, budget: str = "", text: str = RECIPE, more: str = "") -> Recipe:
    task = folder / "task"
    task.mkdir(exist_ok=True)
    (task / "seeds.jsonl").write_bytes(SEEDS.read_bytes())
    (task / "recipe.yaml").write_text(text.format(url=server.url, price=price, budget=budget) + more)
    return load_recipe(task)


class Writer:
    """Answers of three new messages each, of which a share of `bad` is empty; a judge's questions get a score."""

    def __init__(self, bad: float = 0.0) -> None:
        self.bad, self.n = bad, itertools.count()

    def __call__(self, question: str) -> str:
        if "The rubric" in question:
            return json.dumps({"evidence": "so it is", "score": 5})
        n = next(self.n)
        if zlib.crc32(question.encode()) % 100 < 100 * self.bad:  # by the question, whatever the order of arrival
            return "no list at all"
        return json.dumps([f"message {n} of number {i} and so many words more" for i in range(3)])


@pytest.fixture
def server() -> Iterator[MockServer]:
    with MockServer(answer=Writer()) as server:
        yield server


def shown(recipe: Recipe, home: Path, asking: int | None = None) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(plan_table(recipe, home, asking=asking))
        return console.export_text()


# A probe


def test_a_plan_asks_and_writes_nothing(tmp_path: Path, server: MockServer) -> None:
    plan = make_plan(recipe(tmp_path, server), tmp_path / "mill")
    assert not server.received and not (tmp_path / "mill").exists()
    assert [(e.stage, e.teacher) for e in plan.estimates] == [("02-compose", "small")]
    assert plan.estimates[0].calls >= 40  # 60 rows at 3 a call, half of which pass
    assert plan.estimates[0].micro_usd_span is None


def test_a_probe_asks_so_many_questions_which_the_run_does_not_ask_again(tmp_path: Path, server: MockServer) -> None:
    mine, home = recipe(tmp_path, server), tmp_path / "mill"
    plan = make_plan(mine, home, asking=12)
    assert server.answered.total() == plan.probed.calls == 12  # type: ignore[union-attr]
    make_plan(mine, home, asking=12)
    assert server.answered.total() == 12, "a second plan asks nothing new"
    folder = run(mine, home, view="quiet")
    assert folder.status["status"] == "done"
    assert max(server.answered.values()) == 1
    generator = next(stage for stage in folder.stages if stage["stage"] == "02-compose")
    assert generator["from_ledger"] == 12, "the run's questions are the probe's"
    low, middle, high = plan.forecast.calls
    assert low <= server.answered.total() <= high and middle == 40
    with open_ledger(home, read_only=True) as ledger:
        bill = ledger.spent(mine.run_folder(home).name)
    assert plan.forecast.micro_usd is not None
    assert plan.forecast.micro_usd.low <= bill <= plan.forecast.micro_usd.high
    assert bill == pytest.approx(plan.forecast.micro_usd.middle, rel=0.05)


def test_a_probe_foresees_the_rounds_that_losses_make(tmp_path: Path) -> None:
    with MockServer(answer=Writer(bad=0.5)) as server:
        mine, home = recipe(tmp_path, server), tmp_path / "mill"
        (tmp_path / "task" / "recipe.yaml").write_text((tmp_path / "task" / "recipe.yaml").read_text().replace("60", "90"))
        mine = load_recipe(tmp_path / "task")
        plan = make_plan(mine, home, asking=20)
        run(mine, home, view="quiet")
        low, middle, high = plan.forecast.calls
        assert low <= server.answered.total() <= high
        assert middle == pytest.approx(server.answered.total(), rel=0.15)


def test_a_judge_is_asked_about_the_probes_samples_and_counted(tmp_path: Path, server: MockServer) -> None:
    text = RECIPE.replace(
        "stages:",
        "  critic: {{kind: openai, model: j, base_url: '{url}/v1', price: {{input_usd_per_mtok: 5, output_usd_per_mtok: 5}}}}\nstages:",
    )
    mine = recipe(tmp_path, server, text=text, more="  - judge: {rubric: label_fits, teachers: [critic]}\n")
    plan = make_plan(mine, tmp_path / "mill", asking=10)
    assert plan.probed and plan.probed.calls == server.answered.total() == 10 + 30
    by_stage = {e.stage: e for e in plan.estimates}
    assert by_stage["04-judge"].teacher == "critic"
    assert by_stage["04-judge"].calls == pytest.approx(120, rel=0.1)
    assert by_stage["02-compose"].calls == 40
    run(mine, tmp_path / "mill", view="quiet")
    assert server.answered.total() == 160
    blind = {e.stage: e.calls for e in make_plan(mine, tmp_path / "new").estimates}
    assert blind["04-judge"] == 3 * blind["02-compose"]


def test_an_unknown_price_is_unknown(tmp_path: Path, server: MockServer) -> None:
    mine = recipe(tmp_path, server, price="")
    assert make_plan(mine, tmp_path / "mill", asking=5).forecast.micro_usd is None
    assert "cost unknown" in shown(mine, tmp_path / "mill", 5)
    assert "cost unknown" in shown(mine, tmp_path / "new")


def test_a_plan_says_when_the_budget_ends_it(tmp_path: Path, server: MockServer) -> None:
    mine, home = recipe(tmp_path, server, budget=", budget_usd: 0.012"), tmp_path / "mill"
    plan = make_plan(mine, home, asking=10)
    assert plan.forecast.ends == {"budget": 1.0}
    assert plan.forecast.rows_at_budget and 0 < plan.forecast.rows_at_budget.middle < 60
    assert plan.forecast.micro_usd and plan.forecast.micro_usd.high <= 12_000
    assert "the budget ends it first in 100% of the simulated runs, at " in shown(mine, home, 10)
    assert server.answered.total() == 10


def test_a_probe_that_the_budget_does_not_hold_says_so(tmp_path: Path, server: MockServer) -> None:
    with pytest.raises(BudgetSpent):
        make_plan(recipe(tmp_path, server, budget=", budget_usd: 0.0001"), tmp_path / "mill", asking=10)
    assert not server.received


def test_what_other_runs_paid_for_is_not_on_the_bill(tmp_path: Path, server: MockServer) -> None:
    home = tmp_path / "mill"
    run(recipe(tmp_path, server), home, view="quiet")
    other = recipe(tmp_path, server, text=RECIPE.replace("accepted: 60", "accepted: 61"))  # another run, which asks much the same
    plan = make_plan(other, home, asking=10)
    assert plan.probed and plan.probed.known >= 9
    assert plan.forecast.micro_usd is not None
    full = make_plan(other, tmp_path / "new", asking=10).forecast.micro_usd
    assert full is not None and plan.forecast.micro_usd.middle < 0.3 * full.middle


@pytest.mark.parametrize(("fault", "error"), [(Fault(status=401), TeacherDown), (Fault(status=400), RunError)])
def test_a_probe_that_fails_says_why(tmp_path: Path, server: MockServer, fault: Fault, error: type[Exception]) -> None:
    server.always = fault
    with pytest.raises(error, match=str(fault.status)):
        make_plan(recipe(tmp_path, server), tmp_path / "mill", asking=5)


def test_a_probe_that_is_interrupted_keeps_what_was_answered(tmp_path: Path, server: MockServer) -> None:
    server.latency_s = 0.1
    mine, home = recipe(tmp_path, server), tmp_path / "mill"
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        """In the middle, however fast the machine is."""
        while not server.answered:
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        make_plan(mine, home, asking=30)
    watcher.join()
    assert 0 < server.answered.total() < 30
    server.latency_s = 0
    make_plan(mine, home, asking=30)
    assert server.answered.total() == 30 and max(server.answered.values()) == 1


def test_the_table_shows_intervals_and_what_the_probe_cost(tmp_path: Path) -> None:
    with MockServer(answer=Writer(bad=0.25)) as server:
        text = shown(recipe(tmp_path, server), tmp_path / "mill", 10)
    assert "in all: cost $0.0" in text and " to " in text
    assert "the probe asked 10 calls for $0.0" in text
    assert "40 seeds of 10 labels" in text


def test_questions_are_spread_over_labels_and_teachers(tmp_path: Path, server: MockServer) -> None:
    text = RECIPE.replace("stages:", "  other: {{kind: fake}}\nstages:").replace("[small]", "[small, other]")
    questions = first_round(recipe(tmp_path, server, text=text)).questions
    chosen = choose(questions, 20, seed=0)
    assert len({question.key for question in chosen}) == 20
    assert Counter(question.place for question in chosen) == dict.fromkeys(range(10), 2)
    assert sorted(Counter(question.call.teacher for question in chosen).values()) == [10, 10]
    assert choose(questions, 20, seed=0) == chosen != choose(questions, 20, seed=1)
    assert len(choose(questions, 1000, seed=0)) == len(questions)


def test_draws_of_one_prompt_are_probed_after_other_prompts(tmp_path: Path, server: MockServer) -> None:
    questions = first_round(recipe(tmp_path, server, text=RECIPE.replace("per_call: 3", "per_call: 1, draws: 4"))).questions
    chosen = choose(questions, 20, seed=0)
    assert len({question.call.messages for question in chosen}) == 20


def test_a_plan_learns_from_the_last_run_of_its_name_by_label(tmp_path: Path) -> None:
    def answer(question: str) -> str:
        n = next(count)
        good = "cancel transfer" not in question.split("Write")[0]
        return json.dumps([f"message {n} number {i} {'is quite fine' if good or i == 0 else 'xxxx'}" for i in range(3)])

    count = itertools.count()
    with MockServer(answer=answer) as server:
        mine, home = recipe(tmp_path, server, more="  - rules: {forbid: [xxxx]}\n"), tmp_path / "mill"
        before = make_plan(mine, home)
        run(mine, home, view="quiet")
        plan = make_plan(mine, home)
        assert "by label" in plan.assumptions[-1] or any("by label" in each for each in plan.assumptions)
        assert plan.forecast.calls.middle < before.forecast.calls.middle
        assert plan.forecast.calls.middle == pytest.approx(server.answered.total(), abs=2)


# The rounds in numbers


def answered(**more: float | None) -> Answered:
    known: dict[str, float | None] = {"tokens_in": 100, "tokens_out": 50, "micro_usd": 20, "seconds": 1, "items": 5}
    return Answered(place=None, size=400, **(known | more))  # type: ignore[arg-type]


PREFERENCES = """\
name: task
target: {{accepted: 40, quotas: {{kind: {{preference: 0.25}}, tone: {{angry: 0.5}}}}{budget}}}
teachers:
  small: {{kind: openai, model: m, base_url: "{url}/v1", provider: here{price}}}
stages:
  - seeds: {{path: seeds.jsonl}}
  - compose: {{per_call: 1, axes: {{tone: [angry, calm]}}}}
  - contrast: {{}}
"""


def test_a_plan_counts_preferences_and_what_judges_ask_about_them(tmp_path: Path) -> None:
    with MockServer() as server:
        plan = make_plan(recipe(tmp_path, server, text=PREFERENCES, more="  - pairs: {}\n"), tmp_path / "mill")
    calls = {each.stage: each.calls for each in plan.estimates}
    assert calls["03-contrast"] == pytest.approx(20, abs=4)  # ten, of which each second one is believed to pass
    assert calls["02-compose"] == pytest.approx(60, abs=8)
    assert calls["04-pairs"] == pytest.approx(2 * 20, abs=8)


def test_a_probe_asks_for_preferences_too_and_judges_them_apart(tmp_path: Path) -> None:
    def answer(question: str) -> str:
        if "<answer_a>" in question:
            first, second = (question.index(f"<answer_{letter}>") for letter in "ab")
            wrong = question.index("Not that")
            return json.dumps({"evidence": "wrong", "better": "B" if first < wrong < second else "A"})
        return writer(question) if "JSON" in question else f"Not that, number {next(numbers)}."

    writer, numbers = Writer(), itertools.count()
    with MockServer(answer=answer) as server:
        mine = recipe(tmp_path, server, text=PREFERENCES, more="  - pairs: {}\n")
        plan = make_plan(mine, tmp_path / "mill", asking=16)
        assert plan.probed is not None
        of_stage = Counter(stage for stage, _ in plan.probed.answers)
        assert of_stage == {"02-compose": 1, "03-contrast": 1}
        (pairs,) = [sieve for sieve in plan.probed.sieves if sieve.stage == "04-pairs"]
        contrasted = len(plan.probed.answers["03-contrast", "small"])
        assert len(pairs.answers) == 2 * contrasted > 0
        run(mine, tmp_path / "mill")
        folder = RunFolder(mine.run_folder(tmp_path / "mill"))
    bill = {row.stage: row.asked for row in folder.funnel()}
    foreseen = {each.stage: each.calls for each in plan.estimates}
    assert foreseen["04-pairs"] == pytest.approx(bill["04-pairs"], rel=0.5)


def test_duplicates_of_preferences_are_to_be_told_what_counts_before_anything_is_asked(tmp_path: Path) -> None:
    with MockServer() as server:
        mine = recipe(tmp_path, server, text=PREFERENCES, more="  - near: {}\n  - semantic: {}\n")
        for work in (make_plan, run):
            with pytest.raises(GristmillError, match="the samples are preferences: say by which text they are compared") as error:
                work(mine, tmp_path / "mill")
            assert error.value.where == "stage 04-near, 05-semantic"  # all at once
        assert not server.received


def outlook(places: int = 2, quota: int = 20, **more: object) -> Outlook:
    zeros = np.zeros(places, dtype=np.int64)
    first = np.full(places, 8)
    source = Source("02-compose", "a", first, np.full(places, 400.0), 1.0, 0.0, 0.1, (answered(),))
    sure = Sieve("", np.full(places, 1e9), np.zeros(places))
    plain = Outlook(
        quota={f"l{i}": quota for i in range(places)},
        oversample=1,
        rounds=12,
        budget_micro_usd=None,
        asks={"02-compose": Asks(np.array([5.0, 10, 20]), np.array([1.0, 2, 4]))},
        sources=(source,),
        sieves=(sure,),
        lanes={"a": Lane(4)},
        had=Had(zeros, zeros, zeros, {}),
    )
    return replace(plain, **more)  # type: ignore[arg-type]


def test_a_sure_thing_has_no_width() -> None:
    played = forecast(outlook(), plays=20)
    assert played.calls == (16, 16, 16)
    assert played.micro_usd == (320, 320, 320)
    assert played.ends == {"done": 1.0}
    assert played.rows == (40, 40, 40)
    assert played.seconds.middle == pytest.approx(16 / 4 + 0.75)


def test_rounds_go_on_until_the_target_is_met() -> None:
    half = Sieve("", np.array([2e6, 5e5]), np.array([8e6, 9.5e6]))  # one place gives a fifth, the other a twentieth
    played = forecast(outlook(sieves=(half,)), plays=100)
    assert played.ends["done"] > 0.9
    assert played.calls.middle > 16 + 8
    assert played.calls.middle == pytest.approx(20 / 5 / 0.2 + 20 / 5 / 0.05, rel=0.25)


def test_a_place_that_gives_nothing_ends_as_a_run_would() -> None:
    nothing = Sieve("", np.zeros(2), np.full(2, 1e9))
    played = forecast(outlook(sieves=(nothing,)), plays=20)
    assert played.ends == {"stalled": 1.0}
    assert played.rows.high == 0


def test_a_budget_ends_a_run_and_is_never_passed() -> None:
    played = forecast(outlook(budget_micro_usd=160), plays=20)
    assert played.ends == {"budget": 1.0}
    assert played.micro_usd == (160, 160, 160)
    assert played.rows_at_budget == (20, 20, 20)


def test_few_answers_make_wide_intervals() -> None:
    def width(n: int) -> float:
        answers = tuple(answered(tokens_out=t, micro_usd=10 + t / 5) for t in np.linspace(20, 80, n))
        played = forecast(outlook(sources=(replace(outlook().sources[0], answers=answers),)), plays=300)
        assert played.micro_usd is not None
        return played.micro_usd.high - played.micro_usd.low

    assert width(4) > 1.5 * width(40) > 0


def test_answers_that_are_alike_by_chance_are_not_believed_to_be() -> None:
    source = outlook().sources[0]
    alike = replace(source, teacher="b", answers=(answered(), answered()))
    varied = replace(source, answers=tuple(answered(tokens_out=t) for t in (10, 40, 60, 90)))
    lanes = {"a": Lane(4), "b": Lane(4)}
    (_, b) = forecast(outlook(sources=(varied, alike), lanes=lanes), plays=200).columns
    assert b.tokens_out.high > 1.1 * b.tokens_out.low


def test_the_same_outlook_gives_the_same_forecast() -> None:
    rough = outlook(sieves=(Sieve("", np.array([3.0, 1]), np.array([2.0, 4])),))
    assert forecast(rough, plays=50) == forecast(rough, plays=50) != forecast(rough, plays=50, seed=1)


def test_a_place_of_which_little_is_known_is_like_the_others() -> None:
    rng = np.random.default_rng(0)
    alike = pass_rates(np.array([18.0, 19, 17, 0]), np.array([2.0, 1, 3, 0]), rng, 2000)
    assert alike[:, 3].mean() == pytest.approx(0.87, abs=0.05)
    unlike = pass_rates(np.array([19.0, 1, 18, 0]), np.array([1.0, 19, 2, 0]), rng, 2000)
    assert unlike[:, 3].std() > 2 * alike[:, 3].std()
    assert unlike[:, 1].mean() < 0.2


@pytest.mark.parametrize(
    ("seen", "low", "high"),
    [
        ([1] * 60, 0.85, 1.0),  # nothing has come twice
        ([12, 11, 9, 8] + [1] * 40, 0.4, 0.6),  # half of the time one of four
        ([10] * 6, 0.0, 0.05),  # six things and no others
    ],
)
def test_how_soon_things_repeat(seen: Sequence[int], low: float, high: float) -> None:
    novelty, rng = Novelty([seen]), np.random.default_rng(0)
    share = [float(novelty.new(novelty.draw(rng), np.array([sum(seen)]), np.array([100]))[0]) / 100 for _ in range(500)]
    assert low <= np.median(share) <= high


def test_places_take_turns_where_a_generator_stops() -> None:
    asks = Asks(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 4]), most=10)
    assert list(asks.of(np.array([2.0, 100, 100]))) == [2, 4, 4]
    assert list(asks.of(np.array([2.0, 3, 3]))) == [2, 3, 3]
    assert list(asks.of(np.array([0.0, 2.5]))) == [0, 3]


def test_the_time_of_a_filter_of_the_pool_is_a_rounds_and_not_a_samples(tmp_path: Path, server: MockServer) -> None:
    """Coverage takes the whole pool each time; multiplied by the samples, its time was foreseen in minutes."""
    more = "  - coverage: {}\n"
    first = first_round(recipe(tmp_path, server, more=more))
    probed = probe(first, tmp_path / "mill", 10)
    assert probed.pool_s > 0
    assert probed.filter_s * probed.samples < probed.pool_s  # `exact` alone
    plan = make_plan(recipe(tmp_path, server, more=more), tmp_path / "mill", asking=10)
    assert plan.forecast.seconds.middle < plan.forecast.calls.middle * 1.0 + 3 * probed.pool_s


@pytest.mark.parametrize(
    ("most", "wanted", "calls"),
    [(500, [1000, 999, 998], [167, 167, 166]), (500, [400, 300, 20], [240, 240, 20]), (7, [3, 3, 1], [3, 3, 1])],
)
def test_where_a_round_may_not_ask_for_all_places_take_turns(most: int, wanted: list[int], calls: list[int]) -> None:
    assert Asks(np.array([1.0, 2.0]), np.array([1.0, 2.0]), most).of(np.array(wanted, dtype=float)).tolist() == calls

"""Says what a run would ask, of whom, what it would cost and take: without asking anything, or after asking a few questions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from factory import rounds
from factory.batch import WITHIN_H
from factory.errors import GristmillError, StoreError
from factory.forecast import ASSUMED_RATE, Answered, Asks, Forecast, Had, Lane, Outlook, Sieve, Source, Span, forecast
from factory.gateway import estimate
from factory.ledger import Ledger, ledger_place, open_ledger
from factory.probe import First, Probed, Put, first_round, probe, words_of
from factory.progress import dollars, duration
from factory.recipe import Recipe, StageLine
from factory.records import RunFolder
from factory.stage import Generator, Need
from schemas.call import Call

ASSUMED_TOKENS_S = 40.0  # of one stream, before a teacher has answered
_EVERY_UP_TO = 32  # samples wanted, for each of which a generator's questions are counted; beyond, in growing steps
_ENOUGH_CALLS = 200  # beyond, questions grow as what is wanted
_ASSUMED_WEIGHT = 100.0  # samples that an assumed rate counts as
_CERTAIN = 1e9


@dataclass(frozen=True)
class Estimate:
    """What one stage is expected to ask of one teacher until the target is met: the middle of the forecast.

    `in_ledger` is how many of the first round's questions have an answer. Money is in micro-dollars, None where the price is
    unknown; `worst` is what the same calls could cost at most. The spans are those of a probe, else None.
    """

    stage: str
    teacher: str
    calls: int
    in_ledger: int
    tokens_in: int
    tokens_out: int
    micro_usd: int | None
    worst_micro_usd: int | None
    seconds: float
    calls_span: Span | None = None
    micro_usd_span: Span | None = None


@dataclass(frozen=True)
class Plan:
    """All estimates, the forecast that they are of, what they rest on, and what the seeds hold. `probed` None: nothing was asked."""

    recipe: Recipe
    seeds: pl.DataFrame
    holdout: int
    unreadable: int
    estimates: tuple[Estimate, ...]
    assumptions: tuple[str, ...]
    forecast: Forecast
    probed: Probed | None = None


def make_plan(recipe: Recipe, home: Path, *, asking: int | None = None) -> Plan:
    """Read the seeds, form the first round's questions, and play the run.

    `asking`: how many of those questions to ask first (`factory.probe`); None asks nothing and writes nothing.
    """
    first = first_round(recipe)
    probed = probe(first, home, asking) if asking else None
    with ExitStack() as stack:
        ledger, trouble = _ledger(home, stack)
        outlook, assumptions, seen = _Desk(first, home, ledger, probed).outlook()
    assumptions += trouble
    played = forecast(outlook, seed=recipe.seed)
    estimates = tuple(
        Estimate(
            stage=column.stage,
            teacher=column.teacher,
            calls=round(column.calls.middle),
            in_ledger=seen.get((column.stage, column.teacher), _Seen(0, None)).in_ledger,
            tokens_in=round(column.tokens_in.middle),
            tokens_out=round(column.tokens_out.middle),
            micro_usd=None if column.micro_usd is None else round(column.micro_usd.middle),
            worst_micro_usd=seen.get((column.stage, column.teacher), _Seen(0, None)).worst(column.calls.middle),
            seconds=column.seconds.middle,
            calls_span=column.calls if probed else None,
            micro_usd_span=column.micro_usd if probed else None,
        )
        for column in played.columns
    )
    return Plan(recipe, first.seeds, first.holdout.height, first.unreadable, estimates, tuple(dict.fromkeys(assumptions)), played, probed)


def _ledger(home: Path, stack: ExitStack) -> tuple[Ledger | None, list[str]]:
    """The ledger to be read, where there is one; else what is to be said of it."""
    place = ledger_place(home)
    if isinstance(place, Path) and not place.exists():
        return None, []
    try:
        return stack.enter_context(open_ledger(home, read_only=True)), []
    except StoreError as error:
        if isinstance(place, Path):
            raise
        return None, [f"the ledger tells nothing: {error.what}"]  # before the first run a database holds none


@dataclass(frozen=True)
class _Seen:
    """What is known of one stage's questions to one teacher without asking them."""

    in_ledger: int
    worst_micro_usd: float | None  # a call

    def worst(self, calls: float) -> int | None:
        return None if self.worst_micro_usd is None else math.ceil(self.worst_micro_usd * calls)


class _Desk:
    """Gathers what is known into an outlook: from the questions themselves, the ledger, the last run, and a probe if there was one."""

    def __init__(self, first: First, home: Path, ledger: Ledger | None, probed: Probed | None) -> None:
        self.first, self.recipe, self.ledger, self.probed = first, first.recipe, ledger, probed
        self.run = first.recipe.run_folder(home).name
        self.places = list(first.quota)
        self.seen: dict[tuple[str, str], _Seen] = {}
        self.past = None if probed else _last_run(first.recipe, home, first.quota)
        self.paces: dict[str, float | None] = {}  # seconds a call, by teacher
        self.assumptions: list[str] = []

    def outlook(self) -> tuple[Outlook, list[str], dict[tuple[str, str], _Seen]]:
        """The outlook, what it assumes, and what is known of each stage's and teacher's questions."""
        recipe, probed = self.recipe, self.probed
        asks = {
            line.folder: self._asks(line, line.stage)
            for line in recipe.stages
            if isinstance(line.stage, Generator) and not line.stage.once and any(q.line is line for q in self.first.questions)
        }
        items = self._items_promised()
        sources = tuple(self._source(stage, teacher, items) for stage, teacher in self._by_teacher())
        sieves = self._sieves()
        zeros = np.zeros(len(self.places), dtype=np.int64)
        if probed:
            self.assumptions.append(
                f"what comes is like what the probe's {len(probed.asked)} answers and {probed.samples} samples are like"
            )
            self.assumptions.append("rows repeat each other as those of the probe do, the more the more there are")
        return (
            Outlook(
                quota=self.first.quota,
                oversample=recipe.target.oversample,
                rounds=recipe.target.rounds,
                budget_micro_usd=recipe.target.budget_micro_usd,
                asks=asks,
                sources=sources,
                sieves=sieves,
                lanes={
                    name: Lane(t.concurrency * len(t.ports()), t.limits.requests_per_minute or math.inf)
                    for name, t in recipe.teachers.items()
                },
                had=probed.had if probed else Had(zeros, zeros, zeros, {}),
                repeats=probed.repeats if probed else None,
                copies=probed.copies if probed else None,
                copies_at=probed.copies_at if probed else None,
                start_s=probed.start_s if probed else 0.0,
                filter_s=probed.filter_s if probed else 0.0,
                pool_s=probed.pool_s if probed else 0.0,
                choose_s=probed.choose_s if probed else 0.0,
            ),
            self.assumptions,
            self.seen,
        )

    def _by_teacher(self) -> dict[tuple[str, str], list[Put]]:
        groups: dict[tuple[str, str], list[Put]] = defaultdict(list)
        for question in self.first.questions:
            groups[question.line.folder, question.call.teacher].append(question)
        return groups

    def _asks(self, line: StageLine, stage: Generator) -> Asks:
        """Count a generator's questions for needs of several sizes, and find the number at which it stops, if it does."""

        def count(needs: Sequence[Need]) -> int:
            ctx = self.first.context(line)
            ctx.needs = needs
            return sum(1 for _ in stage.questions(self.first.rows(line), ctx))

        mine = self.first.needs[line.folder]
        place = replace(mine[0], missing=0)
        wanted: list[float] = []
        calls: list[float] = []
        missing = 1
        while not calls or (calls[-1] < _ENOUGH_CALLS and not (len(calls) > _EVERY_UP_TO and calls[-1] == calls[-2])):
            wanted.append(float(missing))
            calls.append(float(count([replace(place, missing=missing, rate=1.0)])))
            missing += max(1, missing // 2) if missing >= _EVERY_UP_TO else 1
        table = Asks(np.array(wanted), np.array(calls))
        needs = [replace(need, missing=need.missing * 4) for need in mine]
        asked = count(needs)
        expected = table.of(np.array([need.missing / ASSUMED_RATE for need in needs])).sum()
        part = min(1.0, sum(sum(effort.shares.values()) for effort in self.recipe.efforts.values())) * self.first.part({line.folder})
        return Asks(table.samples, table.calls, asked if asked < 0.9 * expected else math.inf, part)

    def _items_promised(self) -> float:
        """Samples that a generator means to get from a call."""
        questions = len(self.first.questions)
        wanted = sum(need.missing for needs in self.first.needs.values() for need in needs) / ASSUMED_RATE
        promised = max(1.0, wanted / questions) if questions else 1.0
        return min(promised, self.past.items) if self.past and self.past.items else promised

    def _source(self, stage: str, teacher_name: str, items: float) -> Source:
        questions = self._by_teacher()[stage, teacher_name]
        teacher = self.recipe.teachers[teacher_name]
        price = teacher.known_price()
        calls = [question.call for question in questions]
        known = self._look(stage, teacher_name, calls, {question.key for question in questions})
        asked = self.probed.asked if self.probed else frozenset()
        left = [question for question in questions if question.key not in asked]
        others = sum(1 for q in left if q.key in known and not self._is_ours(q.key))
        everyone = sum(1 for q in self.first.questions if q.line.folder == stage)
        answers = self._answers(stage, teacher_name) if self.probed else (self._assumed(calls, teacher_name, items),)
        return Source(
            stage=stage,
            teacher=teacher_name,
            first=self._by_place(left),
            size=self._sizes(questions),
            share=len(questions) / everyone,
            free=others / len(left) if left else 0.0,
            micro_usd_a_token_in=price.input_usd_per_mtok if price else 0.0,
            answers=answers,
        )

    def _answers(self, stage: str, teacher: str) -> tuple[Answered, ...]:
        """The probe's answers of this teacher at this stage, else those at any."""
        assert self.probed
        own = self.probed.answers.get((stage, teacher))
        answers = own or [a for (_, name), given in self.probed.answers.items() if name == teacher for a in given]
        if answers:
            return tuple(answers)
        questions = self._by_teacher()[stage, teacher]
        return (self._assumed([q.call for q in questions], teacher, self._items_promised()),)

    def _by_place(self, questions: Sequence[Put]) -> NDArray[np.int64]:
        """How many of the questions each place has; those of which it can't be told are shared out as the others."""
        counts = np.zeros(len(self.places), dtype=np.int64)
        for question in questions:
            if question.place is not None:
                counts[question.place] += 1
        for i in range(sum(question.place is None for question in questions)):
            counts[i % len(counts)] += 1
        return counts

    def _sizes(self, questions: Sequence[Put]) -> NDArray[np.float64]:
        sizes: dict[int | None, list[int]] = defaultdict(list)
        for question in questions:
            sizes[question.place].append(question.size)
        mean = sum(question.size for question in questions) / len(questions)
        return np.array([sum(sizes[i]) / len(sizes[i]) if sizes[i] else mean for i in range(len(self.places))])

    def _sieves(self) -> tuple[Sieve, ...]:
        sieves: list[Sieve] = []
        nothing = np.zeros(len(self.places))
        for line in self.recipe.stages:
            calls, each = self.first.asked_by(line)
            answers: list[tuple[str, Answered]] = []
            for name in dict.fromkeys(call.teacher for call in calls):
                mine = [call for call in calls if call.teacher == name]
                self._look(line.folder, name, mine, {self.first.key(call) for call in mine})
                answers += [(name, self._assumed([call], name, 0)) for call in mine[:_ENOUGH_CALLS] if not self.probed]
            if answers:
                handed = self.past.reach.get(line.folder, 1.0) if self.past else 1.0
                sieves.append(Sieve(line.folder, nothing + _CERTAIN, nothing, each * handed, tuple(answers)))
        if self.probed is None:  # what is assumed of all filters together stands last, so that those that ask are asked about every row
            return (*sieves, Sieve("", *self._assumed_rates()))
        return tuple(
            Sieve(
                stage=judged.stage,
                passed=judged.passed.astype(float),
                failed=judged.failed.astype(float),
                asked=len(judged.answers) / judged.came if judged.came else 0.0,
                answers=tuple(judged.answers),
                streams=judged.streams,
            )
            for judged in self.probed.sieves
        )

    def _assumed_rates(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rows that pass and that do not, by place: as the last run of this name had them, else an assumption."""
        if self.past:
            rate = self.past.good.sum() / max(self.past.made.sum(), 1)
            self.assumptions.append(f"{rate:.0%} of the samples pass, as in {self.past.name}" + ", by label" * (len(self.places) > 1))
            return self.past.good.astype(float), (self.past.made - self.past.good).astype(float)
        self.assumptions.append(f"{ASSUMED_RATE:.0%} of the samples pass (nothing of this name was run yet)")
        rows = np.full(len(self.places), _ASSUMED_WEIGHT)
        return rows * ASSUMED_RATE, rows * (1 - ASSUMED_RATE)

    def _look(self, stage: str, teacher_name: str, calls: Sequence[Call], keys: Set[str]) -> Set[str]:
        """Those of the keys that have an answer; notes how many, and what a call may cost at most."""
        known = self.ledger.find_any(keys) if self.ledger else set()
        worst = [estimate(call, self.recipe.teachers[teacher_name]).worst_micro_usd for call in calls]
        mean = None if None in worst else sum(cost or 0 for cost in worst) / len(worst)
        self.seen[stage, teacher_name] = _Seen(len(known), mean)
        return known

    def _is_ours(self, key: str) -> bool:
        record = self.ledger.get(key) if self.ledger else None
        return record is not None and any(entry.run == self.run and entry.state == "settled" for entry in record.entries)

    def _pace(self, name: str) -> float | None:
        """Seconds that a teacher's calls have taken, once it has answered any; looked up, and said to be assumed, once."""
        if name not in self.paces:
            teacher = self.recipe.teachers[name]
            pace = self.paces[name] = self.ledger.pace(*teacher.identity()) if self.ledger else None
            if pace is None:
                how = f"writes {ASSUMED_TOKENS_S:.0f} tokens a second a request (it has not answered yet)"
            else:
                how = f"takes {pace:.2f} s a call, as the ledger has seen"
            self.assumptions.append(f"{name} {how}, {teacher.concurrency} at once")
        return self.paces[name]

    def _assumed(self, calls: Sequence[Call], name: str, items: float) -> Answered:
        """A typical answer of a teacher that was not asked."""
        teacher = self.recipe.teachers[name]
        each = [estimate(call, teacher) for call in calls]
        money = [e.micro_usd for e in each]
        tokens_out = sum(e.tokens_out for e in each) / len(each)
        pace = self._pace(name)
        return Answered(
            place=None,
            size=round(sum(len(words_of(call).encode()) for call in calls) / len(calls)),
            tokens_in=sum(e.tokens_in for e in each) / len(each),
            tokens_out=tokens_out,
            micro_usd=None if None in money else sum(cost or 0 for cost in money) / len(money),
            seconds=tokens_out / ASSUMED_TOKENS_S if pace is None else pace,
            items=items,
        )


@dataclass(frozen=True)
class _Past:
    """What the last run of a recipe of this name had: samples a call, made and good ones by place, and the share that each filter saw."""

    name: str
    items: float
    made: NDArray[np.int64]
    good: NDArray[np.int64]
    reach: Mapping[str, float]


def _last_run(recipe: Recipe, home: Path, quota: Mapping[str, int]) -> _Past | None:
    for folder in sorted((home / "runs").glob(f"{recipe.name}-????????"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            run = RunFolder(folder)
            _ = run.status
            ended = run.fates.filter(pl.col("fate").is_in(["accepted", "surplus", "rejected"]))
            made = run.samples.join(ended.select("id"), on="id", how="semi")
            good = run.of_fate("accepted", "surplus")
            funnel = run.funnel()
        except GristmillError:
            continue  # a run of another layout tells nothing
        if good.is_empty():
            continue
        calls = sum(row.answered for row in funnel if row.kind == "generator")
        total = sum(row.made for row in funnel if row.kind == "generator")
        counted = [np.array(list(rounds.counts(frame, quota).values())) for frame in (made, good)]
        reach = {row.stage: min(1.0, row.judged / total) for row in funnel if row.kind == "filter"}
        return _Past(folder.name, total / calls if calls else 0.0, counted[0], counted[1], reach)
    return None


def plan_table(recipe: Recipe, home: Path, *, asking: int | None = None) -> RenderableType:
    """The plan as a table for a terminal; `asking` as in `make_plan`."""
    with Console(stderr=True).status(f"asking {asking} questions") if asking else nullcontext():  # seen on a terminal alone
        plan = make_plan(recipe, home, asking=asking)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "asks", "calls", "in ledger", "tokens in", "tokens out", "cost", "at most", "time"):
        table.add_column(name, justify="left" if name in ("stage", "asks") else "right")
    for e in plan.estimates:
        table.add_row(
            e.stage,
            e.teacher,
            f"{e.calls:,}" + (_between(e.calls_span, lambda calls: f"{calls:,.0f}")),
            f"{e.in_ledger:,}",
            f"{e.tokens_in:,}",
            f"{e.tokens_out:,}",
            dollars(e.micro_usd) + _between(e.micro_usd_span, _money),
            dollars(e.worst_micro_usd),
            duration(e.seconds),
        )
    lines = [
        _total(plan),
        *_probe_lines(plan),
        *_batch_lines(plan),
        *_ends(plan),
        "this rests on: " + "; ".join(plan.assumptions),
        _standing(recipe, home),
    ]
    return Group(Text(_seeds_line(plan)), Text(), table, Text(), *(Text(line) for line in lines))


def _seeds_line(plan: Plan) -> str:
    recipe = plan.recipe
    labels = plan.seeds["label"].drop_nulls().n_unique()
    seeds = f"{plan.seeds.height} seeds" + (f" of {labels} labels" if labels else "")
    seeds += f", {plan.holdout} more set aside for test" if plan.holdout else ""
    seeds += f", {plan.unreadable} lines unreadable or repeated" if plan.unreadable else ""
    balance = f", balanced by {recipe.target.balance}" if recipe.target.balance else ""
    return f"{recipe.name}: {seeds}; wanted: {recipe.target.accepted} accepted rows{balance}"


def _total(plan: Plan) -> str:
    played, budget, probed = plan.forecast, plan.recipe.target.budget_usd, plan.probed is not None
    money = None if any(e.micro_usd is None for e in plan.estimates) else played.micro_usd
    cost = dollars(None) if money is None else _money(money.middle) + (_between(money, _money) if probed else "")
    time = duration(played.seconds.middle) + (_between(played.seconds, duration) if probed else "")
    calls = f"{played.calls.middle:,.0f}" + (_between(played.calls, lambda calls: f"{calls:,.0f}") if probed else "")
    of_budget = f" of a budget of ${budget:g}" if budget is not None else ""
    means = "; in brackets: where nine in ten of the simulated runs lie" if probed else ""
    return f"in all: cost {cost}{of_budget}, calls {calls}, time about {time}{means}"


def _probe_lines(plan: Plan) -> list[str]:
    probed = plan.probed
    if probed is None:
        return []
    asked = f"the probe asked {probed.calls} calls" + (f" ({probed.known} more were in the ledger)" if probed.known else "")
    good = f"of its {probed.samples} samples {sum(int(n) for n in probed.had.good)} are good"
    return [f"{asked} for {dollars(probed.micro_usd)}, which is part of the above; {good}, and the run finds them"]


def _batch_lines(plan: Plan) -> list[str]:
    """Live against batch, for each teacher that can be asked either way."""
    lines = []
    for name, teacher in plan.recipe.teachers.items():
        mine = [e for e in plan.estimates if e.teacher == name]
        batching, price = teacher.batching(), teacher.known_price()
        if not mine or batching is None or price is None or not price.batch:
            continue
        told = sum(e.micro_usd or 0 for e in mine)
        live, batch = (told / price.batch, told) if batching.on else (told, told * price.batch)
        hours = f"up to {WITHIN_H:.0f} hours a round"
        time = hours if batching.on else f"{hours} instead of about {duration(sum(e.seconds for e in mine))}"
        lines.append(f"{name}: {_money(batch)} in batches against {_money(live)} live; batches take {time}")
    return lines


def _ends(plan: Plan) -> list[str]:
    """How the run may end otherwise than at its target."""
    played, target = plan.forecast, plan.recipe.target
    lines = []
    if share := played.ends.get("budget"):
        assert played.rows_at_budget
        rows = f"{played.rows_at_budget.middle:.0f}{_between(played.rows_at_budget, lambda rows: f'{rows:.0f}')}"
        lines.append(f"the budget ends it first in {share:.0%} of the simulated runs, at {rows} of {target.accepted} rows")
    short = played.ends.get("rounds", 0) + played.ends.get("stalled", 0)
    if short >= 0.01:
        lines.append(
            f"it ends short of the target in {short:.0%} of the simulated runs (no row any more, or all {target.rounds} rounds used)"
        )
    return lines


def _between(span: Span | None, written: Callable[[float], str]) -> str:
    return "" if span is None or written(span.low) == written(span.high) else f" ({written(span.low)} to {written(span.high)})"


def _money(micro_usd: float) -> str:
    return dollars(round(micro_usd))


def _standing(recipe: Recipe, home: Path) -> str:
    """How far a run of just this recipe is, since the plan is for all of it."""
    folder = recipe.run_folder(home)
    if not (folder / "run.json").exists():
        return f"run it: its folder will be {folder}"
    status = RunFolder(folder).status
    have = RunFolder(folder).accepted.height
    if status["status"] == "done":
        return f"this recipe was run already and is done ({have} rows in {folder}): a run would ask nothing more"
    return f"{have} rows are there already, in {folder}: a run goes on from them, and asks that much less"

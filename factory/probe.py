"""Asks a few of the first round's questions, so that a plan rests on answers; the run finds them in the ledger.

What is asked goes through the real gateway under the run's own name, and what comes is parsed and filtered as in a round.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory import rounds
from factory.cells import LABEL, REST
from factory.embed import Embedder, open_embedder
from factory.errors import RunError
from factory.forecast import Answered, Had, Novelty
from factory.gateway import Gateway, filled
from factory.ledger import Ledger, open_ledger
from factory.loop import check_target, first_needs, reference_of
from factory.recipe import Recipe, StageLine
from factory.stage import Filter, Generator, Need, Vectors, as_preferences, check_filters, makes_preferences
from factory.still import Still
from factory.store import SAMPLES, samples_frame, unwritable
from schemas.call import Answer, Call
from schemas.sample import Sample

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class First:
    """The first round of a recipe, before anything is asked: its seeds, its needs and its questions."""

    recipe: Recipe
    seeds: pl.DataFrame  # that a teacher may see
    holdout: pl.DataFrame  # that none may
    unreadable: int
    quota: Mapping[str, int]
    needs: Mapping[str, tuple[Need, ...]]  # by the generator's line

    @cached_property
    def reference(self) -> pl.DataFrame:
        """The real inputs whose distribution the target follows; none where it follows none."""
        return reference_of(self.recipe)

    @property
    def known(self) -> dict[str, Any]:
        """What any context of this round holds, as `Still` takes it."""
        models = {name: teacher.model for name, teacher in self.recipe.teachers.items()}
        rows = {"seeds": self.seeds, "holdout": self.holdout, "reference": self.reference}
        return {"seed": self.recipe.seed, **rows, "teachers": tuple(models), "models": models}

    def context(self, line: StageLine) -> Still:
        """What a stage sees in this round, but for the asking."""
        return Still(line.folder, **self.known, round=1, needs=self.needs.get(line.folder, ()))

    def rows(self, line: StageLine) -> pl.DataFrame:
        """What a generator goes on from: the seeds; if it follows rows, also as such with every value of the axes that the target is by."""
        target = self.recipe.target
        axes = {name: values for name, values in self.recipe.axes.items() if name in (*target.balanced, *target.quotas)}
        if not (axes and self.recipe.efforts[line.folder].follows):
            return self.seeds
        told = [json.dumps(dict(zip(axes, values, strict=True)), ensure_ascii=False) for values in product(*axes.values())]
        return pl.concat([self.seeds, *(self.seeds.with_columns(axes=pl.lit(each)) for each in told)])

    def asked_by(self, line: StageLine) -> tuple[list[Call], float]:
        """What a filter would ask, and how many calls that is for each row that it is handed.

        The seeds stand in for what is not made yet: as they are, and as preferences in the part of the rows that lines above bring as such.
        """
        if not isinstance(line.stage, Filter):
            return [], 0.0
        above = {other.folder for other in self.recipe.stages[: self.recipe.stages.index(line)] if makes_preferences(other.stage)}
        part = self.part(above)
        calls: list[Call] = []
        each = 0.0
        for rows, share in ((self.seeds, 1 - part), (as_preferences(self.seeds), part)):
            if rows.height and share:
                questions = list(line.stage.questions(rows, self.context(line)))
                calls += questions
                each += share * len(questions) / rows.height
        return calls, each

    def part(self, lines: Set[str]) -> float:
        """The part of the rows that are ordered in this round which these lines are to bring."""
        due = {folder: sum(need.missing for need in needs) for folder, needs in self.needs.items()}
        return sum(n for folder, n in due.items() if folder in lines) / max(1, sum(due.values()))

    @cached_property
    def questions(self) -> list[Put]:
        """Every question that the generators have, in their order."""
        asked = [
            (line, call)
            for line in self.recipe.stages
            if isinstance(line.stage, Generator) and not line.stage.once
            for call in line.stage.questions(self.rows(line), self.context(line))
        ]
        texts = [words_of(call) for _, call in asked]
        places = [_place(json.loads(call.aim or "{}").get(LABEL), self.quota) for _, call in asked]
        return [
            Put(line, call, self.key(call), len(text.encode()), place)
            for (line, call), text, place in zip(asked, texts, places, strict=True)
        ]

    @cached_property
    def _identities(self) -> dict[str, tuple[str, str]]:
        return {name: teacher.identity() for name, teacher in self.recipe.teachers.items()}

    def key(self, call: Call) -> str:
        """The ledger's key of a call."""
        return filled(call, self.recipe.teachers[call.teacher]).key(*self._identities[call.teacher])


@dataclass(frozen=True)
class Put:
    """A question of the first round; `place` is the index of the place that it is put for, None where that can't be told."""

    line: StageLine
    call: Call
    key: str
    size: int
    place: int | None


@dataclass
class Judged:
    """What a row of filters, of which only the first may ask, did to the probe's samples, by place."""

    stage: str
    streams: bool
    passed: Counts
    failed: Counts
    came: int = 0
    answers: list[tuple[str, Answered]] = field(default_factory=list)


@dataclass(frozen=True)
class Probed:
    """What a probe found. `answers` are by (stage, teacher); `calls` and `known` count what it bought and what the ledger had."""

    asked: frozenset[str]
    answers: Mapping[tuple[str, str], Sequence[Answered]]
    sieves: Sequence[Judged]
    had: Had
    repeats: Novelty
    copies: Novelty | None
    copies_at: int | None
    samples: int
    start_s: float
    filter_s: float
    pool_s: float
    choose_s: float
    calls: int
    known: int
    micro_usd: int | None


def first_round(recipe: Recipe) -> First:
    """Read the seeds and say what the first round aims at."""
    read = [
        item
        for line in recipe.stages
        if isinstance(line.stage, Generator) and line.stage.once
        for item in line.stage.generate(SAMPLES.to_frame(), Still(line.folder, seed=recipe.seed, teachers=tuple(recipe.teachers)))
    ]
    first: dict[str, Sample] = {}
    for item in read:
        if isinstance(item, Sample):
            first.setdefault(item.id, item)  # of two alike the first, as in a run: the questions must be the same
    everything = samples_frame(first.values())
    seeds = everything.filter(~pl.col("holdout"))
    if seeds.is_empty():
        raise RunError("the seeds stage gives no seed that a teacher may see")
    check_filters(((line.folder, line.stage) for line in recipe.stages), seeds)
    holdout = everything.filter("holdout")
    check_target(recipe, seeds, holdout.height)
    needs = first_needs(recipe, seeds)
    return First(recipe, seeds, holdout, len(read) - len(first), rounds.quotas(recipe.target, seeds), needs)


def words_of(call: Call) -> str:
    """All that a call says."""
    return "\n".join([*(message.content for message in call.messages), call.prompt or ""])


def choose(questions: Sequence[Put], n: int, seed: int) -> list[Put]:
    """`n` of the questions, by a seeded draw: of every generator's questions to every teacher, and of every place, about their share.

    Inside of one of these the first are taken, each prompt once before any twice: their order is already random, and what a
    generator varies in turn (axes, wordings) is then balanced as well.
    """
    rng = random.Random(f"{seed}/probe")
    strata: dict[tuple[Any, ...], deque[Put]] = defaultdict(deque)
    drawn: Counter[tuple[str, str]] = Counter()
    again = []
    for question in questions:
        text = question.line.folder, words_of(question.call)
        drawn[text] += 1
        again.append(drawn[text])
    for _, question in sorted(zip(again, questions, strict=True), key=lambda pair: pair[0]):
        strata[(question.line.folder, question.call.teacher), question.place].append(question)
    wanted: Counter[tuple[int, Any]] = Counter()
    for stratum, members in strata.items():
        wanted.update({(axis, value): len(members) for axis, value in enumerate(stratum)})
    taken: Counter[tuple[int, Any]] = Counter()
    chosen: list[Put] = []
    while strata and len(chosen) < n:
        # The stratum whose teacher and place together are furthest behind their shares.
        def ahead(stratum: tuple[Any, ...]) -> float:
            return sum((taken[axis, value] + 1) / wanted[axis, value] for axis, value in enumerate(stratum))

        least = min(map(ahead, strata))
        stratum = rng.choice([each for each in strata if ahead(each) <= least * (1 + 1e-9)])
        chosen.append(strata[stratum].popleft())
        taken.update(enumerate(stratum))
        if not strata[stratum]:
            del strata[stratum]
    return chosen


def probe(first: First, home: Path, n: int) -> Probed:
    """Ask `n` of the first round's questions, and what filters ask about their answers. What the ledger knows is not asked again.

    Raises what a run would: TeacherDown, BudgetSpent, and RunError where no call of a stage is answered.
    """
    recipe = first.recipe
    run = recipe.run_folder(home).name
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(home, error) from error
    with ExitStack() as stack:
        ledger = stack.enter_context(open_ledger(home))
        gateway = stack.enter_context(Gateway(recipe.teachers, ledger, home=home, run=run, budget_micro_usd=recipe.target.budget_micro_usd))
        return _Probe(first, gateway, ledger, run, choose(first.questions, n, recipe.seed)).work()


class _Probe:
    """One probe at work."""

    def __init__(self, first: First, gateway: Gateway, ledger: Ledger, run: str, chosen: Sequence[Put]) -> None:
        self.first, self.gateway, self.ledger, self.run = first, gateway, ledger, run
        self.chosen = {question.key: question for question in chosen}
        self.places = list(first.quota)
        self.answers: dict[str, list[Answer]] = defaultdict(list)  # by stage
        self.embedder: Embedder | None = None
        self.loading_s = 0.0
        self._seen: set[str] = set(first.seeds["id"])
        self._came: list[Counter[str]] = [Counter() for _ in self.places]  # how often each item came
        self._place_of: dict[str, int] = {}  # of a sample
        self._compared: dict[str, str] = {}  # all rows that are compared with each other, and of which row each is a copy (itself: of none)
        self._comparing: Judged | None = None
        self._read: Counter[str | None] = Counter()  # items by call
        self._place_read: dict[str | None, int] = {}
        self._filter_s = self._pool_s = 0.0

    def work(self) -> Probed:
        """Run the stages of a round on what is chosen."""
        flow = SAMPLES.to_frame()
        made = 0
        sieves: list[Judged] = []
        copies_at: int | None = None
        streams = False
        for line in self.first.recipe.stages:
            if isinstance(line.stage, Generator):
                if not line.stage.once:
                    new = self._generate(line, line.stage)
                    flow, made, streams = pl.concat([flow, new]), made + new.height, True
                continue
            assert isinstance(line.stage, Filter)
            streams &= line.stage.scope == "sample"
            asks = bool(self.first.asked_by(line)[0])
            if asks or not sieves:
                sieves.append(Judged(line.folder, streams, self._zeros(), self._zeros()))
            if line.stage.scope == "dataset" and copies_at is None:
                copies_at = len(sieves) - 1
            flow = self._judge(line, line.stage, flow, sieves[-1], asks=asks, first=asks or sieves[-1].came == 0)
        return self._found(flow, sieves, made, copies_at)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors, by the recipe's embedder, which is loaded at the first use."""
        if self.embedder is None:
            began = time.perf_counter()
            self.embedder = open_embedder(self.first.recipe.embedder)
            self.loading_s = time.perf_counter() - began
        return self.embedder.embed(texts)

    def _generate(self, line: StageLine, stage: Generator) -> pl.DataFrame:
        made: dict[str, Sample] = {}
        for item in stage.generate(self.first.rows(line), _Asking(self, line, only=self.chosen)):
            if isinstance(item, Sample):
                call, place = item.provenance.call, self._place(item.label)
                if place is not None:
                    self._read[call] += 1
                    self._place_read[call] = self._place_of[item.id] = place
                    self._came[place][item.id] += 1
                if item.id not in self._seen:
                    made[item.id] = item
                    self._seen.add(item.id)
        self._must_answer(line)
        return samples_frame(made.values())

    def _judge(self, line: StageLine, stage: Filter, flow: pl.DataFrame, sieve: Judged, *, asks: bool, first: bool) -> pl.DataFrame:
        ctx = _Asking(self, line)

        def judged(rows: pl.DataFrame) -> pl.DataFrame:
            asked = pl.concat([ctx.kept, rows]) if stage.scope == "pool" else rows
            return stage.judge(asked, ctx).join(rows.select("id"), left_on="sample", right_on="id", how="semi")

        if first:
            sieve.came = flow.height
            sieve.passed += self._counts(flow)
        if flow.is_empty():
            return flow
        began, loaded = time.perf_counter(), self.loading_s
        verdicts = judged(flow)
        took = time.perf_counter() - began - (self.loading_s - loaded)
        if stage.scope == "pool":  # it is handed all that is kept, once a round: its time hangs on that, hardly on what is new
            self._pool_s += took
        elif not asks:
            self._filter_s += took
        self._must_answer(line)
        lost = flow.join(verdicts.filter(~pl.col("keep")), left_on="id", right_on="sample", how="semi", maintain_order="left")
        kept = flow.join(lost, on="id", how="anti", maintain_order="left")
        alone = lost  # what it rejects even when it stands alone; the rest is too like other rows of the probe
        if stage.scope != "sample" and not asks and lost.height:
            alone = pl.concat([row for row in lost.iter_slices(1) if not judged(row)["keep"].all()] or [lost.clear()])
        sieve.passed -= self._counts(alone)
        sieve.failed += self._counts(alone)
        if stage.scope == "dataset":
            self._comparing = self._comparing or sieve
            copies = _twins(verdicts.filter(~pl.col("keep") & ~pl.col("sample").is_in(alone["id"].implode())))
            self._compared |= {row: copies.get(row, row) for row in flow["id"] if row in self._place_of}
        if sieve is self._comparing:
            failed = set(alone["id"])
            self._compared = {row: of for row, of in self._compared.items() if row not in failed}
        for answer in self.answers[line.folder]:
            sieve.answers.append((answer.call.teacher, self._answered(answer)))
        return kept

    def _found(self, good: pl.DataFrame, sieves: Sequence[Judged], made: int, copies_at: int | None) -> Probed:
        began, loaded = time.perf_counter(), self.loading_s
        self.embed(good["input"].to_list())  # as the target does where a place has too many
        choose_s = (time.perf_counter() - began - (self.loading_s - loaded)) / max(good.height, 1)
        compared: list[Counter[str]] = [Counter() for _ in self.places]
        for sample, of in self._compared.items():
            compared[self._place_of[sample]][of] += 1
        answers: dict[tuple[str, str], list[Answered]] = defaultdict(list)
        bill: dict[tuple[str, str], NDArray[np.float64]] = {}
        asked = [answer for stage in self.answers.values() for answer in stage]
        for stage, given in self.answers.items():
            for answer in given:
                key = stage, answer.call.teacher
                had = self._answered(answer)
                if answer.key in self.chosen:
                    answers[key].append(had)
                ours = answer.fresh or self._is_ours(answer.key)
                paid = had.micro_usd if had.micro_usd is not None else np.nan
                row = [1, had.tokens_in, had.tokens_out, paid if ours else 0.0, had.seconds if ours else 0.0]
                bill[key] = bill.get(key, np.zeros(5)) + np.array(row)
        fresh = [answer.micro_usd for answer in asked if answer.fresh]
        return Probed(
            asked=frozenset(self.chosen),
            answers=answers,
            sieves=sieves,
            had=Had(
                items=np.array([came.total() for came in self._came]),
                compared=np.array([came.total() for came in compared]),
                good=self._counts(good),
                bill=bill,
            ),
            repeats=Novelty([tuple(came.values()) for came in self._came]),
            copies=Novelty([tuple(came.values()) for came in compared]) if copies_at is not None else None,
            copies_at=copies_at,
            samples=made,
            start_s=self.loading_s,
            filter_s=self._filter_s / max(made, 1),
            pool_s=self._pool_s,
            choose_s=choose_s,
            calls=len(fresh),
            known=len(asked) - len(fresh),
            micro_usd=None if None in fresh else sum(cost or 0 for cost in fresh),
        )

    def _answered(self, answer: Answer) -> Answered:
        record = self.ledger.get(answer.key)
        seconds = [entry.seconds for entry in record.entries if entry.seconds is not None] if record else []
        question = self.chosen.get(answer.key)
        place = self._place_read.get(answer.key) if question is None or question.place is None else question.place
        return Answered(
            place=place,
            size=question.size if question else len(words_of(answer.call).encode()),
            tokens_in=answer.reply.tokens_in if answer.reply else 0,
            tokens_out=answer.reply.tokens_out if answer.reply else 0,
            micro_usd=answer.micro_usd,  # 0 where nothing came; an answer that fits no schema was paid for
            seconds=seconds[-1] if seconds else 0.0,
            items=self._read[answer.key],
        )

    def _is_ours(self, key: str) -> bool:
        """Whether this recipe's run has bought the answer, so that it is on its bill."""
        record = self.ledger.get(key)
        return record is not None and any(entry.run == self.run and entry.state == "settled" for entry in record.entries)

    def _must_answer(self, line: StageLine) -> None:
        answers = self.answers[line.folder]
        if answers and all(answer.reply is None for answer in answers):
            raise RunError(
                f"none of {len(answers)} calls was answered, last: {answers[-1].error}",
                where=f"stage {line.folder}",
                next="Mend the cause and run the same command.",
            )

    def _place(self, label: str | None) -> int | None:
        return _place(label, self.first.quota)

    def _counts(self, frame: pl.DataFrame) -> Counts:
        return np.array(list(rounds.counts(frame, self.first.quota).values()), dtype=np.int64)

    def _zeros(self) -> Counts:
        return np.zeros(len(self.places), dtype=np.int64)


def _place(label: str | None, quota: Mapping[str, int]) -> int | None:
    """The index of a label's place; of the rest, where it has none of its own."""
    places = list(quota)
    if label is not None and label in quota:
        return places.index(label)
    return places.index(REST) if REST in quota else None


def _twins(copies: pl.DataFrame) -> dict[str, str]:
    """The row that each of these is a copy of; where a filter does not name it, one that stands for it alone."""
    found: dict[str, str] = {}
    for sample, detail in copies.select("sample", "detail").iter_rows():
        twin = json.loads(detail or "{}").get("twin")
        found[sample] = found.get(twin, twin) if isinstance(twin, str) else f"twin of {sample}"
    return found


class _Asking(Still):
    """The first round's context, which lets through the questions with the keys in `only`; to the others no answer ever comes."""

    def __init__(self, probe: _Probe, line: StageLine, only: Iterable[str] | None = None) -> None:
        super().__init__(line.folder, **probe.first.known, round=1, needs=probe.first.needs.get(line.folder, ()))
        self._probe, self._only = probe, only

    def ask(self, calls: Iterable[Call]) -> Iterator[Answer]:
        let_through = (call for call in calls if self._only is None or self._probe.first.key(call) in self._only)
        for answer in self._probe.gateway.ask(let_through, stage=self.stage, round=self.round):
            self._probe.answers[self.stage].append(answer)
            yield answer

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self._probe.embed(texts)

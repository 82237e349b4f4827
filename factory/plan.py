"""Says what a run would ask, of whom, what it would cost and take, without asking anything."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from factory import rounds
from factory.errors import GristmillError, RunError
from factory.gateway import estimate, filled
from factory.ledger import LEDGER_FILE, Ledger
from factory.progress import dollars, duration
from factory.recipe import Recipe
from factory.records import RunFolder
from factory.stage import Filter, Generator, Need, Vectors
from factory.store import SAMPLES, samples_frame
from schemas.call import Answer, Call
from schemas.sample import Sample

ASSUMED_RATE = 0.5  # good rows a sample made, before a run has shown one; what a first round goes by
ASSUMED_TOKENS_S = 40.0  # of one stream, before a teacher has answered


@dataclass(frozen=True)
class Estimate:
    """What one stage is expected to ask of one teacher until the target is met.

    `calls` is the expected number, `in_ledger` how many of the first round's the ledger would answer for nothing. Money is in
    micro-dollars, None where the price is unknown; `worst` is what the same calls could cost at most.
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


@dataclass(frozen=True)
class Plan:
    """All estimates, what they rest on, and what the seeds hold."""

    recipe: Recipe
    seeds: pl.DataFrame
    holdout: int
    unreadable: int
    estimates: tuple[Estimate, ...]
    assumptions: tuple[str, ...]


def make_plan(recipe: Recipe, home: Path) -> Plan:
    """Read the seeds, form the first round's questions, and count; the pace of a teacher comes from the ledger where it has one."""
    read = [
        item
        for line in recipe.stages
        if isinstance(line.stage, Generator) and line.stage.once
        for item in line.stage.generate(SAMPLES.to_frame(), _Still(recipe, line.folder))
    ]
    first: dict[str, Sample] = {}
    for item in read:
        if isinstance(item, Sample):
            first.setdefault(item.id, item)  # of two alike the first, as in a run: the questions must be the same
    samples = list(first.values())
    everything = samples_frame(samples)
    seeds = everything.filter(~pl.col("holdout"))
    if seeds.is_empty():
        raise RunError("the seeds stage gives no seed that a teacher may see")
    quota = rounds.quotas(recipe.target, seeds)
    rate, basis = _rate(recipe, home)
    oversample = recipe.target.oversample
    needs = rounds.needs(quota, {}, {}, oversample=oversample)  # the first round's, and so its very questions
    rest = max(1.0, ASSUMED_RATE / ((rate or ASSUMED_RATE) * oversample))  # rounds after it, where fewer pass than it assumes
    made = recipe.target.accepted * oversample / ASSUMED_RATE * rest
    estimates: list[Estimate] = []
    assumptions = [basis]
    with Ledger.open(home / LEDGER_FILE) if (home / LEDGER_FILE).exists() else nullcontext() as ledger:  # a plan writes nothing
        for line in recipe.stages:
            ctx = _Still(recipe, line.folder, seeds, needs)
            if isinstance(line.stage, Generator):
                calls, scale = list(line.stage.questions(seeds, ctx)), rest
            else:
                assert isinstance(line.stage, Filter)
                calls = list(line.stage.questions(seeds, ctx))  # the seeds stand in for what is not made yet
                scale = made / seeds.height
            for teacher in dict.fromkeys(call.teacher for call in calls):
                asked = [call for call in calls if call.teacher == teacher]
                estimates.append(_estimate(recipe, line.folder, teacher, asked, scale, ledger, assumptions))
    return Plan(
        recipe, seeds, everything.height - seeds.height, len(read) - len(samples), tuple(estimates), tuple(dict.fromkeys(assumptions))
    )


def _estimate(
    recipe: Recipe, stage: str, name: str, calls: Sequence[Call], scale: float, ledger: Ledger | None, assumptions: list[str]
) -> Estimate:
    """What one stage asks of one teacher: the calls of one round, times `scale`."""
    teacher = recipe.teachers[name]
    each = [estimate(call, teacher) for call in calls]
    count = math.ceil(len(calls) * scale)
    tokens_out = math.ceil(sum(e.tokens_out for e in each) * scale)
    pace = ledger.pace(*teacher.identity()) if ledger else None
    if pace is None:
        seconds = tokens_out / ASSUMED_TOKENS_S / teacher.concurrency
        assumptions.append(
            f"{name} writes {ASSUMED_TOKENS_S:.0f} tokens a second a request (it has not answered yet), {teacher.concurrency} at once"
        )
    else:
        seconds = count * pace / teacher.concurrency
        assumptions.append(f"{name} takes {pace:.2f} s a call, as the ledger has seen, {teacher.concurrency} at once")
    return Estimate(
        stage=stage,
        teacher=name,
        calls=count,
        in_ledger=sum(ledger.holds(filled(call, teacher).key(*teacher.identity())) for call in calls) if ledger else 0,
        tokens_in=math.ceil(sum(e.tokens_in for e in each) * scale),
        tokens_out=tokens_out,
        micro_usd=_scaled([e.micro_usd for e in each], scale),
        worst_micro_usd=_scaled([e.worst_micro_usd for e in each], scale),
        seconds=seconds,
    )


def _scaled(costs: Sequence[int | None], scale: float) -> int | None:
    return None if None in costs else math.ceil(sum(cost or 0 for cost in costs) * scale)


def _rate(recipe: Recipe, home: Path) -> tuple[float | None, str]:
    """Good rows a sample made: what the last run of a recipe of this name gave, else an assumption."""
    for folder in sorted((home / "runs").glob(f"{recipe.name}-????????"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            run = RunFolder(folder)
            _ = run.status
            fates = run.fates
        except GristmillError:
            continue  # a run of another layout tells nothing
        made = fates.filter(pl.col("fate").is_in(["accepted", "surplus", "rejected"])).height
        good = fates.filter(pl.col("fate").is_in(["accepted", "surplus"])).height
        if made and good:
            return good / made, f"{good / made:.0%} of the samples pass, as in {folder.name}"
    return None, f"{ASSUMED_RATE:.0%} of the samples pass (nothing of this name was run yet)"


def plan_table(recipe: Recipe, home: Path) -> RenderableType:
    """The plan as a table for a terminal."""
    plan = make_plan(recipe, home)
    labels = plan.seeds["label"].drop_nulls().n_unique()
    seeds = f"{plan.seeds.height} seeds" + (f" of {labels} labels" if labels else "")
    seeds += f", {plan.holdout} more set aside for test" if plan.holdout else ""
    seeds += f", {plan.unreadable} lines unreadable or repeated" if plan.unreadable else ""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "asks", "calls", "in ledger", "tokens in", "tokens out", "cost", "at most", "time"):
        table.add_column(name, justify="left" if name in ("stage", "asks") else "right")
    for e in plan.estimates:
        table.add_row(
            e.stage,
            e.teacher,
            f"{e.calls:,}",
            f"{e.in_ledger:,}",
            f"{e.tokens_in:,}",
            f"{e.tokens_out:,}",
            dollars(e.micro_usd),
            dollars(e.worst_micro_usd),
            duration(e.seconds),
        )
    known = all(e.micro_usd is not None for e in plan.estimates)
    total = sum(e.micro_usd or 0 for e in plan.estimates) if known else None
    budget = recipe.target.budget_usd
    lines = [
        f"{recipe.name}: {seeds}; wanted: {recipe.target.accepted} accepted rows"
        + (f", balanced by {recipe.target.balance}" if recipe.target.balance else ""),
        "in all: "
        + dollars(total)
        + (f" of a budget of ${budget:g}" if budget is not None else "")
        + f", about {duration(sum(e.seconds for e in plan.estimates))} of asking",
        "this rests on: " + "; ".join(plan.assumptions),
        _standing(recipe, home),
    ]
    return Group(Text(lines[0]), Text(), table, Text(), *(Text(line) for line in lines[1:]))


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


class _Still:
    """`factory.stage.Context` in which nothing can be asked."""

    def __init__(self, recipe: Recipe, stage: str, seeds: pl.DataFrame | None = None, needs: Sequence[Need] = ()) -> None:
        self.stage, self.round, self.needs = stage, 1 if needs else 0, needs
        self.rng = random.Random(f"{recipe.seed}/{stage}/{self.round}")
        self.seeds = self.kept = SAMPLES.to_frame() if seeds is None else seeds
        self.teachers = tuple(recipe.teachers)

    def ask(self, calls: Iterable[Call]) -> Iterator[Answer]:
        raise RuntimeError(f"stage {self.stage} asked during a plan")

    def embed(self, texts: Sequence[str]) -> Vectors:
        raise RuntimeError(f"stage {self.stage} embedded during a plan")

    def report(self, name: str, value: Any) -> None:
        pass

    def progress(self, done: int, total: int | None = None) -> None:
        pass

"""Turns the mill: rounds of generators and filters until the target is met, the budget is spent, or nothing more comes.

A run that is started again reads what is whole, does the rest anew, and the ledger answers what was asked. Only a round that
the budget cut short is done again, so that more money goes on where less stopped. How stages run is in `factory/chain.py`.
"""

from __future__ import annotations

import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import polars as pl

from factory import aim, rounds
from factory.chain import BUDGET_SPENT, Stages, Tally, World
from factory.errors import RunError, RunLocked
from factory.gateway import Gateway
from factory.ledger import Ledger, open_ledger
from factory.loop import Standing, check_target, choose, counted, reference_of, standing, view
from factory.masks import spans_in
from factory.progress import RunState, round_line, shown
from factory.recipe import Recipe, StageLine
from factory.records import LAYOUT, TARGET, RunFolder
from factory.stage import Filter, Generator, check_filters
from factory.store import (
    QUALITY,
    SAMPLES,
    read_json,
    unwritable,
    write_bytes,
    write_frame,
    write_json,
)
from factory.watch import Alarm, alarms, look


def run(recipe: Recipe, home: Path, *, view: Literal["auto", "live", "plain", "quiet"] = "auto", retry_failed: bool = False) -> RunFolder:
    """Run a recipe to its target, or go on where an earlier run of it stopped; gives the run's folder.

    `retry_failed`: calls that finally failed are asked again (see `failed_calls`), and what came after them in their round and
    later is done anew (what was answered, the ledger answers).

    The outcome is in `run.json`: "done", or "short" with a reason. RunLocked: another process is at it. RunError (and
    KeyboardInterrupt) leave everything that was made; the same command goes on.
    """
    folder = recipe.run_folder(home)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        open_folder(folder, recipe)
        ledger = stack.enter_context(open_ledger(home))
        micro = recipe.target.budget_micro_usd
        gateway = stack.enter_context(
            Gateway(recipe.teachers, ledger, home=home, run=folder.name, budget_micro_usd=micro, retry_failed=retry_failed)
        )
        state = RunState(recipe.name, recipe.target.accepted, micro, meter=gateway)
        try:
            with shown(state, view):
                Mill(recipe, folder, ledger, gateway, state).turn(retry_failed=retry_failed)
        except KeyboardInterrupt:
            if view != "quiet" and (waiting := gateway.snapshot().in_flight):
                answers = "an answer that is" if waiting == 1 else f"{waiting} answers that are"
                print(f"waiting for {answers} under way, since they are paid for; ctrl-C again to stop at once", file=sys.stderr)
            raise
    return RunFolder(folder)


def failed_calls(run: RunFolder) -> int:
    """Calls, of generators and judges, that finally failed and that `retry_failed` would ask again.

    Not those that the budget kept from being asked, which more money asks.
    """
    return sum(n for stage in run.stages for n in _failed(stage).values())


def _failed(stage: Mapping[str, Any]) -> dict[str, int]:
    return {reason: n for reason, n in stage.get("unanswered", {}).items() if reason != BUDGET_SPENT}


class Mill:
    """One process's work on one run. `last`: the round after which it ends, met or not, and nothing that was cut short is done again."""

    def __init__(self, recipe: Recipe, folder: Path, ledger: Ledger, gateway: Gateway, state: RunState, *, last: int | None = None) -> None:
        self.recipe, self.folder, self.ledger, self.state, self.last = recipe, folder, ledger, state, last
        self.stages = Stages(recipe, folder, gateway, state)
        self.at: Standing | None = None
        self._started = time.monotonic()
        self._before_s = float(read_json(folder / "run.json").get("seconds", 0.0))

    def turn(self, *, retry_failed: bool = False) -> None:
        """Work until the run is done or short, and write which."""
        try:
            if self.last is None:
                self._reopen(retry_failed=retry_failed)
            status, reason = self._turn()
        except BaseException as error:
            self._write_status("stopped", str(error) or type(error).__name__)
            raise
        self._write_status(status, reason)

    def _turn(self) -> tuple[str, str]:
        self._sources()
        seeds = RunFolder(self.folder).of_fate("real")
        if seeds.is_empty():
            raise RunError("the seeds stage gave no seed that a teacher may see", next="Set fewer seeds aside with holdout, or bring more.")
        check_filters(((line.folder, line.stage) for line in self.recipe.stages), seeds)
        check_target(self.recipe, seeds, RunFolder(self.folder).of_fate("holdout").height)
        number, idle, before = 1, 0, (-1, 0)
        while True:
            at = self.at = standing(self.recipe, RunFolder(self.folder), seeds, number)
            self.state.accepted, self.state.places, self.stages.count = at.accepted, view(at), partial(counted, at)
            if number > 1:
                self.state.told.append(round_line(number - 1, at.accepted, at.grid.accepted, self.state.places))
            now = at.accepted, -sum(at.lacking.values())
            idle = 0 if number == 1 or max(now[0] - before[0], now[1] - before[1]) > 0 else idle + 1
            before = now
            if self.last is None and (stopping := [alarm for alarm in self._alarms(at) if alarm.stops and alarm.round == number - 1]):
                return "alarm", " ".join(alarm.sentence for alarm in stopping)
            if not at.lacking or (at.met and at.plenty):
                return "done", ""
            if not (self.folder / f"round-{number:02d}" / TARGET / "stage.json").exists():
                if (why := self._over(at, idle)) is not None:
                    return ("done", "") if at.met else ("short", why)
                self._round(number, at)
            number += 1

    def _alarms(self, at: Standing) -> tuple[Alarm, ...]:
        """What the watch says of the rounds so far, by the thresholds of today."""
        figures = [stage["reports"]["watch"] for stage in at.record.stages if stage["stage"] == TARGET and stage["round"] < at.number]
        raised = alarms(figures, self.recipe.watch)
        self.state.alarms = [alarm.sentence for alarm in raised if alarm.round == at.number - 1]
        return raised

    def _over(self, at: Standing, idle: int) -> str | None:
        """Why no further round is to be turned; None: one is."""
        if self.stages.broke:
            budget = f"the budget of ${self.recipe.target.budget_usd:g}"
            spent = self.ledger.spent(self.folder.name)
            return f"{budget} is spent" if spent else f"not one call fits into {budget}: each is reserved at its worst"
        if at.met and idle and at.only_soft:
            return "no further row came where clusters are thin"
        if idle >= aim.PATIENCE:
            return f"{idle} rounds in a row gave no row where one is missing"
        if self.last is not None and at.number > self.last:
            return f"the rounds that were judged again ({self.last}) are used up"
        if at.number > self.recipe.target.rounds:
            return f"target.rounds ({self.recipe.target.rounds}) are used up"
        if at.over >= {aim.aim_of(at.grid, cell) for cell in at.lacking}:
            return "nothing comes any more where rows are missing"
        return None

    def _reopen(self, *, retry_failed: bool) -> None:
        """Take the end from a round that the budget cut short, or in which calls failed that are to be asked again.

        It is done again, and what it got the ledger answers.
        """
        record = RunFolder(self.folder)
        last = max((stage["round"] for stage in record.stages if stage["stage"] == TARGET), default=0)
        at = standing(self.recipe, record, record.of_fate("real"), last + 1) if last else None
        met = at is not None and (not at.lacking or (at.met and at.plenty))
        whole = list(record.stage_folders())
        cut = [
            i
            for i, stage in enumerate(record.stages)
            if (BUDGET_SPENT in stage["unanswered"] and not met) or (retry_failed and _failed(stage))
        ]
        for folder in reversed(whole[cut[0] :] if cut else ()):  # backwards: at any moment a stage is whole only if those before it are
            (folder / "stage.json").unlink()

    def _sources(self) -> None:
        lines = [line for line in self.recipe.stages if isinstance(line.stage, Generator) and line.stage.once]
        self.stages.begin(0, lines)
        known: set[str] = set()
        for line in lines:
            self.stages.chain(0, [line], SAMPLES.to_frame(), World(seeds=SAMPLES.to_frame(), kept=SAMPLES.to_frame()), known)

    def _round(self, number: int, at: Standing) -> None:
        """One round: generate, judge, choose. Reads what an interrupted process has finished of it already."""
        record = at.record
        earlier = record.samples.filter(pl.col("round") < number)
        world = World(
            seeds=record.of_fate("real"),
            kept=pl.concat([record.of_fate("real"), at.good]),
            accepted=record.of_fate("real", "accepted"),
            holdout=record.of_fate("holdout"),
            needs=at.needs(self.stages.embed),
            reference=self.reference,
        )
        lines = [line for line in self.recipe.stages if not (isinstance(line.stage, Generator) and line.stage.once)]
        self.stages.begin(number, lines)
        known = set(earlier["id"])
        flow = SAMPLES.to_frame()
        while lines:
            head, *rest = lines
            chain = [head]
            if isinstance(head.stage, Generator):
                world = replace(world, private=frozenset(spans_in(RunFolder(self.folder).verdicts)))
            if _streams(head):
                while rest and isinstance(rest[0].stage, Filter) and rest[0].stage.scope == "sample":
                    chain.append(rest.pop(0))
            flow = self.stages.chain(number, chain, flow, replace(world, quality=self._quality(number, flow)), known)
            lines = rest
        self._choose(number, at, flow.filter(pl.col("origin") == "made"))

    def _quality(self, number: int, flow: pl.DataFrame) -> pl.DataFrame:
        """How good ranking filters have found the samples of this round so far."""
        ranking = [line.folder for line in self.recipe.stages if isinstance(line.stage, Filter) and line.stage.ranks]
        if not ranking or flow.is_empty():
            return QUALITY.to_frame()
        verdicts = RunFolder(self.folder).verdicts.filter(pl.col("round") == number)
        return flow.select("id", rounds.quality_of(flow, verdicts, ranking))

    def _choose(self, number: int, before: Standing, new: pl.DataFrame) -> None:
        """The target's own verdicts, which end the round: on all good rows of this round and those before it, chosen anew."""
        folder = self.folder / f"round-{number:02d}" / TARGET
        if (folder / "stage.json").exists():
            return
        ranking = [line.folder for line in self.recipe.stages if isinstance(line.stage, Filter) and line.stage.ranks]
        record = RunFolder(self.folder)
        turned_down = record.fates.filter(pl.col("fate") == "rejected")  # a filter of the pool may have changed its mind about old rows
        good = pl.concat([before.good, new]).join(turned_down, on="id", how="anti").sort("id")
        at = standing(self.recipe, record, record.of_fate("real"), number + 1, good=good)
        quality = rounds.quality_of(good, record.verdicts, ranking)
        verdicts = choose(at, quality, record.of_fate("real"), self.stages.embed)
        write_frame(folder / "verdicts.parquet", verdicts)
        report = {"accepted": at.accepted, "good": good.height, "missing": sum(at.lacking.values())}
        chosen = verdicts.filter("keep")["sample"]
        cells = pl.DataFrame({"id": good["id"], "cell": [None if cell is None else aim.aim_of(at.grid, cell) for cell in at.cells]})
        figures = look(
            record.samples,
            record.verdicts,
            record.failures,
            accepted=chosen,
            number=number,
            embed=self.stages.embed,
            cells=cells,
            reference=None if self.reference.is_empty() else self.reference,
        )
        tally = Tally(reports=report | {"places": {place: list(pair) for place, pair in view(at).items()}, "watch": figures})
        fresh = verdicts.join(new.select("id"), left_on="sample", right_on="id", how="semi")  # of others it was counted before
        self.stages.finish(number, TARGET, "target", tally, verdicts=fresh)

    @cached_property
    def reference(self) -> pl.DataFrame:
        """The real inputs whose distribution the target follows; none where it follows none."""
        return reference_of(self.recipe)

    def _write_status(self, status: str, reason: str) -> None:
        record = RunFolder(self.folder)
        whole = [s for s in record.stages if s["stage"] == TARGET]
        lost = self.ledger.lost(self.folder.name)
        sums = self.ledger.sums("run", self.folder.name)
        paid: int | None = sums[0].micro_usd if sums else 0
        if sums and sums[0].unpriced and not paid:
            paid = None  # nothing of it is known
        write_json(
            self.folder / "run.json",
            {
                "layout": LAYOUT,
                "name": self.recipe.name,
                "digest": self.recipe.digest,
                "files": self.recipe.hashes,
                "status": status,
                "reason": reason,
                "wanted": self.recipe.target.accepted,
                "accepted": record.accepted.height,
                "places": {place: list(pair) for place, pair in self.state.places.items()},
                "cells": self.at.explain() if self.at and status in ("done", "short", "alarm") else [],
                "alarms": [asdict(alarm) for alarm in self._alarms(self.at)] if self.at else [],
                "rounds": len(whole),
                "micro_usd": paid,
                "lost_calls": len(lost),
                "lost_micro_usd": sum(entry.reserved_micro_usd or 0 for entry in lost),
                "seconds": round(self._before_s + time.monotonic() - self._started, 2),
                "embedder": None if self.stages.embedder is None else self.stages.embedder.name,
                "versions": _versions(),
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )
        self.stages.log(status, reason=reason, accepted=record.accepted.height, micro_usd=paid)


def _streams(line: StageLine) -> bool:
    return isinstance(line.stage, Generator) or (isinstance(line.stage, Filter) and line.stage.scope == "sample")


def open_folder(folder: Path, recipe: Recipe) -> None:
    """Make the run's folder, or check that the one there is of this layout."""
    path = folder / "run.json"
    status = RunFolder(folder).status if path.exists() else {"seconds": 0.0}
    status |= {"layout": LAYOUT, "name": recipe.name, "digest": recipe.digest, "files": recipe.hashes, "status": "running", "reason": ""}
    write_bytes(folder / "recipe.yaml", recipe.text.encode())  # as it is now: its budget may have been raised
    write_json(path, status)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder; the lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise unwritable(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise RunLocked(
                f"process {file.read().strip() or '?'} is running this recipe",
                where=str(folder),
                next="Wait for it, or stop it, and run the same command.",
            ) from error
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        except OSError as error:
            raise unwritable(folder, error) from error
        yield


def _versions() -> dict[str, str]:
    packages = ("gristmill", "polars", "numpy", "onnxruntime", "scikit-learn", "umap-learn", "hdbscan")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}

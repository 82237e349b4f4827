"""Turns the mill: rounds of generators and filters until the target is met, the budget is spent, or nothing more comes.

Within a round a generator and the filters of scope "sample" behind it form one chain of threads and queues, so a judge judges
while a generator still generates; a filter of another scope waits for all. What a stage wrote is written once, its
`stage.json` last; a run that is started again reads what is whole, does the rest anew, and the ledger answers what was asked.
Only a round that the budget cut short is done again, so that more money goes on where less stopped.
"""

from __future__ import annotations

import fcntl
import math
import os
import platform
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import polars as pl

from factory import rounds
from factory.embed import Embedder, open_embedder
from factory.errors import BudgetSpent, RunError, RunLocked
from factory.gateway import Gateway, filled
from factory.ledger import Ledger
from factory.progress import RunState, StageState, shown
from factory.recipe import Recipe, StageLine
from factory.records import LAYOUT, TARGET, RunFolder
from factory.stage import Filter, Generator, Need, Vectors
from factory.store import (
    SAMPLES,
    VERDICTS,
    append_json,
    failures_frame,
    read_frame,
    read_json,
    samples_frame,
    unwritable,
    write_bytes,
    write_frame,
    write_json,
)
from schemas.call import Answer, Call
from schemas.sample import Failure, Sample

LEDGER_FILE = "ledger.db"
Lane = queue.SimpleQueue[Sample | pl.DataFrame | None]  # from a stage to the next; None: the end
BUDGET_SPENT = "budget spent"
_ENOUGH_TO_GIVE_UP = 20  # unanswered calls, when they are also more than half of a stage's


def run(recipe: Recipe, home: Path, *, view: Literal["auto", "live", "plain", "quiet"] = "auto") -> RunFolder:
    """Run a recipe to its target, or go on where an earlier run of it stopped; gives the run's folder.

    The outcome is in `run.json`: "done", or "short" with a reason. RunLocked: another process is at it. RunError (and
    KeyboardInterrupt) leave everything that was made; the same command goes on.
    """
    folder = recipe.run_folder(home)
    with ExitStack() as stack:
        stack.enter_context(_locked(folder))
        _open_folder(folder, recipe)
        ledger = stack.enter_context(Ledger.open(home / LEDGER_FILE))
        budget = recipe.target.budget_usd
        micro = None if budget is None else int(budget * 1_000_000)
        gateway = stack.enter_context(Gateway(recipe.teachers, ledger, home=home, run=folder.name, budget_micro_usd=micro))
        state = RunState(recipe.name, recipe.target.accepted, micro, meter=gateway)
        with shown(state, view):
            _Mill(recipe, folder, ledger, gateway, state).turn()
    return RunFolder(folder)


class _Mill:
    """One process's work on one run."""

    def __init__(self, recipe: Recipe, folder: Path, ledger: Ledger, gateway: Gateway, state: RunState) -> None:
        self.recipe, self.folder, self.ledger, self.gateway, self.state = recipe, folder, ledger, gateway, state
        self.broke = False
        self._quota: dict[str, int] = {}
        self._embedder: Embedder | None = None
        self._embedder_lock = threading.Lock()
        self._abort = threading.Event()
        self._started = time.monotonic()
        self._before_s = float(read_json(folder / "run.json").get("seconds", 0.0))

    def turn(self) -> None:
        """Work until the run is done or short, and write which."""
        try:
            status, reason = self._turn()
        except BaseException as error:
            self._write_status("stopped", str(error) or type(error).__name__)
            raise
        self._write_status(status, reason)

    def _turn(self) -> tuple[str, str]:
        self._reopen()
        self._sources()
        seeds = RunFolder(self.folder).of_fate("real")
        if seeds.is_empty():
            raise RunError("the seeds stage gave no seed that a teacher may see", next="Set fewer seeds aside with holdout, or bring more.")
        quota = self._quota = rounds.quotas(self.recipe.target, seeds)
        number, idle = 1, 0
        while True:
            record = RunFolder(self.folder)
            have = rounds.counts(record.accepted, quota)
            self.state.accepted = sum(have.values())
            self.state.places = {} if rounds.ANYWHERE in quota else {place: (have[place], quota[place]) for place in quota}
            if self.state.accepted >= self.recipe.target.accepted:
                return "done", ""
            end = self.folder / f"round-{number:02d}" / TARGET / "stage.json"
            if not end.exists():
                if self.broke:
                    return "short", f"the budget of ${self.recipe.target.budget_usd:g} is spent"
                if idle >= rounds.STALLED_ROUNDS:
                    return "short", f"{idle} rounds in a row gave no accepted row"
                if number > self.recipe.target.rounds:
                    return "short", f"target.rounds ({self.recipe.target.rounds}) are used up"
                self._round(number, record, quota, have)
            idle = 0 if read_json(end)["kept"] else idle + 1
            number += 1

    # -- rounds ------------------------------------------------------------------------------------------------------

    def _reopen(self) -> None:
        """Take the end from a round that the budget cut short: it is done again, and what it got the ledger answers."""
        record = RunFolder(self.folder)
        if record.accepted.height >= self.recipe.target.accepted:
            return
        whole = list(record.stage_folders())
        cut = [i for i, folder in enumerate(whole) if BUDGET_SPENT in read_json(folder / "stage.json")["unanswered"]]
        for folder in reversed(whole[cut[0] :] if cut else ()):  # backwards: at any moment a stage is whole only if those before it are
            (folder / "stage.json").unlink()

    def _sources(self) -> None:
        lines = [line for line in self.recipe.stages if isinstance(line.stage, Generator) and line.stage.once]
        self._begin(0, lines)
        known: set[str] = set()
        for line in lines:
            self._chain(0, [line], SAMPLES.to_frame(), _World(seeds=SAMPLES.to_frame(), kept=SAMPLES.to_frame()), known)

    def _round(self, number: int, record: RunFolder, quota: dict[str, int], have: dict[str, int]) -> None:
        """One round: generate, judge, choose. Reads what an interrupted process has finished of it already."""
        earlier = record.samples.filter(pl.col("round") < number)
        world = _World(
            seeds=record.of_fate("real"),
            kept=record.of_fate("real", "accepted"),
            needs=self._needs(record, number, quota, have),
        )
        lines = [line for line in self.recipe.stages if not (isinstance(line.stage, Generator) and line.stage.once)]
        self._begin(number, lines)
        known = set(earlier["id"])
        flow = SAMPLES.to_frame()
        while lines:
            head, *rest = lines
            chain = [head]
            if _streams(head):
                while rest and isinstance(rest[0].stage, Filter) and rest[0].stage.scope == "sample":
                    chain.append(rest.pop(0))
            flow = self._chain(number, chain, flow, world, known)
            lines = rest
        self._choose(number, flow, quota, have)

    def _needs(self, record: RunFolder, number: int, quota: dict[str, int], have: dict[str, int]) -> tuple[Need, ...]:
        """What the round aims at: from the rounds before it alone, so that a round done again aims at the same."""
        before = record.samples.filter((pl.col("round") < number) & (pl.col("origin") == "made"))
        good = before.join(record.fates.filter(pl.col("fate").is_in(["accepted", "surplus"])), on="id", how="semi")
        made_at, good_at = rounds.counts(before, quota), rounds.counts(good, quota)
        yields = {place: rounds.Yield(made_at[place], good_at[place]) for place in quota}
        oversample = self.recipe.target.oversample if number == 1 else 1
        clusters: tuple[Need, ...] = ()
        if self.recipe.target.balance == "cluster":
            # Of kept rows alone: others fill no place, and their clusters are those of the round in which they were judged.
            kept = record.of_fate("real", "accepted").select("id", "origin")
            members = record.clusters.join(kept, left_on="sample", right_on="id")
            missing = math.ceil((self.recipe.target.accepted - sum(have.values())) * oversample)
            clusters = rounds.thin_clusters(missing, yields[rounds.ANYWHERE].rate, members)
        return rounds.needs(quota, have, yields, oversample=oversample, clusters=clusters)

    def _choose(self, number: int, good: pl.DataFrame, quota: dict[str, int], have: dict[str, int]) -> None:
        """The target's own verdicts, which end the round."""
        folder = self.folder / f"round-{number:02d}" / TARGET
        if (folder / "stage.json").exists():
            return
        ranking = [line.folder for line in self.recipe.stages if isinstance(line.stage, Filter) and line.stage.ranks]
        record = RunFolder(self.folder)
        good = good.filter(pl.col("origin") == "made")
        quality = rounds.quality_of(good, record.verdicts.filter(pl.col("round") == number), ranking)
        held = record.of_fate("real", "accepted")
        held = held.with_columns(rounds.place_of(held, quota))

        def redundancy(place: str, candidates: pl.DataFrame) -> tuple[Vectors, Vectors]:
            vectors = self.embed(candidates["input"].to_list())
            around = self.embed(held.filter(pl.col("place") == place)["input"].to_list())
            return (vectors @ around.T).max(axis=1, initial=0), vectors

        verdicts = rounds.choose(good, quality, quota, have, redundancy)
        write_frame(folder / "verdicts.parquet", verdicts)
        self._finish(number, TARGET, "target", _Tally(), verdicts=verdicts)

    # -- stages ------------------------------------------------------------------------------------------------------

    def _chain(self, number: int, chain: Sequence[StageLine], flow: pl.DataFrame, world: _World, known: set[str]) -> pl.DataFrame:
        """Run stages as threads with queues between them; gives what came in or was made and every filter of the chain kept."""
        lanes: list[Lane] = [Lane() for _ in range(len(chain) + 1)]
        errors: list[BaseException] = []

        def work(body: Callable[[], None], out: Lane) -> None:
            try:
                body()
            except BaseException as error:
                errors.append(error)
                self._abort.set()
            finally:
                out.put(None)

        threads = []
        for line, (lane, out) in zip(chain, pairwise(lanes), strict=True):
            if isinstance(line.stage, Generator):
                body = _bind(self._generate, number, line, line.stage, world, flow, known, out)
            else:
                assert isinstance(line.stage, Filter)
                body = _bind(self._judge, number, line, line.stage, world, lane, out)
            threads.append(threading.Thread(target=work, args=(body, out), name=line.folder, daemon=True))
        lanes[0].put(flow)
        lanes[0].put(None)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # a join without a limit can't be interrupted by ctrl-C on every platform
        except KeyboardInterrupt:
            self._abort.set()
            raise
        if errors:
            raise next((e for e in errors if not isinstance(e, _Aborted)), errors[0])
        return _drained(lanes[-1])

    def _generate(
        self,
        number: int,
        line: StageLine,
        stage: Generator,
        world: _World,
        flow: pl.DataFrame,
        known: set[str],
        out: Lane,
    ) -> None:
        shown_state = self._working(line)
        folder = self._stage_folder(number, line)
        out.put(flow)
        if (folder / "stage.json").exists():
            made = read_frame(folder / "samples.parquet", SAMPLES)
            known.update(made["id"])
            shown_state.state, shown_state.kept = "done", made.height
            out.put(made)
            return
        ctx = _StageContext(self, line, number, world)
        start = time.monotonic()
        made_here: dict[str, Sample] = {}
        failures: list[Failure] = []
        for item in stage.generate(pl.concat([world.kept, flow]), ctx):
            self._check_abort()
            if isinstance(item, Failure):
                failures.append(item)
                continue
            if item.id in known:
                failures.append(_repeat(item))
                continue
            made_here[item.id] = item
            known.add(item.id)
            shown_state.kept = len(made_here)
            out.put(item)
        lost = ctx.tally.calls - {s.provenance.call for s in made_here.values()} - {f.call for f in failures}
        if lost:
            raise RuntimeError(
                f"stage {line.folder} lost {len(lost)} of {len(ctx.tally.calls)} calls: neither samples nor failures name them"
            )
        samples, failed = samples_frame(made_here.values()), failures_frame(failures)
        if not stage.once:  # answers come in any order, rows do not; of two calls that gave one text, the first to answer stands
            samples, failed = samples.sort("id"), failed.sort(pl.all())
        write_frame(folder / "samples.parquet", samples)
        write_frame(folder / "failures.parquet", failed)
        ctx.tally.seconds = time.monotonic() - start
        ctx.tally.lost.update(f.reason for f in failures)
        self._finish(number, line.folder, "source" if stage.once else "generator", ctx.tally, made=len(made_here))
        shown_state.state = "done"

    def _judge(self, number: int, line: StageLine, stage: Filter, world: _World, lane: Lane, out: Lane) -> None:
        """Judge what comes down the lane: in batches as they come (scope "sample"), or all at once."""
        shown_state = self._working(line)
        folder = self._stage_folder(number, line)
        done = read_frame(folder / "verdicts.parquet", VERDICTS) if (folder / "stage.json").exists() else None
        ctx = _StageContext(self, line, number, world)
        given, new = [VERDICTS.to_frame()], [SAMPLES.to_frame().select("id")]
        start = time.monotonic()
        working = 0.0
        batches = _batches(lane) if stage.scope == "sample" else iter([_drained(lane)])
        for batch in batches:
            self._check_abort()
            began = time.monotonic()
            asked = batch if stage.scope != "pool" else pl.concat([world.kept, batch])
            if done is None:
                verdicts = stage.judge(asked, ctx).with_columns(by=pl.lit(line.folder)) if asked.height else VERDICTS.to_frame()
                _one_verdict_each(line, asked, verdicts)
            else:
                verdicts = done.join(asked.select("id"), left_on="sample", right_on="id", how="semi")
                _one_verdict_each(line, asked, verdicts)
            working += time.monotonic() - began
            given.append(verdicts)
            new.append(batch.select("id"))
            kept = batch.join(verdicts.filter("keep").select("sample"), left_on="id", right_on="sample", how="semi", maintain_order="left")
            shown_state.done += batch.height
            shown_state.kept += kept.height
            for place, n in rounds.counts(kept, self._quota).items():
                shown_state.places[place] = shown_state.places.get(place, 0) + n
            shown_state.rejected += batch.height - kept.height
            out.put(kept)
        self._check_abort()  # a lane also ends when the stage before failed: what came then is not all
        if done is None:
            verdicts = pl.concat(given).sort("sample")
            write_frame(folder / "verdicts.parquet", verdicts)
            ctx.tally.seconds = working if stage.scope == "sample" else time.monotonic() - start
            counted = verdicts.join(pl.concat(new), left_on="sample", right_on="id", how="semi")  # of the pool, what is new
            self._finish(number, line.folder, "filter", ctx.tally, verdicts=counted)
        shown_state.state = "done"

    # -- what is written ---------------------------------------------------------------------------------------------

    def _finish(self, number: int, name: str, kind: str, tally: _Tally, *, made: int = 0, verdicts: pl.DataFrame | None = None) -> None:
        """Write `stage.json`: the stage is whole. RunError where its files are no longer those that the run's digest is of."""
        if changed := self.recipe.changed(name):
            raise RunError(
                f"a file of the recipe changed while it ran: {changed[0]}",
                where=f"stage {name}",
                next="Run the same command: the changed recipe has a folder of its own, and the ledger answers what was asked.",
            )
        judged = VERDICTS.to_frame() if verdicts is None else verdicts
        rejected = judged.filter(~pl.col("keep"))["reason"].fill_null("no reason").value_counts()
        stage = {
            "layout": LAYOUT,
            "stage": name,
            "kind": kind,
            "round": number,
            "asked": tally.asked,
            "answered": tally.answered,
            "unanswered": dict(sorted(tally.unanswered.items())),
            "from_ledger": tally.from_ledger,
            "made": made,
            "lost": dict(sorted(tally.lost.items())),
            "judged": judged.height,
            "kept": judged.filter("keep").height,
            "rejected": dict(sorted(rejected.iter_rows())),
            "micro_usd": tally.micro_usd,
            "tokens_in": tally.tokens_in,
            "tokens_out": tally.tokens_out,
            "seconds": round(tally.seconds, 3),
            "teachers": {name: dict(counts) for name, counts in sorted(tally.teachers.items())},
            "reports": tally.reports,
        }
        write_json(self.folder / f"round-{number:02d}" / name / "stage.json", stage)
        self._log("stage", **{k: stage[k] for k in ("round", "stage", "asked", "answered", "made", "judged", "kept", "seconds")})

    def _write_status(self, status: str, reason: str) -> None:
        record = RunFolder(self.folder)
        whole = [s for s in record.stages if s["stage"] == TARGET]
        paid, lost = self.ledger.spent(self.folder.name), self.ledger.lost(self.folder.name)
        write_json(
            self.folder / "run.json",
            {
                "layout": LAYOUT,
                "name": self.recipe.name,
                "digest": self.recipe.digest,
                "status": status,
                "reason": reason,
                "wanted": self.recipe.target.accepted,
                "accepted": record.accepted.height,
                "places": {place: list(pair) for place, pair in self.state.places.items()},
                "rounds": len(whole),
                "micro_usd": paid,
                "lost_calls": len(lost),
                "lost_micro_usd": sum(entry.reserved_micro_usd or 0 for entry in lost),
                "seconds": round(self._before_s + time.monotonic() - self._started, 2),
                "embedder": None if self._embedder is None else self._embedder.name,
                "versions": _versions(),
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )
        self._log(status, reason=reason, accepted=record.accepted.height, micro_usd=paid)

    def _log(self, event: str, **facts: Any) -> None:
        append_json(self.folder / "log.jsonl", {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts})

    # -- small things ------------------------------------------------------------------------------------------------

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors from the recipe's embedder, opened at the first use and cached in the run's folder."""
        with self._embedder_lock:
            if self._embedder is None:
                self._embedder = open_embedder(self.recipe.embedder, self.folder / "vectors")
        return self._embedder.embed(texts)

    def _begin(self, number: int, lines: Sequence[StageLine]) -> None:
        self.state.begin(number, [StageState(line.folder, asks=isinstance(line.stage, Generator)) for line in lines])

    def _working(self, line: StageLine) -> StageState:
        state = next(s for s in self.state.stages if s.folder == line.folder)
        state.state = "working"
        return state

    def _stage_folder(self, number: int, line: StageLine) -> Path:
        return self.folder / f"round-{number:02d}" / line.folder

    def _check_abort(self) -> None:
        if self._abort.is_set():
            raise _Aborted


class _Aborted(Exception):
    """Another stage of the chain failed, or the user pressed ctrl-C."""


@dataclass(frozen=True)
class _World:
    """What all stages of a round see alike."""

    seeds: pl.DataFrame
    kept: pl.DataFrame
    needs: tuple[Need, ...] = ()


@dataclass
class _Tally:
    """What one stage asked and reported in one round; written by the stage's own thread."""

    asked: int = 0
    answered: int = 0
    from_ledger: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    calls: set[str | None] = field(default_factory=set)
    micro_usd: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    teachers: dict[str, Counter[str]] = field(default_factory=dict)
    reports: dict[str, Any] = field(default_factory=dict)


class _StageContext:
    """`factory.stage.Context`, for one stage in one round."""

    def __init__(self, mill: _Mill, line: StageLine, number: int, world: _World) -> None:
        self._mill, self._world = mill, world
        self.stage, self.round = line.folder, number
        self.rng = random.Random(f"{mill.recipe.seed}/{line.folder}/{number}")
        self.seeds, self.kept, self.needs = world.seeds, world.kept, world.needs
        self.teachers = tuple(mill.recipe.teachers)
        self.tally = _Tally()
        self._drains = isinstance(line.stage, Filter)
        self._state = next(s for s in mill.state.stages if s.folder == line.folder)

    def ask(self, calls: Iterable[Call]) -> Iterator[Answer]:
        """Ask through the gateway and keep count; where the budget ends, what was pulled comes back unanswered."""
        pulled: dict[int, Call] = {}
        source = iter(calls)

        def pull() -> Iterator[Call]:
            for call in source:
                pulled[id(call)] = call
                self.tally.asked += 1
                yield call

        try:
            for answer in self._mill.gateway.ask(pull(), stage=self.stage, round=self.round):
                self._mill._check_abort()
                pulled.pop(id(answer.call), None)
                yield self._counted(answer)
        except BudgetSpent:
            self._mill.broke = True
            left = [*pulled.values(), *(pull() if self._drains else ())]
            for call in left:
                teacher = self._mill.recipe.teachers[call.teacher]
                key = filled(call, teacher).key(*teacher.identity())
                yield self._counted(Answer(call=call, key=key, reply=None, error=BUDGET_SPENT))

    def _counted(self, answer: Answer) -> Answer:
        tally = self.tally
        tally.calls.add(answer.key)
        if answer.reply is None:
            tally.unanswered[(answer.error or "failed").split(":")[0][:60]] += 1
            failed = tally.unanswered.total() - tally.unanswered[BUDGET_SPENT]
            if failed >= _ENOUGH_TO_GIVE_UP and failed > tally.asked / 2:
                raise RunError(
                    f"{failed} of {tally.asked} calls failed, last: {answer.error}",
                    where=f"stage {self.stage}",
                    next=f"{tally.answered} answers are kept. Mend the cause and run the same command.",
                )
            return answer
        tally.answered += 1
        tally.from_ledger += not answer.fresh
        paid = (answer.micro_usd or 0) if answer.fresh else 0  # what the ledger answers was paid by the run that it was bought for
        tally.micro_usd += paid
        tally.tokens_in += answer.reply.tokens_in
        tally.tokens_out += answer.reply.tokens_out
        tally.teachers.setdefault(answer.call.teacher, Counter()).update(
            calls=1,
            from_ledger=int(not answer.fresh),
            tokens_in=answer.reply.tokens_in,
            tokens_out=answer.reply.tokens_out,
            micro_usd=paid,
        )
        if self._state.asks:
            self._state.done = tally.answered
        return answer

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self._mill.embed(texts)

    def report(self, name: str, value: Any) -> None:
        self.tally.reports[name] = value

    def progress(self, done: int, total: int | None = None) -> None:
        self._state.total = total
        if self._state.asks:
            self._state.done = done


def _streams(line: StageLine) -> bool:
    return isinstance(line.stage, Generator) or (isinstance(line.stage, Filter) and line.stage.scope == "sample")


def _bind(body: Callable[..., None], *args: Any) -> Callable[[], None]:
    return lambda: body(*args)


def _batches(lane: Lane) -> Iterator[pl.DataFrame]:
    """All that waits in the lane at a time, as one frame, until its end: small batches when rows drip, large ones when they pour."""
    ended = False
    while not ended:
        items: list[Sample | pl.DataFrame] = []
        item = lane.get()
        while item is not None:
            items.append(item)
            try:
                item = lane.get_nowait()
            except queue.Empty:
                break
        else:
            ended = True
        if (batch := _frame(items)).height:
            yield batch


def _drained(lane: Lane) -> pl.DataFrame:
    """Everything that comes down the lane until its end, sorted by id: a filter of all must not see the order of arrival."""
    items: list[Sample | pl.DataFrame] = []
    while (item := lane.get()) is not None:
        items.append(item)
    return _frame(items).sort("id")


def _frame(items: Sequence[Sample | pl.DataFrame]) -> pl.DataFrame:
    made = samples_frame(item for item in items if isinstance(item, Sample))
    return pl.concat([made, *(item for item in items if isinstance(item, pl.DataFrame))])


def _one_verdict_each(line: StageLine, asked: pl.DataFrame, verdicts: pl.DataFrame) -> None:
    """The check that nothing is lost: every sample that was handed in has exactly one verdict, and no other has."""
    if verdicts.schema != VERDICTS:
        raise RuntimeError(f"stage {line.folder} gave verdicts with the schema {verdicts.schema}, not {VERDICTS}")
    if not asked["id"].sort().equals(verdicts["sample"].sort(), check_names=False):
        raise RuntimeError(
            f"stage {line.folder} was handed {asked.height} samples and gave {verdicts.height} verdicts, or on other samples"
        )


def _repeat(sample: Sample) -> Failure:
    p = sample.provenance
    return Failure(
        reason="repeat", detail=f"same content as {sample.id}", text=sample.input, teacher=p.teacher, call=p.call, source=p.source
    )


def _open_folder(folder: Path, recipe: Recipe) -> None:
    """Make the run's folder, or check that the one there is of this layout."""
    path = folder / "run.json"
    status = RunFolder(folder).status if path.exists() else {"seconds": 0.0}
    status |= {"layout": LAYOUT, "name": recipe.name, "digest": recipe.digest, "status": "running", "reason": ""}
    write_bytes(folder / "recipe.yaml", recipe.text.encode())  # as it is now: its budget may have been raised
    write_json(path, status)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
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

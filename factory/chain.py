"""Runs the stages of a round as threads with queues between them, and writes down what each of them did.

A generator and the filters of scope "sample" behind it form one chain, so a judge judges while a generator still generates; a
filter of another scope is a chain of its own and waits for all. What a stage wrote is written once, its `stage.json` last; a
stage that an earlier process finished is read, not run.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from factory.embed import Embedder, open_embedder
from factory.errors import BudgetSpent, RunError
from factory.gateway import NOT_OF_SCHEMA, UNKNOWN, Gateway, filled
from factory.progress import RunState, StageState
from factory.recipe import Recipe, StageLine
from factory.records import COSTS, LAYOUT
from factory.rows import read_samples
from factory.stage import Filter, Generator, Need, Vectors
from factory.store import QUALITY, SAMPLES, VERDICTS, append_json, failures_frame, read_frame, samples_frame, write_frame, write_json
from schemas.call import Answer, Call
from schemas.sample import Failure, Sample

T = TypeVar("T")
Lane = queue.SimpleQueue[Sample | pl.DataFrame | None]  # from a stage to the next; None: the end
BATCHES_AT_ONCE = 8  # of a filter that asks
BUDGET_SPENT = "budget spent"
_ENOUGH_TO_GIVE_UP = 20  # unanswered calls, when they are also more than the answered ones of a stage


@dataclass(frozen=True)
class World:
    """What all stages of a round see alike."""

    seeds: pl.DataFrame
    kept: pl.DataFrame  # all that filters kept, for filters to compare with
    accepted: pl.DataFrame = field(default_factory=SAMPLES.to_frame)  # and what the target took of it, for generators to go on from
    holdout: pl.DataFrame = field(default_factory=SAMPLES.to_frame)
    quality: pl.DataFrame = field(default_factory=QUALITY.to_frame)
    needs: Mapping[str, tuple[Need, ...]] = field(default_factory=dict)  # by the generator's line
    reference: pl.DataFrame = field(default_factory=SAMPLES.to_frame)
    private: frozenset[str] = frozenset()  # samples of which a verdict wants something masked: no generator goes on from them


@dataclass
class Tally:
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
    # Of each call: who answered, its price when it was bought, and what it aimed at.
    costs: dict[str, tuple[str, int | None, str]] = field(default_factory=dict)
    reports: dict[str, Any] = field(default_factory=dict)


class Stages:
    """The stages of one run at work. `count` says of how many places rows are, for the view; `broke`: the budget ended a stage early."""

    def __init__(self, recipe: Recipe, folder: Path, gateway: Gateway, state: RunState) -> None:
        self.recipe, self.folder, self.gateway, self.state = recipe, folder, gateway, state
        self.count: Callable[[pl.DataFrame], Mapping[str, int]] = lambda rows: {}
        self.broke = False
        self.embedder: Embedder | None = None
        self._embedder_lock = threading.Lock()
        self._abort = threading.Event()

    def begin(self, number: int, lines: Sequence[StageLine]) -> None:
        """Show that a round begins."""
        self.state.begin(number, [StageState(line.folder, asks=isinstance(line.stage, Generator)) for line in lines])

    def chain(self, number: int, chain: Sequence[StageLine], flow: pl.DataFrame, world: World, known: set[str]) -> pl.DataFrame:
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
        flow = _drained(lanes[-1])
        made = [
            read_frame(self._stage_folder(number, line) / "samples.parquet", SAMPLES) for line in chain if isinstance(line.stage, Generator)
        ]
        new = flow.select("id").join(pl.concat([*made, SAMPLES.to_frame()]), on="id", how="inner")  # with the origin that was written down
        return pl.concat([flow.join(new, on="id", how="anti"), new]).sort("id")

    def _generate(
        self,
        number: int,
        line: StageLine,
        stage: Generator,
        world: World,
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
        shown = pl.concat([world.accepted, flow]).filter(~pl.col("id").is_in(list(world.private)))
        for item in stage.generate(shown, ctx):
            self.check_abort()
            if isinstance(item, Failure):
                failures.append(item)
                continue
            if (first := made_here.get(item.id)) and (item.provenance.call or "") < (first.provenance.call or ""):
                made_here[item.id], item = item, first  # whichever came first: whose it is must not hang on that
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
        if not stage.once:
            _write_costs(folder, ctx.tally)
        ctx.tally.seconds = time.monotonic() - start
        ctx.tally.lost.update(f.reason for f in failures)
        self.finish(number, line.folder, "source" if stage.once else "generator", ctx.tally, made=len(made_here))
        shown_state.state = "done"

    def _judge(self, number: int, line: StageLine, stage: Filter, world: World, lane: Lane, out: Lane) -> None:
        """Judge what comes down the lane: in batches as they come (scope "sample"), or all at once."""
        shown_state = self._working(line)
        folder = self._stage_folder(number, line)
        done = read_frame(folder / "verdicts.parquet", VERDICTS) if (folder / "stage.json").exists() else None
        ctx = _StageContext(self, line, number, world)
        given, new = [VERDICTS.to_frame()], [SAMPLES.to_frame().select("id")]
        start = time.monotonic()
        working = 0.0

        def judge(batch: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, float]:
            self.check_abort()
            began = time.monotonic()
            asked = batch if stage.scope != "pool" else pl.concat([world.kept, batch])
            if done is None:
                verdicts = stage.judge(asked, ctx).with_columns(by=pl.lit(line.folder)) if asked.height else VERDICTS.to_frame()
            else:
                verdicts = done.join(asked.select("id"), left_on="sample", right_on="id", how="semi")
            _one_verdict_each(line, asked, verdicts)
            return batch, verdicts, time.monotonic() - began

        asks = type(stage).questions is not Filter.questions
        batches = _batches(lane) if stage.scope == "sample" else iter([_drained(lane)])
        for batch, verdicts, seconds in _at_once(judge, batches, BATCHES_AT_ONCE) if asks and done is None else map(judge, batches):
            working += seconds
            given.append(verdicts)
            new.append(batch.select("id"))
            kept = batch.join(verdicts.filter("keep").select("sample"), left_on="id", right_on="sample", how="semi", maintain_order="left")
            shown_state.done += batch.height
            shown_state.kept += kept.height
            for place, n in self.count(kept).items():
                shown_state.places[place] = shown_state.places.get(place, 0) + n
            shown_state.rejected += batch.height - kept.height
            out.put(kept)
        self.check_abort()  # a lane also ends when the stage before failed: what came then is not all
        if done is None:
            verdicts = pl.concat(given).sort("sample")
            write_frame(folder / "verdicts.parquet", verdicts)
            if ctx.tally.costs:
                _write_costs(folder, ctx.tally)
            ctx.tally.seconds = working if stage.scope == "sample" else time.monotonic() - start
            counted = verdicts.join(pl.concat(new), left_on="sample", right_on="id", how="semi")  # of the pool, what is new
            self.finish(number, line.folder, "filter", ctx.tally, verdicts=counted)
        shown_state.state = "done"

    def finish(self, number: int, name: str, kind: str, tally: Tally, *, made: int = 0, verdicts: pl.DataFrame | None = None) -> None:
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
        self.log("stage", **{k: stage[k] for k in ("round", "stage", "asked", "answered", "made", "judged", "kept", "seconds")})

    def log(self, event: str, **facts: Any) -> None:
        """Append a line to `log.jsonl`."""
        append_json(self.folder / "log.jsonl", {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts})

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors from the recipe's embedder, opened at the first use and cached in the run's folder."""
        with self._embedder_lock:
            if self.embedder is None:
                self.embedder = open_embedder(self.recipe.embedder, self.folder / "vectors")
        return self.embedder.embed(texts)

    def _working(self, line: StageLine) -> StageState:
        state = next(s for s in self.state.stages if s.folder == line.folder)
        state.state = "working"
        return state

    def _stage_folder(self, number: int, line: StageLine) -> Path:
        return self.folder / f"round-{number:02d}" / line.folder

    def check_abort(self) -> None:
        """Raise where another stage of the chain has failed, or the user pressed ctrl-C."""
        if self._abort.is_set():
            raise _Aborted


class _Aborted(Exception):
    """Another stage of the chain failed, or the user pressed ctrl-C."""


class _StageContext:
    """`factory.stage.Context`, for one stage in one round."""

    def __init__(self, stages: Stages, line: StageLine, number: int, world: World) -> None:
        self._stages = stages
        self.stage, self.round = line.folder, number
        self.rng = random.Random(f"{stages.recipe.seed}/{line.folder}/{number}")
        self.seeds, self.kept, self.needs = world.seeds, world.kept, world.needs.get(line.folder, ())
        self.holdout, self.quality, self.reference = world.holdout, world.quality, world.reference
        self.teachers = tuple(stages.recipe.teachers)
        self.models = {name: teacher.model for name, teacher in stages.recipe.teachers.items()}
        self.tally = Tally()
        self._counting = threading.Lock()  # batches of a filter may be judged at once
        self._drains = isinstance(line.stage, Filter)
        self._state = next(s for s in stages.state.stages if s.folder == line.folder)

    def ask(self, calls: Iterable[Call]) -> Iterator[Answer]:
        """Ask through the gateway and keep count; where the budget ends, what was pulled comes back unanswered."""
        pulled: dict[int, Call] = {}
        source = iter(calls)

        def pull() -> Iterator[Call]:
            for call in source:
                pulled[id(call)] = call
                with self._counting:
                    self.tally.asked += 1
                yield call

        try:
            for answer in self._stages.gateway.ask(pull(), stage=self.stage, round=self.round):
                self._stages.check_abort()
                pulled.pop(id(answer.call), None)
                yield self._counted(answer)
        except BudgetSpent:
            self._stages.broke = True
            left = [*pulled.values(), *(pull() if self._drains else ())]
            for call in left:
                teacher = self._stages.recipe.teachers[call.teacher]
                key = filled(call, teacher).key(*teacher.identity())
                yield self._counted(Answer(call=call, key=key, reply=None, error=BUDGET_SPENT))

    def _counted(self, answer: Answer) -> Answer:
        with self._counting:
            return self._count(answer)

    def _count(self, answer: Answer) -> Answer:
        tally = self.tally
        tally.calls.add(answer.key)
        who = answer.teacher or answer.call.teacher
        paid = (answer.micro_usd or 0) if answer.fresh else 0  # what the ledger answers was paid by the run that it was bought for
        tally.micro_usd += paid
        useless = (answer.error or "").startswith(NOT_OF_SCHEMA)
        if answer.reply or answer.micro_usd or useless:
            tally.costs[answer.key] = who, answer.micro_usd, answer.call.aim
        if answer.reply is None:
            if paid or useless:  # it came, and can't be used
                came = {"calls": 1, "from_ledger": int(not answer.fresh), "tokens_in": 0, "tokens_out": 0, "micro_usd": paid}
                tally.teachers.setdefault(who, Counter()).update(came)
            tally.unanswered[(answer.error or "failed").split(":")[0][:60]] += 1
            failed = tally.unanswered.total() - tally.unanswered[BUDGET_SPENT] - tally.unanswered[UNKNOWN]
            if failed >= _ENOUGH_TO_GIVE_UP and failed > tally.answered:
                raise RunError(
                    f"{failed} of {tally.answered + failed} calls failed, last: {answer.error}",
                    where=f"stage {self.stage}",
                    next=f"{tally.answered} answers are kept. Mend the cause and run the same command.",
                )
            return answer
        tally.answered += 1
        tally.from_ledger += not answer.fresh
        tally.tokens_in += answer.reply.tokens_in
        tally.tokens_out += answer.reply.tokens_out
        tally.teachers.setdefault(who, Counter()).update(
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
        return self._stages.embed(texts)

    def read(self, path: Path) -> pl.DataFrame:
        return read_samples(path)

    def report(self, name: str, value: Any) -> None:
        self.tally.reports[name] = value

    def progress(self, done: int, total: int | None = None) -> None:
        self._state.total = total
        if self._state.asks:
            self._state.done = done


def _bind(body: Callable[..., None], *args: Any) -> Callable[[], None]:
    return lambda: body(*args)


def _at_once(judge: Callable[[pl.DataFrame], T], batches: Iterator[pl.DataFrame], most: int) -> Iterator[T]:
    """What `judge` says of each batch, as it is ready: one whose teacher hangs holds up none that come after it.

    The first error is raised at once, and no batch is begun after it; those under way end by themselves.
    """
    ready: queue.SimpleQueue[Future[T] | BaseException | None] = queue.SimpleQueue()
    room, over = threading.Semaphore(most), threading.Event()

    def feed() -> None:
        begun: list[Future[T]] = []
        try:
            with ThreadPoolExecutor(most, thread_name_prefix="judge") as pool:
                for batch in batches:
                    room.acquire()
                    if over.is_set():
                        return
                    begun.append(pool.submit(judge, batch))
                    begun[-1].add_done_callback(ready.put)
                wait(begun)
            ready.put(None)  # behind all of them: a future calls back before the thread that ran it goes on
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=feed, name="feed", daemon=True).start()
    try:
        while (done := ready.get()) is not None:
            room.release()
            if isinstance(done, BaseException):
                raise done
            yield done.result()
    finally:
        over.set()
        room.release()


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


def _write_costs(folder: Path, tally: Tally) -> None:
    costs = [(key, *cost) for key, cost in sorted(tally.costs.items())]
    write_frame(folder / "costs.parquet", pl.DataFrame(costs, schema=COSTS, orient="row"))


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

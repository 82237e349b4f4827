"""The mill turns: exactly the rows that were asked for, nothing lost, nothing asked twice, and it goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar

import polars as pl
import pytest

from factory.errors import GristmillError, RunError, RunLocked, StoreError
from factory.loop import standing
from factory.recipe import Recipe, StageLine
from factory.records import RunFolder
from factory.run import failed_calls, run
from factory.stage import Context, Filter, Generator, RecipeFile, Stage
from factory.store import verdicts_from, write_json
from factory.teacher import Connection, Heard, Price, Teacher
from schemas.call import Call, Params, Reply
from schemas.recipe import Target
from schemas.sample import Failure, Sample
from tests.context import chat

ASKED: list[str] = []


class Scripted(Teacher):
    """Answers at once with the prompt and the draw."""

    kind = "scripted"
    model: str = "scripted"

    def known_price(self, tokens_in: int | None = None) -> Price | None:
        return self.price or Price(input_usd_per_mtok=0, output_usd_per_mtok=0)

    @asynccontextmanager
    async def connect(self, home: Path) -> AsyncIterator[Connection]:
        yield _Script()


class _Script:
    async def ask(self, call: Call, params: Params) -> Heard:
        ASKED.append(f"{call.prompt}/{call.draw}")
        return Heard(Reply(text=f"{call.prompt} {call.draw}", finish="stop", tokens_in=2, tokens_out=2))


class Source(Generator):
    key = "source"
    once = True

    def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
        for label in ("a", "b"):
            yield chat(f"seed {label}", label, origin="real", generator=ctx.stage)
        yield chat("set aside", "a", origin="real", generator=ctx.stage).model_copy(update={"holdout": True})
        yield Failure(reason="unreadable line", source="seeds:3")


class Words(Generator):
    """Asks twice for every row that a place lacks; parses what it gets, or loses it on purpose."""

    key = "words"
    lose: bool = False
    explode_at: int | None = None

    def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
        calls = [
            Call(teacher="t", prompt=f"{need.label} r{ctx.round}", draw=draw, ref=need.label or "", params=Params(max_tokens=4))
            for need in ctx.needs
            for draw in range(2 * need.missing)
        ]
        for n, answer in enumerate(ctx.ask(calls)):
            if n == self.explode_at:
                raise ValueError("a bug of the stage's")
            if answer.reply is None:
                yield Failure(reason="unanswered", call=answer.key)
            elif not self.lose:
                where = {"generator": ctx.stage, "round": ctx.round, "call": answer.key, "teacher": answer.teacher}
                yield chat(answer.reply.text, answer.call.ref, **where)


class Even(Filter):
    """Keeps even draws; a stage that is wrong on purpose loses a sample."""

    key = "even"
    lose: bool = False
    seen: ClassVar[list[int]] = []

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        self.seen.append(samples.height)
        keep = samples["input"].str.slice(-1).cast(pl.Int64) % 2 == 0
        reason = pl.select(pl.when(~keep).then(pl.lit("odd"))).to_series()
        return verdicts_from(samples["id"], keep=keep, reason=reason)[int(self.lose) :]


class All(Filter):
    """Sees all that is new at once, and what was kept before."""

    key = "all"
    scope = "dataset"
    seen: ClassVar[list[tuple[int, int]]] = []

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        self.seen.append((samples.height, ctx.kept.height))
        return verdicts_from(samples["id"], keep=pl.Series([True] * samples.height))


class No(Filter):
    key = "no"

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        n = samples.height
        return verdicts_from(samples["id"], keep=pl.Series([False] * n), reason=pl.Series(["no"] * n))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    ASKED.clear()
    Even.seen.clear()
    All.seen.clear()


def recipe(tmp_path: Path, *stages: Stage, teacher: Teacher | None = None, **target: Any) -> Recipe:
    lines = tuple(StageLine(f"{i:02d}-{stage.key}", stage) for i, stage in enumerate([Source(), *stages], start=1))
    goal = Target(**{"accepted": 6, "balance": "label", **target})
    return Recipe(tmp_path / "recipe.yaml", "name: tiny\n", "tiny", goal, {"t": teacher or Scripted()}, lines)


def turn(tmp_path: Path, *stages: Stage, **target: Any) -> RunFolder:
    return run(recipe(tmp_path, *stages, **target), tmp_path / "mill", view="quiet")


def test_a_run_gives_exactly_the_rows_that_were_asked_for(tmp_path: Path) -> None:
    folder = turn(tmp_path, Words(), Even(), All())
    assert folder.status["status"] == "done"
    assert dict(folder.accepted["label"].value_counts().iter_rows()) == {"a": 3, "b": 3}
    assert folder.accepted["id"].is_unique().all()
    assert folder.fates.height == folder.samples.height
    fates = dict(folder.fates["fate"].value_counts().iter_rows())
    assert fates == {"real": 2, "holdout": 1, "accepted": 6, "rejected": 6}
    rows = {row.stage: row for row in folder.funnel()}
    assert (rows["02-words"].asked, rows["02-words"].answered, rows["02-words"].made) == (12, 12, 12)
    assert (rows["03-even"].judged, rows["03-even"].kept, dict(rows["03-even"].rejected)) == (12, 6, {"odd": 6})
    assert dict(rows["01-source"].lost) == {"unreadable line": 1}
    assert All.seen == [(6, 2)]  # it waited for all, and was not shown the holdout


def test_rounds_aim_at_what_is_still_missing(tmp_path: Path) -> None:
    class OnlyA(Filter):
        """Keeps nothing of b in round 1."""

        key = "onlya"

        def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
            keep = (samples["label"] == "a") | (samples["round"] > 1)
            return verdicts_from(samples["id"], keep=keep, reason=pl.select(pl.when(~keep).then(pl.lit("b"))).to_series())

    folder = turn(tmp_path, Words(), OnlyA())
    assert folder.status["rounds"] == 2
    assert {prompt.split("/")[0] for prompt in ASKED} == {"a r1", "b r1", "b r2"}
    assert dict(folder.fates["fate"].value_counts().iter_rows())["surplus"] == 6


def test_a_second_run_asks_nothing_and_changes_nothing(tmp_path: Path) -> None:
    first = turn(tmp_path, Words(), Even())
    asked, accepted = len(ASKED), first.accepted
    again = turn(tmp_path, Words(), Even())
    assert len(ASKED) == asked
    assert again.accepted.equals(accepted)


def test_a_changed_recipe_has_a_folder_of_its_own_and_asks_only_what_is_new(tmp_path: Path) -> None:
    first = turn(tmp_path, Words(), Even())
    asked = len(ASKED)
    other = turn(tmp_path, Words(), Even(), All())
    assert other.path != first.path
    assert len(ASKED) == asked
    assert other.status["micro_usd"] == 0
    assert {row.stage: row for row in other.funnel()}["02-words"].from_ledger == 12


def test_what_a_stage_loses_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"stage 02-words lost 12 of 12 calls"):
        turn(tmp_path, Words(lose=True))
    with pytest.raises(RuntimeError, match=r"stage 03-even was handed \d+ samples and gave \d+ verdicts"):
        turn(tmp_path, Words(), Even(lose=True))


def test_a_run_that_broke_goes_on_without_asking_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug of the stage's"):
        turn(tmp_path, Words(explode_at=5), Even())
    broken = next((tmp_path / "mill" / "runs").iterdir())
    assert RunFolder(broken).status["status"] == "stopped"
    assert not list(broken.glob("round-01/*/stage.json"))  # a filter behind a stage that failed did not see all: not whole
    folder = turn(tmp_path, Words(), Even())
    assert folder.status["status"] == "done"
    assert len(ASKED) == len(set(ASKED)) == 12


def test_a_judge_judges_while_the_generator_still_generates(tmp_path: Path) -> None:
    judged = threading.Event()

    class Slow(Words):
        key = "slow"

        def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
            for i, item in enumerate(super().generate(samples, ctx)):
                yield item
                if i == 8:
                    assert judged.wait(20), "no sample was judged before the generator had ended"

    class Watching(Even):
        key = "watching"

        def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
            judged.set()
            return super().judge(samples, ctx)

    folder = turn(tmp_path, Slow(), Watching(), accepted=100)
    assert folder.status["status"] == "done"
    assert len(Even.seen) > 1


def test_a_budget_ends_a_run_that_says_so_and_keeps_everything(tmp_path: Path) -> None:
    paid = Scripted(price=Price(input_usd_per_mtok=0, output_usd_per_mtok=100_000))  # $0.2 an answer, at most $0.4
    goal = {"accepted": 20, "budget_usd": 1.5}
    folder = run(recipe(tmp_path, Words(), Even(), teacher=paid, **goal), tmp_path / "mill", view="quiet")
    assert folder.status["status"] == "short"
    assert "budget of $1.5 is spent" in folder.status["reason"]
    assert 1_000_000 <= folder.status["micro_usd"] <= 1_500_000
    assert folder.samples.filter(pl.col("origin") == "made").height == len(ASKED)
    assert folder.failures.filter(pl.col("reason") == "unanswered").height > 0
    richer = run(recipe(tmp_path, Words(), Even(), teacher=paid, **(goal | {"budget_usd": 100})), tmp_path / "mill", view="quiet")
    assert richer.path == folder.path
    assert richer.status["status"] == "done"
    assert richer.status["micro_usd"] == 200_000 * len(ASKED)


def test_a_run_that_gets_nowhere_ends_and_explains(tmp_path: Path) -> None:
    folder = turn(tmp_path, Words(), No())
    assert (folder.status["status"], folder.status["reason"]) == ("short", "3 rounds in a row gave no row where one is missing")
    assert folder.status["places"] == {"a": [0, 3], "b": [0, 3]}
    assert turn(tmp_path, Words(), No(), rounds=1, accepted=7).status["reason"].startswith("target.rounds (1)")


def test_a_stage_whose_calls_mostly_fail_stops_the_run_early(tmp_path: Path) -> None:
    from factory.errors import TeacherFault

    class Refusing(Scripted):
        kind = "refusing"

        @asynccontextmanager
        async def connect(self, home: Path) -> AsyncIterator[Connection]:
            class No:
                async def ask(self, call: Call, params: Params) -> Heard:
                    raise TeacherFault("never", "content refused")

            yield No()

    with pytest.raises(RunError, match=r"20 of .* calls failed, last: content refused"):
        run(recipe(tmp_path, Words(), teacher=Refusing(), accepted=500), tmp_path / "mill", view="quiet")


def test_two_runs_of_one_recipe_at_once_are_kept_apart(tmp_path: Path) -> None:
    folder = turn(tmp_path, Words(), Even()).path
    with (folder / ".lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunLocked, match="is running this recipe"):
            turn(tmp_path, Words(), Even())
    assert turn(tmp_path, Words(), Even()).status["status"] == "done"


def test_a_folder_of_another_layout_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = turn(tmp_path, Words(), Even()).path
    (folder / "run.json").write_text(json.dumps({"layout": 0}))
    with pytest.raises(StoreError, match="layout 0") as error:
        turn(tmp_path, Words(), Even())
    assert "the ledger answers" in error.value.next
    assert json.loads((folder / "run.json").read_text()) == {"layout": 0}
    with pytest.raises(StoreError, match="layout 0"):
        _ = RunFolder(folder).status  # nor is it shown, reported or released


def test_no_seed_for_a_teacher_is_an_error(tmp_path: Path) -> None:
    class Empty(Source):
        key = "empty"

        def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
            yield Failure(reason="empty")

    base = recipe(tmp_path, Words())
    empty = Recipe(base.path, base.text, base.name, base.target, base.teachers, (StageLine("01-empty", Empty()), base.stages[1]))
    with pytest.raises(RunError, match="no seed that a teacher may see"):
        run(empty, tmp_path / "mill", view="quiet")


class Slowly(Generator):
    """Asks once a round, so that a target takes many rounds."""

    key = "slowly"

    def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
        label = ctx.needs[0].label
        for answer in ctx.ask([Call(teacher="t", prompt=f"{label} r{ctx.round}", params=Params(max_tokens=4))]):
            if answer.reply is None:
                yield Failure(reason="unanswered", call=answer.key)
            else:
                yield chat(answer.reply.text, label or "", generator=ctx.stage, round=ctx.round, call=answer.key)


class Pool(Filter):
    """Gives every row a cluster, its label's."""

    key = "pool"
    scope = "pool"

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        detail = pl.Series([json.dumps({"cluster": int(x == "b"), "name": ""}) for x in samples["label"]], dtype=pl.String)
        return verdicts_from(samples["id"], keep=pl.Series([True] * samples.height, dtype=pl.Boolean), detail=detail)


class Asking(Filter):
    """Asks about each sample, and rejects what is not answered."""

    key = "asking"

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        calls = (Call(teacher="t", prompt=id, ref=id, params=Params(max_tokens=4)) for id in samples["id"])
        answers = {answer.call.ref: answer.reply is not None for answer in ctx.ask(calls)}
        keep = pl.Series([answers[id] for id in samples["id"]], dtype=pl.Boolean)
        return verdicts_from(samples["id"], keep=keep, reason=pl.select(pl.when(~keep).then(pl.lit("not judged"))).to_series())


def test_a_run_of_many_rounds_goes_on_where_it_stopped(tmp_path: Path) -> None:
    short = turn(tmp_path, Slowly(), Pool(), accepted=8, rounds=5)
    assert short.status["reason"].startswith("target.rounds (5)")
    done = turn(tmp_path, Slowly(), Pool(), accepted=8, rounds=12)
    assert (done.path, done.status["status"], done.status["rounds"]) == (short.path, "done", 8)
    assert len(ASKED) == len(set(ASKED)) == 8


def test_what_a_filter_of_the_pool_says_of_kept_rows_is_not_counted_again(tmp_path: Path) -> None:
    folder = turn(tmp_path, Slowly(), Pool(), accepted=3)
    row = {row.stage: row for row in folder.funnel()}["03-pool"]
    assert (row.judged, row.kept) == (3, 3)
    assert folder.verdicts.filter(pl.col("by") == "03-pool").height == 3 + 4 + 5  # all of them are on disk


def test_wherever_it_was_killed_a_run_ends_in_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    class Late(Filter):
        """Keeps nothing of b in the first two rounds."""

        key = "late"

        def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
            keep = (samples["label"] == "a") | (samples["round"] > 2)
            return verdicts_from(samples["id"], keep=keep, reason=pl.select(pl.when(~keep).then(pl.lit("b"))).to_series())

    stages, goal = (Words(), Even(), Pool(), Slowly(), Late(), All()), {"accepted": 4}
    whole = turn(tmp_path / "whole", *stages, **goal)
    assert (whole.status["status"], whole.status["rounds"]) == ("done", 4)
    asked = len(ASKED)
    writes = 0
    while True:
        ASKED.clear()
        left = writes

        def fsync(_: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        place = tmp_path / f"killed-{writes}"
        with monkeypatch.context() as patch:
            patch.setattr("factory.store.os.fsync", fsync)
            try:
                turn(place, *stages, **goal)
            except Killed:
                pass
            else:
                break
        again = turn(place, *stages, **goal)
        assert again.fates.sort("id").equals(whole.fates.sort("id")), f"killed at write {writes}"
        assert again.failures.equals(whole.failures)
        assert len(ASKED) == asked
        writes += 5  # a stage writes two files or three, so this comes by all kinds of places
    assert writes > 50


def test_a_round_that_the_budget_cut_short_is_done_again_with_more(tmp_path: Path) -> None:
    paid = Scripted(price=Price(input_usd_per_mtok=0, output_usd_per_mtok=100_000))  # $0.2 an answer, at most $0.4

    def go(budget_usd: float) -> RunFolder:
        return run(recipe(tmp_path, Words(), Asking(), teacher=paid, budget_usd=budget_usd), tmp_path / "mill", view="quiet")

    short = go(3.5)
    assert short.fates.filter(pl.col("reason") == "not judged").height > 0
    asking = short.stages[-2]
    assert asking["asked"] == asking["answered"] + asking["unanswered"]["budget spent"] == 12
    for _ in range(3):
        again = go(3.5)
        assert (again.status["rounds"], again.status["status"]) == (1, "short")
    richer = go(100)
    assert (richer.path, richer.status["status"], richer.status["rounds"]) == (short.path, "done", 1)
    assert richer.fates.filter(pl.col("reason") == "not judged").height == 0
    assert len(ASKED) == len(set(ASKED))


def test_a_budget_that_just_sufficed_leaves_nothing_to_do(tmp_path: Path) -> None:
    paid = Scripted(price=Price(input_usd_per_mtok=0, output_usd_per_mtok=100_000))
    enough = run(recipe(tmp_path, Words(), teacher=paid, budget_usd=2), tmp_path / "mill", view="quiet")
    asked = len(ASKED)
    assert (enough.status["status"], asked) == ("done", 9)  # of 12
    again = run(recipe(tmp_path, Words(), teacher=paid, budget_usd=100), tmp_path / "mill", view="quiet")
    assert len(ASKED) == asked
    assert again.fates.equals(enough.fates)


def test_thin_clusters_are_counted_in_kept_rows_alone(tmp_path: Path) -> None:
    """Two seeds, one a cluster; what was rejected after it was given a cluster fills none."""

    class NoB(Filter):
        key = "nob"

        def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
            keep = samples["label"] == "a"
            return verdicts_from(samples["id"], keep=keep, reason=pl.select(pl.when(~keep).then(pl.lit("b"))).to_series())

    aims: list[list[tuple[str | None, int]]] = []

    class Both(Generator):
        key = "both"

        def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
            aims.append([(need.cluster, need.missing) for need in ctx.needs])
            for label in "aabbbb":
                where = {"generator": ctx.stage, "round": ctx.round}
                yield chat(f"{label} {ctx.round} {ctx.rng.random()}", label, **where)

    turn(tmp_path, Both(), Pool(), NoB(), accepted=4, balance="cluster")
    assert aims == [[(None, 4)], [("1", 2)], [("1", 2)]]  # a third time in vain: clusters give way, and the target is met


def test_a_file_of_the_recipe_that_changes_during_a_run_stops_it(tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.md"
    rubric.write_text("strict")

    class Ruled(Even):
        key = "ruled"
        file: Annotated[Path, RecipeFile()] = rubric

        def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
            self.file.write_text(self.file.read_text() + " and stricter")
            return super().judge(samples, ctx)

    with pytest.raises(RunError, match=r"changed while it ran.*rubric\.md"):
        turn(tmp_path, Words(), Ruled())
    folder = next((tmp_path / "mill" / "runs").iterdir())
    assert [stage["stage"] for stage in RunFolder(folder).stages] == ["01-source", "02-words"]


def test_a_disk_that_is_full_for_the_log_says_so(tmp_path: Path) -> None:
    folder = turn(tmp_path, Words(), Even()).path
    (folder / "log.jsonl").unlink()
    (folder / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="No space left"):
        turn(tmp_path, Words(), Even())


def test_a_full_disk_keeps_a_run_from_starting_and_says_so(tmp_path: Path) -> None:
    folder = turn(tmp_path, Words(), Even()).path
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="can't write"):
        turn(tmp_path, Words(), Even())


def test_the_hundredth_round_is_read_after_those_before_it(tmp_path: Path) -> None:
    for number in (99, 100, 101):
        write_json(tmp_path / f"round-{number:02d}" / "01-x" / "stage.json", {"round": number})
    assert [stage["round"] for stage in RunFolder(tmp_path).stages] == [99, 100, 101]


def test_calls_that_failed_are_asked_again_when_that_is_wanted(tmp_path: Path) -> None:
    from factory.errors import TeacherFault

    class Moody(Scripted):
        """Refuses every third question, until it does not any more."""

        kind = "moody"
        refuses: ClassVar[bool] = True

        @asynccontextmanager
        async def connect(self, home: Path) -> AsyncIterator[Connection]:
            class Mood(_Script):
                async def ask(self, call: Call, params: Params) -> Heard:
                    if Moody.refuses and call.draw % 3 == 2:
                        raise TeacherFault("never", "content refused")
                    return await super().ask(call, params)

            yield Mood()

    def go(**how: Any) -> RunFolder:
        return run(recipe(tmp_path, Words(), Even(), teacher=Moody()), tmp_path / "mill", view="quiet", **how)

    first = go()
    assert first.stages[1]["unanswered"] == {"content refused": 4}
    answered = len(ASKED)
    Moody.refuses = False
    assert go().stages[1]["unanswered"] == {"content refused": 4}  # a finished run asks nothing more by itself
    assert len(ASKED) == answered
    again = go(retry_failed=True)
    assert (again.stages[1]["unanswered"], again.stages[1]["answered"]) == ({}, first.stages[1]["asked"])
    assert again.status["status"] == "done"
    assert len(ASKED) == len(set(ASKED)) > answered  # what was answered is not asked again


def test_a_teacher_whose_answers_fit_no_schema_is_known_to_give_nothing(tmp_path: Path) -> None:
    class Strict(Generator):
        key = "strict"

        def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
            calls = [
                Call(teacher="t", prompt=f"json r{ctx.round}", json_schema={"type": "object"}, aim=need.aim, draw=n)
                for n, need in enumerate(ctx.needs)
            ]
            for answer in ctx.ask(calls):
                yield Failure(reason="unanswered", detail=answer.error or "", call=answer.key)

    mill = recipe(tmp_path, Strict(), rounds=2)
    folder = run(mill, tmp_path / "mill", view="quiet")
    assert folder.stages[1]["teachers"]["t"]["calls"] == 2
    tried = standing(mill, folder, folder.of_fate("real"), 3).tried
    assert tried.select("aim", "round", "calls", "tried", "good").sort("round", "aim").rows() == [
        ('{"label": "a"}', 1, 1, 1, 0),
        ('{"label": "b"}', 1, 1, 1, 0),
        ('{"label": "a"}', 2, 1, 1, 0),
        ('{"label": "b"}', 2, 1, 1, 0),
    ]


def test_a_judge_whose_first_question_hangs_holds_up_no_row_behind_it(tmp_path: Path) -> None:
    passed: list[str] = []
    enough = threading.Event()

    class Hanging(Filter):
        """Asks, and does not end with its first batch before it has seen rows of later ones."""

        key = "hanging"

        def questions(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Call]:
            yield from ()

        def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
            if not passed:
                passed.append("first")
                assert enough.wait(20), "nothing came past the batch that hangs"
            passed.extend(samples["id"])
            if len(passed) > 3:
                enough.set()
            return verdicts_from(samples["id"], keep=pl.Series([True] * samples.height, dtype=pl.Boolean))

    class Dripping(Words):
        key = "dripping"

        def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
            for item in super().generate(samples, ctx):
                yield item
                time.sleep(0.005)

    assert turn(tmp_path, Dripping(), Hanging()).status["status"] == "done"


def test_a_judge_that_breaks_stops_the_run_with_its_own_error(tmp_path: Path) -> None:
    class Breaking(Asking):
        key = "breaking"

        def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
            raise ValueError("a bug of the judge's")

    class Dripping(Words):
        key = "dripping"

        def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
            for item in super().generate(samples, ctx):
                yield item
                time.sleep(0.005)  # so that rows still come after the error

    with pytest.raises(ValueError, match="a bug of the judge's"):
        turn(tmp_path, Dripping(), Breaking())


def test_an_error_on_the_way_to_a_judge_is_not_taken_for_the_end() -> None:
    from factory.chain import _at_once

    def batches() -> Iterator[pl.DataFrame]:
        yield pl.DataFrame()
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        list(_at_once(len, batches(), 8))


def test_after_an_error_of_a_judge_no_further_batch_is_begun() -> None:
    from factory.chain import _at_once

    begun: list[int] = []

    def judge(batch: pl.DataFrame) -> None:
        begun.append(1)
        raise ValueError("a bug of the judge's")

    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="a bug of the judge's"):
        list(_at_once(judge, iter([pl.DataFrame()] * 100), 2))
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()
    assert len(begun) <= 5


def test_judges_that_failed_are_asked_again_and_an_answer_of_no_schema_by_another_draw(tmp_path: Path) -> None:
    from factory.errors import TeacherFault

    class Shaky(Scripted):
        """Fails at judging, until it does not any more; never writes JSON."""

        kind = "shaky"
        fails: ClassVar[bool] = True

        @asynccontextmanager
        async def connect(self, home: Path) -> AsyncIterator[Connection]:
            class Shake(_Script):
                async def ask(self, call: Call, params: Params) -> Heard:
                    if Shaky.fails and " r" not in (call.prompt or ""):
                        raise TeacherFault("never", "content refused")
                    return await super().ask(call, params)

            yield Shake()

    class Strict(Words):
        """Asks once more, for JSON."""

        key = "strict"

        def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
            yield from super().generate(samples, ctx)
            call = Call(teacher="t", prompt="json r0", json_schema={"type": "object"}, params=Params(max_tokens=4))
            for answer in ctx.ask([call]):
                yield Failure(reason="unanswered", detail=answer.error or "", call=answer.key)

    paid = Shaky(price=Price(input_usd_per_mtok=0, output_usd_per_mtok=100_000))

    def go(**how: Any) -> RunFolder:
        return run(recipe(tmp_path, Strict(), Asking(), teacher=paid, rounds=1), tmp_path / "mill", view="quiet", **how)

    first = go()
    assert (first.accepted.height, failed_calls(first)) == (0, 13)
    assert list(first.stages[1]["unanswered"]) == ["not of the schema"]
    assert sum(row.micro_usd for row in first.funnel()) == first.status["micro_usd"]  # an answer of no use was paid for as well
    assert first.costs["micro_usd"].sum() == first.status["micro_usd"]
    Shaky.fails = False
    assert go().accepted.height == 0
    asked = len(ASKED)
    again = go(retry_failed=True)
    assert (again.accepted.height, failed_calls(again), len(ASKED)) == (6, 1, asked + 13)  # a new draw fits the schema no better
    assert again.stages[1]["unanswered"] == {"not of the schema": 1}
    assert go(retry_failed=True).accepted.equals(again.accepted)
    assert len(ASKED) == asked + 14


def test_the_command_says_that_there_is_nothing_to_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from factory.cli import main

    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "mill"))
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps({"text": f"A note about {word}."}) + "\n" for word in ("rain", "tax", "tea")))
    (tmp_path / "recipe.yaml").write_text(
        "name: notes\ntarget: {accepted: 2}\nteachers:\n  f: {kind: fake}\nstages:\n  - seeds: {path: seeds.jsonl}\n  - compose: {}\n"
    )
    said = CliRunner().invoke(main, ["run", str(tmp_path / "recipe.yaml"), "--retry-failed", "--progress", "quiet"])
    assert "nothing to ask again" in said.output
    assert "rows accepted" in said.output


def test_what_an_accepted_row_cost_is_known_by_teacher_and_label_also_where_the_ledger_answered(tmp_path: Path) -> None:
    class OnlyA(Filter):
        key = "onlya"

        def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
            keep = samples["label"] == "a"
            return verdicts_from(samples["id"], keep=keep, reason=pl.select(pl.when(~keep).then(pl.lit("b"))).to_series())

    paid = Scripted(price=Price(input_usd_per_mtok=0, output_usd_per_mtok=100_000))  # $0.2 an answer

    def costs(*stages: Stage) -> tuple[RunFolder, list[Any], list[Any]]:
        folder = run(recipe(tmp_path, *stages, teacher=paid, rounds=1), tmp_path / "mill", view="quiet")
        labels = folder.samples.filter(pl.col("origin") == "made").select("id", group="label")
        return folder, folder.cost_by_teacher().rows(), folder.cost_by(labels).rows()

    _, by_teacher, by_label = costs(Words(), Even())  # 12 answers, of which 6 rows are kept
    assert by_teacher == [("t", 6, 2_400_000, 400_000)]
    assert by_label == [("a", 3, 1_200_000, 400_000), ("b", 3, 1_200_000, 400_000)]

    class Twice(Words):
        """Two samples an answer."""

        key = "twice"

        def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
            for item in super().generate(samples, ctx):
                assert isinstance(item, Sample)
                yield item
                yield chat(f"again {item.input}", item.label or "", **item.provenance.model_dump())

    _, by_teacher, by_label = costs(Twice())
    assert by_teacher == [("t", 6, 2_400_000, 400_000)]
    assert by_label == [("a", 3, 1_200_000, 400_000), ("b", 3, 1_200_000, 400_000)]
    folder, by_teacher, by_label = costs(Words(), OnlyA())
    assert folder.status["micro_usd"] == 0
    assert by_teacher == [("t", 3, 2_400_000, 800_000)]
    assert by_label == [("b", 0, 1_200_000, None), ("a", 3, 1_200_000, 400_000)]


def test_a_row_costs_what_its_judges_asked_as_well(tmp_path: Path) -> None:
    class Paid(Asking):
        """Judges at $0.2 an answer, and says in each verdict which call that was."""

        key = "paid"

        def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
            calls = (Call(teacher="t", prompt=f"judge {id}", ref=id, params=Params(max_tokens=4)) for id in samples["id"])
            keys = {answer.call.ref: answer.key for answer in ctx.ask(calls)}
            return verdicts_from(
                samples["id"], keep=samples["label"] == "a", detail=pl.Series([json.dumps({"call": keys[id]}) for id in samples["id"]])
            )

    paid = Scripted(price=Price(input_usd_per_mtok=0, output_usd_per_mtok=100_000))
    folder = run(recipe(tmp_path, Words(), Paid(), teacher=paid, rounds=1), tmp_path / "mill", view="quiet")
    labels = folder.samples.filter(pl.col("origin") == "made").select("id", group="label")
    made = folder.costs.height
    assert folder.judging.height == made == 12
    assert folder.cost_by_teacher().rows() == [("t", 3, 4_800_000, 1_600_000)]
    assert folder.cost_by(labels).rows() == [("b", 0, 2_400_000, None), ("a", 3, 2_400_000, 800_000)]
    assert folder.cost_by_teacher()["micro_usd"].sum() == folder.status["micro_usd"]


COMPARED = """name: compared
target: {accepted: 2}
teachers:
  f: {kind: fake}
stages:
  - seeds: {path: seeds.jsonl}
  - compose: {}
  - near: NEAR
"""


def test_what_a_filter_must_be_told_is_said_before_anybody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from factory.plan import make_plan
    from factory.recipe import load_recipe

    row = {"prompt": "Which?", "chosen": "This one.", "rejected": "That one."}
    (tmp_path / "seeds.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "recipe.yaml").write_text(COMPARED.replace("NEAR", "{}"))
    recipe = load_recipe(tmp_path)
    for work in (lambda: run(recipe, tmp_path / "mill", view="quiet"), lambda: make_plan(recipe, tmp_path / "mill")):
        with pytest.raises(GristmillError, match=r"the samples are preferences.*Set `compare:`") as caught:
            work()
        assert "03-near" in str(caught.value)
    assert not list((tmp_path / "mill").glob("runs/*/round-01"))


def test_files_to_compare_with_are_part_of_the_recipe(tmp_path: Path) -> None:
    from factory.recipe import load_recipe

    (tmp_path / "seeds.jsonl").write_text('{"text": "One."}\n')
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "old {name}"}}\n')

    def read(against: str) -> Any:
        (tmp_path / "recipe.yaml").write_text(COMPARED.replace("NEAR", f"{{against: {against}}}"))
        return load_recipe(tmp_path)

    one, both = read("a.jsonl"), read("[a.jsonl, b.jsonl]")
    assert both.stages[2].stage.against == ((tmp_path / "a.jsonl").resolve(), (tmp_path / "b.jsonl").resolve())
    assert one.digest == read("[a.jsonl]").digest != both.digest
    (tmp_path / "b.jsonl").write_text('{"text": "another"}\n')
    assert read("[a.jsonl, b.jsonl]").digest != both.digest
    with pytest.raises(GristmillError, match=r"there is no file.*c\.jsonl"):
        read("[a.jsonl, c.jsonl]")

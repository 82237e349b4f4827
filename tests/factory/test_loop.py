"""The loop closes: it finds out what a teacher does not write, goes elsewhere when one repeats itself, and ends with an explanation."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from factory.errors import ReleaseError, RunError
from factory.loop import standing
from factory.recipe import Recipe, StageLine
from factory.records import RunFolder
from factory.release import open_version, release
from factory.run import run
from factory.stage import Context, Filter, Stage
from factory.store import verdicts_from
from factory.teacher import Connection, Heard, Price, Teacher
from factory.twosample import mmd
from filters.coverage import Coverage
from filters.exact import Exact
from filters.fits import Fits
from filters.rules import Rules
from generators.compose import Compose
from generators.contrast import Contrast
from generators.seeds import Seeds
from schemas.call import Call, Params, Reply
from schemas.manifest import ReleaseFacts
from schemas.recipe import ReleasePlan, Target
from schemas.watch import Watch
from tests.context import embedder

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "examples" / "bank-intents" / "seeds.jsonl"
DEV = ROOT / "bench" / "data" / "banking77_dev.jsonl"


def real_rows() -> dict[str, list[str]]:
    """The development rows by label: what a good teacher writes."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in DEV.read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        found[assistant["content"]].append(user["content"])
    return found


STOCK = real_rows()
LABELS = sorted(STOCK)
KIND = re.compile(r'Texts of the kind "([^"]+)"')


class Writer(Teacher):
    """Answers with real rows of the label that is asked for, each once, three a call; subclasses have their faults."""

    kind = "writer"
    model: str = "writer"
    micro_usd: int = 100  # a call
    rows: int = 3
    every: tuple[int, int] = (0, 1)  # of the real rows, the first and the step

    def known_price(self, tokens_in: int | None = None) -> Price | None:
        return Price(input_usd_per_mtok=0, output_usd_per_mtok=self.micro_usd / 10)

    @asynccontextmanager
    async def connect(self, home: Path) -> AsyncIterator[Connection]:
        yield _Pen(self)

    def write(self, label: str, said: str, number: int, stock: dict[str, list[str]]) -> list[str]:
        return [stock[label].pop() for _ in range(min(self.rows, len(stock[label])))]


class _Pen:
    def __init__(self, writer: Writer) -> None:
        self.writer, self.number = writer, 0
        start, step = writer.every
        self.stock = {label: list(reversed(rows[start::step])) for label, rows in STOCK.items()}
        self.lock = asyncio.Lock()

    async def ask(self, call: Call, params: Params) -> Heard:
        async with self.lock:
            self.number += 1
            said = call.messages[-1].content
            kind = KIND.search(said)
            assert kind, said
            label = next(label for label in LABELS if label.replace("_", " ") == kind[1])
            texts = self.writer.write(label, said, self.number, self.stock)
            return Heard(Reply(text=json.dumps(texts), finish="stop", tokens_in=10, tokens_out=10))


class Shy(Writer):
    """Never writes about two of the labels, but about a third one, unless it is shown an exemplar of what is missing."""

    model: str = "shy"

    def write(self, label: str, said: str, number: int, stock: dict[str, list[str]]) -> list[str]:
        shown = "Such texts are missing most" in said
        return super().write(LABELS[4] if label in LABELS[:2] and not shown else label, said, number, stock)


class Tiring(Writer):
    """From its 50th call on it says the same few things again and again."""

    model: str = "tiring"

    def write(self, label: str, said: str, number: int, stock: dict[str, list[str]]) -> list[str]:
        return super().write(label, said, number, stock) if number < 50 else STOCK[label][-2:-1]


class Deaf(Writer):
    """Writes about one label what it has to say about another, whatever it is shown."""

    model: str = "deaf"

    def write(self, label: str, said: str, number: int, stock: dict[str, list[str]]) -> list[str]:
        return [f"What is the weather like on day {number}?"] if label == LABELS[0] else super().write(label, said, number, stock)


def recipe(tmp_path: Path, teachers: dict[str, Teacher], *more: Stage, seed: int = 0, compose: Any = None, **target: Any) -> Recipe:
    stages = [Seeds(path=SEEDS), Compose(**{"examples": 0, "per_call": 3, **(compose or {})}), Rules(), Exact(), *more]
    lines = tuple(StageLine(f"{i:02d}-{stage.key}", stage) for i, stage in enumerate(stages, start=1))
    text = "name: planted\n"
    return Recipe(tmp_path / "recipe.yaml", text, "planted", Target(**{"balance": "label", **target}), teachers, lines, seed=seed)


def turn(tmp_path: Path, *parts: Any, **more: Any) -> RunFolder:
    return run(recipe(tmp_path, *parts, **more), tmp_path / "mill", view="quiet")


def by_label(folder: RunFolder) -> dict[str, int]:
    return dict(folder.accepted["label"].value_counts().iter_rows())


def test_what_a_teacher_does_not_write_of_itself_is_found_out_and_filled(tmp_path: Path) -> None:
    folder = turn(tmp_path, {"shy": Shy()}, Fits(margin=-0.05, at_least=0.0), accepted=60)
    assert folder.status["status"] == "done", folder.status["cells"]
    assert by_label(folder) == dict.fromkeys(LABELS, 6)
    made = folder.samples.filter((pl.col("origin") == "made") & pl.col("label").is_in(LABELS[:2]))
    good = set(folder.accepted["id"])
    first = made.filter(pl.col("round") == 1)
    assert first.height and not good & set(first["id"])  # at first there was nothing
    hard = {cell["value"]: cell for cell in folder.status["cells"]}[LABELS[0]]
    assert (hard["wanted"], hard["have"], hard["to_get"]) == (6, 6, None)
    assert hard["rejected"]["other label nearest"] > 0


def test_effort_leaves_a_teacher_that_begins_to_repeat_itself(tmp_path: Path) -> None:
    teachers = {"tiring": Tiring(rows=1, every=(0, 2), concurrency=1), "fresh": Writer(model="fresh", rows=1, every=(1, 2), concurrency=1)}
    folder = turn(tmp_path, teachers, compose={"per_call": 1, "max_calls": 40}, accepted=160, rounds=12)
    calls = folder.costs.group_by("round", "teacher").agg(n=pl.len()).sort("round")
    share = {
        number: of_round.filter(pl.col("teacher") == "tiring")["n"].sum() / of_round["n"].sum()
        for (number,), of_round in calls.group_by("round")
    }
    assert share[1] == pytest.approx(0.5, abs=0.05)
    tired = next(
        number for number in sorted(share) if calls.filter((pl.col("teacher") == "tiring") & (pl.col("round") <= number))["n"].sum() > 60
    )
    later = [part for number, part in share.items() if number > tired + 1]
    assert later and max(later) < 0.2, share


def test_a_target_that_can_not_be_met_ends_within_the_budget_and_says_what_is_short(tmp_path: Path) -> None:
    folder = turn(tmp_path, {"deaf": Deaf()}, Fits(margin=-0.05, at_least=0.0), accepted=50, budget_usd=0.5)
    status = folder.status
    assert status["status"] == "short" and status["reason"] == "3 rounds in a row gave no row where one is missing"
    assert status["micro_usd"] <= 500_000
    cells = {cell["value"]: cell for cell in status["cells"]}
    short = cells.pop(LABELS[0])
    assert (short["have"], short["came"]) == (0, 0)
    assert short["to_get"] == {"rows": 5, "calls": None, "micro_usd": None}  # nobody knows: not one came
    assert short["calls"] > 0 and short["micro_usd"] == 100 * short["calls"]
    assert sum(short["rejected"].values()) > 0
    assert all(cell["have"] == 5 and cell["to_get"] is None for cell in cells.values())
    # It was not asked for without end: twice as often after each round in vain, up to eighty times; three rounds without any gain end it.
    of_it = folder.costs.filter(pl.col("aim") == json.dumps({"label": LABELS[0]}))
    assert of_it.group_by("round").len().sort("round")["len"].to_list() == [4, 7, 14, 27, 54]


def test_what_the_rest_would_cost_is_told_at_the_yield_so_far(tmp_path: Path) -> None:
    folder = turn(tmp_path, {"writer": Writer()}, accepted=100, rounds=1, compose={"max_calls": 20})
    assert (folder.status["status"], folder.status["reason"]) == ("short", "target.rounds (1) are used up")
    cell = folder.status["cells"][0]
    assert cell["to_get"]["rows"] == 10 - cell["have"] > 0
    assert cell["to_get"]["calls"] == -(-cell["to_get"]["rows"] * cell["calls"] // cell["came"])
    assert cell["to_get"]["micro_usd"] == pytest.approx(100 * cell["to_get"]["calls"], abs=100)


def test_axes_have_quotas_and_are_met_to_the_row(tmp_path: Path) -> None:
    axes = {"tone": ("curt", "polite", "angry")}
    folder = turn(tmp_path, {"writer": Writer()}, accepted=40, quotas={"tone": {"angry": 0.25}}, compose={"axes": axes, "per_call": 2})
    assert folder.status["status"] == "done"
    assert by_label(folder) == dict.fromkeys(LABELS, 4)
    tones = Counter(json.loads(axes)["tone"] for axes in folder.accepted["axes"])
    assert tones["angry"] == 10 and set(tones) == {"curt", "polite", "angry"}


def test_oversampling_makes_more_and_takes_the_best(tmp_path: Path) -> None:
    folder = turn(tmp_path, {"writer": Writer()}, Fits(margin=-2, at_least=0.0), accepted=20, oversample=5)
    fates = Counter(folder.fates["fate"])
    assert folder.status["status"] == "done"
    assert fates["accepted"] == 20 and fates["accepted"] + fates["surplus"] >= 100
    rows = {row.stage: row for row in folder.funnel()}["target"]
    assert (rows.judged, rows.kept, rows.rejected) == (fates["accepted"] + fates["surplus"], 20, Counter({"place full": fates["surplus"]}))
    scores = folder.verdicts.filter(pl.col("by") == "target").group_by("keep").agg(pl.col("score").mean())
    mean = dict(scores.iter_rows())
    assert mean[True] > mean[False]


def test_a_row_may_lose_its_place_to_a_better_one_of_a_later_round(tmp_path: Path) -> None:
    folder = turn(tmp_path, {"writer": Writer()}, Fits(margin=-2, at_least=0.0), accepted=20, oversample=4, compose={"max_calls": 20})
    assert folder.status["rounds"] > 1
    last = folder.verdicts.filter(pl.col("by") == "target").group_by("sample", maintain_order=True)
    changed = last.agg(pl.col("keep")).filter(pl.col("keep").list.first() & ~pl.col("keep").list.last())
    assert changed.height > 0
    assert folder.accepted.height == 20
    assert not set(changed["sample"]) & set(folder.accepted["id"])


def test_a_real_share_that_seeds_can_not_give_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    mill = recipe(tmp_path, {"writer": Writer()}, accepted=100)
    mill = Recipe(**{**vars(mill), "release": ReleasePlan(real_share=0.5)})
    with pytest.raises(RunError, match=r"real_share 0.5 of 100 made rows needs 100 real ones, and there are 40"):
        run(mill, tmp_path / "mill", view="quiet")


def test_rows_are_spread_over_clusters_and_asked_for_by_name(tmp_path: Path) -> None:
    mill = recipe(
        tmp_path, {"writer": Writer(rows=1)}, Coverage(), accepted=60, balance=("label", "cluster"), compose={"per_call": 2}, rounds=3
    )
    folder = run(mill, tmp_path / "mill", view="quiet")
    assert folder.status["status"] == "done"
    assert by_label(folder) == dict.fromkeys(LABELS, 6)
    aims = [json.loads(aim) for aim in folder.costs.filter(pl.col("round") > 1)["aim"].unique()]
    assert any("cluster" in aim for aim in aims)
    at = standing(mill, folder, folder.of_fate("real"), folder.status["rounds"] + 1)
    assert at.grid.soft == {"cluster"}
    assert set(at.names) >= set(at.grid.quotas["cluster"])


class Wrong(Writer):
    """Answers a message, and badly: with another label than the right one."""

    model: str = "wrong"

    @asynccontextmanager
    async def connect(self, home: Path) -> AsyncIterator[Connection]:
        yield _Guess(self)


class _Guess(_Pen):
    async def ask(self, call: Call, params: Params) -> Heard:
        self.number += 1
        return Heard(Reply(text=LABELS[self.number % len(LABELS)], finish="stop", tokens_in=10, tokens_out=10))


def test_a_share_of_preferences_is_asked_of_the_line_that_makes_them_and_released_beside_the_rest(tmp_path: Path) -> None:
    teachers = {"writer": Writer(rows=1), "wrong": Wrong()}
    compose = {"teachers": ("writer",), "axes": {"tone": ("curt", "angry")}, "per_call": 1}
    quotas = {"kind": {"preference": 0.25}, "tone": {"angry": 0.5, "curt": 0.5}}
    mill = recipe(tmp_path, teachers, Contrast(teachers=("wrong",)), Rules(), accepted=40, compose=compose, quotas=quotas)
    folder = run(mill, tmp_path / "mill", view="quiet")
    assert folder.status["status"] == "done", folder.status["cells"]
    assert by_label(folder) == dict.fromkeys(LABELS, 4)
    assert dict(folder.accepted["kind"].value_counts().iter_rows()) == {"chat": 30, "preference": 10}
    assert Counter(json.loads(axes)["tone"] for axes in folder.accepted["axes"]) == {"curt": 20, "angry": 20}
    asked = folder.costs.filter(pl.col("stage") == "05-contrast")
    assert {json.loads(aim)["kind"] for aim in asked["aim"]} == {"preference"}
    assert set(asked["teacher"]) == {"wrong"}
    pairs = folder.samples.filter(pl.col("kind") == "preference")
    rows = {row["id"]: row for row in folder.samples.filter(pl.col("kind") == "chat").to_dicts()}
    for pair in pairs.to_dicts():
        row = rows[pair["parents"][0]]
        assert (pair["messages"], pair["chosen"], pair["label"]) == (row["messages"][:-1], row["messages"][-1:], row["label"])
        assert row["generator"] == "01-seeds" or pair["axes"] == row["axes"]
        assert pair["rejected"][0]["content"] != pair["chosen"][0]["content"]
    cells = {(cell["dimension"], cell["value"]): cell for cell in folder.status["cells"]}
    assert (cells["kind", "preference"]["wanted"], cells["kind", "preference"]["have"]) == (10, 10)
    assert cells["kind", "preference"]["calls"] == asked.height
    version = release(
        folder, name="m", plan=ReleasePlan(), datasets=tmp_path, embed=embedder().embed, facts=ReleaseFacts(recipe={}, embedder="m")
    )
    counts = open_version(version).counts.kind_by_split
    assert sum(of.get("preference", 0) for of in counts.values()) == 10


class Secretive(Filter):
    """Wants the name masked in every message that an angry customer wrote."""

    key = "secretive"

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        hide = samples["axes"].str.contains("angry")
        detail = pl.select(pl.when(hide).then(pl.lit('{"mask": [["messages.0", 0, 2, "NAME"]]}')).otherwise(pl.lit("{}"))).to_series()
        return verdicts_from(samples["id"], keep=pl.repeat(True, samples.height, eager=True), detail=detail)


def test_a_row_of_which_something_is_to_be_masked_is_shown_to_no_teacher(tmp_path: Path) -> None:
    compose = {"teachers": ("writer",), "axes": {"tone": ("curt", "angry")}, "per_call": 1}
    teachers = {"writer": Writer(rows=1), "wrong": Wrong()}
    wanted = {"accepted": 40, "quotas": {"kind": {"preference": 0.5}}}
    folder = turn(tmp_path, teachers, Secretive(), Contrast(teachers=("wrong",)), compose=compose, **wanted)
    assert folder.status["status"] == "done", folder.status["cells"]
    parents = folder.samples.filter(pl.col("kind") == "preference").explode("parents")["parents"]
    shown = folder.samples.filter(pl.col("id").is_in(parents.implode()))
    assert shown.filter(pl.col("origin") == "made").height > 5
    assert not shown["axes"].str.contains("angry").any()


def test_preferences_that_no_line_makes_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no generator can make rows of kind: preference") as error:
        turn(tmp_path, {"writer": Writer()}, accepted=20, quotas={"kind": {"preference": 0.25}})
    assert "contrast" in (error.value.next or "")
    mill = recipe(tmp_path, {"writer": Writer()}, accepted=20, balance=None, quotas={"kind": {"preference": 0.25}})
    lines = (mill.stages[0], StageLine("02-contrast", Contrast()))
    with pytest.raises(RunError, match="no generator can make rows of others than kind preference") as error:
        run(Recipe(**{**vars(mill), "stages": lines}), tmp_path / "mill", view="quiet")
    assert "compose" in (error.value.next or "")
    assert not list((tmp_path / "mill").rglob("costs.parquet"))


def test_the_watch_names_the_teacher_that_repeats_itself_and_no_other(tmp_path: Path) -> None:
    teachers = {"tiring": Tiring(rows=1, every=(0, 2), concurrency=1), "fresh": Writer(model="fresh", rows=1, every=(1, 2), concurrency=1)}
    folder = turn(tmp_path, teachers, compose={"per_call": 1, "max_calls": 90}, accepted=180, rounds=12)
    alarms = folder.status["alarms"]
    assert {alarm["teacher"] for alarm in alarms if alarm["name"] == "repeats_at_most"} == {"tiring"}
    assert not any(alarm["stops"] for alarm in alarms)


def test_an_alarm_stops_the_run_until_the_threshold_is_moved(tmp_path: Path) -> None:
    mill = recipe(tmp_path, {"writer": Writer()}, accepted=60, rounds=5, compose={"max_calls": 10})

    def go(**watch: Any) -> RunFolder:
        return run(Recipe(**{**vars(mill), "watch": Watch(**watch)}), tmp_path / "mill", view="quiet")

    stopped = go(real_at_least=0.65)
    assert (stopped.status["status"], stopped.status["rounds"]) == ("alarm", 1)
    assert "watch.real_at_least" in stopped.status["reason"]
    assert [alarm["name"] for alarm in stopped.status["alarms"]] == ["real_at_least"]
    before = stopped.samples
    again = go(real_at_least=0.65)
    assert again.status["status"] == "alarm" and again.samples.equals(before)  # nothing more was asked
    further = go()
    assert further.path == stopped.path
    assert further.status["status"] == "done"
    assert not any(alarm["stops"] for alarm in further.status["alarms"])
    assert further.samples.filter(pl.col("round") <= 1).equals(before)


REFERENCE = [("transfer_timing", 24), ("cancel_transfer", 6), ("failed_transfer", 0)]


def test_rows_follow_the_proportions_of_a_reference(tmp_path: Path) -> None:
    """Seeds are even over labels, the reference is not: what is made is as the reference, and nearer to it than the seeds are."""
    reference = tmp_path / "tickets.jsonl"
    texts = [text for label, n in REFERENCE for text in STOCK[label][:n]]
    reference.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    mill = recipe(
        tmp_path, {"writer": Writer(rows=1)}, Coverage(), accepted=40, balance=None, reference=reference, compose={"per_call": 1}, rounds=8
    )
    folder = run(mill, tmp_path / "mill", view="quiet")
    at = standing(mill, folder, folder.of_fate("real"), folder.status["rounds"] + 1)
    wanted = at.grid.quotas["cluster"]
    assert (sum(wanted.values()), at.grid.soft) == (40, frozenset())
    have = Counter(cell for cell, keep in zip(at.cells, at.good["id"].is_in(folder.accepted["id"].implode()), strict=True) if keep)
    assert all(have[(cluster,)] <= n for cluster, n in wanted.items())
    assert folder.accepted.height >= 30
    seeds, made, real = (
        embedder().embed(texts) for texts in (folder.of_fate("real")["input"].to_list(), folder.accepted["input"].to_list(), texts)
    )
    after, before = mmd(made, real), mmd(seeds, real)
    assert after and before and after.squared < before.squared


def test_a_version_that_crosses_a_threshold_is_not_released_unless_that_is_said(tmp_path: Path) -> None:
    folder = turn(tmp_path, {"writer": Writer()}, accepted=30)
    assert folder.status["status"] == "done"
    facts = ReleaseFacts(recipe={"name": "planted"}, embedder="test", teachers=(), seeds_licence=None)
    known: dict[str, Any] = {
        "name": "planted",
        "plan": ReleasePlan(),
        "datasets": tmp_path / "datasets",
        "embed": embedder().embed,
        "facts": facts,
    }
    with pytest.raises(ReleaseError, match=r"watch\.real_at_least"):
        release(folder, **known, watch=Watch(real_at_least=0.9))
    assert not list((tmp_path / "datasets").glob("*/v*"))
    version = release(folder, **known, watch=Watch(real_at_least=0.9), despite_alarm=True)
    (alarm,) = open_version(version).alarms
    assert "watch.real_at_least" in alarm and alarm in (version / "README.md").read_text()

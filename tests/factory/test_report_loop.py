"""The report's account of the loop: its numbers are the run's, and what a run does not hold is not on the page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from factory import report, report_loop
from factory.choose import represented
from factory.loop import Standing, standing
from factory.recipe import Recipe, StageLine
from factory.records import COSTS, RunFolder
from factory.report import write_report
from factory.report_loop import grid_of_status, loop_of
from factory.run import run as turn
from factory.stage import Stage, Vectors
from factory.store import read_json, write_frame, write_json
from filters.coverage import Coverage
from filters.exact import Exact
from filters.fits import Fits
from filters.rules import Rules
from generators.compose import Compose
from generators.seeds import Seeds
from schemas.recipe import Target
from schemas.watch import Watch
from tests.context import chat, embedder, frame
from tests.factory.test_loop import SEEDS, STOCK, Deaf, Writer
from tests.factory.test_report import Page
from tests.run_on_disk import HOSTILE, bank_run, facts, made, seeds, write_run

TARGET_ROWS = 60


def embed(texts: Sequence[str]) -> Vectors:
    return embedder().embed(texts)  # type: ignore[no-any-return]


def loop(run: RunFolder, reference: pl.DataFrame | None = None) -> dict[str, Any]:
    return loop_of(run, report._joined(run, {}), embed, reference)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunFolder]:
    """Four rounds of two teachers, of whom the dearer writes nothing about one label, over two lines: short of that label."""
    home = tmp_path_factory.mktemp("planted")
    teachers = {"cheap": Writer(model="cheap", every=(0, 2), micro_usd=100), "dear": Deaf(every=(1, 2), micro_usd=900)}
    stages: list[Stage] = [
        Seeds(path=SEEDS, holdout=0.5),
        Compose(examples=0, per_call=3, max_calls=12),
        Compose(examples=1, per_call=3, max_calls=8),
        Rules(),
        Exact(),
        Fits(margin=-0.05, at_least=0.0),
        Coverage(),
    ]
    lines = tuple(StageLine(f"{i:02d}-{stage.key}", stage) for i, stage in enumerate(stages, start=1))
    target = Target(accepted=TARGET_ROWS, balance="label", oversample=1.5, rounds=4)
    watch = Watch(teacher_at_most=0.3)
    recipe = Recipe(home / "recipe.yaml", "name: planted\n", "planted", target, teachers, lines, watch=watch)
    return recipe, turn(recipe, home / "mill", view="quiet")


@pytest.fixture(scope="module")
def run(planted: tuple[Recipe, RunFolder]) -> RunFolder:
    return planted[1]


@pytest.fixture(scope="module")
def at(planted: tuple[Recipe, RunFolder]) -> Standing:
    recipe, run = planted
    return standing(recipe, run, run.of_fate("real"), run.status["rounds"] + 1)


@pytest.fixture(scope="module")
def page(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, run, embed, title="planted", facts=facts())
    return Page(path.read_text())


def copied(run: RunFolder, to: Path) -> RunFolder:
    """The run's small files and frames in another folder, so that they can be changed."""
    for path in [*run.path.glob("*.json"), *run.path.glob("round-*/*/*")]:
        there = to / path.relative_to(run.path)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(path.read_bytes())
    return RunFolder(to)


def told(run: RunFolder, **changes: Any) -> RunFolder:
    """A copied run with some of its status changed."""
    write_json(run.path / "run.json", read_json(run.path / "run.json") | changes)
    return RunFolder(run.path)


# -- cells, rounds, alarms -------------------------------------------------------------------------------------------------


def test_the_target_is_told_place_by_place_the_shortest_first(run: RunFolder, page: Page) -> None:
    cells = run.status["cells"]
    assert run.status["status"] == "short" and len(cells) == 10
    text = page.text("loop")
    for cell in cells:
        name = cell["name"].replace("_", " ")
        assert f" {name} {cell['wanted']} {cell['have']} {cell['good']} {cell['calls']} " in text
        for reason, n in cell["rejected"].items():
            assert f"{n} {reason.replace('_', ' ')}" in text
    shortest = max(cells, key=lambda cell: cell["wanted"] - cell["have"])
    first = text.split("The rest would take ")[1]
    assert first.startswith(shortest["name"].replace("_", " "))
    get = shortest["to_get"]
    assert (f"{get['calls']} calls, $" if get["calls"] else "nobody knows: nothing good came") in first.split(cells[1]["name"])[0]


def test_what_is_left_to_get_is_told_only_where_something_is_short_and_a_price_only_where_there_is_one(
    run: RunFolder, tmp_path: Path
) -> None:
    full = [cell | {"have": cell["wanted"], "to_get": None, "micro_usd": 0} for cell in run.status["cells"]]
    changed = told(copied(run, tmp_path / "run"), cells=full)
    write_report(tmp_path / "r.html", changed, embed, title="planted", facts=facts())
    text = Page((tmp_path / "r.html").read_text()).text("loop")
    assert "Place Wanted Have Good Calls Mostly rejected for balance not updated" in text
    nobody = [cell | {"to_get": {"rows": 6, "calls": None, "micro_usd": None}, "calls": 0, "micro_usd": None} for cell in full]
    write_report(tmp_path / "r.html", told(changed, cells=nobody), embed, title="planted", facts=facts())
    assert "unknown nobody knows: it was not asked for" in Page((tmp_path / "r.html").read_text()).text("loop")


def test_places_of_other_dimensions_say_which_and_many_are_cut(run: RunFolder, tmp_path: Path) -> None:
    plain = run.status["cells"][0]
    many = [
        plain | {"dimension": "tone", "name": f"tone: tone {n:03d}", "value": f"tone {n:03d}", "have": n % 7, "wanted": 6}
        for n in range(80)
    ]
    found = loop(told(copied(run, tmp_path / "run"), cells=[plain | {"have": 6}, *many]))["cells"]
    assert (len(found["rows"]), found["more"], found["several"]) == (report_loop.CELLS, 21, True)
    assert found["rows"][0]["said"] == "tone: tone 000" and found["rows"][0]["missing"] == 6
    assert min(row["missing"] for row in found["rows"]) >= 1


def test_rounds_show_what_the_stages_and_the_watch_said(run: RunFolder, page: Page) -> None:
    stages = [stage for stage in run.stages if stage["stage"] == "target"]
    rows = loop(run)["rounds"]["rows"]
    assert [row["round"] for row in rows] == [stage["round"] for stage in stages] == [1, 2, 3, 4]
    made = dict(run.samples.filter(pl.col("origin") == "made")["round"].value_counts().iter_rows())
    for row, stage in zip(rows, stages, strict=True):
        reports = stage["reports"]
        assert (row["accepted"], row["missing"], row["made"]) == (reports["accepted"], reports["missing"], made.get(row["round"], 0))
        assert row["teacher_share"] == reports["watch"].get("teacher_share") and row["depth"] == reports["watch"].get("depth_max")
        shares = f"{100 * row['teacher_share']:.0f}% {row['teacher']} {100 * row['real_share']:.0f}% {row['depth']}"
        assert f"{row['round']} {row['made']} {row['good']} {row['accepted']} {row['missing']}" in page.text("loop")
        assert shares in page.text("loop")
    assert sum(row["good"] for row in rows) == run.of_fate("accepted", "surplus").height
    assert rows[-1]["accepted"] == run.accepted.height


def test_real_rows_set_aside_are_covered_better_from_round_to_round(run: RunFolder, page: Page) -> None:
    found = loop(run)["rounds"]
    covered = [found["before"], *(row["covered"] for row in found["rows"])]
    assert run.of_fate("holdout").height == 20
    assert covered == sorted(covered) and covered[-1] > covered[0] > 0
    assert f"to the seeds alone {covered[0]:.3f}" in page.text("loop")


def test_an_alarm_is_told_once_for_its_threshold_and_marks_its_figure(run: RunFolder, page: Page) -> None:
    alarms = run.status["alarms"]
    assert len(alarms) > 1 and {alarm["name"] for alarm in alarms} == {"teacher_at_most"}
    text = page.text("loop")
    assert text.count("at most were to be its own") == 1
    assert f"Warning, in {len(alarms)} rounds. {alarms[-1]['sentence']}" in text
    raised = [row["round"] for row in loop(run)["rounds"]["rows"] if "teacher_share" in row["alarms"]]
    assert raised == [alarm["round"] for alarm in alarms]
    marked = [attrs for tag, attrs in page.elements if tag == "td" and "raised" in attrs.get("class", "")]
    assert len(marked) == len(alarms)


def test_an_alarm_that_stops_comes_first_and_ends_the_run_in_the_head(run: RunFolder, tmp_path: Path) -> None:
    stop = {
        "name": "tail_at_least",
        "round": 4,
        "value": 0.0,
        "threshold": 0.1,
        "stops": True,
        "sentence": "The rare is missing.",
        "teacher": None,
    }
    changed = told(copied(run, tmp_path / "run"), status="alarm", reason="The rare is missing.", alarms=[*run.status["alarms"], stop])
    assert [alarm["stops"] for alarm in loop(changed)["alarms"]] == [True, False]
    write_report(tmp_path / "r.html", changed, embed, title="planted", facts=facts())
    page = Page((tmp_path / "r.html").read_text())
    assert "This run was ended by an alarm. The rare is missing." in page.text("head")
    assert "Alarm. The rare is missing." in page.text("loop")


# -- yields ----------------------------------------------------------------------------------------------------------------


def test_yields_are_good_rows_for_what_was_paid_the_best_first(run: RunFolder, page: Page) -> None:
    yields = loop(run)["yields"]
    assert yields["priced"] and [table["by"] for table in yields["tables"]] == ["Teacher", "Template", "Place"]
    good = run.of_fate("accepted", "surplus").join(run.costs.select("call", "stage", by="teacher"), on="call")
    for table, column in zip(yields["tables"][:2], ("by", "stage"), strict=True):
        counts = dict(good[column].value_counts().iter_rows())
        for row in table["rows"]:
            name = row["name"].split(" ")[0]
            spent = run.costs.filter(pl.col("teacher" if column == "by" else "stage") == name)
            assert (row["good"], row["calls"], row["micro_usd"]) == (counts[name], spent.height, spent["micro_usd"].sum())
            assert row["a_dollar"] == pytest.approx(1e6 * row["good"] / row["micro_usd"])
        rates = [row["a_dollar"] for row in table["rows"]]
        assert rates == sorted(rates, reverse=True) and len(rates) == 2
    cheap = yields["tables"][0]["rows"][0]
    assert cheap["name"] == "cheap"
    assert f"cheap {cheap['calls']} {cheap['made']} {cheap['good']} ${cheap['micro_usd'] / 1e6:.4f}" in page.text("loop")
    assert sum(row["calls"] for row in yields["tables"][2]["rows"]) == run.costs.height
    assert yields["tables"][2]["rows"][0]["name"].startswith("label: ")


def test_what_the_loop_steered_by_is_what_is_shown(run: RunFolder, at: Standing) -> None:
    grid = grid_of_status(run.status)
    assert (grid.accepted, grid.quotas) == (at.grid.accepted, at.grid.quotas)
    evidence = at.tried.group_by("aim").agg(pl.col("good", "calls").sum())
    expected = {f"label: {json.loads(aim)['label']}": (good, calls) for aim, good, calls in evidence.iter_rows()}
    assert {row["name"]: (row["good"], row["calls"]) for row in loop(run)["yields"]["tables"][2]["rows"]} == expected


def test_a_good_row_beside_its_place_counts_for_its_teacher_and_not_for_the_place(run: RunFolder, tmp_path: Path) -> None:
    before = [sum(row["good"] for row in table["rows"]) for table in loop(run)["yields"]["tables"]]
    assert before == [run.of_fate("accepted", "surplus").height] * 3
    changed = copied(run, tmp_path / "run")
    label = run.accepted["label"][0]
    for path in changed.path.glob("round-*/*/costs.parquet"):
        other = pl.lit(json.dumps({"label": label}))
        write_frame(path, pl.read_parquet(path).with_columns(aim=other).select(pl.col(name).cast(dtype) for name, dtype in COSTS.items()))
    after = [sum(row["good"] for row in table["rows"]) for table in loop(RunFolder(changed.path))["yields"]["tables"]]
    of_label = run.of_fate("accepted", "surplus").filter(pl.col("label") == label).height
    assert after == [before[0], before[1], of_label]


def with_price(run: RunFolder, micro_usd: dict[str, int | None]) -> RunFolder:
    """A copied run in which a call of each teacher has another price."""
    for path in run.path.glob("round-*/*/costs.parquet"):
        costs = pl.read_parquet(path)
        price = pl.col("teacher").replace_strict(micro_usd, default=0, return_dtype=pl.Int64)
        write_frame(path, costs.with_columns(micro_usd=price).select(pl.col(name).cast(dtype) for name, dtype in COSTS.items()))
    return RunFolder(run.path)


def test_free_rows_are_told_by_the_call_and_an_unknown_price_comes_last(run: RunFolder, tmp_path: Path) -> None:
    free = loop(with_price(copied(run, tmp_path / "free"), {}))["yields"]
    assert not free["priced"] and free["tables"][0]["figure"] == "a_call"
    rates = [row["a_call"] for row in free["tables"][0]["rows"]]
    assert rates == sorted(rates, reverse=True)
    mixed = with_price(copied(run, tmp_path / "mixed"), {"dear": None})
    assert [row["name"] for row in loop(mixed)["yields"]["tables"][0]["rows"]] == ["cheap", "dear"]
    write_report(tmp_path / "r.html", mixed, embed, title="planted", facts=facts())
    text = Page((tmp_path / "r.html").read_text()).text("loop")
    assert re.search(r"cheap \d+ \d+ \d+ \$0\.00 free ", text) and re.search(r"dear \d+ \d+ \d+ unknown – ", text)


def test_of_many_places_the_best_and_the_worst_are_shown(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every = loop(run)["yields"]["tables"][2]["rows"]
    monkeypatch.setattr(report_loop, "BEST", 2)
    monkeypatch.setattr(report_loop, "WORST", 1)
    table = loop(run)["yields"]["tables"][2]
    assert table["rows"] == [*every[:2], every[-1]] and table["cut"] == len(every) - 3
    write_report(tmp_path / "r.html", run, embed, title="planted", facts=facts())
    assert f"and {table['cut']} between" in Page((tmp_path / "r.html").read_text()).text("loop")


# -- clusters --------------------------------------------------------------------------------------------------------------


def test_clusters_show_their_growth_and_their_middle_and_edge(run: RunFolder, page: Page) -> None:
    found = loop(run)["clusters"]
    report = next(stage["reports"]["clusters"] for stage in reversed(run.stages) if "clusters" in stage["reports"])
    shown = {row["name"]: row for row in found["rows"] if row["size"]}
    assert sorted(shown) == sorted(entry["name"] for entry in report if entry["cluster"] >= 0)
    text = dict(run.samples.select("id", "input").iter_rows())
    for entry in report:
        row = shown[entry["name"]]
        assert (row["size"], row["real"], row["made"]) == (entry["size"], entry["seeds"], entry["made"])
        assert row["growth"][-1] == (4, entry["seeds"], entry["made"])
        assert row["distance"] == entry["distance_to_seeds"] and row["thin"] == entry["thin"]
        assert row["central"] == [text[sample] for sample in entry["central"][:2]]
        assert not set(row["central"]) & set(row["edge"])
        assert " ".join(entry["name"].split()) in page.text("loop")
    first = run.places.filter((pl.col("round") == 1) & (pl.col("place") >= 0)).height
    assert sum(real + made for row in found["rows"] for number, real, made in row["growth"] if number == 1) == first


@pytest.mark.parametrize(
    ("event", "number", "words"),
    [
        ("new", 1, None),
        ("new", 2, "new in round 2"),
        ("split", 2, "split from “old” in round 2"),
        ("merged", 3, "merged into “old” in round 3"),
        ("gone", 3, "gone in round 3"),
        ("grown", 2, None),
        ("grown", 3, "still growing"),
        ("same", 3, "no new rows"),
    ],
)
def test_what_became_of_a_cluster_is_told_in_words(event: str, number: int, words: str | None) -> None:
    row = {"round": number, "event": event, "other": 7 if event in ("split", "merged") else None}
    assert report_loop._event(row, [1, 2, 3], {7: "old"}) == words


# -- the choice ------------------------------------------------------------------------------------------------------------


def test_the_choice_is_held_against_chance_and_its_last_rows_are_weighed(run: RunFolder, page: Page) -> None:
    found = loop(run)["choice"]
    samples = report._joined(run, {})
    pool = samples.filter(pl.col("fate").is_in(["accepted", "surplus"])).sort("id")
    taken = np.flatnonzero((pool["fate"] == "accepted").to_numpy())
    vectors, held = embed(pool["shown"].to_list()), embed(samples.filter(pl.col("fate") == "real")["shown"].to_list())
    curve = represented(taken, vectors, held)
    assert found["chosen"] == len(taken) and found["pool"] == found["looked_at"] == pool.height
    assert (found["start"], found["end"]) == (pytest.approx(curve[0], abs=1e-6), pytest.approx(curve[-1], abs=1e-6))
    few = found["few"]
    assert few == len(taken) // 2
    assert found["start"] + found["first_adds"] + found["last_adds"] == pytest.approx(found["end"], abs=1e-6) or len(taken) % 2
    assert found["first_adds"] > found["last_adds"] > 0
    rows = {name: (chosen, chance) for name, _, chosen, chance in found["rows"]}
    assert list(rows) == ["Represented", "Quality", "Worth"]
    assert rows["Worth"][0] > rows["Worth"][1]
    assert f"Worth {rows['Worth'][0]:.3f} {rows['Worth'][1]:.3f}" in page.text("loop")
    assert f"the last {few} add {found['last_adds']:.3f}" in page.text("loop")


def test_of_two_hundred_rows_and_more_the_last_hundred_are_told(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_loop, "LAST", 10)
    found = loop(run)["choice"]
    assert found["few"] == 10 and 0 < found["last_adds"] < found["first_adds"]


def test_what_rows_cost_is_all_that_was_paid_where_something_good_came(run: RunFolder) -> None:
    samples = report._joined(run, {})
    good = samples.filter(pl.col("fate").is_in(["accepted", "surplus"]))
    arms = run.costs.join(good.select("call").unique(), on="call", how="semi").select("stage", "teacher", "aim").unique()
    paid = run.costs.join(arms, on=["stage", "teacher", "aim"], how="semi")["micro_usd"].sum()
    last = run.status["rounds"]
    assert report_loop._paid(run, last, samples, good["id"]) == pytest.approx(paid)
    half = report_loop._paid(run, last, samples, good["id"].head(10))
    assert half is not None and 0 < half < paid


def test_a_large_pool_is_drawn_by_a_hash_and_says_so(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = run.of_fate("accepted", "surplus").height
    monkeypatch.setattr(report_loop, "POOL", whole - 5)
    found = loop(run)["choice"]
    assert (found["looked_at"], found["pool"]) == (whole - 5, whole)
    write_report(tmp_path / "r.html", run, embed, title="planted", facts=facts())
    assert f"of {whole - 5} good rows, drawn from {whole}, were taken" in Page((tmp_path / "r.html").read_text()).text("loop")


def test_where_all_good_rows_were_taken_there_is_no_chance_to_beat(tmp_path: Path) -> None:
    real = seeds()
    run = write_run(tmp_path / "run", real, made(real), [])
    found = loop(run)["choice"]
    assert found["rows"] == [] and [name for name, _ in found["curves"]] == ["chosen"]
    assert found["last_micro_usd"] is None  # no cost is on disk


# -- towards what is real --------------------------------------------------------------------------------------------------


def test_real_asked_and_made_stand_side_by_side_with_figures_before_and_after(run: RunFolder, tmp_path: Path) -> None:
    texts = [text for rows in STOCK.values() for text in rows[:4]]
    reference = frame(*(chat(text + " Truly.", origin="real") for text in texts))
    clusters = [{"cluster": n, "name": f"tickets {n}", "seeds": 1, "made": 1, "rows": 10 - n} for n in range(3)]
    changed = copied(run, tmp_path / "run")
    for marker in changed.path.glob("round-*/07-coverage/stage.json"):
        stage = read_json(marker)
        write_json(marker, stage | {"reports": stage["reports"] | {"reference": clusters}})
    cell = run.status["cells"][0]
    asked = [cell | {"dimension": "cluster", "value": str(n), "name": f"tickets {n}", "wanted": 30 - 3 * n} for n in range(3)]
    changed = told(changed, cells=[*run.status["cells"], *asked])
    found = loop(changed, reference)["towards"]
    assert found["sides"] == [("reference", "reference"), ("asked", "asked for"), ("made", "accepted")]
    homes, accepted = changed.homes(4), set(changed.accepted["id"])
    for number, row in enumerate(found["rows"]):
        here = sum(homes[sample] == str(number) for sample in accepted)
        assert row["name"] == f"tickets {number}" and [n for _, n, _ in row["bars"]] == [10 - number, 30 - 3 * number, here]
    assert sum(share for row in found["rows"] for side, _, share in row["bars"] if side == "reference") == pytest.approx(100)
    sides = {*changed.of_fate("real")["id"]}, {*changed.of_fate("real")["id"], *accepted}
    for overlap, side in zip(found["overlap"], sides, strict=True):
        here = [sum(homes.get(sample) == str(number) for sample in side) for number in range(3)]
        assert overlap == pytest.approx(sum(min((10 - n) / 27, here[n] / sum(here)) for n in range(3)))
    assert found["against"] == "the reference" and found["compared"] == 40
    assert [name for name, _, _ in found["figures"]] == ["MMD²", "p of it", "AUC"]
    before, after = next(values for name, _, values in found["figures"] if name == "MMD²")
    assert before is not None and after is not None and before != after
    write_report(tmp_path / "r.html", changed, embed, title="planted", facts=facts(), reference=reference)
    html = (tmp_path / "r.html").read_text()
    assert f"tickets 0 10 37% 30 37% {found['rows'][0]['bars'][2][1]}" in Page(html).text("loop")
    assert f"MMD² {before:.4f} {after:.4f}" in Page(html).text("loop")
    assert "Truly." not in html  # nobody agreed to show a real input


def test_without_a_reference_seeds_are_compared_with_seeds_and_accepted_rows(run: RunFolder, page: Page) -> None:
    found = loop(run)["towards"]
    assert not found["reference"] and found["overlap"] is None
    assert found["sides"] == [("seeds", "seeds"), ("made", "seeds and accepted")]
    real = run.of_fate("real").height
    counts = {side: sum(n for row in found["rows"] for name, n, _ in row["bars"] if name == side) for side in ("seeds", "made")}
    assert counts == {"seeds": real, "made": real + run.accepted.height}
    assert found["held"][0] <= found["held"][1] == found["clusters"]
    assert f"Of {found['clusters']} clusters, {found['held'][0]} had a seed before, and {found['held'][1]} hold a row now." in page.text(
        "loop"
    )
    assert "Before and after" in page.text("loop")


def test_a_reference_like_the_seeds_is_not_told_apart_from_them(run: RunFolder) -> None:
    figures = {name: values for name, _, values in loop(run, run.of_fate("real"))["towards"]["figures"]}
    assert figures["MMD²"][0] <= 0
    assert figures["AUC"][0] == pytest.approx(0.5, abs=0.01)


# -- what is not there, and what must not get out --------------------------------------------------------------------------


def test_a_run_of_an_earlier_gristmill_shows_what_it_has(tmp_path: Path) -> None:
    found = loop(bank_run(tmp_path / "run"))
    assert not found["alarms"] and not found["cells"] and not found["yields"]
    assert [row["accepted"] for row in found["rounds"]["rows"]] == [None, None]
    assert [(row["made"], row["good"]) for row in found["rounds"]["rows"]] == [(28, 20), (17, 17)]
    assert found["clusters"]["rows"][0]["central"] == [] and found["clusters"]["rows"][0]["distance"] is None
    write_report(tmp_path / "r.html", bank_run(tmp_path / "again"), embed, title="bank", facts=facts())
    text = Page((tmp_path / "r.html").read_text()).text("loop")
    for absent in ("What was asked for", "Yield", "Accepted Missing", "Depth", "Covered", "None", "MMD"):
        assert absent not in text


def test_a_run_without_a_round_that_ended_has_no_section(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", seeds()[:3], [], [], status="stopped")
    assert loop(run) == {}
    write_report(tmp_path / "r.html", run, embed, title="none", facts=facts())
    page = Page((tmp_path / "r.html").read_text())
    assert "loop" not in page.sections
    assert not [attrs for tag, attrs in page.elements if tag == "a" and attrs.get("href") == "#loop"]


def test_hostile_names_stay_text(run: RunFolder, tmp_path: Path) -> None:
    changed = copied(run, tmp_path / "run")
    for path in changed.path.glob("round-*/07-coverage/verdicts.parquet"):
        verdicts = pl.read_parquet(path)
        details = [json.loads(detail) | {"name": HOSTILE} for detail in verdicts["detail"]]
        write_frame(path, verdicts.with_columns(detail=pl.Series([json.dumps(detail) for detail in details])))
    cells = [cell | {"name": HOSTILE, "rejected": {HOSTILE: 3}} for cell in run.status["cells"]]
    alarms = [alarm | {"sentence": HOSTILE} for alarm in run.status["alarms"]]
    changed = told(changed, cells=cells, alarms=alarms)
    write_report(tmp_path / "r.html", changed, embed, title="planted", facts=facts())
    html = (tmp_path / "r.html").read_text()
    assert "<img" not in html and html.count("<script") == html.count("</script") == 2
    assert "49" not in re.findall(r"alert\('in'\)</script> (\S+)", Page(html).text("loop"))
    assert Page(html).text("loop").count(" ".join(HOSTILE.split())) > 20
    assert not [attrs for _, attrs in Page(html).elements if any(name.startswith("on") for name in attrs)]


def test_the_same_run_is_told_the_same(run: RunFolder) -> None:
    again = RunFolder(run.path)
    assert loop(run) == loop(again)
    shuffled = report._joined(run, {}).sample(fraction=1, shuffle=True, seed=3)
    assert loop_of(again, shuffled, embed)["choice"] == loop(run)["choice"]


def test_the_map_can_be_gone_through_round_by_round(page: Page) -> None:
    assert set(page.payload["round"]) == {0, 1, 2, 3}  # the fourth made nothing
    assert [attrs for tag, attrs in page.elements if attrs.get("id") == "upto" and "hidden" in attrs]  # the script shows it
    assert 'byId("upto").append' in page.scripts[1]

"""What a run's judges are worth: counted against labels that a person could have given, read from reviews and from files."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from factory.cli import main
from factory.errors import GristmillError
from factory.judging import Judged, judge_report, read_labels
from factory.recipe import Recipe, load_recipe
from factory.records import RunFolder
from schemas.sample import Message, Provenance, Sample
from schemas.verdict import Verdict
from tests.run_on_disk import chat, seeds, write_run

RECIPE = """\
name: bank
target: {accepted: 40}
teachers: {small: {kind: fake}, big: {kind: fake, model: other}}
stages:
  - seeds: {path: seeds.jsonl}
  - compose: {}
  - judge: {rubric: label_fits, at_least: 4}
  - near: {}
"""
ROWS = 60


def score_of(number: int) -> int:
    return 1 + number % 5


def is_good(number: int) -> bool:
    """People keep what scores 3 and more, but for a third of those that score 3."""
    return score_of(number) >= 3 and number % 15 != 7


@pytest.fixture
def there(tmp_path: Path) -> tuple[Recipe, RunFolder, Path]:
    task = tmp_path / "task"
    task.mkdir()
    (task / "recipe.yaml").write_text(RECIPE)
    (task / "seeds.jsonl").write_bytes((Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl").read_bytes())
    recipe, home = load_recipe(task), tmp_path / "mill"
    new = samples()
    verdicts = [
        Verdict(
            sample=sample.id,
            by="03-judge",
            keep=score_of(n) >= 4,
            reason=None if score_of(n) >= 4 else "score below 4",
            score=score_of(n),
            detail={"teacher": "small" if n % 2 else "big"} | ({"people": "judges disagree"} if n == 7 else {}),
        )
        for n, sample in enumerate(new)
    ]
    silent = chat("Nobody judged this one", "failed_transfer")
    verdicts.append(Verdict(sample=silent.id, by="03-judge", keep=False, reason="not judged"))
    folder = recipe.run_folder(home)
    write_run(folder, seeds(), [*new, silent], verdicts, filters=("03-judge", "04-near"))
    return recipe, RunFolder(folder), home


def samples() -> list[Sample]:
    return [chat(f"Where is transfer number {n}, sent from town {n * 7}?", "transfer_timing") for n in range(ROWS)]


def review(home: Path, rows: Sequence[tuple[int, dict[str, Any]]], name: str = "anna") -> Path:
    path = home / "reviews" / "bank" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [{"sample": samples()[n].id, "by": f"human:{name}", "keep": is_good(n), **more} for n, more in rows]
    path.write_text("".join(json.dumps(label) + "\n" for label in labels))
    return path


def of_judge(found: Sequence[Judged]) -> Judged:
    (judged,) = [one for one in found if one.stage == "03-judge"]
    return judged


def test_a_judge_is_measured_against_reviews(there: tuple[Recipe, RunFolder, Path]) -> None:
    recipe, run, home = there
    review(home, [(n, {}) for n in range(ROWS)])
    judged = of_judge(judge_report(recipe, run, home))
    assert (judged.judged, judged.unjudged, judged.labelled, judged.for_people) == (ROWS + 1, 1, ROWS, 1)
    assert judged.kept == sum(score_of(n) >= 4 for n in range(ROWS))
    assert judged.mean == pytest.approx(3.0)
    assert judged.confusion
    expected = [
        sum((score_of(n) >= 4) == keep and is_good(n) == good for n in range(ROWS)) for keep in (True, False) for good in (True, False)
    ]
    assert list(vars(judged.confusion).values()) == expected
    assert judged.likely and judged.likely.threshold == 4
    assert (judged.likely.precision.hits, judged.likely.precision.of, judged.likely.recall.of) == (24, 24, 32)


def test_the_threshold_hangs_on_the_precision_that_is_asked_for(there: tuple[Recipe, RunFolder, Path]) -> None:
    recipe, run, home = there
    review(home, [(n, {}) for n in range(ROWS)])
    assert [of_judge(judge_report(recipe, run, home, precision=p)).likely.threshold for p in (0.5, 0.8)] == [1, 3]  # type: ignore[union-attr]


def test_each_judge_is_told_apart(there: tuple[Recipe, RunFolder, Path]) -> None:
    recipe, run, home = there
    review(home, [(n, {}) for n in range(ROWS)])
    by = of_judge(judge_report(recipe, run, home)).by_teacher
    assert {name: told["rows"] for name, told in by.items()} == {"small": 30, "big": 30}
    assert sum(told["labels"]["agreement"]["of"] for told in by.values()) == ROWS


def test_without_labels_it_says_so_and_counts_all_the_same(there: tuple[Recipe, RunFolder, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run, home = there
    judged = of_judge(judge_report(recipe, run, home))
    assert (judged.labelled, judged.confusion, judged.likely, judged.judged) == (0, None, None, ROWS + 1)
    monkeypatch.setenv("GRISTMILL_HOME", str(home))
    told = CliRunner().invoke(main, ["judge-report", str(recipe.path.parent)])
    assert told.exit_code == 0
    assert "no labels by people" in told.output
    assert "1 could not be judged" in told.output


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize("by", ["id", "start", "texts"])
def test_labels_come_from_files_too(there: tuple[Recipe, RunFolder, Path], tmp_path: Path, form: str, by: str) -> None:
    recipe, run, home = there
    rows = []
    for n, sample in enumerate(samples()[:20]):
        named = (
            {"id": sample.id}
            if by == "id"
            else {"sample": sample.id[:12]}
            if by == "start"
            else {"input": sample.input, "output": sample.output}
        )
        rows.append({**named, "keep": "yes" if is_good(n) else "no"})
    path = tmp_path / f"labels.{form}"
    if form == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    labels = read_labels(recipe, run, home, [path])
    assert dict(labels.select("sample", "keep").iter_rows()) == {sample.id: is_good(n) for n, sample in enumerate(samples()[:20])}
    assert of_judge(judge_report(recipe, run, home, files=[path])).labelled == 20


def test_points_are_labels_and_are_compared_as_points(there: tuple[Recipe, RunFolder, Path]) -> None:
    recipe, run, home = there
    path = home / "reviews" / "bank" / "ben.jsonl"
    path.parent.mkdir(parents=True)
    points = [{"sample": samples()[n].id, "score": max(1, score_of(n) - n % 2)} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, points)))
    judged = of_judge(judge_report(recipe, run, home))
    assert judged.labelled == 40
    assert judged.weighted and 0.8 < judged.weighted[0] < 0.95
    assert judged.confusion and judged.confusion.kept_bad == sum(score_of(n) == 4 and n % 2 == 1 for n in range(40))


def test_of_several_people_the_majority_counts_and_a_tie_is_none(there: tuple[Recipe, RunFolder, Path]) -> None:
    recipe, run, home = there
    review(home, [(0, {"keep": True}), (1, {"keep": True}), (2, {"keep": False})], "anna")
    review(home, [(0, {"keep": False}), (1, {"keep": True}), (2, {"keep": True})], "ben")
    review(home, [(2, {"keep": False}), (2, {"keep": True}), (1, {"keep": False})], "cleo")  # she changed her mind
    labels = {row["sample"]: row["keep"] for row in read_labels(recipe, run, home).to_dicts()}
    assert labels == {samples()[1].id: True, samples()[2].id: True}


def test_later_labels_that_disagree_are_an_alarm(there: tuple[Recipe, RunFolder, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, run, home = there
    review(home, [(n, {"keep": score_of(n) >= 4}) for n in range(30)])
    assert of_judge(judge_report(recipe, run, home, save=True)).drift is None
    assert of_judge(judge_report(recipe, run, home)).drift is None  # there are no later ones
    review(home, [(n, {"keep": score_of(n) >= 4}) for n in range(30, 45)], "ben")
    same = of_judge(judge_report(recipe, run, home))
    assert same.drift == 1.0
    assert (same.alarm, same.looked) == (False, 30)
    review(home, [(n, {"keep": score_of(n) < 4}) for n in range(45, 60)], "cleo")
    other = of_judge(judge_report(recipe, run, home))
    assert other.alarm
    assert other.drift and other.drift < 0.001
    monkeypatch.setenv("GRISTMILL_HOME", str(home))
    told = CliRunner().invoke(main, ["judge-report", str(recipe.path.parent)])
    assert told.exit_code == 4
    assert "agree less than before" in told.output


def test_a_calibration_is_of_one_judge_with_its_settings(there: tuple[Recipe, RunFolder, Path]) -> None:
    recipe, run, home = there
    review(home, [(n, {}) for n in range(30)])
    judge_report(recipe, run, home, save=True)
    review(home, [(n, {"keep": not is_good(n)}) for n in range(30, 60)], "ben")
    assert of_judge(judge_report(recipe, run, home)).alarm
    recipe.path.write_text(RECIPE.replace("at_least: 4", "at_least: 3"))
    assert of_judge(judge_report(load_recipe(recipe.path), run, home)).drift is None


def test_a_filter_that_does_not_ask_is_measured_by_name(there: tuple[Recipe, RunFolder, Path]) -> None:
    recipe, run, home = there
    assert [judged.stage for judged in judge_report(recipe, run, home)] == ["03-judge"]
    assert [judged.stage for judged in judge_report(recipe, run, home, stage="near")] == ["04-near"]
    with pytest.raises(GristmillError, match="no filter of the recipe is called 'jury'"):
        judge_report(recipe, run, home, stage="jury")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sample": "x", "keep": "perhaps"}', "neither yes nor no"),
        ('{"sample": "x"}', "has no opinion"),
        ('{"sample": "x", "score": "high"}', "is no score"),
        ("[1, 2]", "can be read"),
        ("{broken", "can be read"),
        ('{"sample": "nobody", "keep": true}', "not one of these labels"),
    ],
)
def test_labels_that_can_not_be_read_are_named(there: tuple[Recipe, RunFolder, Path], tmp_path: Path, text: str, message: str) -> None:
    recipe, run, home = there
    (tmp_path / "labels.jsonl").write_text(text)
    with pytest.raises(GristmillError, match=message):
        read_labels(recipe, run, home, [tmp_path / "labels.jsonl"])


def test_the_length_of_preferred_answers_is_taken_out(tmp_path: Path) -> None:
    """Answers that win by their length alone win half of the time at equal length."""
    task, home, rng = tmp_path / "task", tmp_path / "mill", random.Random(4)
    task.mkdir()
    (task / "recipe.yaml").write_text(
        RECIPE.replace("judge: {rubric: label_fits, at_least: 4}", "pairs: {}").replace("near: {}", "near: {compare: both}")
    )
    (task / "seeds.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    recipe = load_recipe(task)
    new, verdicts = [], []
    for n in range(300):
        long, short = 300 + rng.randrange(50), 100 + rng.randrange(50)
        lengths = [long, short] if rng.random() < 0.8 else [short, long]  # people chose the longer one, mostly
        chosen, rejected = ((Message(role="assistant", content="x" * size),) for size in lengths)
        prompt = (Message(role="user", content=f"question {n}"),)
        sample = Sample(
            messages=prompt, chosen=chosen, rejected=rejected, provenance=Provenance(origin="made", generator="02-compose", round=1)
        )
        won = rng.random() < (0.9 if lengths[0] > lengths[1] else 0.1)
        new.append(sample)
        verdicts.append(Verdict(sample=sample.id, by="03-pairs", keep=won, score=1 if won else -1, detail={"length": lengths}))
    folder = recipe.run_folder(home)
    write_run(folder, seeds(), new, verdicts, filters=("03-pairs", "04-near"))
    (judged,) = judge_report(recipe, RunFolder(folder), home)
    assert judged.preferred and judged.preferred.wins and judged.preferred.controlled
    assert 0.65 < judged.preferred.wins < 0.85
    assert judged.preferred.low is not None and judged.preferred.high is not None
    assert judged.preferred.low < 0.5 < judged.preferred.high
    assert judged.data()["length_controlled"]["rows"] == 300


def test_json_holds_what_the_table_says(there: tuple[Recipe, RunFolder, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _, home = there
    review(home, [(n, {}) for n in range(ROWS)])
    monkeypatch.setenv("GRISTMILL_HOME", str(home))
    (data,) = json.loads(CliRunner().invoke(main, ["judge-report", str(recipe.path.parent), "--json"]).output)
    assert data["stage"] == "03-judge"
    assert data["confusion"]["kept_good"] + data["confusion"]["dropped_bad"] == data["confusion"]["agreement"]["hits"]
    told = CliRunner().invoke(main, ["judge-report", str(recipe.path.parent)]).output
    assert f"Cohen's kappa {data['confusion']['kappa']['value']:.2f}" in told
    assert f"{ROWS} rows that it scored have people's labels" in told
    assert pl.Series(told.splitlines()).str.contains("from 4 on 100%", literal=True).any()


def test_points_are_labels_of_a_judge_with_default_settings_too(there: tuple[Recipe, RunFolder, Path]) -> None:
    recipe, run, home = there
    recipe.path.write_text(RECIPE.replace(", at_least: 4", ""))
    path = home / "reviews" / "bank" / "ben.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(json.dumps({"sample": samples()[n].id, "score": score_of(n)}) for n in range(30)))
    judged = of_judge(judge_report(load_recipe(recipe.path), run, home))
    assert (judged.labelled, judged.at_least) == (30, 4)
    assert judged.confusion and judged.confusion.agreement.value == 1


def test_a_label_of_a_question_with_several_answers_must_name_the_answer(tmp_path: Path) -> None:
    task, home = tmp_path / "task", tmp_path / "mill"
    task.mkdir()
    (task / "recipe.yaml").write_text(RECIPE)
    (task / "seeds.jsonl").write_bytes((Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl").read_bytes())
    recipe = load_recipe(task)
    new = [chat("Is it open?", "transfer_timing"), chat("Is it open?", "failed_transfer"), chat("Where is it?", "failed_transfer")]
    run = write_run(recipe.run_folder(home), seeds(), new, [], filters=("03-judge", "04-near"))
    path = tmp_path / "labels.jsonl"
    rows = [{"input": "Is it open?", "keep": True}, {"input": "Is it open?", "output": "failed_transfer", "label": "no", "keep": True}]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"id": 7, "input": "Where is it?", "keep": False}]))
    labels = {row["sample"]: row["keep"] for row in read_labels(recipe, run, home, [path]).to_dicts()}
    assert labels == {new[1].id: True, new[2].id: False}


def test_the_members_of_a_panel_and_the_places_of_a_pair_are_counted_over_all_rounds(tmp_path: Path) -> None:
    task, home = tmp_path / "task", tmp_path / "mill"
    task.mkdir()
    (task / "recipe.yaml").write_text(
        RECIPE.replace("judge: {rubric: label_fits, at_least: 4}", "panel: {rubric: label_fits, at_least: 3}").replace("near", "pairs")
    )
    (task / "seeds.jsonl").write_bytes((Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl").read_bytes())
    recipe = load_recipe(task)
    new = [chat(f"What about {n}?", "transfer_timing", round=1 + n % 2) for n in range(8)]
    votes = [
        [{"teacher": "small", "score": 1 + n % 5}, {"teacher": "big", "score": 5}, {"teacher": "third", "score": None}] for n in range(8)
    ]
    verdicts = [Verdict(sample=s.id, by="03-panel", keep=True, score=3, detail={"votes": of}) for s, of in zip(new, votes, strict=True)]
    better = [["A", "B"], ["A", "A"], ["A", "A"], ["tie", "tie"], ["A", "tie"], ["B", "A"], ["A", "B"], ["A", "B"]]
    verdicts += [Verdict(sample=s.id, by="04-pairs", keep=True, score=1, detail={"better": of}) for s, of in zip(new, better, strict=True)]
    run = write_run(recipe.run_folder(home), seeds(), new, verdicts, filters=("03-panel", "04-pairs"))
    panel, pairs = judge_report(recipe, run, home)
    assert {name: (told["rows"], told["kept"]) for name, told in panel.by_teacher.items()} == {"small": (8, 4), "big": (8, 8)}
    assert pairs.told == {"order decides": 0.25, "first preferred": round(9 / 13, 4)}

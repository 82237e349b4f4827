"""Thresholds move over samples that are there, nobody is asked, and what would change is told row by row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from factory.cli import main
from factory.errors import GristmillError, StoreError
from factory.ledger import open_ledger
from factory.recipe import Recipe, load_recipe
from factory.records import RunFolder
from factory.rejudge import changes_of, earlier_run, patched, rejudge
from factory.run import run
from factory.store import read_json, write_json

SEEDS = Path(__file__).parents[2] / "examples" / "bank-intents" / "seeds.jsonl"
RECIPE = """\
name: again
target: {{accepted: {accepted}, balance: label, rounds: 2}}
teachers:
  small: {{kind: fake}}
stages:
  - seeds: {{path: seeds.jsonl, label: intent}}
  - compose: {{template: label-completion, per_call: 2}}
  - rules: {{copied: 0.95}}
  - judge: {{rubric: label_fits, at_least: {at_least}}}
  - exact: {{}}
"""


def written(folder: Path, *, accepted: int = 240, at_least: int = 4) -> Recipe:
    folder.mkdir(exist_ok=True)
    (folder / "seeds.jsonl").write_bytes(SEEDS.read_bytes())
    (folder / "recipe.yaml").write_text(RECIPE.format(accepted=accepted, at_least=at_least))
    return load_recipe(folder)


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, RunFolder]:
    """A run that ends short after two rounds, so that every row of it is judged."""
    folder = tmp_path_factory.mktemp("again")
    recipe = written(folder / "task")
    return recipe, folder / "mill", run(recipe, folder / "mill", view="quiet")


def asked(home: Path) -> int:
    with open_ledger(home, read_only=True) as ledger:
        return sum(row.settled + row.failed + row.open + row.lost for row in ledger.sums("run"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_lower_threshold_lets_in_just_the_rows_between_and_asks_nobody(mill: tuple[Recipe, Path, RunFolder]) -> None:
    recipe, home, before = mill
    spent, as_it_was = asked(home), files(before.path)
    changes = changes_of(recipe, home, settings=["judge.at_least=3"])
    assert asked(home) == spent
    assert files(before.path) == as_it_was
    assert not list((home / "runs").glob(".rejudge*"))
    judged = before.verdicts.filter(pl.col("by") == "04-judge")
    between = judged.filter(pl.col("score") == 3)
    (line,) = changes.stages.filter(pl.col("stage") == "04-judge").to_dicts()
    assert between.height > 10
    assert (line["comes"], line["goes"]) == (between.height, 0)
    assert line["kept"] == line["kept_before"] + between.height
    assert changes.unknown == {}
    came = changes.rows.filter(pl.col("fate") == "accepted")
    gone = changes.rows.filter(pl.col("fate") != "accepted")
    assert changes.accepted == changes.accepted_before + came.height - gone.height
    assert set(gone["reason"]) <= {"place full"}  # its label has enough rows that are as good
    spare = before.fates.filter(pl.col("fate") == "surplus")  # beside other rows another of them may be the better choice
    assert set(came["id"]) <= {*between["sample"], *spare["id"]}
    assert {"score below 4"} <= {*came["reason_before"]} <= {"score below 4", "place full"}
    assert (came.filter(pl.col("reason_before") == "score below 4")["score_before"] == 3).all()


def test_a_stricter_threshold_drops_rows_and_says_by_which_score(mill: tuple[Recipe, Path, RunFolder]) -> None:
    recipe, home, before = mill
    changes = changes_of(recipe, home, settings=["judge.at_least=5"])
    four = before.accepted.join(
        before.verdicts.filter((pl.col("by") == "04-judge") & (pl.col("score") == 4)), left_on="id", right_on="sample"
    )
    assert four.height > 5
    assert sorted(changes.rows["id"]) == sorted(four["id"])
    assert changes.rows["by"].unique().to_list() == ["04-judge"]
    assert changes.accepted == changes.accepted_before - four.height


def test_rows_that_a_judge_was_never_asked_about_are_not_judged_and_counted(mill: tuple[Recipe, Path, RunFolder]) -> None:
    recipe, home, before = mill
    spent = asked(home)
    changes = changes_of(recipe, home, without=["rules"])
    never = before.verdicts.filter((pl.col("by") == "03-rules") & ~pl.col("keep")).height
    assert never > 10
    assert changes.unknown == {"03-judge": never}  # the judge is the third stage now
    assert asked(home) == spent
    assert changes.accepted == changes.accepted_before
    assert changes.stages["stage"].to_list() == ["03-judge", "without 03-rules", "04-exact", "target"]
    (judge,) = changes.stages.filter(pl.col("stage") == "03-judge").to_dicts()
    assert (judge["comes"], judge["goes"], judge["judged"] - judge["judged_before"]) == (0, 0, never)


def test_what_is_kept_is_the_run_of_the_changed_recipe(tmp_path: Path) -> None:
    recipe = written(tmp_path / "task")
    home = tmp_path / "mill"
    before = run(recipe, home, view="quiet")
    spent = asked(home)
    changed = written(tmp_path / "task", at_least=3)
    assert earlier_run(changed, home).path == before.path
    changes = changes_of(changed, home, keep=True)
    assert changes.kept_in == changed.run_folder(home)
    kept = RunFolder(changed.run_folder(home))
    assert kept.status["digest"] == changed.digest
    assert kept.accepted.height == changes.accepted > before.accepted.height
    assert set(kept.samples["id"]) <= set(before.samples["id"])
    with pytest.raises(StoreError, match="run of its own"):
        changes_of(changed, home, keep=True)
    again = run(changed, home, view="quiet")  # there is nothing more to do
    assert asked(home) == spent
    assert again.accepted["id"].sort().equals(kept.accepted["id"].sort())


def test_a_target_that_is_met_earlier_needs_no_later_round(mill: tuple[Recipe, Path, RunFolder]) -> None:
    recipe, home, before = mill
    smaller = written(recipe.path.parent, accepted=20, at_least=3)
    try:
        changes = rejudge(before, smaller, home)
    finally:
        written(recipe.path.parent)
    assert changes.accepted == 20
    assert changes.rows.filter(pl.col("fate") == "not needed").height > 0


def test_samples_of_other_seeds_or_generators_are_not_judged_for_this_recipe(tmp_path: Path, mill: tuple[Recipe, Path, RunFolder]) -> None:
    _, home, before = mill
    other = written(tmp_path / "other")
    text = other.path.read_text()
    other.path.write_text(text.replace("per_call: 2", "per_call: 3"))
    with pytest.raises(GristmillError, match="another compose"):
        rejudge(before, load_recipe(other.path), home)
    other.path.write_text(text)
    (tmp_path / "other" / "seeds.jsonl").write_bytes(b"".join(SEEDS.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(GristmillError, match="another seeds"):
        rejudge(before, load_recipe(other.path), home)
    other.path.write_text(text.replace("  - rules", "  - compose: {draws: 2}\n  - rules"))
    with pytest.raises(GristmillError, match="other generators"):
        rejudge(before, load_recipe(other.path), home)
    with pytest.raises(GristmillError, match="no earlier run"):
        earlier_run(load_recipe(other.path), home)
    (tmp_path / "other" / "seeds.jsonl").write_bytes(SEEDS.read_bytes())
    other.path.write_text(text.replace("{kind: fake}", "{kind: fake, model: another}"))
    with pytest.raises(GristmillError, match="another teacher 'small'"):
        rejudge(before, load_recipe(other.path), home)
    other.path.write_text(text.replace("target:", "seed: 7\ntarget:"))
    with pytest.raises(GristmillError, match="seed of randomness"):
        rejudge(before, load_recipe(other.path), home)


def test_a_run_that_does_not_say_what_its_files_held_proves_nothing(mill: tuple[Recipe, Path, RunFolder], tmp_path: Path) -> None:
    recipe, home, before = mill
    shutil.copytree(before.path, tmp_path / before.path.name)
    status = read_json(tmp_path / before.path.name / "run.json")
    del status["files"]
    write_json(tmp_path / before.path.name / "run.json", status)
    with pytest.raises(GristmillError, match="earlier Gristmill"):
        rejudge(RunFolder(tmp_path / before.path.name), recipe, home)


def test_filters_of_one_key_are_told_apart(tmp_path: Path) -> None:
    recipe = written(tmp_path / "task", accepted=30)
    recipe.path.write_text(recipe.path.read_text() + "  - judge: {rubric: helpfulness, at_least: 2}\n")
    recipe = load_recipe(recipe.path)
    before = run(recipe, tmp_path / "mill", view="quiet")
    changes = changes_of(recipe, tmp_path / "mill", without=["04-judge"])
    assert changes.stages["stage"].to_list() == ["03-rules", "04-exact", "without 04-judge", "05-judge", "target"]
    (judge,) = changes.stages.filter(pl.col("stage") == "05-judge").to_dicts()
    assert (judge["comes"], judge["goes"]) == (0, 0)
    assert judge["kept_before"] == before.verdicts.filter((pl.col("by") == "06-judge") & pl.col("keep")).height


def test_a_setting_of_one_stage_is_no_other_stages(tmp_path: Path) -> None:
    recipe = written(tmp_path / "task")
    shared = "judge: &j {rubric: label_fits, at_least: 4}\n  - judge: *j"
    recipe.path.write_text(recipe.path.read_text().replace("judge: {rubric: label_fits, at_least: 4}", shared))
    changed = patched(load_recipe(recipe.path), ["04-judge.at_least=2"])
    assert [line.stage.model_dump()["at_least"] for line in changed.stages[3:5]] == [2, 4]


def test_a_kept_run_has_paid_nothing(mill: tuple[Recipe, Path, RunFolder], tmp_path: Path) -> None:
    recipe, home, before = mill
    other = tmp_path / "mill"
    shutil.copytree(before.path, other / "runs" / before.path.name)
    shutil.copy(home / "ledger.db", other)
    path = other / "runs" / before.path.name / "round-01" / "02-compose" / "stage.json"
    stage = read_json(path)
    stage["teachers"]["small"]["micro_usd"] = 500
    write_json(path, stage | {"micro_usd": 500})
    kept = rejudge(RunFolder(other / "runs" / before.path.name), patched(recipe, ["rules.copied=0.96"]), other, keep=True).kept_in
    assert kept
    assert RunFolder(kept).status["micro_usd"] == 0
    assert all(row.micro_usd == 0 for row in RunFolder(kept).funnel())
    assert all(
        told["micro_usd"] == 0 and told["from_ledger"] == told["calls"] for s in RunFolder(kept).stages for told in s["teachers"].values()
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("judge.at_least=7", "less than or equal to 5"),
        ("judge.at_leest=3", "did you mean 'at_least'"),
        ("juge.at_least=3", "did you mean 'judge'"),
        ("compose.per_call=3", "no filter of the recipe is called 'compose'"),
        ("judge.at_least", "is no setting"),
        ("judge=3", "is no setting"),
        ("rules.max_words.x=3", "rules"),
        ("judge.at_least=[1", "no YAML value"),
    ],
)
def test_a_setting_that_can_not_be_is_named(mill: tuple[Recipe, Path, RunFolder], setting: str, message: str) -> None:
    with pytest.raises(GristmillError, match=message.replace("(", r"\(")):
        patched(mill[0], [setting])


def test_settings_reach_inside_and_one_of_two_filters_of_a_key(mill: tuple[Recipe, Path, RunFolder], tmp_path: Path) -> None:
    changed = patched(mill[0], ["rules.output.max_words=20", "judge.labels={cancel_transfer: takes it back}", "04-judge.at_least=3"])
    rules, judge = (line.stage.model_dump() for line in changed.stages[2:4])
    assert rules["output"]["max_words"] == 20
    assert rules["copied"] == 0.95
    assert judge["labels"] == {"cancel_transfer": "takes it back"}
    assert judge["at_least"] == 3
    twice = written(tmp_path / "twice")
    twice.path.write_text(twice.path.read_text() + "  - rules: {max_words: 9}\n")
    with pytest.raises(GristmillError, match="stands 2 times"):
        patched(load_recipe(twice.path), ["rules.max_words=8"])
    assert patched(load_recipe(twice.path), ["06-rules.max_words=8"]).stages[5].stage.model_dump()["max_words"] == 8


def test_the_command_prints_what_comes_and_goes_and_json(mill: tuple[Recipe, Path, RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, home, before = mill
    monkeypatch.setenv("GRISTMILL_HOME", str(home))
    told = CliRunner().invoke(main, ["rejudge", str(recipe.path.parent), "--set", "judge.at_least=5", "-n", "2"])
    assert told.exit_code == 0, told.output
    assert f"accepted: {before.accepted.height} → " in told.output
    assert "rows go:" in told.output
    assert "04-judge score below 5 (4)" in told.output
    data = json.loads(CliRunner().invoke(main, ["rejudge", str(recipe.path.parent), "--set", "judge.at_least=5", "--json"]).output)
    assert data["accepted_before"] == before.accepted.height
    assert data["accepted"] == data["accepted_before"] - len(data["rows"])
    assert CliRunner().invoke(main, ["rejudge", str(recipe.path.parent), "--set", "judge.at_least=x"]).exit_code == 1


def test_an_interrupted_round_is_left_out(mill: tuple[Recipe, Path, RunFolder], tmp_path: Path) -> None:
    recipe, home, before = mill
    other = tmp_path / "mill"
    other.mkdir()
    shutil.copytree(before.path, other / "runs" / before.path.name)
    shutil.copy(home / "ledger.db", other)
    (other / "runs" / before.path.name / "round-02" / "02-compose" / "stage.json").unlink()
    changes = rejudge(RunFolder(other / "runs" / before.path.name), patched(recipe, ["rules.copied=0.96"]), other, keep=True)
    assert changes.kept_in
    assert sorted(path.name for path in changes.kept_in.glob("round-*")) == ["round-00", "round-01"]
    assert read_json(changes.kept_in / "run.json")["reason"] == "the rounds that were judged again (1) are used up"

import csv
import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from factory.cli import main

ROWS = [
    {"text": "Where is my new card?", "n": 1},
    {"text": "where is my new card", "n": 2},
    {"text": "Where is my own new card?", "n": 3},
    {"text": "I lost my wallet yesterday", "n": 4},
    {"text": "Where is my new card?", "n": 1},
]


def gristmill(*arguments: object) -> str:
    done = CliRunner().invoke(main, ["dedup", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_what_stays_is_written_as_it_stood_and_what_goes_with_its_twin(tmp_path, ending):
    file = write(tmp_path / f"rows.{ending}", ROWS)
    said = gristmill(file, "--out", tmp_path / "kept.jsonl", "--dropped", tmp_path / "dropped.jsonl", "--near", 0.7)
    kept, dropped = lines(tmp_path / "kept.jsonl"), lines(tmp_path / "dropped.jsonl")
    assert [int(row["n"]) for row in kept] == [1, 4]
    assert [(int(row["row"]["n"]), row["by"]) for row in dropped] == [(2, "exact"), (3, "near"), (1, "exact")]
    assert all(row["twin"] == dropped[0]["twin"] for row in dropped)
    assert 0.7 <= dropped[1]["likeness"] < 1
    assert "stay" in said and "wrote 2 rows" in said


def test_a_folder_of_datasets_can_be_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    gristmill(tmp_path / "saved", "--out", tmp_path / "kept.csv")
    assert pl.read_csv(tmp_path / "kept.csv")["n"].to_list() == [1, 3, 4]


def test_without_out_nothing_is_written(tmp_path):
    said = gristmill(write(tmp_path / "rows.jsonl", ROWS))
    assert "Nothing was written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_key_can_be_the_prompt_or_the_answer(tmp_path):
    pairs = [
        {"question": "How much is 2 and 2?", "answer": "4"},
        {"question": "How much is 2 and 2?", "answer": "four"},
        {"question": "Half of 8?", "answer": "4"},
    ]
    file = write(tmp_path / "rows.jsonl", pairs)
    left = {}
    for compare in ("input", "output", "both"):
        gristmill(file, "--compare", compare, "--no-near", "--out", tmp_path / "kept.jsonl")
        left[compare] = [pairs.index(row) for row in lines(tmp_path / "kept.jsonl")]
    assert left == {"input": [0, 2], "output": [0, 1], "both": [0, 1, 2]}


def test_preferences_are_no_duplicates_of_conversations(tmp_path):
    pair = {"prompt": "Half of 8?", "chosen": "4", "rejected": "5"}
    file = write(tmp_path / "rows.jsonl", [{"question": "Half of 8?", "answer": "4"}, pair])
    result = CliRunner().invoke(main, ["dedup", str(file)])
    assert result.exit_code != 0
    assert "preferences beside other rows (chat, preference)" in " ".join(result.output.split())


def test_rows_of_another_file_go(tmp_path):
    other = write(tmp_path / "other.jsonl", [{"text": "i lost my wallet, yesterday"}])
    gristmill(
        write(tmp_path / "rows.jsonl", ROWS), "--against", other, "--out", tmp_path / "kept.jsonl", "--dropped", tmp_path / "gone.jsonl"
    )
    assert 4 not in [row["n"] for row in lines(tmp_path / "kept.jsonl")]
    assert str(other) in [row["twin"] for row in lines(tmp_path / "gone.jsonl")]


def test_lines_that_are_no_rows_are_told_and_rows_of_no_known_shape_stay(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n{"broken\n{"strange": 1}\n')
    said = gristmill(file, "--out", tmp_path / "kept.jsonl", "--dropped", tmp_path / "gone.jsonl")
    assert lines(tmp_path / "kept.jsonl") == [{"text": "one"}, {"strange": 1}]
    assert [row["by"] for row in lines(tmp_path / "gone.jsonl")] == ["unreadable line"]
    assert "2 rows could not be compared" in said


def test_meaning_is_compared_where_that_is_asked_for(tmp_path):
    rows = [{"text": "How do I get a new card?"}, {"text": "How can I get a new card?"}, {"text": "My transfer failed."}]
    gristmill(write(tmp_path / "rows.jsonl", rows), "--no-near", "--semantic", 0.9, "--out", tmp_path / "kept.jsonl")
    assert [rows.index(row) for row in lines(tmp_path / "kept.jsonl")] == [0, 2]


@pytest.mark.parametrize(("content", "said"), [("", "none of its 0 rows"), ("{\n", "can be used")])
def test_a_file_without_rows_is_an_error(tmp_path, content, said):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    done = CliRunner().invoke(main, ["dedup", str(file)])
    assert done.exit_code == 1
    assert said in done.output


def test_a_missing_file_is_an_error(tmp_path):
    done = CliRunner().invoke(main, ["dedup", str(tmp_path / "none.jsonl")])
    assert done.exit_code == 1
    assert "no such file" in done.output


@pytest.mark.parametrize("cosine", ["much", "", "0", "1.5", "-1", "nan"])
def test_a_cosine_that_is_none_is_said_before_anything_is_read(tmp_path, cosine):
    done = CliRunner().invoke(main, ["dedup", str(tmp_path / "none.jsonl"), "--semantic", cosine])
    assert done.exit_code == 2
    assert "neither `auto` nor a cosine" in done.output

"""The ledger as a user looks into it: its sums, its whole content as a file, and the proof that it is whole."""

from __future__ import annotations

import asyncio
import csv
import json
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from factory import audit
from factory.audit import COLUMNS, Audit, export, key_of, verify
from factory.cli import main
from factory.database import open_database
from factory.errors import StoreError
from factory.ledger import MIGRATIONS, Place, Question, ledger_place, open_ledger
from schemas.call import Call, Params, Reply
from schemas.sample import Message
from tests.factory.postgres import fresh_database

ODD = "a\0b \u2028 \ufeff \U0001f469\u200d\U0001f4bb,\"'\n"


@pytest.fixture(params=["sqlite", "postgresql"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose ledger lies in this database."""
    monkeypatch.setenv("GRISTMILL_LEDGER", "" if request.param == "sqlite" else fresh_database())
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "mill"))
    return tmp_path / "mill"


@pytest.fixture
def filled(home: Path) -> Path:
    """7 questions of two runs, asked 9 times: 4 were settled (one after it had failed, one of no known price), 1 failed, 2 were lost."""

    async def fill() -> None:
        with open_ledger(home) as ledger:

            async def enter(n: int, run: str, reserve: int | None = 1_000_000) -> int:
                call = Call(teacher="small", messages=(Message(role="user", content=f"{n} {ODD}"),), draw=n, params=Params(temperature=0.1))
                place = Place(run, f"0{n % 2}-stage", 1, "small" if n else "big")
                entry = await ledger.enter(Question.of(call, ("fake", "m")), place, reserve=reserve, budget=None)
                assert isinstance(entry, int)
                ledger.sending(entry)
                return entry

            await ledger.fail(await enter(0, "run-a"), "a passing fault")
            for n in range(4):
                price = None if n == 3 else 500_000
                await ledger.settle(await enter(n, "run-a"), Reply(text=ODD, finish="stop", tokens_in=3, tokens_out=2), price, 0.25)
            await ledger.fail(await enter(4, "run-b"), ODD)
            await ledger.lose(await enter(5, "run-b"), "the answer was cut")
            await enter(5, "run-b", None)
            await enter(6, "run-b", 250_000)

    asyncio.run(fill())
    return home


def execute(home: Path, sql: str, *values: Any) -> None:
    """Behind the ledger's back."""
    with closing(open_database(ledger_place(home), MIGRATIONS)) as db:
        db.change(sql, *values)


def gristmill(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["ledger", *arguments])


def test_sums_have_a_total_and_what_was_lost_is_listed_with_its_price(filled: Path) -> None:
    said = gristmill()
    assert said.exit_code == 0
    lines = [" ".join(line.split()) for line in said.output.splitlines()]
    assert "run run-a 4 1 0 0 12 8 $1.50 + 1 unpriced" in lines
    assert "run run-b 0 1 3 0 0 0 $1.25 + 1 unpriced" in lines
    assert "teacher big 1 1 0 0 3 2 $0.50" in lines
    assert "total 4 2 3 0 12 8 $2.75 + 2 unpriced" in lines
    assert "up to $1.25 (and 1 of unknown price) may have been paid for 3 answers that never came:" in lines
    assert sum("its process ended" in line or "the answer was cut" in line or "the run ended" in line for line in lines) == 3

    by_stage = gristmill("--by", "stage").output
    assert "stage 00-stage" in by_stage
    assert "teacher" not in by_stage.splitlines()[1]
    assert "day 20" in gristmill("--by", "day").output


def test_without_a_ledger_every_command_says_so_and_makes_none(home: Path) -> None:
    for arguments in ((), ("verify",), ("export", str(home.parent / "all.jsonl"))):
        said = gristmill(*arguments)
        assert said.exit_code == 1
        assert "nothing was asked yet" in said.output
    assert [*home.parent.iterdir()] == []


@pytest.mark.parametrize("page", [2, 2000])
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_everything_can_be_taken_elsewhere(filled: Path, tmp_path: Path, form: str, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "PAGE", page)
    path = tmp_path / "out" / f"all.{form}"
    said = gristmill("export", str(path))
    assert (said.exit_code, said.output) == (0, f"wrote 9 entries to {path}\n")
    rows = read(path)
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert Counter(row["state"] for row in rows) == {"settled": 4, "failed": 2, "lost": 3}
    assert rows[0]["answer"] is None, "it was answered another time"
    first = rows[1]
    assert [*first] == [*COLUMNS]
    assert (first["provider"], first["model"], first["draw"], first["round"], first["seconds"]) == ("fake", "m", 0, 1, 0.25)
    assert (first["reserved_micro_usd"], first["cost_micro_usd"], first["tokens_out"], first["error"]) == (1_000_000, 500_000, 2, None)
    assert first["request"]["messages"] == [{"role": "user", "content": f"0 {ODD}"}]
    assert Reply(**first["answer"]) == Reply(text=ODD, finish="stop", tokens_in=3, tokens_out=2)
    assert (rows[5]["answer"], rows[5]["error"]) == (None, ODD.replace("\0", "\ufffd"))
    assert rows[4]["cost_micro_usd"] is None
    assert [path.name for path in path.parent.iterdir()] == [path.name]


def read(path: Path) -> list[dict[str, Any]]:
    """An exported file's rows, with what is JSON in them read."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().split("\n") if line]
    if path.suffix == ".parquet":
        rows = pl.read_parquet(path).to_dicts()
    else:
        with path.open(newline="") as file:
            texts = [{name: text or None for name, text in row.items()} for row in csv.DictReader(file)]
        rows = [
            {
                name: text and (float(text) if name == "seconds" else int(text) if name in audit.NUMBERS else text)
                for name, text in row.items()
            }
            for row in texts
        ]
    return [row | {name: row[name] and json.loads(row[name]) for name in ("request", "answer")} for row in rows]


def test_one_run_can_be_taken_and_a_form_be_named(filled: Path, tmp_path: Path) -> None:
    assert export(filled, tmp_path / "b", run="run-b") == 4
    assert {json.loads(line)["run"] for line in (tmp_path / "b").read_text().split("\n") if line} == {"run-b"}
    assert "wrote 4 entries" in gristmill("export", "--run", "run-b", "--format", "parquet", str(tmp_path / "b.x")).output
    assert pl.read_parquet(tmp_path / "b.x").columns == [*COLUMNS]


def test_a_run_or_a_form_that_is_none_is_told_and_nothing_written(filled: Path, tmp_path: Path) -> None:
    unknown = gristmill("export", "--run", "none", str(tmp_path / "none.jsonl"))
    assert (unknown.exit_code, "no run 'none'" in unknown.output, "run-a, run-b" in unknown.output) == (1, True, True)
    several = gristmill("export", "--run", "run", str(tmp_path / "none.jsonl"))
    assert (several.exit_code, "'run' has several runs" in several.output) == (1, True)
    form = gristmill("export", str(tmp_path / "none.xyz"))
    assert (form.exit_code, "--format" in form.output) == (1, True)
    assert not [*tmp_path.glob("none*")]


def test_an_export_that_fails_leaves_what_was_there(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text("before")

    def fail(part: Path, pages: object) -> int:
        part.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(audit._WRITERS, "jsonl", fail)
    with pytest.raises(StoreError, match="No space left"):
        export(filled, path)
    assert path.read_text() == "before"
    assert not (tmp_path / ".all.jsonl.part").exists()


def test_a_whole_ledger_is_found_whole(filled: Path) -> None:
    assert verify(filled) == Audit(calls=7, entries=9, runs=2, faults=())
    said = gristmill("verify")
    assert (said.exit_code, said.output) == (0, "checked 7 calls, 9 entries and 2 runs' sums: no fault\n")


def test_every_fault_is_found(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "PAGE", 2)
    with open_ledger(filled, read_only=True) as ledger:
        keys = [row[0] for row in ledger._read(lambda: ledger._db.execute("SELECT key FROM entries WHERE id > 1 ORDER BY id"))]
    execute(filled, "UPDATE calls SET request = replace(request, 'user', 'system') WHERE key = ?", keys[0])
    execute(filled, "UPDATE calls SET draw = 9 WHERE key = ?", keys[1])
    execute(filled, "UPDATE calls SET answer = NULL WHERE key = ?", keys[2])
    execute(filled, "UPDATE calls SET answer = '{\"text\": 1}' WHERE key = ?", keys[3])
    execute(filled, "UPDATE calls SET request = '{' WHERE key = ?", keys[4])
    execute(filled, "UPDATE budgets SET micro_usd = micro_usd + 1 WHERE run = 'run-a'")
    said = gristmill("verify")
    assert said.exit_code == 1
    *faults, last = said.output.splitlines()
    assert last == "checked 7 calls, 9 entries and 2 runs' sums: 6 faults"
    for n, what in enumerate(("another's", "another's", "has no answer", "answer can't be read", "question is not whole")):
        assert sum(keys[n] in fault and what in fault for fault in faults) == 1, (what, faults)
    assert sum("run run-a" in fault and "1,500,001" in fault and "1,500,000" in fault for fault in faults) == 1


def test_a_run_without_a_sum_and_a_sum_without_a_run_are_found(filled: Path) -> None:
    execute(filled, "UPDATE budgets SET run = 'run-c' WHERE run = 'run-b'")
    assert len(verify(filled).faults) == 2


def test_an_entry_without_its_call_and_broken_pages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRISTMILL_LEDGER", raising=False)

    async def fill() -> None:
        with open_ledger(tmp_path) as ledger:
            for n in range(200):
                question = Question.of(Call(teacher="t", prompt=f"{n} {'x' * 500}"), ("fake", "m"))
                await ledger.enter(question, Place("r", "s", 1, "t"), reserve=1, budget=None)

    asyncio.run(fill())
    execute(tmp_path, "DELETE FROM calls WHERE key = (SELECT key FROM entries WHERE id = 7)")
    [fault] = verify(tmp_path).faults
    assert "entry 7 is of a call that is not there" in fault

    path = tmp_path / "ledger.db"
    with closing(sqlite3.connect(path)) as db:
        [size] = db.execute("PRAGMA page_size").fetchone()
        page_of = dict(db.execute("SELECT name, rootpage FROM sqlite_master"))
    for name, calls, entries in (("sqlite_autoindex_batches_1", 199, 200), ("sqlite_autoindex_calls_1", 0, 200)):
        with path.open("r+b") as file:
            file.seek(size * (page_of[name] - 1))
            file.write(b"\xff" * size)
        found = verify(tmp_path)
        assert any(fault.startswith("the database is broken:") for fault in found.faults), name
        assert (found.calls, found.entries, found.runs) == (calls, entries, 1), "what can still be checked is"


@given(
    st.builds(
        Call,
        teacher=st.just("t"),
        messages=st.lists(
            st.builds(
                Message, role=st.sampled_from(["system", "user", "assistant"]), content=st.text(st.characters(exclude_categories=["Cs"]))
            )
        ).map(tuple),
        prompt=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
        json_schema=st.none()
        | st.dictionaries(st.text("abc"), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)),
        params=st.builds(
            Params,
            temperature=st.none() | st.floats(0, 2),
            stop=st.lists(st.text("xy")).map(tuple),
            extra=st.dictionaries(st.text("ab"), st.none() | st.lists(st.integers())),
        ),
        draw=st.integers(0, 3),
    )
)
def test_a_stored_question_gives_the_key_of_its_call(call: Call) -> None:
    question = Question.of(call, ("fake", "m"))
    assert key_of("fake", "m", question.draw, question.request) == question.key == call.key("fake", "m")

"""What a run's folder says, on a terminal."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from factory.records import FunnelRow, RunFolder
from factory.show import funnel_table, outcome, pick, released
from factory.store import read_json, write_json
from tests.factory.test_run import Even, Words, turn


def test_a_run_that_was_killed_is_shown_and_its_version_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = turn(tmp_path, Words(), Even())
    status = {key: run.status[key] for key in ("layout", "name", "digest")} | {"status": "running", "seconds": 0.0}  # as a run begins
    write_json(run.path / "run.json", status)
    version = tmp_path / "v1"
    write_json(version / "manifest.json", {"name": "tiny", "version": 1, "micro_usd": 0, "files": {"train.jsonl": {"rows": 6}}})
    Console(width=140).print(outcome(RunFolder(run.path)), released(RunFolder(run.path), version))
    said = capsys.readouterr().out
    assert "running: 6 of ? rows accepted" in said
    assert "released 6 rows as tiny v1" in said
    assert json.loads((run.path / "run.json").read_text()) == read_json(run.path / "run.json") == status


def test_rows_that_were_good_but_too_many_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = turn(tmp_path, Words())
    Console(width=140).print(pick(run, 20, rejected=True, reason="place full", label=None))
    assert capsys.readouterr().out.count("place full") == run.of_fate("surplus").height == 6


def test_the_funnel_says_what_was_not_answered_and_what_the_ledger_did(capsys: pytest.CaptureFixture[str]) -> None:
    row = FunnelRow("02-words", "generator", asked=9, answered=7, unanswered=Counter({"timed out": 2}), made=7, from_ledger=3)
    Console(width=140).print(funnel_table([row]))
    assert "2 timed out, 3 from the ledger" in capsys.readouterr().out

"""What a run's folder says, on a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from factory.records import RunFolder
from factory.show import outcome, released
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

"""What is written is whole or not there, and comes back as it was."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import polars as pl
import pytest

from factory import store
from factory.errors import StoreError
from factory.store import SAMPLES, read_frame, read_json, samples_frame, samples_of, write_frame, write_json
from schemas.sample import Message, Provenance, Sample
from tests.context import chat

ROWS = [
    chat("hi", "hello", parents=("s1",), axes={"tone": "curt"}, teacher="small"),
    Sample(
        text="just text ü\n",
        meta={"n": 1, "deep": {"a": [1]}},
        provenance=Provenance(origin="real", generator="01-seeds", source="f:1"),
        holdout=True,
    ),
    Sample(
        messages=(Message(role="user", content="p"),),
        chosen=(Message(role="assistant", content="good"),),
        rejected=(Message(role="assistant", content="bad"),),
        provenance=Provenance(origin="made", generator="g"),
    ),
]


def test_samples_survive_the_way_to_disk_and_back(tmp_path: Path) -> None:
    write_frame(tmp_path / "s.parquet", samples_frame(ROWS))
    assert samples_of(read_frame(tmp_path / "s.parquet", SAMPLES)) == ROWS
    assert samples_of(samples_frame([])) == []


def test_a_full_disk_is_an_error_that_says_so_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device") as error:
        write_json(path, {"a": 2})
    assert "run the same command" in error.value.next
    with pytest.raises(StoreError, match="No space left"):
        write_frame(tmp_path / "s.parquet", samples_frame(ROWS))
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_disk_that_fills_up_in_the_middle_of_a_table_is_the_same_error(tmp_path: Path) -> None:
    many = samples_frame([chat(f"{n} " * 200) for n in range(500)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(StoreError, match="can't write: File too large"):
            write_frame(tmp_path / "s.parquet", many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_broken_or_of_another_version_are_refused_with_their_name(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(StoreError, match="not whole JSON"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(StoreError, match="can't be read as Parquet"):
        read_frame(tmp_path / "bad.parquet", SAMPLES)
    write_frame(tmp_path / "old.parquet", pl.DataFrame({"id": ["x"]}))
    with pytest.raises(StoreError, match="another version"):
        read_frame(tmp_path / "old.parquet", SAMPLES)
    with pytest.raises(StoreError, match="missing"):
        read_frame(tmp_path / "none.parquet", SAMPLES)

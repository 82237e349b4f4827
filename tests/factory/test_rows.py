from pathlib import Path

import pytest

from factory import rows
from factory.errors import GristmillError


def test_a_file_is_read_once_and_anew_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(rows, "read_rows", lambda path, real=rows.read_rows: (read.append(path), real(path))[1])
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n')
    assert [rows.read_samples(file)["input"].to_list() for _ in range(3)] == [["one"]] * 3
    assert len(read) == 1
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert rows.read_samples(file)["input"].to_list() == ["one", "two"]
    assert len(read) == 2


def test_a_released_version_is_all_of_its_splits(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    for split, text in (("train", "one"), ("test", "two")):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"text": "{text}"}}\n')
    (tmp_path / "validation.jsonl").write_text("")
    assert rows.read_samples(tmp_path)["input"].to_list() == ["one", "two"]


def test_what_is_not_there_or_holds_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="no such file"):
        rows.read_samples(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(GristmillError, match="no row in it can be used"):
        rows.read_samples(tmp_path / "empty.jsonl")

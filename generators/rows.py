"""From files to records, each with its source: JSONL, JSON, CSV, TSV, text, Parquet, `datasets` folders and the hub.

A row that can't be read comes through as `Unreadable` in its place, so that whoever reads can account for it by its line. Bytes
that are not UTF-8 come through as lone surrogates, for the row to answer for.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from factory.errors import GristmillError, MissingExtra

# The keys by which a row tells its shape; see `generators.seeds`.
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
)
LABELS = ("label", "intent", "class", "category")
COLUMNS = {"messages", "conversations", "chosen", "rejected", "text", "system", *LABELS, *(name for pair in PAIRS for name in pair)}

QUOTED = 500  # characters of what could not be read that are kept


@dataclass(frozen=True)
class Unreadable:
    """What stands where a row should be, and why it is none."""

    why: str
    text: str


def read_file(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Yield every record of a file or `datasets` folder with its source, "name:line"; GristmillError where the whole can't be read."""
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            rows: Iterable[tuple[int, Any]] = _saved(path, split)
        elif suffix == ".parquet":
            rows = enumerate(pl.read_parquet(path).iter_rows(named=True), 1)
        elif suffix in _READERS:
            rows = _READERS[suffix](_text(path.read_bytes()))
        else:
            raise GristmillError(
                f"its format can't be told from its name ({suffix or 'no ending'})",
                where=str(path),
                next=f"Known: {', '.join((*_READERS, '.parquet'))}, and folders written by `datasets`.",
            )
    except (OSError, UnicodeError, pl.exceptions.PolarsError) as error:
        raise GristmillError(f"can't be read: {error}", where=str(path), next="Check that the path is right and the file whole.") from error
    return ((f"{path.name}:{number}", row) for number, row in rows)


def _text(data: bytes) -> str:
    """The text of a file without its byte order mark; UTF-16, as Windows programs write it, is read as such."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not str.splitlines: it also cuts at U+2028 and its like, which may stand inside a JSON string.
    return ((number, line) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1) if line.strip())


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for integers of more than 4,300 digits
        return Unreadable(str(error), text)


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Rows of JSON Lines, of an array, or of an object around an array, whatever the file's name says."""
    lines = list(_lines(text))
    a_value_a_line = len(lines) > 1 and not isinstance(_json(lines[0][1]), Unreadable)
    if not a_value_a_line and text.lstrip().startswith("["):
        rows = list(_array(text, text.index("[") + 1))
        if not all(isinstance(row, Unreadable) for _, row in rows):
            return iter(rows)
    if not a_value_a_line and isinstance(whole := _json(text), dict):
        arrays = [key for key, value in whole.items() if isinstance(value, list) and not whole.keys() & COLUMNS]
        start = re.search(re.escape(json.dumps(arrays[0])) + r"\s*:\s*\[", text) if len(arrays) == 1 else None
        return _array(text, start.end()) if start else iter([(lines[0][0], whole)])
    return ((number, _json(line)) for number, line in lines)


def _array(text: str, at: int) -> Iterator[tuple[int, Any]]:
    """The items of the JSON array whose inside begins at `at`; after a broken one it goes on with the next that begins a line."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    number, counted = 1, 0
    while True:
        at = between.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        number, counted = number + text.count("\n", counted, at), at
        if text.startswith("]", at):
            return
        try:
            value, at = decode(text, at)
            yield number, value
        except (ValueError, RecursionError) as error:
            yield number, Unreadable(str(error) if at < len(text) else "the array has no end", text[at : at + QUOTED])
            indent = re.search(r"[ \t]*$", text[text.rfind("\n", 0, at) + 1 : at])
            following = re.compile(rf"\n{indent.group() if indent else ''}[{{\[\"]").search(text, at)
            if following is None:
                return
            at = following.end() - 1


def _table(text: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Rows of CSV (RFC 4180) as objects, with the line that each begins in."""
    if delimiter == "," and "," not in (header := text.partition("\n")[0]) and ";" in header:
        delimiter = ";"  # what a spreadsheet calls CSV where the comma is the decimal sign
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, Unreadable(f"not CSV: {error}", f"from line {number} to line {reader.line_num}")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
        elif len(cells) != len(names):
            yield number, Unreadable(f"{len(cells)} cells under {len(names)} names", delimiter.join(cells))
        else:
            yield number, dict(zip(names, cells, strict=True))


def _saved(path: Path, split: str) -> Iterator[tuple[int, Any]]:
    datasets = _datasets(f"reading the folder {path}")
    try:
        saved = datasets.load_from_disk(str(path))
        return _dataset_rows(saved[split] if isinstance(saved, datasets.DatasetDict) else saved)
    except Exception as error:  # the library has no root of its errors; only its calls stand inside
        raise GristmillError(f"not a folder of `datasets`, or without a part {split!r}: {error}", where=str(path)) from error


def read_hub(name: str, split: str, *, streaming: bool) -> Iterator[tuple[str, Any]]:
    """Rows of "org/name", "org/name:config" or either with "@revision", as the hub serves them."""
    datasets = _datasets(f"reading {name} from the hub")
    place, _, revision = name.partition("@")
    place, _, config = place.partition(":")
    try:
        found = datasets.load_dataset(place, config or None, split=split, revision=revision or None, streaming=streaming)
    except Exception as error:  # as above: its own errors, the hub client's, and its transport's
        raise GristmillError(
            f"can't be read: {error}",
            where=f"{name}, split {split!r}",
            next="Check the name, `split` and the network, or name a file by `path`.",
        ) from error
    return ((f"{name}/{split}:{number}", row) for number, row in _dataset_rows(found))


def _dataset_rows(dataset: Any) -> Iterator[tuple[int, Any]]:
    """Rows of a data set, with the numbers of classes replaced by their names."""
    classes = {name: feature.names for name, feature in (dataset.features or {}).items() if hasattr(feature, "int2str")}
    for number, row in enumerate(dataset, 1):
        yield number, row | {name: names[row[name]] for name, names in classes.items() if row[name] is not None and row[name] >= 0}


def _datasets(feature: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data", feature) from error
    return datasets


_READERS: dict[str, Callable[[str], Iterator[tuple[int, Any]]]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json_rows),
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".txt": _lines,
}

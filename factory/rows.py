"""Anybody's rows as samples: files, `datasets` folders and released versions, read by the stage that reads seeds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import polars as pl

from factory import plugins
from factory.errors import GristmillError
from factory.store import samples_frame
from schemas.manifest import split_files
from schemas.sample import Failure, Sample

MANIFEST = "manifest.json"


def read_samples(path: Path) -> pl.DataFrame:
    """A frame of `SAMPLES` with every usable row at `path`; GristmillError where there is none, or the whole can't be read.

    What was read lately is remembered: several filters, and every round, compare with the same files.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    return _samples(path, tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache(8)
def _samples(path: Path, stamp: tuple[tuple[int, int], ...]) -> pl.DataFrame:
    samples = [row for _, row in read_rows(path) if isinstance(row, Sample)]
    if not samples:
        raise GristmillError("no row in it can be used", where=str(path), next="`gristmill dedup --help` says what a row may look like.")
    return samples_frame(samples)


def read_rows(path: Path) -> Iterator[tuple[Any, Sample | Failure]]:
    """Every row as it stands in the file, and what it is as a sample. A version's are those of all its splits."""
    if not path.exists():
        raise GristmillError("there is no such file or folder", where=str(path))
    for part in _parts(path):
        yield from _seeds().read_raw(part)


def _parts(path: Path) -> list[Path]:
    if path.is_dir() and (path / MANIFEST).is_file():
        return [file for file in split_files(path) if file.stat().st_size]
    return [path]


def _seeds() -> Any:
    """The module of the stage that reads seeds; the engine imports no generator."""
    return import_module(plugins.stage_class("seeds").__module__)

"""A context in which nothing can be asked: what a plan hands to stages, and what filters of anybody's file work in."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from factory.rows import read_samples
from factory.stage import Need, Vectors
from factory.store import QUALITY, SAMPLES
from schemas.call import Answer, Call


class Still:
    """`factory.stage.Context` without answers and vectors; `seeds` are all that is kept. What a stage reports is in `reports`."""

    def __init__(
        self,
        stage: str,
        *,
        seed: int = 0,
        seeds: pl.DataFrame | None = None,
        holdout: pl.DataFrame | None = None,
        round: int = 0,
        needs: Sequence[Need] = (),
        teachers: Sequence[str] = (),
        models: Mapping[str, str] | None = None,
        reference: pl.DataFrame | None = None,
    ) -> None:
        self.stage, self.round, self.needs, self.teachers = stage, round, needs, teachers
        self.models: Mapping[str, str] = models or {}
        self.rng = random.Random(f"{seed}/{stage}/{self.round}")
        self.seeds = self.kept = SAMPLES.to_frame() if seeds is None else seeds
        self.holdout = SAMPLES.to_frame() if holdout is None else holdout
        self.quality = QUALITY.to_frame()
        self.reference = SAMPLES.to_frame() if reference is None else reference
        self.reports: dict[str, Any] = {}

    def ask(self, calls: Iterable[Call]) -> Iterator[Answer]:
        raise RuntimeError(f"stage {self.stage} asked where nobody answers")

    def embed(self, texts: Sequence[str]) -> Vectors:
        raise RuntimeError(f"stage {self.stage} embedded where there is no embedder")

    def read(self, path: Path) -> pl.DataFrame:
        return read_samples(path)

    def report(self, name: str, value: Any) -> None:
        self.reports[name] = value

    def progress(self, done: int, total: int | None = None) -> None:
        pass

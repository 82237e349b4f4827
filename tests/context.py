"""A context for tests of single stages: the real embedder, a seeded random generator, and answers from a function."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from factory.rows import read_samples
from factory.stage import Need, Vectors
from factory.store import QUALITY, SAMPLES, samples_frame
from schemas.call import Answer, Call, Reply
from schemas.sample import Message, Provenance, Sample


def chat(user: str, assistant: str = "", *, origin: str = "made", **provenance: Any) -> Sample:
    """A chat sample of one turn each way; the answer is its label too."""
    messages = [Message(role="user", content=user)] + ([Message(role="assistant", content=assistant)] if assistant else [])
    where = Provenance.model_validate({"origin": origin, "generator": "test", **provenance})
    return Sample(messages=tuple(messages), label=assistant or None, provenance=where)


def frame(*samples: Sample) -> pl.DataFrame:
    return samples_frame(samples)


@cache
def embedder() -> Any:
    from factory.embed import open_embedder
    from schemas.recipe import EmbedderChoice

    return open_embedder(EmbedderChoice())


@dataclass
class FakeContext:
    """Implements `factory.stage.Context`; `answers` gives the text (or an exception's message) for a call."""

    seeds: pl.DataFrame = field(default_factory=SAMPLES.to_frame)
    kept: pl.DataFrame | None = None
    holdout: pl.DataFrame = field(default_factory=SAMPLES.to_frame)
    quality: pl.DataFrame = field(default_factory=QUALITY.to_frame)
    needs: Sequence[Need] = ()
    answers: Callable[[Call], str] | None = None
    stage: str = "01-test"
    round: int = 1
    teachers: Sequence[str] = ("fake",)
    models: Mapping[str, str] = field(default_factory=dict)
    reference: pl.DataFrame = field(default_factory=SAMPLES.to_frame)
    reports: dict[str, Any] = field(default_factory=dict)
    asked: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(0)
        if self.kept is None:
            self.kept = self.seeds

    def ask(self, calls: Iterable[Call]) -> Iterator[Answer]:
        assert self.answers is not None, "this test has no teacher"
        for call in calls:
            self.asked.append(call)
            text = self.answers(call)
            reply = Reply(text=text, finish="stop", tokens_in=10, tokens_out=len(text.split()))
            yield Answer(call=call, key=call.key("fake", "fake"), reply=reply)

    def embed(self, texts: Sequence[str]) -> Vectors:
        return embedder().embed(texts)  # type: ignore[no-any-return]

    def read(self, path: Path) -> pl.DataFrame:
        return read_samples(path)

    def report(self, name: str, value: Any) -> None:
        self.reports[name] = value

    def progress(self, done: int, total: int | None = None) -> None:
        pass

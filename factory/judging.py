"""What a run's judges are worth: their scores, their liking for places and lengths, and how far they agree with people.

People's labels are verdicts like any other: those of reviews (`reviews/NAME/*.jsonl` under the home), and those of a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from factory.agreement import DRIFT, Confusion, Cut, Share, cuts, drifted, kappa, threshold_for
from factory.errors import GristmillError, StoreError
from factory.preference import Preferred, length_controlled
from factory.recipe import Recipe
from factory.records import RunFolder
from factory.stage import Filter
from factory.store import read_json, write_json
from schemas.canonical import content_hash

REVIEWS = "reviews"
CALIBRATION = "calibration.json"  # in the folder of a dataset's reviews: what each filter was worth when it was last looked at
LABELS = pl.Schema({"sample": pl.String(), "by": pl.String(), "keep": pl.Boolean(), "score": pl.Float64()})
FEW = 30  # labels below which every figure is loose
YES, NO = {"true", "yes", "y", "1", "good", "keep", "accept", "ok"}, {"false", "no", "n", "0", "bad", "drop", "reject"}


@dataclass(frozen=True)
class Judged:
    """One filter's verdicts on made samples, and, where people labelled some of them, its worth.

    `told` are its reports of the run's rounds; `by_teacher` counts, mean scores and confusions of each judge; `drift` the chance by which
    alone later labels would agree so little. `looked` is the number of labels that were there when it was last calibrated.
    """

    stage: str
    judged: int
    unjudged: int
    kept: int
    for_people: int
    mean: float | None
    at_least: float | None
    labelled: int
    confusion: Confusion | None
    weighted: tuple[float, float, float] | None
    likely: Cut | None
    sure: Cut | None
    by_teacher: dict[str, dict[str, Any]]
    preferred: Preferred | None
    told: dict[str, Any]
    drift: float | None = None
    looked: int = 0

    @property
    def alarm(self) -> bool:
        """Whether later labels agree less than chance explains."""
        return self.drift is not None and self.drift < DRIFT

    def data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = {name: value for name, value in vars(self).items() if not hasattr(value, "data") and name not in ("weighted", "preferred")}
        parts = {name: part.data() for name in ("confusion", "likely", "sure") if (part := getattr(self, name)) is not None}
        weighted = None if self.weighted is None else {"value": self.weighted[0], "interval": list(self.weighted[1:])}
        preferred = None if self.preferred is None else vars(self.preferred)
        return {**plain, **parts, "weighted_kappa": weighted, "length_controlled": preferred, "alarm": self.alarm}


def judge_report(
    recipe: Recipe,
    run: RunFolder,
    home: Path,
    *,
    files: Sequence[Path] = (),
    stage: str | None = None,
    precision: float = 0.9,
    save: bool = False,
) -> list[Judged]:
    """The worth of each filter of a recipe that asks, ranks or was asked for by name (`stage`: its key or folder).

    `files` hold labels besides those of reviews. `precision` is the share of good rows, by the labels, for which a threshold is sought.
    `save` remembers how far people agree now; from then on labels of other rows are held against it. GristmillError: no such filter; a
    file that can't be read, or labels no row of the run.
    """
    labels = read_labels(recipe, run, home, files)
    lines = [line for line in recipe.stages if isinstance(line.stage, Filter)]
    if stage is not None and not any(stage in (line.folder, line.stage.key) for line in lines):
        raise GristmillError(f"no filter of the recipe is called {stage!r}", next=f"Filters: {', '.join(line.folder for line in lines)}.")
    place = home / REVIEWS / recipe.name / CALIBRATION
    known = read_json(place) if place.exists() else {}
    found = []
    for line in lines:
        assert isinstance(line.stage, Filter)
        # One of the pool asks for the names of clusters: it judges no row.
        judges = line.stage.ranks or (type(line.stage).questions is not Filter.questions and line.stage.scope != "pool")
        if stage in (line.folder, line.stage.key) if stage else judges:
            files_of = {field: of for field, of in recipe.hashes.items() if field.startswith(f"{line.folder}.")}
            identity = content_hash("j1", [line.stage.key, line.stage.model_dump(mode="json"), sorted(files_of.values())])
            at_least = getattr(line.stage, "at_least", None)
            cut = float(at_least) if isinstance(at_least, int | float) else None
            judged, with_labels = measured(run, line.folder, labels, at_least=cut, precision=precision, known=known.get(identity))
            found.append(judged)
            if save and judged.confusion is not None:
                agreed = judged.confusion.agreement
                known[identity] = {
                    "stage": line.folder,
                    "at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "hits": agreed.hits,
                    "of": agreed.of,
                    "samples": sorted(with_labels["sample"]),
                }
    if save and known:
        write_json(place, known)
    return found


def read_labels(recipe: Recipe, run: RunFolder, home: Path, files: Sequence[Path] = ()) -> pl.DataFrame:
    """People's verdicts on samples of a run, a row a sample: `LABELS`. Where several people labelled one, the majority; a tie is none.

    GristmillError where a file can't be read, has no column for the opinion, or names no row of the run.
    """
    frames = [LABELS.to_frame()]
    reviews = sorted((home / REVIEWS / recipe.name).glob("*.jsonl"))
    for path in (*reviews, *files):
        labels = _labels_of(path, run)
        if path in files and labels.join(run.samples, left_on="sample", right_on="id", how="semi").is_empty():
            raise GristmillError(
                "not one of these labels is of a row of this run",
                where=str(path),
                next="A label names a row by `sample` (an id, as `gristmill show` prints it, or its start), or by `input` and `output`.",
            )
        frames.append(labels)
    last = pl.concat(frames).group_by("sample", "by", maintain_order=True).last()
    votes = last.group_by("sample", maintain_order=True).agg(
        by=pl.col("by").str.join(", "), share=pl.col("keep").cast(pl.Float64).mean(), score=pl.col("score").mean()
    )
    return votes.filter(pl.col("share").is_null() | (pl.col("share") != 0.5)).select(
        "sample", "by", keep=pl.col("share") > 0.5, score="score"
    )


def _labels_of(path: Path, run: RunFolder) -> pl.DataFrame:
    rows = list(_rows_of(path))
    ids = run.samples["id"].sort()
    texts: dict[tuple[str, str | None], str | None] = {}
    for id_, text, answer in run.samples.select("id", "input", "output").iter_rows():
        texts[text, answer] = id_
        texts[text, None] = None if (text, None) in texts else id_  # of several answers to one question nobody knows which is meant
    read = []
    for number, row in rows:
        opinion, score = row.get("keep"), row.get("score")
        if opinion in (None, "") and score in (None, ""):
            raise GristmillError(
                "this row has no opinion",
                where=f"{path}:{number}",
                next="A label has `keep` (true or false), or `score` on the judge's scale.",
            )
        keep = None if opinion in (None, "") else _yes(opinion, f"{path}:{number}")
        try:
            points = None if score in (None, "") else float(score)
        except (TypeError, ValueError) as error:
            raise GristmillError(f"{score!r} is no score", where=f"{path}:{number}") from error
        named = row.get("sample") or row.get("id")
        sample = (_whole(ids, str(named)) if named else None) or texts.get((row.get("input") or "", row.get("output")))
        if sample is not None:
            read.append((sample, str(row.get("by") or f"human:{path.stem}"), keep, points))
    return pl.DataFrame(read, schema=LABELS, orient="row")


def _whole(ids: pl.Series, start: str) -> str | None:
    """The one id that begins so; None: it is of another run, or the beginning of several."""
    at = int(ids.search_sorted(start))
    found = [id_ for id_ in ids[at : at + 2] if id_.startswith(start)]
    return found[0] if len(found) == 1 or start in found else None


def _yes(opinion: Any, where: str) -> bool:
    word = str(opinion).strip().lower()
    if word not in YES | NO:
        raise GristmillError(
            f"{opinion!r} is neither yes nor no", where=where, next=f"Write one of {', '.join(sorted(YES))}; or {', '.join(sorted(NO))}."
        )
    return word in YES


def _rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file of labels, with their line numbers; CSV by its ending, else JSON lines."""
    import csv

    try:
        if path.suffix.lower() in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                yield from ((reader.line_num, row) for row in reader)
            return
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a label is an object")
                yield number, row
    except OSError as error:
        raise StoreError(f"can't be read: {error.strerror}", where=str(path)) from error
    except (ValueError, csv.Error) as error:
        raise GristmillError(f"this file holds no labels that can be read: {error}", where=str(path), next="JSON lines, or CSV.") from error


def measured(
    run: RunFolder,
    folder: str,
    labels: pl.DataFrame | None = None,
    *,
    at_least: float | None = None,
    precision: float = 0.9,
    known: Mapping[str, Any] | None = None,
) -> tuple[Judged, pl.DataFrame]:
    """What the verdicts of one filter say, against `labels` (`LABELS`) where there are any; and the rows that it and people judged.

    at_least: the filter's threshold, by which points become yes or no. known: what was remembered of its calibration.
    """
    made = run.samples.filter(pl.col("origin") == "made").select(sample="id")
    verdicts = (
        run.verdicts.filter(pl.col("by") == folder).join(made, on="sample", how="semi").group_by("sample", maintain_order=True).last()
    )
    verdicts = verdicts.with_columns(
        teacher=pl.col("detail").str.json_path_match("$.teacher"), people=pl.col("detail").str.json_path_match("$.people")
    )
    scored = verdicts.filter(pl.col("score").is_not_null())
    both = scored.drop("by").join(
        (LABELS.to_frame() if labels is None else labels).rename({"keep": "good", "score": "points"}), on="sample"
    )
    rising, limit = _rising(scored), _limit(scored, at_least)
    if limit is not None:
        both = both.with_columns(good=pl.coalesce("good", pl.col("points") >= limit if rising else pl.col("points") < limit))
    both = both.filter(pl.col("good").is_not_null())
    confusion = Confusion.of(both["keep"].to_numpy(), both["good"].to_numpy()) if both.height else None
    found = cuts(both["score"].to_numpy(), both["good"].to_numpy(), rising=rising) if both.height else []
    by_teacher = {}
    for (name,), rows in sorted(_by_judge(scored, limit).group_by("teacher")):
        with_labels = rows.join(both.select("sample", "good"), on="sample")
        agreed = Confusion.of(with_labels["keep"].to_numpy(), with_labels["good"].to_numpy()).data() if with_labels.height else None
        by_teacher[str(name)] = {"rows": rows.height, "kept": int(rows["keep"].sum()), "mean": rows["score"].mean(), "labels": agreed}
    drift = None
    if known is not None:
        new = both.filter(~pl.col("sample").is_in(known["samples"]))
        later = Share(int((new["keep"] == new["good"]).sum()), new.height)
        drift = drifted(Share(known["hits"], known["of"]), later) if new.height else None
    mean = scored["score"].mean()
    return Judged(
        stage=folder,
        judged=verdicts.height,
        unjudged=verdicts.filter(pl.col("score").is_null() & pl.col("reason").is_not_null()).height,
        kept=verdicts.filter("keep").height,
        for_people=verdicts.filter(pl.col("people").is_not_null()).height,
        mean=mean if isinstance(mean, float) else None,
        at_least=limit,
        labelled=both.height,
        confusion=confusion,
        weighted=_weighted(both),
        likely=threshold_for(precision, found),
        sure=threshold_for(precision, found, sure=True),
        by_teacher=by_teacher,
        preferred=_preferred(scored),
        told=_told(run, folder) | _places(scored),
        drift=drift,
        looked=len(known["samples"]) if known else 0,
    ), both


def _rising(scored: pl.DataFrame) -> bool:
    """Whether a higher score is better; of a likeness to what is there already, a lower one is."""
    kept, out = (scored.filter(pl.col("keep") == side)["score"].mean() for side in (True, False))
    return not (isinstance(kept, float) and isinstance(out, float) and kept < out)


def _limit(scored: pl.DataFrame, at_least: float | None) -> float | None:
    """The threshold of a filter: of its settings, or as its verdicts tell it, or the worst score that it kept."""
    if at_least is not None:
        return at_least
    told = scored["detail"].str.json_path_match("$.limit").cast(pl.Float64, strict=False).drop_nulls()
    kept = scored.filter("keep")["score"]
    found = told[0] if len(told) else (kept.min() if _rising(scored) else None)
    return float(found) if isinstance(found, int | float) else None


def _by_judge(scored: pl.DataFrame, limit: float | None) -> pl.DataFrame:
    """`sample`, `teacher`, `score` and `keep`: each verdict by its judge, and of a panel the vote of each member."""
    alone = scored.filter(pl.col("teacher").is_not_null()).select("sample", "teacher", "score", "keep")
    votes = [
        (sample, vote["teacher"], float(vote["score"]), limit is None or vote["score"] >= limit)
        for sample, detail in scored.filter(pl.col("detail").str.contains('"votes": [', literal=True))
        .select("sample", "detail")
        .iter_rows()
        for vote in json.loads(detail)["votes"]
        if isinstance(vote.get("score"), int | float)
    ]
    return pl.concat([alone, pl.DataFrame(votes, schema=alone.schema, orient="row")])


def _places(scored: pl.DataFrame) -> dict[str, float]:
    """Of pairs that were judged in both orders, over all rounds: how often the order decided, and how often the first was preferred."""
    said = scored["detail"].str.json_path_match("$.better")
    chosen = [json.loads(both) for both in said.drop_nulls() if both.startswith("[")]
    choices = [one for both in chosen for one in both if one in ("A", "B")]
    if not choices:
        return {}
    decided = sum(both[0] == both[1] != "tie" for both in chosen)
    return {"order decides": round(decided / len(chosen), 4), "first preferred": round(choices.count("A") / len(choices), 4)}


def _weighted(both: pl.DataFrame) -> tuple[float, float, float] | None:
    """Weighted kappa of the rows to which both gave whole points."""
    pairs = both.select("score", "points").drop_nulls()
    pairs = pairs.filter(pl.all_horizontal(pl.all() == pl.all().round()))
    if pairs.is_empty():
        return None
    low = int(min(pairs["score"].min(), pairs["points"].min()))  # type: ignore[type-var, arg-type]
    table = np.zeros((12, 12), np.int64)
    for one, other in pairs.iter_rows():
        if max(one, other) - low >= len(table):
            return None
        table[int(one) - low, int(other) - low] += 1
    used = int(np.flatnonzero(table.sum(0) + table.sum(1)).max()) + 1
    return kappa(table[:used, :used], weighted=True)


def _preferred(scored: pl.DataFrame) -> Preferred | None:
    """Of verdicts on preferences: how often the chosen answer wins, and would at equal length."""
    with_length = scored.filter(pl.col("detail").str.contains('"length": [', literal=True))
    if with_length.is_empty():
        return None
    lengths = [json.loads(detail)["length"] for detail in with_length["detail"]]
    return length_controlled([(score + 1) / 2 for score in with_length["score"]], [one - other for one, other in lengths])


def _told(run: RunFolder, folder: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for stage in run.stages:
        if stage["stage"] == folder:
            told |= stage.get("reports", {})
    return told


def table(found: Sequence[Judged], precision: float) -> RenderableType:
    """What `gristmill judge-report` prints."""
    parts: list[RenderableType] = []
    for judged in found:
        parts += [*_lines(judged, precision), Text()]
    if not found:
        parts.append(Text("no filter of this recipe asks a model or ranks; name one with --stage"))
    return Group(*parts)


def _lines(judged: Judged, precision: float) -> Iterator[RenderableType]:
    mean = "" if judged.mean is None else f", mean score {judged.mean:.2f}"
    yield Text.assemble((judged.stage, "bold"), f": {judged.judged:,} judged, {judged.kept:,} kept{mean}")
    if judged.unjudged:
        yield Text(f"  {judged.unjudged:,} could not be judged", "yellow")
    if judged.for_people:
        yield Text(f"  {judged.for_people:,} are for people to see first")
    for name, told in judged.told.items():
        if isinstance(told, int | float | str):
            yield Text(f"  {name}: {told}")
    if judged.preferred and judged.preferred.wins is not None:
        at = judged.preferred
        equal = "" if at.controlled is None else f"; at equal length {at.controlled:.0%} ({at.low:.0%} to {at.high:.0%})"
        yield Text(f"  the chosen answer wins {at.wins:.0%} of {at.rows:,}{equal}")
    if judged.confusion is None:
        yield Text("  no labels by people: review some rows, or give a file with --labels")
        return
    yield from _worth(judged, judged.confusion, precision)


def _worth(judged: Judged, confusion: Confusion, precision: float) -> Iterator[RenderableType]:
    few = f", so these figures are loose: label {FEW} to 50" if judged.labelled < FEW else ""
    yield Text(f"  {judged.labelled} rows that it scored have people's labels{few}")
    counts = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2))
    for name in ("", "people keep", "people drop"):
        counts.add_column(name, justify="right" if name else "left")
    counts.add_row("  it keeps", str(confusion.kept_good), str(confusion.kept_bad))
    counts.add_row("  it drops", str(confusion.dropped_good), str(confusion.dropped_bad))
    yield counts
    named = {"agreement": confusion.agreement, "precision": confusion.precision, "recall": confusion.recall}
    yield Text("  " + " · ".join(f"{name} {_share(share)}" for name, share in named.items() if share.of))
    for name, found in (("Cohen's kappa", confusion.kappa), ("weighted kappa of the points", judged.weighted)):
        if found is not None:
            yield Text(f"  {name} {found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})")
    if confusion.kappa is None:
        yield Text("  Cohen's kappa is not defined: it, or people, gave the same answer to every labelled row")
    if judged.likely is None:
        yield Text(f"  no threshold has a precision of {precision:.0%} by these labels", "yellow")
    else:
        sure = judged.sure
        firm = "no threshold has it for certain" if sure is None else f"for certain from {sure.threshold:g} on"
        at = judged.likely
        good = f"keeping {_share(at.recall)} of the good"
        yield Text(f"  precision of {precision:.0%}: from {at.threshold:g} on {_share(at.precision)}, {good}; {firm}")
    if len(judged.by_teacher) > 1:
        for name, told in judged.by_teacher.items():
            agreed = told["labels"]
            with_people = f", agrees with people on {agreed['agreement']['hits']} of {agreed['agreement']['of']}" if agreed else ""
            yield Text(f"  {name}: {told['rows']:,} judged, mean score {told['mean']:.2f}{with_people}")
    if judged.drift is not None:
        what = "agree less than before" if judged.alarm else "agree as before"
        yield Text(
            f"  labels since the calibration of {judged.looked} rows {what} (p = {judged.drift:.2g})", "bold red" if judged.alarm else ""
        )


def _share(share: Share) -> str:
    low, high = share.interval
    return f"{share.value or 0:.0%} ({low:.0%} to {high:.0%})"

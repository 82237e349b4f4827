"""What a report says of the loop: whether its rounds went where rows were missing, what that gave for its price, and where it led.

Every figure is read from the run's folder, and what that does not hold is left out. Of a reference only counts and figures reach the
page, never a text: its rows are real inputs that nobody has agreed to show.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.aim import told
from factory.cells import CLUSTER, REST, Cell, Grid, cells_of
from factory.choose import QUALITY, at_random, represented, select, worth
from factory.diversity import hash_order
from factory.loop import aims_of, tried
from factory.places import history
from factory.records import TARGET, RunFolder
from factory.stage import Vectors
from factory.twosample import auc, mmd

Embed = Callable[[Sequence[str]], Vectors]

POOL = 20_000  # good rows among which a choice is weighed; of more, so many by a hash: all pairs are compared, 15 s for as many
CHANCES = 3  # random choices that the target's is held against
FEWEST = 20  # accepted rows, or real ones to be compared with, below which figures hang on single rows
LAST = 100  # rows whose marginal worth is told
COMPARED = 2_000  # real rows of which it is told how many are covered, by a hash
CELLS, CLUSTERS = 60, 40  # that are shown, the thinnest and the largest first
BEST, WORST = 10, 8  # places whose yield is shown
SHOWN = 2  # central samples of a cluster, and as many of its edge
POINTS = 100  # of a drawn curve
WIDTH, HEIGHT = 600, 150  # of its picture
FIGURE_OF = {  # which figure of a round an alarm is about
    "real_at_least": "real_share",
    "depth_at_most": "depth",
    "teacher_at_most": "teacher_share",
    "diversity_drop_at_most": "novelsum",
    "tail_at_least": "tail",
}


def loop_of(run: RunFolder, samples: pl.DataFrame, embed: Embed, reference: pl.DataFrame | None = None) -> dict[str, Any]:
    """All that the section shows, each part empty or None where a run has nothing to say; empty where it has nothing at all.

    samples: those of the run with `fate` and `shown`, the text that stands for each. reference: the real inputs that the target
    follows, as `SAMPLES`. Parts: `alarms`, `cells`, `rounds`, `yields`, `clusters`, `choice`, `towards`.
    """
    rounds = [stage["round"] for stage in run.stages if stage["stage"] == TARGET]
    if not rounds:
        return {}
    last = max(rounds)
    grid = grid_of_status(run.status)
    against = _against(samples, embed, reference)
    found = {
        "alarms": _alarms(run),
        "cells": _cells(run),
        "rounds": _rounds(run, samples, embed, against),
        "yields": _yields(run, samples, grid, last),
        "clusters": _clusters(run, samples),
        "choice": _choice(run, samples, grid, embed, last),
        "towards": _towards(run, samples, grid, embed, last, against),
    }
    return found if any(found.values()) else {}


def grid_of_status(status: Mapping[str, Any]) -> Grid:
    """The cells of a target as the run's own explanation has them; no dimensions where it explains nothing."""
    quotas: dict[str, dict[str, int]] = {}
    for cell in status.get("cells") or []:
        if cell["dimension"]:
            quotas.setdefault(cell["dimension"], {})[cell["value"] or REST] = cell["wanted"]
    return Grid(status.get("wanted") or 0, quotas)


# -- cells and rounds ------------------------------------------------------------------------------------------------------


def _alarms(run: RunFolder) -> list[dict[str, Any]]:
    """What the watch said, the latest of each threshold and teacher, with the rounds in which it did; what stops a run first."""
    said: dict[tuple[str, str | None], dict[str, Any]] = {}
    for alarm in run.status.get("alarms") or []:
        key = alarm["name"], alarm.get("teacher")
        rounds = [*said.get(key, {}).get("rounds", []), alarm["round"]]
        said[key] = {"sentence": alarm["sentence"], "stops": alarm["stops"], "rounds": rounds}
    return sorted(said.values(), key=lambda alarm: not alarm["stops"])


def _cells(run: RunFolder) -> dict[str, Any]:
    """What the target asked for, value by value of each dimension, and what was tried for it; the shortest of a dimension first."""
    cells = run.status.get("cells") or []
    if not cells:
        return {}
    rank = {name: place for place, name in enumerate(dict.fromkeys(cell["dimension"] for cell in cells))}
    rows = [
        cell | {"said": cell["name"] or "rows", "lost": list(cell["rejected"].items()), "missing": cell["wanted"] - cell["have"]}
        for cell in cells
    ]
    rows.sort(key=lambda row: (rank[row["dimension"]], -row["missing"], row["said"]))
    shown = rows if len(rows) <= CELLS else sorted(rows, key=lambda row: -row["missing"])[:CELLS]
    return {
        "rows": shown,
        "more": len(rows) - len(shown),
        "priced": any(row["micro_usd"] != 0 for row in rows),
        "short": any(row["to_get"] for row in rows),
        "several": len(rank) > 1,
    }


def _rounds(run: RunFolder, samples: pl.DataFrame, embed: Embed, against: Mapping[str, Any]) -> dict[str, Any]:
    """Round by round: rows made, good, taken and missing, and the figures of the watch; nothing where there was one and no figure."""
    counts = (
        samples.filter(pl.col("origin") == "made")
        .group_by("round")
        .agg(made=pl.len(), good=pl.col("fate").is_in(["accepted", "surplus"]).sum())
    )
    of = {row["round"]: row for row in counts.to_dicts()}
    raised = {(alarm["round"], FIGURE_OF.get(alarm["name"])) for alarm in run.status.get("alarms") or []}
    covered = _covered(run, samples, embed, against)
    rows: list[dict[str, Any]] = []
    for stage in (stage for stage in run.stages if stage["stage"] == TARGET):
        number, report = stage["round"], stage["reports"]
        watch = report.get("watch", {})
        row = {"round": number, "made": 0, "good": 0} | of.get(number, {})
        row |= {"accepted": report.get("accepted"), "missing": report.get("missing"), "covered": covered.get(number)}
        row |= {"novelsum": watch.get("newest", {}).get("novelsum"), "before": watch.get("first", {}).get("novelsum")}
        row |= {name: watch.get(name) for name in ("tail", "teacher", "teacher_share", "real_share")}
        row |= {"depth": watch.get("depth_max"), "alarms": {figure for at, figure in raised if at == number}}
        rows.append(row)
    figures = {name for row in rows for name, value in row.items() if value is not None}
    watched = figures & {"accepted", "missing", *FIGURE_OF.values()}
    if len(rows) < 2 and not watched:
        return {}
    return {
        "rows": rows,
        "has": figures,
        "longest": max([1, *(row["made"] for row in rows)]),
        "before": covered.get(0),
        "against": against.get("name"),
    }


def _against(samples: pl.DataFrame, embed: Embed, reference: pl.DataFrame | None) -> dict[str, Any]:
    """The real rows that a dataset is compared with: the reference, or those that no teacher saw; empty where they are too few."""
    if reference is not None and reference.height:
        name, texts = "the reference", reference.sort("id")["input"]
    else:
        name, texts = "the real rows set aside for test", samples.filter(pl.col("fate") == "holdout").sort("id")["shown"]
    return {"name": name, "texts": texts, "vectors": embed(texts.to_list())} if len(texts) >= FEWEST else {}


def _covered(run: RunFolder, samples: pl.DataFrame, embed: Embed, against: Mapping[str, Any]) -> dict[int, float]:
    """How near the real rows compared with have a row, in the mean (`represented`): of the seeds (0), of what each round had taken too."""
    if not against:
        return {}
    compared = against["vectors"][hash_order(against["texts"].to_list())[:COMPARED]]
    seeds = samples.filter(pl.col("fate") == "real")["shown"].to_list()
    shown = samples.select(sample="id", shown="shown")
    taken = run.verdicts.filter((pl.col("by") == TARGET) & pl.col("keep")).join(shown, on="sample", maintain_order="left")
    texts = {0: seeds} | {number: [*seeds, *rows["shown"]] for (number,), rows in taken.group_by("round", maintain_order=True)}
    nothing = np.empty(0, np.intp)
    return {int(number): float(represented(nothing, compared, embed(rows))[0]) for number, rows in texts.items() if rows}


# -- yields ----------------------------------------------------------------------------------------------------------------


def _yields(run: RunFolder, samples: pl.DataFrame, grid: Grid, last: int) -> dict[str, Any]:
    """Good rows for the money (or a call) by teacher, template and place, the best first; nothing where no call is known.

    Of a place only rows count that are of it; of teachers and templates all that every filter kept.
    """
    evidence = tried(run, last + 1, grid)
    if evidence.is_empty():
        return {}
    names = run.cluster_names(last)
    templates = dict(samples.drop_nulls("template").select("generator", "template").unique().sort("template").iter_rows())
    lines = {line: f"{line} ({templates[line]})" if line in templates else line for line in evidence["line"].unique()}
    places = {aim: _place(aim, names) for aim in evidence["aim"].unique()}
    priced = bool(evidence["micro_usd"].fill_null(1).sum())
    anywhere = tried(run, last + 1, Grid(0))
    groups: list[tuple[str, pl.DataFrame, str, Mapping[str, str]]] = [
        ("Teacher", anywhere, "teacher", {}),
        ("Template", anywhere, "line", lines),
        ("Place", evidence, "aim", places),
    ]
    return {"priced": priced, "tables": [_table(by, frame, column, words, priced) for by, frame, column, words in groups]}


def _place(aim: str, names: Mapping[str, str]) -> str:
    values = json.loads(aim)
    if CLUSTER in values:
        values[CLUSTER] = names.get(values[CLUSTER]) or values[CLUSTER]
    return told(json.dumps(values))


def _table(by: str, evidence: pl.DataFrame, column: str, words: Mapping[str, str], priced: bool) -> dict[str, Any]:
    known = pl.col("micro_usd").is_not_null().all()
    name = pl.col(column).replace(words) if words else pl.col(column)
    sums = evidence.group_by(name=name).agg(pl.col("calls", "made", "good").sum(), micro_usd=pl.when(known).then(pl.col("micro_usd").sum()))
    a_call = pl.col("good") / pl.col("calls")
    # Free rows are infinitely many for the money, an unknown price comes last.
    a_dollar = pl.when(pl.col("micro_usd") > 0).then(pl.col("good") / pl.col("micro_usd") * 1e6)
    order = pl.when(pl.col("micro_usd") == 0).then(pl.when(pl.col("good") > 0).then(pl.lit(np.inf)).otherwise(0.0)).otherwise(a_dollar)
    rows = sums.with_columns(a_call=a_call, a_dollar=a_dollar, order=order if priced else a_call)
    told_rows = rows.sort("order", "a_call", "calls", "name", descending=[True, True, False, False], nulls_last=True).to_dicts()
    figure = "a_dollar" if priced else "a_call"
    cut = len(told_rows) - BEST - WORST if len(told_rows) > BEST + WORST + 1 else 0
    return {
        "by": by,
        "rows": told_rows[:BEST] + told_rows[-WORST:] if cut else told_rows,
        "cut": cut,
        "best": BEST,
        "longest": max([row[figure] for row in told_rows if row[figure]], default=1.0),
        "figure": figure,
    }


# -- clusters --------------------------------------------------------------------------------------------------------------


def _clusters(run: RunFolder, samples: pl.DataFrame) -> dict[str, Any]:
    """Every place that coverage ever found: how it grew, what is in its middle and at its edge, the largest first.

    Nothing where there was one round and coverage told no more than numbers.
    """
    places = run.places
    if places.filter(pl.col("place") >= 0).is_empty():
        return {}
    rounds = places["round"].unique().sort().to_list()
    last = places.filter((pl.col("round") == rounds[-1]) & (pl.col("place") >= 0))
    place_of = dict(last.select("cluster", "place").unique().iter_rows())
    reports = [stage["reports"].get("clusters", []) for stage in run.stages if stage["round"] == rounds[-1]]
    facts = {place_of[entry["cluster"]]: entry for report in reports for entry in report if entry["cluster"] in place_of}
    if len(rounds) < 2 and not facts:
        return {}
    entries = history(places, samples.select("id", "origin"))
    names = dict(entries.select("place", "name").iter_rows())  # the last of each
    text = dict(samples.select("id", "shown").iter_rows())
    rows = []
    for (place,), of_place in entries.group_by("place", maintain_order=True):
        sizes = {row["round"]: row for row in of_place.to_dicts()}
        fact = facts.get(int(str(place)), {})
        central = [text[sample] for sample in fact.get("central", [])[:SHOWN] if sample in text]
        edge = [sample for sample in fact.get("edge", []) if sample in text and sample not in fact.get("central", [])[:SHOWN]]
        now = sizes.get(rounds[-1], {"size": 0, "real": 0, "made": 0})
        rows.append(
            {
                "name": names[place] or f"cluster {place}",
                **{key: now[key] for key in ("size", "real", "made")},
                "growth": [(number, sizes.get(number, {}).get("real", 0), sizes.get(number, {}).get("made", 0)) for number in rounds],
                "events": [event for row in of_place.to_dicts() if (event := _event(row, rounds, names))],
                "distance": fact.get("distance_to_seeds"),
                "thin": fact.get("thin", False),
                "central": central,
                "edge": [text[sample] for sample in edge[:SHOWN]],
            }
        )
    rows.sort(key=lambda row: (-row["size"], row["name"]))
    tallest = max(real + made for row in rows for _, real, made in row["growth"])
    outside = places.filter((pl.col("round") == rounds[-1]) & (pl.col("place") < 0)).height
    return {"rows": rows[:CLUSTERS], "more": len(rows) - CLUSTERS, "tallest": tallest, "rounds": rounds, "outside": outside}


def _event(row: Mapping[str, Any], rounds: Sequence[int], names: Mapping[int, str]) -> str | None:
    """What became of a place in a round, in words; None where that is nothing to tell."""
    number, event = row["round"], row["event"]
    other = names.get(row["other"]) or f"cluster {row['other']}"
    words = {
        "new": f"new in round {number}" if number > rounds[0] else None,
        "split": f"split from “{other}” in round {number}",
        "back": f"back in round {number}",
        "merged": f"merged into “{other}” in round {number}",
        "gone": f"gone in round {number}",
    }
    if event in words:
        return words[event]
    return {"grown": "still growing", "shrunk": "smaller than before", "same": "no new rows"}[event] if number == rounds[-1] else None


# -- the choice ------------------------------------------------------------------------------------------------------------


def _choice(run: RunFolder, samples: pl.DataFrame, grid: Grid, embed: Embed, last: int) -> dict[str, Any]:
    """What the choice is worth beside random ones of as many rows of each place, and what its last rows add.

    The order in which the target took rows is on no disk; here it is by what each adds to those before.
    """
    pool = samples.filter(pl.col("fate").is_in(["accepted", "surplus"])).sort("id")
    whole = pool.height
    if whole > POOL:
        pool = pool[hash_order(pool["id"].to_list())[:POOL]].sort("id")
    taken = (pool["fate"] == "accepted").to_numpy()
    if taken.sum() < FEWEST:
        return {}
    said = run.verdicts.filter(pl.col("by") == TARGET).unique("sample", keep="last").select(id="sample", quality="score")
    scores = pool.select("id").join(said, on="id", how="left", maintain_order="left")["quality"]
    quality = scores.fill_null(0.5).cast(pl.Float64).to_numpy()
    vectors = embed(pool["shown"].to_list())
    real = samples.filter(pl.col("fate") == "real")["shown"].to_list()
    held = embed(real) if real else vectors[:0]
    chosen = select([(np.flatnonzero(taken), int(taken.sum()))], quality, vectors, held)
    curve = represented(chosen, vectors, held)
    k = len(chosen)
    few = min(LAST, k // 2)
    places = _places_of(pool, grid, run.homes(last))
    numbers = [(rows, int(taken[rows].sum())) for rows in places]
    others = [at_random(numbers, pool["id"].to_list(), seed) for seed in range(CHANCES)]
    choosing = any(len(rows) > n for rows, n in numbers)
    chance = np.mean([represented(rows, vectors, held) for rows in others], axis=0) if choosing else None
    return {
        "pool": whole,
        "looked_at": pool.height,
        "chosen": k,
        "rows": _against_chance(curve, chance, quality, chosen, others) if chance is not None else [],
        "chances": CHANCES,
        "few": few,
        "start": float(curve[0]),
        "end": float(curve[-1]),
        "first_adds": float(curve[few] - curve[0]),
        "last_adds": float(curve[-1] - curve[-1 - few]),
        "last_micro_usd": _paid(run, last, samples, pool["id"].gather(chosen[-few:])),
        "curves": _curves(curve, chance),
        "picture": (WIDTH, HEIGHT),
    }


def _places_of(pool: pl.DataFrame, grid: Grid, homes: Mapping[str, str]) -> list[NDArray[np.intp]]:
    """The rows of each cell; rows that the target took although they are of none (its cells were others then) have one of their own."""
    rows: dict[Cell, list[int]] = {}
    for row, cell in enumerate(cells_of(pool, grid, homes)):
        if cell is not None or pool["fate"][row] == "accepted":
            rows.setdefault(cell or (), []).append(row)
    return [np.array(rows[cell], np.intp) for cell in sorted(rows)]


def _against_chance(
    curve: NDArray[np.float64],
    chance: NDArray[np.float64],
    quality: NDArray[np.float64],
    chosen: NDArray[np.intp],
    others: Sequence[NDArray[np.intp]],
) -> list[tuple[str, str, float, float]]:
    """A figure, what it says, its value for the choice, and its mean for the random ones."""
    good, usual = float(quality[chosen].mean()), float(np.mean([quality[rows].mean() for rows in others]))
    found = [("Represented", "mean cosine of a good row to the nearest that was taken or is real", float(curve[-1]), float(chance[-1]))]
    if np.ptp(quality):  # else no filter ranks
        found.append(("Quality", "mean rank by the filters that rank, 0 to 1", good, usual))
        ours, theirs = worth(np.array([curve[-1], chance[-1]]), np.array([good, usual])).tolist()
        found.append(("Worth", f"what the choice makes large: represented, and {QUALITY:g} of quality", ours, theirs))
    return found


def _paid(run: RunFolder, last: int, samples: pl.DataFrame, ids: pl.Series) -> float | None:
    """What asking for these rows cost at the price of good rows where they were asked for, the rejected beside them included.

    A price is that of all good rows of the same template, teacher and place. None: it is not known.
    """
    arm = ["line", "teacher", "aim"]
    calls = aims_of(run, last + 1, Grid(0))
    good = samples.filter(pl.col("fate").is_in(["accepted", "surplus"])).select("id", "call").join(calls, on="call")
    spent = calls.group_by(arm).agg(known=pl.col("micro_usd").is_not_null().all(), micro_usd=pl.col("micro_usd").sum())
    each = good.group_by(arm).agg(n=pl.len()).join(spent, on=arm, nulls_equal=True)
    mine = good.filter(pl.col("id").is_in(ids.implode())).join(each, on=arm, nulls_equal=True).sort("id")
    if mine.height < len(ids) or not mine["known"].all():
        return None
    return float(mine.select((pl.col("micro_usd_right") / pl.col("n")).sum()).item())


def _curves(curve: NDArray[np.float64], chance: NDArray[np.float64] | None) -> list[tuple[str, str]]:
    """Curves as points of a picture: `chosen`, and `chance` where there is one; both from left to right, higher is better."""
    low, high = float(curve[0]), max(float(curve[-1]), 1e-9 + float(curve[0]))
    rows = np.unique(np.linspace(0, len(curve) - 1, min(POINTS, len(curve))).astype(int))
    return [
        (
            name,
            " ".join(
                f"{WIDTH * row / (len(curve) - 1):.1f},{HEIGHT * (1 - (line[row] - low) / (high - low)):.1f}" for row in rows.tolist()
            ),
        )
        for name, line in (("chance", chance), ("chosen", curve))
        if line is not None
    ]


# -- towards what is real --------------------------------------------------------------------------------------------------


def _towards(run: RunFolder, samples: pl.DataFrame, grid: Grid, embed: Embed, last: int, against: Mapping[str, Any]) -> dict[str, Any]:
    """What is real, was asked for and was made, cluster by cluster; and how far apart real and other rows are, before and after."""
    homes, names = run.homes(last), run.cluster_names(last)
    real, made = (
        Counter(homes[sample] for sample in samples.filter(pl.col("fate") == fate)["id"] if sample in homes)
        for fate in ("real", "accepted")
    )
    wanted, asked = run.reference_counts(last), grid.quotas.get(CLUSTER, {})
    first = wanted or real
    order = sorted(names if len(names) > 1 else (), key=lambda number: (-first.get(number, 0), -made[number], names[number]))
    sides: list[tuple[str, str, Mapping[str, int]]] = [("reference", "reference", wanted)] if wanted else [("seeds", "seeds", real)]
    sides += [("asked", "asked for", asked)] if asked else []
    sides += [("made", "accepted", made) if wanted else ("made", "seeds and accepted", real + made)]
    shares = {side: _shares(counts, order) for side, _, counts in sides}
    rows = [
        {
            "name": names[number] or f"cluster {number}",
            "bars": [(side, counts.get(number, 0), 100 * shares[side][place]) for side, _, counts in sides],
        }
        for place, number in enumerate(order)
    ]
    figures = _two_samples(samples, embed, against)
    if not rows and not figures:
        return {}
    here = [_shares(real, order), _shares(real + made, order)]
    return {
        "rows": rows[:CLUSTERS],
        "more": len(rows) - CLUSTERS,
        "sides": [(side, name) for side, name, _ in sides],
        "longest": max([1e-9, *(100 * share for side in shares.values() for share in side)]),
        "reference": bool(wanted),
        "clusters": len(order),
        "held": [sum(share > 0 for share in side) for side in here],
        "overlap": [sum(min(pair) for pair in zip(shares["reference"], side, strict=True)) for side in here] if wanted else None,
        "figures": figures,
        "against": against.get("name"),
        "compared": len(against.get("texts", ())),
    }


def _shares(counts: Mapping[str, int], order: Sequence[str]) -> list[float]:
    total = sum(counts.get(number, 0) for number in order)
    return [counts.get(number, 0) / max(1, total) for number in order]


def _two_samples(samples: pl.DataFrame, embed: Embed, against: Mapping[str, Any]) -> list[tuple[str, str, list[float | None]]]:
    """Figures of two samples, each with what it says and its value for the seeds and for seeds and accepted rows."""
    seeds, taken = (samples.filter(pl.col("fate") == fate)["shown"].to_list() for fate in ("real", "accepted"))
    if not against or not taken or not seeds:
        return []
    sides = [embed(seeds), embed([*seeds, *taken])]
    distances = [mmd(against["vectors"], side) for side in sides]
    areas = [auc(against["vectors"], side) for side in sides]
    found: list[tuple[str, str, list[float | None]]] = [
        ("MMD²", "0 where both are of one distribution, higher is farther", [each and each.squared for each in distances]),
        ("p of it", "how often chance would give as much; a few percent: they differ", [each and each.p for each in distances]),
        ("AUC", "of a classifier that tells them apart: 0.5 not at all, 1 always", list(areas)),
    ]
    return [row for row in found if row[2][1] is not None]

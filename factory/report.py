"""One page that shows a run whole: what was asked, made, rejected and kept, and what the data looks like. No request to anywhere."""

from __future__ import annotations

import base64
import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import polars as pl
from markupsafe import Markup
from numpy.typing import NDArray

from factory.diversity import FIGURES, diversity, hash_order
from factory.judging import measured
from factory.records import TARGET, RunFolder
from factory.report_loop import loop_of
from factory.stage import Vectors
from factory.store import write_bytes
from schemas.canonical import content_hash
from schemas.manifest import ReleaseFacts

Embed = Callable[[Sequence[str]], Vectors]

DRAWN = 3_000  # samples on the map and in the browser: t-SNE takes 14 s for as many, and a page of them stays near 2 MB
PAYLOAD_BYTES = 4_500_000  # of the samples' JSON; with the rest of the page this stays under 6 MB
EXAMPLES = 3
PAIRS = 4
PLACES = 60  # places that one chart of the balance shows, the thinnest first
BINS = 32
FATES = ("accepted", "real", "holdout", "surplus", "pending", "rejected")
TRACKED = (  # the figures by which teachers and rounds are compared
    "distinct_1_in_100",
    "distinct_2_in_100",
    "compression_ratio",
    "self_bleu",
    "mean_nearest_distance",
    "vendi",
    "novelsum",
    "cluster_entropy",
    "reference_coverage",
)
SMALLEST = 20  # accepted rows, of a teacher or round that is compared

_DATA = Path(__file__).parent / "data"


def write_report(
    path: Path,
    run: RunFolder,
    embed: Embed,
    *,
    title: str,
    facts: ReleaseFacts,
    splits: Mapping[str, str] | None = None,
    reference: pl.DataFrame | None = None,
) -> dict[str, float]:
    """Write the report of `run` to `path`: one file of HTML under 6 MB that asks nothing of any network.

    `splits` are those of a version (id to split). `reference`: the real inputs that the target follows, as `SAMPLES`; none of their texts
    is shown. Every text is escaped, and the page's own policy lets no other script run.
    More than 3,000 samples: the map and the browser show that many, all real rows among them; every count is of all.
    Gives the figures of diversity of all accepted rows, as the page has them.
    """
    samples = _joined(run, splits or {})
    script, style = (_DATA / "report.js").read_text(), (_DATA / "report.css").read_text()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_DATA), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(n=_count, usd=_usd, span=_span, score=_score, clip=_clip, plain=_plain, percent=_percent, figures=_figures)
    drawn = _drawn(samples)
    varied = _diversity(samples, embed)
    page = environment.get_template("report.html.j2").render(
        title=title,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        payload=Markup(_payload(drawn, _layout(embed(drawn["shown"].to_list())))),
        drawn=drawn.height,
        head=_head(run, samples, facts),
        asking=[row for row in run.funnel() if row.kind == "generator" or row.asked],
        funnel=_funnel(run, samples),
        the_loop=loop_of(run, samples, embed, reference),
        places=_places(run, samples, facts),
        axes=_axes(samples),
        clusters=_clusters(run, samples),
        diversity=varied,
        rejects=_rejects(run, samples),
        judges=_judges(run, samples),
        twins=_twins(run, samples),
        failures=_failures(run),
        teachers=_teachers(samples, facts),
        costs=_costs(run, samples),
    )
    write_bytes(path, page.encode())
    accepted: dict[str, float] = varied["accepted"]
    return accepted


# -- what is shown ---------------------------------------------------------------------------------------------------------


def _joined(run: RunFolder, splits: Mapping[str, str]) -> pl.DataFrame:
    """Every sample with its fate, cluster and split, and `shown`, the text that stands for it."""
    said = pl.when(pl.col("input").str.strip_chars() == "").then(pl.col("output")).otherwise(pl.col("input"))
    return (
        run.samples.join(run.fates, on="id", how="left", maintain_order="left")
        .join(run.clusters, left_on="id", right_on="sample", how="left", maintain_order="left")
        .with_columns(shown=said, split=pl.col("id").replace_strict(dict(splits), default=None, return_dtype=pl.String))
    )


def _head(run: RunFolder, samples: pl.DataFrame, facts: ReleaseFacts) -> dict[str, Any]:
    fates = dict(samples["fate"].value_counts().iter_rows())
    funnel, status = run.funnel(), run.status
    micro_usd = status.get("micro_usd", sum(row.micro_usd for row in funnel))  # a probe's calls are in no stage
    accepted = fates.get("accepted", 0)
    return {
        "fates": [(fate, fates[fate]) for fate in FATES if fate in fates],
        "accepted": accepted,
        "wanted": status.get("wanted"),
        "made": samples.filter(pl.col("origin") == "made").height,
        "real": fates.get("real", 0),
        "holdout": fates.get("holdout", 0),
        "status": status.get("status", "unknown"),
        "reason": status.get("reason"),
        "seconds": status.get("seconds"),
        "rounds": status.get("rounds"),
        "micro_usd": micro_usd,
        "micro_usd_a_row": micro_usd / accepted if accepted and micro_usd is not None else None,
        "unpriced": [teacher.name for teacher in facts.teachers if teacher.micro_usd is None and teacher.calls],
        "teachers": [teacher.name for teacher in facts.teachers] or samples["teacher"].drop_nulls().unique().sort().to_list(),
        "tokens": sum(row.tokens_in + row.tokens_out for row in funnel),
        "asked": sum(row.asked for row in funnel),
        "from_ledger": sum(row.from_ledger for row in funnel),
        "embedder": facts.embedder,
        "seeds_licence": facts.seeds_licence,
    }


def _funnel(run: RunFolder, samples: pl.DataFrame) -> list[dict[str, Any]]:
    """The way of the made samples, a step a stage: how many were left, and who fell out for which reason.

    By the samples' fates, not by the stages' own counts: a filter that judges the pool judges a row in every round.
    """
    made = samples.filter(pl.col("origin") == "made")
    lost = (
        made.filter(pl.col("fate").is_in(["rejected", "surplus"]))
        .group_by("by", "reason")
        .len()
        .sort("len", "reason", descending=[True, False])
    )
    unmade = run.failures.filter(pl.col("stage").is_in([row.stage for row in run.funnel() if row.kind == "generator"]))
    failed = unmade.group_by("reason").len().sort("len", "reason", descending=[True, False])
    whole = max(1, made.height + unmade.height)
    steps = [_step("made", "generator", made.height, list(failed.iter_rows()), whole)]
    left = made.height
    for row in run.funnel():
        if row.kind in ("filter", TARGET):
            fell = list(lost.filter(pl.col("by") == row.stage).select(pl.col("reason").fill_null("no reason"), "len").iter_rows())
            left -= sum(n for _, n in fell)
            steps.append(_step(row.stage, row.kind, left, fell, whole))
    pending = made.filter(pl.col("fate") == "pending").height
    if pending:
        left -= pending
        steps.append(_step("round not ended", "pending", left, [("pending", pending)], whole))
    return steps


def _step(name: str, kind: str, left: int, fell: Sequence[tuple[str, int]], whole: int) -> dict[str, Any]:
    out = sum(n for _, n in fell)
    return {
        "name": name,
        "kind": kind,
        "left": left,
        "out": out,
        "reasons": fell,
        "left_share": 100 * left / whole,
        "out_share": 100 * out / whole,
    }


def _places(run: RunFolder, samples: pl.DataFrame, facts: ReleaseFacts) -> dict[str, Any]:
    """Accepted rows a label beside what was wanted; without labels there is nothing to show here."""
    accepted = samples.filter(pl.col("fate") == "accepted")
    got = dict(accepted["label"].drop_nulls().value_counts().iter_rows())
    real = dict(samples.filter(pl.col("fate") == "real")["label"].drop_nulls().value_counts().iter_rows())
    quota = {place: pair[1] for place, pair in (run.status.get("places") or {}).items()}
    rows = [
        {"name": name, "got": got.get(name, 0), "quota": quota.get(name), "real": real.get(name, 0)}
        for name in sorted({*got, *real, *quota})
    ]
    for row in rows:
        row["missing"] = max(0, (row["quota"] or 0) - row["got"])
    rows.sort(key=lambda row: (-row["missing"], row["name"]))
    longest = max([1, *(max(row["got"], row["quota"] or 0) for row in rows)])
    return {"rows": rows[:PLACES], "more": len(rows) - PLACES, "longest": longest, "thin": [row for row in rows if row["missing"]]}


def _axes(samples: pl.DataFrame) -> list[dict[str, Any]]:
    """For every axis of variation its values: samples made, and rows accepted."""
    made = samples.filter((pl.col("origin") == "made") & (pl.col("axes") != "{}"))
    pairs = [
        (axis, str(value), fate == "accepted")
        for axes, fate in made.select("axes", "fate").iter_rows()  # the keys differ from row to row: no column fits them
        for axis, value in json.loads(axes).items()
    ]
    frame = pl.DataFrame(pairs, schema={"axis": pl.String, "value": pl.String, "accepted": pl.Boolean}, orient="row")
    counted = (
        frame.group_by("axis", "value")
        .agg(made=pl.len(), accepted=pl.col("accepted").sum())
        .sort("axis", "accepted", "value", descending=[False, True, False])
    )
    return [
        {"name": name, "rows": values.head(PLACES).to_dicts(), "longest": max(1, int(values["made"].max() or 1))}  # type: ignore[arg-type]
        for (name,), values in counted.group_by("axis", maintain_order=True)
    ]


def _clusters(run: RunFolder, samples: pl.DataFrame) -> dict[str, Any]:
    """What coverage found: clusters by size with their real and accepted rows; thin are those below half of an equal share."""
    inside = samples.filter(pl.col("cluster").is_not_null() & pl.col("fate").is_in(["accepted", "real"]))
    rows = (
        inside.group_by("cluster")
        .agg(
            pl.col("name").last(),
            got=(pl.col("fate") == "accepted").sum(),
            real=(pl.col("fate") == "real").sum(),
            examples=pl.col("shown").head(2),
        )
        .sort("cluster")
        .to_dicts()
    )
    named = [row for row in rows if row["cluster"] >= 0]
    share = sum(row["got"] + row["real"] for row in named) / max(1, len(named))
    central = {row["cluster"]: row["central"] for stage in run.stages for row in stage.get("reports", {}).get("clusters", [])}
    text = dict(samples.select("id", "shown").iter_rows())
    for row in rows:
        row["name"] = row["name"] or f"cluster {row['cluster']}"
        row["thin"] = row["cluster"] >= 0 and row["got"] + row["real"] < share / 2
        row["examples"] = [text[id_] for id_ in central.get(row["cluster"], [])[:2] if id_ in text] or row["examples"]
    rows.sort(key=lambda row: (row["cluster"] < 0, -row["got"] - row["real"], row["cluster"]))
    longest = max([1, *(row["got"] + row["real"] for row in rows)])
    return {"rows": rows[:PLACES], "more": len(rows) - PLACES, "longest": longest, "thin": [row for row in rows if row["thin"]]}


def _diversity(samples: pl.DataFrame, embed: Embed) -> dict[str, Any]:
    """Figures of the seeds, of all accepted rows, and of as many accepted rows as there are seeds; the same by teacher and by round.

    Most figures change with the number of texts, so what is compared is cut to the same number, by the order of a hash.
    """
    real, accepted = (samples.filter(pl.col("fate") == fate) for fate in ("real", "accepted"))
    seeds, texts = real["shown"].to_list(), accepted["shown"].to_list()
    reference = embed(seeds) if seeds else None
    columns = [("seeds", seeds, None), ("accepted, as many", _cut(texts, len(seeds)), reference), ("accepted, all", texts, reference)]
    columns = [column for column in columns if column[1]]
    figures = [diversity(texts, embed(texts), against) for _, texts, against in columns]
    return {
        "columns": [(name, len(texts)) for name, texts, _ in columns],
        "rows": [(*FIGURES[name], [found.get(name) for found in figures]) for name in FIGURES if any(name in found for found in figures)],
        "accepted": figures[-1] if texts else {},
        "smallest": SMALLEST,
        "groups": [
            _compared(by, accepted.select(group=column, text="shown"), embed, reference)
            for by, column in (("Teacher", "teacher"), ("Round", "round"))
        ],
    }


def _compared(by: str, rows: pl.DataFrame, embed: Embed, reference: Vectors | None) -> dict[str, Any]:
    """The figures of each group of texts, all cut to the size of the smallest; groups of under 20 are only counted."""
    groups = rows.drop_nulls().group_by("group", maintain_order=True).agg("text").sort("group")
    large = [(str(name), texts) for name, texts in groups.iter_rows() if len(texts) >= SMALLEST]
    if len(large) == 1:  # it is "accepted, all"
        large = []
    few = min((len(texts) for _, texts in large), default=0)
    cut = [_cut(texts, few) for _, texts in large]
    figures = [diversity(texts, embed(texts), reference) for texts in cut]
    names = [name for name in TRACKED if any(name in found for found in figures)]
    return {
        "by": by,
        "few": few,
        "small": groups.height - len(large),
        "columns": [FIGURES[name] for name in names],
        "rows": [(name, len(texts), [found.get(figure) for figure in names]) for (name, texts), found in zip(large, figures, strict=True)],
    }


def _cut(texts: Sequence[str], number: int) -> list[str]:
    """So many of the texts, the first by the order of a hash."""
    return [texts[row] for row in hash_order(texts)[:number]]


def _rejects(run: RunFolder, samples: pl.DataFrame) -> list[dict[str, Any]]:
    """For every filter that rejected something: the scores of both sides, and by reason the examples nearest to the cut."""
    last = run.verdicts.group_by("sample", "by", maintain_order=True).last()
    judged = last.join(samples.filter(pl.col("origin") == "made").select("id", "shown", "label"), left_on="sample", right_on="id")
    text = dict(samples.select("id", "shown").iter_rows())
    filters = []
    for (by,), verdicts in judged.filter(pl.col("by") != TARGET).sort("by").group_by("by", maintain_order=True):
        out, kept = verdicts.filter(~pl.col("keep")), verdicts.filter("keep")["score"].drop_nulls()
        if out.is_empty():
            continue
        cut = _cut_between(kept, out["score"].drop_nulls())
        near_cut = (pl.col("score") - cut).abs() if cut is not None else pl.col("score").abs()
        reasons = [
            {
                "reason": reason,
                "n": rows.height,
                "low": rows["score"].min(),
                "high": rows["score"].max(),
                "examples": [
                    {"text": row["shown"], "label": row["label"], "score": row["score"], "detail": _evidence(row["detail"], text)}
                    for row in rows.sort(near_cut, "sample", nulls_last=True).head(EXAMPLES).to_dicts()
                ],
            }
            for (reason,), rows in out.with_columns(pl.col("reason").fill_null("no reason")).group_by("reason", maintain_order=True)
        ]
        reasons.sort(key=lambda row: (-int(row["n"]), str(row["reason"])))
        filters.append(
            {
                "by": by,
                "n": out.height,
                "kept": verdicts.height - out.height,
                "reasons": reasons,
                "scores": _histogram(kept, out["score"].drop_nulls()),
            }
        )
    return filters


def _judges(run: RunFolder, samples: pl.DataFrame) -> list[dict[str, Any]]:
    """Of every filter that asked a model, or sends rows to people: its judges, what place and length decided, and such rows."""
    asked = run.verdicts.filter(pl.col("detail").str.contains(r'"(?:teacher|people)": "'))
    shown = dict(samples.select("id", "shown").iter_rows())
    filters = []
    for by in asked["by"].unique().sort():
        judged, _ = measured(run, by)
        people = (
            asked.filter((pl.col("by") == by) & pl.col("detail").str.contains('"people": "', literal=True)).unique("sample").sort("sample")
        )
        told = [
            (name, f"{value:g}" if isinstance(value, float) else str(value))
            for name, value in judged.told.items()
            if isinstance(value, int | float | str)
        ]
        why = people.head(EXAMPLES).select("sample", pl.col("detail").str.json_path_match("$.people"), "score")
        examples = [{"text": shown.get(sample, sample), "why": reason, "score": score} for sample, reason, score in why.iter_rows()]
        filters.append({"by": by, "judged": judged, "told": told, "people": examples})
    return filters


def _cut_between(kept: pl.Series, out: pl.Series) -> float | None:
    """Where the scores of what was kept end and those of what was rejected begin, whichever side is the higher one."""
    if not len(kept) or not len(out):
        return None
    higher, lower = (out, kept) if _middle(out) > _middle(kept) else (kept, out)
    return (float(higher.min()) + float(lower.max())) / 2  # type: ignore[arg-type]


def _middle(scores: pl.Series) -> float:
    return float(scores.median() or 0)  # type: ignore[arg-type]


def _histogram(kept: pl.Series, out: pl.Series) -> dict[str, Any] | None:
    """Scores of both sides in equal bins, as shares of the highest bin in percent; None where they would show nothing."""
    values = np.concatenate([kept.to_numpy(), out.to_numpy()])
    if len(kept) < EXAMPLES or not len(out) or values.min() == values.max():
        return None
    edges = np.histogram_bin_edges(values, BINS)
    sides = [np.histogram(side.to_numpy(), edges)[0] for side in (kept, out)]
    tallest = (sides[0] + sides[1]).max()
    bins = [(100 * k / tallest, 100 * o / tallest) for k, o in zip(*(side.tolist() for side in sides), strict=True)]
    return {"bins": bins, "low": float(values.min()), "high": float(values.max())}


def _evidence(detail: str, text: Mapping[str, str]) -> list[tuple[str, str]]:
    """A verdict's detail as words; an id of a sample is told as its text."""
    return [(name, text.get(str(value), _plain(str(value)))) for name, value in json.loads(detail).items() if value is not None][:4]


def _twins(run: RunFolder, samples: pl.DataFrame) -> list[dict[str, Any]]:
    """For every filter that names twins: the most alike that stayed, and the least alike that were rejected."""
    last = run.verdicts.filter(pl.col("detail").str.contains('"twin":', literal=True)).group_by("sample", "by", maintain_order=True).last()
    text = samples.select("id", "shown")
    pairs = (
        last.with_columns(twin=pl.col("detail").str.json_path_match("$.twin"))
        .filter(pl.col("score").is_not_null())
        .join(text.rename({"shown": "text"}), left_on="sample", right_on="id")
        .join(text.rename({"shown": "twin_text"}), left_on="twin", right_on="id")
        .sort("by", "score", "sample", descending=[False, True, False])
    )
    large = _large_groups(run, samples)
    return [
        {
            "by": by,
            "large": large.get(by, []),
            "kept": [_pair(row) for row in of_filter.filter("keep").head(PAIRS).to_dicts()],
            "rejected": [_pair(row) for row in of_filter.filter(~pl.col("keep")).sort("score", "sample").head(PAIRS).to_dicts()],
        }
        for (by,), of_filter in pairs.group_by("by", maintain_order=True)
    ]


def _large_groups(run: RunFolder, samples: pl.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """By filter, the rows for which more others were rejected in a round than one would expect, with how many it were."""
    shown = dict(samples.select("id", "shown").iter_rows())
    found: dict[str, list[dict[str, Any]]] = {}
    for stage in run.stages:
        for group in stage["reports"].get("groups", {}).get("larger_than_expected", []):
            row = {"rows": group["rows"], "round": stage["round"], "text": _clip(shown.get(group["sample"], group["sample"]), 120)}
            found.setdefault(stage["stage"], []).append(row)
    return found


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """Two texts in pieces (words, do both have them?), so that the eye goes to what differs; unmarked where nearly all does."""
    words = [_clip(row[name], 300).split() for name in ("text", "twin_text")]
    bare = [[re.sub(r"\W", "", word.casefold()) or word for word in side] for side in words]
    match = difflib.SequenceMatcher(None, bare[0], bare[1], autojunk=False)
    blocks = match.get_matching_blocks()
    shared = [{at for block in blocks for at in range(block[side], block[side] + block.size)} for side in (0, 1)]
    if match.ratio() < 0.4:
        shared = [set(range(len(side))) for side in words]
    sides = []
    for side, both in zip(words, shared, strict=True):
        marked = [(word, at in both) for at, word in enumerate(side)]
        sides.append([(" ".join(word for word, _ in run), same) for same, run in itertools.groupby(marked, key=lambda item: item[1])])
    return {"score": row["score"], "sides": sides}


def _failures(run: RunFolder) -> list[dict[str, Any]]:
    counted = run.failures.group_by("stage", "reason", maintain_order=True).agg(
        n=pl.len(), examples=pl.struct("detail", "text", "teacher").head(EXAMPLES)
    )
    unanswered = [
        {"stage": row.stage, "reason": reason, "n": n, "examples": []} for row in run.funnel() for reason, n in row.unanswered.items()
    ]
    return sorted([*counted.to_dicts(), *unanswered], key=lambda row: (-row["n"], row["stage"], row["reason"]))


def _teachers(samples: pl.DataFrame, facts: ReleaseFacts) -> list[dict[str, Any]]:
    counts = (
        samples.filter(pl.col("teacher").is_not_null())
        .group_by("teacher")
        .agg(made=pl.len(), accepted=(pl.col("fate") == "accepted").sum())
    )
    of = {row["teacher"]: row for row in counts.to_dicts()}
    rows = [{**teacher.model_dump(), "made": 0, "accepted": 0, **of.get(teacher.name, {})} for teacher in facts.teachers]
    for row in rows:
        priced = row["micro_usd"] is not None and row["accepted"]
        row["micro_usd_a_row"] = row["micro_usd"] / row["accepted"] if priced else None
    return rows


def _costs(run: RunFolder, samples: pl.DataFrame) -> list[dict[str, Any]]:
    """What an accepted row cost, by teacher, label and cluster, the dearest first; nothing where nothing cost anything."""
    made = samples.filter(pl.col("origin") == "made")
    cluster = pl.coalesce(pl.when(pl.col("name") != "").then("name"), pl.format("cluster {}", "cluster"))
    found = [
        ("Teacher", run.cost_by_teacher()),
        ("Label", run.cost_by(made.select("id", group="label"))),
        ("Cluster", run.cost_by(made.select("id", group=pl.when(pl.col("cluster") >= 0).then(cluster)))),
    ]
    return [
        {"by": by, "rows": rows.head(PLACES).to_dicts(), "more": rows.height - PLACES}
        for by, rows in found
        if run.cost_anything and not rows.is_empty()
    ]


# -- the map ---------------------------------------------------------------------------------------------------------------


def _drawn(samples: pl.DataFrame) -> pl.DataFrame:
    """The samples on the map and in the browser: all, or the real ones and a choice by hash."""
    if samples.height <= DRAWN:
        return samples
    order = pl.Series([content_hash("m1", row) for row in samples["id"]], dtype=pl.String)
    return samples.with_columns(order=order).sort(pl.col("origin") != "real", "order").head(DRAWN).drop("order")


def _layout(vectors: Vectors) -> NDArray[np.float64]:
    """Places in the unit square, neighbours by cosine near each other: t-SNE from PCA (van der Maaten & Hinton 2008), deterministic.

    UMAP would be as good a picture and takes 13 s to import.
    """
    n = len(vectors)
    if n < 5:
        return np.stack([np.arange(n) / max(1, n - 1), np.full(n, 0.5)], axis=1)
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):  # threads that wait for a core which others have make 300 rows take 28 s instead of one
        vectors = PCA(min(50, *vectors.shape), random_state=0).fit_transform(vectors)
        places = TSNE(perplexity=min(30, (n - 1) / 3), random_state=0).fit_transform(vectors).astype(np.float64)
    low, high = places.min(axis=0), places.max(axis=0)
    square: NDArray[np.float64] = (places - low) / np.maximum(high - low, 1e-9)
    return square


def _payload(drawn: pl.DataFrame, places: NDArray[np.float64]) -> str:
    """The drawn samples as JSON by column, safe inside a script element; texts are cut as far as the size asks."""
    axes = drawn.select(pl.when(pl.col("axes") != "{}").then(pl.col("axes"))).to_series()
    answers = drawn.select(
        pl.when(pl.col("output") != pl.col("label").fill_null("")).then(pl.col("output")).otherwise(pl.lit(""))
    ).to_series()
    columns = {
        "x": np.round(places[:, 0], 4).tolist(),
        "y": np.round(places[:, 1], 4).tolist(),
        "id": drawn["id"].str.slice(0, 12).to_list(),
        "score": [None if score is None else float(f"{score:.4g}") for score in drawn["score"]],
        "round": drawn["round"].to_list(),
        "axes": [", ".join(f"{k}: {v}" for k, v in json.loads(value).items()) if value else "" for value in axes],
        **{name: _coded(drawn[column]) for name, column in _CODED.items()},
    }
    text = ""
    for limit in (600, 300, 150, 80, 40):
        texts = {"text": [_clip(t, limit) for t in drawn["shown"]], "answer": [_clip(t, limit) for t in answers]}
        text = json.dumps({**columns, **texts}, ensure_ascii=False, separators=(",", ":"))
        for character in "<>&\u2028\u2029":
            text = text.replace(character, f"\\u{ord(character):04x}")
        if len(text.encode()) <= PAYLOAD_BYTES:
            break
    return text


_CODED = {"label": "label", "cluster": "name", "teacher": "teacher", "fate": "fate", "split": "split", "by": "by", "reason": "reason"}


def _coded(values: pl.Series) -> dict[str, Any]:
    """A column of few different values: the values, the commonest first, and for each row the index of its own (-1: none)."""
    names = values.drop_nulls().value_counts().sort(pl.col("count"), pl.col(values.name), descending=[True, False])[values.name].to_list()
    index = {name: number for number, name in enumerate(names)}
    return {"names": names, "of": [index.get(value, -1) for value in values]}


# -- how it is written -----------------------------------------------------------------------------------------------------


def _count(value: float) -> str:
    return f"{value:,}"


def _usd(micro_usd: float | None) -> str:
    if micro_usd is None:
        return "unknown"
    usd = micro_usd / 1_000_000
    return f"${usd:,.2f}" if usd >= 1 or usd == 0 else f"${float(f'{usd:.2g}'):.10f}".rstrip("0") if usd < 0.001 else f"${usd:.4f}"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _figures(value: float | None) -> str:
    """Three figures that count: 0.0123, 1.23, 12,300."""
    return "–" if value is None else f"{float(f'{value:.3g}'):,.10g}"


def _clip(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _plain(code: str) -> str:
    """A code as words: "balance_not_updated" is "balance not updated", and may be broken at the end of a line."""
    return code.replace("_", " ")

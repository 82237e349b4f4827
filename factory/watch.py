"""Whether a dataset that is made from itself is collapsing: figures of every round and version, and alarms where they cross a threshold.

Models that learn from what models wrote lose the rare first, and then most of the rest (Shumailov et al. 2024, "AI models collapse when
trained on recursively generated data"); keeping real rows in the mixture prevents it (Alemohammad et al. 2023, "Self-Consuming Generative
Models Go MAD"; Gerstgrasser et al. 2024, "Is Model Collapse Inevitable?"). So what is watched is variety, the outer rows, descent, the
share of real rows, and who made the rest. Pure functions: frames and thresholds in, figures and alarms out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory import ngrams
from factory.diversity import FIGURES, hash_order, of_distances, vendi
from factory.records import TARGET
from factory.rows import read_samples
from factory.stage import Vectors
from factory.store import SAMPLES
from factory.words import flat, words
from schemas.manifest import split_files
from schemas.watch import Watch

Embed = Callable[[Sequence[str]], Vectors]
Figures = dict[str, Any]

LEAST = 40  # rows on either side: with fewer, halves of one set differ by as much as a collapse does
IN_CELL = 3  # rows of a cell, from which on it has a variety of its own
MOST = 400  # rows that are drawn for a figure, so that a round of a large run costs what one of a small run does
NEIGHBOURS = 5  # as in the figures of coverage and density
OUTER = 0.2  # of real rows are its tail: of 40 seeds a tenth would be 4, and hang on a single odd one
TAIL_REAL, TAIL_MADE = 30, 100  # rows that the tail wants: with fewer, one healthy set in some hundreds has nothing in it
TAIL_MOST = 2_000  # real rows are looked at
MADE_LEAST = 20  # samples of a teacher in a round, before it is said that it repeats itself

DUPLICATE = r"duplicate$"  # how reasons of verdicts end that say "this was there before"
REPEAT = "repeat"  # the reason of a failure whose content was made before

COMPARED: Mapping[str, str] = {  # what a drop of variety is read from, and what it is called
    "novelsum_within": "NovelSum within a place",
    **{name: FIGURES[name][0] for name in ("novelsum", "distinct_1_in_100", "distinct_2_in_100")},
}
STOPS: Mapping[str, bool] = {  # whether to go on makes it worse; what later rounds can mend warns
    "real_at_least": True,
    "depth_at_most": True,
    "diversity_drop_at_most": True,
    "tail_at_least": True,
    "teacher_at_most": False,
    "repeats_at_most": False,
}


@dataclass(frozen=True)
class Alarm:
    """A figure that crossed its threshold. `name` is the threshold's key; `round` is None between versions; `sentence` is for people.

    `stops`: the run ends, or the version is not released, unless somebody says otherwise. `teacher`: the one that it is about, if any.
    """

    name: str
    round: int | None
    value: float
    threshold: float
    stops: bool
    sentence: str
    teacher: str | None = None


# -- descent ---------------------------------------------------------------------------------------------------------------


def depths(samples: pl.DataFrame) -> pl.DataFrame:
    """Through how many generations of made rows each row descends from real ones: columns `id` and `depth`, in the order given.

    `samples`: rows of `SAMPLES` (or of a lineage), ids unique. A real row is 0; a made one is 1 more than the deepest of its parents, and
    1 where it has none. A parent that is not among `samples` counts as real: in a run all parents are on disk, so this concerns
    versions alone, where a made parent may have been left out; the depth is then a lower bound. A row that was read from a released version
    and was made there (its `meta` says so) counts as made, of the depth that `meta.depth` tells, or 1. Rows that descend from each other in
    a ring cannot be; they get the depth that their other parents give them.
    """
    count = samples.height
    made = (samples["origin"] == "made").to_numpy()
    depth = np.where(made, 1, _known_depth(samples))
    ids = pl.DataFrame({"id": samples["id"], "row": np.arange(count)})
    links = (
        pl.DataFrame({"child": np.arange(count), "id": samples["parents"]})
        .filter(pl.Series(made))
        .explode("id")
        .join(ids, on="id")
        .sort("row", "child")
    )
    child, starts = links["child"].to_numpy(), np.searchsorted(links["row"].to_numpy(), np.arange(count + 1))
    waiting = np.bincount(child, minlength=count)  # parents whose own depth is not settled
    settled = np.flatnonzero(waiting == 0)
    while len(settled):  # one generation after the other; each link is walked once
        fans = starts[settled + 1] - starts[settled]
        walked = np.repeat(starts[settled] - (np.cumsum(fans) - fans), fans) + np.arange(fans.sum())
        children = child[walked]
        np.maximum.at(depth, children, np.repeat(depth[settled] + 1, fans))
        np.subtract.at(waiting, children, 1)
        touched = np.unique(children)
        settled = touched[waiting[touched] == 0]
    return pl.DataFrame({"id": samples["id"], "depth": depth.astype(np.int64)})


def _known_depth(samples: pl.DataFrame) -> NDArray[np.int64]:
    """Of rows that were read: 0, or what their meta says where they come from a version in which they were made."""
    was_made = pl.col("meta").str.json_path_match("$.origin") == "made"
    told = pl.col("meta").str.json_path_match("$.depth").cast(pl.Int64, strict=False).fill_null(1)
    depth = samples.select(pl.when(was_made.fill_null(False)).then(pl.max_horizontal(told, 1)).otherwise(0)).to_series()
    return depth.to_numpy().astype(np.int64)


# -- figures ---------------------------------------------------------------------------------------------------------------


def look(
    samples: pl.DataFrame,
    verdicts: pl.DataFrame,
    failures: pl.DataFrame,
    *,
    accepted: Iterable[str],
    number: int,
    embed: Embed,
    cells: pl.DataFrame | None = None,
    reference: pl.DataFrame | None = None,
) -> Figures:
    """The figures of a run after round `number`, as JSON has it; what so few rows do not have is left out.

    `samples`, `verdicts` and `failures` are those of the run, as in `RunFolder`; `accepted` the ids that the target takes now. `cells`
    (`id`, `cell`) says which place of the target a row fills; None: its label. `reference`: the real inputs whose tail counts; None: the
    real rows that a teacher may see.

    round, accepted, real           the round; accepted rows; real rows, without those set aside for test
    real_share                      real rows among real and accepted ones
    depth_max, _mean, deeper_than_1 of accepted rows: generations from real ones (`depths`), and the share that has made ancestors
    made_parents                    of all that accepted rows were made from, the share that was made itself
    teacher, teacher_share          who made most of the accepted rows, and what share
    herfindahl                      the sum of squared shares of teachers (Herfindahl 1950): 1 is one teacher alone, 1/n that n made alike
    tail                            share of accepted rows in the real rows' outer part (`tail_mass`)
    varied                          accepted rows: figures of 40, 80, 160 … of them, for comparison with other versions
    varied_within                   accepted rows: `novelsum_within` of 4, 8, 16 … rows of each label
    first, newest                   early rows and rows of the newest rounds: `rounds`, `rows`, and figures of variety (below)
    teachers                        of this round, by name: samples `made`, `duplicates` among them, and how many were `good`

    Figures of variety are NovelSum, the distance to the nearest, the Vendi score and distinct words and pairs (`factory/diversity.py`), and
    `novelsum_within`: NovelSum among the rows of one cell, in the mean over rows of cells that have three. It falls first where labels
    keep the whole apart: when every label is told in two ways, it halves, while NovelSum falls by a seventh.

    They change with the number of rows and with what was asked for: real rows of a single label are 9% to 49% less varied than those of
    all ten (NovelSum, the bank's intents), and late rounds often fill a single one. So `first` and `newest` are of equally many rows of
    each cell: those of the newest rounds, which are as many as hold 40 accepted rows, and in each cell the earliest rows before. Where
    that makes less than 40 of each, nothing is said. Draws are by a hash, of 400 rows at most.

    A teacher's duplicates are what filters rejected as such and what had been made word for word before; `good` passed every filter.
    """
    ids = pl.Series(accepted, dtype=pl.String).implode()
    samples = samples.filter(pl.col("round") <= number)
    rows = samples.filter(pl.col("id").is_in(ids) & (pl.col("origin") == "made"))
    real = samples.filter((pl.col("origin") == "real") & ~pl.col("holdout"))
    figures = {"round": number, **_of_dataset(rows, real, depths(samples), embed, reference)}
    figures |= _first_and_newest(rows, cells, embed)
    figures["teachers"] = _teachers(samples, verdicts, failures, number)
    return figures


def look_at_version(folder: Path, embed: Embed) -> Figures:
    """The figures of a released version's rows, as `look` has them, without those of rounds. Variety and tail are of its made rows.

    Depth is that of its lineage; a version of an earlier Gristmill does not tell it, and it is counted from the rows that are there.
    """
    lineage = pl.read_parquet(folder / "lineage.parquet")
    deep = lineage.select("id", "depth") if "depth" in lineage.columns else depths(lineage)
    files = [path for path in split_files(folder) if path.stat().st_size]
    texts = pl.concat([SAMPLES.to_frame(), *map(read_samples, files)])  # not as a version: it may be on its way to become one
    texts = texts.select("input", "output", "kind", id=pl.col("meta").str.json_path_match("$.id"))
    rows = lineage.select("id", "origin", "parents", "teacher", "label").join(texts, on="id", maintain_order="left")
    made, real = (rows.filter(pl.col("origin") == origin) for origin in ("made", "real"))
    return _of_dataset(made, real, deep, embed, None)


def _of_dataset(made: pl.DataFrame, real: pl.DataFrame, deep: pl.DataFrame, embed: Embed, reference: pl.DataFrame | None) -> Figures:
    truly = real.join(deep.filter(pl.col("depth") == 0), on="id", how="semi")
    total = made.height + real.height
    figures: Figures = {"accepted": made.height, "real": truly.height, "real_share": truly.height / total if total else None}
    if made.height:
        figures |= _descent(made, deep) | _concentration(made["teacher"])
    figures["tail"] = tail_mass(made, truly if reference is None else reference, embed)
    figures["varied"], figures["varied_within"] = _draws(made, embed), _draws_within(made, embed)
    return {name: value for name, value in figures.items() if value is not None}


def _descent(rows: pl.DataFrame, deep: pl.DataFrame) -> Figures:
    own = rows.select("id").join(deep, on="id")["depth"]
    parents = rows.select(id="parents").explode("id").drop_nulls().join(deep, on="id", how="left")["depth"]
    return {
        "depth_max": int(own.to_numpy().max()),
        "depth_mean": float(own.to_numpy().mean()),
        "deeper_than_1": float((own.to_numpy() > 1).mean()),
        "made_parents": float((parents.fill_null(0).to_numpy() > 0).mean()) if len(parents) else 0.0,
    }


def _concentration(teachers: pl.Series) -> Figures:
    counts = teachers.drop_nulls().value_counts().sort("count", teachers.name, descending=[True, False])
    if counts.is_empty():
        return {}
    shares = counts["count"].to_numpy() / len(teachers)
    return {"teacher": counts[teachers.name][0], "teacher_share": float(shares[0]), "herfindahl": float((shares**2).sum())}


def tail_mass(made: pl.DataFrame, real: pl.DataFrame, embed: Embed) -> float | None:
    """The share of made rows in the sparse outer part of the real rows' distribution; 0 to 1, about 0.2 where both are of one.

    A row's sparseness is the distance (1 - cosine) to its fifth nearest real row, itself apart: a density by the k-th neighbour
    (Loftsgaarden & Quesenberry 1965). The outer part is what is at least as sparse as the outermost fifth of real rows. Labels weigh as
    they do among the real rows, so a target that asks for other shares of labels moves nothing. The definition is ours: what a
    collapse loses first is what was rare. It does not see rows that are few things told many ways, nor noise, which lies outside as
    well; variety sees those. The fifth neighbour and not the nearest: a rewritten real row lies close to that one, wherever it lies.

    None with fewer than 30 different real or 100 made rows. At most 400 made and 2,000 real rows are looked at, drawn by a hash.
    """
    made, real = _drawn(made).head(MOST), _drawn(real).unique("text", keep="first", maintain_order=True).head(TAIL_MOST)
    if real.height < TAIL_REAL or made.height < TAIL_MADE:
        return None
    centre = embed(real["text"].to_list())
    among = 1 - centre @ centre.T
    np.fill_diagonal(among, np.inf)
    edge = np.quantile(_kth(among), 1 - OUTER)
    outside = _kth(1 - embed(made["text"].to_list()) @ centre.T) >= edge
    weights = _weights(made["label"], real["label"])
    return float(outside @ weights / weights.sum())


def _kth(distances: Vectors) -> Vectors:
    return np.partition(distances, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1]


def _weights(labels: pl.Series, real: pl.Series) -> NDArray[np.float64]:
    """Of each row, so that the labels of all weigh as they do among real rows; alike where the two have no label in common."""
    shares = real.fill_null("").value_counts(name="real").rename({real.name: "label"})
    rows = pl.DataFrame({"label": labels.fill_null("")}).join(shares, on="label", how="left", maintain_order="left")
    weights = rows.select((pl.col("real").fill_null(0) / pl.len().over("label")).cast(pl.Float64)).to_series().to_numpy()
    return weights if weights.any() else np.ones(len(weights))


def _drawn(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with their `text`, in the order of a hash of it, whatever order they came in.

    Without preferences whose prompt another row has too: they go on from it, and say nothing of how varied prompts are.
    """
    others = rows.filter(pl.col("kind") != "preference")["input"]
    rows = rows.filter((pl.col("kind") != "preference") | ~pl.col("input").is_in(others.implode()))
    text = pl.when(pl.col("input").str.strip_chars() == "").then("output").otherwise("input")
    rows = rows.sort("id").with_columns(text=text)
    return rows[hash_order(rows["text"].to_list())]


def _variety(texts: list[str], embed: Embed, cells: pl.Series | None = None) -> Figures:
    """Figures that can be compared over equally many texts, and over equally many of each cell."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    vectors = embed(texts)
    with threadpool_limits(1):  # threads that wait for a core which a teacher has make this twenty times slower
        of_meaning: dict[str, float | None] = {**of_distances(vectors), "vendi": vendi(vectors)}
        if cells is not None:
            of_meaning["novelsum_within"] = _novelsum_within(vectors, cells)
    found = words(flat(texts))
    figures = of_meaning | {f"distinct_{n}_in_100": ngrams.distinct_in(ngrams.grams(*found, n), 100) for n in (1, 2)}
    return {name: value for name, value in figures.items() if value is not None}


def _novelsum_within(vectors: Vectors, cells: pl.Series) -> float | None:
    places = pl.DataFrame({"cell": cells, "row": np.arange(len(cells))}).group_by("cell").agg("row").sort("cell")["row"]
    large = [rows.to_numpy() for rows in places if len(rows) >= IN_CELL]
    sizes = [len(rows) for rows in large]
    if len(places) < 2 or sum(sizes) < LEAST:  # of one cell it is NovelSum
        return None
    return float(np.average([of_distances(vectors[rows])["novelsum"] for rows in large], weights=sizes))


def _draws(rows: pl.DataFrame, embed: Embed) -> Figures:
    texts = _drawn(rows)["text"].to_list()
    sizes = [size for size in (LEAST * 2**step for step in range(20)) if size <= min(len(texts), MOST)]
    return {str(size): _variety(texts[:size], embed) for size in sizes}


def _draws_within(rows: pl.DataFrame, embed: Embed) -> Figures:
    drawn = _drawn(rows.with_columns(cell=pl.col("label").fill_null(""))).with_columns(turn=pl.int_range(pl.len()).over("cell"))
    found: Figures = {}
    for size in (4 * 2**step for step in range(20)):
        whole = drawn.filter((pl.len().over("cell") >= size) & (pl.col("turn") < size))
        if whole.is_empty() or whole.height > MOST:
            break
        value = _novelsum_within(embed(whole["text"].to_list()), whole["cell"])
        found |= {str(size): {"novelsum_within": value}} if value is not None else {}
    return found


def _first_and_newest(rows: pl.DataFrame, cells: pl.DataFrame | None, embed: Embed) -> Figures:
    counts = rows.group_by("round").len().sort("round")
    numbers, sizes = counts["round"].to_list(), counts["len"].to_numpy()
    first, last = (int(np.searchsorted(np.cumsum(of), LEAST)) + 1 for of in (sizes, sizes[::-1]))  # so many rounds hold enough
    if first + last > len(numbers):
        return {}
    since = numbers[-last]
    placed = rows.with_columns(cell="label") if cells is None else rows.join(cells.select("id", "cell"), on="id", how="left")
    placed = _drawn(placed.with_columns(pl.col("cell").fill_null(""))).select("round", "cell", "text")
    turn = pl.int_range(pl.len()).over("cell")
    older = placed.filter(pl.col("round") < since).sort("round", maintain_order=True).with_columns(turn=turn)
    newer = placed.filter(pl.col("round") >= since).with_columns(turn=turn)
    pairs = older.join(newer, on=["cell", "turn"]).sort("turn", "cell").head(MOST)
    if pairs.height < LEAST:
        return {}
    return {
        name: {
            "rounds": pairs[number].sort()[[0, -1]].to_list(),
            "rows": pairs.height,
            **_variety(pairs[text].to_list(), embed, pairs["cell"]),
        }
        for name, number, text in (("first", "round", "text"), ("newest", "round_right", "text_right"))
    }


def _teachers(samples: pl.DataFrame, verdicts: pl.DataFrame, failures: pl.DataFrame, number: int) -> Figures:
    made = samples.filter((pl.col("round") == number) & (pl.col("origin") == "made")).select("id", "teacher").drop_nulls("teacher")
    mine = verdicts.filter(pl.col("by") != TARGET).join(made, left_on="sample", right_on="id", how="semi")
    against = mine.group_by("sample", "by", maintain_order=True).last().filter(~pl.col("keep"))
    judged = against.group_by("sample").agg(duplicate=pl.col("reason").str.contains(DUPLICATE).any())
    told = made.join(judged, left_on="id", right_on="sample", how="left").group_by("teacher")
    counts = told.agg(made=pl.len(), duplicates=pl.col("duplicate").sum(), good=pl.col("duplicate").is_null().sum())
    again = failures.filter((pl.col("round") == number) & (pl.col("reason") == REPEAT)).drop_nulls("teacher")
    repeats = again.group_by("teacher").agg(made=pl.len(), duplicates=pl.len(), good=pl.lit(0))
    columns = ("made", "duplicates", "good")
    both = pl.concat([part.select("teacher", *(pl.col(name).cast(pl.Int64) for name in columns)) for part in (counts, repeats)])
    sums = both.group_by("teacher").sum().sort("teacher")
    return {row.pop("teacher"): row for row in sums.to_dicts()}


# -- alarms ----------------------------------------------------------------------------------------------------------------


def alarms(figures_by_round: Sequence[Mapping[str, Any]], watch: Watch) -> tuple[Alarm, ...]:
    """What crossed its threshold, round by round, from what `look` gave after each. A figure that is not there raises none."""
    raised: list[Alarm] = []
    for figures in figures_by_round:
        number = figures["round"]
        raised += _common(figures, watch, number)
        if "first" in figures:
            first, newest = figures["first"], figures["newest"]
            who, before = f"The accepted rows of {_rounds(newest)}", _rounds(first)
            rows = f"{newest['rows']} rows each"
            raised += _drop(newest, first, rows, watch, number, who, f"in {before}", "Stop, look at them, mix in real rows")
        raised += _repeating(figures.get("teachers", {}), watch, number)
    return tuple(raised)


def alarms_of_versions(previous: Mapping[str, Any] | None, figures: Mapping[str, Any], watch: Watch) -> tuple[Alarm, ...]:
    """What crossed its threshold in a version, from what `look` or `look_at_version` gave of it and of the version before, if there is one.

    Variety is compared over the largest draw that both have, whatever the labels: those are the version's own.
    """
    drops: list[Alarm] = []
    for of, rows in (("varied", "{} rows each"), ("varied_within", "{} rows of each label")):
        drawn, drawn_before = figures.get(of, {}), (previous or {}).get(of, {})
        if shared := drawn.keys() & drawn_before.keys():
            size = max(shared, key=int)
            who, mend = "The made rows of this version", "Look at the rows that are new, mix in real rows"
            drops += _drop(drawn[size], drawn_before[size], rows.format(size), watch, None, who, "in the version before", mend)
    return (*_common(figures, watch, None), *sorted(drops, key=lambda alarm: -alarm.value)[:1])


def _common(figures: Mapping[str, Any], watch: Watch, number: int | None) -> list[Alarm]:
    raised = []
    where = "" if number is None else f" after round {number}"
    share, floor = figures.get("real_share"), watch.real_at_least
    if share is not None and floor is not None and share < floor:
        sentence = (
            f"Of all rows{where}, {_percent(share, floor)} are real ({figures['real']} beside {figures['accepted']} made ones); "
            f"{_percent(floor)} are to be. Bring more seeds, ask for fewer rows, or lower watch.real_at_least."
        )
        raised.append(_alarm("real_at_least", number, share, floor, sentence))
    depth, most = figures.get("depth_max"), watch.depth_at_most
    if depth is not None and most is not None and depth > most:
        sentence = (
            f"A row accepted{where} is {depth} generations away from real rows, {most} at most were to be; "
            f"{_percent(figures['deeper_than_1'])} of the accepted rows descend from made ones. Show teachers real rows (`show: seeds`), "
            "or raise watch.depth_at_most."
        )
        raised.append(_alarm("depth_at_most", number, depth, most, sentence))
    share, ceiling = figures.get("teacher_share"), watch.teacher_at_most
    if share is not None and ceiling is not None and share > ceiling:
        sentence = (
            f"The teacher {figures['teacher']} made {_percent(share, ceiling)} of the accepted rows{where}, {_percent(ceiling)} at most "
            "were to be its own. Give others more weight, see why their rows are rejected, or raise watch.teacher_at_most."
        )
        raised.append(_alarm("teacher_at_most", number, share, ceiling, sentence, figures["teacher"]))
    tail, floor = figures.get("tail"), watch.tail_at_least
    if tail is not None and floor is not None and tail < floor:
        sentence = (
            f"The rare is missing: {_percent(tail, floor)} of the accepted rows{where} lie where the outermost {_percent(OUTER)} of the "
            f"real rows do, {_percent(floor)} at least were to. Ask for unusual cases (axes), show unusual seeds, see what filters reject "
            "there, or lower watch.tail_at_least."
        )
        raised.append(_alarm("tail_at_least", number, tail, floor, sentence))
    return raised


def _drop(
    now: Mapping[str, Any], before: Mapping[str, Any], rows: str, watch: Watch, number: int | None, who: str, when: str, mend: str
) -> list[Alarm]:
    most = watch.diversity_drop_at_most
    drops = {name: 1 - now[name] / before[name] for name in COMPARED if name in now and before.get(name)}
    if most is None or not drops:
        return []
    name = max(drops, key=lambda name: drops[name])
    if (drop := drops[name]) <= most:
        return []
    sentence = (
        f"{who} are {_percent(drop, most)} less varied ({COMPARED[name]} {now[name]:.2f}, {before[name]:.2f} {when}; {rows}). "
        f"{mend}, or raise watch.diversity_drop_at_most ({most:g})."
    )
    return [_alarm("diversity_drop_at_most", number, drop, most, sentence)]


def _repeating(teachers: Mapping[str, Mapping[str, int]], watch: Watch, number: int) -> list[Alarm]:
    raised: list[Alarm] = []
    if (most := watch.repeats_at_most) is None:
        return raised
    for name, told in sorted(teachers.items()):
        made, doubled = told["made"], told["duplicates"]
        if made >= MADE_LEAST and (share := doubled / made) > most:
            sentence = (
                f"The teacher {name} repeats: {doubled} of {made} samples that it made in round {number} ({_percent(share, most)}) were "
                f"there before, {_percent(most)} at most were to be. Effort goes to others. Vary what it is asked (axes, seeds), raise "
                "its temperature, or raise watch.repeats_at_most."
            )
            raised.append(_alarm("repeats_at_most", number, share, most, sentence, name))
    return raised


def _alarm(name: str, number: int | None, value: float, threshold: float, sentence: str, teacher: str | None = None) -> Alarm:
    return Alarm(name, number, float(value), float(threshold), STOPS[name], sentence, teacher)


def _rounds(figures: Mapping[str, Any]) -> str:
    first, last = figures["rounds"]
    return f"round {first}" if first == last else f"rounds {first} to {last}"


def _percent(share: float, threshold: float | None = None) -> str:
    """A share as people read it, with a decimal where it is small or would look the same as its threshold."""
    near = threshold is not None and round(100 * share) == round(100 * threshold)
    return f"{100 * share:.1f}%" if near or (0 < share < 0.1 and round(1000 * share) % 10) else f"{100 * share:.0f}%"

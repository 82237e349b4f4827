"""Where a run stands between two rounds: what the target still lacks, what was tried for it, and what the next round is to bring.

Everything is computed from what earlier rounds left on disk, so that a round that is done again aims at the same and takes the same.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from factory import aim
from factory.cells import CLUSTER, LABEL, REST, SPARED, Cell, Grid, by_value, cells_of, grid_of, how_many, missing
from factory.choose import select
from factory.errors import RunError
from factory.recipe import Recipe
from factory.records import TARGET, RunFolder
from factory.rows import read_samples
from factory.stage import Effort, Filter, Need, Tried, Vectors
from factory.store import SAMPLES, verdicts_from

Embed = Callable[[Sequence[str]], Vectors]

EXEMPLARS = 4  # real rows that show what a cell lacks
REJECTED, OF_A_REASON = 6, 2  # rejected samples that a teacher is told of, and of those at most so many for the same reason
REASONS = 3  # the commonest that an explanation names
_CLIPPED = 300  # characters of such a sample


@dataclass(frozen=True)
class Standing:
    """A run before round `number`: its cells, and the rows that are good, that is, that every filter kept."""

    recipe: Recipe
    record: RunFolder
    number: int
    grid: Grid
    good: pl.DataFrame  # as SAMPLES: made in earlier rounds, whether or not the target took them
    names: Mapping[str, str]  # of clusters

    @cached_property
    def cells(self) -> list[Cell | None]:
        """The cell of each good row; None: it has a value for which the target has no room."""
        return cells_of(self.good, self.grid, self.record.homes(self.number - 1))

    @cached_property
    def there(self) -> Counter[Cell]:
        return Counter(cell for cell in self.cells if cell is not None)

    @cached_property
    def taken(self) -> dict[Cell, int]:
        """How many rows of each cell the target takes of those that are there."""
        return how_many(self.grid, self.there)

    @property
    def accepted(self) -> int:
        return sum(self.taken.values())

    @property
    def met(self) -> bool:
        return self.accepted >= self.grid.accepted

    @cached_property
    def lacking(self) -> Counter[Cell]:
        """The rows that are missing, by cell: enough of them to choose from, as `oversample` says."""
        lacking = _dealt(self.recipe, self.grid, self.there, self.number)
        # Of no value too few, and yet the target is not met: rows are there, but not in cells that go together.
        return lacking if self.met or lacking else _dealt(self.recipe, self.grid, self.taken, self.number)

    @property
    def plenty(self) -> bool:
        """Whether there are nearly as many rows to choose from as were wished for: the last tenth would cost rounds of a few rows each."""
        return self.lacking.total() <= SPARED * self.grid.accepted * self.recipe.target.oversample

    @cached_property
    def only_soft(self) -> bool:
        """Whether all that is still missing is missing in dimensions that may give way."""
        hard = Grid(self.grid.accepted, {name: quota for name, quota in self.grid.quotas.items() if name not in self.grid.soft})
        there = Counter(cell for cell in cells_of(self.good, hard, {}) if cell is not None)
        return bool(self.grid.soft) and not missing(hard, there, random.Random(0), self.recipe.target.oversample)

    @cached_property
    def tried(self) -> pl.DataFrame:
        """What earlier rounds asked for and got, as `aim.TRIED`."""
        return tried(self.record, self.number, self.grid)

    @cached_property
    def over(self) -> set[str]:
        """The cells, by their names, in which nothing comes any more."""
        return aim.given_up(self.tried, [aim.aim_of(self.grid, cell) for cell in self.lacking])

    def needs(self, embed: Embed) -> dict[str, tuple[Need, ...]]:
        """What each generator's line is to bring in this round."""
        lacking, _ = aim.servable(
            {cell: n for cell, n in self.lacking.items() if aim.aim_of(self.grid, cell) not in self.over}, self.grid, self.recipe.efforts
        )
        return _orders(self.recipe, self.grid, self.tried, self.number, lacking, {cell: self._place(cell, embed) for cell in lacking})

    def _place(self, cell: Cell, embed: Embed) -> Need:
        place, name = aim.as_place(self.grid, cell), aim.aim_of(self.grid, cell)
        if place.cluster is not None:
            place = replace(place, name=self.names.get(place.cluster, ""), exemplars=self._members(place.cluster))
        if self.tried.filter(pl.col("aim") == name).is_empty():
            return place
        if place.cluster is None:
            place = replace(place, exemplars=self._least_covered(place, embed))
        return replace(place, tried=self._rejected(name))

    def _members(self, cluster: str) -> tuple[str, ...]:
        """The real rows of a cluster; those that were made, where it has none."""
        homes = self.record.homes(self.number - 1)
        here = [sample for sample, home in homes.items() if home == cluster]
        real = self.record.of_fate("real").filter(pl.col("id").is_in(here))["id"].sort().to_list()
        return tuple(real or sorted(here)[:EXEMPLARS])

    def _least_covered(self, place: Need, embed: Embed) -> tuple[str, ...]:
        """The real rows of a place that the good ones are least like: half of them, at most four."""
        of_place = pl.lit(True) if place.label is None else pl.col("label") == place.label
        real = self.record.of_fate("real").filter(of_place).sort("id")
        if real.is_empty():
            return ()
        good = self.good.filter(of_place)
        near = np.zeros(real.height)
        if good.height:
            near = (embed(real["input"].to_list()) @ embed(good["input"].to_list()).T).max(axis=1)
        first = np.argsort(near, kind="stable")[: min(EXEMPLARS, (real.height + 1) // 2)]
        return tuple(real["id"].gather(first))

    def _rejected(self, name: str) -> tuple[Tried, ...]:
        """Some of what was rejected at a cell and why, the latest first: of every reason two at most.

        What filters rejected that may tell no teacher (it was like a test row, or held somebody's data) is not among it.
        """
        return tuple(Tried(text, why) for text, why in self._rejects.filter(pl.col("aim") == name).select("text", "why").iter_rows())

    @cached_property
    def _rejects(self) -> pl.DataFrame:
        private = [line.folder for line in self.recipe.stages if isinstance(line.stage, Filter) and not line.stage.tells]
        rejected = (
            self.record.samples.filter((pl.col("round") < self.number) & (pl.col("origin") == "made"))
            .join(self.record.fates.filter((pl.col("fate") == "rejected") & ~pl.col("by").is_in(private)), on="id")
            .join(self._aims, on="call")
            .sort("aim", "reason", "round", "id", descending=[False, False, True, False], nulls_last=True)
            .group_by("aim", "reason", maintain_order=True)
            .head(OF_A_REASON)
            .sort("aim", "round", "id", descending=[False, True, False])
            .group_by("aim", maintain_order=True)
            .head(REJECTED)
        )
        details = self.record.verdicts.join(rejected.select(sample="id", by="by"), on=["sample", "by"], how="semi")
        twins = details.select("sample", "by", twin=pl.col("detail").str.json_path_match("$.twin")).unique(["sample", "by"], keep="last")
        told = self.record.samples.filter(~pl.col("holdout")).select(twin="id", like="input")  # a row set aside is told to no teacher
        reason = pl.col("reason").fill_null("rejected")
        return (
            rejected.join(twins.join(told, on="twin"), left_on=["id", "by"], right_on=["sample", "by"], how="left", maintain_order="left")
            .with_columns(why=pl.when(pl.col("like").is_not_null()).then(pl.format("{}: {}", reason, _clip("like"))).otherwise(reason))
            .select("aim", text=_clip("input"), why="why")
        )

    @cached_property
    def _aims(self) -> pl.DataFrame:
        return aims_of(self.record, self.number, self.grid).select("call", "aim")

    def explain(self) -> list[dict[str, Any]]:
        """Of every value of every dimension: its `name`, `wanted`, `have`, `good`, what was tried for it, and what the rest would cost.

        `to_get` is what is still missing: `rows`, the `calls` and `micro_usd` that they would take at the yield so far; those two are
        None where nothing good has come (or a price is unknown).
        """
        have, good = (by_value(self.grid, cells) for cells in (self.taken, self.there))
        entries = [(name, value, wanted) for name, quota in self.grid.quotas.items() for value, wanted in quota.items()]
        if not entries:
            return [self._entry("", "", self.grid.accepted, self.accepted, self.good.height, self.tried)]
        return [
            self._entry(name, value, wanted, have[name][value], good[name][value], self._of_value(name, value))
            for name, value, wanted in entries
        ]

    def _of_value(self, name: str, value: str) -> pl.DataFrame:
        """What was tried for one value of a dimension."""
        aims = [a for a in self.tried["aim"].unique() if json.loads(a).get(name, REST) == value]
        return self.tried.filter(pl.col("aim").is_in(aims))

    def _entry(self, name: str, value: str, wanted: int, have: int, good: int, tried: pl.DataFrame) -> dict[str, Any]:
        sums = tried.select(pl.col("calls", "tried", "made").sum()).row(0, named=True)
        money = None if tried["micro_usd"].null_count() else int(tried["micro_usd"].sum())
        came, short = int(tried["good"].sum()), wanted - have
        aims = tried["aim"].unique().to_list()
        reasons = self._reasons.filter(pl.col("aim").is_in(aims)).group_by("reason").agg(pl.col("n").sum())
        to_get = {
            "rows": short,
            "calls": -(-short * sums["calls"] // came) if came else None,
            "micro_usd": -(-short * money // came) if came and money is not None else None,
        }
        return {
            "dimension": name,
            "value": "" if value == REST else value,
            "name": _said(self, name, value) if name else "",
            "wanted": wanted,
            "have": have,
            "good": good,
            **sums,
            "came": came,
            "micro_usd": money,
            "rejected": dict(reasons.sort("n", "reason", descending=[True, False]).head(REASONS).iter_rows()),
            "given_up": bool(aims) and set(aims) <= self.over,
            "to_get": to_get if short > 0 else None,
        }

    @cached_property
    def _reasons(self) -> pl.DataFrame:
        fates = self.record.fates.filter(pl.col("fate") == "rejected").select("id", "reason")
        made = self.record.samples.filter(pl.col("round") < self.number).select("id", "call").join(fates, on="id").select("call", "reason")
        lost = self.record.failures.filter((pl.col("round") < self.number) & pl.col("call").is_not_null()).select("call", "reason")
        both = pl.concat([made, lost]).join(self._aims, on="call")
        return both.group_by("aim", pl.col("reason").fill_null("rejected")).agg(n=pl.len())


def _clip(column: str) -> pl.Expr:
    return pl.col(column).str.slice(0, _CLIPPED)


def standing(recipe: Recipe, record: RunFolder, seeds: pl.DataFrame, number: int, *, good: pl.DataFrame | None = None) -> Standing:
    """Where a run stands before round `number`. `good`: its good rows, where the target has not yet spoken on those of the last round."""
    if good is None:
        good = record.of_fate("accepted", "surplus").filter(pl.col("round") < number)
    names = record.cluster_names(number - 1)
    grid = grid_of(recipe.target, seeds, recipe.axes, _shares(recipe, record, number - 1, names))
    return Standing(recipe, record, number, grid, good, names)


def check_target(recipe: Recipe, seeds: pl.DataFrame, holdout: int) -> None:
    """Before anything is asked: RunError where the target can't be reached, whatever teachers write."""
    grid = grid_of(recipe.target, seeds, recipe.axes)
    _, unserved = aim.servable(_dealt(recipe, grid, {}, 1), grid, recipe.efforts)
    for cell in unserved:
        raise _unservable(grid, cell, recipe.efforts)
    share = recipe.release.real_share
    if isinstance(share, float):
        needed, there = round(share * recipe.target.accepted / (1 - share)), seeds.height + holdout
        if needed > there:
            raise RunError(
                f"release.real_share {share:g} of {recipe.target.accepted} made rows needs {needed} real ones, and there are {there}",
                next="Lower it, ask for fewer rows, or bring more seeds.",
            )


def _unservable(grid: Grid, cell: Cell, lines: Mapping[str, Effort]) -> RunError:
    place = aim.as_place(grid, cell)
    without = ", ".join(f"{name} {' or '.join(values)}" for name, values in place.without.items())
    of = aim.told(aim.aim_of(grid, cell)) if grid.values(cell) else f"others than {without}"
    mend = "Put these values into the axes of one line, or give their quotas to dimensions that need not meet."
    if not any(line.makes(place) for line in lines.values()):
        mend = f"No line makes such rows: add one (`- {'contrast' if place.kind == 'preference' else 'compose'}: {{}}`)."
    return RunError(f"no generator can make rows of {of}", where="target", next=mend)


def reference_of(recipe: Recipe) -> pl.DataFrame:
    """The real inputs whose distribution the target follows, as `SAMPLES`; no row where it follows none."""
    path = recipe.target.reference
    return SAMPLES.to_frame() if path is None else read_samples(path)


def first_needs(recipe: Recipe, seeds: pl.DataFrame) -> dict[str, tuple[Need, ...]]:
    """What the first round is to bring, by line: what `Standing.needs` says where nothing was tried."""
    grid = grid_of(recipe.target, seeds, recipe.axes)
    lacking, _ = aim.servable(_dealt(recipe, grid, {}, 1), grid, recipe.efforts)
    return _orders(recipe, grid, aim.TRIED.to_frame(), 1, lacking, {cell: aim.as_place(grid, cell) for cell in lacking})


def _orders(
    recipe: Recipe, grid: Grid, tried: pl.DataFrame, number: int, lacking: Mapping[Cell, int], place: Mapping[Cell, Need]
) -> dict[str, tuple[Need, ...]]:
    seed, explore = f"{recipe.seed}/aim/{number}", recipe.target.explore
    return aim.orders(lacking, grid, recipe.efforts, aim.Yields(tried, number), seed, explore=explore, place=place)


def _dealt(recipe: Recipe, grid: Grid, there: Mapping[Cell, int], number: int) -> Counter[Cell]:
    """What is missing before a round; before clusters are known, where rows are to be spread over them, no more than is taken."""
    blind = CLUSTER in recipe.target.balanced and CLUSTER not in grid.quotas
    run = max((effort.per_call for effort in recipe.efforts.values()), default=1)
    return missing(grid, there, random.Random(f"{recipe.seed}/cells/{number}"), 1 if blind else recipe.target.oversample, run)


def _shares(recipe: Recipe, record: RunFolder, upto: int, names: Mapping[str, str]) -> dict[str, float]:
    """The share of each cluster in the target, by its number; empty where no dimension is clusters, or there are none yet."""
    if CLUSTER not in recipe.target.balanced or not names:
        return {}
    how = recipe.target.proportions or ("proportional" if recipe.target.reference else "uniform")
    found = record.reference_counts(upto)
    if not found:  # a cluster of made rows alone is no place that anybody asked for
        real = record.real_in_clusters(upto)
        found = {number: 1 for number in names if real.get(number)}
    shares = {number: float(found.get(number, 0)) for number in sorted(names, key=int)}
    if how == "uniform":
        return {number: float(share > 0) for number, share in shares.items()}
    if isinstance(how, str):
        return shares
    named = {number: how[name] for number, name in names.items() if name in how}
    if strangers := set(how) - set(names.values()):
        there = ", ".join(sorted(names.values()))
        raise RunError(f"target.proportions names {min(strangers)!r}, and no cluster is called so", next=f"There are: {there}.")
    rest = sum(share for number, share in shares.items() if number not in named)
    left = max(0.0, 1 - sum(named.values()))
    return {number: named.get(number, left * share / rest if rest else 0.0) for number, share in shares.items()}


def aims_of(record: RunFolder, number: int, grid: Grid) -> pl.DataFrame:
    """What every call of earlier rounds was put for: `call`, `aim`, `line`, `teacher`, `round`, `micro_usd`.

    Where a generator did not say, the label of what came tells, as far as the target is by label.
    """
    labels = record.samples.filter(pl.col("origin") == "made").group_by("call").agg(pl.col("label").min())
    known = list(grid.quotas.get(LABEL, ()))
    by_label = {label: json.dumps({LABEL: label}, ensure_ascii=False) for label in known}
    guess = pl.col("label").replace_strict(by_label, default="{}", return_dtype=pl.String).fill_null("{}")
    return (
        record.costs.filter(pl.col("round") < number)
        .join(labels, on="call", how="left")
        .select("call", "teacher", "round", "micro_usd", line="stage", aim=pl.when(pl.col("aim") == "").then(guess).otherwise("aim"))
    )


def tried(record: RunFolder, number: int, grid: Grid) -> pl.DataFrame:
    """What was asked for and what it gave, as `aim.TRIED`, one row for each line, teacher, cell and round."""
    calls = aims_of(record, number, grid)
    good = record.of_fate("accepted", "surplus").filter(pl.col("round") < number)
    cells = cells_of(good, grid, record.homes(number - 1))
    landed = [json.dumps({} if cell is None else dict(zip(grid.quotas, cell, strict=True)), ensure_ascii=False) for cell in cells]
    hits = good.select("call").with_columns(cell=pl.Series(landed, dtype=pl.String)).join(calls.select("call", "aim"), on="call")
    pairs = hits.select("aim", "cell").unique()
    hit = [_hit(grid, *pair) for pair in pairs.iter_rows()]
    hits = hits.join(pairs.filter(pl.Series(hit, dtype=pl.Boolean)), on=["aim", "cell"], how="semi")
    made = record.samples.filter(pl.col("origin") == "made")
    counts = [frame.group_by("call").agg(pl.len().alias(name)) for frame, name in ((made, "made"), (hits, "good"))]
    lost = record.failures.drop_nulls("call").group_by("call").agg(lost=pl.len())
    for frame in (*counts, lost):
        calls = calls.join(frame, on="call", how="left")
    calls = calls.with_columns(pl.col("made", "good", "lost").fill_null(0))
    unknown = pl.col("micro_usd").is_null().any()
    sums = calls.group_by("line", "teacher", "aim", "round").agg(
        calls=pl.len().cast(pl.Int64),
        tried=pl.max_horizontal(pl.col("made") + pl.col("lost"), 1).sum().cast(pl.Int64),
        made=pl.col("made").sum().cast(pl.Int64),
        good=pl.col("good").sum().cast(pl.Int64),
        micro_usd=pl.when(~unknown).then(pl.col("micro_usd").sum()),
    )
    return sums.select(pl.col(name).cast(dtype) for name, dtype in aim.TRIED.items()).sort("round", "line", "teacher", "aim")


def _hit(grid: Grid, aimed: str, landed: str) -> bool:
    """Whether a row of this cell is what was aimed at, in the dimensions that the target has by now."""
    has = json.loads(landed)
    return all(has.get(name) == value for name, value in json.loads(aimed).items() if name in grid.quotas)


def counted(at: Standing, rows: pl.DataFrame) -> dict[str, int]:
    """How many of some new rows each of the places has that `view` names, but for clusters, which they have none of yet."""
    found: Counter[str] = Counter()
    for name in at.grid.quotas:
        if name != CLUSTER:
            one = Grid(at.grid.accepted, {name: at.grid.quotas[name]})
            cells = Counter(cell for cell in cells_of(rows, one, {}) if cell is not None)
            found.update({_said(at, name, value): n for (value,), n in cells.items()})
    return dict(found)


def _said(at: Standing, name: str, value: str) -> str:
    """What people call one value of a dimension: a label as it is, others with the dimension before; a nameless cluster its number."""
    said = at.names.get(value, "") if name == CLUSTER else "others" if value == REST else value
    return said if name == LABEL else f"{name}: {said}" if said else f"{name} {value}"


def view(at: Standing) -> dict[str, tuple[int, int]]:
    """Rows had and wanted, by what people call the cells: labels as they are, other dimensions with their names before."""
    have = by_value(at.grid, at.taken)
    return {_said(at, name, value): (have[name][value], n) for name, quota in at.grid.quotas.items() for value, n in quota.items()}


def choose(at: Standing, quality: pl.Series, real: pl.DataFrame, embed: Embed) -> pl.DataFrame:
    """The target's verdicts on the good rows: of each cell as many as it is to hold, the best and least alike (`factory/choose.py`).

    `quality`: 0 to 1, aligned with `at.good`, which is sorted by id. Rows beyond a place's number get keep=False with the reason "place
    full"; rows of no place of the target, "no such place".
    """
    rows: dict[Cell, list[int]] = {}
    for row, cell in enumerate(at.cells):
        if cell is not None:
            rows.setdefault(cell, []).append(row)
    numbers = [(np.array(rows[cell], np.intp), at.taken.get(cell, 0)) for cell in sorted(rows)]
    keep = np.zeros(at.good.height, bool)
    if all(len(here) == n for here, n in numbers):  # nothing to choose from, and no vector is needed
        keep[[row for here in rows.values() for row in here]] = True
    else:
        vectors, held = embed(at.good["input"].to_list()), embed(real["input"].to_list())
        keep[select(numbers, quality.to_numpy(), vectors, held)] = True
    place = pl.Series([cell is not None for cell in at.cells], dtype=pl.Boolean)
    kept = pl.Series(keep)
    reason = pl.select(
        pl.when(kept).then(pl.lit(None, pl.String)).when(place).then(pl.lit("place full")).otherwise(pl.lit("no such place"))
    ).to_series()
    return verdicts_from(at.good["id"], keep=kept, reason=reason, score=quality).with_columns(by=pl.lit(TARGET))

"""What a target asks for, cell by cell: how many rows of each label, axis value, cluster or kind, and which of them are missing.

A *dimension* divides the accepted rows into values, each with a whole number of rows, and these add up to the target. A *cell* is
one value in every dimension. A target without dimensions has one cell. Pure functions; nothing here reads or writes.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.errors import RunError
from factory.refusal import refusal_pattern
from schemas.recipe import Target

Cell = tuple[str, ...]  # a value in each dimension

REST = "\0"  # the value under which falls what has no quota of its own; no label that a person wrote
LABEL, CLUSTER, KIND, REFUSAL = "label", "cluster", "kind", "refusal"
SPARED = 0.1  # of the rows that are wished for to choose from: as few may be missing
GIVEN = (KIND, REFUSAL)  # what rows differ in whatever a recipe varies


@dataclass(frozen=True)
class Grid:
    """The dimensions of a target. `quotas`: of each, the rows of every value, which add up to `accepted`.

    `soft`: dimensions that are aimed at, but give way where the target could not be met otherwise.
    """

    accepted: int
    quotas: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    soft: frozenset[str] = frozenset()

    def values(self, cell: Cell) -> dict[str, str]:
        """The value of a cell in each dimension, but for those of no quota of their own."""
        return {name: value for name, value in zip(self.quotas, cell, strict=True) if value != REST}

    def wanted(self, oversample: float = 1) -> dict[str, dict[str, int]]:
        """Rows that each value is to have to choose from: `oversample` times its quota, rounded up."""
        return {name: {value: math.ceil(n * oversample - 1e-9) for value, n in quota.items()} for name, quota in self.quotas.items()}


def grid_of(target: Target, seeds: pl.DataFrame, axes: Mapping[str, Sequence[str]], clusters: Mapping[str, float] | None = None) -> Grid:
    """The cells of a target. `axes`: values of every axis that a generator varies; `clusters`: the share of each, once there are some.

    RunError where a quota names a label, axis or value that nothing can give, or quotas ask for more rows than the target.
    """
    known: dict[str, list[str]] = {name: list(values) for name, values in axes.items()} | {REFUSAL: ["yes", "no"]}
    known[LABEL] = sorted(seeds["label"].drop_nulls().unique().to_list())
    known[KIND] = [*sorted({*seeds["kind"]} - {"preference"} or {"chat"}), "preference"]  # what is made of texts is text
    known[CLUSTER] = sorted(clusters or {})
    balanced = target.balanced
    quotas: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys((*balanced, *target.quotas)):
        if name == CLUSTER:
            if clusters:
                quotas[name] = apportion(target.accepted, clusters)
            continue
        if name == LABEL and not known[LABEL]:
            raise RunError(
                "target.balance is 'label', but no seed has a label"
                if LABEL in balanced
                else "target.quotas is by label, but no seed has one",
                next="Name the column with `seeds: {label: …}`, or leave it out.",
            )
        if name not in known:
            there = ", ".join([LABEL, CLUSTER, *GIVEN, *axes])
            raise RunError(f"the target is by {name!r}, which no generator varies", next=f"There are {there}: name an axis of a generator.")
        quotas[name] = _quota(target, name, known[name], target.quotas.get(name, {}), fill=name in balanced)
    soft = frozenset({CLUSTER} if target.reference is None and target.proportions is None else ())
    return Grid(target.accepted, quotas, soft & quotas.keys())


def _quota(target: Target, name: str, known: Sequence[str], given: Mapping[str, float], *, fill: bool) -> dict[str, int]:
    """Whole rows of each value: those that are given (rows, or shares below one), and of the rest, equal shares or none."""
    if strangers := [value for value in given if value not in known]:
        raise RunError(
            f"target.quotas.{name} names {strangers[0]!r}, and nothing has that value", next=f"There are {', '.join(known) or 'none'}."
        )
    rows = {value: round(n * target.accepted) if n < 1 else int(n) for value, n in given.items()}
    rest = target.accepted - sum(rows.values())
    others = [value for value in known if value not in rows] if fill else []
    if rest < 0 or (rest and len(rows) == len(known)):
        raise RunError(
            f"target.quotas.{name} asks for {sum(rows.values())} rows, and the target is {target.accepted}",
            next="Make them add up, or leave a value out: it takes what is left.",
        )
    if others:
        return {**rows, **apportion(rest, dict.fromkeys(others, 1.0))}
    return rows | ({REST: rest} if rest else {})


def apportion(rows: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole rows in proportion to shares, which add up: by the largest remainders (Hamilton's method); ties go to the first."""
    total = sum(shares.values())
    if not total:
        return dict.fromkeys(shares, 0)
    exact = {value: rows * share / total for value, share in shares.items()}
    whole = {value: math.floor(n + 1e-9) for value, n in exact.items()}
    first = sorted(exact, key=lambda value: -(exact[value] - whole[value]))
    for value in first[: rows - sum(whole.values())]:
        whole[value] += 1
    return whole


def cells_of(frame: pl.DataFrame, grid: Grid, homes: Mapping[str, str]) -> list[Cell | None]:
    """The cell of each row; None: in some dimension it has a value that the target has no room for. `homes`: the cluster of each id."""
    columns = [_column(frame, name, grid, homes) for name in grid.quotas]
    if not columns:
        return [()] * frame.height
    rows = zip(*(column.to_list() for column in columns), strict=True)
    return [None if None in row else row for row in rows]


def _column(frame: pl.DataFrame, name: str, grid: Grid, homes: Mapping[str, str]) -> pl.Series:
    if name == CLUSTER:
        value = pl.col("id").replace_strict(dict(homes), default=None, return_dtype=pl.String)
    elif name in (LABEL, KIND):
        value = pl.col(name)
    elif name == REFUSAL:
        value = pl.when(pl.col("output").str.contains(refusal_pattern())).then(pl.lit("yes")).otherwise(pl.lit("no"))
    else:
        axes = pl.Struct({name: pl.String()})
        value = pl.col("axes").str.json_decode(axes).struct.field(name)
    rest = pl.lit(REST if REST in grid.quotas[name] else None, pl.String)
    return frame.select(pl.when(value.is_in(list(grid.quotas[name]))).then(value).otherwise(rest).alias(name)).to_series()


def by_value(grid: Grid, cells: Mapping[Cell, int]) -> dict[str, dict[str, int]]:
    """How many rows each value of each dimension has, from how many each cell has."""
    found: dict[str, dict[str, int]] = {name: dict.fromkeys(quota, 0) for name, quota in grid.quotas.items()}
    for cell, n in cells.items():
        for name, value in zip(grid.quotas, cell, strict=True):
            found[name][value] += n
    return found


def how_many(grid: Grid, there: Mapping[Cell, int]) -> dict[Cell, int]:
    """How many rows to take of each cell, of those that are there: as many in all as no quota forbids.

    One dimension: what is there, up to its quota. Several: integer programs (HiGHS, Huangfu and Hall 2018), first for most rows under all
    quotas, then for the table of so many rows that is nearest to one of independent dimensions: else every label might come in a tone
    of its own. Where a soft dimension keeps the target from being met, it gives way.
    """
    cells = sorted(cell for cell, n in there.items() if n)
    taken = _most(grid, cells, there, list(grid.quotas))
    if sum(taken.values()) < grid.accepted and grid.soft:
        hard = [name for name in grid.quotas if name not in grid.soft]
        taken = _most(grid, cells, there, hard, at_least=taken)
    return taken


def _most(
    grid: Grid, cells: Sequence[Cell], there: Mapping[Cell, int], dimensions: Sequence[str], at_least: Mapping[Cell, int] | None = None
) -> dict[Cell, int]:
    floor = [(at_least or {}).get(cell, 0) for cell in cells]
    if not cells:
        return {}
    if not dimensions:
        return _greedy(cells, there, floor, {(): grid.accepted}, [()] * len(cells))
    place = list(grid.quotas)
    if len(dimensions) == 1:
        at = place.index(dimensions[0])
        return _greedy(
            cells, there, floor, {(value,): n for value, n in grid.quotas[dimensions[0]].items()}, [(cell[at],) for cell in cells]
        )
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, hstack, vstack

    k = len(cells)
    rows, most, alone = [], [], np.full(k, float(grid.accepted))
    for name in dimensions:
        at = place.index(name)
        for value, n in grid.quotas[name].items():
            inside = np.array([float(cell[at] == value) for cell in cells])
            rows.append(inside)
            most.append(float(n))
            alone[inside > 0] *= n / grid.accepted
    quotas = csr_array(np.array(rows))
    low, high = np.array(floor, float), np.array([there[cell] for cell in cells], float)

    def solved(
        costs: NDArray[np.float64], *constraints: Any, upper: NDArray[np.float64], lower: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        found = milp(costs, constraints=constraints, bounds=Bounds(lower, upper), integrality=(np.arange(len(costs)) < k).astype(int))
        if found.x is None:  # taking nothing always fits, so this is a fault of ours
            raise RuntimeError(f"no choice fits the target: {found.message}")
        return np.asarray(found.x)

    total = round(solved(-np.ones(k), LinearConstraint(quotas, ub=most), upper=high, lower=low).sum())
    # The second has k more variables, the distances to the table of independent dimensions; later cells weigh a trifle more, so that no two
    # answers are equally good.
    wide, eye = hstack([quotas, csr_array(quotas.shape)]), eye_array(k)
    costs = np.concatenate([np.arange(k) * 1e-7, np.ones(k)])
    apart = LinearConstraint(vstack([hstack([eye, -eye]), hstack([-eye, -eye])]), ub=np.concatenate([alone, -alone]))
    whole = LinearConstraint(np.concatenate([np.ones(k), np.zeros(k)]), lb=total, ub=total)
    far = np.full(k, np.inf)
    x = solved(
        costs, LinearConstraint(wide, ub=most), apart, whole, upper=np.concatenate([high, far]), lower=np.concatenate([low, np.zeros(k)])
    )
    return {cell: round(n) for cell, n in zip(cells, x[:k], strict=True) if round(n)}


def _greedy(
    cells: Sequence[Cell], there: Mapping[Cell, int], floor: Sequence[int], quota: Mapping[Cell, int], groups: Sequence[Cell]
) -> dict[Cell, int]:
    """Of one dimension: each value's quota, shared out over its cells as evenly as what is there allows."""
    taken = dict(zip(cells, floor, strict=True))
    for group, n in quota.items():
        open_cells = [cell for cell, of in zip(cells, groups, strict=True) if of == group]
        left = n - sum(taken[cell] for cell in open_cells)
        while left > 0 and (open_cells := [cell for cell in open_cells if taken[cell] < there[cell]]):
            each = max(1, left // len(open_cells))
            for cell in open_cells:
                more = min(each, there[cell] - taken[cell], left)
                taken[cell] += more
                left -= more
    return {cell: n for cell, n in taken.items() if n}


def missing(grid: Grid, there: Mapping[Cell, int], rng: random.Random, oversample: float = 1, run: int = 1) -> Counter[Cell]:
    """The cells whose rows are still missing, and how many of each, so that every value of every dimension gets what it lacks.

    Each dimension's lacking values are one deck of cards, shuffled in runs of `run` equal ones (what a call can bring); one card of
    every deck makes a row's cell. A dimension that lacks less than another is filled up with its values in the proportions of their
    quotas. Whether an answer refuses, which nobody can be asked for, counts in how many rows are missing; in the cells it stands as `REST`.
    """
    have, wanted = by_value(grid, there), grid.wanted(oversample)
    if not grid.quotas:
        lacks = max(0, math.ceil(grid.accepted * oversample - 1e-9) - sum(there.values()))
        return Counter({(): lacks} if lacks else {})
    lacking = {name: {v: max(0, n - have[name][v]) for v, n in quota.items()} for name, quota in wanted.items()}
    most = max(sum(lack.values()) for lack in lacking.values())
    decks = []
    for name, lack in lacking.items():
        fill = apportion(most - sum(lack.values()), grid.quotas[name])
        whole = {REST: most} if name == REFUSAL else {value: lack[value] + fill[value] for value in lack}
        runs = [[value] * min(run, n - start) for value, n in whole.items() for start in range(0, n, run)]
        if len(grid.quotas) > 1:
            rng.shuffle(runs)
        decks.append([value for cards in runs for value in cards])
    return Counter(zip(*decks, strict=True))

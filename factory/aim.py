"""Where the next round's effort goes: how much of it to each template, teacher and cell, by what each has given for its price so far.

A bandit whose arms are (generator, teacher) at a cell. What a call was put for stands with its cost (`COSTS`), so evidence is read
from the disk: a round that is done again aims at the same.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from factory.cells import CLUSTER, KIND, LABEL, REFUSAL, REST, Cell, Grid, apportion
from factory.stage import Effort, Need

MEMORY = 0.7  # what a round weighs against the one after it: a teacher that begins to repeat itself is found out in two rounds
PRIOR = 4.0  # samples that the belief about an arm at a new cell weighs: what the arm gave elsewhere, times how hard the cell is
DRAWS = 64  # a cell's effort is shared out in so many draws
LEAST_RATE = 0.05  # a cell that gives little is asked for at most 20 times what it lacks
UNPROVEN = 0.25  # and one that gave nothing yet for four times: it may never give anything
LOWEST_RATE = 0.0125  # after each round in vain for twice as much, but never for more than 80 times
PATIENCE = 3  # rounds in a row without a good row, after which a cell (or the whole run) is given up
ENOUGH = 60  # samples that were tried in them: of a cell that gives one in twenty, something would have come in 95 of 100 cases
ROWS = 20  # and so many that cells on average would have given as many good rows: where little comes anywhere, more is needed to tell

Numbers = NDArray[np.float64]
Number = TypeVar("Number", float, Numbers)

TRIED = pl.Schema(
    {
        "line": pl.String(),  # the generator's folder
        "teacher": pl.String(),
        "aim": pl.String(),  # the cell that was asked for, as `aim_of`
        "round": pl.Int64(),
        "calls": pl.Int64(),
        "tried": pl.Int64(),  # samples, and whatever was to become one: repeats, what could not be read
        "made": pl.Int64(),
        "good": pl.Int64(),  # that every filter kept, and that are of the cell
        "micro_usd": pl.Int64(),  # null: a price is unknown
    }
)


def aim_of(grid: Grid, cell: Cell) -> str:
    """A cell's name that outlives a round in which dimensions come and go: its values as JSON, by dimension; "{}" anywhere."""
    return json.dumps(grid.values(cell), ensure_ascii=False, sort_keys=True)


def told(aim: str) -> str:
    """A cell's name for people: "tone: angry, label: lost card"; "anywhere"."""
    return ", ".join(f"{name}: {value}" for name, value in json.loads(aim).items()) or "anywhere"


@dataclass(frozen=True)
class Arm:
    """One way to get rows: a generator's line and a teacher. `weight` is its part of the effort before anything is known."""

    line: str
    teacher: str
    weight: float
    fixed: bool = False  # the recipe's own proportions, which no yield changes


def arms_of(efforts: Mapping[str, Effort]) -> list[Arm]:
    """The arms of several generators, by line: weights are parts of the work on what is missing, and may add up to more than one."""
    return [Arm(line, teacher, weight, effort.fixed) for line, effort in efforts.items() for teacher, weight in effort.shares.items()]


@dataclass(frozen=True)
class Yields:
    """What the arms have given, discounted by age: the belief that draws are taken from."""

    tried: pl.DataFrame  # as TRIED
    number: int  # the round that is to be aimed
    _cache: dict[tuple[str | None, str | None, str | None], tuple[float, float]] = field(default_factory=dict)

    def counts(self, line: str | None = None, teacher: str | None = None, aim: str | None = None) -> tuple[float, float]:
        """Discounted good rows and tried samples, of an arm, a cell, or all."""
        key = line, teacher, aim
        if key not in self._cache:
            here = self.tried
            for name, value in (("line", line), ("teacher", teacher), ("aim", aim)):
                here = here if value is None else here.filter(pl.col(name) == value)
            weight = pl.lit(MEMORY).pow(self.number - 1 - pl.col("round"))
            good, tried = here.select((pl.col("good") * weight).sum(), (pl.col("tried") * weight).sum()).row(0)
            self._cache[key] = float(good), float(tried)
        return self._cache[key]

    def least_rate(self, aim: str) -> float:
        """The rate by which a cell is asked for at least: half as high after each round in vain since something came."""
        good = self.tried.filter(pl.col("aim") == aim).group_by("round").agg(pl.col("good").sum()).sort("round")["good"].to_list()
        vain: int = next((n for n, rows in enumerate(reversed(good)) if rows), len(good))
        return float(_least(vain, not good or vain < len(good)))

    def belief(self, arm: Arm, aim: str) -> tuple[float, float]:
        """The beta distribution of good rows a sample tried, of an arm at a cell.

        Beforehand: what the arm gave anywhere, times how much better or worse the cell is for all arms than cells are.
        """
        overall, of_arm, of_cell = _rate(*self.counts(), 0.5), self.counts(arm.line, arm.teacher), self.counts(aim=aim)
        mean = float(_expected(_rate(*of_arm, overall), _rate(*of_cell, overall), overall))
        good, tried = self.counts(arm.line, arm.teacher, aim)
        return mean * PRIOR + good, (1 - mean) * PRIOR + max(tried - good, 0.0)

    def costs(self, arms: Sequence[Arm]) -> NDArray[np.float64]:
        """What a sample of each arm costs: micro-dollars; calls, where money says nothing (free, or a price unknown)."""
        sums = self.tried.group_by("line", "teacher").agg(
            pl.col("calls", "tried").sum(), known=pl.col("micro_usd").is_not_null().all(), spent=pl.col("micro_usd").sum()
        )
        rows = {(row["line"], row["teacher"]): row for row in sums.to_dicts()}
        mine = [rows.get((arm.line, arm.teacher)) for arm in arms]
        priced = all(row is None or (row["known"] and row["spent"] > 0) for row in mine)
        each = [None if row is None else (row["spent"] if priced else row["calls"]) / max(row["tried"], 1) for row in mine]
        seen = [cost for cost in each if cost]
        typical = sum(seen) / len(seen) if seen else 1.0
        return np.array([cost or typical for cost in each])


def _rate(good: Number, tried: Number, prior: float) -> Number:
    """Good rows a sample tried, drawn to a prior that weighs four samples."""
    return (good + PRIOR * prior) / (tried + PRIOR)


def _expected(of_arm: float, of_cell: float | Numbers, overall: float) -> Numbers:
    """The rate of an arm at a cell before it was tried there."""
    return np.asarray(np.clip(of_arm * of_cell / overall, 0.005, 0.995))


def _least(vain: int | NDArray[np.int64], proven: bool | NDArray[np.bool_]) -> Numbers:
    """Half as high after each round in vain, so that what gives nothing is asked for more and more, but not without end."""
    return np.asarray(np.maximum(LOWEST_RATE, np.where(proven, LEAST_RATE, 2 * UNPROVEN) * 0.5**vain))


def rates(good: Numbers, tried: Numbers, vain: NDArray[np.int64], proven: NDArray[np.bool_]) -> Numbers:
    """The rates by which `orders` asks for cells, one each, where a single arm serves them all: for a plan.

    `good` rows and `tried` samples are discounted by age, `vain` are the rounds without a good row since the last one, `proven` says
    whether any ever came.
    """
    overall = _rate(float(good.sum()), float(tried.sum()), 0.5)
    mean = _expected(_rate(float(good.sum()), float(tried.sum()), overall), _rate(good, tried, overall), overall)
    return np.asarray(np.maximum(_least(vain, proven), (mean * PRIOR + good) / (PRIOR + np.maximum(tried, good))))


def effort(arms: Sequence[Arm], aim: str, yields: Yields, rng: np.random.Generator, explore: float) -> dict[Arm, float]:
    """What part of the work on one cell each arm gets; the parts add up to the arms' weights (at most one).

    Before any yield is known, and for fixed arms, the weights. Else Thompson sampling (Thompson 1933; Russo et al. 2018): in each of
    64 draws from the arms' beliefs, the arm with most good rows for its price gets the part. `explore` of the effort is shared out
    by weight whatever the draws say.
    """
    total = min(1.0, sum(arm.weight for arm in arms))
    scale = total / sum(arm.weight for arm in arms)
    free = [arm for arm in arms if not arm.fixed]
    parts = {arm: arm.weight * scale for arm in arms}
    if len(free) < 2 or not yields.counts()[1]:
        return parts
    beliefs = np.array([yields.belief(arm, aim) for arm in free])
    drawn = rng.beta(beliefs[:, 0], beliefs[:, 1], size=(DRAWS, len(free))) / yields.costs(free)
    won = np.bincount(drawn.argmax(axis=1), minlength=len(free)) / DRAWS
    open_to_all = sum(parts[arm] for arm in free)
    weights = np.array([parts[arm] for arm in free]) / open_to_all
    shares = (1 - explore) * won + explore * weights
    return parts | {arm: float(share) * open_to_all for arm, share in zip(free, shares, strict=True)}


def given_up(tried: pl.DataFrame, aims: Sequence[str]) -> set[str]:
    """The cells that gave nothing in the last three rounds in which they were asked for, or one of their values in two cells or more.

    And for which so much was tried that cells as they are on average would have given 20 rows, 60 samples at least.
    """
    came, all_tried = (int(tried[name].sum()) for name in ("good", "tried"))
    enough = max(ENOUGH, ROWS * all_tried / came if came else 0)
    values = {aim: set(json.loads(aim).items()) for aim in {*aims, *tried["aim"]}}

    def nothing(wanted: set[tuple[str, str]], cells: int = 1) -> bool:
        here = tried.filter(pl.col("aim").is_in([aim for aim, has in values.items() if wanted <= has]))
        if here["aim"].n_unique() < cells:
            return False
        rounds = here.group_by("round").agg(pl.col("good", "tried").sum()).sort("round").tail(PATIENCE)
        return rounds.height == PATIENCE and not rounds["good"].sum() and here["tried"].sum() >= enough

    dead = {value for value in set().union(*(values[aim] for aim in aims)) if nothing({value}, 2)}
    return {aim for aim in aims if values[aim] & dead or nothing(values[aim])}


def orders(
    lacking: Mapping[Cell, int],
    grid: Grid,
    lines: Mapping[str, Effort],
    yields: Yields,
    seed: str,
    *,
    explore: float,
    place: Mapping[Cell, Need],
) -> dict[str, tuple[Need, ...]]:
    """The needs of every generator's line, the thinnest first: which cells, how many rows, of which teachers.

    `place`: the need of each cell as far as it is a place (label, axes, cluster, exemplars, what was rejected there). A line gets
    the cells that it can serve. The same evidence and seed give the same orders.
    """
    rng = np.random.default_rng(random.Random(seed).randrange(2**63))
    found: dict[str, list[Need]] = {line: [] for line in lines}
    owed = dict.fromkeys(lines, 0.0)  # by how much a line's whole rows are behind its parts so far
    for cell, rows in sorted(lacking.items(), key=lambda item: (-item[1], item[0])):
        need, aim = place[cell], aim_of(grid, cell)
        arms = [arm for arm in arms_of(lines) if lines[arm.line].serves(need)]
        if not arms:
            continue
        parts = effort(arms, aim, yields, rng, explore)
        rate = None
        if yields.counts()[1]:
            means = {arm: (b := yields.belief(arm, aim))[0] / sum(b) for arm in arms}
            rate = max(yields.least_rate(aim), sum(parts[arm] * means[arm] for arm in arms) / sum(parts.values()))
        of_line = {line: {arm.teacher: parts[arm] for arm in arms if arm.line == line and parts[arm] > 0} for line in found}
        due = {line: rows * sum(mine.values()) for line, mine in of_line.items() if mine}
        whole = apportion(round(sum(due.values())), {line: max(0.0, due[line] + owed[line]) for line in due})
        for line, n in whole.items():
            owed[line] += due[line] - n
            if n:
                found[line].append(replace(need, missing=n, aim=aim, rate=rate, teachers=of_line[line]))
    return {line: tuple(needs) for line, needs in found.items()}


def servable(lacking: Mapping[Cell, int], grid: Grid, lines: Mapping[str, Effort]) -> tuple[Counter[Cell], Counter[Cell]]:
    """The cells that some line can serve, and those that none can, once cells of the latter kind have traded values with others."""

    @cache
    def served(cell: Cell) -> bool:
        place = as_place(grid, cell)
        return any(effort.serves(place) for effort in lines.values())

    if all(map(served, lacking)):
        return Counter(lacking), Counter()
    rows = [cell for cell, n in sorted(lacking.items()) for _ in range(n)]
    for i, cell in enumerate(rows):
        for at, j in ((at, j) for at in range(len(cell)) for j in range(len(rows)) if not served(rows[i])):
            mine, other = rows[i], rows[j]
            traded = (*mine[:at], other[at], *mine[at + 1 :]), (*other[:at], mine[at], *other[at + 1 :])
            if all(map(served, traded)):
                rows[i], rows[j] = traded
                break
    good = Counter(filter(served, rows))
    return good, Counter(rows) - good


def as_place(grid: Grid, cell: Cell) -> Need:
    """A cell as a generator sees it, before anybody knows more of it."""
    values = grid.values(cell)
    without = {
        name: tuple(value for value in grid.quotas[name] if value != REST)
        for name, value in zip(grid.quotas, cell, strict=True)
        if value == REST and name not in (CLUSTER, REFUSAL)
    }
    axes = {name: value for name, value in values.items() if name not in (LABEL, CLUSTER, KIND, REFUSAL)}
    return Need(0, values.get(LABEL), values.get(CLUSTER), values.get(KIND), axes, without)

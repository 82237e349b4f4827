"""Plays a run in numbers, many times over, so that a plan knows what the run may cost and how sure that is.

What is known is in `Outlook`: how many questions a need makes, and what the answers seen so far gave. What is not known is drawn
anew for each play: the rate at which each place's rows pass, which of the seen answers stand for those to come, and how soon
rows repeat each other. Later rounds ask for as much as `factory.aim` has them ask for; nothing is asked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from factory import aim
from factory.aim import MEMORY, PATIENCE
from factory.cells import SPARED

Numbers = NDArray[np.float64]

PLAYS = 500
INTERVAL = (0.05, 0.5, 0.95)
ASSUMED_RATE = 0.5  # good rows a sample made, before any was made; what a first round goes by
# What all places say together weighs, in what is believed of the answers of one, as much as this many answers of its own.
SHARED_WEIGHT = 4.0
ELSEWHERE = 0.3  # what a thing that came at another place weighs, to tell how soon things repeat at this one


class Span(NamedTuple):
    """The middle of all plays, and the bounds between which nine in ten of them lie."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Answered:
    """What one call gave: tokens, money (None: price unknown), time, and pieces that were read from it as samples.

    `place` is the index of the place that it was asked for (None: not known), `size` the bytes of its question.
    """

    place: int | None
    size: int
    tokens_in: float
    tokens_out: float
    micro_usd: float | None
    seconds: float
    items: float = 0.0


@dataclass(frozen=True)
class Source:
    """What one generator asks one teacher.

    By place: `first`, the questions of the first round that are still to be put, and `size`, the mean bytes of one. `share` is
    the teacher's part of the generator's questions, `free` the part of `first` that other runs have paid for.
    """

    stage: str
    teacher: str
    first: NDArray[np.int64]
    size: Numbers
    share: float
    free: float
    micro_usd_a_token_in: float
    answers: tuple[Answered, ...]


@dataclass(frozen=True)
class Asks:
    """How many questions a generator has for a place: `calls[i]` where `samples[i]` samples are wanted of it; at most `most` a round.

    `part` of what is wanted is wanted of it; the others do the rest.
    """

    samples: Numbers
    calls: Numbers
    most: float = math.inf
    part: float = 1.0

    def of(self, wanted: Numbers) -> NDArray[np.int64]:
        """Calls by place; where `most` cuts them short, places take turns."""
        wanted = wanted * self.part
        last, calls = self.samples[-1], self.calls[-1]
        inside = np.interp(wanted, np.append(0, self.samples), np.append(0, self.calls))
        calls = np.ceil(np.where(wanted > last, calls * wanted / last, inside) - 1e-9)
        whole: NDArray[np.int64] = calls.astype(np.int64)
        if whole.sum() <= self.most:
            return whole
        low, high = 0, int(whole.max())  # so many turns fit, and so many do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if np.minimum(calls, middle).sum() <= self.most else (low, middle)
        shared: NDArray[np.int64] = np.minimum(calls, low).astype(np.int64)
        shared[np.flatnonzero(calls > low)[: int(self.most - shared.sum())]] += 1  # the last turn reaches only the first of them
        return shared


@dataclass(frozen=True)
class Sieve:
    """Filters in a row, of which only the first may ask.

    `passed` and `failed` count rows by place, `asked` is questions a row that comes in. `answers` are those that it had, each with the
    teacher's name. `streams`: it works while the generator before it does.
    """

    stage: str
    passed: Numbers
    failed: Numbers
    asked: float = 0.0
    answers: tuple[tuple[str, Answered], ...] = ()
    streams: bool = True


@dataclass(frozen=True)
class Had:
    """What was had already of the first round, by place: `items` read, those `compared` with others, `good` ones."""

    items: NDArray[np.int64]
    compared: NDArray[np.int64]
    good: NDArray[np.int64]
    bill: Mapping[tuple[str, str], Numbers]  # (stage, teacher) -> calls, tokens in, tokens out, micro-USD, seconds


class Lane(NamedTuple):
    """How many requests a teacher takes at once, and at most a minute."""

    at_once: int
    a_minute: float = math.inf


@dataclass(frozen=True)
class Outlook:
    """All that is known before a run, or early in it. `copies_at` is the sieve in which rows are compared with each other, if any.

    `quota`: good rows that each place is to have, `oversample` times as many as are taken.
    """

    quota: Mapping[str, int]
    oversample: float
    rounds: int
    budget_micro_usd: int | None
    asks: Mapping[str, Asks]
    sources: tuple[Source, ...]
    sieves: tuple[Sieve, ...]
    lanes: Mapping[str, Lane]
    had: Had
    repeats: Novelty | None = None
    copies: Novelty | None = None
    copies_at: int | None = None
    start_s: float = 0.0  # once: the embedder's
    filter_s: float = 0.0  # a sample, of all filters that ask nobody
    pool_s: float = 0.0  # a round, of filters of the pool
    choose_s: float = 0.0  # a good row of a place that has too many: its vector


@dataclass(frozen=True)
class Column:
    """What one stage asks one teacher in the whole run; money in micro-USD, None where a price is unknown."""

    stage: str
    teacher: str
    calls: Span
    tokens_in: Span
    tokens_out: Span
    micro_usd: Span | None
    seconds: Span


@dataclass(frozen=True)
class Forecast:
    """The whole run. `ends` counts how the plays ended ("done", "budget", "stalled", "rounds"), `rows` is what they accepted."""

    columns: tuple[Column, ...]
    calls: Span
    micro_usd: Span | None
    seconds: Span
    rows: Span
    rows_at_budget: Span | None
    ends: Mapping[str, float]


class Novelty:
    """How soon what comes at a place repeats what came: `seen[place]` holds how often each different thing has come there.

    A teacher has `few` things that it says again and again, with a probability of `often` in all, and draws the rest from a stock
    of `many`. Two classes are the least that capture and recapture needs where some are caught more easily (Pledger 2000,
    "Unified maximum likelihood estimates for closed capture-recapture models using mixtures"). The three numbers are drawn from
    their posterior on a grid, a place at a time. What came elsewhere is part of what is believed beforehand, to the power of
    `ELSEWHERE` (Ibrahim and Chen 2000, "Power prior distributions").
    """

    _OFTEN = np.array([0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 0.995])
    _FEW = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64])
    _MANY = np.logspace(2, 6, 17)

    def __init__(self, seen: Sequence[Sequence[int]]) -> None:
        self.often, self.few, self.many = (grid.ravel() for grid in np.meshgrid(self._OFTEN, self._FEW, self._MANY))
        own = np.array([self._likelihood(times) for times in seen])
        weight = own + ELSEWHERE * (own.sum(axis=0) - own) - np.log(self.often) / 2  # beforehand, repeats are rather rare
        weight = np.exp(weight - weight.max(axis=1, keepdims=True))
        self._cumulated = np.cumsum(weight, axis=1) / weight.sum(axis=1, keepdims=True)

    def _likelihood(self, times: Sequence[int]) -> Numbers:
        """Of how often each thing has come: Poisson, by the class that it is of."""
        total = sum(times)
        rates = total * self.often / self.few, total * (1 - self.often) / self.many
        different = self.few * -np.expm1(-rates[0]) + self.many * -np.expm1(-rates[1])
        likelihood = -different
        for n, things in Counter(times).items():
            chance = sum(size * rate**n * np.exp(-rate) for size, rate in zip((self.few, self.many), rates, strict=True))
            likelihood = likelihood + things * (np.log(np.maximum(chance, 1e-300)) - math.lgamma(n + 1))
        return np.asarray(likelihood)

    def draw(self, rng: np.random.Generator) -> NDArray[np.intp]:
        """A point of the grid for each place."""
        return np.array([min(np.searchsorted(place, rng.random()), self.often.size - 1) for place in self._cumulated])

    def new(self, at: NDArray[np.intp], n: NDArray[Any], more: NDArray[Any]) -> Numbers:
        """How many of `more` things at each place have not come among the `n` before, on average."""
        often, few, many = self.often[at], self.few[at], self.many[at]
        first = few * np.exp(-n * often / few) * -np.expm1(-more * often / few)
        second = many * np.exp(-n * (1 - often) / many) * -np.expm1(-more * (1 - often) / many)
        return np.asarray(first + second)


def pass_rates(passed: Numbers, failed: Numbers, rng: np.random.Generator, plays: int) -> Numbers:
    """Draws of each place's rate, shape (plays, places): a beta distribution a place, whose mean and spread all places tell together.

    Mean and spread are drawn from their posterior on a grid (Gelman et al., Bayesian Data Analysis, section 5.3), so a place of
    which little was seen is believed to be like the others as far as those are like each other.
    """
    mean, strength = (grid.ravel() for grid in np.meshgrid(1 / (1 + np.exp(-np.linspace(-6, 6, 61))), 2.0 ** np.arange(1, 11)))
    a, b = mean * strength, (1 - mean) * strength
    weight = np.log(mean * (1 - mean)) / 2  # Jeffreys' prior of the mean, on the grid's scale
    for good, bad in zip(passed, failed, strict=True):
        if good or bad:
            weight = (
                weight + _lgamma(a + good) + _lgamma(b + bad) - _lgamma(strength + good + bad) - _lgamma(a) - _lgamma(b) + _lgamma(strength)
            )
    chance = np.exp(weight - weight.max())
    at = rng.choice(chance.size, size=plays, p=chance / chance.sum())
    return np.asarray(rng.beta(a[at, None] + passed, b[at, None] + failed))


_lgamma = np.vectorize(math.lgamma, otypes=[float])


def forecast(outlook: Outlook, *, seed: int = 0, plays: int = PLAYS) -> Forecast:
    """Play the run `plays` times. The same outlook and seed give the same forecast."""
    rng = np.random.default_rng(seed)
    rates = [pass_rates(sieve.passed, sieve.failed, rng, plays) for sieve in outlook.sieves]
    played = [_Play(outlook, [rate[i] for rate in rates], rng).turn() for i in range(plays)]
    priced = all(a.micro_usd is not None for s in outlook.sources for a in s.answers) and all(
        a.micro_usd is not None for s in outlook.sieves for _, a in s.answers
    )
    keys = sorted({key for play in played for key in play.bill})
    none = np.zeros(5)
    bills = np.array([[play.bill.get(key, none) for key in keys] for play in played]).reshape(plays, len(keys), 5)
    columns = [
        Column(
            *key,
            calls=_span(bills[:, i, 0]),
            tokens_in=_span(bills[:, i, 1]),
            tokens_out=_span(bills[:, i, 2]),
            micro_usd=_span(bills[:, i, 3]) if not np.isnan(bills[:, i, 3]).any() else None,
            seconds=_span(np.array([play.walls.get(key, 0.0) for play in played])),
        )
        for i, key in enumerate(keys)
    ]
    ends = Counter(play.end for play in played)
    rows = np.minimum([play.have.sum() for play in played], round(sum(outlook.quota.values()) / outlook.oversample))
    broke = np.array([play.end == "budget" for play in played])
    return Forecast(
        columns=tuple(columns),
        calls=_span(bills[:, :, 0].sum(axis=1)),
        micro_usd=_span(bills[:, :, 3].sum(axis=1)) if priced else None,
        seconds=_span(np.array([play.seconds for play in played])),
        rows=_span(rows),
        rows_at_budget=_span(rows[broke]) if broke.any() else None,
        ends={end: n / plays for end, n in ends.most_common()},
    )


def _span(values: Numbers) -> Span:
    return Span(*(float(value) for value in np.quantile(values, INTERVAL)))


class _Play:
    """One run in numbers."""

    def __init__(self, outlook: Outlook, rates: Sequence[Numbers], rng: np.random.Generator) -> None:
        self.outlook, self.rates, self.rng = outlook, rates, rng
        self.places = list(outlook.quota)
        self.quota = np.array(list(outlook.quota.values()))
        had = outlook.had
        self.have, self.vain = (np.zeros(len(self.places), dtype=np.int64) for _ in range(2))
        self.tried, self.good = (np.zeros(len(self.places)) for _ in range(2))  # discounted by age, as `aim.Yields` has them
        self.proven = np.zeros(len(self.places), dtype=bool)
        self.items, self.compared = had.items, had.compared
        self.bill = {key: bill.copy() for key, bill in had.bill.items()}
        self.walls: dict[tuple[str, str], float] = {}
        self.seconds, self.end = outlook.start_s, "done"
        self._repeats = outlook.repeats.draw(rng) if outlook.repeats else None
        self._copies = outlook.copies.draw(rng) if outlook.copies else None
        self._levels = np.exp(rng.standard_normal(len(outlook.sources)) * _unseen_spread(outlook.sources))
        self._weights = [_weights(source.answers, len(self.places), rng) for source in outlook.sources]
        self._sieve_weights = [rng.dirichlet(np.ones(len(sieve.answers))) if sieve.answers else None for sieve in outlook.sieves]

    def turn(self) -> _Play:
        """The rounds, as `factory.run` turns them."""
        number, idle = 1, 0
        while not self._done():
            if idle >= PATIENCE or number > self.outlook.rounds:
                self.end = "stalled" if idle >= PATIENCE else "rounds"
                break
            before = {key: bill.copy() for key, bill in self.bill.items()}
            accepted = self._round(number)
            if (share := self._affordable(before)) < 1:
                self.bill = {key: before.get(key, 0) + share * (bill - before.get(key, 0)) for key, bill in self.bill.items()}
                self.have = self.have + np.floor(share * accepted).astype(np.int64)
                self.end = "budget"
                break
            self.have = self.have + accepted
            idle = 0 if accepted.any() else idle + 1
            number += 1
        return self

    def _done(self) -> bool:
        """Whether the target is met, and there are nearly as many rows to choose from as were wished for (`Standing.plenty`)."""
        lacking = self.quota - self.have
        taken = np.floor(self.quota / self.outlook.oversample)
        return bool(not lacking.any() or ((self.have >= taken).all() and lacking.sum() <= SPARED * self.quota.sum()))

    def _affordable(self, before: Mapping[tuple[str, str], Numbers]) -> float:
        """The share of a round that the budget still pays."""
        spent, after = (sum(bill[3] for bill in bills.values()) for bills in (before, self.bill))
        if self.outlook.budget_micro_usd is None or after <= self.outlook.budget_micro_usd:
            return 1.0
        return max(0.0, float(self.outlook.budget_micro_usd - spent) / float(after - spent))

    def _round(self, number: int) -> NDArray[np.int64]:
        calls = [source.first for source in self.outlook.sources] if number == 1 else self._calls()
        items = np.zeros(len(self.places))
        generating: dict[str, float] = {}
        for source, n, weights, level in zip(self.outlook.sources, calls, self._weights, self._levels, strict=True):
            drawn = self.rng.multinomial(n, weights)
            items += drawn @ np.array([answer.items for answer in source.answers])
            free = source.free if number == 1 else 0.0
            wall = self._ask(source.stage, source.teacher, drawn, source.answers, source=source, level=level, free=free)
            generating[source.stage] = max(generating.get(source.stage, 0.0), wall)
        tried = np.rint(items).astype(np.int64)
        good = self._filtered(tried, generating)
        if number == 1:
            tried, good = tried + self.outlook.had.items, good + self.outlook.had.good
        self.tried, self.good = self.tried * MEMORY + tried, self.good * MEMORY + good
        self.vain = np.where(good > 0, 0, self.vain + (tried > 0))
        self.proven |= good > 0
        return np.minimum(good, self.quota - self.have)

    def _calls(self) -> list[NDArray[np.int64]]:
        """What the needs of a later round make, by source and place."""
        wanted = (self.quota - self.have) / aim.rates(self.good, self.tried, self.vain, self.proven | (self.tried == 0))
        stages = {stage: asks.of(wanted) for stage, asks in self.outlook.asks.items()}
        shares = {stage: [s.share for s in self.outlook.sources if s.stage == stage] for stage in stages}
        parts = {stage: iter(self._dealt(n, shares[stage])) for stage, n in stages.items() if shares[stage]}
        return [next(parts[source.stage]) for source in self.outlook.sources]

    def _dealt(self, calls: NDArray[np.int64], shares: Sequence[float]) -> list[NDArray[np.int64]]:
        """Calls shared out over teachers as cards are: evenly, and by chance only what does not go even."""
        even = np.floor(calls[:, None] * np.array(shares) + 1e-9).astype(np.int64)
        rest = self.rng.multinomial(calls - even.sum(axis=1), np.array(shares) / sum(shares))
        return list((even + rest).T)

    def _filtered(self, items: NDArray[np.int64], generating: Mapping[str, float]) -> NDArray[np.int64]:
        """How many of the items every filter keeps; adds up the round's time."""
        made = self._new(items, self.items, self.outlook.repeats, self._repeats)
        self.items = self.items + items
        flow = made
        self.seconds += sum(generating.values()) + self.outlook.filter_s * float(made.sum()) + self.outlook.pool_s
        hidden = list(generating.values())[-1] if generating else 0.0  # the time in which what streams works unseen
        for i, sieve in enumerate(self.outlook.sieves):
            weights = self._sieve_weights[i]
            if weights is not None and flow.sum():
                drawn = self.rng.multinomial(round(flow.sum() * sieve.asked), weights)
                walls = [
                    self._ask(sieve.stage, teacher, drawn[mine], [a for (name, a), m in zip(sieve.answers, mine, strict=True) if m])
                    for teacher in dict.fromkeys(name for name, _ in sieve.answers)
                    if (mine := np.array([name == teacher for name, _ in sieve.answers])).any()
                ]
                wall = max(walls)
                self.seconds += max(0.0, wall - hidden) if sieve.streams else wall
            flow = self.rng.binomial(flow, self.rates[i])
            if i == self.outlook.copies_at:
                compared, flow = flow, self._new(flow, self.compared, self.outlook.copies, self._copies)
                self.compared = self.compared + compared
        self.seconds += self.outlook.choose_s * float(flow[self.have + flow > self.quota].sum())
        return flow

    def _new(
        self, more: NDArray[np.int64], n: NDArray[np.int64], novelty: Novelty | None, at: NDArray[np.intp] | None
    ) -> NDArray[np.int64]:
        if novelty is None or at is None:
            return more
        return self.rng.binomial(more, (novelty.new(at, n, more) / np.maximum(more, 1)).clip(0, 1))

    def _ask(
        self,
        stage: str,
        teacher: str,
        drawn: NDArray[np.int64],
        answers: Sequence[Answered],
        *,
        source: Source | None = None,
        level: float = 1.0,
        free: float = 0.0,
    ) -> float:
        """Put calls, of which `drawn` says how often each seen answer comes, on the bill; gives the seconds that they take.

        `level`: how long the source's answers are, beside those seen.
        """
        per: Numbers = np.array(
            [[1.0, a.tokens_in, a.tokens_out, math.nan if a.micro_usd is None else a.micro_usd, a.seconds] for a in answers]
        )
        times = drawn.sum(axis=0) if source else drawn
        if not times.sum():
            return 0.0
        bill = times @ per
        if source:  # the questions to come are known to the byte, and only what is answered to them is not
            a_byte = per[:, 1] / np.array([max(answer.size, 1) for answer in answers])
            tokens_in = float((drawn * a_byte).sum(axis=1) @ source.size)
            answered = bill[3] - bill[1] * source.micro_usd_a_token_in
            bill[1], bill[2], bill[3] = tokens_in, bill[2] * level, tokens_in * source.micro_usd_a_token_in + answered * level
        lane, n = self.outlook.lanes[teacher], float(times.sum()) * (1 - free)
        bill[3:] *= 1 - free
        self.bill[stage, teacher] = self.bill.get((stage, teacher), np.zeros(5)) + bill
        slowest = float(per[times > 0, 4].max())
        # All slots are busy to the end but for the last calls, which wait for the slowest among them.
        wall = max(float(bill[4]) / lane.at_once + slowest * (1 - 1 / lane.at_once), n * 60 / lane.a_minute) if n else 0.0
        self.walls[stage, teacher] = self.walls.get((stage, teacher), 0.0) + wall
        return float(wall)


def _weights(answers: Sequence[Answered], places: int, rng: np.random.Generator) -> Numbers:
    """How likely each seen answer is to come again, by place: the Bayesian bootstrap (Rubin 1981), with more weight to a place's own.

    Its weights are drawn wider than Rubin's, so that a mean over few answers varies as much as it is known to: by s² / n.
    """
    own = np.array([[answer.place == place for answer in answers] for place in range(places)])
    others = ~own
    base = own + others * SHARED_WEIGHT / np.maximum(others.sum(axis=1, keepdims=True), 1)
    n = len(answers)
    weights = base * np.maximum(rng.standard_gamma(max(n - 2, 0.5) / n, n), 1e-9)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _unseen_spread(sources: Sequence[Source]) -> Numbers:
    """By how much more than its answers show the mean length of a source's answers may be off, as a share of it.

    Three answers may be alike by chance: what varies less than the answers of all sources do is believed to vary as those.
    """
    lengths = [np.array([answer.tokens_out for answer in source.answers]) for source in sources]
    freedom = np.array([len(each) - 1 for each in lengths])
    spread = np.array([(each.std(ddof=1) / max(each.mean(), 1)) ** 2 if len(each) > 1 else 0.0 for each in lengths])
    if not freedom.sum():
        return np.zeros(len(sources))
    usual = (spread * freedom).sum() / freedom.sum()
    return np.asarray(np.sqrt(np.maximum(usual - spread, 0) / (freedom + 1)))

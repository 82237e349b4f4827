"""How far a filter can be trusted: its verdicts against people's, with intervals, since 30 to 50 labels say less than they seem to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SURE = 0.95  # of intervals
DRIFT = 0.05  # a difference this unlikely by chance is an alarm

Flags = NDArray[np.bool_]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """`hits` of `of`; `interval` holds the true share with at least the probability SURE (exact: Clopper and Pearson 1934)."""

    hits: int
    of: int

    @property
    def value(self) -> float | None:
        return self.hits / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float]:
        from scipy.stats import beta

        tail = (1 - SURE) / 2
        low = float(beta.ppf(tail, self.hits, self.of - self.hits + 1)) if self.hits else 0.0
        high = float(beta.ppf(1 - tail, self.hits + 1, self.of - self.hits)) if self.hits < self.of else 1.0
        return low, high

    def data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"value": self.value, "hits": self.hits, "of": self.of, "interval": list(self.interval)}


@dataclass(frozen=True)
class Confusion:
    """Verdicts against people's, counted: `kept_good` is kept by both, `dropped_good` dropped although people keep it, and so on."""

    kept_good: int
    kept_bad: int
    dropped_good: int
    dropped_bad: int

    @classmethod
    def of(cls, kept: Sequence[bool] | Flags, good: Sequence[bool] | Flags) -> Confusion:
        """Count two opinions on the same rows, in the same order."""
        k, g = np.asarray(kept, bool), np.asarray(good, bool)
        return cls(int((k & g).sum()), int((k & ~g).sum()), int((~k & g).sum()), int((~k & ~g).sum()))

    @property
    def rows(self) -> int:
        return self.kept_good + self.kept_bad + self.dropped_good + self.dropped_bad

    @property
    def agreement(self) -> Share:
        return Share(self.kept_good + self.dropped_bad, self.rows)

    @property
    def precision(self) -> Share:
        """Of what it keeps, the share that people keep."""
        return Share(self.kept_good, self.kept_good + self.kept_bad)

    @property
    def recall(self) -> Share:
        """Of what people keep, the share that it keeps."""
        return Share(self.kept_good, self.kept_good + self.dropped_good)

    @property
    def kappa(self) -> tuple[float, float, float] | None:
        """`kappa` of these counts."""
        return kappa(np.array([[self.kept_good, self.kept_bad], [self.dropped_good, self.dropped_bad]]))

    def data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        shares = {name: getattr(self, name).data() for name in ("agreement", "precision", "recall")}
        found = self.kappa
        return {**asdict(self), **shares, "kappa": None if found is None else {"value": found[0], "interval": list(found[1:])}}


def kappa(counts: NDArray[np.int64], *, weighted: bool = False) -> tuple[float, float, float] | None:
    """Cohen's kappa of a square table of counts, and its interval: agreement beyond what two such raters would reach by chance.

    counts: shape (k, k), one rater's class by the other's. weighted: near misses count less, by the square of their distance (Cohen
    1968). The interval is by the large-sample variance of Fleiss, Cohen and Everitt (1969). None: it is not defined, as one of the two
    gave the same answer to everything.
    """
    n = int(counts.sum())
    k = len(counts)
    if not n:
        return None
    p = counts / n
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    steps = np.subtract.outer(np.arange(k), np.arange(k))
    weights = 1 - (steps / max(k - 1, 1)) ** 2 if weighted else np.eye(k)
    observed, expected = float((weights * p).sum()), float((weights * np.outer(rows, columns)).sum())
    if expected >= 1 - 1e-12 or (rows > 0).sum() < 2 or (columns > 0).sum() < 2:
        return None
    value = (observed - expected) / (1 - expected)
    mean_rows, mean_columns = weights @ columns, weights.T @ rows
    spread = weights * (1 - expected) - np.add.outer(mean_rows, mean_columns) * (1 - observed)
    variance = ((p * spread**2).sum() - (observed * expected - 2 * expected + observed) ** 2) / (n * (1 - expected) ** 4)
    from scipy.stats import norm

    half = float(norm.ppf((1 + SURE) / 2)) * math.sqrt(max(variance, 0.0))
    return value, max(-1.0, value - half), min(1.0, value + half)


@dataclass(frozen=True)
class Cut:
    """What keeping from a threshold on would mean by the labels: precision, recall, and the share of labelled rows that stay."""

    threshold: float
    precision: Share
    recall: Share
    kept: Share

    def data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"threshold": self.threshold, **{name: getattr(self, name).data() for name in ("precision", "recall", "kept")}}


def cuts(scores: Sequence[float] | Scores, good: Sequence[bool] | Flags, *, rising: bool = True) -> list[Cut]:
    """One cut for each score that occurs, the most generous first. `rising`: a higher score is better, and `threshold` the lowest kept."""
    values, g = np.asarray(scores, float), np.asarray(good, bool)
    found = []
    for threshold in np.unique(values)[:: 1 if rising else -1]:
        kept = values >= threshold if rising else values <= threshold
        hits = int((kept & g).sum())
        found.append(Cut(float(threshold), Share(hits, int(kept.sum())), Share(hits, int(g.sum())), Share(int(kept.sum()), len(g))))
    return found


def threshold_for(precision: float, found: Sequence[Cut], *, sure: bool = False) -> Cut | None:
    """The most generous of the cuts that have this precision by the labels, going down from the strictest that has it.

    A more generous one that has it again behind one that has not is luck. sure: by the lower end of the interval, which with few
    labels asks for more. None: no cut has it.
    """
    best: Cut | None = None
    for cut in reversed(found):
        reached = cut.precision.interval[0] if sure else (cut.precision.value or 0.0)
        if reached >= precision:
            best = cut
        elif best is not None:
            break
    return best


def drifted(before: Share, later: Share) -> float:
    """How likely it is that agreement fell to `later` by chance alone (Fisher's exact test, one-sided); below DRIFT it is an alarm."""
    from scipy.stats import fisher_exact

    if not (before.of and later.of):
        return 1.0
    table = [[before.hits, before.of - before.hits], [later.hits, later.of - later.hits]]
    return float(fisher_exact(table, alternative="greater").pvalue)

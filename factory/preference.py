"""How often one answer is preferred to another once their lengths are equal: judges like long answers, and that can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_ROWS = 20  # of fewer an interval says nothing
_LIKING = 5.0  # standard deviation of the coefficient before anything is seen; holds it where length separates wins from losses
_Z = 1.959963984540054  # 95% of a normal distribution
_STEPS = 100


@dataclass(frozen=True)
class Preferred:
    """`wins` is the plain share of wins. `controlled` is what it would be at equal length, from `low` to `high` with 95% confidence.

    `by_length` is the coefficient: by how much a standard deviation of additional length, squeezed by tanh, moves the log-odds.
    None where the rows don't tell: too few, only wins or only losses, or (of all but `wins`) lengths that never differ otherwise
    than by one amount.
    """

    rows: int
    wins: float | None = None
    controlled: float | None = None
    low: float | None = None
    high: float | None = None
    by_length: float | None = None


def length_controlled(wins: Sequence[float], length_differences: Sequence[float]) -> Preferred:
    """What a preference for one side is worth without its length, by the model of length-controlled AlpacaEval.

    wins: 1 where the side won, 0 where it lost, 0.5 for a tie; length_differences: its length less the other's, in any unit.
    After Dubois et al. 2024 (arXiv 2404.04475): log-odds of a win = quality + coefficient * tanh(difference / standard deviation
    of the differences); the controlled rate is that of difference 0. Unlike there, the difficulty of each instruction is no term of
    the model, and there are two sides only. The coefficient is held by a wide normal prior, the quality is free; the interval is the
    normal one of the log-odds, turned into shares. ValueError: the two don't have the same length, or a win is not from 0 to 1.
    """
    won, by = np.asarray(wins, np.float64), np.asarray(length_differences, np.float64)
    if won.shape != by.shape or won.ndim != 1:
        raise ValueError(f"wins and length_differences are lists of equal length, not of shape {won.shape} and {by.shape}")
    if len(won) and not ((won >= 0) & (won <= 1)).all():
        raise ValueError("a win is a number from 0 (lost) to 1 (won)")
    rows = len(won)
    share = float(won.mean()) if rows else None
    if share is None or rows < LEAST_ROWS or share in (0.0, 1.0):
        return Preferred(rows, share)
    spread = float(by.std())
    if spread == 0 and by[0] != 0:
        return Preferred(rows, share)  # nothing is known of equal lengths
    longer = np.tanh(by / spread) if spread else np.zeros(rows)
    fitted = _fit(won, np.stack([np.ones(rows), longer], axis=1))
    if fitted is None:
        return Preferred(rows, share)
    (quality, liking), error = fitted
    low, controlled, high = (float(_share(quality + z * error)) for z in (-_Z, 0.0, _Z))
    return Preferred(rows, share, controlled, low, high, float(liking) if spread else None)


def _fit(won: NDArray[np.float64], by: NDArray[np.float64]) -> tuple[NDArray[np.float64], float] | None:
    """The coefficients of a logistic regression, and the standard error of the first; by Newton's method. None: it did not settle."""
    prior = np.diag([0.0, 1 / _LIKING**2])
    at = np.array([np.log(won.mean() / (1 - won.mean())), 0.0])
    for _ in range(_STEPS):
        expected = _share(by @ at)
        slope = by.T @ (won - expected) - prior @ at
        bend = (by * (expected * (1 - expected))[:, None]).T @ by + prior
        if not np.isfinite(bend).all() or np.linalg.cond(bend) > 1e12:
            return None
        step = np.linalg.solve(bend, slope)
        at = at + np.clip(step, -2, 2)  # a full step may overshoot where wins and losses are nearly separate
        if np.abs(step).max() < 1e-10:
            return at, float(np.sqrt(np.linalg.inv(bend)[0, 0]))
    return None


def _share(log_odds: NDArray[np.float64] | float) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -500, 500))))

"""Whether two sets of vectors are of one distribution: how far made rows are from the real ones that a student will meet."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from factory.stage import Vectors

MOST = 2_000  # rows of each set that are compared, evenly spaced: the kernel of all pairs then takes 64 MB
PERMUTATIONS = 200
FOLDS = 5
FEWEST = 10  # rows on either side, below which nothing is said


class Mmd(NamedTuple):
    """`squared`: the estimate, about 0 where both sets are of one distribution. `p`: how often chance gives as much; 1/201 at least."""

    squared: float
    p: float


def mmd(a: Vectors, b: Vectors) -> Mmd | None:
    """The unbiased squared maximum mean discrepancy of two sets of unit vectors, shape (n, d), and its p-value.

    Gretton et al. 2012, "A Kernel Two-Sample Test"; the kernel is Gaussian, as wide as the median distance of all pairs. 0: the same
    distribution, and since the estimate is unbiased it then falls a little below 0 as often as above; 2 at most, in practice below 1.
    `p` is from 200 permutations of which row belongs to which set, drawn by a fixed seed. None with fewer than 10 rows in either.

    Of more than 2,000 rows of a set so many, evenly spaced in the order of their bytes. The result does not depend on the order of rows.
    """
    if min(len(a), len(b)) < FEWEST:
        return None
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    a, b = _spread(a), _spread(b)
    n, m = len(a), len(b)
    rng = np.random.default_rng(0)
    chosen = np.zeros((n + m, PERMUTATIONS + 1), np.float32)  # a column a permutation, the first as things are: 1 is in the first set
    chosen[:n] = 1
    chosen[:, 1:] = rng.permuted(chosen[:, 1:], axis=0)
    with threadpool_limits(1):  # threads would add up in any order
        kernel = _gaussian(np.concatenate([a, b]))
        towards = kernel @ chosen
    total, rows = float(kernel.sum(dtype=np.float64)), kernel.sum(axis=1, dtype=np.float64)
    inside = np.einsum("ij,ij->j", chosen, towards, dtype=np.float64)  # over all pairs of the first set, each row with itself too
    of_first = rows @ chosen
    across = of_first - inside
    other = total - 2 * of_first + inside
    found = (inside - n) / (n * (n - 1)) + (other - m) / (m * (m - 1)) - 2 * across / (n * m)
    return Mmd(float(found[0]), float((1 + (found[1:] >= found[0]).sum()) / (1 + PERMUTATIONS)))


def auc(a: Vectors, b: Vectors) -> float | None:
    """How well a classifier tells two sets of unit vectors apart: 0.5 is not at all, 1 always (Lopez-Paz & Oquab 2017, C2ST).

    The area under the ROC curve of a logistic regression on rows that it was not fitted on: the mean over 5 folds, weighed by pairs.
    Below 0.5 is chance. Equal vectors are in the same fold, so copies in both sets are not held against each other. None with fewer than
    10 rows in either, or where no fold holds rows of both.

    Of more than 2,000 rows of a set so many, evenly spaced in the order of their bytes. The result does not depend on the order of rows.
    """
    if min(len(a), len(b)) < FEWEST:
        return None
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from threadpoolctl import threadpool_limits

    a, b = _spread(a), _spread(b)
    rows, second = np.concatenate([a, b]), np.arange(len(a) + len(b)) >= len(a)
    fold = _folds(rows, second)
    areas, weights = [], []
    with threadpool_limits(1):  # threads would add up in any order
        for number in range(FOLDS):
            inside = fold == number
            kinds = second[inside].sum(), (~second[inside]).sum()
            if not min(kinds) or len(np.unique(second[~inside])) < 2:
                continue
            model = LogisticRegression(max_iter=1_000).fit(rows[~inside], second[~inside])
            areas.append(roc_auc_score(second[inside], model.decision_function(rows[inside])))
            weights.append(int(kinds[0]) * int(kinds[1]))
    return float(np.average(areas, weights=weights)) if areas else None


def _folds(rows: Vectors, second: NDArray[np.bool_]) -> NDArray[np.intp]:
    """A fold a row: those of vectors that only one set has are dealt set by set, so that every fold has its share of both."""
    _, same = np.unique(_as_bytes(rows), return_inverse=True)
    in_both = np.isin(same, np.intersect1d(same[second], same[~second]))
    fold = np.empty(len(rows), np.intp)
    for part in (in_both, ~in_both & second, ~in_both & ~second):
        fold[part] = np.unique(same[part], return_inverse=True)[1] % FOLDS
    return fold


def _gaussian(rows: Vectors) -> Vectors:
    """The kernel of all pairs, made in place: exp(-d² / 2σ²), σ the median distance of different rows."""
    kernel: Vectors = rows @ rows.T
    np.subtract(1, kernel, out=kernel)
    np.clip(kernel, 0, None, out=kernel)  # half the squared distance
    np.fill_diagonal(kernel, 0)
    middle = float(np.median(kernel[np.triu_indices(len(rows), 1)]))
    if middle <= 0:  # more than half of all pairs are equal vectors
        middle = float(kernel.mean()) or 1.0
    np.exp(np.multiply(kernel, -1 / (2 * middle), out=kernel), out=kernel)
    return kernel


def _spread(vectors: Vectors) -> Vectors:
    """At most 2,000 rows, evenly spaced, in the order of their bytes, which is the same whatever order they came in."""
    rows = np.ascontiguousarray(vectors, np.float32)
    rows = rows[np.argsort(_as_bytes(rows), kind="stable")]
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST)).astype(np.intp))]


def _as_bytes(rows: Vectors) -> NDArray[np.void]:
    return np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()

"""The cheapest student: a linear probe on frozen embeddings, which says in seconds whether new rows teach a label anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from factory.stage import Vectors

Embed = Callable[[Sequence[str]], Vectors]

C = 10.0  # few rows of 384 dimensions want little regularisation; fixed, so that scores of two versions can be compared
MAX_ITER = 2_000
Z95 = 1.959964
DRAWS = 10_000


class ProbeScore(BaseModel):
    """How a probe did: `accuracy` over `n` rows with its 95% interval (Wilson 1927), the `recall` of each label, and what it said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    accuracy: float
    n: int
    low: float
    high: float
    recall: dict[str, float]
    predicted: tuple[str, ...]


class Difference(BaseModel):
    """What one probe gained over another on the same rows: accuracy, with the 95% interval of a paired bootstrap (Efron 1979)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gain: float
    low: float
    high: float


def train_probe(vectors: Vectors, labels: Sequence[str]) -> Any:
    """A multinomial logistic regression on unit vectors, one label a row: scikit-learn's, with `predict` and `predict_proba`.

    ValueError with fewer than two different labels.
    """
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=C, max_iter=MAX_ITER).fit(vectors, np.asarray(labels, dtype=object))


def score_probe(predicted: Sequence[str], labels: Sequence[str]) -> ProbeScore:
    """The score of what a probe said about rows whose labels are known. ValueError where there are none."""
    if not len(labels):
        raise ValueError("no rows to score a probe on")
    rows = pl.DataFrame({"label": labels, "predicted": predicted}, schema={"label": pl.String, "predicted": pl.String})
    recall = rows.group_by("label").agg(right=(pl.col("predicted") == pl.col("label")).mean()).sort("label")
    right, n = int((rows["predicted"] == rows["label"]).sum()), len(rows)
    low, high = wilson(right, n)
    recalls = dict(zip(recall["label"], recall["right"], strict=True))
    return ProbeScore(accuracy=right / n, n=n, low=low, high=high, recall=recalls, predicted=tuple(predicted))


def probe_accuracy(train_rows: pl.DataFrame, dev_rows: pl.DataFrame, embed: Embed) -> ProbeScore:
    """Train on the `input` and `label` columns of one frame, and score on those of the other."""
    probe = train_probe(embed(train_rows["input"].to_list()), train_rows["label"].to_list())
    predicted = probe.predict(embed(dev_rows["input"].to_list())).tolist()
    return score_probe(predicted, dev_rows["label"].to_list())


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share, `right` of `n`; honest near 0 and 1, where the normal interval is not (Wilson 1927)."""
    share, z2 = right / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(before: Sequence[str], after: Sequence[str], labels: Sequence[str], *, seed: int = 0) -> Difference:
    """What `after` gained over `before`, two lists of predictions for the same rows.

    Rows are drawn with replacement, both predictions of a row together: what is hard for both then cancels out.
    """
    truth = np.asarray(labels, dtype=object)
    gained: NDArray[np.int64] = (np.asarray(after, dtype=object) == truth).astype(np.int64) - (np.asarray(before, dtype=object) == truth)
    n = len(gained)
    # A row is worth -1, 0 or 1, so a draw of n rows is a multinomial draw of how many there are of each.
    shares = [float((gained == worth).mean()) for worth in (-1, 0, 1)]
    counts = np.random.default_rng(seed).multinomial(n, shares, size=DRAWS)
    low, high = np.quantile((counts[:, 2] - counts[:, 0]) / n, (0.025, 0.975))
    return Difference(gain=float(gained.mean()), low=float(low), high=float(high))

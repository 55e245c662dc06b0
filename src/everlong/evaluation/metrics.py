"""Metrics as values: pure functions of the rank of each target, averaged over users.

Every target is one held-out item, so ``Recall@k`` equals ``HitRate@k``: both are offered because
papers use either word.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0

HISTORY_BUCKETS = (0, 1, 5, 20, 50, 200, 500, 1000)
"""The shortest history of each bucket, in events."""

# counts of a bootstrap held in memory at once
DRAWS = 1 << 22

# gain of a target at rank r <= k when it is the only relevant item: the ideal list has gain 1
GAINS: Mapping[str, Callable[[Floats], Floats]] = {
    "HitRate": np.ones_like,
    "Recall": np.ones_like,
    # discount log(1 + rank) as in Burges et al. 2005 (RankNet), one relevant item of gain 1
    "NDCG": lambda ranks: 1.0 / np.log2(ranks + 1.0),
    "MRR": lambda ranks: 1.0 / ranks,
}

ALIASES: Mapping[str, str] = {
    **{name.lower(): name for name in GAINS},
    "hr": "HitRate",
    "hit": "HitRate",
    "hits": "HitRate",
    "hit_rate": "HitRate",
    "rr": "MRR",
}


@dataclass(frozen=True)
class Metric:
    """A metric at a cut-off, such as ``Metric("NDCG", 10)``, which prints ``NDCG@10``.

    Raises:
        ValueError: if the name is not a metric or ``k`` is below 1.
    """

    name: str
    k: int

    def __post_init__(self) -> None:
        if self.name not in GAINS:
            raise ValueError(unknown_metric(self.name))
        if self.k < 1:
            raise ValueError(
                f"{self.name}@k counts the first k places: expected k >= 1, received {self.k}"
            )

    def __str__(self) -> str:
        return f"{self.name}@{self.k}"

    def of(self, ranks: Ints) -> Floats:
        """The value for each rank (from 1), same shape as ``ranks``; 0 beyond place k.

        Raises:
            ValueError: if a rank is below 1.
        """
        if ranks.size and ranks.min() < 1:
            raise ValueError(f"ranks count from 1: received {ranks.min()}; add 1 to places from 0")
        gain = GAINS[self.name](ranks.astype(np.float64))
        return np.where(ranks <= self.k, gain, 0.0)


DEFAULT: tuple[Metric, ...] = tuple(Metric(name, k) for name in GAINS for k in (1, 5, 10, 20, 50))


def parse_metric(text: str) -> Metric:
    """The metric that a text such as ``ndcg@10`` or ``HR@5`` names.

    Raises:
        ValueError: if the text is not ``NAME@K``, or the name is unknown (names the nearest).
    """
    match = re.fullmatch(r"\s*([A-Za-z_]+)\s*@\s*([0-9]+)\s*", text)
    if match is None:
        raise ValueError(
            f"a metric is a name and a cut-off, such as NDCG@10: received {text!r}; "
            f"names are {', '.join(GAINS)}"
        )
    name = ALIASES.get(match[1].lower())
    if name is None:
        raise ValueError(unknown_metric(match[1]))
    return Metric(name, int(match[2]))


def unknown_metric(name: str) -> str:
    """The error text for a name that is no metric."""
    nearest = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.0)
    return (
        f"unknown metric {name!r}: expected one of {', '.join(GAINS)}; "
        f"did you mean {ALIASES[nearest[0]]!r}?"
    )


class Estimate(NamedTuple):
    """A mean over users and the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


def user_means(ranks: Ints, users: Ints, metrics: Sequence[Metric]) -> tuple[Ints, Floats]:
    """The users in rising order ``[U]`` and each one's mean over their targets ``[U, M]``.

    Args:
        ranks: ``[Q]`` rank of each target, from 1.
        users: ``[Q]`` who each target belongs to.
        metrics: ``M`` metrics.
    """
    unique, inverse, counts = np.unique(users, return_inverse=True, return_counts=True)
    means = np.empty((unique.size, len(metrics)))
    for column, metric in enumerate(metrics):
        sums = np.bincount(inverse, weights=metric.of(ranks), minlength=unique.size)
        means[:, column] = sums / counts
    return unique, means


def summable(values: Floats) -> Floats:
    """``values [U, M]`` rounded so that a sum of U rows, repeats allowed, is exact in any order.

    Each becomes a multiple of one power of two, which leaves 40 bits to the largest value (an error
    of at most ``max(abs(values)) / 2**40``), fewer where sums of U such values would need more
    than the 53 bits of a float64. Values that differ by the rounding of an earlier sum become equal
    nearly always.
    """
    peak = float(np.abs(values).max(initial=0.0))
    scale = 2.0 ** min(40 - math.frexp(peak)[1], 53 - math.frexp(len(values) * peak)[1])
    rounded: Floats = np.rint(values * scale) / scale
    return rounded


def bootstrap(
    means: Floats, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED
) -> tuple[Floats, Floats]:
    """The bounds ``[M]`` of the percentile interval of the mean over users of ``means [U, M]``.

    Whole users are drawn with replacement, so the targets of one user stay together. Percentile
    interval: Efron and Tibshirani 1993, chapter 13. Memory does not grow with ``resamples``.
    Every sum over users is exact (see :func:`summable`): its order, and with it the processor,
    decides no bit of the bounds.
    """
    means = summable(means)
    # users with the same row are the same to a resample: with one target each there are few rows
    frame = pl.DataFrame(means, schema=[str(i) for i in range(means.shape[1])])
    groups = frame.group_by(pl.all()).len("users").sort(pl.all())
    values = groups.drop("users").to_numpy()
    shares = groups["users"].to_numpy() / len(means)
    rng = np.random.default_rng(seed)
    sampled = np.empty((resamples, means.shape[1]))
    rows = max(1, DRAWS // len(values))
    for first in range(0, resamples, rows):
        part = sampled[first : first + rows]
        drawn = rng.multinomial(len(means), shares, size=len(part))
        part[:] = drawn.astype(np.float64) @ values / len(means)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(sampled, [tail, 1.0 - tail], axis=0)
    return low, high


def estimate(
    ranks: Ints, users: Ints, metrics: Sequence[Metric], *, seed: int = SEED
) -> dict[str, Estimate]:
    """Each metric's name and estimate: mean over a user's targets first, then over users.

    Args:
        ranks: ``[Q]`` rank of each target, from 1.
        users: ``[Q]`` who each target belongs to.
        metrics: what to compute.
        seed: of the bootstrap.

    Raises:
        ValueError: if there is no target, or the arrays differ in length.
    """
    if ranks.size == 0 or ranks.shape != users.shape:
        raise ValueError(
            "a metric needs at least one target and one user per target: "
            f"received {ranks.size} ranks and {users.size} users"
        )
    means = user_means(ranks, users, metrics)[1]
    low, high = bootstrap(means, seed=seed)
    mean = means.mean(axis=0)
    return {
        str(metric): Estimate(float(mean[i]), float(low[i]), float(high[i]))
        for i, metric in enumerate(metrics)
    }


def history_bucket(lengths: Ints) -> Ints:
    """The bucket (0 .. 7) of each history length, same shape."""
    return np.searchsorted(np.array(HISTORY_BUCKETS), lengths, side="right") - 1


def bucket_label(bucket: int) -> str:
    """The lengths of a bucket as text: ``0``, ``1-4``, ..., ``1000+``."""
    first = HISTORY_BUCKETS[bucket]
    if bucket == len(HISTORY_BUCKETS) - 1:
        return f"{first}+"
    last = HISTORY_BUCKETS[bucket + 1] - 1
    return str(first) if first == last else f"{first}-{last}"

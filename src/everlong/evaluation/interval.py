"""The one interval of all metrics: a percentile bootstrap over users.

A metric is a function of sums over users. Users are drawn with replacement, the sums of those that
were drawn are taken, and the metric follows from them; so means, ratios and other functions of sums
are all served alike, and all metrics of one evaluation see the same draws.

With the same version of numpy the bounds have the same bits on every machine for the same sums per
user: draws are of integers, sums over users are exact in any order (see ``summable``), and what
remains is arithmetic that IEEE 754 defines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0

METHOD = f"{LEVEL:.0%} bootstrap over users, {RESAMPLES} resamples, seed {SEED}"
"""The interval in words, for results files."""

# counts of a bootstrap held in memory at once
DRAWS = 1 << 22


class Estimate(NamedTuple):
    """A metric and the bounds of its bootstrap interval; NaN where it is not defined."""

    mean: float
    low: float
    high: float


class Totals(NamedTuple):
    """A metric as a function of sums over users."""

    columns: Floats
    """``[U, C]`` what each user adds to each sum."""

    value: Callable[[Floats], Floats]
    """The metric ``[...]`` of sums ``[..., C]``; NaN where it is not defined."""


def ratio(top: Floats, bottom: Floats) -> Totals:
    """``sum(top) / sum(bottom)`` of two numbers ``[U]`` of each user."""
    columns = np.stack([top, bottom], axis=1)
    return Totals(columns, lambda sums: quotient(sums[..., 0], sums[..., 1]))


def quotient(top: Floats, bottom: Floats) -> Floats:
    """``top / bottom``, NaN where the bottom is not above 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(bottom > 0, top / bottom, np.nan)
    return found


def estimates(metrics: Mapping[str, Totals], *, seed: int = SEED) -> dict[str, Estimate]:
    """Each metric of all users, with its interval.

    Args:
        metrics: name to what each of the same U users adds.
        seed: of the draws.
    """
    columns = np.concatenate([totals.columns for totals in metrics.values()], axis=1)
    sums, drawn = columns.sum(axis=0), resampled(columns, seed=seed)
    found, first = {}, 0
    for name, totals in metrics.items():
        place = slice(first, first := first + totals.columns.shape[1])
        mean = float(totals.value(sums[place]))
        low, high = (np.nan, np.nan) if np.isnan(mean) else bounds(totals.value(drawn[:, place]))
        found[name] = Estimate(mean, low, high)
    return found


def bounds(values: Floats, *, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of resampled values ``[R]``, of which NaN do not count.

    Efron and Tibshirani 1993, chapter 13.
    """
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(values[~np.isnan(values)], [tail, 1.0 - tail])
    return float(low), float(high)


def resampled(columns: Floats, *, resamples: int = RESAMPLES, seed: int = SEED) -> Floats:
    """Sums ``[R, C]`` of ``columns [U, C]`` over U users that are drawn with replacement.

    Whole users are drawn, so that what belongs to one user stays together. Memory does not grow
    with ``resamples``, nor does the order of users matter.
    """
    # users with the same row are the same to a resample: with one target each there are few rows
    frame = pl.DataFrame(summable(columns), schema=[str(i) for i in range(columns.shape[1])])
    groups = frame.group_by(pl.all()).len("users").sort(pl.all())
    values = groups.drop("users").to_numpy()
    group = np.repeat(np.arange(len(values)), groups["users"].to_numpy())
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, columns.shape[1]))
    rows = max(1, DRAWS // len(values))
    for first in range(0, resamples, rows):
        part = sums[first : first + rows]
        counts = np.empty((len(part), len(values)))
        for row in counts:
            drawn = rng.integers(len(columns), size=len(columns), dtype=np.uint32)
            row[:] = np.bincount(group[drawn], minlength=len(values))
        part[:] = counts @ values
    return sums


def summable(values: Floats) -> Floats:
    """``values [U, M]`` rounded so that a sum of U rows, repeats allowed, is exact in any order.

    Each becomes a multiple of one power of two, which leaves 40 bits to the largest value of its
    column (an error of at most ``max(abs(column)) / 2**40``), fewer where sums of U such values
    would need more than the 53 bits of a float64. Values that differ by the rounding of an earlier
    sum become equal nearly always.
    """
    peak = np.abs(values).max(axis=0, initial=0.0)
    bits = np.minimum(40 - np.frexp(peak)[1], 53 - np.frexp(len(values) * peak)[1])
    rounded: Floats = np.ldexp(np.rint(np.ldexp(values, bits)), -bits)
    return rounded

"""Metrics by the length of history."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from everlong.data.arrays import IntArray
from everlong.evaluation.interval import Estimate

Mask = npt.NDArray[np.bool_]

HISTORY_BUCKETS = (0, 1, 5, 20, 50, 200, 500, 1000)
"""The shortest history of each bucket, in events."""


class Measured(NamedTuple):
    """The metrics of one bucket."""

    users: int
    counted: int
    metrics: Mapping[str, Estimate]


def by_history_length(
    lengths: IntArray, counted: str, measure: Callable[[Mask], Measured | None]
) -> pl.DataFrame:
    """One row a bucket and metric: ``history, users, COUNTED, metric, mean, low, high``.

    ``history`` is the range of past events. Buckets of which nothing can be measured are left out.

    Args:
        lengths: ``[Q]`` events before each target or request.
        counted: name of the column of what was measured, such as ``targets``.
        measure: of the rows where a mask ``[Q]`` holds; None if there is nothing.
    """
    buckets, rows = history_bucket(lengths), []
    for bucket in np.unique(buckets):
        found = measure(buckets == bucket)
        if found is not None:
            facts = (bucket_label(int(bucket)), found.users, found.counted)
            rows += [(*facts, name, *value) for name, value in found.metrics.items()]
    names = ["history", "users", counted, "metric", "mean", "low", "high"]
    return pl.DataFrame(rows, schema=names, orient="row")


def history_bucket(lengths: IntArray) -> IntArray:
    """The bucket (0 .. 7) of each history length, same shape."""
    return np.searchsorted(np.array(HISTORY_BUCKETS), lengths, side="right") - 1


def bucket_label(bucket: int) -> str:
    """The lengths of a bucket as text: ``0``, ``1-4``, ..., ``1000+``."""
    first = HISTORY_BUCKETS[bucket]
    if bucket == len(HISTORY_BUCKETS) - 1:
        return f"{first}+"
    last = HISTORY_BUCKETS[bucket + 1] - 1
    return str(first) if first == last else f"{first}-{last}"

"""Metrics of rankers, from the scores and labels of candidates.

Candidates without a label (NaN) are left out of every metric. Groups of positives (0.5 or more) or
negatives alone say nothing about an order of the two: they are skipped and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from everlong.evaluation.metrics import (
    LEVEL,
    RESAMPLES,
    SEED,
    Estimate,
    Floats,
    Ints,
    bucket_label,
    history_bucket,
)

BINS = 10
POSITIVE = 0.5
"""Labels of at least this are positive, where a metric needs two classes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """Scored candidates of Q requests.

    Attributes:
        logits: ``[P]`` float64.
        labels: ``[P]`` from 0 to 1, NaN where there is none.
        request: ``[P]`` request row of each.
        user: ``[Q]`` user row of each request.
        history_lengths: ``[Q]`` events before each request.
    """

    logits: Floats
    labels: Floats
    request: Ints
    user: Ints
    history_lengths: Ints

    def select(self, requests: np.ndarray) -> Ranked:
        """The candidates of the requests where ``requests [Q]`` (bool) holds."""
        inside = requests[self.request]
        return replace(
            self,
            logits=self.logits[inside],
            labels=self.labels[inside],
            request=self.request[inside],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RankingEvaluation:
    """Metrics of a ranker.

    Attributes:
        metrics: name to mean and bootstrap interval over users (for those that are no means over
            users, the interval is of the metric over resampled users).
        candidates: labelled ones.
        requests: with a labelled candidate.
        users: with a labelled candidate.
        skipped_users, skipped_requests: with positives or negatives alone.
    """

    metrics: Mapping[str, Estimate]
    candidates: int
    requests: int
    users: int
    skipped_users: int
    skipped_requests: int

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values for a results file, None for what is not known."""
        metrics = {
            name: {part: None if np.isnan(x) else x for part, x in value._asdict().items()}
            for name, value in self.metrics.items()
        }
        return {
            "candidates": self.candidates,
            "requests": self.requests,
            "users": self.users,
            "skipped_users": self.skipped_users,
            "skipped_requests": self.skipped_requests,
            "interval": f"{LEVEL:.0%} bootstrap over users, {RESAMPLES} resamples, seed {SEED}",
            "metrics": metrics,
        }


def auc(scores: Floats, labels: Ints) -> float:
    """The share of pairs of a positive (label > 0) and another in the right order, ties count half.

    NaN if there is no such pair.
    """
    groups = np.zeros(len(scores), dtype=np.int64)
    return float(grouped_auc(scores, labels, groups, 1)[0])


def grouped_auc(scores: Floats, labels: Ints, group: Ints, count: int) -> Floats:
    """``[count]`` the AUC within each group, NaN where all labels are equal.

    By ranks within the group (Mann and Whitney), ties sharing their mean rank.
    """
    order = np.lexsort((scores, group))
    sizes = np.bincount(group, minlength=count)
    first = np.cumsum(sizes) - sizes
    value, owner = scores[order], group[order]
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (value[1:] != value[:-1]) | (owner[1:] != owner[:-1])
    start = np.flatnonzero(new)
    length = np.diff(np.append(start, len(order)))
    mean_rank = np.repeat(start + (length + 1) / 2, length) - first[owner]
    positive = labels[order] > 0
    positives = np.bincount(owner, weights=positive, minlength=count)
    negatives = sizes - positives
    ranks = np.bincount(owner, weights=mean_rank * positive, minlength=count)
    pairs = positives * negatives
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (ranks - positives * (positives + 1) / 2) / pairs
    return np.where(pairs > 0, found, np.nan)


def evaluate_ranking(ranked: Ranked, *, k: int = 10) -> RankingEvaluation:
    """All metrics.

    ``AUC``; ``GAUC``, the mean AUC of users weighted by their labelled candidates (as LongCTR has
    it); ``GAUC@request``, the same of requests; ``NDCG@k`` with the labels as gains and ``MRR`` of
    the first positive, means over the requests of a user and then over users, of requests with
    positives (0.5 or more) and negatives; ``LogLoss``; ``ECE``, the expected calibration error over
    ten bins of equal size; ``Calibration``, the sum of predictions over that of labels.

    Args:
        ranked: scored candidates.
        k: places of the NDCG.

    Raises:
        ValueError: if no candidate has a label, or a score of a labelled one is not finite.
    """
    known = ~np.isnan(ranked.labels)
    if not known.any():
        raise ValueError("expected candidates with labels, received none; check the label column")
    logits, labels = ranked.logits[known].astype(np.float64), ranked.labels[known].astype(float)
    if not np.isfinite(logits).all():
        # sorted, NaN would stand above all scores and count as an order
        raise ValueError(
            f"expected finite scores, received {int((~np.isfinite(logits)).sum())} of "
            f"{len(logits)} that are not; the model has diverged"
        )
    request = ranked.request[known]
    owners, user = np.unique(ranked.user[request], return_inverse=True)
    shown, request = np.unique(request, return_inverse=True)
    positive = (labels >= POSITIVE).astype(np.int64)
    user_of = np.zeros(len(shown), dtype=np.int64)
    user_of[request] = user
    sizes = np.bincount(request)

    ones = np.ones(len(user))
    by_user = grouped_auc(logits, positive, user, len(owners))
    by_request = grouped_auc(logits, positive, request, len(shown))
    mixed = ~np.isnan(by_request)
    ndcg, mrr = _lists(logits, labels, request, len(shown), k)
    chance = np.exp(-np.logaddexp(0, -logits))
    losses = np.logaddexp(0, logits) - labels * logits
    of_user = _sums(user, ones, len(owners)) * ~np.isnan(by_user)
    of_request = sizes * mixed.astype(np.float64)
    # of each user: numerator and denominator, so that resampled users give each metric anew
    parts: dict[str, tuple[Floats, Floats]] = {
        "GAUC": (np.nan_to_num(by_user) * of_user, of_user),
        "GAUC@request": (
            _sums(user_of, np.nan_to_num(by_request) * of_request, len(owners)),
            _sums(user_of, of_request, len(owners)),
        ),
        f"NDCG@{k}": _user_means(user_of, ndcg, mixed, len(owners)),
        "MRR": _user_means(user_of, mrr, mixed, len(owners)),
        "LogLoss": (_sums(user, losses, len(owners)), _sums(user, ones, len(owners))),
        "Calibration": (_sums(user, chance, len(owners)), _sums(user, labels, len(owners))),
    }
    metrics = {"AUC": Estimate(auc(logits, positive), np.nan, np.nan)}
    metrics |= _ratios(parts)
    metrics["ECE"] = Estimate(calibration_error(chance, labels), np.nan, np.nan)
    return RankingEvaluation(
        metrics=metrics,
        candidates=len(labels),
        requests=len(shown),
        users=len(owners),
        skipped_users=int(np.isnan(by_user).sum()),
        skipped_requests=int((~mixed).sum()),
    )


def by_history_length(ranked: Ranked) -> pl.DataFrame:
    """One row a bucket and metric: ``history, users, candidates, metric, mean, low, high``."""
    buckets = history_bucket(ranked.history_lengths)
    rows = []
    for bucket in np.unique(buckets):
        part = ranked.select(buckets == bucket)
        if np.isnan(part.labels).all():
            continue
        found = evaluate_ranking(part)
        facts = (bucket_label(int(bucket)), found.users, found.candidates)
        rows += [(*facts, name, *value) for name, value in found.metrics.items()]
    names = ["history", "users", "candidates", "metric", "mean", "low", "high"]
    return pl.DataFrame(rows, schema=names, orient="row")


def calibration_error(chance: Floats, labels: Floats) -> float:
    """Mean absolute difference of mean chance and mean label in bins of equal size."""
    # equal chances share their mean label: which of them falls into which bin must not matter
    values, place, counts = np.unique(chance, return_inverse=True, return_counts=True)
    labels = (np.bincount(place, weights=labels) / counts)[place]
    order = np.argsort(chance, kind="stable")
    total = 0.0
    for part in np.array_split(order, min(BINS, len(order))):
        total += len(part) * abs(float(chance[part].mean() - labels[part].mean()))
    return total / len(order)


def _lists(
    logits: Floats, labels: Floats, request: Ints, count: int, k: int
) -> tuple[Floats, Floats]:
    """NDCG@k and reciprocal rank of the first positive of each request.

    Candidates of one score stand in the order that is worst for the metric.
    """
    sizes = np.bincount(request, minlength=count)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)

    def gain(order: Ints) -> Floats:
        place = np.arange(len(order)) - first
        value = np.where(place < k, labels[order] / np.log2(place + 2.0), 0.0)
        return _sums(request[order], value, count)

    order = np.lexsort((labels, -logits, request))
    best = gain(np.lexsort((-labels, request)))
    with np.errstate(invalid="ignore", divide="ignore"):
        ndcg = np.where(best > 0, gain(order) / best, 0.0)
    place = np.arange(len(order)) - first + 1
    reciprocal = np.where(labels[order] >= POSITIVE, 1.0 / place, 0.0)
    mrr = np.zeros(count)
    np.maximum.at(mrr, request[order], reciprocal)
    return ndcg, mrr


def _sums(group: Ints, values: np.ndarray, count: int) -> Floats:
    sums: Floats = np.bincount(group, weights=values, minlength=count).astype(np.float64)
    return sums


def _user_means(
    user: Ints, values: Floats, counts: np.ndarray, users: int
) -> tuple[Floats, Floats]:
    """Each user's mean over their requests that count, and 1 for each user who has any."""
    number = _sums(user, counts.astype(float), users)
    means = _sums(user, values * counts, users) / np.maximum(number, 1)
    return means, (number > 0).astype(float)


def _ratios(parts: Mapping[str, tuple[Floats, Floats]]) -> dict[str, Estimate]:
    """``sum(top) / sum(bottom)`` of each pair ``[U]``, and intervals over resampled users.

    NaN of nothing. All are taken from the same resamples, in which the count of each user is drawn
    from a Poisson distribution of mean 1.
    """
    columns = np.stack([values for pair in parts.values() for values in pair], axis=1)
    generator, tail = np.random.default_rng(SEED), (1.0 - LEVEL) / 2.0
    drawn = np.empty((RESAMPLES, columns.shape[1]))
    for row in drawn:
        row[:] = generator.poisson(1.0, len(columns)) @ columns
    found = {}
    for number, name in enumerate(parts):
        top, bottom = columns[:, 2 * number : 2 * number + 2].sum(0)
        if bottom <= 0:
            found[name] = Estimate(np.nan, np.nan, np.nan)
            continue
        tops, bottoms = drawn[:, 2 * number], drawn[:, 2 * number + 1]
        inside = bottoms > 0
        low, high = np.quantile(tops[inside] / bottoms[inside], [tail, 1.0 - tail])
        found[name] = Estimate(float(top / bottom), float(low), float(high))
    return found

"""Metrics of scored candidates, each as sums over users.

Candidates without a label (NaN) are left out of every metric. Groups of positives (0.5 or more) or
negatives alone say nothing about an order of the two: they do not count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from everlong.data.arrays import IntArray
from everlong.evaluation.gain import discounted, reciprocal
from everlong.evaluation.interval import Floats, Totals, quotient, ratio

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
    request: IntArray
    user: IntArray
    history_lengths: IntArray

    def select(self, requests: npt.NDArray[np.bool_]) -> Ranked:
        """The candidates of the requests where ``requests [Q]`` holds."""
        inside = requests[self.request]
        return replace(
            self,
            logits=self.logits[inside],
            labels=self.labels[inside],
            request=self.request[inside],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """P labelled candidates of R requests of U users, all numbered from 0.

    Attributes:
        logits: ``[P]``.
        labels: ``[P]`` from 0 to 1.
        request: ``[P]`` request of each.
        user: ``[P]`` user of each.
        owner: ``[R]`` user of each request.
        users: how many, U.
    """

    logits: Floats
    labels: Floats
    request: IntArray
    user: IntArray
    owner: IntArray
    users: int

    @staticmethod
    def of(ranked: Ranked) -> Candidates:
        """The labelled candidates.

        Raises:
            ValueError: if none has a label, or a score of a labelled one is not finite.
        """
        known = ~np.isnan(ranked.labels)
        if not known.any():
            raise ValueError(
                "expected candidates with labels, received none; check the label column"
            )
        logits, labels = ranked.logits[known].astype(np.float64), ranked.labels[known].astype(float)
        if not np.isfinite(logits).all():
            # sorted, NaN would stand above all scores and count as an order
            raise ValueError(
                f"expected finite scores, received {int((~np.isfinite(logits)).sum())} of "
                f"{len(logits)} that are not; the model has diverged"
            )
        request = ranked.request[known]
        users, user = np.unique(ranked.user[request], return_inverse=True)
        shown, request = np.unique(request, return_inverse=True)
        owner = np.zeros(len(shown), dtype=np.int64)
        owner[request] = user
        return Candidates(
            logits=logits, labels=labels, request=request, user=user, owner=owner, users=len(users)
        )

    @cached_property
    def positive(self) -> npt.NDArray[np.bool_]:
        """``[P]`` which are."""
        return self.labels >= POSITIVE

    @cached_property
    def chance(self) -> Floats:
        """``[P]`` predicted chances of a positive."""
        chance: Floats = np.exp(-np.logaddexp(0, -self.logits))
        return chance

    @cached_property
    def user_auc(self) -> Floats:
        """``[U]`` the AUC within each user, NaN where it is not defined."""
        return grouped_auc(self.logits, self.positive, self.user, self.users)

    @cached_property
    def request_auc(self) -> Floats:
        """``[R]`` the AUC within each request, NaN where it is not defined."""
        return grouped_auc(self.logits, self.positive, self.request, len(self.owner))

    def per_user(self, values: npt.NDArray[np.generic]) -> Floats:
        """``[U]`` sums of ``values [P]``."""
        return _sums(self.user, values, self.users)

    def mean_over_requests(self, values: Floats) -> Totals:
        """The mean of ``values [R]`` over a user's requests of two classes, then over users."""
        mixed = ~np.isnan(self.request_auc)
        number = _sums(self.owner, mixed.astype(float), self.users)
        means = _sums(self.owner, values * mixed, self.users) / np.maximum(number, 1)
        return ratio(means, (number > 0).astype(float))

    def gains(self, order: IntArray, k: int) -> Floats:
        """``[R]`` discounted sums of the labels at the first ``k`` places of each request.

        Args:
            order: ``[P]`` candidates by request, each request in the order of its list.
            k: places.
        """
        places = self.places
        value = discounted(places.astype(np.float64), self.labels[order])
        return _sums(self.request[order], np.where(places <= k, value, 0.0), len(self.owner))

    @cached_property
    def places(self) -> IntArray:
        """``[P]`` places from 1 within the request, of candidates by request."""
        sizes = np.bincount(self.request, minlength=len(self.owner))
        first = np.repeat(np.cumsum(sizes) - sizes, sizes)
        places: IntArray = np.arange(len(self.request)) - first + 1
        return places

    @cached_property
    def order(self) -> IntArray:
        """``[P]`` candidates by request and falling score, the worse label first among equals."""
        return np.lexsort((self.labels, -self.logits, self.request))


def auc(shown: Candidates) -> Totals:
    """The share of pairs of a positive and a negative, of any users, in the right order.

    Ties count half. The number of right pairs is a sum over pairs of users: for the interval it is
    taken as linear in how often each user is drawn, which leaves out a term of order 1 / U.
    """
    _, value = np.unique(shown.logits, return_inverse=True)
    up = np.bincount(value, weights=shown.positive)
    down = np.bincount(value, weights=~shown.positive)
    below, above = down.cumsum() - down / 2, up.sum() - up.cumsum() + up / 2
    right = np.where(shown.positive, below[value], above[value])
    pairs = np.where(shown.positive, down.sum(), up.sum())
    # every pair is in the sums of both its candidates
    all_right, all_pairs = right.sum() / 2, pairs.sum() / 2
    columns = np.stack([shown.per_user(right), shown.per_user(pairs)], axis=1)
    return Totals(
        columns, lambda sums: quotient(sums[..., 0] - all_right, sums[..., 1] - all_pairs)
    )


def gauc(shown: Candidates) -> Totals:
    """The mean AUC of users, weighted by their labelled candidates, as LongCTR has it."""
    weight = shown.per_user(np.ones(len(shown.user))) * ~np.isnan(shown.user_auc)
    return ratio(np.nan_to_num(shown.user_auc) * weight, weight)


def gauc_of_requests(shown: Candidates) -> Totals:
    """The mean AUC of requests, weighted by their labelled candidates."""
    found = shown.request_auc
    weight = np.bincount(shown.request) * (~np.isnan(found)).astype(np.float64)
    top = _sums(shown.owner, np.nan_to_num(found) * weight, shown.users)
    return ratio(top, _sums(shown.owner, weight, shown.users))


def ndcg(shown: Candidates, k: int) -> Totals:
    """NDCG at ``k`` places, with the labels as gains, of requests of two classes."""
    best = shown.gains(np.lexsort((-shown.labels, shown.request)), k)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(best > 0, shown.gains(shown.order, k) / best, 0.0)
    return shown.mean_over_requests(found)


def mrr(shown: Candidates) -> Totals:
    """The reciprocal place of the first positive, of requests of two classes."""
    value = np.where(shown.positive[shown.order], reciprocal(shown.places.astype(np.float64)), 0.0)
    found = np.zeros(len(shown.owner))
    np.maximum.at(found, shown.request[shown.order], value)
    return shown.mean_over_requests(found)


def log_loss(shown: Candidates) -> Totals:
    """The mean cross entropy of labels and predicted chances."""
    losses = np.logaddexp(0, shown.logits) - shown.labels * shown.logits
    return ratio(shown.per_user(losses), shown.per_user(np.ones(len(shown.user))))


def calibration(shown: Candidates) -> Totals:
    """The sum of predicted chances over that of the labels."""
    return ratio(shown.per_user(shown.chance), shown.per_user(shown.labels))


def calibration_error(shown: Candidates) -> Totals:
    """The mean absolute difference of mean chance and mean label in ten bins of equal size.

    The bins are those of all candidates, for the interval too.
    """
    chance = shown.chance
    # equal chances share their mean label: which of them falls into which bin must not matter
    _, place, counts = np.unique(chance, return_inverse=True, return_counts=True)
    labels = (np.bincount(place, weights=shown.labels) / counts)[place]
    parts = np.array_split(np.argsort(chance, kind="stable"), min(BINS, len(chance)))
    columns = np.zeros((shown.users, len(parts) + 1))
    for number, part in enumerate(parts):
        columns[:, number] = _sums(shown.user[part], chance[part] - labels[part], shown.users)
    columns[:, -1] = shown.per_user(np.ones(len(chance)))
    return Totals(columns, lambda sums: quotient(np.abs(sums[..., :-1]).sum(-1), sums[..., -1]))


def grouped_auc(
    scores: Floats, positive: npt.NDArray[np.bool_], group: IntArray, count: int
) -> Floats:
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
    better = positive[order]
    positives = np.bincount(owner, weights=better, minlength=count)
    negatives = sizes - positives
    ranks = np.bincount(owner, weights=mean_rank * better, minlength=count)
    return quotient(ranks - positives * (positives + 1) / 2, positives * negatives)


def _sums(group: IntArray, values: npt.NDArray[np.generic], count: int) -> Floats:
    sums: Floats = np.bincount(group, weights=values, minlength=count).astype(np.float64)
    return sums

"""The registry of metrics: each is one entry here, of ranks of targets or of scored candidates.

A target is one held-out item, so ``Recall@k`` equals ``HitRate@k``: both are offered because papers
use either word.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from everlong.data.arrays import IntArray
from everlong.evaluation import candidates, gain
from everlong.evaluation.candidates import Candidates
from everlong.evaluation.interval import SEED, Estimate, Floats, Totals, estimates

Best = Literal["higher", "lower", "one"]
"""Which values of a metric are better; ``one``: what is closer to 1."""


class RankMetric(NamedTuple):
    """A metric of the rank of a target, counted up to a cut-off."""

    gain: Callable[[Floats], Floats]
    """Of ranks from 1."""
    unit: str
    best: Best


RANK_METRICS: Mapping[str, RankMetric] = {
    "HitRate": RankMetric(gain.hit, "share", "higher"),
    "Recall": RankMetric(gain.hit, "share", "higher"),
    "NDCG": RankMetric(gain.discounted, "share", "higher"),
    "MRR": RankMetric(gain.reciprocal, "share", "higher"),
}
"""Metrics of targets by their names, without the cut-off."""


class CandidateMetric(NamedTuple):
    """A metric of scored candidates with labels."""

    totals: Callable[[Candidates, int], Totals]
    """Of the candidates and the number of places, which only metrics with a cut-off use."""
    unit: str
    best: Best
    cut_off: bool = False
    """Whether the name goes with a number of places, as in ``NDCG@10``."""


CANDIDATE_METRICS: Mapping[str, CandidateMetric] = {
    "AUC": CandidateMetric(lambda shown, k: candidates.auc(shown), "share", "higher"),
    "GAUC": CandidateMetric(lambda shown, k: candidates.gauc(shown), "share", "higher"),
    "GAUC@request": CandidateMetric(
        lambda shown, k: candidates.gauc_of_requests(shown), "share", "higher"
    ),
    "NDCG": CandidateMetric(candidates.ndcg, "share", "higher", cut_off=True),
    "MRR": CandidateMetric(lambda shown, k: candidates.mrr(shown), "share", "higher"),
    "LogLoss": CandidateMetric(lambda shown, k: candidates.log_loss(shown), "nats", "lower"),
    "Calibration": CandidateMetric(lambda shown, k: candidates.calibration(shown), "ratio", "one"),
    "ECE": CandidateMetric(lambda shown, k: candidates.calibration_error(shown), "share", "lower"),
}
"""Metrics of rankers by their names."""


def candidate_metrics(k: int = 10) -> dict[str, CandidateMetric]:
    """All metrics of rankers by the names that they are printed with."""
    return {
        f"{name}@{k}" if metric.cut_off else name: metric
        for name, metric in CANDIDATE_METRICS.items()
    }


ALIASES: Mapping[str, str] = {
    **{name.lower(): name for name in RANK_METRICS},
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
        if self.name not in RANK_METRICS:
            raise ValueError(unknown_metric(self.name))
        if self.k < 1:
            raise ValueError(
                f"{self.name}@k counts the first k places: expected k >= 1, received {self.k}"
            )

    def __str__(self) -> str:
        return f"{self.name}@{self.k}"

    def of(self, ranks: IntArray) -> Floats:
        """The value for each rank (from 1), same shape as ``ranks``; 0 beyond place k.

        Raises:
            ValueError: if a rank is below 1.
        """
        if ranks.size and ranks.min() < 1:
            raise ValueError(f"ranks count from 1: received {ranks.min()}; add 1 to places from 0")
        value = RANK_METRICS[self.name].gain(ranks.astype(np.float64))
        return np.where(ranks <= self.k, value, 0.0)


DEFAULT: tuple[Metric, ...] = tuple(
    Metric(name, k) for name in RANK_METRICS for k in (1, 5, 10, 20, 50)
)


def parse_metric(text: str) -> Metric:
    """The metric that a text such as ``ndcg@10`` or ``HR@5`` names.

    Raises:
        ValueError: if the text is not ``NAME@K``, or the name is unknown (names the nearest).
    """
    match = re.fullmatch(r"\s*([A-Za-z_]+)\s*@\s*([0-9]+)\s*", text)
    if match is None:
        raise ValueError(
            f"a metric is a name and a cut-off, such as NDCG@10: received {text!r}; "
            f"names are {', '.join(RANK_METRICS)}"
        )
    name = ALIASES.get(match[1].lower())
    if name is None:
        raise ValueError(unknown_metric(match[1]))
    return Metric(name, int(match[2]))


def unknown_metric(name: str) -> str:
    """The error text for a name that is no metric."""
    nearest = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.0)
    return (
        f"unknown metric {name!r}: expected one of {', '.join(RANK_METRICS)}; "
        f"did you mean {ALIASES[nearest[0]]!r}?"
    )


def user_means(
    ranks: IntArray, users: IntArray, metrics: Sequence[Metric]
) -> tuple[IntArray, Floats]:
    """The users in rising order ``[U]`` and each one's mean over their targets ``[U, M]``.

    Args:
        ranks: ``[Q]`` rank of each target, from 1.
        users: ``[Q]`` the user of each target.
        metrics: ``M`` metrics.
    """
    unique, inverse, counts = np.unique(users, return_inverse=True, return_counts=True)
    means = np.empty((unique.size, len(metrics)))
    for column, metric in enumerate(metrics):
        sums = np.bincount(inverse, weights=metric.of(ranks), minlength=unique.size)
        means[:, column] = sums / counts
    return unique, means


def estimate(
    ranks: IntArray, users: IntArray, metrics: Sequence[Metric], *, seed: int = SEED
) -> dict[str, Estimate]:
    """Each metric's name and estimate: mean over a user's targets first, then over users.

    Args:
        ranks: ``[Q]`` rank of each target, from 1.
        users: ``[Q]`` the user of each target.
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
    unique, means = user_means(ranks, users, metrics)

    # as many users are drawn as there are
    def mean(sums: Floats) -> Floats:
        found: Floats = sums[..., 0] / unique.size
        return found

    return estimates(
        {str(metric): Totals(means[:, i : i + 1], mean) for i, metric in enumerate(metrics)},
        seed=seed,
    )

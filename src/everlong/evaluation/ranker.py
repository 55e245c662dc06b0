"""The measurement of rankers, from the scores and labels of candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from everlong.evaluation import history
from everlong.evaluation.candidates import Candidates, Ranked
from everlong.evaluation.interval import METHOD, Estimate, estimates
from everlong.evaluation.metrics import candidate_metrics


@dataclass(frozen=True, kw_only=True, eq=False)
class RankingEvaluation:
    """Metrics of a ranker.

    Attributes:
        metrics: name to value and bootstrap interval over users.
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
            "interval": METHOD,
            "metrics": metrics,
        }


def evaluate_ranking(ranked: Ranked, *, k: int = 10) -> RankingEvaluation:
    """All ``CANDIDATE_METRICS``.

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
    shown = Candidates.of(ranked)
    totals = {name: metric.totals(shown, k) for name, metric in candidate_metrics(k).items()}
    return RankingEvaluation(
        metrics=estimates(totals),
        candidates=len(shown.labels),
        requests=len(shown.owner),
        users=shown.users,
        skipped_users=int(np.isnan(shown.user_auc).sum()),
        skipped_requests=int(np.isnan(shown.request_auc).sum()),
    )


def by_history_length(ranked: Ranked) -> pl.DataFrame:
    """One row a bucket and metric: ``history, users, candidates, metric, mean, low, high``."""

    def measure(mask: history.Mask) -> history.Measured | None:
        part = ranked.select(mask)
        if np.isnan(part.labels).all():
            return None
        found = evaluate_ranking(part)
        return history.Measured(found.users, found.candidates, found.metrics)

    return history.by_history_length(ranked.history_lengths, "candidates", measure)

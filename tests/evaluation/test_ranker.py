"""Metrics of rankers against definitions written out."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlong.evaluation import candidates
from everlong.evaluation.candidates import Candidates, Ranked, grouped_auc
from everlong.evaluation.interval import estimates
from everlong.evaluation.metrics import CANDIDATE_METRICS
from everlong.evaluation.ranker import by_history_length, evaluate_ranking


def pairs_in_order(scores: np.ndarray, labels: np.ndarray) -> float:
    better, worse = scores[labels > 0], scores[labels == 0]
    if not len(better) or not len(worse):
        return float("nan")
    gap = better[:, None] - worse[None]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def random_ranked(seed: int, unknown: float = 0.2) -> Ranked:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 8, 12)
    labels = generator.integers(0, 2, sizes.sum()).astype(float)
    labels[generator.random(len(labels)) < unknown] = np.nan
    return Ranked(
        logits=generator.integers(-3, 4, sizes.sum()) / 2,
        labels=labels,
        request=np.repeat(np.arange(12), sizes),
        user=np.sort(generator.integers(0, 5, 12)),
        history_lengths=generator.integers(0, 300, 12),
    )


@given(pairs=st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 1)), min_size=1, max_size=20))
def test_auc_counts_pairs_with_ties_half(pairs: list[tuple[int, int]]) -> None:
    scores, labels = (np.array(column) for column in zip(*pairs, strict=True))
    expected = pairs_in_order(scores, labels)
    one_group = np.zeros(len(scores), dtype=np.int64)
    found = grouped_auc(scores.astype(float), labels > 0, one_group, 1)
    np.testing.assert_allclose(found[0], expected)
    # by sums over users, here one a candidate
    everyone = replace(
        one_request(scores.tolist(), labels.tolist()),
        request=np.arange(len(scores)),
        user=np.arange(len(scores)),
        history_lengths=one_group,
    )
    totals = candidates.auc(Candidates.of(everyone))
    np.testing.assert_allclose(totals.value(totals.columns.sum(0)), expected)


@pytest.mark.parametrize("seed", range(5))
def test_all_metrics_are_their_definitions(seed: int) -> None:
    ranked = random_ranked(seed)
    found = evaluate_ranking(ranked, k=3)
    known = ~np.isnan(ranked.labels)
    logits, labels, request = ranked.logits[known], ranked.labels[known], ranked.request[known]
    user = ranked.user[request]

    def grouped(group: np.ndarray) -> float:
        values = [(pairs_in_order(logits[group == g], labels[group == g]), (group == g).sum()) for g in np.unique(group)]  # noqa: E501  # fmt: skip
        values = [(value, weight) for value, weight in values if not np.isnan(value)]
        return float(np.average([v for v, _ in values], weights=[w for _, w in values]))

    chance = 1 / (1 + np.exp(-logits))
    by_user: dict[int, list[tuple[float, float]]] = {}
    for number in np.unique(request):
        mine = labels[request == number], logits[request == number]
        if len(set(mine[0])) < 2:
            continue
        # of equal scores the worse candidate stands first
        order = sorted(range(len(mine[0])), key=lambda n: (-mine[1][n], mine[0][n]))
        gains = [mine[0][n] / np.log2(place + 2) for place, n in enumerate(order[:3])]
        ideal = sum(g / np.log2(p + 2) for p, g in enumerate(sorted(mine[0], reverse=True)[:3]))
        first = next(place for place, n in enumerate(order) if mine[0][n] > 0)
        by_user.setdefault(int(ranked.user[number]), []).append(
            (sum(gains) / ideal, 1 / (first + 1))
        )
    means = np.array([np.mean(values, axis=0) for values in by_user.values()])
    expected = {
        "AUC": pairs_in_order(logits, labels),
        "GAUC": grouped(user),
        "GAUC@request": grouped(request),
        "NDCG@3": means[:, 0].mean(),
        "MRR": means[:, 1].mean(),
        "LogLoss": -np.mean(labels * np.log(chance) + (1 - labels) * np.log(1 - chance)),
        "Calibration": chance.sum() / labels.sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found.metrics[name].mean, value, err_msg=name)
    for name in ("AUC", "GAUC", "NDCG@3", "LogLoss"):
        low, high = found.metrics[name].low, found.metrics[name].high
        assert low <= found.metrics[name].mean <= high


@pytest.mark.parametrize("seed", range(3))
def test_orders_ignore_monotone_changes_of_the_score(seed: int) -> None:
    ranked = random_ranked(seed)
    a = evaluate_ranking(ranked).metrics
    b = evaluate_ranking(replace(ranked, logits=np.exp(ranked.logits) * 3 - 1)).metrics
    for name in ("AUC", "GAUC", "GAUC@request", "NDCG@10", "MRR"):
        assert a[name].mean == pytest.approx(b[name].mean)


def test_unlabelled_candidates_count_for_nothing() -> None:
    ranked = random_ranked(1)
    known = ~np.isnan(ranked.labels)
    arrays = {name: getattr(ranked, name)[known] for name in ("logits", "labels", "request")}
    without = replace(ranked, **arrays)
    a, b = (evaluate_ranking(r).as_dict() for r in (ranked, without))
    np.testing.assert_equal(a, b)


def test_groups_of_equal_labels_are_skipped_and_counted() -> None:
    ranked = Ranked(
        logits=np.array([1.0, 2, 3, 0]),
        labels=np.array([1.0, 1, 0, 1]),
        request=np.array([0, 0, 1, 1]),
        user=np.array([0, 1]),
        history_lengths=np.array([3, 700]),
    )
    found = evaluate_ranking(ranked)
    assert (found.skipped_users, found.skipped_requests) == (1, 1)
    assert found.metrics["GAUC"].mean == 0
    alone = evaluate_ranking(ranked.select(np.array([True, False])))
    assert np.isnan(alone.metrics["GAUC"].mean)
    assert np.isnan(alone.metrics["AUC"].mean)
    table = by_history_length(ranked)
    assert table["history"].unique(maintain_order=True).to_list() == ["1-4", "500-999"]


def calibration_error(chance: np.ndarray, labels: np.ndarray) -> float:
    """The metric of given chances."""
    logits = np.log(chance) - np.log1p(-chance)
    totals = candidates.calibration_error(Candidates.of(one_request(logits, labels)))
    return float(totals.value(totals.columns.sum(0)))


def test_calibration_error_is_nothing_where_chances_are_right() -> None:
    chance = np.repeat([0.2, 0.8], 50)
    labels = np.concatenate([np.arange(50) < 10, np.arange(50) < 40]).astype(float)
    # in bins of ten the labels stand in blocks: the error is of the bins, not of the whole
    shuffled = np.random.default_rng(0).permutation(50)
    labels = np.concatenate([labels[:50][shuffled], labels[50:][shuffled]])
    assert calibration_error(chance, labels) < 0.15
    assert calibration_error(1 - chance, labels) > 0.5


def test_nothing_labelled_is_an_error() -> None:
    ranked = random_ranked(0)
    with pytest.raises(ValueError, match="candidates with labels, received none"):
        evaluate_ranking(replace(ranked, labels=np.full_like(ranked.labels, np.nan)))


def one_request(logits: list[float], labels: list[float]) -> Ranked:
    return Ranked(
        logits=np.array(logits),
        labels=np.array(labels),
        request=np.zeros(len(logits), dtype=np.int64),
        user=np.zeros(1, dtype=np.int64),
        history_lengths=np.zeros(1, dtype=np.int64),
    )


def test_scores_that_are_no_numbers_are_an_error_and_large_ones_are_none() -> None:
    with pytest.raises(ValueError, match="expected finite scores, received 1 of 2"):
        evaluate_ranking(one_request([np.nan, 0.0], [1.0, 0.0]))
    found = evaluate_ranking(one_request([-800.0, 800.0], [0.0, 1.0])).metrics
    assert found["LogLoss"].mean == found["ECE"].mean == 0


def test_labels_below_a_half_are_negative() -> None:
    found = evaluate_ranking(one_request([1.0, 0.0], [0.3, 0.7])).metrics
    assert found["AUC"].mean == 0
    assert found["MRR"].mean == 0.5


def test_calibration_error_is_of_ten_bins_and_not_of_the_order_of_rows() -> None:
    assert calibration_error(np.full(100, 0.5), np.repeat([0.0, 1.0], 50)) == 0
    # wrong by a quarter within halves, in both directions: two bins would not see it
    chance = np.linspace(0.01, 0.99, 20)
    chance = 0.25 + chance / 2
    labels = np.tile([0.25, 0.25, -0.25, -0.25], 5) + chance
    np.testing.assert_allclose(calibration_error(chance, labels), 0.25)


def test_intervals_are_as_wide_as_theory_says() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 400).astype(float)
    ranked = Ranked(
        logits=generator.normal(size=400),
        labels=labels,
        request=np.arange(400),
        user=np.arange(400),
        history_lengths=np.arange(400),
    )
    found = evaluate_ranking(ranked).metrics["LogLoss"]
    losses = np.logaddexp(0, ranked.logits) - labels * ranked.logits
    assert found.high - found.low == pytest.approx(2 * 1.96 * losses.std() / 20, rel=0.15)
    table = by_history_length(ranked)
    sizes = table.filter(table["metric"] == "AUC")["candidates"].to_list()
    assert sizes == [1, 4, 15, 30, 150, 200]


def test_the_interval_of_auc_is_that_of_whole_users() -> None:
    generator = np.random.default_rng(0)
    user = np.repeat(np.arange(150), 6)
    # what a user likes is in both scores and labels, so that candidates of a user are alike
    taste = generator.normal(size=150)[user]
    labels = (generator.random(900) < 1 / (1 + np.exp(-taste))).astype(float)
    logits = taste + generator.normal(size=900)
    ranked = Ranked(
        logits=logits,
        labels=labels,
        request=np.arange(900),
        user=user,
        history_lengths=np.zeros(900, dtype=np.int64),
    )
    found = evaluate_ranking(ranked).metrics["AUC"]
    values = []
    for _ in range(300):
        drawn = generator.integers(150, size=150)
        rows = np.concatenate([np.flatnonzero(user == one) for one in drawn])
        values.append(pairs_in_order(logits[rows], labels[rows]))
    low, high = np.quantile(values, [0.025, 0.975])
    width = high - low
    assert found.low == pytest.approx(low, abs=0.15 * width)
    assert found.high == pytest.approx(high, abs=0.15 * width)


def test_every_metric_says_its_unit_and_which_values_are_better() -> None:
    shown = Candidates.of(random_ranked(0))
    assert {metric.best for metric in CANDIDATE_METRICS.values()} == {"higher", "lower", "one"}
    totals = {name: metric.totals(shown, 3) for name, metric in CANDIDATE_METRICS.items()}
    for name, value in estimates(totals).items():
        assert value.low <= value.high, name
        if CANDIDATE_METRICS[name].unit == "share":
            assert 0 <= value.low <= value.high <= 1, name

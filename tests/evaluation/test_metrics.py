"""Metrics against tables small enough for hand, an independent library, and known distributions."""

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.evaluation.interval import Estimate
from everlong.evaluation.metrics import (
    DEFAULT,
    RANK_METRICS,
    Metric,
    RankMetric,
    estimate,
    parse_metric,
    user_means,
)

RANKS = np.array([1, 2, 3, 4, 11])


@pytest.mark.parametrize(
    ("name", "at_3"),
    [
        ("HitRate", [1, 1, 1, 0, 0]),
        ("Recall", [1, 1, 1, 0, 0]),
        ("NDCG", [1, 0.6309297535714575, 0.5, 0, 0]),
        ("MRR", [1, 1 / 2, 1 / 3, 0, 0]),
    ],
)
def test_by_hand(name: str, at_3: list[float]) -> None:
    np.testing.assert_allclose(Metric(name, 3).of(RANKS), at_3, rtol=1e-15)


def test_default_is_four_metrics_at_five_cuts() -> None:
    assert [str(metric) for metric in DEFAULT[:5]] == [f"HitRate@{k}" for k in (1, 5, 10, 20, 50)]
    assert len(set(DEFAULT)) == 20


@given(st.sampled_from(DEFAULT))
def test_printed_metrics_parse_back(metric: Metric) -> None:
    assert parse_metric(str(metric)) == metric
    assert parse_metric(f" {str(metric).lower()} ") == metric


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("HR@10", "HitRate@10"),
        ("hit@5", "HitRate@5"),
        ("HITRATE @ 1", "HitRate@1"),
        ("rr@7", "MRR@7"),
        ("nDCG@20", "NDCG@20"),
    ],
)
def test_aliases(text: str, printed: str) -> None:
    assert str(parse_metric(text)) == printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NDGC@10", "unknown metric 'NDGC'.*did you mean 'NDCG'"),
        ("recal@10", "did you mean 'Recall'"),
        ("NDCG", "a name and a cut-off, such as NDCG@10"),
        ("NDCG@", "a name and a cut-off"),
        ("NDCG@-1", "a name and a cut-off"),
        ("NDCG@0", "expected k >= 1, received 0"),
        ("", "a name and a cut-off"),
    ],
)
def test_bad_names(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_metric(text)


def test_ranks_from_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks count from 1"):
        Metric("MRR", 10).of(np.array([0, 1]))


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_equal_to_ir_measures(seed: int, num_items: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.stack([rng.permutation(num_items) for _ in range(7)])
    target = rng.integers(num_items, size=7)
    ranks = (scores >= scores[np.arange(7), target][:, None]).sum(1)
    qrels = [ir_measures.Qrel(str(q), str(item), 1) for q, item in enumerate(target)]
    run = [
        ir_measures.ScoredDoc(str(q), str(item), float(score))
        for q, row in enumerate(scores)
        for item, score in enumerate(row)
    ]
    theirs = {"NDCG": "nDCG", "MRR": "RR", "Recall": "R", "HitRate": "Success"}
    names = {ir_measures.parse_measure(f"{theirs[m.name]}@{m.k}"): str(m) for m in DEFAULT}
    ours = estimate(ranks, np.arange(7), DEFAULT)
    for measure, value in ir_measures.calc_aggregate(list(names), qrels, run).items():
        assert ours[names[measure]].mean == pytest.approx(value, abs=1e-9)


def test_users_weigh_the_same_whatever_their_targets() -> None:
    # user 5 has one hit in four, user 2 one in one
    ranks, users = np.array([1, 9, 9, 1, 9]), np.array([5, 5, 5, 2, 5])
    unique, means = user_means(ranks, users, [Metric("HitRate", 1)])
    assert unique.tolist() == [2, 5]
    assert means[:, 0].tolist() == [1.0, 0.25]
    assert estimate(ranks, users, [Metric("HitRate", 1)])["HitRate@1"].mean == 0.625


def test_interval_keeps_the_targets_of_a_user_together() -> None:
    # ten users with a thousand equal targets each know no more than ten targets
    ranks = np.repeat([1, 9, 1, 9, 9, 1, 9, 1, 1, 9], 1000)
    many = estimate(ranks, np.repeat(np.arange(10), 1000), [Metric("HitRate", 1)])
    few = estimate(ranks[::1000], np.arange(10), [Metric("HitRate", 1)])
    assert many == few
    assert few["HitRate@1"].high - few["HitRate@1"].low > 0.4


def test_one_user_has_no_spread() -> None:
    assert estimate(np.array([2]), np.array([9]), [Metric("MRR", 5)]) == {
        "MRR@5": Estimate(0.5, 0.5, 0.5)
    }


def test_no_targets() -> None:
    with pytest.raises(ValueError, match="at least one target"):
        estimate(np.array([], dtype=np.int64), np.array([], dtype=np.int64), DEFAULT)


def test_a_metric_is_one_entry_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = RankMetric(lambda ranks: ranks**-2, "share", "higher")
    monkeypatch.setitem(RANK_METRICS, "Square", entry)  # type: ignore[arg-type]
    found = estimate(np.array([1, 2]), np.array([0, 1]), [Metric("Square", 5)])
    assert found["Square@5"].mean == 0.625

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import polars as pl
import pytest

from everlong.data.synthetic import (
    SyntheticLog,
    best_scores,
    demo_log,
    exposures,
    long_dependency,
    markov_chain,
    markov_transitions,
)


def histories(log: SyntheticLog, column: str = "item_id") -> list[list[int]]:
    ordered = log.frame.sort("user_id", "timestamp")
    grouped = ordered.group_by("user_id", maintain_order=True).agg(column)
    return grouped[column].to_list()


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: markov_chain(20, 30, 15, seed=seed),
        lambda seed: long_dependency(9, distances=(5, 20), seed=seed),
        lambda seed: demo_log(seed, num_users=20, num_items=420, mean_length=60, cycle=12),
    ],
)
def test_logs_are_reproducible_by_seed_and_have_valid_timestamps(make) -> None:
    log = make(1)
    assert log.frame.equals(make(1).frame)
    assert not log.frame.equals(make(2).frame)
    assert log.frame.columns[:3] == ["user_id", "item_id", "timestamp"]
    assert log.frame["timestamp"].is_sorted()
    assert log.frame["timestamp"].min() > 1_600_000_000
    assert log.frame.select("user_id", "timestamp").is_unique().all()
    assert log.description


def test_best_scores_equal_hand_computed_values() -> None:
    scores = best_scores(np.array([[0.0, 0.5, 0.2, 0.3], [1.0, 0.0, 0.0, 0.0]]))
    assert scores["HitRate@1"] == pytest.approx(0.75)
    assert scores["HitRate@10"] == pytest.approx(1.0)
    assert scores["MRR@10"] == pytest.approx((0.5 + 0.3 / 2 + 0.2 / 3 + 1) / 2)
    assert scores["NDCG@10"] == pytest.approx((0.5 + 0.3 / np.log2(3) + 0.2 / 2 + 1) / 2)
    # ranks beyond ten count nothing
    assert best_scores(np.full((1, 20), 0.05))["HitRate@10"] == pytest.approx(0.5)


def test_markov_chain_follows_its_matrix() -> None:
    matrix = markov_transitions(8, num_next=3, seed=4)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)
    assert ((matrix > 0).sum(axis=1) == 3).all()
    log = markov_chain(400, 8, 60, num_next=3, seed=4)
    counts = np.zeros((8, 8))
    for history in histories(log):
        for before, after in pairwise(history):
            counts[before, after] += 1
    assert counts[matrix == 0].sum() == 0
    visited = counts.sum(axis=1) > 500
    assert visited.sum() >= 3
    frequent = counts[visited] / counts[visited].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(frequent, matrix[visited], atol=0.1)
    # the oracle, played: always the likeliest item
    hits = [matrix[history[-2]].argmax() == history[-1] for history in histories(log)]
    assert np.mean(hits) == pytest.approx(log.best["HitRate@1"], abs=0.08)


def test_the_dependency_has_exactly_the_given_distance() -> None:
    log = long_dependency(300, distances=(4, 17, 50), num_cues=6, num_fillers=9, seed=2)
    rule: dict[int, int] = {}
    cues: list[int] = []
    frame = log.frame.sort("user_id", "timestamp")
    for user in frame.partition_by("user_id", maintain_order=True):
        items = user["item_id"].to_list()
        distance = (4, 17, 50)[user["user_id"][0] % 3]
        answers = user["is_answer"].cast(pl.Boolean).arg_true().to_list()
        last = len(items) - 1
        assert answers == [last // 2 - 1, last // 2, last - 1, last]
        assert user["distance"].to_list() == [
            distance if n in answers else 0 for n in range(last + 1)
        ]
        for answer in answers:
            cue = items[answer - distance]
            cues.append(cue)
            assert rule.setdefault(cue, items[answer]) == items[answer]
            # neither cue nor answer comes anywhere else in the history
            assert items.count(cue) == items.count(items[answer]) == 1
    assert len(rule) == len(set(rule.values())) == 12
    # every cue is about equally likely, so nothing is learnt but by seeing it
    shares = pl.Series(cues).value_counts(normalize=True)["proportion"]
    assert 0.5 / 12 < shares.min() <= shares.max() < 1.6 / 12
    assert log.best["HitRate@1"] == log.best["NDCG@10"] == 1
    assert log.best_without_cue["HitRate@1"] == pytest.approx(1 / 5)


def test_the_answer_is_in_the_cue_and_not_in_the_window_after_it() -> None:
    log = long_dependency(4000, distances=(8,), num_cues=5, num_fillers=2, seed=0)
    items = histories(log)

    def accuracy(window: int) -> float:
        """Of the likeliest answer after each window, from half the users, on the other half."""
        answers: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for history in items[::2]:
            answers[tuple(history[-1 - window : -1])][history[-1]] += 1
        hits = [
            history[-1] in dict(answers[tuple(history[-1 - window : -1])].most_common(1))
            for history in items[1::2]
        ]
        return float(np.mean(hits))

    # seven events back is one short of the cue; its 160 windows come a dozen times each
    assert accuracy(7) < 0.25
    assert accuracy(8) > 0.9


def test_the_oracle_of_the_demo_log_reaches_the_best_scores() -> None:
    log = demo_log(3, num_users=2500, num_items=420, mean_length=48, cycle=12)
    played = []
    answers = 0
    for history in histories(log):
        rest = [item for item in history if item != "evening"]
        assert len(set(rest)) == len(rest)
        last = history[-1]
        if history[-5] == "evening" and history.count("evening") > 1:
            answers += 1
            # the show goes on: one part after the last that was read
            read = [item for item in history[:-1] if item.startswith("show")][-1]
            title, part = read.rsplit("-", 1)
            played.append(last == f"{title}-{int(part) + 1}")
    assert answers / log.frame["user_id"].n_unique() == pytest.approx(0.7, abs=0.04)
    assert np.mean(played) == pytest.approx(0.9, abs=0.03)
    assert 0.9 * answers / 2500 < log.best["HitRate@1"] < 0.9 * answers / 2500 + 0.2
    assert log.best_without_cue["NDCG@10"] < log.best["NDCG@10"] - 0.3


def test_demo_log_marks_its_answers() -> None:
    log = demo_log(0, num_users=50, num_items=420, mean_length=48, cycle=12)
    for items, flags in zip(histories(log), histories(log, "is_answer"), strict=True):
        evenings = [n for n, item in enumerate(items) if item == "evening"]
        expected = [n for start in evenings[1:] for n in range(start + 1, start + 5)]
        assert [n for n, flag in enumerate(flags) if flag] == expected
        assert all(later - earlier == 12 for earlier, later in pairwise(evenings))


def test_errors_name_the_expected_values() -> None:
    with pytest.raises(ValueError, match="length of at least 2, received 1"):
        markov_chain(3, 5, 1)
    with pytest.raises(ValueError, match="num_next between 1 and num_items=3"):
        markov_transitions(3, num_next=4)
    with pytest.raises(ValueError, match="distances of at least 3, received 2"):
        long_dependency(3, distances=(10, 2))
    with pytest.raises(ValueError, match="distances of at least 3"):
        long_dependency(3, distances=())
    with pytest.raises(ValueError, match="num_cues of at least 3, received 2"):
        long_dependency(3, num_cues=2, episodes=3)
    with pytest.raises(ValueError, match="num_items of at least"):
        demo_log(num_items=100)
    with pytest.raises(ValueError, match="answer_share between 0 and 1"):
        demo_log(answer_share=2)


def test_liked_groups_give_the_best_order_of_exposures() -> None:
    log = exposures(num_users=2_000, seed=1)
    frame = log.frame
    assert frame.height == 2_000 * 12 * 5
    assert frame["timestamp"].is_sorted()
    # groups that a user gave more ones than zeros in all of the log
    group = frame.with_columns(group=pl.col("item_id") % 10)
    rate = group.with_columns(rate=pl.col("label").mean().over("user_id", "group") > 0.5)
    labels, scores = rate["label"].to_numpy(), rate["rate"].to_numpy().astype(float)
    better, worse = scores[labels == 1].mean(), scores[labels == 0].mean()
    found = better * (1 - worse) + 0.5 * (better * worse + (1 - better) * (1 - worse))
    # the rate knows the label itself, too, so that it may be a little above the oracle
    assert found == pytest.approx(log.best["AUC"], abs=0.03)
    again = exposures(num_users=2_000, seed=1).frame
    assert again.equals(frame)
    with pytest.raises(ValueError, match="num_groups"):
        exposures(num_groups=3)

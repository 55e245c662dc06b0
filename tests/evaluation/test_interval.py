"""The interval of metrics: known distributions, and bits that no order of summation changes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.evaluation.interval import (
    Estimate,
    Totals,
    bounds,
    estimates,
    ratio,
    resampled,
    summable,
)


def bootstrap(means: np.ndarray, seed: int = 0) -> list[tuple[float, float]]:
    """Bounds of the mean of each column ``[U, M]``."""
    sums = resampled(means, seed=seed) / len(means)
    return [bounds(sums[:, column]) for column in range(means.shape[1])]


def test_interval_of_a_proportion() -> None:
    rng = np.random.default_rng(0)
    means = (rng.random((2000, 1)) < 0.3).astype(float)
    ((low, high),) = bootstrap(means)
    error = 1.96 * np.sqrt(means.var() / 2000)
    assert low == pytest.approx(means.mean() - error, abs=0.003)
    assert high == pytest.approx(means.mean() + error, abs=0.003)


def test_interval_is_seeded_and_blocks_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    means = np.random.default_rng(1).random((50, 2))
    whole = bootstrap(means, seed=3)
    monkeypatch.setattr("everlong.evaluation.interval.DRAWS", 120)
    blocked = bootstrap(means, seed=3)
    np.testing.assert_array_equal(whole, blocked)
    assert not np.array_equal(whole, bootstrap(means, seed=4))


def test_interval_does_not_depend_on_the_last_bits_of_the_means() -> None:
    # one mean of three targets, summed in two orders, as two processors or two logs may have it
    gains = np.random.default_rng(2).random((60, 3))
    means = np.stack([(gains[:, 0] + gains[:, 1]) + gains[:, 2], gains[:, 0] + gains[:, 1:].sum(1)])
    assert not np.array_equal(*means)
    repeated = np.concatenate([means[0], means[1]])[:, None]
    np.testing.assert_array_equal(
        bootstrap(repeated), bootstrap(np.concatenate([means[1], means[1]])[:, None])
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 1000]), st.sampled_from([1e-3, 1.0, 50]))
@settings(max_examples=25)
def test_summable_values_sum_alike_in_any_order(seed: int, users: int, peak: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.random((users, 1)) * peak - peak / 3
    rounded = summable(values)
    np.testing.assert_allclose(rounded, values, rtol=0, atol=peak / 2**40)
    drawn = rng.integers(users, size=users)
    exact = math.fsum(rounded[drawn, 0])
    assert sum(rounded[drawn, 0].tolist()) == exact
    assert float(np.bincount(drawn, minlength=users).astype(float) @ rounded[:, 0]) == exact


def test_columns_of_other_sizes_are_summable_each_on_its_own() -> None:
    values = np.array([[1e12, 1e-9], [3e12, 2e-9]])
    np.testing.assert_allclose(summable(values), values, rtol=1e-11)
    assert summable(np.zeros((3, 2))).tolist() == [[0.0, 0.0]] * 3


def test_interval_of_a_ratio() -> None:
    # the delta method: the variance of r = sum(a) / sum(b) is that of (a - r b) / mean(b)
    rng = np.random.default_rng(0)
    bottom = rng.integers(1, 9, 3000).astype(float)
    top = rng.binomial(bottom.astype(int), 0.2).astype(float)
    found = estimates({"ratio": ratio(top, bottom)})["ratio"]
    assert found.mean == top.sum() / bottom.sum()
    error = 1.96 * (top - found.mean * bottom).std() / bottom.mean() / np.sqrt(3000)
    assert found.low == pytest.approx(found.mean - error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + error, abs=0.1 * error)


def test_what_is_not_defined_is_nan_and_does_not_count_where_it_is_resampled() -> None:
    nothing = ratio(np.zeros(4), np.zeros(4))
    assert np.isnan(estimates({"none": nothing})["none"]).all()
    # in a third of the draws the one user that counts is not there
    rare = ratio(np.array([2.0, 0, 0, 0]), np.array([4.0, 0, 0, 0]))
    assert estimates({"rare": rare})["rare"] == Estimate(0.5, 0.5, 0.5)


def test_metrics_of_one_evaluation_see_the_same_draws() -> None:
    values = np.random.default_rng(0).random((30, 1))
    once = Totals(values, lambda sums: sums[..., 0])
    twice = Totals(2 * values, lambda sums: sums[..., 0])
    found = estimates({"once": once, "twice": twice})
    assert found["twice"] == Estimate(*(2 * part for part in found["once"]))


def test_the_order_of_users_does_not_matter() -> None:
    values = np.random.default_rng(0).random((40, 3))
    shuffled = values[np.random.default_rng(1).permutation(40)]
    np.testing.assert_array_equal(resampled(values), resampled(shuffled))

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from everlong.models.batch import Batch
from everlong.models.popularity import (
    Popularity,
    PopularityConfig,
    RecentPopularity,
    RecentPopularityConfig,
)

DAY_S = 86_400
NOW_S = 1_700_000_000


def batch(items: list[list[int]], times: list[list[int]] | None = None) -> Batch:
    return Batch.from_histories(items, times)


def test_the_score_of_an_item_is_its_number_of_events() -> None:
    model = Popularity(PopularityConfig(num_items=4))
    model.observe(batch([[2, 2, 0], [], [2]]))
    model.observe(batch([[3]]))
    scores = model.score(model.initial_state(2))
    assert scores.tolist() == [[1, 0, 3, 1]] * 2
    some = model.score(model.initial_state(1), torch.tensor([[1, 2, 2]]))
    assert some.tolist() == [[0, 3, 3]]


def test_every_user_is_alike() -> None:
    model = Popularity(PopularityConfig(num_items=4))
    model.observe(batch([[2, 2, 0]]))
    _, state = model.encode(batch([[0, 0, 0], [1]]))
    assert torch.equal(model.score(state), model.score(model.initial_state(2)))


def test_events_lose_half_with_every_half_life() -> None:
    model = RecentPopularity(RecentPopularityConfig(num_items=3, half_life_s=DAY_S))
    old, new = NOW_S - 2 * DAY_S, NOW_S
    model.observe(batch([[0, 0, 0, 1]], [[old, old, old, new]]))
    scores = model.score(model.initial_state(1))
    torch.testing.assert_close(scores, torch.tensor([[0.75, 1.0, 0.0]]))


@settings(max_examples=25)
@given(
    events=st.lists(
        st.tuples(st.integers(0, 4), st.integers(NOW_S - 400 * DAY_S, NOW_S)), min_size=1
    ),
    cut=st.integers(0, 30),
)
def test_recent_counts_do_not_depend_on_the_parts_that_they_come_in(events, cut) -> None:
    half_life_s = 30.0 * DAY_S
    model = RecentPopularity(RecentPopularityConfig(num_items=5, half_life_s=half_life_s))
    for part in (events[cut:], [], events[:cut]):
        model.observe(batch([[i for i, _ in part]], [[t for _, t in part]]))
    latest = max(t for _, t in events)
    expected = [0.0] * 5
    for item, time in events:
        expected[item] += 0.5 ** ((latest - time) / half_life_s)
    torch.testing.assert_close(model.counts, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_counts_of_times_before_1970_and_of_positions() -> None:
    model = RecentPopularity(RecentPopularityConfig(num_items=2, half_life_s=1.0))
    model.observe(batch([[0, 1]], [[-10 * DAY_S - 1, -10 * DAY_S]]))
    torch.testing.assert_close(model.counts, torch.tensor([0.5, 1.0]))


def test_counts_are_stored_with_the_model() -> None:
    config = RecentPopularityConfig(num_items=3)
    model, other = RecentPopularity(config), RecentPopularity(config)
    model.observe(batch([[0, 2, 2]]))
    other.load_state_dict(load(save(model.state_dict())))
    assert torch.equal(other.counts, model.counts)
    assert other.latest == model.latest


def test_a_half_life_is_positive() -> None:
    with pytest.raises(ValueError, match="half_life_s > 0"):
        RecentPopularityConfig(num_items=3, half_life_s=0.0)

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from everlong.models.batch import Batch
from everlong.models.markov import Markov, MarkovConfig

ITEMS = 6
HISTORIES = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=8), min_size=1, max_size=6)


def counted(histories: list[list[int]], backoff: float = 1.0) -> Markov:
    model = Markov(MarkovConfig(num_items=ITEMS, backoff=backoff))
    model.observe(Batch.from_histories(histories))
    return model


@settings(max_examples=40)
@given(
    histories=HISTORIES, last=st.integers(-1, ITEMS - 1), backoff=st.sampled_from([0.1, 1.0, 7.0])
)
def test_scores_are_smoothed_shares_of_what_followed(histories, last, backoff) -> None:
    events = Counter(item for h in histories for item in h)
    pairs = Counter((a, b) for h in histories for a, b in pairwise(h))
    followers = sum(n for (a, _), n in pairs.items() if a == last)
    total = max(1, sum(events.values()))
    expected = [
        (pairs[last, item] + backoff * events[item] / total) / (followers + backoff)
        for item in range(ITEMS)
    ]
    model = counted(histories, backoff)
    user = torch.tensor([[last], [last]])
    torch.testing.assert_close(model.score_vectors(user), torch.tensor([expected] * 2))
    some = torch.tensor([[5, 0, 0], [1, 2, 3]])
    torch.testing.assert_close(
        model.score_vectors(user, some), torch.tensor([expected] * 2).gather(1, some)
    )


@settings(max_examples=20)
@given(histories=HISTORIES, cut=st.integers(0, 6))
def test_counts_do_not_depend_on_the_parts_that_they_come_in(histories, cut) -> None:
    whole, parts = counted(histories), Markov(MarkovConfig(num_items=ITEMS))
    for part in (histories[cut:], histories[:cut]):
        parts.observe(Batch.from_histories(part))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_only_pairs_that_were_seen_take_memory() -> None:
    items = 2_000_000
    model = Markov(MarkovConfig(num_items=items))
    model.observe(Batch.from_histories([[items - 1, 0, items - 1, 0, 5]]))
    assert model.pairs.tolist() == [5, items - 1, (items - 1) * items]
    assert model.pair_counts.tolist() == [1, 1, 2]
    _, state = model.encode(Batch.from_histories([[3, items - 1]]))
    best = model.score(state, torch.tensor([[0, 1, 5]]))
    assert best.argmax() == 0


def test_the_state_is_the_last_item() -> None:
    model = counted([[0, 1]])
    _, state = model.encode(Batch.from_histories([[4, 2], [], [3]]))
    assert state.user.flatten().tolist() == [2, -1, 3]
    assert state.user.dtype == torch.int64


def test_a_fresh_model_loads_stored_counts() -> None:
    model = counted([[0, 1, 2, 0, 1], [5, 5]])
    fresh = Markov(MarkovConfig(num_items=ITEMS))
    fresh.load_state_dict(load(save(model.state_dict())))
    user = torch.arange(-1, ITEMS)[:, None]
    assert torch.equal(fresh.score_vectors(user), model.score_vectors(user))
    with pytest.raises(RuntimeError, match="size mismatch for followers"):
        Markov(MarkovConfig(num_items=ITEMS + 1)).load_state_dict(model.state_dict())


def test_backoff_is_positive() -> None:
    with pytest.raises(ValueError, match="backoff > 0"):
        MarkovConfig(num_items=3, backoff=0.0)

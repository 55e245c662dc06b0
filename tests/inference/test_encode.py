"""States of many rows at once are the states of each row alone."""

from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from everlong.data.dataset import gather
from everlong.data.events import Events, read_events
from everlong.inference.encode import encode_histories
from everlong.models.batch import Batch
from everlong.models.device import device_of, serving
from everlong.models.user_model import UserModel


class SumState(NamedTuple):
    user: Tensor
    count: Tensor


class DecayedSum(UserModel):
    """The state halves at every event and adds the event's item vector."""

    def __init__(self, num_items: int) -> None:
        super().__init__(num_items)
        # powers of two stay exact, so results can be compared without tolerance
        self.item = nn.Embedding(num_items, 2, dtype=torch.float64)
        self.item.weight.data = torch.arange(2.0 * num_items, dtype=torch.float64).view(-1, 2)
        self.noise = nn.Dropout(0.5)
        self.largest_batch = 0

    def initial_state(self, num_users: int) -> SumState:
        return SumState(
            torch.ones(num_users, 2, dtype=torch.float64), torch.zeros(num_users).long()
        )

    def encode(self, events: Batch, state: SumState | None = None) -> tuple[Tensor, SumState]:
        user, count = self.initial_state(events.num_users) if state is None else state
        vectors = self.noise(self.item(events.items))
        self.largest_batch = max(self.largest_batch, events.num_events)
        user, outputs = list(user), []
        for row, vector in zip(events.user_rows.tolist(), vectors, strict=True):
            user[row] = 0.5 * user[row] + vector
            outputs.append(user[row])
        stacked = torch.stack(outputs) if outputs else vectors
        return stacked, SumState(torch.stack(user), count + events.lengths)


def some_events(seed: int = 0, lengths: tuple[int, ...] = (9, 1, 30, 4, 4)) -> Events:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    return read_events(
        pl.DataFrame(
            {
                "user_id": np.repeat(np.arange(len(lengths)), lengths),
                "item_id": np.concatenate([np.arange(8), rng.integers(8, size=total - 8)]),
                "timestamp": 1_600_000_000 + np.arange(total),
            }
        )
    )


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 48), st.integers(0, 48)), max_size=7), st.integers(1, 60))
def test_equal_to_each_row_alone(ranges: list[tuple[int, int]], budget: int) -> None:
    events, model = some_events(), DecayedSum(8)
    start = np.array([min(pair) for pair in ranges], dtype=np.int64)
    stop = np.array([max(pair) for pair in ranges], dtype=np.int64)
    told: list[tuple[int, int]] = []
    state = encode_histories(
        model, events, start, stop, events_per_batch=budget, progress=lambda *at: told.append(at)
    )
    assert isinstance(state, SumState)
    assert model.largest_batch <= budget
    assert state.count.tolist() == (stop - start).tolist()
    for row in range(len(ranges)):
        with serving(model):
            alone = model.encode(gather(events, start[[row]], stop[[row]]))[1]
        assert torch.equal(state.user[row], alone.user[0])
    total = int((stop - start).sum())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {of for _, of in told} <= {total}
    assert not told or told[-1] == (total, total)


def test_batches_keep_to_the_budget() -> None:
    events, model = some_events(), DecayedSum(8)
    encode_histories(model, events, events.offsets[:-1], events.offsets[1:], events_per_batch=7)
    assert model.largest_batch == 7


def fail_while_serving(model: DecayedSum) -> None:
    with serving(model):
        assert not model.training
        assert not model.noise.training
        assert not torch.is_grad_enabled()
        raise KeyError


def test_modes_are_put_back_even_after_an_error() -> None:
    model = DecayedSum(4)
    model.train()
    model.item.eval()
    with pytest.raises(KeyError):
        fail_while_serving(model)
    assert model.training
    assert model.noise.training
    assert not model.item.training
    assert torch.is_grad_enabled()


def test_states_carry_no_gradients() -> None:
    events = some_events()
    state = encode_histories(DecayedSum(8), events, np.array([0]), np.array([3]))
    assert not state[0].requires_grad


def test_device_is_the_models() -> None:
    assert device_of(DecayedSum(3)) == torch.device("cpu")
    assert device_of(DecayedSum(3).to("meta")) == torch.device("meta")


def test_ranges_outside_the_log_are_refused() -> None:
    events, model = some_events(), DecayedSum(8)
    with pytest.raises(ValueError, match=r"received \[3, 49\) in row 1"):
        encode_histories(model, events, np.array([0, 3]), np.array([2, 49]))
    with pytest.raises(ValueError, match="a start and a stop"):
        encode_histories(model, events, np.array([0, 3]), np.array([2]))

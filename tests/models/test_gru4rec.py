from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from everlong.models.batch import Batch
from everlong.models.gru4rec import GRU4Rec, GRU4RecConfig, time_major

CONFIG = GRU4RecConfig(num_items=7, dim=4, hidden=5, layers=2)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_hand(model: GRU4Rec, history: list[int]) -> list[Tensor]:
    """The user vectors after each event, from the equations of a gated recurrent unit."""
    hidden = [torch.zeros(model.config.hidden, dtype=torch.float64) for _ in range(2)]
    outputs = []
    for item in history:
        value = model.items.table()[item]
        for layer in range(model.config.layers):
            w_in, w_hidden, b_in, b_hidden = model.recurrence.all_weights[layer]
            from_input = (w_in @ value + b_in).chunk(3)
            from_hidden = (w_hidden @ hidden[layer] + b_hidden).chunk(3)
            reset = torch.sigmoid(from_input[0] + from_hidden[0])
            update = torch.sigmoid(from_input[1] + from_hidden[1])
            new = torch.tanh(from_input[2] + reset * from_hidden[2])
            hidden[layer] = value = (1 - update) * new + update * hidden[layer]
        outputs.append(model.leave(value))
    return outputs


def test_outputs_follow_the_equations() -> None:
    torch.manual_seed(0)
    model = GRU4Rec(CONFIG).double().eval()
    histories = [[1, 2, 3, 4, 5], [], [6], [0, 0]]
    outputs, state = model.encode(Batch.from_histories(histories))
    expected = [vector for history in histories for vector in by_hand(model, history)]
    torch.testing.assert_close(outputs, torch.stack(expected))
    torch.testing.assert_close(model.user_embedding(state)[0], expected[4])
    torch.testing.assert_close(model.user_embedding(state)[1], model.leave.bias)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_time_major_visits_every_event_once_in_order(lengths: list[int]) -> None:
    batch = Batch.from_histories([[0] * n for n in lengths])
    users, where, sizes = time_major(batch)
    assert sorted(where.tolist()) == list(range(sum(lengths)))
    assert users.tolist() == sorted(users.tolist(), key=lambda u: (-lengths[u], u))
    offsets, start = batch.offsets, 0
    for position, size in enumerate(sizes.tolist()):
        expected = [int(offsets[user]) + position for user in users[:size].tolist()]
        assert where[start : start + size].tolist() == expected
        start += size


def test_the_state_stays_float32_under_narrow_products() -> None:
    model, batch = GRU4Rec(CONFIG), Batch.from_histories([[1, 2], [], [3]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors, (_, state) = model(batch), model.encode(batch)
    assert state.hidden.dtype == torch.float32
    assert vectors.shape == (3, 4)


def test_dropout_is_active_in_training_alone() -> None:
    torch.manual_seed(0)
    model, batch = GRU4Rec(CONFIG), Batch.from_histories([[1, 2, 3]])
    assert not torch.equal(model.encode(batch)[0], model.encode(batch)[0])
    model.eval()
    assert torch.equal(model.encode(batch)[0], model.encode(batch)[0])


def test_it_learns_which_item_follows_which() -> None:
    torch.manual_seed(0)
    items = 12
    follower = torch.randperm(items)
    first = torch.arange(items)
    histories = torch.stack([first, follower[first], follower[follower[first]]], 1)
    batch = Batch.from_histories(histories.tolist())
    model = GRU4Rec(GRU4RecConfig(num_items=items, dim=16, hidden=16, dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(80):
        scores = model.score_vectors(model(batch))
        loss = functional.cross_entropy(scores, batch.items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    known = torch.ones(batch.num_events, dtype=torch.bool)
    known[batch.offsets[:-1]] = False
    scores = model.score_vectors(model(batch))[known]
    assert functional.cross_entropy(scores, batch.items[known]) < 0.1


def test_sizes_are_positive() -> None:
    with pytest.raises(ValueError, match="layers >= 1"):
        GRU4RecConfig(num_items=3, layers=0)

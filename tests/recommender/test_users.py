from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everlong.models import state as states
from everlong.recommender.users import UserTable


class Memory(NamedTuple):
    value: Tensor


INITIAL = Memory(torch.full((1, 2), 0.5))


def table() -> UserTable:
    return UserTable(INITIAL)


def test_new_users_begin_with_the_initial_state() -> None:
    users = table()
    assert users.add(pl.Series(["b", "a", "b"])) == 2
    assert users.add(pl.Series(["a", "c"])) == 1
    assert users.ids == ["b", "a", "c"]
    assert users.rows(pl.Series(["c", "x", "b"])).tolist() == [2, -1, 0]
    (values,) = users.read_states(torch.tensor([0, 2]))
    assert torch.equal(values, INITIAL.value.expand(2, -1))


def test_growing_keeps_what_was_written() -> None:
    users = table()
    users.add(pl.Series(range(3)))
    users.write_states(torch.tensor([1]), Memory(torch.tensor([[7.0, 8.0]])))
    for first in range(3, 200, 7):
        users.add(pl.Series(range(first, first + 7)))
    assert users.read_states(torch.tensor([1]))[0].tolist() == [[7.0, 8.0]]
    assert users.read_states(torch.tensor([150]))[0].tolist() == [[0.5, 0.5]]


def test_a_state_of_another_shape_is_refused() -> None:
    users = table()
    users.add(pl.Series([1]))
    with pytest.raises(ValueError, match="keeps its spec"):
        users.write_states(torch.tensor([0]), Memory(torch.zeros(1, 3)))


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=3, max_size=3), max_size=4)
)
def test_every_item_is_kept_once_however_it_came(batches: list[list[list[int]]]) -> None:
    users = table()
    users.add(pl.Series(range(3)))
    # rows in another order than they were added
    rows = np.array([2, 0, 1])
    histories: dict[int, list[int]] = {row: [] for row in range(3)}
    clock = 0
    for batch in batches:
        flat = [item for items in batch for item in items]
        offsets = np.cumsum([0, *(len(items) for items in batch)])
        times = np.arange(clock, clock + len(flat))
        clock += len(flat)
        assert users.note(rows, offsets, np.array(flat, dtype=np.int64), times) == 0
        for row, items in zip(rows, batch, strict=True):
            histories[row] += items
    seen = users.seen.rows(np.arange(3))
    for row, history in histories.items():
        assert seen[row].tolist() == sorted(set(history))
        assert users.num_events[row] == len(history)


def test_late_events_are_counted_and_the_newest_time_is_kept() -> None:
    users = table()
    users.add(pl.Series(range(2)))
    rows, offsets = np.arange(2), np.array([0, 2, 3])
    items = np.zeros(3, dtype=np.int64)
    assert users.note(rows, offsets, items, np.array([10, 20, 5])) == 0
    assert users.note(rows, offsets, items, np.array([15, 30, 5])) == 1
    assert users.last_time[:2].tolist() == [30, 5]


def test_bytes_per_user_are_what_is_stored() -> None:
    users = table()
    users.add(pl.Series(range(10)))
    items = np.array([7, 1, 7, 9, 3, 1])
    users.note(np.array([4, 8]), np.array([0, 5, 6]), items, np.arange(6))
    stored = sum(value.nbytes for value in users.trimmed().values())
    size = users.bytes_per_user
    # one number more than users says where the last one ends
    assert stored == 10 * size.total + 8
    assert size == (states.bytes_per_user(INITIAL), 16, 4 * 5 / 10 + 8)


def test_what_is_stored_restores_the_table() -> None:
    users = table()
    users.add(pl.Series(["x", "y"]))
    users.write_states(torch.tensor([1]), Memory(torch.tensor([[1.0, 2.0]])))
    users.note(np.array([1]), np.array([0, 1]), np.array([5]), np.array([99]))
    again = UserTable.restore(pl.Series(users.ids), users.trimmed(), INITIAL)
    assert again.ids == users.ids
    for name, value in users.trimmed().items():
        assert torch.equal(again.trimmed()[name], value)
    again.add(pl.Series(["z"]))
    assert again.read_states(torch.tensor([2]))[0].tolist() == [[0.5, 0.5]]


def test_stored_users_of_another_model_are_refused() -> None:
    users = table()
    users.add(pl.Series(["x", "y"]))
    stored, ids = users.trimmed(), pl.Series(users.ids)
    with pytest.raises(ValueError, match="expected 1 rows"):
        UserTable.restore(ids[:1], stored, INITIAL)
    with pytest.raises(ValueError, match="belong to another model"):
        UserTable.restore(ids, stored, Memory(torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="stored users: expected"):
        UserTable.restore(ids, {**stored, "more": torch.zeros(2)}, INITIAL)


def test_impossible_arguments_are_refused() -> None:
    users = table()
    users.add(pl.Series([1]))
    with pytest.raises(ValueError, match="expected int as in 1, received str as in 'a'"):
        users.add(pl.Series(["a"]))

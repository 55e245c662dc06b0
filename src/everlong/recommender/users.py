"""The users that a recommender knows: their states and what they have seen, in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from everlong.data.arrays import IntArray
from everlong.data.events import Events
from everlong.inference.encode import read_ranges
from everlong.inference.seen import MemorySeen, UserBytes
from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.device import device_of
from everlong.models.state import State
from everlong.models.user_model import UserModel


class UserTable:
    """One row a user: state, number of events, time of the last one, and all items seen.

    Args:
        initial: the state of one user without events.
    """

    def __init__(self, initial: State) -> None:
        self._initial = states.detach(initial)
        self._rows: dict[Any, int] = {}
        self.states = states.take(self._initial, torch.empty(0, dtype=torch.int64))
        self.seen = MemorySeen()
        self.num_events = np.zeros(0, dtype=np.int64)
        self.last_time = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def bytes_per_user(self) -> UserBytes:
        """State, the two counters, and seen items with where they begin."""
        self.seen.merge()
        seen = self.seen.items.nbytes / max(1, len(self)) + 8
        return UserBytes(states.bytes_per_user(self._initial), 16, seen)

    @property
    def ids(self) -> list[Any]:
        """User ids in the order of their rows."""
        return list(self._rows)

    def rows(self, ids: pl.Series) -> IntArray:
        """The row of each id, -1 where unknown."""
        return np.fromiter((self._rows.get(i, -1) for i in ids.to_list()), np.int64, len(ids))

    def add(self, ids: pl.Series) -> int:
        """Adds the ids that are new, with the initial state; returns how many were.

        Raises:
            ValueError: if they are of another type than the ids that are there.
        """
        new = [i for i in ids.unique(maintain_order=True).to_list() if i not in self._rows]
        known = next(iter(self._rows), None)
        if new and known is not None and type(new[0]) is not type(known):
            raise ValueError(
                f"user ids have one type: expected {type(known).__name__} as in {known!r}, "
                f"received {type(new[0]).__name__} as in {new[0]!r}"
            )
        first, count = len(self), len(new)
        self._rows |= {i: first + place for place, i in enumerate(new)}
        self._reserve(first + count)
        return count

    def _reserve(self, size: int) -> None:
        """Room for ``size`` users; grows by doubling, so that adding one at a time stays cheap."""
        have = self.num_events.size
        if size <= have:
            return
        more = max(size, 2 * have) - have
        fresh = states.take(self._initial, torch.zeros(more, dtype=torch.int64))
        self.states = states.concat([self.states, fresh])
        self.num_events = np.concatenate([self.num_events, np.zeros(more, dtype=np.int64)])
        self.last_time = np.concatenate([self.last_time, np.zeros(more, dtype=np.int64)])

    def read_states(self, rows: Tensor) -> State:
        """The states of some users."""
        return states.take(self.states, rows)

    def write_states(self, rows: Tensor, new: State) -> None:
        """Replaces the states of some users."""
        states.check_same(states.take(self.states, rows), new)
        for stored, value in zip(self.states, new, strict=True):
            stored.index_copy_(0, rows, value)

    def note(self, rows: IntArray, offsets: IntArray, items: IntArray, times: IntArray) -> int:
        """Notes events that were read; returns how many came later than a newer one.

        Args:
            rows: ``[B]`` distinct users.
            offsets: ``[B + 1]`` where the events of each begin.
            items, times: ``[N]``, oldest first.
        """
        lengths = np.diff(offsets)
        owners = np.repeat(rows, lengths)
        known = self.num_events[owners] > 0
        late = int((known & (times < self.last_time[owners])).sum())
        self.seen.add(rows, offsets, items)
        busy = lengths > 0
        newest = times[offsets[1:][busy] - 1]
        before = np.where(self.num_events[rows[busy]] > 0, self.last_time[rows[busy]], newest)
        self.last_time[rows[busy]] = np.maximum(newest, before)
        self.num_events[rows] += lengths
        return late

    def next_position(self, rows: IntArray) -> IntArray:
        """One after the time of each user's newest event; 0 for users without events."""
        following: IntArray = np.where(self.num_events[rows] > 0, self.last_time[rows] + 1, 0)
        return following

    def trimmed(self) -> dict[str, Tensor]:
        """All rows as named tensors, without the spare room, for storage."""
        size = len(self)
        named = zip(states.field_names(self.states), self.states, strict=True)
        tensors = {f"state/{name}": value[:size].contiguous() for name, value in named}
        self.seen.merge()
        missing = np.full(size + 1 - self.seen.offsets.size, self.seen.items.size)
        tensors["seen/items"] = torch.from_numpy(self.seen.items)
        tensors["seen/offsets"] = torch.from_numpy(np.append(self.seen.offsets, missing))
        tensors["num_events"] = torch.from_numpy(self.num_events[:size].copy())
        tensors["last_time"] = torch.from_numpy(self.last_time[:size].copy())
        return tensors

    @classmethod
    def restore(cls, ids: pl.Series, tensors: dict[str, Tensor], initial: State) -> UserTable:
        """The table that ``trimmed`` described.

        Raises:
            ValueError: if the tensors do not belong to this model, or to these ids.
        """
        names = [f"state/{name}" for name in states.field_names(initial)]
        per_user = {*names, "num_events", "last_time"}
        wanted = {*per_user, "seen/items", "seen/offsets"}
        if set(tensors) != wanted:
            raise ValueError(f"stored users: expected {sorted(wanted)}, found {sorted(tensors)}")
        if any(tensors[name].shape[0] != len(ids) for name in per_user):
            raise ValueError(f"stored users: expected {len(ids)} rows, as there are ids")
        table = cls(initial)
        stored = type(initial)(*(tensors[name] for name in names))
        if states.spec(stored) != states.spec(initial):
            raise ValueError(
                f"stored users: expected states {states.spec(initial)}, "
                f"found {states.spec(stored)}; the states belong to another model"
            )
        table._rows = {i: row for row, i in enumerate(ids.to_list())}
        table.states = stored
        offsets = tensors["seen/offsets"].numpy()
        if offsets.size != len(ids) + 1:
            raise ValueError(f"stored users: expected seen items of {len(ids)} users")
        table.seen = MemorySeen.restored(tensors["seen/items"].numpy(), offsets)
        table.num_events = tensors["num_events"].numpy()
        table.last_time = tensors["last_time"].numpy()
        return table


def read_into(model: UserModel, table: UserTable, events: Events) -> int:
    """Reads events into the states of a table that has their users; returns how many were late."""
    rows = table.rows(events.user_ids.ids(np.arange(events.num_users)))
    device, late = device_of(model), 0

    def before(some: IntArray) -> State:
        return states.to_device(table.read_states(torch.from_numpy(rows[some])), device)

    def after(some: IntArray, new: State, batch: Batch) -> None:
        nonlocal late
        found = states.detach(states.to_device(new, "cpu"))
        table.write_states(torch.from_numpy(rows[some]), found)
        arrays = (batch.offsets.numpy(), batch.items.numpy(), batch.times.numpy())
        late += table.note(rows[some], *arrays)

    read_ranges(model, events, events.offsets[:-1], events.offsets[1:], before=before, after=after)
    return late

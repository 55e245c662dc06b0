"""Seen items: every distinct item of every event of a user, so that lists can leave them out.

A state of fixed size cannot know everything that a user saw, so the item rows are kept beside it:
4 bytes for each distinct item of a user. Nothing is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from everlong.inference.filters import Rows

BYTES_PER_ITEM = 4
"""Bytes for each distinct item of a user."""

PENDING = 1 << 16
"""Items of new events that are kept apart from the others, or half as many as those if more."""


class UserBytes(NamedTuple):
    """What is kept for a user, in bytes; only seen items grow with the history."""

    state: int
    """The state of the model, whatever the length of the history."""
    counters: int
    """Number of events, time of the newest one, and where the user stands in the log."""
    seen: float
    """Seen items, on average over the users: 4 bytes for each distinct one."""

    @property
    def total(self) -> int:
        """All parts together."""
        return round(sum(self))

    def __str__(self) -> str:
        return (
            f"{self.total:,} bytes per user: {self.state:,} state, {self.counters:,} counters, "
            f"{round(self.seen):,} seen items (4 each)"
        )


class SeenItems(Protocol):
    """Which items users have seen, by the numbers of the users."""

    def rows(self, users: Sequence[int] | np.ndarray) -> Rows:
        """Item rows ``[n]`` of each user, rising, each once."""
        ...


class MemorySeen:
    """Seen items in memory: packed, 4 bytes for each distinct item of a user.

    Items of new events are kept apart and merged into the others when there are half as many, so
    that an event costs the same however many there were.
    """

    def __init__(self) -> None:
        self.items = np.empty(0, dtype=np.int32)
        """``[E]``, those of each user rising."""
        self.offsets = np.zeros(1, dtype=np.int64)
        """``[U + 1]``, where those of each user begin."""
        self._pending: dict[int, list[np.ndarray]] = {}
        self._num_pending = 0

    @classmethod
    def restored(cls, items: np.ndarray, offsets: np.ndarray) -> MemorySeen:
        """What ``items`` and ``offsets`` were after ``merge``.

        Raises:
            ValueError: if they do not fit each other.
        """
        found = cls()
        if (
            offsets.size == 0
            or offsets[0] != 0
            or offsets[-1] != items.size
            or (np.diff(offsets) < 0).any()
            or (items < 0).any()
        ):
            raise ValueError(
                "stored seen items: expected item rows and where those of each user begin, "
                "received others; restore the folder from a copy"
            )
        owners = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
        if ((np.diff(items) <= 0) & (np.diff(owners) == 0)).any():
            raise ValueError(
                "stored seen items: expected rising rows for each user, received others; restore "
                "the folder from a copy"
            )
        found.items = np.ascontiguousarray(items, dtype=np.int32)
        found.offsets = np.ascontiguousarray(offsets, dtype=np.int64)
        return found

    def add(self, users: np.ndarray, offsets: np.ndarray, items: np.ndarray) -> None:
        """Adds the items of events.

        Args:
            users: ``[B]`` numbers of users.
            offsets: ``[B + 1]`` where the items of each begin.
            items: ``[N]`` item rows.
        """
        self._num_pending += items.size
        if self._num_pending > max(PENDING, self.items.size // 2):
            self._merge(np.repeat(users, np.diff(offsets)), items)
            return
        cuts = offsets.tolist()
        for place, user in enumerate(users.tolist()):
            if cuts[place + 1] > cuts[place]:
                own = items[cuts[place] : cuts[place + 1]].astype(np.int32)
                self._pending.setdefault(user, []).append(own)

    def rows(self, users: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Item rows ``[n]`` int64 of each user, rising, each once; none of users without events."""
        known, found = self.offsets.size - 1, []
        for user in np.asarray(users, dtype=np.int64).tolist():
            own = self.items[:0]
            if user < known:
                own = self.items[self.offsets[user] : self.offsets[user + 1]]
            new = self._pending.get(user)
            if new is not None:
                own = np.unique(np.concatenate([own, *new]))
            found.append(own.astype(np.int64))
        return found

    def merge(self) -> None:
        """Puts the items of all events into ``items`` and ``offsets``."""
        self._merge(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def _merge(self, owners: np.ndarray, items: np.ndarray) -> None:
        sizes = np.diff(self.offsets)
        owner = [np.repeat(np.arange(sizes.size), sizes), owners]
        rows = [self.items, items]
        for user, parts in self._pending.items():
            owner.append(np.full(sum(part.size for part in parts), user))
            rows += parts
        self._pending, self._num_pending = {}, 0
        whose, what = np.concatenate(owner), np.concatenate(rows).astype(np.int64)
        width = int(what.max(initial=0)) + 1
        # one number for a user and an item; quicker than np.unique, which hashes first
        pairs = np.sort(whose * width + what, kind="stable")
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]
        whose, what = np.divmod(pairs, width)
        users = max(sizes.size, int(whose.max(initial=-1)) + 1)
        self.items = what.astype(np.int32)
        self.offsets = np.concatenate([[0], np.cumsum(np.bincount(whose, minlength=users))])

"""Seen items of users as rows of a catalogue: read from the log once, and then only what is new.

The log holds the events, and an index of it finds those of a user. The items of users that asked
last are cached, because those of ten thousand events would be read for every list.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from cachetools import LRUCache

from everlong.data.ids import IdMap
from everlong.server.store.log import EventLog, EventReader, Id

CAPACITY = 1 << 20
"""Most rows that are kept, 8 bytes each."""

ROWS_EACH = 48
"""What a user takes beside the rows, in rows."""


class _Own(NamedTuple):
    """What a user has seen up to an offset of the log."""

    offset: int
    rows: np.ndarray


class Seen:
    """Items of users' events.

    Args:
        log_of: the log of a user.
        capacity: most rows that are kept; a user counts as some more.
    """

    def __init__(self, log_of: Callable[[Id], EventLog], *, capacity: int = CAPACITY) -> None:
        self._log_of, self.capacity = log_of, capacity
        self._logs: dict[EventLog, EventReader] = {}
        self._kept: LRUCache[Id, _Own] = LRUCache(capacity, getsizeof=_size)
        self._item_ids: IdMap | None = None
        # rows that were read before an erasure are not kept after it
        self._erasures, self._lock = 0, threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def rows(self, user_id: Id, item_ids: IdMap) -> np.ndarray:
        """Rows ``[n]`` of a user's items in a catalogue, rising; called by one thread.

        Raises:
            DamagedError: if the log is not what was written.
            OSError: if it cannot be read.
        """
        with self._lock:
            erasures = self._erasures
            if item_ids is not self._item_ids:
                self._kept.clear()
                self._item_ids = item_ids
            own = self._kept.get(user_id, _Own(0, np.empty(0, dtype=np.int64)))
        new = self._log(user_id).items_of_user(user_id, own.offset)
        if new:
            own = _Own(new[-1][0], _with(own.rows, new, item_ids))
        with self._lock:
            if erasures == self._erasures:
                self._keep(user_id, own)
        return own.rows

    def forget(self, user_id: Id) -> None:
        """Lets go of what is known of a user who is not in the log any more; of any thread."""
        with self._lock:
            self._erasures += 1
            self._kept.pop(user_id, None)

    def close(self) -> None:
        """Closes the logs; of the thread that reads."""
        for log in self._logs.values():
            log.close()

    def _log(self, user_id: Id) -> EventReader:
        log = self._log_of(user_id)
        if log not in self._logs:
            self._logs[log] = log.reader()
        return self._logs[log]

    def _keep(self, user_id: Id, own: _Own) -> None:
        """Caches a user's items; those of the users that asked longest ago make room."""
        # of users without events nothing is cached: a client can make up any number of ids
        if own.offset and _size(own) <= self.capacity:
            self._kept[user_id] = own


def _size(own: _Own) -> int:
    return own.rows.size + ROWS_EACH


def _with(rows: np.ndarray, new: list[tuple[int, Id]], item_ids: IdMap) -> np.ndarray:
    """Rising rows, and those of new items."""
    found = {item_ids.row_of[item] for _, item in new if item in item_ids.row_of}
    added = np.array(sorted(found), dtype=np.int64)
    if not rows.size:
        return added
    places = np.searchsorted(rows, added)
    fresh = rows[np.minimum(places, rows.size - 1)] != added
    return np.insert(rows, places[fresh], added[fresh])

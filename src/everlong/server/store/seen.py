"""What users have seen, as rows of a catalogue: read from the log once, and then what is new.

The log is the truth, and one index of it holds what is asked. But who has ten thousand events would
have them read for every list; so what was read is kept, for those who asked last.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

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
        self._kept: OrderedDict[Id, _Own] = OrderedDict()
        self._size = 0
        self._item_ids: IdMap | None = None
        # what was read before somebody was erased is not kept after that
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
                self._size, self._item_ids = 0, item_ids
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
            self._drop(user_id)

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
        """Puts a user last, and lets go of the first ones if there are too many rows."""
        self._drop(user_id)
        # of who is not in the log nothing is kept: anybody could make up ids
        if own.offset:
            self._kept[user_id] = own
            self._size += own.rows.size + ROWS_EACH
        while self._size > self.capacity:
            self._drop(next(iter(self._kept)))

    def _drop(self, user_id: Id) -> None:
        own = self._kept.pop(user_id, None)
        if own is not None:
            self._size -= own.rows.size + ROWS_EACH


def _with(rows: np.ndarray, new: list[tuple[int, Id]], item_ids: IdMap) -> np.ndarray:
    """Rising rows, and those of new items."""
    found = {item_ids.row_of[item] for _, item in new if item in item_ids.row_of}
    added = np.array(sorted(found), dtype=np.int64)
    if not rows.size:
        return added
    places = np.searchsorted(rows, added)
    fresh = rows[np.minimum(places, rows.size - 1)] != added
    return np.insert(rows, places[fresh], added[fresh])

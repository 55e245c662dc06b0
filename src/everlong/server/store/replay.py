"""From the log to states: the events that follow, whole histories of some users, or all of it.

A whole log is read once, in its order, into columns of 40 bytes an event; then the model reads
whole histories as in training, in the order of their times, many events by one product.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from everlong.server.store.decoded_events import DecodedEvents
from everlong.server.store.log import EventReader, Id, Slice
from everlong.server.store.state_table import Applied, StateTable
from everlong.system.memory import process_memory

SLICE, STEP = 1_024, 8_192
"""Events that are taken from the log at once: of a whole log so few that they stay in the caches of
a core, of what an table lacks more, because each time costs a look at its users."""

BYTES_AN_EVENT = 160
"""What an event takes while whole histories are read: its columns, and their order twice."""

LEAST_EVENTS = 1 << 20
"""Events that are in memory at once however little is free."""


def backfill(log: EventReader, table: StateTable, *, since: int | None = None) -> Applied:
    """Builds the states of all users of a log into an empty table, up to the log's last event.

    Args:
        log: it may be written to meanwhile.
        table: empty; its ``offset`` is where the log stood when this began.
        since: users without an event at or after this time are left out; they are built when they
            are asked for.

    Raises:
        DamagedError: if the log is not what was written.
        OSError: if it cannot be read.
    """
    total, applied = log.look(), Applied()
    # a log of more events than fit is read several times, each time for some of the users
    at_once = max(LEAST_EVENTS, process_memory().free // 4 // BYTES_AN_EVENT)
    parts = max(1, -(-total.events // at_once))
    for part in range(parts):
        with _without_collector():
            user_ids, owner, columns = _histories(log, table, total.last, part, parts)
        if since is not None:
            user_ids, owner, columns = _active(user_ids, owner, columns, since)
        applied = applied.plus(table.rebuild(user_ids, owner, columns))
    table.complete, table.offset = since is None, total.last
    return applied


def read_on(log: EventReader, table: StateTable) -> Applied:
    """Applies some more of a log's events, in the order of their arrival."""
    events = Slice.of(log.after(table.offset, STEP))
    if not table.complete:
        users = dict.fromkeys(events.user_ids)
        rebuild(log, table, [user_id for user_id in users if user_id not in table])
    applied = table.apply(events)
    # offsets after the last event are of events that were erased
    table.offset = events.offsets[-1] if events else max(table.offset, log.total.last)
    return applied


def rebuild(log: EventReader, table: StateTable, user_ids: Iterable[Id]) -> None:
    """Reads the whole histories of users; users without events are forgotten."""
    for user_id in user_ids:
        table.forget(user_id)
        if events := log.of_user(user_id):
            owner = np.zeros(len(events), dtype=np.int64)
            table.rebuild([user_id], owner, table.decoded(Slice.of(events)))


@contextmanager
def _without_collector() -> Iterator[None]:
    """A block in which nothing looks for cycles: millions of small objects come and go, none in a
    cycle, and to look at them takes as long as to read them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _histories(
    log: EventReader, table: StateTable, last: int, part: int, parts: int
) -> tuple[list[Id], np.ndarray, DecodedEvents]:
    """Users of one part, whose each event is, and the events in the order of the log."""
    number_of = _Numbers()
    owners, columns = [np.zeros(0, dtype=np.int64)], [table.decoded(Slice.of([]))]
    for events in log.slices(last, SLICE):
        found = (
            map(number_of.__getitem__, events.user_ids)
            if parts == 1
            else (number_of[one] if _part_of(one, parts) == part else -1 for one in events.user_ids)
        )
        owner = np.fromiter(found, dtype=np.int64, count=len(events.offsets))
        mine = table.decoded(events)
        owners.append(owner[owner >= 0])
        columns.append(mine if parts == 1 else mine.at(owner >= 0))
    return list(number_of), np.concatenate(owners), DecodedEvents.joined(columns)


class _Numbers(dict[Id, int]):
    """Users by number, each in the order of its first event."""

    def __missing__(self, user_id: Id) -> int:
        self[user_id] = number = len(self)
        return number


def _part_of(user_id: Id, parts: int) -> int:
    return zlib.crc32(repr(user_id).encode()) % parts


def _active(
    user_ids: list[Id], owner: np.ndarray, columns: DecodedEvents, since: int
) -> tuple[list[Id], np.ndarray, DecodedEvents]:
    """Only users with an event at or after a time."""
    newest = np.full(len(user_ids), np.iinfo(np.int64).min)
    np.maximum.at(newest, owner, columns.times)
    active = newest >= since
    kept = active[owner]
    number = np.cumsum(active) - 1
    chosen = [user_ids[place] for place in np.flatnonzero(active)]
    return chosen, number[owner[kept]], columns.at(kept)

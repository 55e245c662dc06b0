"""A shard: the events of some of the users, and their states in one model or several.

Four objects with one duty each. ``WriteQueue`` takes work from callers, ``Writer`` takes events to
the log and then to the states, ``StateCheckpoint`` writes states into the store now and then, and
``TableSet`` has the tables and builds them. A crash at any point leaves a log from which all else
follows: on start the events after the last mark are applied again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Self, TypeVar

import numba

from everlong.server.engine.state_checkpoint import StateCheckpoint
from everlong.server.engine.table_set import TableSet
from everlong.server.engine.write_queue import WriteQueue
from everlong.server.engine.writer import Writer
from everlong.server.store.log import Event, EventLog, Id, Receipt
from everlong.server.store.sqlite_log import SqliteLog
from everlong.server.store.sqlite_states import SqliteStates
from everlong.server.store.state_store import StateStore
from everlong.server.store.state_table import Applied, StateTable

T = TypeVar("T")


class Shard:
    """Events of some of the users, and their states.

    Args:
        log: the log; it is closed with the shard.
        store: records of states.
        name: of the shard, for its threads.
        capacity: most events that wait.
        on_erase: is called with each user who was erased, before the caller has the answer.
    """

    def __init__(
        self,
        log: EventLog,
        store: StateStore,
        *,
        name: str = "shard",
        capacity: int = 10_000,
        on_erase: Callable[[Id], None] | None = None,
    ) -> None:
        # threads of compiled loops are of the whole process: they must not step back with a writer
        numba.get_num_threads()
        self.log = log
        self._work = WriteQueue(capacity)
        self._tables = TableSet(log, store, self._work.do)
        self.checkpoint = StateCheckpoint(store, self._tables.tables)
        self.writer = Writer(
            log,
            store,
            self._work,
            self._tables,
            self.checkpoint,
            on_erase=on_erase,
            name=f"writer {name}",
        )
        self._closed = False

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        new: bool = True,
        capacity: int = 10_000,
        on_erase: Callable[[Id], None] | None = None,
    ) -> Self:
        """A shard in an SQLite file.

        Args:
            path: the file.
            new: whether it is made where there is none.
            capacity: most events that wait.
            on_erase: as above.

        Raises:
            DamagedError: if the log is not what was written.
            NewerFormatError: if a later version of everlong wrote it.
            OSError: if it cannot be opened.
        """
        log = SqliteLog(path, new=new).flush_beside()
        return cls(log, SqliteStates(log), name=path.name, capacity=capacity, on_erase=on_erase)

    def submit(self, events: Sequence[Event]) -> Future[list[Receipt]]:
        """Queues events; the future holds their receipts once they are on disk and applied.

        Raises:
            FullError: if there is no room for them; nothing is queued.
        """
        return self._work.submit(events)

    def erase(self, user_id: Id) -> Future[int]:
        """Queues the erasure of a user; the future holds how many events there were."""
        return self._work.do(lambda: self.writer.erase(user_id))

    def bring_up(self, table: StateTable, *, since: int | None = None) -> None:
        """Fills a table and keeps it up to date; see :meth:`TableSet.bring_up`."""
        self._tables.bring_up(table, since=since)

    def drop(self, table: StateTable) -> None:
        """Lets a table go, and its records."""
        self._tables.drop(table)

    def keep_records_of(self, names: Collection[str]) -> None:
        """Deletes the records of all models but some."""
        self._tables.keep_records_of(names)

    def warm(self, user_ids: Sequence[Id]) -> None:
        """Builds the states of users who are in the log but not in a table."""
        self._tables.warm(user_ids)

    def between(self, act: Callable[[], T]) -> Future[T]:
        """Has the writer's thread call something between two groups of events."""
        return self._work.do(act)

    @property
    def tables(self) -> Mapping[str, StateTable]:
        """The tables that are kept up to date, by the names of their models."""
        return self._tables.tables

    @property
    def applied(self) -> Applied:
        """What became of the events that the writer applied."""
        return self.writer.applied

    @property
    def repeated(self) -> int:
        """Events that were delivered again."""
        return self.writer.repeated

    @property
    def writable(self) -> bool:
        """Whether the last write succeeded."""
        return self.writer.writable

    @property
    def alive(self) -> bool:
        """Whether the writer goes on."""
        return self.writer.alive

    @property
    def waiting(self) -> int:
        """Events in the queue."""
        return self._work.waiting

    def close(self) -> None:
        """Writes what waits, then all states, and stops; a second time it does nothing."""
        if not self._closed:
            self._closed = True
            self._work.end()
        self.writer.join()
        self.log.close()

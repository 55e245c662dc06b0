"""The tables of a shard: each follows from the log, whatever happened before.

Guarantees: a table that is in the set has every event of the log up to its offset exactly once, in
order, and no event of a user who was erased. A table comes in by its records and the events after
them, or by the whole log; records that are damaged, missing or without a user are built again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from typing import Any

from everlong.server.store.log import DamagedError, EventLog, Id, Slice
from everlong.server.store.replay import backfill, read_on, rebuild
from everlong.server.store.state_store import StateStore
from everlong.server.store.state_table import Applied, StateTable
from everlong.system.threads import limited

log = logging.getLogger(__name__)

RECORDS = 8_192
"""Records that are read at once."""

NEAR = 8_192
"""A table that lacks fewer events is brought up to the log by the writer itself."""

Do = Callable[[Callable[[], Any]], Future[Any]]
"""Has the writer's thread call something between two groups of events."""


class TableSet:
    """Tables by the names of their models.

    Args:
        events: the log.
        store: records of states.
        do: of the writer, for what must not run beside it.
    """

    def __init__(self, events: EventLog, store: StateStore, do: Do) -> None:
        self._events, self._store, self._do = events, store, do
        self.tables: dict[str, StateTable] = {}
        # users who were erased while a table, by its name, was being filled
        self._erased_since: dict[str, set[Id]] = {}

    # of any thread but the writer's

    def bring_up(self, table: StateTable, *, since: int | None = None) -> None:
        """Fills a table and keeps it up to date from then on; events are taken meanwhile.

        From the records of its model if there are any, else from the whole log at once.

        Args:
            table: empty.
            since: see :func:`everlong.server.store.replay.backfill`.

        Raises:
            DamagedError: if the log is not what was written.
            OSError: if it cannot be read.
            MemoryError: if the states do not fit.
        """
        began = time.monotonic()
        try:
            self._do(lambda: self._restore(table)).result()
            if table.offset == 0:
                # of a model whose first writing was cut short
                self._delete_records({table.name} & self._do(self._store.models).result())
            with closing(self._events.reader()) as beside, limited(1):
                if table.offset == 0:
                    backfill(beside, table, since=since)
                while beside.look().last - table.offset > NEAR:
                    read_on(beside, table)
            self._do(lambda: self._add(table)).result()
        except BaseException:
            self._do(lambda: self._erased_since.pop(table.name, None)).result()
            raise
        log.info("%s: %d users in %.1f s", table.name, len(table), time.monotonic() - began)

    def drop(self, table: StateTable) -> None:
        """Lets a table go, and its records."""
        self._do(lambda: self.tables.pop(table.name, None)).result()
        self._delete_records({table.name})

    def keep_records_of(self, names: Collection[str]) -> None:
        """Deletes the records of all models but some."""
        self._delete_records(self._do(self._store.models).result() - set(names))

    def warm(self, user_ids: Sequence[Id]) -> None:
        """Builds the states of users who are in the log but not in a table."""
        self._do(lambda: self._warm(user_ids)).result()

    def _delete_records(self, names: Collection[str]) -> None:
        for name in names:
            while self._do(partial(self._store.delete_some, name)).result():
                pass

    # of the writer's thread

    def apply(self, before: int, fresh: Slice) -> Applied:
        """Reads new events into every table; returns what the first did.

        Args:
            before: the last offset of the log before them.
            fresh: events that were just appended.
        """
        applied = [self._apply(table, before, fresh) for table in self.tables.values()]
        return applied[0] if applied else Applied()

    def _apply(self, table: StateTable, before: int, fresh: Slice) -> Applied:
        if table.offset != before or not table.complete:
            # from where it stands: events that could not be applied are not passed over
            return self._catch_up(table)
        applied = table.apply(fresh)
        table.offset = self._events.total.last
        return applied

    def catch_up(self) -> None:
        """Applies what is in the log and not yet in a table."""
        for table in self.tables.values():
            self._catch_up(table)

    def forget(self, user_id: Id) -> None:
        """Overwrites the states of a user who is no longer in the log."""
        for table in self.tables.values():
            table.forget(user_id)
        for users in self._erased_since.values():
            users.add(user_id)

    def _catch_up(self, table: StateTable) -> Applied:
        applied = Applied()
        while table.offset < self._events.total.last:
            applied = applied.plus(read_on(self._events, table))
        return applied

    def _restore(self, table: StateTable) -> None:
        """Reads the records of a table's model; a user whose record is damaged is built anew."""
        self._erased_since[table.name] = set()
        mark = self._store.mark(table.name)
        if mark is None:
            return
        table.offset, table.complete = mark
        spoiled = list[Id]()
        try:
            for some in self._store.records(table.name, RECORDS):
                spoiled += table.load(some)
        except (DamagedError, OSError) as error:
            log.warning("states cannot be read, they are built from the log: %s", error)
            table.clear()
            return
        if spoiled:
            log.warning("%d state records were damaged: their users are read anew", len(spoiled))
            rebuild(self._events, table, spoiled)

    def _add(self, table: StateTable) -> None:
        # users that were erased meanwhile; they may have new events since
        rebuild(self._events, table, self._erased_since.pop(table.name, ()))
        self._catch_up(table)
        if table.complete and table.num_events != self._events.total.events:
            log.warning("the states of %s do not follow from the log: read anew", table.name)
            table.clear()
            backfill(self._events, table)
        self.tables[table.name] = table

    def _warm(self, user_ids: Sequence[Id]) -> None:
        for table in self.tables.values():
            if not table.complete:
                rebuild(self._events, table, [one for one in user_ids if one not in table])

"""Writes changed states into the store, a few at a time, and how far they go.

Guarantees: a mark says that every state that an event up to its offset has changed is in the store
as of then or later. Events never wait for more than one slice, and a store that fails costs time at
the next start, and no event.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from everlong.server.store.state_store import Mark, StateStore
from everlong.server.store.state_table import StateTable

log = logging.getLogger(__name__)

CHECKPOINT_S = 30.0
"""Time between two writings of states: what came since is read again after a crash."""

SLICE, IDLE_SLICE = 32, 4_096
"""States that are written between two groups of events: few, so that events wait for a moment, but
many while there are none."""


class Unwritten(NamedTuple):
    """States that are to be written, and the mark of their table after that."""

    table: StateTable
    mark: Mark
    rows: np.ndarray


class StateCheckpoint:
    """Of the tables of a shard; every method is called by the writer's thread.

    Args:
        store: where records go.
        tables: by the names of their models; it may change.
    """

    def __init__(self, store: StateStore, tables: Mapping[str, StateTable]) -> None:
        self._store, self._tables = store, tables
        self._pending: list[Unwritten] = []
        self._written: WeakKeyDictionary[StateTable, Mark] = WeakKeyDictionary()
        self._begun_at = time.monotonic()

    @property
    def due_s(self) -> float:
        """Seconds until there is something to write."""
        due = self._begun_at + CHECKPOINT_S - time.monotonic()
        return 0.0 if self._pending else max(0.0, due)

    def step(self, *, idle: bool) -> None:
        """Writes a slice of the changed states, if it is time to."""
        now = time.monotonic()
        if not self._pending:
            if now - self._begun_at < CHECKPOINT_S:
                return
            self._begun_at = now
        try:
            if not self._pending:
                self.begin()
            self.write_slice(IDLE_SLICE if idle else SLICE)
        except Exception as error:
            # they follow from the log: events are taken all the same
            log.warning("states cannot be written: %s", error)
            self._pending = []

    def begin(self) -> None:
        """Notes what has to be written as of now."""
        for table in self._tables.values():
            rows, mark = table.dirty(), Mark(table.offset, table.complete)
            if rows.size or self._written.get(table) != mark:
                self._pending.append(Unwritten(table, mark, rows))

    def write_slice(self, size: int) -> None:
        """Writes some states of one table; with its last ones, the mark."""
        while self._pending:
            (table, mark, rows), others = self._pending[0], self._pending[1:]
            if self._tables.get(table.name) is not table:
                # it was dropped meanwhile
                self._pending = others
                continue
            now, left = rows[:size], rows[size:]
            self._write(table, now, mark if left.size == 0 else None)
            self._pending = [Unwritten(table, mark, left), *others] if left.size else others
            return

    def finish(self) -> None:
        """Writes all that has changed."""
        try:
            # what is pending, and then what has changed since
            for _ in range(2):
                while self._pending:
                    self.write_slice(IDLE_SLICE)
                self.begin()
            while self._pending:
                self.write_slice(IDLE_SLICE)
        except Exception as error:
            log.warning("states cannot be written: %s; they follow from the log", error)

    def abandon(self) -> None:
        """Leaves a begun writing as it is; what is not written stays changed."""
        self._pending = []

    def _write(self, table: StateTable, rows: np.ndarray, mark: Mark | None) -> None:
        records = table.records(rows)
        try:
            self._store.write(table.name, records, mark)
        except BaseException:
            table.not_written(user_id for user_id, _ in records)
            raise
        if mark is not None:
            self._written[table] = mark

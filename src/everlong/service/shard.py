"""A shard: one log, one writer that takes events to the disk and then to the states.

Events wait in a bounded queue; the writer takes what is there as one group, writes it, and when it
is on the disk applies it and answers. So an answer means that the event is on the disk and in the
state, and a crash at any point leaves a log from which all follows: states are written now and
then, each with the offset that it goes to, and on start the rest of the log is applied to them.
"""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from everlong.service.arena import Applied, Arena
from everlong.service.log import Event, EventLog, Id, Receipt

log = logging.getLogger(__name__)

GROUP = 1_024
"""Most events that are written together."""

LINGER_S = 0.002
"""How long a group waits for company."""

CHECKPOINT_S = 5.0
SLICE = 256
"""States that are written between two groups of events."""

REPLAY = 8_192
"""Events that are read at once on start."""


_NOTHING: list[tuple[Arena, np.ndarray]] = []


class FullError(RuntimeError):
    """The queue of a shard has no room."""


class Work(NamedTuple):
    """Something that the writer has to do between two groups, and who waits for it."""

    events: Sequence[Event]
    act: Callable[[], Any] | None
    done: Future[Any]


class Shard:
    """Events of some of the users, and their states in one model or several.

    Args:
        path: the log.
        capacity: most events that wait.

    Raises:
        DamagedError: if the log is not what was written.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path, *, capacity: int = 10_000) -> None:
        self.log, self.capacity = EventLog(path), capacity
        self.arenas: dict[str, Arena] = {}
        self.applied = Applied(0, 0, 0, 0)
        self.repeated = 0
        self.writable = True
        self._queue: queue.Queue[Work | None] = queue.Queue()
        self._waiting, self._count = 0, threading.Lock()
        self._last_checkpoint = time.monotonic()
        self._target, self._pending = 0, _NOTHING
        self._thread = threading.Thread(target=self._write, name=f"writer {path.name}")
        self._thread.start()

    # callers

    def submit(self, events: Sequence[Event]) -> Future[list[Receipt]]:
        """Queues events; the future holds their receipts once they are on disk and applied.

        Raises:
            FullError: if there is no room for them; nothing is queued.
        """
        with self._count:
            if self._waiting + len(events) > self.capacity:
                raise FullError(
                    f"{self._waiting} events wait already, at most {self.capacity} may; try again"
                )
            self._waiting += len(events)
        work = Work(events, None, Future())
        self._queue.put(work)
        return work.done

    def erase(self, user_id: Id) -> Future[int]:
        """Queues the erasure of a user; the future holds how many events there were."""
        return self._do(lambda: self._erase(user_id))

    def add(self, arena: Arena) -> Future[None]:
        """Brings an arena up to the log and keeps it there from then on.

        What was read into it before, by ``restore`` or from the log, is not read again.
        """
        return self._do(lambda: self._add(arena))

    def catch_up(self, arena: Arena) -> None:
        """Brings an arena near to the log on the caller's thread, beside the writer."""
        beside = EventLog(self.log.path)
        try:
            while beside.total.last - arena.offset > REPLAY:
                events = beside.after(arena.offset, REPLAY)
                if not events:
                    return
                arena.apply(events)
                arena.offset = events[-1].offset
                beside.look()
        finally:
            beside.close()

    def drop(self, arena: Arena) -> Future[None]:
        """Lets an arena go, and its records."""
        return self._do(lambda: self._drop(arena))

    @property
    def waiting(self) -> int:
        """Events in the queue."""
        return self._waiting

    def close(self) -> None:
        """Writes what waits, then all states, and stops."""
        self._queue.put(None)
        self._thread.join()
        self.log.close()

    def _do(self, act: Callable[[], Any]) -> Future[Any]:
        work = Work((), act, Future())
        self._queue.put(work)
        return work.done

    # arenas

    def restore(self, arena: Arena) -> Future[int]:
        """Reads the records of an arena's model; the future holds how many were damaged.

        The states of their users are built from the log at once.
        """
        return self._do(lambda: self._restore(arena))

    def _restore(self, arena: Arena) -> int:
        run, spoiled = self.log.connection.execute, list[Id]()
        rows = run("SELECT user_id, record FROM states WHERE model=?", (arena.name,))
        while some := rows.fetchmany(REPLAY):
            spoiled += arena.load(some)
        stored = self.log.fact(f"watermark {arena.name}")
        arena.offset = 0 if stored is None else int(stored)
        if spoiled:
            log.warning("%d state records were damaged: their users are read anew", len(spoiled))
        for user_id in spoiled:
            # a user without a state has offset 0, so that all of the events count
            arena.apply(self.log.of_user(user_id))
        return len(spoiled)

    def _add(self, arena: Arena) -> None:
        began, replayed = time.monotonic(), 0
        while events := self.log.after(arena.offset, REPLAY):
            arena.apply(events)
            arena.offset, replayed = events[-1].offset, replayed + len(events)
        self.arenas[arena.name] = arena
        log.info(
            "%s: %d users, %d events replayed in %.1f s",
            self.log.path.name,
            len(arena),
            replayed,
            time.monotonic() - began,
        )

    def _drop(self, arena: Arena) -> None:
        self.arenas.pop(arena.name, None)
        self._pending = [(other, rows) for other, rows in self._pending if other is not arena]
        with self.log.transaction():
            self.log.connection.execute("DELETE FROM states WHERE model=?", (arena.name,))
            self.log.connection.execute(
                "DELETE FROM facts WHERE name=?", (f"watermark {arena.name}",)
            )

    # the writer

    def _write(self) -> None:
        stopping = False
        while not stopping:
            group, stopping = self._next_group()
            self._serve(group)
            self._checkpoint_some()
        self._finish()

    def _next_group(self) -> tuple[list[Work], bool]:
        """What there is to do, gathered for a moment, and whether that is all for ever."""
        try:
            work = self._queue.get(timeout=CHECKPOINT_S / 10)
        except queue.Empty:
            return [], False
        group, size, until = list[Work](), 0, time.monotonic() + LINGER_S
        while work is not None:
            group.append(work)
            size += len(work.events)
            # what is not an event goes alone, so that all before it is done
            if size >= GROUP or work.act is not None:
                return group, False
            try:
                work = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return group, False
        return group, True

    def _serve(self, group: Sequence[Work]) -> None:
        events = [event for work in group for event in work.events]
        with self._count:
            self._waiting -= len(events)
        try:
            receipts = self._append(events)
        except Exception as error:
            self.writable = False
            for work in group:
                work.done.set_exception(error)
            return
        start = 0
        for work in group:
            stop = start + len(work.events)
            if work.act is None:
                work.done.set_result(receipts[start:stop])
            else:
                try:
                    work.done.set_result(work.act())
                except Exception as error:
                    work.done.set_exception(error)
            start = stop

    def _append(self, events: Sequence[Event]) -> list[Receipt]:
        if not events:
            return []
        before = self.log.total.last
        receipts = self.log.append(events)
        self.writable = True
        new = self.log.after(before, len(events))
        for arena in self.arenas.values():
            applied = arena.apply(new)
            arena.offset = self.log.total.last
        if self.arenas:
            self.applied = Applied(*(a + b for a, b in zip(self.applied, applied, strict=True)))
        self.repeated += len(receipts) - len(new)
        return receipts

    def _erase(self, user_id: Id) -> int:
        count = self.log.erase(user_id)
        for arena in self.arenas.values():
            arena.forget(user_id)
        return count

    def _checkpoint_some(self) -> None:
        """Writes a slice of the changed states, if it is time to."""
        now = time.monotonic()
        if not self._target:
            if now - self._last_checkpoint < CHECKPOINT_S:
                return
            self._begin_checkpoint()
        try:
            self._checkpoint_slice()
        except (OSError, sqlite3.OperationalError) as error:
            log.warning("states cannot be written: %s", error)
            self._last_checkpoint, self._target, self._pending = now, 0, _NOTHING

    def _begin_checkpoint(self) -> None:
        self._target = self.log.total.last
        self._pending = [(arena, arena.dirty()) for arena in self.arenas.values()]

    def _checkpoint_slice(self) -> None:
        """Some states of one arena; with its last ones the offset up to which all are written."""
        if self._pending:
            (arena, rows), others = self._pending[0], self._pending[1:]
            left = rows[SLICE:]
            self._write_states(arena, rows[:SLICE], last=left.size == 0)
            self._pending = [(arena, left), *others] if left.size else others
        if not self._pending:
            self._target, self._last_checkpoint = 0, time.monotonic()
            self.log.checkpoint()

    def _write_states(self, arena: Arena, rows: np.ndarray, *, last: bool) -> None:
        records = arena.records(rows)
        try:
            with self.log.transaction():
                self.log.connection.executemany(
                    "INSERT INTO states VALUES (?,?,?) ON CONFLICT DO UPDATE "
                    "SET record=excluded.record",
                    [(arena.name, user_id, record) for user_id, record in records],
                )
                if last:
                    # every state that changed up to the target has been written since
                    name = f"watermark {arena.name}"
                    self.log.put_fact(name, str(self._target).encode())
        except BaseException:
            arena.not_written(user_id for user_id, _ in records)
            raise

    def _finish(self) -> None:
        try:
            while self._pending:
                self._checkpoint_slice()
            self._begin_checkpoint()
            while self._pending:
                self._checkpoint_slice()
            self.log.checkpoint()
        except (OSError, sqlite3.OperationalError) as error:
            log.warning("states cannot be written: %s; they follow from the log", error)

"""A shard: one log, one arena, one writer that takes events to the disk and then to the states.

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
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

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


class FullError(RuntimeError):
    """The queue of a shard has no room."""


class _Work(NamedTuple):
    """Something that the writer has to do, and who waits for it."""

    events: Sequence[Event]
    erase: Id | None
    done: Future[object]


class Shard:
    """Events and states of some of the users.

    Args:
        path: the log.
        arena: an empty arena of the model that answers.
        capacity: most events that wait.

    Raises:
        DamagedError: if the log is not what was written.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path, arena: Arena, *, capacity: int = 10_000) -> None:
        self.log, self.arena, self.capacity = EventLog(path), arena, capacity
        self.model = arena.digest.hex()
        self.applied = Applied(0, 0, 0, 0)
        self.writable = True
        self._recover()
        self._queue: queue.Queue[_Work | None] = queue.Queue()
        self._waiting, self._count = 0, threading.Lock()
        self._last_checkpoint = time.monotonic()
        self._target, self._pending = 0, np.zeros(0, dtype=np.int64)
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
                raise FullError(f"{self._waiting} events wait already, at most {self.capacity} may")
            self._waiting += len(events)
        work = _Work(events, None, Future())
        self._queue.put(work)
        return work.done  # type: ignore[return-value]

    def erase(self, user_id: Id) -> Future[int]:
        """Queues the erasure of a user; the future holds how many events there were."""
        work = _Work((), user_id, Future())
        self._queue.put(work)
        return work.done  # type: ignore[return-value]

    @property
    def waiting(self) -> int:
        """Events in the queue."""
        return self._waiting

    def close(self) -> None:
        """Writes what waits, then all states, and stops."""
        self._queue.put(None)
        self._thread.join()
        self.log.close()

    # start

    def _recover(self) -> None:
        """States from their records, then every event that they do not have yet."""
        began, run = time.monotonic(), self.log.connection.execute
        rows = run("SELECT user_id, record FROM states WHERE model=?", (self.model,))
        spoiled: list[Id] = []
        while some := rows.fetchmany(REPLAY):
            spoiled += self.arena.load(some)
        stored = self.log.fact(f"watermark {self.model}")
        offset = 0 if stored is None else int(stored)
        if spoiled:
            log.warning("%d state records were damaged: their users are read anew", len(spoiled))
        for user_id in spoiled:
            # a user without a state has offset 0, so that all of the events count
            self.arena.apply(self.log.of_user(user_id))
        replayed = 0
        while events := self.log.after(offset, REPLAY):
            self._counted(self.arena.apply(events))
            offset, replayed = events[-1].offset, replayed + len(events)
        log.info(
            "%s: %d users, %d events replayed in %.1f s",
            self.log.path.name,
            len(self.arena),
            replayed,
            time.monotonic() - began,
        )

    # the writer

    def _write(self) -> None:
        while True:
            work = self._next_group()
            if work is None:
                break
            self._serve(work)
            self._checkpoint_some()
        self._finish()

    def _next_group(self) -> list[_Work] | None:
        """What there is to do, gathered for a moment; None to stop."""
        try:
            first = self._queue.get(timeout=CHECKPOINT_S / 10)
        except queue.Empty:
            return []
        group, size, until = [], 0, time.monotonic() + LINGER_S
        work: _Work | None = first
        while work is not None:
            group.append(work)
            size += len(work.events)
            if size >= GROUP:
                return group
            try:
                work = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return group
        self._queue.put(None)
        return group or None

    def _serve(self, group: Sequence[_Work]) -> None:
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
        self.writable, start = True, 0
        for work in group:
            stop = start + len(work.events)
            if work.erase is None:
                work.done.set_result(receipts[start:stop])
            else:
                self._erase(work)
            start = stop

    def _append(self, events: Sequence[Event]) -> list[Receipt]:
        if not events:
            return []
        before = self.log.total.last
        receipts = self.log.append(events)
        new = self.log.after(before, len(events))
        self._counted(self.arena.apply(new))
        return receipts

    def _erase(self, work: _Work) -> None:
        assert work.erase is not None  # noqa: S101 - told apart by the caller
        try:
            count = self.log.erase(work.erase)
            self.arena.forget(work.erase)
            work.done.set_result(count)
        except Exception as error:
            work.done.set_exception(error)

    def _counted(self, applied: Applied) -> None:
        self.applied = Applied(*(a + b for a, b in zip(self.applied, applied, strict=True)))

    def _checkpoint_some(self) -> None:
        """Writes a slice of the changed states, if it is time to."""
        now = time.monotonic()
        if self._target == 0:
            if now - self._last_checkpoint < CHECKPOINT_S:
                return
            self._begin_checkpoint()
        try:
            self._checkpoint_slice()
        except (OSError, sqlite3.OperationalError) as error:
            log.warning("states cannot be written: %s", error)
            self._last_checkpoint, self._target = now, 0

    def _begin_checkpoint(self) -> None:
        self._target, self._pending = self.log.total.last, self.arena.dirty()

    def _checkpoint_slice(self) -> None:
        records = self.arena.records(self._pending[:SLICE])
        run = self.log.connection.execute
        left = self._pending[SLICE:]
        try:
            with self.log.transaction():
                for user_id, record in records:
                    run(
                        "INSERT INTO states VALUES (?,?,?) ON CONFLICT DO UPDATE "
                        "SET record=excluded.record",
                        (self.model, user_id, record),
                    )
                if left.size == 0:
                    # every state that changed up to the target has been written since
                    self.log.put_fact(f"watermark {self.model}", str(self._target).encode())
        except BaseException:
            self.arena.not_written(user_id for user_id, _ in records)
            raise
        self._pending = left
        if left.size == 0:
            self._target, self._last_checkpoint = 0, time.monotonic()
            self.log.checkpoint()

    def _finish(self) -> None:
        try:
            for _ in range(2):  # what was begun, and what has changed since
                while self._pending.size:
                    self._checkpoint_slice()
                self._begin_checkpoint()
            self._checkpoint_slice()
        except (OSError, sqlite3.OperationalError) as error:
            log.warning("states cannot be written: %s; they follow from the log", error)

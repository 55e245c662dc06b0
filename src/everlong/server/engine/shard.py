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
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np

from everlong.server.engine.priority import step_back
from everlong.server.store.log import Event, EventLog, Id, LogReader, Receipt, Slice, Stored
from everlong.server.store.replay import backfill, read_on, rebuild
from everlong.server.store.state_table import Applied, StateTable

log = logging.getLogger(__name__)

GROUP = 1_024
"""Most events that are written together."""

LINGER_S = 0.001
"""Time from the end of one writing to the begin of the next: a lone event does not wait at all."""

CHECKPOINT_S = 30.0
"""Time between two writings of states: what came since is read again after a crash."""

FLUSH_S = 1.0
"""Time between two movings of events from the write-ahead log into the file."""

LONG = 32_768
"""Pages of a write-ahead log from which on it is begun anew, for which events wait a moment."""

TRY_S = 1.0
"""Time after which a writer without events looks whether there is something else to do."""

SLICE, IDLE_S = 32, 0.5
"""States that are written between two groups of events: few, so that events wait for a moment, but
many after a time without any."""

RECORDS = 8_192
"""States that are read at once on start."""

DELETED = 512
"""Rows of states that are looked at by one deletion."""

NEAR = 8_192
"""An table that lacks fewer events is brought up to the log by the writer itself."""

# names of facts, before that of the model
_WATERMARK, _INCOMPLETE = "watermark ", "incomplete "

T = TypeVar("T")


@contextmanager
def _on_one_core() -> Iterator[None]:
    """Has loops that are compiled for many cores run on one, in this thread.

    Their threads spin while they wait: on the cores of the writer and of those who answer.
    """
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(before)


class FullError(RuntimeError):
    """The queue of a shard has no room."""


class BehindError(RuntimeError):
    """Events are on disk, and could not be read into the states."""


class Work(NamedTuple):
    """Something that the writer has to do between two groups, and who waits for it."""

    events: Sequence[Event]
    act: Callable[[], Any] | None
    done: Future[Any]


class Unwritten(NamedTuple):
    """States that are to be written, and up to where an table's are all on disk after that."""

    table: StateTable
    offset: int
    rows: np.ndarray


class Shard:
    """Events of some of the users, and their states in one model or several.

    Args:
        path: the log.
        new: whether it is made where there is none.
        capacity: most events that wait.
        on_erase: told of each user who was erased, before whoever asked for it is.

    Raises:
        DamagedError: if the log is not what was written.
        OSError: if it cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        new: bool = True,
        capacity: int = 10_000,
        on_erase: Callable[[Id], None] | None = None,
    ) -> None:
        self.log, self.capacity, self._on_erase = EventLog(path, new=new), capacity, on_erase
        # what a kill has left, also of those who were erased
        self.log.checkpoint()
        self.tables: dict[str, StateTable] = {}
        self.applied = Applied()
        self.repeated = 0
        self.writable = True
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._waiting, self._count = 0, threading.Lock()
        self._last_checkpoint = time.monotonic()
        self._written_at = 0.0
        self._pending: list[Unwritten] = []
        self._written: dict[str, int] = {}
        # users who were erased while an table, by its name, was being filled
        self._erased_since: dict[str, set[Id]] = {}
        self._ended = False
        self._flushing, self._closing = threading.Lock(), threading.Event()
        # threads of compiled loops are of the whole process: they must not step back with a writer
        numba.get_num_threads()
        self._threads = [
            threading.Thread(target=act, name=f"{name} {path.name}")
            for name, act in (("writer", self._write), ("flush", self._flush))
        ]
        for thread in self._threads:
            thread.start()

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
            done = self._queued(Work(events, None, Future()))
            self._waiting += len(events)
        return done

    def erase(self, user_id: Id) -> Future[int]:
        """Queues the erasure of a user; the future holds how many events there were."""
        return self._do(lambda: self._erase(user_id))

    def bring_up(self, table: StateTable, *, since: int | None = None) -> None:
        """Fills an table and keeps it up to date from then on; events are taken meanwhile.

        From the records of its model if there are any, else from the whole log at once.

        Args:
            table: empty.
            since: see :func:`everlong.server.store.replay.backfill`.

        Raises:
            DamagedError: if the log is not what was written.
            OSError: if it cannot be read.
        """
        began = time.monotonic()
        try:
            self._do(lambda: self._restore(table)).result()
            with closing(LogReader(self.log.path)) as beside, _on_one_core():
                if table.offset == 0:
                    backfill(beside, table, since=since)
                while beside.look().last - table.offset > NEAR:
                    read_on(beside, table)
            self._do(lambda: self._add(table)).result()
        except BaseException:
            self._do(lambda: self._erased_since.pop(table.name, None)).result()
            raise
        log.info("%s: %d users in %.1f s", self.log.path.name, len(table), time.monotonic() - began)

    def drop(self, table: StateTable) -> None:
        """Lets an table go, and its records."""
        self._do(lambda: self._drop(table)).result()
        self._delete_records({table.name})

    def keep_records_of(self, names: Collection[str]) -> None:
        """Deletes the records of all models but some."""
        with closing(LogReader(self.log.path)) as beside:
            there = beside.connection.execute("SELECT DISTINCT model FROM states").fetchall()
        self._delete_records({name for (name,) in there} - set(names))

    def _delete_records(self, names: Collection[str]) -> None:
        """Little by little: events do not wait for gigabytes to be overwritten."""
        for name in names:
            self._do(partial(self._forget_model, name)).result()
            first, last = 0, 0
            while first <= last:
                last = self._do(partial(self._delete_some, name, first)).result()
                first += DELETED

    def _forget_model(self, name: str) -> None:
        with self.log.transaction():
            for fact in (_WATERMARK + name, _INCOMPLETE + name):
                self.log.drop_fact(fact)

    def _delete_some(self, name: str, first: int) -> int:
        """Deletes the records of a model among some rows; returns the last row that there is."""
        run = self.log.connection.execute
        with self.log.transaction():
            run(
                "DELETE FROM states WHERE rowid BETWEEN ? AND ? AND model=?",
                (first, first + DELETED - 1, name),
            )
        return int(run("SELECT COALESCE(MAX(rowid), 0) FROM states").fetchone()[0])

    def warm(self, user_ids: Sequence[Id]) -> None:
        """Builds the states of users who are in the log but not in an table."""
        self._do(lambda: self._warm(user_ids)).result()

    @property
    def alive(self) -> bool:
        """Whether the writer goes on."""
        return self._threads[0].is_alive()

    @property
    def waiting(self) -> int:
        """Events in the queue."""
        return self._waiting

    def close(self) -> None:
        """Writes what waits, then all states, and stops."""
        if not self._closing.is_set():
            self._closing.set()
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self.log.close()

    def _do(self, act: Callable[[], T]) -> Future[T]:
        with self._count:
            return self._queued(Work((), act, Future()))

    def _queued(self, work: Work) -> Future[Any]:
        if self._ended:
            raise OSError("the service is ending; try again")
        self._queue.put(work)
        return work.done

    # what the writer does with tables

    def _restore(self, table: StateTable) -> None:
        """Reads the records of an table's model; a user whose record is damaged is read anew."""
        self._erased_since[table.name] = set()
        stored = self.log.fact(_WATERMARK + table.name)
        if stored is None:
            # there may be some records, of a model whose first writing was cut short
            return
        table.offset, spoiled = int(stored), list[Id]()
        table.complete = self.log.fact(_INCOMPLETE + table.name) is None
        try:
            rows = self.log.connection.execute(
                "SELECT user_id, record FROM states WHERE model=?", (table.name,)
            )
            while some := rows.fetchmany(RECORDS):
                spoiled += table.load(some)
        except sqlite3.DatabaseError as error:
            log.warning("states cannot be read, they are built from the log: %s", error)
            table.clear()
            return
        if spoiled:
            log.warning("%d state records were damaged: their users are read anew", len(spoiled))
            rebuild(self.log, table, spoiled)

    def _add(self, table: StateTable) -> None:
        # those who were erased meanwhile; they may have come back since
        rebuild(self.log, table, self._erased_since.pop(table.name, ()))
        with self.log.transaction():
            if table.complete:
                self.log.drop_fact(_INCOMPLETE + table.name)
            else:
                self.log.put_fact(_INCOMPLETE + table.name, b"1")
        self._bring(table)
        if table.complete and table.num_events != self.log.total.events:
            log.warning("the states of %s do not follow from the log: read anew", table.name)
            table.clear()
            backfill(self.log, table)
        self.tables[table.name] = table

    def _drop(self, table: StateTable) -> None:
        self.tables.pop(table.name, None)
        self._pending = [one for one in self._pending if one.table is not table]
        self._written.pop(table.name, None)

    def _warm(self, user_ids: Sequence[Id]) -> None:
        for table in self.tables.values():
            if not table.complete:
                rebuild(self.log, table, [user_id for user_id in user_ids if user_id not in table])

    def _bring(self, table: StateTable) -> Applied:
        """Applies what is in the log and not yet in an table."""
        applied = Applied()
        while table.offset < self.log.total.last:
            applied = applied.plus(read_on(self.log, table))
        return applied

    # the writer

    def _write(self) -> None:
        step_back()
        with _on_one_core():
            self._write_all()

    def _write_all(self) -> None:
        stopping = False
        while not stopping:
            group, stopping = self._next_group()
            self._serve(group)
            if not self.writable and not any(work.events for work in group):
                self._try_to_write()
            self._checkpoint_some()
        self._finish()
        self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        """Nobody waits for ever: what was queued after the end is told so, and no more is."""
        with self._count:
            self._ended = True
        while not self._queue.empty():
            work = self._queue.get()
            if work is not None and work.done.set_running_or_notify_cancel():
                work.done.set_exception(OSError("the service is ending; try again"))

    def _try_to_write(self) -> None:
        """Finds out whether the disk takes something again: nobody sends to who is not ready."""
        try:
            self._settle()
            with self.log.transaction():
                self.log.put_fact("tried", b"")
            for table in self.tables.values():
                self._bring(table)
        except Exception as error:
            log.warning("%s cannot be used yet: %s", self.log.path, error)
            return
        self.writable = True

    def _settle(self) -> None:
        """After the disk has refused: nothing is acknowledged that stands behind what it refused.

        What was written without waiting for the disk may have been lost then; so all that is good
        is moved into the file, and the write-ahead log begins anew.

        Raises:
            OSError: if that cannot be done yet.
        """
        if not self.writable and not self.log.checkpoint():
            raise OSError(f"{self.log.path} cannot be written yet: it refused before; try again")

    def _next_group(self) -> tuple[list[Work], bool]:
        """What there is to do, gathered for a moment, and whether that is all for ever."""
        try:
            # states that are being written are not kept waiting
            work = self._queue.get(timeout=0 if self._pending else min(TRY_S, CHECKPOINT_S / 10))
        except queue.Empty:
            return [], False
        # asleep, so that those who come meanwhile do not wake it one by one
        time.sleep(max(0.0, self._written_at + LINGER_S - time.monotonic()))
        group, size = list[Work](), 0
        while work is not None:
            group.append(work)
            size += len(work.events)
            # what is not an event goes alone, so that all before it is done
            if size >= GROUP or work.act is not None:
                return group, False
            try:
                work = self._queue.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _serve(self, group: Sequence[Work]) -> None:
        with self._count:
            self._waiting -= sum(len(work.events) for work in group)
        # from here on nobody can take their work back; those who did are left out
        group = [work for work in group if work.done.set_running_or_notify_cancel()]
        events = [event for work in group for event in work.events]
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
        self._settle()
        before = self.log.total.last
        receipts = self.log.append(events)
        self._written_at = time.monotonic()
        try:
            fresh = self._fresh(events, receipts)
            applied = [self._advance(table, before, fresh) for table in self.tables.values()]
        except Exception as error:
            log.exception("events are in the log but not in the states")
            raise BehindError(
                "the events are on disk but could not be read into the states; they will be with "
                "the next ones: send them again to be sure"
            ) from error
        self.writable = True
        self.applied = self.applied.plus(*applied[:1])
        self.repeated += sum(not receipt.new for receipt in receipts)
        return receipts

    def _fresh(self, events: Sequence[Event], receipts: Sequence[Receipt]) -> Slice:
        """What is new in the log, as it would be read from there."""
        new = [(one, to) for one, to in zip(events, receipts, strict=True) if to.new]
        return Slice.of(
            [Stored(to.offset, self.log.key_of(one.event_id), *one[1:]) for one, to in new]
        )

    def _advance(self, table: StateTable, before: int, fresh: Slice) -> Applied:
        if table.offset != before or not table.complete:
            # from where it stands: a group that could not be applied is not passed over
            return self._bring(table)
        applied = table.apply(fresh)
        table.offset = self.log.total.last
        return applied

    def _erase(self, user_id: Id) -> int:
        # nothing of the user stays in the write-ahead log
        with self._flushing:
            count = self.log.erase(user_id)
        for table in self.tables.values():
            table.forget(user_id)
        for users in self._erased_since.values():
            users.add(user_id)
        if self._on_erase is not None:
            self._on_erase(user_id)
        return count

    def _checkpoint_some(self) -> None:
        """Writes a slice of the changed states, if it is time to."""
        now = time.monotonic()
        if not self._pending:
            if now - self._last_checkpoint < CHECKPOINT_S:
                return
            self._last_checkpoint = now
        try:
            if not self._pending:
                self._begin_checkpoint()
            self._checkpoint_slice()
        except Exception as error:
            # they follow from the log: events are taken all the same
            log.warning("states cannot be written: %s", error)
            self._pending = []

    def _begin_checkpoint(self) -> None:
        for table in self.tables.values():
            rows = table.dirty()
            if rows.size or self._written.get(table.name) != table.offset:
                self._pending.append(Unwritten(table, table.offset, rows))

    def _checkpoint_slice(self) -> None:
        """Some states of one table; with its last ones the offset up to which all are written."""
        if not self._pending:
            return
        (table, offset, rows), others = self._pending[0], self._pending[1:]
        idle = time.monotonic() - self._written_at > IDLE_S
        size = 128 * SLICE if idle or self._closing.is_set() else SLICE
        now, left = rows[:size], rows[size:]
        self._write_states(table, now, offset if left.size == 0 else None)
        self._pending = [Unwritten(table, offset, left), *others] if left.size else others

    def _flush(self) -> None:
        """Moves the write-ahead log into the file beside the writer, a little at a time.

        All at once would keep the disk from the writer for a tenth of a second.
        """
        while not self._closing.wait(FLUSH_S):
            try:
                if self._move() >= LONG or self.log.traces:
                    # once more, so that next to nothing is left for the writer to move
                    self._move()
                    self._do(self.log.wrap)
            except (sqlite3.Error, OSError) as error:
                log.warning("the write-ahead log cannot be moved: %s", error)

    def _move(self) -> int:
        """Moves what nobody needs in the write-ahead log; returns how many pages that has."""
        with self._flushing, closing(sqlite3.connect(self.log.path)) as beside:
            _, pages, _ = beside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return int(pages)

    def _write_states(self, table: StateTable, rows: np.ndarray, watermark: int | None) -> None:
        records, run = table.records(rows), self.log.connection.execute
        try:
            # a cache need not wait for the disk: it gets there with events that follow, in order
            run("PRAGMA synchronous=NORMAL")
            with self.log.transaction():
                self.log.connection.executemany(
                    "INSERT INTO states VALUES (?,?,?) ON CONFLICT DO UPDATE "
                    "SET record=excluded.record",
                    [(table.name, user_id, record) for user_id, record in records],
                )
                if watermark is not None:
                    # every state that had changed up to there has been written since
                    self.log.put_fact(_WATERMARK + table.name, str(watermark).encode())
        except BaseException:
            table.not_written(user_id for user_id, _ in records)
            raise
        finally:
            run("PRAGMA synchronous=FULL")
        if watermark is not None:
            self._written[table.name] = watermark

    def _finish(self) -> None:
        try:
            # what is pending, and then what has changed since
            for _ in range(2):
                while self._pending:
                    self._checkpoint_slice()
                self._begin_checkpoint()
            while self._pending:
                self._checkpoint_slice()
            with self._flushing:
                self.log.checkpoint()
        except Exception as error:
            log.warning("states cannot be written: %s; they follow from the log", error)

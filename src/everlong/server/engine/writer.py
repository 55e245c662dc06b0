"""The writer of a shard: takes events to the log, then to the states, and then answers.

Guarantees: a receipt means that the event is durable and in the state of its user; events are
applied in the order of the log; an erased user is gone from the store, the log and the states.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from everlong.server.engine.priority import step_back
from everlong.server.engine.state_checkpoint import StateCheckpoint
from everlong.server.engine.table_set import TableSet
from everlong.server.engine.write_queue import Work, WriteQueue
from everlong.server.store.log import Event, EventLog, Id, Receipt, Slice, Stored
from everlong.server.store.state_store import StateStore
from everlong.server.store.state_table import Applied
from everlong.system.threads import limited

log = logging.getLogger(__name__)

LINGER_S = 0.001
"""Time from the end of one writing to the begin of the next: a lone event does not wait at all."""

TRY_S = 1.0
"""Time after which a writer without events looks whether there is something else to do."""

IDLE_S = 0.5
"""Time without events after which states are written many at once."""


class BehindError(RuntimeError):
    """Events are on disk, and could not be read into the states."""


class Writer:
    """The one thread that changes a shard.

    Args:
        events: the log.
        store: records of states.
        work: what to do.
        tables: the states.
        checkpoint: writes them now and then.
        on_erase: is called with each user who was erased, before the caller has the answer.
        name: of the thread.
    """

    def __init__(
        self,
        events: EventLog,
        store: StateStore,
        work: WriteQueue,
        tables: TableSet,
        checkpoint: StateCheckpoint,
        *,
        on_erase: Callable[[Id], None] | None,
        name: str,
    ) -> None:
        self._events, self._store, self._work = events, store, work
        self._tables, self._checkpoint, self._on_erase = tables, checkpoint, on_erase
        self.applied = Applied()
        self.repeated = 0
        self.writable = True
        self._written_at = 0.0
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def join(self) -> None:
        """Waits for the end of the thread."""
        self._thread.join()

    def _run(self) -> None:
        step_back()
        # the other cores are for the threads that answer
        with limited(1):
            stopping = False
            while not stopping:
                wait_s = min(TRY_S, self._checkpoint.due_s)
                group, stopping = self._work.next_group(wait_s, self._written_at + LINGER_S)
                self._serve(group)
                if not self.writable and not any(work.events for work in group):
                    self._probe()
                self._events.tidy()
                self._checkpoint.step(idle=time.monotonic() - self._written_at > IDLE_S)
            self._checkpoint.finish()
            self._work.refuse_the_rest()

    def _probe(self) -> None:
        """Probes whether the disk accepts writes again: clients do not send until it does."""
        try:
            self._events.probe()
            self._tables.catch_up()
        except Exception as error:
            log.warning("events cannot be written yet: %s", error)
            return
        self.writable = True

    def _serve(self, group: Sequence[Work]) -> None:
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
        before = self._events.total.last
        receipts = self._events.append(events)
        self._written_at = time.monotonic()
        try:
            applied = self._tables.apply(before, self._fresh(events, receipts))
        except Exception as error:
            log.exception("events are in the log but not in the states")
            raise BehindError(
                "the events are on disk but could not be read into the states; they will be with "
                "the next ones: send them again to be sure"
            ) from error
        self.writable = True
        self.applied = self.applied.plus(applied)
        self.repeated += sum(not receipt.new for receipt in receipts)
        return receipts

    def _fresh(self, events: Sequence[Event], receipts: Sequence[Receipt]) -> Slice:
        """What is new in the log, as it would be read from there."""
        new = [(one, to) for one, to in zip(events, receipts, strict=True) if to.new]
        return Slice.of(
            [Stored(to.offset, self._events.key_of(one.event_id), *one[1:]) for one, to in new]
        )

    def erase(self, user_id: Id) -> int:
        """Erases a user; called on the writer's thread, returns how many events there were.

        Raises:
            OSError: if that cannot be written; then the user is there as before.
        """
        # in this order: a state without events would come back, events without a state do no harm
        self._store.erase(user_id)
        try:
            count = self._events.erase(user_id)
        except BaseException:
            for table in self._tables.tables.values():
                table.not_written([user_id])
            raise
        self._tables.forget(user_id)
        if self._on_erase is not None:
            self._on_erase(user_id)
        return count

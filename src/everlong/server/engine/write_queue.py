"""What a shard's writer has to do, in the order of arrival, and the futures of the callers.

Guarantees: every future is resolved, also at the end; what does not fit is refused at once; work
that is not events runs alone, after all that was queued before it and before all that came after.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from everlong.server.store.log import Event, Receipt

GROUP = 1_024
"""Most events that are written together."""

ENDING = "the service is ending; try again"

T = TypeVar("T")


class FullError(RuntimeError):
    """A queue has no room."""


class Work(NamedTuple):
    """Events to write, or something to do between two groups; and the future of its result."""

    events: Sequence[Event]
    act: Callable[[], Any] | None
    done: Future[Any]


class WriteQueue:
    """Work for one thread.

    Args:
        capacity: most events that wait.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self._waiting, self._ended = capacity, 0, False
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._count = threading.Lock()

    # callers

    @property
    def waiting(self) -> int:
        """Events in the queue."""
        return self._waiting

    def submit(self, events: Sequence[Event]) -> Future[list[Receipt]]:
        """Queues events; the future holds their receipts once they are durable and applied.

        Raises:
            FullError: if there is no room for them; nothing is queued.
            OSError: after the end.
        """
        with self._count:
            if self._waiting + len(events) > self.capacity:
                raise FullError(
                    f"{self._waiting} events wait already, at most {self.capacity} may; try again"
                )
            done = self._queued(Work(events, None, Future()))
            self._waiting += len(events)
        return done

    def do(self, act: Callable[[], T]) -> Future[T]:
        """Queues a call for the writer's thread.

        Raises:
            OSError: after the end.
        """
        with self._count:
            return self._queued(Work((), act, Future()))

    def _queued(self, work: Work) -> Future[Any]:
        if self._ended:
            raise OSError(ENDING)
        self._queue.put(work)
        return work.done

    def end(self) -> None:
        """Has the writer stop after what is queued now."""
        self._queue.put(None)

    # the writer

    def next_group(self, wait_s: float, not_before: float) -> tuple[list[Work], bool]:
        """The next work, and whether the end was reached.

        Args:
            wait_s: time to wait for the first; without any, the group is empty.
            not_before: of the monotonic clock; what comes up to then belongs to the group.
        """
        try:
            work = self._queue.get(timeout=wait_s)
        except queue.Empty:
            return [], False
        # asleep, so that what comes meanwhile does not wake this thread one by one
        time.sleep(max(0.0, not_before - time.monotonic()))
        group, size = list[Work](), 0
        while work is not None:
            group.append(work)
            size += len(work.events)
            if size >= GROUP or work.act is not None:
                return self._taken(group), False
            try:
                work = self._queue.get_nowait()
            except queue.Empty:
                return self._taken(group), False
        return self._taken(group), True

    def _taken(self, group: list[Work]) -> list[Work]:
        """The group without what its callers have cancelled; from here on they cannot."""
        with self._count:
            self._waiting -= sum(len(work.events) for work in group)
        return [work for work in group if work.done.set_running_or_notify_cancel()]

    def refuse_the_rest(self) -> None:
        """Resolves what was queued after the end with an error, and takes no more."""
        with self._count:
            self._ended = True
        while not self._queue.empty():
            work = self._queue.get()
            if work is not None and work.done.set_running_or_notify_cancel():
                work.done.set_exception(OSError(ENDING))

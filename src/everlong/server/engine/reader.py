"""Reads: requests that come at about one time are answered by one product.

A thread takes what waits, up to a number of requests, reads the states of their users and has the
model that is live answer for all of them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from everlong.inference.filters import NOTHING
from everlong.models.state import State
from everlong.server.engine.priority import step_back
from everlong.server.engine.served_model import Listed, ServedModel, Wanted
from everlong.server.engine.write_queue import FullError
from everlong.server.store.log import Id
from everlong.server.store.seen import Seen

TOGETHER = 64
"""Most requests that are answered at once."""

LINGER_S = 0.003
"""Time from the end of one answer to the begin of the next: a lone request does not wait at all."""


class Asked(NamedTuple):
    """A request and the future of its answer."""

    user_id: Id
    wanted: Wanted
    filter_seen: bool | None
    done: Future[Any]


class Reader:
    """Answers requests for recommendations.

    Args:
        live: the model that answers, and the states of some users in it.
        seen: what users have seen; it is closed with this.
        capacity: most requests that wait.
    """

    def __init__(
        self,
        live: Callable[[Sequence[Id]], tuple[ServedModel, State]],
        seen: Seen,
        *,
        capacity: int = 1_000,
    ) -> None:
        self._live, self._seen, self.capacity = live, seen, capacity
        self._queue: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        self._answered_at = 0.0
        self._thread = threading.Thread(target=self._answer, name="reader")
        self._thread.start()

    def submit(self, user_id: Id, wanted: Wanted, *, filter_seen: bool | None) -> Future[Listed]:
        """Queues a request; the future holds its list.

        Raises:
            FullError: if there is no room for it.
        """
        if self._queue.qsize() >= self.capacity:
            raise FullError(f"{self.capacity} requests wait already; try again")
        asked = Asked(user_id, wanted, filter_seen, Future())
        self._queue.put(asked)
        return asked.done

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    def close(self) -> None:
        """Answers what waits and stops."""
        if self._thread.is_alive():
            self._queue.put(None)
        self._thread.join()

    def _answer(self) -> None:
        step_back()
        stopping = False
        while not stopping:
            group, stopping = self._next_group()
            # requests that were cancelled are left out
            group = [asked for asked in group if asked.done.set_running_or_notify_cancel()]
            if group:
                self._serve(group)
                self._answered_at = time.monotonic()
        self._seen.close()

    def _next_group(self) -> tuple[list[Asked], bool]:
        asked = self._queue.get()
        # requests that arrive meanwhile are answered by the same pass over the catalogue
        time.sleep(max(0.0, self._answered_at + LINGER_S - time.monotonic()))
        group: list[Asked] = []
        while asked is not None:
            group.append(asked)
            if len(group) >= TOGETHER:
                return group, False
            try:
                asked = self._queue.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _serve(self, group: Sequence[Asked]) -> None:
        try:
            served_model, state = self._live([asked.user_id for asked in group])
            item_ids, default = served_model.item_ids, served_model.filters_seen
            seen = [
                self._seen.rows(asked.user_id, item_ids)
                if (default if asked.filter_seen is None else asked.filter_seen)
                else NOTHING
                for asked in group
            ]
            lists = served_model.recommend(state, [asked.wanted for asked in group], seen)
        except Exception as error:
            if len(group) == 1:
                group[0].done.set_exception(error)
            # what is wrong with one is not the fault of the others
            for asked in group if len(group) > 1 else ():
                self._serve([asked])
            return
        for asked, found in zip(group, lists, strict=True):
            asked.done.set_result(found)

"""From threads to the tasks of a loop: all answers that are there at one wake-up.

A group of events is answered at one moment. To wake the loop for each of them would have the system
switch between threads as often, on a core that has better things to do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class Answers:
    """Futures of threads as tasks of one loop await them."""

    def __init__(self) -> None:
        self._settled: deque[asyncio.Future[None]] = deque()
        self._due = False

    async def of(self, future: Future[T], within: float) -> T:
        """The result of a future; it is cancelled if nobody waits for it any more.

        Args:
            future: of a thread.
            within: seconds.

        Raises:
            TimeoutError: if there is none in time.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        future.add_done_callback(partial(self._settle, loop, waiter))
        timer = loop.call_later(within, _give_up, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            future.cancel()
        return future.result()

    def _settle(
        self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None], _: Future[T]
    ) -> None:
        """In the thread that has the result."""
        self._settled.append(waiter)
        # set back before the first is taken, so that none stays behind
        if not self._due:
            self._due = True
            try:
                loop.call_soon_threadsafe(self._tell)
            except RuntimeError:
                # the loop has closed, and who waited has gone with it
                self._settled.clear()
                self._due = False

    def _tell(self) -> None:
        """In the loop."""
        self._due = False
        while self._settled:
            waiter = self._settled.popleft()
            if not waiter.done():
                waiter.set_result(None)


def _give_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())

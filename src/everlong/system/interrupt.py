"""Deferred handling of Ctrl-C: the interrupt takes effect between two updates."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Raised after Ctrl-C, once a checkpoint has been written."""


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether Ctrl-C was pressed since the block began.

    A second Ctrl-C raises ``KeyboardInterrupt``. Outside the main thread, where signal handlers
    cannot be set, the function always returns False.
    """
    pressed = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        log.warning("stopping after this update; press Ctrl-C again to stop at once")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        # None: the previous handler was not set from Python and cannot be restored
        signal.signal(signal.SIGINT, signal.default_int_handler if previous is None else previous)

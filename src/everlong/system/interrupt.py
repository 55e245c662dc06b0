"""Ctrl-C at a place of our choosing: between two updates, so that nothing is half done."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Work was stopped by Ctrl-C after everything worth keeping was written."""


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C was pressed since the block began.

    A second Ctrl-C interrupts at once. Outside the main thread, where signals cannot be caught,
    the function is always false.
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
        # None: the handler was not set from Python, and cannot be set again from here
        signal.signal(signal.SIGINT, signal.default_int_handler if previous is None else previous)

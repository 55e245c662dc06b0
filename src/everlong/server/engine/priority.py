"""Who goes first where threads are more than cores."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

BEHIND = 5
"""Steps of niceness: a thread gets a third of what one gets that stands before it."""


def step_back() -> None:
    """Puts this thread behind the one that takes requests and sends answers.

    With too much to do it is that one who refuses: if it had to share its core equally with those
    who work, requests would wait for seconds until they are refused.
    """
    # elsewhere threads have no niceness of their own
    if sys.platform == "linux":
        with suppress(OSError):
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + BEHIND)

"""Priorities of threads where there are more threads than cores."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

BEHIND = 5
"""Steps of niceness: a thread gets a third of what one gets that stands before it."""


def step_back() -> None:
    """Lowers the priority of this thread below that of the HTTP thread.

    Under overload the HTTP thread sheds load: with an equal share of the core, requests would wait
    for seconds before they are refused.
    """
    # elsewhere threads have no niceness of their own
    if sys.platform == "linux":
        with suppress(OSError):
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + BEHIND)

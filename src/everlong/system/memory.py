"""The memory that this process may use, and one budget for all that grows with the data."""

from __future__ import annotations

import functools
import os
import threading
from contextlib import suppress
from pathlib import Path

from everlong.system.cgroups import cgroups

SHARE = 0.8
"""Part of the memory that the budget has; the rest is for the interpreter, the libraries and what
one request or one batch needs."""


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes that this process may use: the physical memory, or the smallest limit of its cgroups.

    Of nested cgroups each limit counts, those of version 2 (``memory.max``) and of version 1
    (``memory.limit_in_bytes``).

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *map(_limit_of, cgroups("memory", root))])


def _limit_of(folder: Path) -> int:
    for name in ("memory.max", "memory.limit_in_bytes"):
        # "max" and a number beyond all memory stand for none
        with suppress(OSError, ValueError):
            return int((folder / name).read_text())
    return 1 << 63


class MemoryBudget:
    """So many bytes, which parts of the process reserve before they use them.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._used, self._lock = limit, 0, threading.Lock()

    @property
    def free(self) -> int:
        """Bytes that are not reserved."""
        return self.limit - self._used

    def reserve(self, size: int, what: str) -> None:
        """Takes some of the bytes.

        Raises:
            MemoryError: if there are not so many left; says for ``what`` they were wanted.
        """
        with self._lock:
            if self._used + size > self.limit:
                raise MemoryError(
                    f"{what}: expected {size:,} bytes more within the {self.limit:,} that this "
                    f"process may use, found {self.free:,}; give it more memory, or serve some "
                    "shards on another machine"
                )
            self._used += size

    def release(self, size: int) -> None:
        """Gives bytes back."""
        with self._lock:
            self._used -= size


@functools.cache
def process_memory() -> MemoryBudget:
    """The budget of this process."""
    return MemoryBudget(int(SHARE * memory_limit()))

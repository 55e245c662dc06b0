"""How many threads compute, and how they wait for each other.

Count: one thread a core that this process may use, by its affinity mask and the CPU quota of its
cgroups. Torch and Numba know the mask, not the quota.

Waiting: between two parallel loops OpenMP's threads spin for some milliseconds. On free cores that
is the fastest way to wait; where other work wants the cores, a thread that spins holds the core
that the thread it waits for needs. GNU's OpenMP spins for microseconds only once it has started
more threads than there are cores
(https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). So a watch looks at how long
this process's threads wait for a core, and starts one thread too many while that is long. Unlike
the variables of the environment this works after the import of torch, costs nothing on free cores,
and changes no result, because as many threads compute as before.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from everlong.system.cgroups import cgroups

log = logging.getLogger(__name__)

COUNTS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
"""Variables of the environment that set the number of threads."""

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables of the environment that set how threads wait; one of them turns the watch off."""

SPINNING_S, SLEEPING_S = 0.3, 0.1
"""Time between two looks at the threads while they spin and while they sleep: a moment in which
threads of this process are too many, as in the middle of a validation, is no reason to change."""

CROWDED, FREE = 0.3, 0.15
"""Shares of the time that the slowest thread waits for a core: above the first threads sleep soon,
below the second they spin again. Measured in training on two cores, spinning and sleeping: 0.5 and
0.3 to 0.5 beside a busy loop, below 0.1 without one."""


# how many


def cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: its affinity mask, or its CPU quota rounded up.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    return max(1, min(_mask(), math.ceil(min(quota(root), _mask()))))


def quota(root: Path = Path("/")) -> float:
    """The CPU quota of this process in cores, infinite without one.

    Of nested cgroups the smallest counts, both of version 2 (``cpu.max``) and of version 1
    (``cpu.cfs_quota_us``).

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    return min((_quota_of(folder) for folder in cgroups("cpu", root)), default=math.inf)


def _mask() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota_of(folder: Path) -> float:
    """The quota that is set for one cgroup."""
    with suppress(OSError, ValueError):
        limit, period = (folder / "cpu.max").read_text().split()
        return math.inf if limit == "max" else int(limit) / int(period)
    with suppress(OSError, ValueError):
        limit, period = ((folder / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        return math.inf if int(limit) < 0 else int(limit) / int(period)
    return math.inf


def limit_libraries(
    environment: MutableMapping[str, str] = os.environ,
    loaded: Mapping[str, object] = sys.modules,
    root: Path = Path("/"),
) -> None:
    """Has Torch and Numba start no more threads than the CPU quota allows.

    What the user has set stays. A library that is loaded already has read its variable.

    Args:
        environment: where the variables are set.
        loaded: modules that are loaded.
        root: where ``proc`` and ``sys`` are.
    """
    count = cores(root)
    if count >= _mask():
        return
    if "numba" not in loaded:
        environment.setdefault("NUMBA_NUM_THREADS", str(count))
    torch: Any = loaded.get("torch")
    if torch is None:
        environment.setdefault("OMP_NUM_THREADS", str(count))
    elif "OMP_NUM_THREADS" not in environment and torch.get_num_threads() == _mask():
        torch.set_num_threads(count)


@contextmanager
def limited(count: int) -> Iterator[None]:
    """A block in which this thread computes on at most ``count`` threads."""
    import numba
    import torch

    # in this order: when Numba's threads start, they set the number of torch's to their own
    torchs, numbas = torch.get_num_threads(), numba.get_num_threads()
    numba.set_num_threads(min(numbas, count))
    torch.set_num_threads(min(torchs, count))
    try:
        yield
    finally:
        numba.set_num_threads(numbas)
        torch.set_num_threads(torchs)


# how they wait


@contextmanager
def yielding() -> Iterator[None]:
    """A block whose threads do not spin on cores that other work wants.

    Numba computes on as many threads as torch does.
    """
    import torch

    count = torch.get_num_threads()
    with limited(count), _watch.running(count):
        yield


class Crowding:
    """How long the threads of a process wait for a core.

    Args:
        tasks: the folder of the threads.
        clock: the time in nanoseconds.
    """

    def __init__(
        self,
        tasks: Path = Path("/proc/self/task"),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.tasks, self.clock = tasks, clock
        self._waited, self._at = self._read(), clock()

    def look(self) -> float:
        """The share of the time since the last look that the slowest thread waited for a core.

        1 where the system does not tell.
        """
        before, since = self._waited, self._at
        self._waited, self._at = self._read(), self.clock()
        longest = max((n - before.get(name, n) for name, n in self._waited.items()), default=None)
        return 1.0 if longest is None else longest / max(1, self._at - since)

    def _read(self) -> dict[str, int]:
        """Nanoseconds that each thread has waited, but for this one."""
        waited, own = {}, str(threading.get_native_id())
        with suppress(OSError):
            for thread in self.tasks.iterdir():
                # a thread may have ended since
                with suppress(OSError, ValueError, IndexError):
                    if thread.name != own:
                        waited[thread.name] = int((thread / "schedstat").read_text().split()[1])
        return waited


class _Watch:
    """Switches between spinning and sleeping, in a thread that lives while a block needs it."""

    def __init__(self) -> None:
        self._lock, self._blocks, self._end = threading.Lock(), 0, threading.Event()

    @contextmanager
    def running(self, count: int) -> Iterator[None]:
        """A block that is watched, unless one thread computes or the user has set the waiting."""
        if count < 2 or any(name in os.environ for name in WAITING):
            yield
            return
        openmp = _openmp()
        if hasattr(openmp, "kmp_set_blocktime"):
            # LLVM's and Intel's: milliseconds that threads of the calling one spin, 200 by default
            before = openmp.kmp_get_blocktime()
            openmp.kmp_set_blocktime(0)
            try:
                yield
            finally:
                openmp.kmp_set_blocktime(before)
            return
        if not hasattr(openmp, "GOMP_parallel"):
            yield
            return
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._end = threading.Event()
                threading.Thread(
                    target=_watching,
                    args=(openmp, count, self._end),
                    name="everlong threads",
                    daemon=True,
                ).start()
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if self._blocks == 0:
                    self._end.set()


_watch = _Watch()


def _openmp() -> Any:
    """The OpenMP library that torch and Numba have loaded, or None."""
    # of all libraries of the process: torch loads its own for the others to find
    return ctypes.CDLL(None) if os.name == "posix" else None


def _watching(openmp: Any, count: int, end: threading.Event) -> None:
    """Has threads sleep while they are crowded, until the end."""
    # a quota is spent by spinning too
    always, crowding, short = quota() < count, Crowding(), False
    while True:
        share = 1.0 if always else crowding.look()
        if not short and share > CROWDED:
            log.debug("cores are wanted by other work: threads that wait sleep")
            _spin_shortly(openmp, count)
            short = True
        elif short and share < FREE:
            log.debug("cores are free: threads that wait spin")
            _spin_long(openmp)
            short = False
        if end.wait(None if always else SLEEPING_S if short else SPINNING_S):
            return


def _spin_shortly(openmp: Any, count: int) -> None:
    """Starts so many threads, of this one, that there is one more than cores."""
    team = max(2, openmp.omp_get_num_procs() - count + 2)
    run = openmp.GOMP_parallel
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    run.restype = None
    # a parallel loop with nothing to do; its threads stay until this one ends or lets them go
    run(ctypes.cast(openmp.omp_get_thread_num, ctypes.c_void_p), None, team, 0)


def _spin_long(openmp: Any) -> None:
    """Ends the threads that :func:`_spin_shortly` has started."""
    soft = 1
    openmp.omp_pause_resource_all(soft)

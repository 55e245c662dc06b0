"""Memory that is there when it is touched: tables that grow without ever being copied."""

from __future__ import annotations

import mmap
import os
import sys

import numpy as np
import torch
from torch import Tensor

# not named by the module before Python 3.13
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def room(count: int, dtype: np.dtype) -> np.ndarray:
    """``[count]`` zeros, of which only those that are touched take memory.

    Raises:
        OSError: if the system does not give so many addresses.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    pages = mmap.mmap(-1, max(1, count * dtype.itemsize), flags=flags)
    return np.frombuffer(pages, dtype=dtype, count=count)


def room_like(one: Tensor, count: int) -> Tensor:
    """``[count, ...]`` zeros for tensors like ``one [1, ...]``."""
    flat = room(count * one[0].numel(), one.numpy().dtype)
    return torch.from_numpy(flat).view(count, *one.shape[1:])

"""Dropout masks from cheap random bits.

The library's own generator on CPU draws one serial random number an element, which costs more than
the products of a small model. Here a counter is hashed: 64 bits serve four elements, blocks run in
parallel, and the mask depends on the seed and the place alone, not on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor, nn
from torch.nn import functional

_BLOCK = 1 << 13


class Dropout(nn.Module):
    """Zeroes elements with probability ``p`` in training and scales the rest by 1 / (1 - p).

    Raises:
        ValueError: if ``p`` is outside [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout is a share of elements: expected 0 <= p < 1, received {p}")
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """The values with some of them zeroed, same shape; unchanged outside training."""
        if not self.training or self.p == 0.0:
            return values
        if not values.is_cpu:
            return functional.dropout(values, self.p)
        dropped: Tensor = _Dropped.apply(values, self.p, _draw_seed())  # type: ignore[no-untyped-call]
        return dropped

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _Dropped(torch.autograd.Function):
    """Values times a mask that is made again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return dropout_mask(values, p, seed).mul_(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return dropout_mask(grads[0], ctx.p, ctx.seed).mul_(grads[0]), None, None


def dropout_mask(like: Tensor, p: float, seed: int) -> Tensor:
    """0 with probability ``p``, else 1 / (1 - p); shape and dtype of ``like``, on CPU."""
    mask = torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False)
    # the bits of the value that is kept, so that one loop serves every floating type
    keep = torch.tensor([1.0 / (1.0 - p), 0.0], dtype=like.dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[like.dtype.itemsize]
    bits = mask.view(integer).view(-1).numpy()
    values = keep.view(integer).numpy()
    _fill(bits, values, np.uint16(_threshold(p)), np.uint64(seed))
    return mask


def reference_mask(like: Tensor, p: float, seed: int) -> Tensor:
    """The same mask as ``dropout_mask``, one element at a time in plain Python."""
    threshold, word = _threshold(p), 0
    values = []
    for place in range(like.numel()):
        if place % 4 == 0:
            word = _mix_reference(seed + (place // 4) * _STEP)
        values.append(0.0 if (word >> 16 * (place % 4)) & 0xFFFF < threshold else 1.0 / (1.0 - p))
    return torch.tensor(values, dtype=like.dtype).reshape(like.shape)


def _threshold(p: float) -> int:
    # of 16 bits: a share just below 1 must not round to all
    return min(round(p * 65536), 65535)


def _draw_seed() -> int:
    # from torch's generator, so that seeding and resuming a run covers dropout too
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))


# constants of the SplitMix64 generator (Steele, Lea, Flood 2014)
_STEP, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix_reference(word: int) -> int:
    limit = (1 << 64) - 1
    word &= limit
    word = ((word ^ (word >> 30)) * _MUL1) & limit
    word = ((word ^ (word >> 27)) * _MUL2) & limit
    return word ^ (word >> 31)


@njit(parallel=True, cache=True, nogil=True)  # pragma: no cover - compiled
def _fill(bits, keep, threshold, seed):  # type: ignore[no-untyped-def]
    size = bits.shape[0]
    step, mul1, mul2 = np.uint64(_STEP), np.uint64(_MUL1), np.uint64(_MUL2)
    for block in prange((size + _BLOCK - 1) // _BLOCK):
        start = block * _BLOCK
        count = min(size - start, _BLOCK)
        words = np.empty((count + 3) // 4, np.uint64)
        first = seed + np.uint64(start // 4) * step
        for place in range(words.shape[0]):
            word = first + np.uint64(place) * step
            word = (word ^ (word >> np.uint64(30))) * mul1
            word = (word ^ (word >> np.uint64(27))) * mul2
            words[place] = word ^ (word >> np.uint64(31))
        # little-endian quarters, so that a plain loop over them runs in vector registers
        quarters = words.view(np.uint16)
        target = bits[start : start + count]
        for place in range(count):
            target[place] = keep[0] if quarters[place] >= threshold else keep[1]

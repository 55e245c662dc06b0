"""From packed histories to padded rows and back, for the forms that need a rectangle."""

from __future__ import annotations

import torch
from torch import Tensor


def pad_left(values: Tensor, offsets: Tensor, length: int) -> Tensor:
    """``[B, length, ...]`` with each user's events at the right end and zeros before them."""
    padded = values.new_zeros(offsets.numel() - 1, length, *values.shape[1:])
    return padded.index_put(_slots(offsets, length), values)


def unpad_left(padded: Tensor, offsets: Tensor) -> Tensor:
    """``[N, ...]`` the events that ``pad_left`` laid out."""
    return padded[_slots(offsets, padded.shape[1])]


def _slots(offsets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    lengths = offsets.diff()
    count = int(offsets[-1])
    users = torch.arange(lengths.numel(), device=offsets.device)
    rows = users.repeat_interleave(lengths, output_size=count)
    place = torch.arange(count, device=offsets.device) - offsets[:-1][rows]
    return rows, place + length - lengths[rows]

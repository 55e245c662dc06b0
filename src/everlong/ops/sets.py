"""Packed sets, such as the candidates of requests: sets of one size together, without padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sets(NamedTuple):
    """P members of Q sets."""

    rows: Tensor  # [P] the set of each member
    groups: list[tuple[Tensor, Tensor]]  # sets [q] of one size and their members [q, c]

    @staticmethod
    def of(offsets: Tensor) -> Sets:
        """The sets between ``offsets [Q + 1]``; empty ones are in no group."""
        sizes = offsets.diff()
        rows = torch.arange(sizes.numel(), device=offsets.device)
        groups = []
        for size in torch.unique(sizes).tolist():
            if size > 0:
                sets = (sizes == size).nonzero().flatten()
                inside = torch.arange(size, device=offsets.device)
                groups.append((sets, offsets[sets][:, None] + inside))
        return Sets(rows.repeat_interleave(sizes), groups)

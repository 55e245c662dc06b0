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

    def split(self, values: Tensor) -> list[Tensor]:
        """Values ``[P, ..]`` of the members of each group, ``[q, c, ..]``."""
        if len(self.groups) == 1:  # all sets have one size: they are in order already
            index = self.groups[0][1]
            return [values.reshape(*index.shape, *values.shape[1:])]
        return [values[index] for _, index in self.groups]

    def join(self, parts: list[Tensor]) -> Tensor:
        """Values ``[P, ..]`` from those of each group; there must be one."""
        if len(parts) == 1:
            return parts[0].flatten(0, 1)
        index = torch.cat([index.flatten() for _, index in self.groups])
        values = torch.cat([part.flatten(0, 1) for part in parts])
        return values.new_empty(values.shape).index_copy(0, index, values)

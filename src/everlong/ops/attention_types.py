"""What linear attention reads and keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Sums(NamedTuple):
    """What linear attention keeps of the events of B users, as of a time of each."""

    weighted: Tensor  # [B, H, M, F, E]
    mass: Tensor  # [B, H, M, F]
    at: Tensor  # [B] int64, seconds


class History(NamedTuple):
    """Events of B users as linear attention sees them."""

    features: Tensor  # [N, H, F], not negative
    values: Tensor  # [N, H, E]
    times: Tensor  # [N] int64, seconds
    offsets: Tensor  # [B + 1]


@dataclass(frozen=True)
class Asked:
    """Where the candidates of Q requests stand: packed by request, requests by user and cut.

    Attributes:
        user: ``[Q]`` row of the history, never falling.
        cut: ``[Q]`` events of that row that the request sees, never falling within a user.
        at: ``[Q]`` int64, time of the request in seconds; not before the last event that it sees.
        offsets: ``[Q + 1]`` candidates of each request.
    """

    user: Tensor
    cut: Tensor
    at: Tensor
    offsets: Tensor

    @property
    def request_rows(self) -> Tensor:
        """``[P]`` the request of each candidate."""
        rows = torch.arange(self.user.numel(), device=self.user.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=int(self.offsets[-1]))

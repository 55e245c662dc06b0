"""States of many users in memory, in blocks: a table grows without being copied."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from everlong.models import state as states
from everlong.models.state import State
from everlong.system.memory import MemoryBudget

S = TypeVar("S", bound=State)

BLOCK = 1 << 26
"""Bytes of a block, about. Small enough for a container, and so large that the users of a request
lie in few blocks."""


class StateBlocks(Generic[S]):
    """Rows of states; a row is there once the table has grown beyond it.

    Args:
        initial: the state of one user without events, ``[1, ...]`` each field.
        budget: where memory is reserved.
        overhead: bytes that are reserved for a row beside its state.
        block_bytes: about the size of a block.
    """

    def __init__(
        self,
        initial: S,
        budget: MemoryBudget,
        *,
        overhead: int = 0,
        block_bytes: int = BLOCK,
    ) -> None:
        self._initial, self._budget = initial, budget
        size = states.bytes_per_user(initial) + overhead
        self._shift = max(6, (block_bytes // max(1, size)).bit_length() - 1)
        self._block_bytes = size << self._shift
        self._blocks: list[S] = []
        self._reserved = [0]
        weakref.finalize(self, _release, budget, self._reserved)

    def __len__(self) -> int:
        return len(self._blocks) << self._shift

    def grow(self, rows: int) -> None:
        """Has at least so many rows.

        Raises:
            MemoryError: if the budget has no room for them.
        """
        while len(self) < rows:
            self._budget.reserve(self._block_bytes, f"the states of {rows:,} users")
            self._reserved[0] += self._block_bytes
            self._blocks.append(
                type(self._initial)(*(_zeros(1 << self._shift, value) for value in self._initial))
            )

    def take(self, rows: np.ndarray) -> S:
        """Copies of the states at ``rows [n]``."""
        parts = self._parts(rows)
        if len(parts) == 1:
            block, _, inside = parts[0]
            return type(self._initial)(*(value.index_select(0, inside) for value in block))
        found = [value.new_empty(len(rows), *value.shape[1:]) for value in self._initial]
        for block, places, inside in parts:
            for out, value in zip(found, block, strict=True):
                out.index_copy_(0, places, value.index_select(0, inside))
        return type(self._initial)(*found)

    def put(self, rows: np.ndarray, new: S) -> None:
        """Replaces the states at ``rows [n]``, which are distinct."""
        parts = self._parts(rows)
        for block, places, inside in parts:
            for stored, value in zip(block, new, strict=True):
                part = value if len(parts) == 1 else value.index_select(0, places)
                stored.index_copy_(0, inside, part)

    def _parts(self, rows: np.ndarray) -> list[tuple[S, Tensor, Tensor]]:
        """Blocks, the places in ``rows`` that lie in each, and the rows inside it."""
        which, inside = rows >> self._shift, rows & ((1 << self._shift) - 1)
        if len(rows) == 0:
            none = torch.zeros(0, dtype=torch.int64)
            return [(self._initial, none, none)]
        if (which == which[0]).all():
            places = torch.arange(len(rows))
            return [(self._blocks[which[0]], places, torch.from_numpy(inside))]
        order = np.argsort(which, kind="stable")
        cuts = np.flatnonzero(np.diff(which[order])) + 1
        return [
            (
                self._blocks[which[places[0]]],
                torch.from_numpy(places),
                torch.from_numpy(inside[places]),
            )
            for places in np.split(order, cuts)
        ]


def _release(budget: MemoryBudget, reserved: list[int]) -> None:
    budget.release(reserved[0])


def _zeros(count: int, like: Tensor) -> Tensor:
    """``[count, ...]`` zeros like ``like [1, ...]``, in memory that is touched when it is used."""
    if like[0].numel() == 0:
        return like.new_zeros(count, *like.shape[1:])
    # of zeros by torch every page would be touched at once
    flat = np.zeros(count * like[0].numel() * like.dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(flat).view(like.dtype).view(count, *like.shape[1:])

"""Which items a list may hold: item rows for each user, and how ids become such rows.

``exclude`` are items that must not come: what a user has seen, and what a request names. ``among``
are the only items that may come. Items that are hidden (``Retriever.hide``) come in no list. Ids
that are not in the catalogue are left out, counted, and reported in the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Rows = Sequence[np.ndarray]
"""Items ``[n]`` int64 of each user, rising."""

NOTHING = np.empty(0, dtype=np.int64)


class Named(NamedTuple):
    """Items of the catalogue that were named by their ids."""

    rows: np.ndarray
    """``[n]`` int64, each once, in the order in which they were named."""
    unknown: list[Any]
    """Ids that are not in the catalogue, each once."""

    @classmethod
    def of(cls, row_of: Mapping[Any, int], ids: Iterable[Any]) -> Named:
        """The rows of some ids, looked up one by one."""
        rows: list[int] = []
        unknown: list[Any] = []
        for name in dict.fromkeys(ids):
            row = row_of.get(name)
            if row is None:
                unknown.append(name)
            else:
                rows.append(row)
        return cls(np.array(rows, dtype=np.int64), unknown)

    @property
    def rising(self) -> np.ndarray:
        """The rows in rising order."""
        found: np.ndarray = np.sort(self.rows)
        return found


class Packed(NamedTuple):
    """Items of each user, one user after the other."""

    items: np.ndarray  # [E] int64, those of each user rising
    cuts: np.ndarray  # [B + 1]

    @classmethod
    def of(cls, rows: Rows) -> Packed:
        """The items of ``B`` users."""
        sizes = [own.size for own in rows]
        return cls(np.concatenate([NOTHING, *rows]), np.cumsum([0, *sizes]))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Users and items ``[E]`` each, as a table of scores is masked by."""
        users = np.repeat(np.arange(len(self.cuts) - 1), np.diff(self.cuts))
        return torch.from_numpy(users), torch.from_numpy(self.items)


def holds(rising: np.ndarray, item: int) -> bool:
    """Whether an item is among rising ones."""
    place = int(rising.searchsorted(item))
    return place < rising.size and int(rising[place]) == item


def joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Rising items of both, each once."""
    if not (one.size and other.size):
        return one if one.size else other
    found: np.ndarray = np.union1d(one, other)
    return found

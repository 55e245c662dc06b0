"""Events of the log as a model reads them: arrays, with items as rows of its catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch

from everlong.models.batch import Batch
from everlong.server.store.log import Slice
from everlong.server.store.watermark import numbers_of


class DecodedEvents(NamedTuple):
    """``n`` events."""

    offsets: np.ndarray
    """``[n]`` int64."""
    numbers: np.ndarray
    """``[n]`` uint64, of the keys of the events."""
    items: np.ndarray
    """``[n]`` int64 rows; -1 where the model cannot read the event: its item is not in the
    catalogue, or a field is not there or holds another code than the model has."""
    times: np.ndarray
    """``[n]`` int64."""
    codes: np.ndarray
    """``[n, X]`` int64, the fields that the model reads."""

    @staticmethod
    def of(
        events: Slice, row_of: Mapping[Any, int], field_codes: Mapping[str, int]
    ) -> DecodedEvents:
        """The columns of events for a model with a catalogue and fields."""
        count = len(events.offsets)
        rows = map(row_of.get, events.item_ids, repeat(-1))
        items = np.fromiter(rows, dtype=np.int64, count=count)
        codes = np.zeros((count, len(field_codes)), dtype=np.int64)
        for column, (name, limit) in enumerate(field_codes.items()):
            codes[:, column] = [_code(own.get(name)) for own in events.fields]
            items[(codes[:, column] < 0) | (codes[:, column] >= limit)] = -1
        return DecodedEvents(
            np.array(events.offsets, dtype=np.int64),
            numbers_of(events.keys),
            items,
            np.array(events.times, dtype=np.int64),
            codes,
        )

    @staticmethod
    def joined(parts: Sequence[DecodedEvents]) -> DecodedEvents:
        """All parts, one after the other."""
        return DecodedEvents(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def at(self, places: np.ndarray | slice) -> DecodedEvents:
        """The events at some places."""
        return DecodedEvents(*(values[places] for values in self))

    def batch(self, lengths: np.ndarray, fields: Sequence[str]) -> Batch:
        """The batch of events that lie user by user, ``lengths [B]`` each."""
        return Batch(
            items=torch.from_numpy(self.items),
            times=torch.from_numpy(self.times),
            offsets=torch.from_numpy(np.concatenate([[0], lengths.cumsum()])),
            fields={name: torch.from_numpy(self.codes[:, n]) for n, name in enumerate(fields)},
        )


def _code(value: float | int | None) -> int:
    return -1 if value is None or abs(value) > 1 << 31 else int(value)

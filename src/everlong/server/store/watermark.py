"""How far the state of a user goes: what is checked exactly, where floats cannot be.

A hash says which events were applied in which order; ``everlong verify`` compares it with the log.
It follows from the keys of events, which are salted cryptographic hashes, so that plain arithmetic
suffices here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numba import njit

WATERMARK = np.dtype([("offset", "<i8"), ("events", "<i8"), ("chain", "<u8"), ("newest", "<i8")])

FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no event is lost from a chain however many follow."""


class Watermark(NamedTuple):
    """How far the state of a user goes."""

    offset: int
    """Of the newest event that was applied."""
    events: int
    chain: int
    """A hash of the keys of all events in the order of their offsets."""
    newest: int
    """The largest time of an event."""


def numbers_of(keys: Iterable[bytes]) -> np.ndarray:
    """Event keys as the numbers that are added up, ``[n]`` uint64."""
    # of 16 bytes the first 8
    return np.frombuffer(b"".join(keys), dtype="<u8")[::2].copy()


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def note(
    watermarks: np.ndarray,
    rows: np.ndarray,
    offsets: np.ndarray,
    numbers: np.ndarray,
    times: np.ndarray,
) -> int:
    """Moves ``watermarks`` past events, each user's in the order of their offsets, in place.

    Args:
        watermarks: of all users, ``[U]`` of ``WATERMARK``.
        rows: ``[n]`` the user of each event.
        offsets: ``[n]``.
        numbers: ``[n]`` as ``numbers_of`` returns them.
        times: ``[n]``.

    Returns:
        How many events are older than one before them.
    """
    late = 0
    for n in range(rows.size):
        own = watermarks[rows[n]]
        if own["events"] > 0 and times[n] < own["newest"]:
            late += 1
        else:
            own["newest"] = times[n]
        own["offset"] = offsets[n]
        own["events"] += 1
        own["chain"] = own["chain"] * FACTOR + numbers[n]
    return late

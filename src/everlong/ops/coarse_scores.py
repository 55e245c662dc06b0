"""A coarse look at a whole catalogue: item vectors of 8 bits, read once for all users.

The table is a quarter of the vectors in float32, and to read it is what takes the time. How far a
coarse score can be from the score is for the caller to know.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

BLOCK = 512
"""Items whose scores are held at once."""

SOME = 64
"""Items of a block that are passed over together if none of them is among the best."""

LANES = 8
"""Dimensions that are added in one go: the scores of a block are read and written so much less."""


def in_blocks(table: np.ndarray) -> np.ndarray:
    """A table ``[I, D]`` as it is read: ``[blocks, D', BLOCK]`` with zeros at the ends.

    All items of a block lie side by side in each dimension, so that one instruction takes many.
    """
    items, dim = table.shape
    blocks, wide = -(-items // BLOCK), -(-dim // LANES) * LANES
    padded = np.zeros((blocks * BLOCK, wide), dtype=table.dtype)
    padded[:items, :dim] = table
    return np.ascontiguousarray(padded.reshape(blocks, BLOCK, wide).transpose(0, 2, 1))


# sums in any order: their error is in the bound
_FLAGS: Any = {"cache": True, "nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
_F = np.float32


@njit(**_FLAGS)  # pragma: no cover - compiled
def coarse_best(
    table: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray,
    bias_rows: np.ndarray,
    users: np.ndarray,
    excluded: np.ndarray,
    cuts: np.ndarray,
    values: np.ndarray,
    items: np.ndarray,
) -> None:
    """The highest coarse scores of users, in one pass over the catalogue.

    Args:
        table: int8 by ``in_blocks``; a row times its scale is nearly an item vector.
        scales: ``[I]``.
        bias: ``[G, I]``, -inf for items that are hidden.
        bias_rows: ``[B]`` rows of ``bias``.
        users: ``[B, D']``, with zeros at the end of each.
        excluded: ``[E]`` items that must not come, user by user, rising.
        cuts: ``[B + 1]`` where those of each user begin.
        values: ``[B, n]`` of -inf, where the scores go, highest first.
        items: ``[B, n]``, where their items go.
    """
    scores, last = np.empty(BLOCK, np.float32), values.shape[1] - 1
    for block in range(table.shape[0]):
        first = block * BLOCK
        for user in range(users.shape[0]):
            base = bias[bias_rows[user]]
            count = _scores(table[block], scales, base, users[user], first, scores)
            own = excluded[cuts[user] : cuts[user + 1]]
            for start in range(0, count, SOME):
                some = scores[start : min(start + SOME, count)]
                if _above(some, values[user, last]):
                    _put(some, first + start, own, values[user], items[user])


@njit(**_FLAGS)  # pragma: no cover - compiled
def _above(scores: np.ndarray, floor: np.float32) -> int:
    """How many there are: without a branch, so that one instruction takes many."""
    count = np.int32(0)
    for n in range(scores.size):
        count += np.int32(scores[n] > floor)
    return int(count)


@njit(**_FLAGS)  # pragma: no cover - compiled
def _put(
    scores: np.ndarray, first: int, excluded: np.ndarray, values: np.ndarray, items: np.ndarray
) -> None:
    """Puts items from ``first`` on among the best of a user, those that are not excluded."""
    last = values.size - 1
    for n in range(scores.size):
        if scores[n] <= values[last] or _holds(excluded, first + n):
            continue
        place = last
        while place > 0 and values[place - 1] < scores[n]:
            values[place], items[place] = values[place - 1], items[place - 1]
            place -= 1
        values[place], items[place] = scores[n], first + n


@njit(**_FLAGS)  # pragma: no cover - compiled
def coarse_above(
    table: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray,
    user: np.ndarray,
    excluded: np.ndarray,
    far: float,
    by_score: float,
    floor: float,
    items: np.ndarray,
) -> int:
    """All items whose score may be ``floor`` or more by the bound; returns how many."""
    scores, found = np.empty(BLOCK, np.float32), 0
    for block in range(table.shape[0]):
        first = block * BLOCK
        for n in range(_scores(table[block], scales, bias, user, first, scores)):
            high = scores[n] + abs(scores[n]) * by_score + far
            # items that are hidden have -inf, which the bound makes NaN
            if high >= floor and not _holds(excluded, first + n):
                items[found] = first + n
                found += 1
    return found


@njit(**_FLAGS)  # pragma: no cover - compiled
def _scores(
    rows: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray,
    user: np.ndarray,
    first: int,
    scores: np.ndarray,
) -> int:
    """Coarse scores of one block of items; returns how many there are."""
    scores[:] = 0
    for m in range(0, user.size, LANES):
        a, b, c, d = user[m], user[m + 1], user[m + 2], user[m + 3]
        e, f, g, h = user[m + 4], user[m + 5], user[m + 6], user[m + 7]
        p, q, r, s = rows[m], rows[m + 1], rows[m + 2], rows[m + 3]
        t, u, v, w = rows[m + 4], rows[m + 5], rows[m + 6], rows[m + 7]
        for n in range(scores.size):
            low = _F(p[n]) * a + _F(q[n]) * b + _F(r[n]) * c + _F(s[n]) * d
            high = _F(t[n]) * e + _F(u[n]) * f + _F(v[n]) * g + _F(w[n]) * h
            scores[n] += low + high
    # views, so that the loop counts from 0
    own, base = scales[first : first + scores.size], bias[first : first + scores.size]
    for n in range(own.size):
        scores[n] = scores[n] * own[n] + base[n]
    return int(own.size)


@njit(**_FLAGS)  # pragma: no cover - compiled
def _holds(rising: np.ndarray, item: int) -> bool:
    place = np.searchsorted(rising, item)
    return bool(place < rising.size and rising[place] == item)

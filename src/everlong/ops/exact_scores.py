"""Scores by one arithmetic: in float64, in a fixed order, rounded once to float32.

A product of two numbers of float32 is exact in float64, so that it makes no difference whether a
processor multiplies and adds in one instruction or in two. The order of the additions is written
out below and no compiler flag lets it change. So the score of an item follows from its vector, its
biases and the user vector alone: the batch, the shard, the number of threads and the processor
have no part in it. Among equal scores the lower item row comes first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

LANES = 4
"""Partial sums: lane n adds the products of the dimensions n, n + LANES, ... in rising order. The
score is ``((lane 0 + lane 1) + (lane 2 + lane 3)) + ((bias + item_bias) + added)``."""

# without fastmath: sums stay in the order that is written
_FLAGS: Any = {"cache": True, "nogil": True}


@njit(**_FLAGS)  # pragma: no cover - compiled
def _product(a: np.ndarray, b: np.ndarray) -> float:
    """``(lane 0 + lane 1) + (lane 2 + lane 3)`` in float64."""
    p, q, r, s = 0.0, 0.0, 0.0, 0.0
    whole = a.size - a.size % LANES
    for m in range(0, whole, LANES):
        p += np.float64(a[m]) * np.float64(b[m])
        q += np.float64(a[m + 1]) * np.float64(b[m + 1])
        r += np.float64(a[m + 2]) * np.float64(b[m + 2])
        s += np.float64(a[m + 3]) * np.float64(b[m + 3])
    if whole < a.size:
        p += np.float64(a[whole]) * np.float64(b[whole])
    if whole + 1 < a.size:
        q += np.float64(a[whole + 1]) * np.float64(b[whole + 1])
    if whole + 2 < a.size:
        r += np.float64(a[whole + 2]) * np.float64(b[whole + 2])
    return (p + q) + (r + s)


@njit(**_FLAGS)  # pragma: no cover - compiled
def bias_of(bias: np.ndarray, item_bias: np.ndarray, row: int, item: int) -> float:
    """``bias [I]`` and ``item_bias [G, I]`` of an item, in float64; ``G`` may be 0."""
    total = np.float64(bias[item])
    if item_bias.shape[0] > 0:
        total += np.float64(item_bias[row, item])
    return total


@njit(**_FLAGS)  # pragma: no cover - compiled
def exact_scores(
    weight: np.ndarray,
    bias: np.ndarray,
    item_bias: np.ndarray,
    bias_rows: np.ndarray,
    users: np.ndarray,
    items: np.ndarray,
    added: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Scores of some items of each user, in place.

    Args:
        weight: ``[I, D]``.
        bias: ``[I]``, -inf for an item that must not be listed.
        item_bias: ``[G, I]``, ``G`` 0 for none.
        bias_rows: ``[B]`` rows of ``item_bias``.
        users: ``[B, D]``.
        items: ``[B, n]``; -1 for none, which scores -inf.
        added: ``[B, n]``, added to the biases of an item; ``n`` 0 for nothing.
        scores: ``[B, n]``, where the scores go.
    """
    for user in range(users.shape[0]):
        for n in range(items.shape[1]):
            item = items[user, n]
            scores[user, n] = -np.inf
            if item >= 0:
                total = bias_of(bias, item_bias, bias_rows[user], item)
                if added.shape[1] > 0:
                    total += np.float64(added[user, n])
                scores[user, n] = np.float32(_product(weight[item], users[user]) + total)


@njit(**_FLAGS)  # pragma: no cover - compiled
def put_in_order(scores: np.ndarray, items: np.ndarray) -> None:
    """Puts items ``[B, n]`` in the order of their scores ``[B, n]``, in place.

    The lower item row comes first among equals; items of -inf become -1 and stand last. Quick
    where the order is nearly there already.
    """
    for user in range(scores.shape[0]):
        found, named, count = scores[user], items[user], 0
        for n in range(named.size):
            score, item, place = found[n], named[n], count
            if score == -np.inf:
                continue
            while place > 0 and (
                found[place - 1] < score or (found[place - 1] == score and named[place - 1] > item)
            ):
                found[place], named[place] = found[place - 1], named[place - 1]
                place -= 1
            found[place], named[place] = score, item
            count += 1
        found[count:] = -np.inf
        named[count:] = -1


@njit(**_FLAGS)  # pragma: no cover - compiled
def count_before(
    coarse: np.ndarray,
    far: np.ndarray,
    by_score: float,
    weight: np.ndarray,
    bias: np.ndarray,
    item_bias: np.ndarray,
    bias_rows: np.ndarray,
    users: np.ndarray,
    excluded: np.ndarray,
    cuts: np.ndarray,
    targets: np.ndarray,
    scores: np.ndarray,
    counts: np.ndarray,
) -> None:
    """How many items stand before a target in the list of each user.

    Items whose coarse score leaves it open are scored exactly.

    Args:
        coarse: ``[B, I]``, nearly the scores.
        far: ``[B]``, with ``by_score`` how far coarse scores may be from the scores.
        by_score: the part of it in coarse scores.
        weight, bias, item_bias, bias_rows, users: as of ``exact_scores``.
        excluded: ``[E]`` items that are not counted, user by user, rising.
        cuts: ``[B + 1]`` where those of each user begin.
        targets: ``[B]`` items.
        scores: ``[B]`` their scores.
        counts: ``[B]``, where the numbers go.
    """
    for user in range(users.shape[0]):
        own, score, target = coarse[user], scores[user], targets[user]
        out = excluded[cuts[user] : cuts[user + 1]]
        reach = np.float32(far[user] + abs(score) * 2.0 * by_score)
        high, low = np.float32(score + reach), np.float32(score - reach)
        # rounded away from the score
        high, low = np.nextafter(high, np.float32(np.inf)), np.nextafter(low, np.float32(-np.inf))
        above, near = 0, 0
        for item in range(own.size):
            above += own[item] > high
            near += own[item] >= low
        for n in range(out.size):
            if n == 0 or out[n] != out[n - 1]:
                above -= own[out[n]] > high
                near -= own[out[n]] >= low
        # the target is near its own score
        if near > above + (not _holds(out, target)):
            for item in range(own.size):
                if low <= own[item] <= high and item != target and not _holds(out, item):
                    total = bias_of(bias, item_bias, bias_rows[user], item)
                    found = np.float32(_product(weight[item], users[user]) + total)
                    above += found > score or (found == score and item < target)
        counts[user] = above


@njit(**_FLAGS)  # pragma: no cover - compiled
def exact_norms(weight: np.ndarray, norms: np.ndarray) -> None:
    """Lengths ``[I]`` in float64 of item vectors ``[I, D]``, in place; at least 1e-12."""
    for item in range(weight.shape[0]):
        norms[item] = max(np.sqrt(_product(weight[item], weight[item])), 1e-12)


@njit(**_FLAGS)  # pragma: no cover - compiled
def exact_cosines(
    weight: np.ndarray, norms: np.ndarray, item: int, items: np.ndarray, scores: np.ndarray
) -> None:
    """Cosines ``[n]`` of items ``[n]`` with one, in float64 and rounded to float32, in place."""
    for n in range(items.size):
        product = _product(weight[items[n]], weight[item])
        scores[n] = np.float32(product / (norms[items[n]] * norms[item]))


@njit(**_FLAGS)  # pragma: no cover - compiled
def _holds(rising: np.ndarray, item: int) -> bool:
    place = np.searchsorted(rising, item)
    return bool(place < rising.size and rising[place] == item)

"""The elementwise part of pointwise attention on CPU: one loop over the visible scores each way.

A loop costs about 0.2 ns a score on one core; the products around it cost several times that.
The exponential is written out for float32, because the loop is only then compiled to vector
instructions; its relative error is below 1e-7.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor

PARALLEL_SCORES = 1 << 18
"""Below so many scores waking other threads costs more than it saves."""


_FOREVER = 1 << 32  # seconds, as in elapsed_bucket


class BlockBias(Protocol):
    """Tables, and when the queries and keys of a block are."""

    @property
    def distance(self) -> Tensor: ...
    @property
    def elapsed(self) -> Tensor: ...
    @property
    def query_times(self) -> Tensor: ...
    @property
    def key_times(self) -> Tensor: ...


class BiasGrads(Protocol):
    """Running gradients of the tables."""

    @property
    def distance(self) -> Tensor: ...
    @property
    def elapsed(self) -> Tensor: ...


def activate(scores: Tensor, first: Tensor, stop: Tensor, bias: BlockBias | None) -> Tensor:
    """Weights in place of ``scores [R, H, Q, C]``."""
    kernel = _activate if scores.numel() >= PARALLEL_SCORES else _activate_alone
    scores = scores.contiguous()
    kernel(_array(scores), _array(first), _array(stop), *_tables(scores, first, bias))
    return scores


def differentiate(
    scores: Tensor,
    d_weights: Tensor,
    first: Tensor,
    stop: Tensor,
    bias: BlockBias | None,
    d_bias: BiasGrads | None,
) -> tuple[Tensor, Tensor]:
    """Weights in place of ``scores [R, H, Q, C]``, gradient of the scores in that of ``d_weights``.

    The gradients of the tables are summed block by block, and then in the order of the blocks:
    equal bits for any number of threads.
    """
    kernel = _differentiate if scores.numel() >= PARALLEL_SCORES else _differentiate_alone
    scores, d_weights = scores.contiguous(), d_weights.contiguous()
    tables = _tables(scores, first, bias)
    sums = [np.zeros((scores.shape[0], table.size), dtype=table.dtype) for table in tables[:2]]
    kernel(_array(scores), _array(d_weights), _array(first), _array(stop), *tables, *sums)
    if d_bias is not None:
        for table, partial in zip((d_bias.distance, d_bias.elapsed), sums, strict=True):
            table += table.new_tensor(partial.sum(0))
    return scores, d_weights


def _tables(scores: Tensor, first: Tensor, bias: BlockBias | None) -> tuple[Any, ...]:
    """Tables and times as arrays; empty tables where there is no bias."""
    if bias is None:
        none = _array(scores.new_zeros(0))
        return none, none, _array(first), _array(first)
    return tuple(
        _array(part) for part in (bias.distance, bias.elapsed, bias.query_times, bias.key_times)
    )


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().contiguous().numpy()
    return array


def _as_bits(typing: Any, value: Any) -> Any:  # pragma: no cover - compiled
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), build


def _as_float(typing: Any, bits: Any) -> Any:  # pragma: no cover - compiled
    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), build


_to_bits: Any = intrinsic(_as_bits)
_to_float: Any = intrinsic(_as_float)


def _exp(x: Any) -> Any:
    """``e ** x``; compiled code has a form of its own for each type."""
    return math.exp(x)


@overload(_exp, inline="always")
def _exp_by_type(x):  # type: ignore[no-untyped-def]
    if x != types.float32:
        return lambda x: math.exp(x)

    def exp_float32(x):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
        # 2^n times a polynomial on -ln 2 / 2 .. ln 2 / 2, with the coefficients of the Cephes
        # library; comparisons this way round let a NaN pass
        x = min(max(x, np.float32(-87.0)), np.float32(88.0))
        # adding and taking away 1.5 * 2^23 rounds to a whole number
        n = (x * np.float32(1.4426950408889634) + np.float32(12582912.0)) - np.float32(12582912.0)
        f = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * f + np.float32(1.3981999507e-3)
        p = p * f + np.float32(8.3334519073e-3)
        p = p * f + np.float32(4.1665795894e-2)
        p = p * f + np.float32(1.6666665459e-1)
        p = p * f + np.float32(5.0000001201e-1)
        p = p * f * f + f + np.float32(1.0)
        return p * _to_float((np.int32(n) + np.int32(127)) << np.int32(23))

    return exp_float32


# what may be done to sums and products, without which a loop is not compiled to vectors
_FLAGS: Any = {
    "error_model": "numpy",
    "fastmath": {"contract", "nsz"},
    "cache": True,
    "nogil": True,
}


@njit(**_FLAGS)  # pragma: no cover - compiled
def _bias_row(bias, bucket, distance, elapsed, when, times, low, high):  # type: ignore[no-untyped-def]
    """Writes bias and elapsed bucket of the columns ``low .. high - 1`` of one query."""
    # slices from zero on: with indexes that might be negative no loop is compiled to vectors
    added, place, then = bias[low:high], bucket[low:high], times[low:high]
    near = min(added.size, distance.size)
    far = added.size - near
    added[:far] = distance[distance.size - 1]
    added[far:] = distance[:near][::-1]
    for c in range(added.size):
        passed = np.float32(min(max(when - then[c], 0), _FOREVER) + 1)
        place[c] = min((_to_bits(passed) >> np.int32(22)) - np.int32(254), np.int32(63))
    for c in range(added.size):
        added[c] += elapsed[place[c]]


@njit(**_FLAGS)  # pragma: no cover - compiled
def _activate_row(row, bias, low, high):  # type: ignore[no-untyped-def]
    row[:low] = 0.0
    row[high:] = 0.0
    one = row.dtype.type(1.0)
    share = one / row.dtype.type(high - low)
    scores, added = row[low:high], bias[low:high]
    for c in range(scores.size):
        x = scores[c] + added[c]
        scores[c] = x * share / (one + _exp(-x))


@njit(**_FLAGS)  # pragma: no cover - compiled
def _differentiate_row(row, d_row, bias, total, low, high):  # type: ignore[no-untyped-def]
    row[:low] = 0.0
    row[high:] = 0.0
    d_row[:low] = 0.0
    d_row[high:] = 0.0
    one = row.dtype.type(1.0)
    share = one / row.dtype.type(high - low)
    scores, d_scores = row[low:high], d_row[low:high]
    added, sums = bias[low:high], total[low:high]
    for c in range(scores.size):
        x = scores[c] + added[c]
        gate = one / (one + _exp(-x))
        weight = x * gate * share
        gradient = d_scores[c] * (gate * share + weight * (one - gate))
        scores[c] = weight
        d_scores[c] = gradient
        sums[c] += gradient


@njit(**_FLAGS)  # pragma: no cover - compiled
def _sum_row(total, bucket, d_distance, d_elapsed):  # type: ignore[no-untyped-def]
    """Adds the gradients of one query's biases to those of the tables."""
    near = min(total.size, d_distance.size)
    far = total.size - near
    back, own = total[far:][::-1], d_distance[:near]
    for c in range(near):
        own[c] += back[c]
    for c in range(far):
        d_distance[near - 1] += total[c]
    # neighbours mostly share a bucket: their sum stays in a register
    last, run = bucket[0], total[0]
    for c in range(1, total.size):
        if bucket[c] != last:
            d_elapsed[last] += run
            last, run = bucket[c], total[c]
        else:
            run += total[c]
    d_elapsed[last] += run


@njit(**_FLAGS)  # pragma: no cover - compiled
def _activate_block(r, scores, first, stop, distance, elapsed, query_times, key_times):  # type: ignore[no-untyped-def]
    _, heads, queries, columns = scores.shape
    bias = np.zeros(columns, dtype=scores.dtype)
    bucket = np.zeros(columns, dtype=np.int32)
    for q in range(queries):
        low, high = first[r, q], stop[r, q]
        if high <= low:
            scores[r, :, q] = 0.0
            continue
        if distance.size:
            when, times = query_times[r, q], key_times[r]
            _bias_row(bias, bucket, distance, elapsed, when, times, low, high)
        for h in range(heads):
            _activate_row(scores[r, h, q], bias, low, high)


@njit(**_FLAGS)  # pragma: no cover - compiled
def _differentiate_block(  # type: ignore[no-untyped-def]
    r,
    scores,
    d_weights,
    first,
    stop,
    distance,
    elapsed,
    query_times,
    key_times,
    d_distance,
    d_elapsed,
):
    _, heads, queries, columns = scores.shape
    bias = np.zeros(columns, dtype=scores.dtype)
    total = np.zeros(columns, dtype=scores.dtype)
    bucket = np.zeros(columns, dtype=np.int32)
    for q in range(queries):
        low, high = first[r, q], stop[r, q]
        if high <= low:
            scores[r, :, q] = 0.0
            d_weights[r, :, q] = 0.0
            continue
        if distance.size:
            when, times = query_times[r, q], key_times[r]
            _bias_row(bias, bucket, distance, elapsed, when, times, low, high)
            total[low:high] = 0.0
        for h in range(heads):
            _differentiate_row(scores[r, h, q], d_weights[r, h, q], bias, total, low, high)
        if distance.size:
            _sum_row(total[low:high], bucket[low:high], d_distance[r], d_elapsed[r])


# Two functions each, not one compiled twice: Numba's cache on disk knows a function by its name and
# its code, so that the first of two compilations would be loaded for both.


@njit(parallel=True, **_FLAGS)  # pragma: no cover - compiled
def _activate(scores, first, stop, distance, elapsed, query_times, key_times):  # type: ignore[no-untyped-def]
    for r in prange(scores.shape[0]):
        _activate_block(r, scores, first, stop, distance, elapsed, query_times, key_times)


@njit(**_FLAGS)  # pragma: no cover - compiled
def _activate_alone(scores, first, stop, distance, elapsed, query_times, key_times):  # type: ignore[no-untyped-def]
    for r in range(scores.shape[0]):
        _activate_block(r, scores, first, stop, distance, elapsed, query_times, key_times)


@njit(parallel=True, **_FLAGS)  # pragma: no cover - compiled
def _differentiate(  # type: ignore[no-untyped-def]
    scores, d_weights, first, stop, distance, elapsed, query_times, key_times, d_distance, d_elapsed
):
    for r in prange(scores.shape[0]):
        _differentiate_block(
            r,
            scores,
            d_weights,
            first,
            stop,
            distance,
            elapsed,
            query_times,
            key_times,
            d_distance,
            d_elapsed,
        )


@njit(**_FLAGS)  # pragma: no cover - compiled
def _differentiate_alone(  # type: ignore[no-untyped-def]
    scores, d_weights, first, stop, distance, elapsed, query_times, key_times, d_distance, d_elapsed
):
    for r in range(scores.shape[0]):
        _differentiate_block(
            r,
            scores,
            d_weights,
            first,
            stop,
            distance,
            elapsed,
            query_times,
            key_times,
            d_distance,
            d_elapsed,
        )

"""The fused CPU form of linear attention: two walks over a history backward, one forward.

The work is shared out by user and head; each writes parts of the results that are its own, so that
equal inputs give equal bits for any number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from everlong.ops.attention_types import Asked

PARALLEL_NUMBERS = 1 << 16
"""Below so many numbers of queries and features waking other threads costs more than it saves."""

Facts = tuple[Tensor, Tensor, Asked, Tensor, Tensor]
"""Times and offsets of the events, requests, rates, and the times of the sums before."""

Array = np.ndarray[Any, Any]


class Inputs(NamedTuple):
    """What all walks read."""

    features: Array  # [N, H, F]
    values: Array  # [N, H, E]
    queries: Array  # [P, H, F]
    weighted: Array  # [B, H, M, F, E], before the first event
    mass: Array  # [B, H, M, F]
    times: Array  # [N]
    offsets: Array  # [B + 1]
    first: Array  # [B + 1] the requests of each user
    cut: Array  # [Q]
    at: Array  # [Q]
    candidates: Array  # [Q + 1] the candidates of each request
    rates: Array  # [M] float64
    before: Array  # [B] when the sums were


class Given(NamedTuple):
    """Gradients of the results."""

    read: Array  # [P, H, M, E]
    mass: Array  # [P, H, M]


class Found(NamedTuple):
    """Gradients of the inputs, zero to begin with."""

    features: Array
    values: Array
    weighted: Array
    mass: Array


class CpuLinearAttention(torch.autograd.Function):
    """``linear_attention`` on CPU; arguments as there, tensors that have gradients first."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        values: Tensor,
        queries: Tensor,
        weighted: Tensor,
        mass: Tensor,
        facts: Facts,
    ) -> tuple[Tensor, Tensor]:
        rates = facts[3].numel()
        read = queries.new_zeros(*queries.shape[:2], rates, values.shape[-1])
        total = queries.new_zeros(*queries.shape[:2], rates)
        inputs = _inputs(features, values, queries, weighted, mass, facts)
        walk = _read if _is_much(inputs) else _read_alone
        walk(inputs, read.numpy(), total.numpy())
        ctx.save_for_backward(features, values, queries, weighted, mass)
        ctx.facts = facts
        return read, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        features, values, queries, weighted, mass = tensors
        inputs = _inputs(features, values, queries, weighted, mass, ctx.facts)
        given = Given(_array(grads[0]), _array(grads[1]))
        found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors]
        d_features, d_values, d_queries, d_weighted, d_mass = (x.numpy() for x in found)
        ask, walk_back = (_ask, _back) if _is_much(inputs) else (_ask_alone, _back_alone)
        ask(inputs, given, d_queries)
        walk_back(inputs, given, Found(d_features, d_values, d_weighted, d_mass))
        return (*found, None)


def _is_much(inputs: Inputs) -> bool:
    return bool(inputs.features.size + inputs.queries.size >= PARALLEL_NUMBERS)


def _inputs(
    features: Tensor, values: Tensor, queries: Tensor, weighted: Tensor, mass: Tensor, facts: Facts
) -> Inputs:
    times, offsets, asked, rates, at = facts
    first = torch.searchsorted(asked.user, torch.arange(offsets.numel()))
    tensors = (features, values, queries, weighted, mass, times, offsets, first)
    more = (asked.cut, asked.at, asked.offsets, rates.double(), at)
    return Inputs(*(_array(tensor) for tensor in (*tensors, *more)))


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().contiguous().numpy()
    return array


# In the walks ``sums`` and ``mass`` are of one user and head, as of the last event.


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def _now(x, user, event):  # type: ignore[no-untyped-def]
    """When the sums before ``event`` are of: the time of the event before it."""
    return x.times[event - 1] if event > x.offsets[user] else x.before[user]


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def _add(x, user, head, event, sums, mass):  # type: ignore[no-untyped-def]
    f, v, seconds = (
        x.features[event, head],
        x.values[event, head],
        x.times[event] - _now(x, user, event),
    )
    for m in range(x.rates.shape[0]):
        kept = sums.dtype.type(np.exp(-x.rates[m] * seconds))
        for i in range(f.shape[0]):
            row, much = sums[m, i], f[i]
            mass[m, i] = mass[m, i] * kept + much
            for e in range(v.shape[0]):
                row[e] = row[e] * kept + much * v[e]


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def _read_part(work, x, read, total):  # type: ignore[no-untyped-def]
    user, head = work // x.queries.shape[1], work % x.queries.shape[1]
    sums, much = x.weighted[user, head].copy(), x.mass[user, head].copy()
    event = x.offsets[user]
    for request in range(x.first[user], x.first[user + 1]):
        while event < x.offsets[user] + x.cut[request]:
            _add(x, user, head, event, sums, much)
            event += 1
        for m in range(x.rates.shape[0]):
            kept = sums.dtype.type(np.exp(-x.rates[m] * (x.at[request] - _now(x, user, event))))
            for place in range(x.candidates[request], x.candidates[request + 1]):
                q, out = x.queries[place, head], read[place, head, m]
                for i in range(q.shape[0]):
                    row, share = sums[m, i], q[i] * kept
                    total[place, head, m] += share * much[m, i]
                    for e in range(out.shape[0]):
                        out[e] += share * row[e]


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})  # pragma: no cover
def _ask_part(work, x, given, d_queries):  # type: ignore[no-untyped-def]
    user, head = work // x.queries.shape[1], work % x.queries.shape[1]
    sums, much = x.weighted[user, head].copy(), x.mass[user, head].copy()
    event = x.offsets[user]
    for request in range(x.first[user], x.first[user + 1]):
        while event < x.offsets[user] + x.cut[request]:
            _add(x, user, head, event, sums, much)
            event += 1
        for m in range(x.rates.shape[0]):
            kept = sums.dtype.type(np.exp(-x.rates[m] * (x.at[request] - _now(x, user, event))))
            for place in range(x.candidates[request], x.candidates[request + 1]):
                d_q, d_out = d_queries[place, head], given.read[place, head, m]
                for i in range(d_q.shape[0]):
                    row, found = sums[m, i], given.mass[place, head, m] * much[m, i]
                    for e in range(d_out.shape[0]):
                        found += d_out[e] * row[e]
                    d_q[i] += kept * found


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})  # pragma: no cover
def _back_part(work, x, given, found):  # type: ignore[no-untyped-def]
    user, head = work // x.queries.shape[1], work % x.queries.shape[1]
    # gradients of the sums, as of the event that the walk is at
    sums, mass = found.weighted[user, head], found.mass[user, head]
    event = x.offsets[user + 1]
    for request in range(x.first[user + 1] - 1, x.first[user] - 1, -1):
        while event > x.offsets[user] + x.cut[request]:
            event -= 1
            _take_back(x, user, head, event, sums, mass, found)
        for m in range(x.rates.shape[0]):
            kept = sums.dtype.type(np.exp(-x.rates[m] * (x.at[request] - _now(x, user, event))))
            for place in range(x.candidates[request], x.candidates[request + 1]):
                q, d_out = x.queries[place, head], given.read[place, head, m]
                for i in range(q.shape[0]):
                    row, share = sums[m, i], q[i] * kept
                    mass[m, i] += share * given.mass[place, head, m]
                    for e in range(d_out.shape[0]):
                        row[e] += share * d_out[e]
    while event > x.offsets[user]:
        event -= 1
        _take_back(x, user, head, event, sums, mass, found)


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})  # pragma: no cover
def _take_back(x, user, head, event, sums, mass, found):  # type: ignore[no-untyped-def]
    f, v = x.features[event, head], x.values[event, head]
    d_f, d_v = found.features[event, head], found.values[event, head]
    seconds = x.times[event] - _now(x, user, event)
    for m in range(x.rates.shape[0]):
        kept = sums.dtype.type(np.exp(-x.rates[m] * seconds))
        for i in range(f.shape[0]):
            row, much, product = sums[m, i], f[i], mass[m, i]
            for e in range(v.shape[0]):
                product += row[e] * v[e]
                d_v[e] += row[e] * much
                row[e] *= kept
            d_f[i] += product
            mass[m, i] *= kept


# Two functions each, not one compiled twice: Numba's cache on disk knows a function by its name and
# its code, so that the first of two compilations would be loaded for both.


@njit(parallel=True, cache=True, nogil=True)  # pragma: no cover - compiled
def _read(x, read, total):  # type: ignore[no-untyped-def]
    for work in prange((x.offsets.shape[0] - 1) * x.queries.shape[1]):
        _read_part(work, x, read, total)


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def _read_alone(x, read, total):  # type: ignore[no-untyped-def]
    for work in range((x.offsets.shape[0] - 1) * x.queries.shape[1]):
        _read_part(work, x, read, total)


@njit(parallel=True, cache=True, nogil=True)  # pragma: no cover - compiled
def _ask(x, given, d_queries):  # type: ignore[no-untyped-def]
    for work in prange((x.offsets.shape[0] - 1) * x.queries.shape[1]):
        _ask_part(work, x, given, d_queries)


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def _ask_alone(x, given, d_queries):  # type: ignore[no-untyped-def]
    for work in range((x.offsets.shape[0] - 1) * x.queries.shape[1]):
        _ask_part(work, x, given, d_queries)


@njit(parallel=True, cache=True, nogil=True)  # pragma: no cover - compiled
def _back(x, given, found):  # type: ignore[no-untyped-def]
    for work in prange((x.offsets.shape[0] - 1) * x.queries.shape[1]):
        _back_part(work, x, given, found)


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def _back_alone(x, given, found):  # type: ignore[no-untyped-def]
    for work in range((x.offsets.shape[0] - 1) * x.queries.shape[1]):
        _back_part(work, x, given, found)

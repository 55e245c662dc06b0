"""Pointwise attention of HSTU (Zhai et al., arXiv 2402.17152, eq. 2): SiLU in place of softmax.

A query with visible columns ``first .. stop - 1`` of its keys gives

    sum_c silu(q . k_c + bias_c) v_c / (stop - first)

and zero where it sees nothing. Queries and keys are packed rows; a mask of blocks says which
queries see which keys, so that no table of all queries by all keys ever exists. A NaN in a key or a
value may reach every query of the blocks that hold it.

Per pair of query and key and head: 4 E operations in products forward and 10 E backward (the
scores are computed again), one exponential each way, and nothing kept but queries, keys and values.

Forms, all equal in values and gradients:

* ``reference_attention``: one query after the other, for reading and for tests.
* ``dense_attention``: the published form, a table of all queries by all keys, for comparison.
* ``pointwise_attention``: what models call; block by block, with fused loops on CPU
  (``pointwise_attention_cpu``) and torch operations elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from everlong.ops import pointwise_attention_cpu as fused

ELAPSED_BUCKETS = 64

CHUNK_SCORES = 1 << 18
"""Most scores, of all heads, that exist at one time, but for a block that has more alone: 1 MB in
float32, the second-level cache of a core or two."""


class Blocks(NamedTuple):
    """R blocks: queries that share their keys, all blocks padded to one shape."""

    queries: Tensor  # [R, Q] int64, rows of the queries; where padded, any row
    keys: Tensor  # [R, C] int64, rows of the keys; where padded, any row
    first: Tensor  # [R, Q] int64, first visible column, 0 .. C also where padded
    stop: Tensor  # [R, Q] int64, one past the last, 0 .. C; sees nothing where stop <= first
    valid: Tensor  # [R, Q] bool, False where padded


class RelativeBias(NamedTuple):
    """What is added to the scores, for all heads alike (arXiv 2402.17152, rab)."""

    distance: Tensor  # [P] by stop - 1 - c, the columns that lie between, at most P - 1
    elapsed: Tensor  # [64] by the bucket of query_time - key_time
    query_times: Tensor  # [Nq] int64, Unix seconds
    key_times: Tensor  # [Nk] int64


def elapsed_bucket(seconds: Tensor) -> Tensor:
    """The bucket 0 .. 63 of elapsed times, int64: two an octave of ``1 + seconds``.

    Published: ``floor(ln(max(1, seconds)) / 0.301)``, which is 2.3 an octave and takes a logarithm;
    these are the exponent and the first bit of the mantissa as they stand in a float32. Times
    below zero count as zero.
    """
    # nothing later than 2^32 s changes the bucket, and one more than the largest int64 is negative
    bits = (seconds.clamp(0, 1 << 32) + 1).to(torch.float32).view(torch.int32)
    return ((bits >> 22) - 254).clamp(max=ELAPSED_BUCKETS - 1).to(torch.int64)


def pointwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Sequence[Blocks],
    bias: RelativeBias | None = None,
) -> Tensor:
    """What each query makes of the values that it sees, by the fast form.

    Args:
        query: ``[Nq, H, E]``; narrow dtypes are computed in float32.
        key, value: ``[Nk, H, E]``.
        mask: blocks in which each query is valid at most once.
        bias: added to the scores.

    Returns:
        ``[Nq, H, E]``, float32 or wider; zero for a query that is in no block or sees nothing.

    Raises:
        ValueError: if shapes or dtypes do not fit together.
    """
    _check(query, key, value, bias)
    tables = (None,) * 4 if bias is None else bias
    mixed: Tensor = _Attention.apply(query, key, value, *tables, tuple(mask))  # type: ignore[no-untyped-call]
    return mixed


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Sequence[Blocks],
    bias: RelativeBias | None = None,
) -> Tensor:
    """The same as ``pointwise_attention``, one query at a time, by autograd."""
    _check(query, key, value, bias)
    mixed = [torch.zeros_like(row) for row in query]
    for block in mask:
        for r, n in block.valid.nonzero().tolist():
            first, stop, row = int(block.first[r, n]), int(block.stop[r, n]), block.queries[r, n]
            if stop <= first:
                continue
            keys = block.keys[r, first:stop]
            scores = torch.einsum("he,che->hc", query[row], key[keys])
            if bias is not None:
                distance = torch.arange(stop - first - 1, -1, -1, device=query.device)
                elapsed = bias.query_times[row] - bias.key_times[keys]
                scores = scores + bias.distance[distance.clamp(max=bias.distance.numel() - 1)]
                scores = scores + bias.elapsed[elapsed_bucket(elapsed)]
            weights = functional.silu(scores) / (stop - first)
            mixed[int(row)] = torch.einsum("hc,che->he", weights, value[keys])
    return torch.stack(mixed) if mixed else torch.zeros_like(query)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, bias: Tensor
) -> Tensor:
    """The published form: all queries by all keys at once, by autograd.

    Args:
        query: ``[N, H, E]``, as ``key`` and ``value``.
        visible: ``[N, N]`` bool.
        bias: ``[N, N]``.
    """
    scores = torch.einsum("nhe,mhe->hnm", query, key) + bias
    share = visible.to(query.dtype) / visible.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("hnm,mhe->nhe", functional.silu(scores) * share, value)


def _check(query: Tensor, key: Tensor, value: Tensor, bias: RelativeBias | None) -> None:
    if query.dim() != 3 or key.shape != value.shape or query.shape[1:] != key.shape[1:]:
        raise ValueError(
            "attention expects query [Nq, H, E] and key and value [Nk, H, E]; received "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "attention expects query, key and value of one dtype; received "
            f"{query.dtype}, {key.dtype} and {value.dtype}; cast them first"
        )
    if bias is None:
        return
    counts = (bias.elapsed.numel(), bias.query_times.numel(), bias.key_times.numel())
    expected = (ELAPSED_BUCKETS, query.shape[0], key.shape[0])
    if counts != expected or bias.distance.numel() < 1:
        raise ValueError(
            f"a bias expects elapsed [{expected[0]}], query_times [{expected[1]}], key_times "
            f"[{expected[2]}] and a distance at least; received lengths {counts} and "
            f"{bias.distance.numel()} distances"
        )


class _Attention(torch.autograd.Function):
    """Block by block; backward computes the scores of a block again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        distance: Tensor | None,
        elapsed: Tensor | None,
        query_times: Tensor | None,
        key_times: Tensor | None,
        mask: tuple[Blocks, ...],
    ) -> Tensor:
        ctx.mask, ctx.dtype = mask, query.dtype
        ctx.save_for_backward(query, key, value, distance, elapsed, query_times, key_times)
        with torch.autocast(query.device.type, enabled=False):
            queries, keys, values = (_Rows.of(part) for part in (query, key, value))
            chunks = _chunks(mask, query.shape[1])
            mixed, room = queries.zeros(), _Room(queries.flat, chunks, query.shape[1])
            for block in chunks:
                bias = _block_bias(block, queries, distance, elapsed, query_times, key_times)
                own, seen = queries.places(block.queries, block.valid), keys.places(block.keys)
                scores = room.product(queries.take(own), keys.take(seen).mT)
                mixed.put(own, _activate(scores, block, bias) @ values.take(seen))
        return mixed.all()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, distance, elapsed, query_times, key_times = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            queries, keys, values = (_Rows.of(part) for part in (query, key, value))
            given, d_query = _Rows.of(grads[0]), queries.zeros()
            d_key, d_value = keys.zeros(), values.zeros()
            d_bias = None if distance is None else _BiasGrads.like(distance, elapsed)
            chunks = _chunks(ctx.mask, query.shape[1])
            room, other = (_Room(queries.flat, chunks, query.shape[1]) for _ in range(2))
            for block in chunks:
                bias = _block_bias(block, queries, distance, elapsed, query_times, key_times)
                own, seen = queries.places(block.queries, block.valid), keys.places(block.keys)
                q, k, d_out = queries.take(own), keys.take(seen), given.take(own)
                weights, d_scores = _differentiate(
                    room.product(q, k.mT),
                    other.product(d_out, values.take(seen).mT),
                    block,
                    bias,
                    d_bias,
                )
                d_query.put(own, d_scores @ k)
                # not d_scores.mT @ q: the transpose of the wide factor makes a slow product
                d_key.add(seen, (q.mT @ d_scores).mT)
                d_value.add(seen, (d_out.mT @ weights).mT)
        found = [part.all().to(ctx.dtype) for part in (d_query, d_key, d_value)]
        if d_bias is None:
            return *found, None, None, None, None, None
        return *found, d_bias.distance, d_bias.elapsed, None, None, None


class _Rows(NamedTuple):
    """Packed vectors by row and head, and one row more, which padding reads and writes."""

    flat: Tensor  # [(N + 1) H, E], in the dtype of the arithmetic
    heads: int

    @staticmethod
    def of(packed: Tensor) -> _Rows:
        wide = torch.promote_types(packed.dtype, torch.float32)
        one_more = functional.pad(packed.detach().to(wide), (0, 0, 0, 0, 0, 1))
        return _Rows(one_more.flatten(0, 1), packed.shape[1])

    def zeros(self) -> _Rows:
        return _Rows(torch.zeros_like(self.flat), self.heads)

    def places(self, rows: Tensor, valid: Tensor | None = None) -> Tensor:
        """``[R, H, X]`` where rows ``[R, X]`` stand, the last row in place of what is not valid."""
        if valid is not None:
            rows = torch.where(valid, rows, self.flat.shape[0] // self.heads - 1)
        head = torch.arange(self.heads, device=rows.device)
        return rows[:, None] * self.heads + head[:, None]

    def take(self, places: Tensor) -> Tensor:
        """``[R, H, X, E]``."""
        taken = self.flat.index_select(0, places.flatten())
        return taken.view(*places.shape, self.flat.shape[1])

    def put(self, places: Tensor, values: Tensor) -> None:
        self.flat.index_copy_(0, places.flatten(), values.flatten(0, 2))

    def add(self, places: Tensor, values: Tensor) -> None:
        self.flat.index_add_(0, places.flatten(), values.flatten(0, 2))

    def all(self) -> Tensor:
        """``[N, H, E]``."""
        number = self.flat.shape[0] // self.heads - 1
        return self.flat[: number * self.heads].view(number, self.heads, self.flat.shape[1])


class _Room:
    """Memory for the scores of one chunk after the other: fresh pages cost more than a product."""

    def __init__(self, like: Tensor, chunks: Sequence[Blocks], heads: int) -> None:
        most = max((c.queries.numel() * c.keys.shape[1] * heads for c in chunks), default=0)
        self.memory = like.new_empty(most)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right`` for ``[R, H, Q, E]`` and ``[R, H, E, C]``."""
        shape = (*left.shape[:3], right.shape[3])
        flat = self.memory[: math.prod(shape)].view(-1, *shape[2:])
        return torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=flat).view(shape)


class _BlockBias(NamedTuple):
    """The tables, and when the queries and keys of a block are."""

    distance: Tensor  # [P]
    elapsed: Tensor  # [64]
    query_times: Tensor  # [R, Q]
    key_times: Tensor  # [R, C]


class _BiasGrads(NamedTuple):
    """Running gradients of the tables."""

    distance: Tensor
    elapsed: Tensor

    @staticmethod
    def like(distance: Tensor, elapsed: Tensor) -> _BiasGrads:
        return _BiasGrads(torch.zeros_like(distance), torch.zeros_like(elapsed))


def _block_bias(
    block: Blocks,
    queries: _Rows,
    distance: Tensor | None,
    elapsed: Tensor | None,
    query_times: Tensor | None,
    key_times: Tensor | None,
) -> _BlockBias | None:
    if distance is None or elapsed is None or query_times is None or key_times is None:
        return None
    return _BlockBias(
        distance.detach().to(queries.flat.dtype),
        elapsed.detach().to(queries.flat.dtype),
        query_times[block.queries],
        key_times[block.keys],
    )


def _chunks(mask: Sequence[Blocks], heads: int) -> list[Blocks]:
    """The blocks, in parts that have few scores at one time."""
    chunks = []
    for block in mask:
        each = heads * block.queries.shape[1] * block.keys.shape[1]
        number = max(1, CHUNK_SCORES // max(each, 1))
        for start in range(0, block.queries.shape[0], number):
            chunks.append(Blocks(*(values[start : start + number] for values in block)))
    return chunks


def _activate(scores: Tensor, block: Blocks, bias: _BlockBias | None) -> Tensor:
    """The weights ``[R, H, Q, C]`` from the products of queries and keys, which are used up."""
    if _fused(scores):
        return fused.activate(scores, block.first, block.stop, bias)
    share = _share(scores, block)
    return functional.silu(_biased(scores, block, bias)) * share


def _differentiate(
    scores: Tensor,
    d_weights: Tensor,
    block: Blocks,
    bias: _BlockBias | None,
    d_bias: _BiasGrads | None,
) -> tuple[Tensor, Tensor]:
    """Weights and gradient of the scores, from products that are used up; adds to ``d_bias``."""
    if _fused(scores):
        return fused.differentiate(scores, d_weights, block.first, block.stop, bias, d_bias)
    share, scores = _share(scores, block), _biased(scores, block, bias)
    gate = scores.sigmoid()
    d_scores = d_weights * share * gate * (1 + scores * (1 - gate))
    if bias is not None and d_bias is not None:
        # shared by all heads
        d_pair = d_scores.sum(1).flatten()
        distance, elapsed = _buckets(block, bias)
        d_bias.distance.index_add_(0, distance.flatten(), d_pair)
        d_bias.elapsed.index_add_(0, elapsed.flatten(), d_pair)
    return scores * gate * share, d_scores


def _fused(scores: Tensor) -> bool:
    return scores.is_cpu


def _share(scores: Tensor, block: Blocks) -> Tensor:
    """``[R, 1, Q, C]``: one by the number of visible keys, zero for a key that is not visible.

    The published code divides by the number of query rows of the call, so that the same events
    give other outputs where part of them comes from a cache.
    """
    column = torch.arange(scores.shape[-1], device=scores.device)
    first, stop = block.first[..., None], block.stop[..., None]
    visible = (column >= first) & (column < stop)
    return (visible.to(scores.dtype) / (stop - first).clamp(min=1))[:, None]


def _biased(scores: Tensor, block: Blocks, bias: _BlockBias | None) -> Tensor:
    if bias is None:
        return scores
    distance, elapsed = _buckets(block, bias)
    return scores + (bias.distance[distance] + bias.elapsed[elapsed])[:, None]


def _buckets(block: Blocks, bias: _BlockBias) -> tuple[Tensor, Tensor]:
    """Which entry of each table is for each pair, ``[R, Q, C]``."""
    column = torch.arange(block.keys.shape[1], device=block.keys.device)
    distance = (block.stop[..., None] - 1 - column).clamp(0, bias.distance.numel() - 1)
    elapsed = bias.query_times[..., None] - bias.key_times[:, None]
    return distance, elapsed_bucket(elapsed)

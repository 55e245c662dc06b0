"""Softmax attention with rotary positions over packed rows, for decoders of the Llama family.

A query with visible columns ``first .. stop - 1`` of its keys, itself the last of them, gives
``sum_c softmax_c(q . k_c / sqrt(E)) v_c`` and zero where it sees nothing. The mask is that of
``pointwise_attention``. Positions are columns: query and keys are turned (RoFormer, arXiv
2104.09864, eq. 34) where they meet, so that only their distance counts, keys are stored as they
are, and a kept one may be seen from elsewhere in another column.

Per pair of query and key and head: 4 E operations forward. What a chunk of blocks computes is
computed again in the backward pass, so that nothing is kept but queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from everlong.ops.pointwise_attention import Blocks

CHUNK_SCORES = 1 << 18
"""Most scores, of all heads, that exist at one time, but for a block that has more alone."""


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Sequence[Blocks], frequencies: Tensor
) -> Tensor:
    """What each query makes of the values that it sees.

    Args:
        query: ``[Nq, H, E]``.
        key, value: ``[Nk, G, E]``, G a divisor of H: head h reads group ``h // (H / G)``.
        mask: blocks in which each query is valid at most once.
        frequencies: ``[E / 2]`` radians a column.

    Returns:
        ``[Nq, H, E]``; zero for a query that is in no block or sees nothing.

    Raises:
        ValueError: if shapes do not fit together.
    """
    _check(query, key, value, frequencies)
    rows, mixed = [], []
    remember = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    for block in _chunks(mask, query.shape[1]):
        if remember:
            found: Tensor = checkpoint(
                _attend, query, key, value, block, frequencies, use_reentrant=False
            )
        else:
            found = _attend(query, key, value, block, frequencies)
        rows.append(block.queries[block.valid])
        mixed.append(found)
    outputs = torch.zeros_like(query)
    if not rows:
        return outputs
    return outputs.index_copy(0, torch.cat(rows), torch.cat(mixed))


def reference_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Sequence[Blocks], frequencies: Tensor
) -> Tensor:
    """The same as ``softmax_attention``, one query at a time."""
    _check(query, key, value, frequencies)
    share = query.shape[1] // key.shape[1]
    # zeros that are part of the graph, also where no query sees anything
    mixed = [0.0 * row for row in query]
    for block in mask:
        for r, n in block.valid.nonzero().tolist():
            first, stop, row = int(block.first[r, n]), int(block.stop[r, n]), block.queries[r, n]
            if stop <= first:
                continue
            columns, seen = (
                torch.arange(first, stop, device=query.device),
                block.keys[r, first:stop],
            )
            keys = rotated(key[seen], columns, frequencies).repeat_interleave(share, dim=1)
            values = value[seen].repeat_interleave(share, dim=1)
            asked = rotated(query[row], torch.tensor(stop - 1, device=query.device), frequencies)
            scores = torch.einsum("he,che->hc", asked, keys) / math.sqrt(query.shape[2])
            mixed[int(row)] = torch.einsum("hc,che->he", scores.softmax(1), values)
    return torch.stack(mixed) if mixed else torch.zeros_like(query)


def rotated(vectors: Tensor, columns: Tensor, frequencies: Tensor) -> Tensor:
    """Vectors ``[.., H, E]`` turned to their columns ``[..]``, pairs being e and e + E / 2."""
    # angles of thousands of columns would lose their digits in a narrow type
    angle = columns[..., None].to(frequencies.dtype) * frequencies
    cos, sin = (part[..., None, :].to(vectors.dtype) for part in (angle.cos(), angle.sin()))
    a, b = vectors.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, block: Blocks, frequencies: Tensor
) -> Tensor:
    """Outputs of the valid queries of blocks ``[n, H, E]``, in their order."""
    column = torch.arange(block.keys.shape[1], device=query.device)
    asked = rotated(query[block.queries], block.stop - 1, frequencies)
    keys = rotated(key[block.keys], column, frequencies)
    first, stop = block.first[..., None], block.stop[..., None]
    visible = (column >= first) & (column < stop)
    # the softmax of nothing is not a number
    empty = stop <= first
    found = functional.scaled_dot_product_attention(
        asked.transpose(1, 2),
        keys.transpose(1, 2),
        value[block.keys].transpose(1, 2),
        attn_mask=(visible | empty)[:, None],
        enable_gqa=key.shape[1] != query.shape[1],
    )
    # autocast makes it narrow, and what it is added to is not
    found = found.transpose(1, 2).to(query.dtype)
    return found.masked_fill(empty[..., None], 0.0)[block.valid]


def _chunks(mask: Sequence[Blocks], heads: int) -> Iterator[Blocks]:
    """The blocks, in parts that have few scores at one time."""
    for block in mask:
        each = heads * block.queries.shape[1] * block.keys.shape[1]
        number = max(1, CHUNK_SCORES // max(each, 1))
        for start in range(0, block.queries.shape[0], number):
            yield Blocks(*(values[start : start + number] for values in block))


def _check(query: Tensor, key: Tensor, value: Tensor, frequencies: Tensor) -> None:
    if (
        query.dim() != 3
        or key.shape != value.shape
        or key.dim() != 3
        or query.shape[2] != key.shape[2]
        or key.shape[1] == 0
        or query.shape[1] % key.shape[1]
    ):
        raise ValueError(
            "attention expects query [Nq, H, E] and key and value [Nk, G, E], H a multiple of G; "
            f"received {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if 2 * frequencies.numel() != query.shape[2]:
        raise ValueError(
            f"expected frequencies [{query.shape[2] // 2}], one a pair of the heads' width, "
            f"received [{frequencies.numel()}]; heads need an even width"
        )

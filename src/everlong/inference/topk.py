"""From scores to lists and ranks, exactly: ties are resolved by a rule, never by chance.

In a list, the lower item row comes first among equal scores. In a rank, ties count against us.
A score of -inf means "not to be recommended".
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES_PER_BATCH = 1 << 23
"""Scores held at once by default: 32 MiB in float32."""

NONE = -1
"""The item of a place for which nothing was left."""


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their items, best first, ``[B, min(k, I)]`` each.

    Equal scores are ordered by item row, also where they straddle the k-th place. Places filled
    by -inf hold item -1.

    Args:
        scores: ``[B, I]``.
        k: places wanted.

    Raises:
        ValueError: if a score is NaN or ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"a list needs at least one place: expected k >= 1, received {k}")
    k = min(k, scores.shape[1])
    if scores.numel() == 0:
        return scores[:, :k], torch.empty_like(scores[:, :k], dtype=torch.int64)
    values, items = torch.topk(scores, k)
    # topk puts NaN first
    _refuse_nan(values)
    last = values[:, -1:]
    # only the values of topk are certain: among items equal to the last one it picks any
    straddles = (torch.count_nonzero(scores >= last, dim=1) > k) & ~last[:, 0].isneginf()
    rows = straddles.nonzero()[:, 0]
    if rows.numel():
        items = items.index_copy(0, rows, _lowest_of_ties(scores[rows], last[rows], k))
    items = items.sort(dim=1)[0]
    values, order = scores.gather(1, items).sort(dim=1, descending=True, stable=True)
    items = items.gather(1, order)
    return values, items.masked_fill(values.isneginf(), NONE)


def _lowest_of_ties(scores: Tensor, last: Tensor, k: int) -> Tensor:
    """The items ``[B, k]`` above the k-th score ``last [B, 1]`` and the first ones equal to it."""
    above = scores > last
    equal = scores == last
    room = k - above.sum(dim=1, keepdim=True, dtype=torch.int32)
    chosen = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)


def _refuse_nan(values: Tensor) -> None:
    if bool(values.isnan().any()):
        raise ValueError(
            "scores must be numbers, received NaN; the model's parameters or state have "
            "diverged: lower the learning rate or rebuild the state"
        )


def rank_of(scores: Tensor, target: Tensor) -> Tensor:
    """The rank of each row's target, from 1, ties counted against us: ``[B]`` int64.

    A target whose score is -inf ranks last, ``I``.

    Args:
        scores: ``[B, I]``.
        target: ``[B]`` item rows.

    Raises:
        ValueError: if a score is NaN or the shapes differ.
    """
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise ValueError(
            "expected scores [B, I] and one target per row [B], "
            f"received {tuple(scores.shape)} and {tuple(target.shape)}"
        )
    if scores.numel() == 0:
        return torch.empty_like(target, dtype=torch.int64)
    # the maximum carries NaN, without a table of flags the size of the scores
    _refuse_nan(scores.amax(dim=1))
    own = scores.gather(1, target[:, None])
    return torch.count_nonzero(scores >= own, dim=1)


def mask_items(scores: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """A copy of ``scores [B, I]`` with -inf at the pairs ``rows [E]``, ``items [E]``."""
    # a copy, because scores may be a view of the model's own numbers
    return scores.index_put((rows, items), scores.new_tensor(-torch.inf))


def top_k_items(
    user: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    *,
    exclude: tuple[Tensor, Tensor] | None = None,
    scores_per_batch: int = SCORES_PER_BATCH,
) -> tuple[Tensor, Tensor]:
    """``top_k(user @ weight.T + bias, k)`` in bounded memory, whatever the catalogue.

    Args:
        user: ``[B, D]`` user vectors.
        weight: ``[I, D]`` item vectors.
        bias: ``[I]``.
        k: places wanted.
        exclude: packed pairs (rows ``[E]``, items ``[E]``) that must not be listed.
        scores_per_batch: scores held at once.

    Returns:
        Scores and items, ``[B, min(k, I)]`` each, as :func:`top_k` returns them.
    """
    num_users, num_items = user.shape[0], weight.shape[0]
    if num_users == 0:
        return top_k(user.new_empty(0, num_items), k)
    item_block = min(num_items, max(scores_per_batch // num_users, 1024))
    user_block = max(1, scores_per_batch // item_block)
    rows, items = exclude if exclude is not None else (user.new_empty(0, dtype=torch.int64),) * 2
    lists = []
    for first in range(0, num_users, user_block):
        here = (rows >= first) & (rows < first + user_block)
        pairs = rows[here] - first, items[here]
        part = user[first : first + user_block]
        lists.append(_top_k_blocks(part, weight, bias, k, pairs, item_block))
    values, found = zip(*lists, strict=True)
    return torch.cat(values), torch.cat(found)


def _top_k_blocks(
    user: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    exclude: tuple[Tensor, Tensor],
    item_block: int,
) -> tuple[Tensor, Tensor]:
    """``top_k`` of some users, block of items by block of items."""
    num_items = weight.shape[0]
    starts = torch.arange(0, num_items + item_block, item_block, device=user.device)
    items, order = exclude[1].sort()
    rows = exclude[0][order]
    edges = torch.searchsorted(items, starts).tolist()
    best = user.new_empty(user.shape[0], 0), torch.empty_like(user[:, :0], dtype=torch.int64)
    for block, first in enumerate(range(0, num_items, item_block)):
        own = slice(first, first + item_block)
        scores = torch.addmm(bias[own].to(user.dtype), user, weight[own].to(user.dtype).T)
        pairs = slice(edges[block], edges[block + 1])
        scores[rows[pairs], items[pairs] - first] = -torch.inf
        values, found = top_k(scores, k)
        found = torch.where(found == NONE, NONE, found + first)
        best = _merge(best, (values, found), k)
    return best


def _merge(
    best: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """One list of two, where every item of ``later`` has a higher row than those of ``best``."""
    # the first of equal columns is the lower item row, because each list is ordered so
    values, columns = top_k(torch.cat([best[0], later[0]], dim=1), k)
    items = torch.cat([best[1], later[1]], dim=1).gather(1, columns.clamp(min=0))
    return values, items.masked_fill(columns == NONE, NONE)

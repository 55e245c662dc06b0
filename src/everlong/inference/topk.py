"""From whole tables of scores to lists and ranks.

Among equal scores the lower item row comes first, in a list and in a rank alike. A score of -inf
means "not to be recommended".
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
    check_k(k)
    k = min(k, scores.shape[1])
    if scores.numel() == 0:
        return scores[:, :k], torch.empty_like(scores[:, :k], dtype=torch.int64)
    values, items = torch.topk(scores, k)
    # topk puts NaN first
    refuse_nan(values)
    last = values[:, -1:]
    # only the values of topk are certain: among items equal to the last one it picks any
    straddles = (torch.count_nonzero(scores >= last, dim=1) > k) & ~last[:, 0].isneginf()
    rows = straddles.nonzero()[:, 0]
    if rows.numel():
        items = items.index_copy(0, rows, _lowest_of_ties(scores[rows], last[rows], k))
    items = items.sort(dim=1)[0]
    return in_order(scores.gather(1, items), items)


def in_order(scores: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and items ``[B, n]`` by falling score, the lower item first among equals.

    Items of -inf become -1 and stand last.
    """
    items, order = items.sort(dim=1, stable=True)
    values, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, items.gather(1, order).masked_fill(values.isneginf(), NONE)


def rank_of(scores: Tensor, target: Tensor) -> Tensor:
    """The place of each row's target in its list, from 1: ``[B]`` int64.

    A target of -inf is in no list: it ranks last, at ``I``.

    Args:
        scores: ``[B, I]``.
        target: ``[B]`` item of each row.

    Raises:
        ValueError: if a score is NaN, or there is not one target for each row.
    """
    if target.shape != scores.shape[:1]:
        raise ValueError(
            f"one target per row of scores: expected {scores.shape[0]}, received {target.numel()}"
        )
    if scores.numel() == 0:
        return target
    # the maximum of a row with NaN is NaN
    refuse_nan(scores.amax(dim=1))
    own = scores.gather(1, target[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    before = torch.count_nonzero((scores > own) | ((scores == own) & lower), dim=1)
    return torch.where(own[:, 0].isneginf(), scores.shape[1], before + 1)


def mask_items(scores: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """A copy of ``scores [B, I]`` with -inf at the pairs ``rows [E]``, ``items [E]``."""
    # a copy, because scores may be a view of the model's own numbers
    return scores.index_put((rows, items), scores.new_tensor(-torch.inf))


def check_k(k: int) -> None:
    """Raises ``ValueError`` if a list has no place."""
    if k < 1:
        raise ValueError(f"a list needs at least one place: expected k >= 1, received {k}")


def refuse_nan(values: Tensor) -> None:
    """Raises ``ValueError`` if a score is NaN."""
    if bool(values.isnan().any()):
        raise ValueError(
            "scores must be numbers, received NaN; the model's parameters or state have "
            "diverged: lower the learning rate or rebuild the state"
        )


def _lowest_of_ties(scores: Tensor, last: Tensor, k: int) -> Tensor:
    """The items ``[B, k]`` above the k-th score ``last [B, 1]`` and the first ones equal to it."""
    above = scores > last
    equal = scores == last
    room = k - above.sum(dim=1, keepdim=True, dtype=torch.int32)
    chosen = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)

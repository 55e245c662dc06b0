"""Runs of queries with the keys that they may see, put into blocks of few shapes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from everlong.ops.pointwise_attention import Blocks

QUERIES = 128
"""Most queries of a run: keys are gathered once for all of them, and a run of a causal run
computes up to half of so many columns in vain."""

SHORT = 16
"""MaskRuns with up to so many keys share a block."""


class MaskRuns(NamedTuple):
    """R runs of queries, each with one run of keys.

    Query n of a run stands in row ``row + n`` of the queries. It sees ``prefix + n + 1`` columns
    of the run's keys but for those before ``first``, and of these the last ``window`` alone.
    """

    owner: Tensor  # [R] what the keys are found by, such as a batch row
    row: Tensor  # [R] row of the first query
    queries: Tensor  # [R] number of queries, at least one
    prefix: Tensor  # [R] columns before that of the first query
    first: Tensor  # [R] first visible column


def split_runs(lengths: Tensor, most: int = QUERIES) -> tuple[Tensor, Tensor, Tensor]:
    """Runs of ``lengths [B]`` cut into pieces of at most ``most``.

    Returns:
        Of each piece its run, where it begins in the run, and its length: ``[R]`` each.
    """
    count = -(-lengths // most)
    run = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(count)
    begin = (torch.arange(run.numel(), device=run.device) - (count.cumsum(0) - count)[run]) * most
    return run, begin, (lengths[run] - begin).clamp(max=most)


def block_mask(
    runs: MaskRuns, keys_at: Callable[[Tensor, Tensor], Tensor], window: int | None = None
) -> list[Blocks]:
    """Blocks of runs with similar numbers of keys, of which about a fifth are padding.

    Of the pairs of queries and columns in a block about half are seen; with a window that is short
    beside ``QUERIES`` a third.

    Args:
        runs: the runs.
        keys_at: rows of the keys, from the runs' owners ``[R, 1]`` and columns ``[R, C]``.
        window: most columns that a query sees; None = all.
    """
    width = runs.prefix + runs.queries
    order = torch.argsort(width, stable=True)
    known = width[order].tolist()
    mask, low = [], 0
    while low < len(known):
        high = bisect_right(known, max(SHORT, known[low] * 5 // 4), lo=low)
        mask.append(_block(MaskRuns(*(v[order[low:high]] for v in runs)), keys_at, window))
        low = high
    return mask


def _block(
    runs: MaskRuns, keys_at: Callable[[Tensor, Tensor], Tensor], window: int | None
) -> Blocks:
    device, last = runs.row.device, runs.queries[:, None] - 1
    width = runs.prefix + runs.queries
    query = torch.arange(int(runs.queries.max()), device=device)
    column = torch.arange(int(width.max()), device=device)
    nth = query.minimum(last)
    stop = runs.prefix[:, None] + nth + 1
    first = runs.first[:, None].expand_as(stop)
    if window is not None:
        first = first.maximum(stop - window)
    # padding repeats the last column; columns before ``first``, which may be nowhere, are not asked
    columns = column.minimum(width[:, None] - 1).maximum(runs.first[:, None])
    keys = keys_at(runs.owner[:, None], columns)
    return Blocks(runs.row[:, None] + nth, keys, first, stop, query <= last)

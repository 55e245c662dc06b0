"""Losses of rankers: over impressions, over pairs and over lists within a request.

The paper's own loss is not public; these are the three that fit its aim, that a set is trained as
it is served. All three leave out candidates without a label, which then count by what the labelled
ones saw of them alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from everlong.ops.sets import Sets


class Shares(NamedTuple):
    """How much each loss counts in the mix."""

    pointwise: float = 1.0
    pairwise: float = 0.0
    listwise: float = 0.0


def ranking_loss(logits: Tensor, labels: Tensor, offsets: Tensor, shares: Shares) -> Tensor:
    """The mix of the three losses.

    Args:
        logits: ``[P]``.
        labels: ``[P]`` from 0 to 1, NaN where there is none.
        offsets: ``[Q + 1]`` candidates of each request.
        shares: weight of each loss; of 0 it is not computed.

    Raises:
        ValueError: if the lengths differ, a label is outside 0 .. 1, or a share is negative.
    """
    check(logits, labels, offsets, shares)
    loss = logits.new_zeros(())
    if shares.pointwise:
        loss = loss + shares.pointwise * pointwise_loss(logits, labels)
    if shares.pairwise or shares.listwise:
        sets = Sets.of(offsets)
        if shares.pairwise:
            loss = loss + shares.pairwise * pairwise_loss(logits, labels, sets)
        if shares.listwise:
            loss = loss + shares.listwise * listwise_loss(logits, labels, sets)
    return loss


def pointwise_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the labelled candidates, each counting the same; 0 without any."""
    known = ~labels.isnan()
    total = binary_cross_entropy_with_logits(logits[known], labels[known], reduction="sum")
    return total / max(1, int(known.sum()))


def pairwise_loss(logits: Tensor, labels: Tensor, sets: Sets) -> Tensor:
    """Mean over requests of the mean of ``softplus(-(better - worse))`` over pairs of candidates.

    Requests without a pair of different labels do not count.
    """
    total, requests = logits.new_zeros(()), 0
    for _, index in sets.groups:
        label, logit = labels[index], logits[index]
        # NaN is neither more nor less than anything
        better = label[:, :, None] > label[:, None, :]
        pairs = better.sum((1, 2))
        if not bool(pairs.any()):
            continue
        losses = softplus(logit[:, None, :] - logit[:, :, None]) * better
        total = total + (losses.sum((1, 2)) / pairs.clamp(min=1)).sum()
        requests += int((pairs > 0).sum())
    return total / max(1, requests)


def listwise_loss(logits: Tensor, labels: Tensor, sets: Sets) -> Tensor:
    """Mean over requests of the cross entropy from labels, divided by their sum, to a softmax.

    Only labelled candidates are in the softmax. Requests in which nothing has a label above 0, or
    all that is labelled is one candidate, do not count.
    """
    total, requests = logits.new_zeros(()), 0
    for _, index in sets.groups:
        label = labels[index]
        known = ~label.isnan()
        label = label.nan_to_num(0.0)
        counts = (label.sum(1) > 0) & (known.sum(1) > 1)
        if not bool(counts.any()):
            continue
        label, known = label[counts], known[counts]
        chances = logits[index[counts]].masked_fill(~known, -torch.inf).log_softmax(1)
        share = label / label.sum(1, keepdim=True)
        total = total - (share * chances.masked_fill(~known, 0.0)).sum()
        requests += int(counts.sum())
    return total / max(1, requests)


def check(logits: Tensor, labels: Tensor, offsets: Tensor, shares: Shares) -> None:
    """Raises ``ValueError`` unless the arguments of ``ranking_loss`` fit together."""
    if logits.shape != labels.shape or logits.dim() != 1:
        raise ValueError(
            f"expected logits and labels [P], received {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if offsets.is_cpu and int(offsets[-1]) != logits.numel():
        raise ValueError(
            f"expected candidates up to {logits.numel()}, received offsets up to {int(offsets[-1])}"
        )
    if min(shares) < 0 or sum(shares) == 0:
        raise ValueError(f"expected shares of at least 0 and one above, received {shares}")
    if labels.is_cpu and bool(((labels < 0) | (labels > 1)).any()):
        raise ValueError(
            f"expected labels from 0 to 1, received {float(labels.nan_to_num(0).min())} to "
            f"{float(labels.nan_to_num(0).max())}"
        )

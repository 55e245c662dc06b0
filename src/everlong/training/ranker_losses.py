"""Losses of rankers: over impressions, over pairs and over lists within a request.

The paper's own loss is not public; these are the three that fit its aim, that a set is trained as
it is served. All three leave out candidates without a label, which then count by what the labelled
ones saw of them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from everlong.ops.sets import Sets

RankerLoss = Callable[[Tensor, Tensor, Sets], Tensor]
"""Logits ``[P]``, labels ``[P]`` (NaN where there is none) and the sets of candidates to a mean."""


def ranker_loss(
    logits: Tensor, labels: Tensor, offsets: Tensor, shares: Mapping[str, float]
) -> Tensor:
    """The mix of the losses.

    Args:
        logits: ``[P]``.
        labels: ``[P]`` from 0 to 1, NaN where there is none.
        offsets: ``[Q + 1]`` candidates of each request.
        shares: weight of each of the ``RANKER_LOSSES``; of 0 it is not computed.

    Raises:
        ValueError: if the lengths differ, a label is outside 0 .. 1, or a share is negative.
    """
    check(logits, labels, offsets, shares)
    loss, sets = logits.new_zeros(()), Sets.of(offsets)
    for name, share in shares.items():
        if share:
            loss = loss + share * RANKER_LOSSES[name](logits, labels, sets)
    return loss


def pointwise_loss(logits: Tensor, labels: Tensor, sets: Sets) -> Tensor:
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


RANKER_LOSSES: Mapping[str, RankerLoss] = {
    "pointwise": pointwise_loss,
    "pairwise": pairwise_loss,
    "listwise": listwise_loss,
}
"""Every loss of rankers by its name; its share is a setting of that name."""


def check(logits: Tensor, labels: Tensor, offsets: Tensor, shares: Mapping[str, float]) -> None:
    """Raises ``ValueError`` unless the arguments of ``ranker_loss`` fit together."""
    if logits.shape != labels.shape or logits.dim() != 1:
        raise ValueError(
            f"expected logits and labels [P], received {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if offsets.is_cpu and int(offsets[-1]) != logits.numel():
        raise ValueError(
            f"expected candidates up to {logits.numel()}, received offsets up to {int(offsets[-1])}"
        )
    unknown = shares.keys() - RANKER_LOSSES.keys()
    if unknown or min(shares.values()) < 0 or sum(shares.values()) == 0:
        raise ValueError(
            f"expected shares of {', '.join(RANKER_LOSSES)} of at least 0 and one above, received "
            f"{dict(shares)}"
        )
    if labels.is_cpu and bool(((labels < 0) | (labels > 1)).any()):
        raise ValueError(
            f"expected labels from 0 to 1, received {float(labels.nan_to_num(0).min())} to "
            f"{float(labels.nan_to_num(0).max())}"
        )
